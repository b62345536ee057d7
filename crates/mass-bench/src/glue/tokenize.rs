//! WordPiece tokenisation from the files of a Hugging Face model directory.

use std::path::{Path, PathBuf};

use rayon::prelude::*;
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::normalizers::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::processors::bert::BertProcessing;
use tokenizers::{AddedToken, Tokenizer, TruncationParams, TruncationStrategy};

use super::data::Example;
use super::error::GlueError;

/// Special tokens that BERT needs.
const NEEDED: [&str; 3] = ["[UNK]", "[CLS]", "[SEP]"];

/// A text, or two, as the model reads them: `[CLS] first [SEP]` or `[CLS] first [SEP] second [SEP]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// Ids of WordPieces.
    pub ids: Vec<u32>,
    /// 0 up to the first `[SEP]`, 1 after it.
    pub types: Vec<u32>,
}

/// Splits text into WordPieces, truncated to a length: of a pair the longer one is cut first.
#[derive(Debug, Clone)]
pub struct TextTokenizer {
    inner: Tokenizer,
    path: PathBuf,
}

impl TextTokenizer {
    /// From `tokenizer.json` in a model's directory, else from `vocab.txt`; `max_length` counts special tokens.
    ///
    /// With `vocab.txt` alone, whether text is lower-cased is `do_lower_case` of `tokenizer_config.json`; where that says
    /// nothing, text is lower-cased iff no word of the vocabulary has an ASCII capital.
    ///
    /// # Errors
    /// [`GlueError::Tokenizer`] naming the file that is missing or no tokenizer.
    pub fn open(dir: &Path, max_length: usize) -> Result<Self, GlueError> {
        let json = dir.join("tokenizer.json");
        if json.exists() {
            let inner = Tokenizer::from_file(&json).map_err(|e| broken(&json, e))?;
            return Self::with_length(inner, json, max_length);
        }
        let path = dir.join("vocab.txt");
        if !path.exists() {
            return Err(broken(dir, "neither tokenizer.json nor vocab.txt there"));
        }
        let bytes = std::fs::read(&path).map_err(|e| broken(&path, e))?;
        let text = std::str::from_utf8(&bytes).map_err(|e| broken(&path, e))?;
        let words: Vec<String> = text.lines().map(str::to_owned).collect();
        let lowercase = match lower_case(&dir.join("tokenizer_config.json"))? {
            Some(lowercase) => lowercase,
            None => uncased(&words),
        };
        Self::build(&words, lowercase, max_length, path)
    }

    /// From a vocabulary, whose words are numbered as listed; `##` marks pieces that continue a word.
    ///
    /// # Errors
    /// [`GlueError::Tokenizer`] for a word that stands twice, an empty one, or special tokens that are missing.
    pub fn from_vocabulary(
        words: &[String],
        lowercase: bool,
        max_length: usize,
    ) -> Result<Self, GlueError> {
        Self::build(words, lowercase, max_length, PathBuf::from("vocabulary"))
    }

