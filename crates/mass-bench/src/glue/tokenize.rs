//! WordPiece tokenisation from the files of a Hugging Face model directory.

use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde_json::Value;
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::normalizers::{BertNormalizer, NormalizerWrapper};
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::processors::bert::BertProcessing;
use tokenizers::{AddedToken, PostProcessor, Tokenizer, TruncationParams, TruncationStrategy};

use super::data::Example;
use super::error::GlueError;
use crate::text::regular;

/// Special tokens that BERT needs.
const NEEDED: [&str; 3] = ["[UNK]", "[CLS]", "[SEP]"];

/// A `tokenizer.json`, without what turns ids back into text and is not needed here.
fn read_json(path: &Path) -> Result<Tokenizer, GlueError> {
    let bytes = regular(path).map_err(|e| broken(path, e))?;
    let mut value: Value = serde_json::from_slice(&bytes).map_err(|e| broken(path, e))?;
    if let Some(decoder) = value.get_mut("decoder") {
        *decoder = Value::Null;
    }
    // On which the library panics where it cannot be read. It is none of BERT's.
    if is_or_holds(&value["normalizer"], "Precompiled") {
        return Err(broken(path, "its normalizer is precompiled, not BERT's"));
    }
    // Other parts may do so too.
    let parsed = std::panic::catch_unwind(|| value.to_string().parse::<Tokenizer>());
    let parsed = parsed.map_err(|_| broken(path, "its parts do not fit together"))?;
    parsed.map_err(|e| broken(path, e))
}

