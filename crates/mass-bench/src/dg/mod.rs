//! Image sets for domain generalisation, in DomainBed's layout: `DIR/<domain>/<class>/<image>`.
//!
//! | module | what it holds |
//! |---|---|
//! | [`folder`] | which files there are, by domain and class |
//! | [`decode`] | one file as pixels: any of JPEG, PNG, BMP and WebP, recognised by what is in it |
//! | [`images`] | a whole set decoded at one size, kept on disk |
//! | [`augment`] | DomainBed's augmentation, and the normalisation that models were pretrained with |
//! | [`split`] | one domain left out, a part of the others held out, and the batches of a step |
//! | [`features`] | what a frozen trunk makes of the images, kept in memory and on disk |
//! | [`sample`] | a small generated set |
//! | [`reported`] | what the paper reports |
//!
//! Gulrajani and Lopez-Paz, *In Search of Lost Domain Generalization* (arXiv 2007.01434), is the source of the protocol.

pub mod augment;
mod cache;
pub mod decode;
mod error;
pub mod features;
pub mod folder;
pub mod images;
pub mod reported;
pub mod sample;
pub mod split;

pub use error::DgError;
