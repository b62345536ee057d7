//! A few hundred sentences of a toy grammar and a WordPiece vocabulary for them: what the smoke preset runs on.
//!
//! Scores on it mean nothing; it shows that everything connects without a file.

use super::data::{Dataset, Example};
use super::task::{Labels, Target, Task};

const NOUNS: [&str; 8] = [
    "cat", "dog", "farmer", "teacher", "sailor", "baker", "child", "king",
];
const VERBS: [(&str, &str); 4] = [
    ("sees", "seen"),
    ("helps", "helped"),
    ("follows", "followed"),
    ("likes", "liked"),
];
/// Every so many examples one is for development.
const DEV_EVERY: usize = 4;

/// Examples of a task's form, labelled by the rules of the toy grammar.
#[must_use]
pub fn dataset(task: Task) -> Dataset {
    let all = examples(task);
    let (mut train, mut dev) = (Vec::new(), Vec::new());
    for (i, example) in all.into_iter().enumerate() {
        // Offset by the round, so that no split holds one kind of example alone.
        if (i + i / DEV_EVERY).is_multiple_of(DEV_EVERY) {
            dev.push(example);
        } else {
            train.push(example);
        }
    }
    let files = task.dev_files().iter();
    Dataset {
        task,
        train,
        dev: files
            .map(|name| (name.trim_end_matches(".tsv").to_owned(), dev.clone()))
            .collect(),
        skipped: Vec::new(),
    }
}

fn examples(task: Task) -> Vec<Example> {
    let mut examples = Vec::new();
    for (i, subject) in NOUNS.iter().enumerate() {
        for (j, object) in NOUNS.iter().enumerate().filter(|(j, _)| *j != i) {
            let (verb, participle) = VERBS[(3 * i + j) % VERBS.len()];
            let said = format!("The {subject} {verb} the {object}.");
            if task.layout().second.is_none() {
                let scrambled = format!("{subject} the the {verb} {object}.");
                examples.push((said, None, Relation::Same));
                examples.push((scrambled, None, Relation::Opposite));
                continue;
            }
            let other = NOUNS[(j + 1 + usize::from((j + 1) % NOUNS.len() == i)) % NOUNS.len()];
            for (second, relation) in [
                (
                    format!("The {object} is {participle} by the {subject}."),
                    Relation::Same,
                ),
                (
                    format!("The {subject} is {participle} by the {object}."),
                    Relation::Opposite,
                ),
                (
                    format!("The {other} is {participle} by the {subject}."),
                    Relation::Partial,
                ),
            ] {
                examples.push((said.clone(), Some(second), relation));
            }
        }
    }
    let example = |(first, second, relation): (String, _, Relation)| {
        Some(Example {
            first,
            second,
            target: relation.target(task)?,
        })
    };
    examples.into_iter().filter_map(example).collect()
}

/// How the second sentence stands to the first; for a single sentence, whether it is one.
#[derive(Clone, Copy)]
enum Relation {
    Same,
    Partial,
    Opposite,
}

impl Relation {
    /// Its label in a task; `None` for half-truths in a task of two classes.
    fn target(self, task: Task) -> Option<Target> {
        match (task.labels(), self) {
            (Labels::Score { high, .. }, Self::Same) => Some(Target::Value(high)),
            (Labels::Score { low, high }, Self::Partial) => Some(Target::Value((low + high) / 2.0)),
            (Labels::Score { low, .. }, Self::Opposite) => Some(Target::Value(low)),
            (Labels::Classes(classes), _) if classes.len() == 3 => {
                Some(Target::Class(match self {
                    Self::Same => 0,
                    Self::Partial => 1,
                    Self::Opposite => 2,
                }))
            }
            (Labels::Classes(_), Self::Partial) => None,
            (Labels::Classes(classes), _) => {
                let entails = matches!(self, Self::Same);
                let first_is_yes = classes[0] == "entailment";
                Some(Target::Class(u32::from(entails != first_is_yes)))
            }
        }
    }
}

/// A WordPiece vocabulary: special tokens, the letters alone and as continuations, and most words of the grammar.
///
/// A few words are left out, so that splitting into pieces is exercised too.
#[must_use]
pub fn vocabulary() -> Vec<String> {
    let special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];
    let mut words: Vec<String> = special.map(str::to_owned).to_vec();
    words.extend(('a'..='z').map(String::from));
    words.extend(('a'..='z').map(|c| format!("##{c}")));
    words.extend([".", "the", "is", "by", "##ed", "##er"].map(str::to_owned));
    words.extend(
        NOUNS
            .iter()
            .filter(|n| !n.ends_with("er"))
            .map(|&n| n.to_owned()),
    );
    words.extend(
        NOUNS
            .iter()
            .filter_map(|n| n.strip_suffix("er"))
            .map(str::to_owned),
    );
    words.extend(VERBS.iter().map(|v| v.0.to_owned()));
    words.extend(["seen", "help", "follow", "lik"].map(str::to_owned));
    words
}