/// Whether a part of a `tokenizer.json`, or a part within it, is of a type.
fn is_or_holds(part: &Value, kind: &str) -> bool {
    match part {
        Value::Object(fields) => {
            fields.get("type").is_some_and(|t| t == kind)
                || fields.values().any(|part| is_or_holds(part, kind))
        }
        Value::Array(parts) => parts.iter().any(|part| is_or_holds(part, kind)),
        _ => false,
    }
}

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
    /// What `tokenizer_config.json` says of case (`do_lower_case`), accents (`strip_accents`) and Chinese characters
    /// (`tokenize_chinese_chars`) holds, over `tokenizer.json` too, as with transformers' `BertTokenizer`. Where it says nothing
    /// `tokenizer.json` does. With `vocab.txt` text is then lower-cased iff no word of the vocabulary has an ASCII capital,
    /// accents are stripped iff it is lower-cased, and each Chinese character is a word.
    ///
    /// # Errors
    /// [`GlueError::Tokenizer`] naming the file that is missing or no tokenizer, or, with `vocab.txt`, a configuration that asks
    /// for `never_split` or no `do_basic_tokenize`.
    pub fn open(dir: &Path, max_length: usize) -> Result<Self, GlueError> {
        let json = dir.join("tokenizer.json");
        let config = dir.join("tokenizer_config.json");
        if json.exists() {
            let mut inner = read_json(&json)?;
            let rules = Rules::read(&config, false)?;
            if let Some(NormalizerWrapper::BertNormalizer(own)) = inner.get_normalizer() {
                let both = rules.over(*own);
                inner
                    .with_normalizer(Some(both))
                    .map_err(|e| broken(&json, e))?;
            }
            return Self::with_length(inner, json, max_length);
        }
        let path = dir.join("vocab.txt");
        if !path.exists() {
            return Err(broken(dir, "neither tokenizer.json nor vocab.txt there"));
        }
        let bytes = regular(&path).map_err(|e| broken(&path, e))?;
        let text = std::str::from_utf8(&bytes).map_err(|e| broken(&path, e))?;
        let words = lines(text);
        let rules = Rules::read(&config, true)?;
        let unsaid = BertNormalizer::new(true, true, None, uncased(&words));
        Self::build(&words, rules.over(unsaid), max_length, path)
    }

    /// From a vocabulary, whose words are numbered as listed; `##` marks pieces that continue a word. A word that no text can hold,
    /// such as an empty one, has its number and is never used.
    ///
    /// # Errors
    /// [`GlueError::Tokenizer`] for a word that stands twice, or special tokens that are missing.
    pub fn from_vocabulary(
        words: &[String],
        lowercase: bool,
        max_length: usize,
    ) -> Result<Self, GlueError> {
        let normalizer = BertNormalizer::new(true, true, None, lowercase);
        Self::build(words, normalizer, max_length, PathBuf::from("vocabulary"))
    }

    fn build(
        words: &[String],
        normalizer: BertNormalizer,
        max_length: usize,
        path: PathBuf,
    ) -> Result<Self, GlueError> {
        let mut seen = std::collections::HashMap::new();
        for (i, word) in words.iter().enumerate() {
            if let Some(first) = seen.insert(word.as_str(), i)
                && !word.is_empty()
            {
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
        // Its own reader takes away what blanks a word ends in; of it comes the type of the map alone.
        let mut vocabulary = WordPiece::read_bytes(b"").map_err(|e| broken(&path, e))?;
        vocabulary.extend(seen.iter().map(|(word, &i)| ((*word).to_owned(), i as u32)));
        let model = WordPiece::builder()
            .vocab(vocabulary)
            .unk_token(NEEDED[0].to_owned())
            .build()
            .map_err(|e| broken(&path, e))?;
        let mut inner = Tokenizer::new(model);
        inner
            .with_normalizer(Some(normalizer))
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
        // Room for [CLS], both [SEP] and a piece of each text; a tokenizer.json may add more to them.
        let added = inner.get_post_processor().map_or(3, |p| {
            let added = [false, true].map(|pair| p.added_tokens(pair));
            added.into_iter().fold(3, usize::max)
        });
        if max_length < added.saturating_add(2) {
            let problem = format!(
                "sequences of {max_length} are too short for a pair with {added} special tokens"
            );
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

    /// Whether every id is one of a model with so many token ids, where that is known.
    ///
    /// # Errors
    /// [`GlueError::Tokenizer`].
    pub(crate) fn check_fits(&self, vocab_size: Option<u64>) -> Result<(), GlueError> {
        let ids = self.vocabulary_size() as u64;
        match vocab_size {
            Some(size) if ids > size => Err(broken(
                &self.path,
                format!(
                    "has ids up to {}, but the model's vocabulary has {size} entries",
                    ids - 1
                ),
            )),
            _ => Ok(()),
        }
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

/// What a tokenizer_config.json says of the text before it is split into pieces; `None` where it says nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Rules {
    /// `do_lower_case`.
    lowercase: Option<bool>,
    /// `strip_accents`; null leaves it to the case: lower-cased text loses them.
    strip_accents: Option<Option<bool>>,
    /// `tokenize_chinese_chars`: each is a word of its own.
    chinese: Option<bool>,
}

impl Rules {
    /// Of a file that may be missing. `vocabulary` says whether the tokenizer is made by these rules alone: then those that are
    /// not known here are refused, as they are of the slow tokenizer that a vocabulary is for.
    fn read(path: &Path, vocabulary: bool) -> Result<Self, GlueError> {
        if !path.exists() {
            return Ok(Self::default());
        }
        let bytes = regular(path).map_err(|e| broken(path, e))?;
        let config: Value = serde_json::from_slice(&bytes).map_err(|e| broken(path, e))?;
        let Value::Object(config) = config else {
            return Err(broken(path, "not a JSON object"));
        };
        let flag = |name: &str| match config.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(other) => Err(broken(
                path,
                format!("{name} is {other}, not true or false"),
            )),
        };
        let accents = flag("strip_accents")?;
        let rules = Self {
            lowercase: flag("do_lower_case")?,
            strip_accents: config.contains_key("strip_accents").then_some(accents),
            chinese: flag("tokenize_chinese_chars")?,
        };
        if vocabulary {
            if flag("do_basic_tokenize")? == Some(false) {
                return Err(broken(path, "do_basic_tokenize false is not supported"));
            }
            match config.get("never_split") {
                None | Some(Value::Null) => {}
                Some(Value::Array(words)) if words.is_empty() => {}
                Some(words) => {
                    return Err(broken(
                        path,
                        format!("never_split {words} is not supported"),
                    ));
                }
            }
        }
        Ok(rules)
    }

    /// Over what a tokenizer.json says, as transformers reads the two together.
    fn over(self, normalizer: BertNormalizer) -> BertNormalizer {
        BertNormalizer::new(
            normalizer.clean_text,
            self.chinese.unwrap_or(normalizer.handle_chinese_chars),
            self.strip_accents.unwrap_or(normalizer.strip_accents),
            self.lowercase.unwrap_or(normalizer.lowercase),
        )
    }
}

/// The words of a vocab.txt. Lines end as Python's text files end them, at `\n`, `\r` and both together, and at nothing else that
/// Unicode calls an end of a line; a line may be empty, or of blanks.
fn lines(text: &str) -> Vec<String> {
    let text = text.replace("\r\n", "\n").replace('\r', "\n");
    let text = text.strip_suffix('\n').unwrap_or(&text);
    text.split('\n').map(str::to_owned).collect()
}

/// Whether no ordinary word has a capital letter of ASCII (vocabularies hold mathematical capitals in any case).
fn uncased(words: &[String]) -> bool {
    let special = |w: &str| w.starts_with('[') && w.ends_with(']') && w.len() > 2;
    !words
        .iter()
        .any(|w| !special(w) && w.bytes().any(|b| b.is_ascii_uppercase()))
}
