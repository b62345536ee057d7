//! Activations by the names Hugging Face gives them.

use serde::{Deserialize, Deserializer, Serializer};

use crate::kernels::activation::Activation;

/// For `#[serde(with = "...")]`.
pub(crate) fn serialize<S: Serializer>(
    activation: &Activation,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(match activation {
        Activation::GeluErf => "gelu",
        Activation::GeluTanh => "gelu_new",
        Activation::Relu => "relu",
        Activation::Silu => "silu",
    })
}

/// For `#[serde(with = "...")]`.
pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Activation, D::Error> {
    let name = String::deserialize(deserializer)?;
    match name.as_str() {
        "gelu" | "gelu_python" => Ok(Activation::GeluErf),
        "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Ok(Activation::GeluTanh),
        "relu" => Ok(Activation::Relu),
        "silu" | "swish" => Ok(Activation::Silu),
        _ => Err(serde::de::Error::custom(format!(
            "activation {name:?} is none of gelu, gelu_new, gelu_pytorch_tanh, relu, silu"
        ))),
    }
}
