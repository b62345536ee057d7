//! The GLUE benchmark (Wang et al., arXiv 1804.07461): nine tasks of one or two sentences, from text to score.
//!
//! | module | what it holds |
//! |---|---|
//! | [`task`] | the nine tasks: files, columns, labels, metrics |
//! | [`data`] | their files, read without guessing |
//! | [`metrics`] | Matthews correlation, F1, accuracy, Pearson, Spearman |
//! | [`tokenize`] | text to WordPiece ids, as BERT was pretrained |
//! | [`batch`] | batches of similar length that are a pure function of a seed and an epoch |
//! | [`sample`] | a few sentences and a vocabulary that need no file |
//!
//! ```
//! use mass_bench::glue::{batch::epoch_batches, sample, task::Task, tokenize::TextTokenizer};
//!
//! let data = sample::dataset(Task::Cola);
//! let tokenizer = TextTokenizer::from_vocabulary(&sample::vocabulary(), true, 32)?;
//! let encoded = tokenizer.encode_all(&data.train)?;
//! let lengths: Vec<usize> = encoded.iter().map(|e| e.ids.len()).collect();
//! let batches = epoch_batches(&lengths, 8, 50, 0, 0);
//! assert_eq!(batches.concat().len(), data.train.len());
//! # Ok::<(), mass_bench::glue::GlueError>(())
//! ```

pub mod batch;
pub mod data;
mod error;
pub mod metrics;
pub mod sample;
pub mod task;
pub mod tokenize;

pub use error::GlueError;
