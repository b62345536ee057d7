/// What is wrong with a file of a checkpoint. The file is named by [`ModelError::Checkpoint`](crate::ModelError::Checkpoint).
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// Cut short, or longer than it was written.
    #[error("has {actual} bytes, not {expected}")]
    Length {
        /// Bytes written.
        expected: u64,
        /// Bytes found.
        actual: u64,
    },
    /// As long as it was written, but with other contents.
    #[error("is damaged: its CRC-32 is {actual:08x}, not {expected:08x}")]
    Checksum {
        /// Checksum of what was written.
        expected: u32,
        /// Checksum of what was found.
        actual: u32,
    },
    /// A file that the list of checksums does not name, or that is not among the files given.
    #[error("is not part of this checkpoint")]
    Absent,
    /// The list of checksums is not as it was written.
    #[error("is not a list of checksums with a valid last line")]
    Seals,
    /// `latest` is not as it was written.
    #[error("names no checkpoint: {found:?}")]
    Pointer {
        /// What it holds.
        found: String,
    },
    /// `latest` names a folder that is not there.
    #[error("names {name}, which is not there")]
    NoFolder {
        /// The folder.
        name: String,
    },
    /// Written by another version of this crate.
    #[error("format {found}, this program reads format {supported}")]
    Format {
        /// Its format.
        found: u64,
        /// The one that can be read.
        supported: u64,
    },
    /// A model of another kind.
    #[error("holds a {found}, not a {expected}")]
    Kind {
        /// What it holds.
        found: String,
        /// What was asked for.
        expected: &'static str,
    },
    /// JSON that does not hold what it should.
    #[error("{0}")]
    Json(String),
    /// Settings that no model or optimiser can have.
    #[error("{0}")]
    Settings(String),
    /// A header that is no safetensors header.
    #[error("safetensors: {0}")]
    Header(String),
    /// A parameter without its tensor.
    #[error("tensor {name} is missing")]
    MissingTensor {
        /// Which.
        name: String,
    },
    /// A tensor without its parameter.
    #[error("tensor {name} belongs to no parameter of this model")]
    UnknownTensor {
        /// Which.
        name: String,
    },
    /// A tensor of another shape.
    #[error("tensor {name} is {actual:?}, not {expected:?}")]
    TensorShape {
        /// Which.
        name: String,
        /// Shape of the parameter.
        expected: Vec<usize>,
        /// Shape found.
        actual: Vec<usize>,
    },
    /// A tensor of another element type.
    #[error("tensor {name} is {dtype}, not F32")]
    TensorType {
        /// Which.
        name: String,
        /// Its type.
        dtype: String,
    },
    /// A tensor of weights with a NaN or an infinity.
    #[error("tensor {name} has a value that is not finite")]
    NonFinite {
        /// Which.
        name: String,
    },
    /// Weights in another library's layout that do not fit: a [`PretrainedError`](crate::pretrained::PretrainedError) in words.
    #[error("{0}")]
    Pretrained(String),
    /// Another number of mixture layers.
    #[error("{found} expert pools for {expected} mixture layers")]
    Layers {
        /// Pools in the file.
        found: usize,
        /// Mixture layers of the model.
        expected: usize,
    },
    /// An expert that is listed twice.
    #[error("mixture layer {layer} lists expert {expert} twice")]
    DuplicateExpert {
        /// Which mixture layer, counted from the bottom.
        layer: usize,
        /// Which expert.
        expert: u32,
    },
    /// A pool that no layer can have.
    #[error("mixture layer {layer}: {why}")]
    Pool {
        /// Which mixture layer, counted from the bottom.
        layer: usize,
        /// What is wrong.
        why: String,
    },
    /// Pools of another size than the model's, and no leave to grow or drop experts.
    #[error("{}", list(layers))]
    ExpertCount {
        /// The layers that differ.
        layers: Vec<ExpertCounts>,
    },
}

/// The numbers of experts of one mixture layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertCounts {
    /// Which mixture layer, counted from the bottom.
    pub layer: usize,
    /// Experts in the checkpoint.
    pub checkpoint: usize,
    /// Experts in the model.
    pub model: usize,
}

fn list(layers: &[ExpertCounts]) -> String {
    let each = |c: &ExpertCounts| {
        format!(
            "mixture layer {} has {} experts, the model's has {}",
            c.layer, c.checkpoint, c.model
        )
    };
    layers.iter().map(each).collect::<Vec<_>>().join("; ")
}