    fn build(
        words: &[String],
        lowercase: bool,
        max_length: usize,
        path: PathBuf,
    ) -> Result<Self, GlueError> {
        let mut seen = std::collections::HashMap::new();
        for (i, word) in words.iter().enumerate() {
            if word.trim() != word || word.is_empty() {
                let problem = format!("line {}: {word:?} is no word", i + 1);
                return Err(broken(&path, problem));
            }
            if let Some(first) = seen.insert(word.as_str(), i) {
                let problem = format!(
                    "line {}: `{word}` stands in line {} already",
                    i + 1,
                    first + 1
                );
                return Err(broken(&path, problem));
            }
        }
        let id = |name: &str| {
            let id = seen.get(name).map(|&i| (name.to_owned(), i as u32));
            id.ok_or_else(|| broken(&path, format!("`{name}` is missing")))
        };
        let [_, cls, sep] = NEEDED.map(id);
        let (cls, sep) = (cls?, sep?);
        id(NEEDED[0])?;
        let vocabulary = WordPiece::read_bytes(words.join("\n").as_bytes());
        let vocabulary = vocabulary.map_err(|e| broken(&path, e))?;
        let model = WordPiece::builder()
            .vocab(vocabulary)
            .unk_token(NEEDED[0].to_owned())
            .build()
            .map_err(|e| broken(&path, e))?;
        let mut inner = Tokenizer::new(model);
        inner
            .with_normalizer(Some(BertNormalizer::new(true, true, None, lowercase)))
            .map_err(|e| broken(&path, e))?;
        inner.with_pre_tokenizer(Some(BertPreTokenizer));
        inner.with_post_processor(Some(BertProcessing::new(sep, cls)));
        let special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];
        let special = special.iter().filter(|s| seen.contains_key(**s));
        inner
            .add_special_tokens(special.map(|s| AddedToken::from(*s, true)))
            .map_err(|e| broken(&path, e))?;
        Self::with_length(inner, path, max_length)
    }

    fn with_length(
        mut inner: Tokenizer,
        path: PathBuf,
        max_length: usize,
    ) -> Result<Self, GlueError> {
        // Room for [CLS], both [SEP] and a piece of each text.
        if max_length < 5 {
            let problem = format!("sequences of {max_length} are too short for a pair");
            return Err(broken(&path, problem));
        }
        let truncation = TruncationParams {
            max_length,
            strategy: TruncationStrategy::LongestFirst,
            ..TruncationParams::default()
        };
        inner
            .with_truncation(Some(truncation))
            .map_err(|e| broken(&path, e))?;
        inner.with_padding(None);
        let made = Self { inner, path };
        // A tokenizer.json may be that of another kind of model.
        let probe = made.encode("a", Some("b"))?;
        let ends = |id: Option<&u32>| id.and_then(|&id| made.inner.id_to_token(id));
        let (first, last) = (ends(probe.ids.first()), ends(probe.ids.last()));
        if (first.as_deref(), last.as_deref()) != (Some("[CLS]"), Some("[SEP]")) {
            let problem = "a pair of texts is not put between [CLS] and [SEP]: no BERT tokenizer";
            return Err(broken(&made.path, problem));
        }
        Ok(made)
    }

    /// The ids of a text or a pair.
    ///
    /// # Errors
    /// [`GlueError::Text`] if the tokenizer refuses it (a piece for which the vocabulary has not even `[UNK]`).
    pub fn encode(&self, first: &str, second: Option<&str>) -> Result<Encoded, GlueError> {
        let encoding = match second {
            Some(second) => self.inner.encode_fast((first, second), true),
            None => self.inner.encode_fast(first, true),
        };
        let encoding = encoding.map_err(|e| GlueError::Text {
            text: first.chars().take(60).collect(),
            problem: e.to_string(),
        })?;
        Ok(Encoded {
            ids: encoding.get_ids().to_vec(),
            types: encoding.get_type_ids().to_vec(),
        })
    }

    /// The ids of every example, in order, on as many threads as there are.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_all(&self, examples: &[Example]) -> Result<Vec<Encoded>, GlueError> {
        examples
            .par_iter()
            .map(|e| self.encode(&e.first, e.second.as_deref()))
            .collect()
    }

    /// One more than the largest id: what a model's vocabulary must at least be.
    #[must_use]
    pub fn vocabulary_size(&self) -> usize {
        let ids = self.inner.get_vocab(true);
        ids.values().max().map_or(0, |&id| id as usize + 1)
    }

    /// The file that it was made from.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn broken(path: &Path, problem: impl ToString) -> GlueError {
    GlueError::Tokenizer {
        path: path.to_owned(),
        problem: problem.to_string(),
    }
}

/// `do_lower_case` of a tokenizer_config.json; `None` where the file or the entry is missing.
fn lower_case(path: &Path) -> Result<Option<bool>, GlueError> {
    if !path.exists() {
        return Ok(None);
    }
    let text = std::fs::read_to_string(path).map_err(|e| broken(path, e))?;
    let config: serde_json::Value = serde_json::from_str(&text).map_err(|e| broken(path, e))?;
    match &config["do_lower_case"] {
        serde_json::Value::Null => Ok(None),
        serde_json::Value::Bool(lowercase) => Ok(Some(*lowercase)),
        other => Err(broken(path, format!("do_lower_case is {other}"))),
    }
}

/// Whether no ordinary word has a capital letter of ASCII (vocabularies hold mathematical capitals in any case).
fn uncased(words: &[String]) -> bool {
    let special = |w: &str| w.starts_with('[') && w.ends_with(']') && w.len() > 2;
    !words
        .iter()
        .any(|w| !special(w) && w.bytes().any(|b| b.is_ascii_uppercase()))
}
