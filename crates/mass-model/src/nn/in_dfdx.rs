//! The layers as modules of dfdx: inside its tuples, `Residual`, `SplitInto`, `Repeated` and the like.
//!
//! A layer takes tensors of any number of axes, sizes known at compile time or not, and works on the last axis. dfdx's
//! combinators need one type of error, which is `CpuError`; what a layer refused is kept by
//! [`last_error`](crate::last_error). The layers' own `try_forward` returns it. dfdx's `Module::forward` panics on every error
//! (`WrongNumElements`, for a NaN in a mixture's input too): call `Module::try_forward`, and [`last_error`](crate::last_error)
//! after an error.
//!
//! dfdx walks a model's tensors by a list that is fixed at compile time, in which a pool that grows cannot be. So
//! `alloc_grads`, `zero_grads` and dfdx's optimisers pass over these layers, which have their own:
//! [`AdamW`](crate::optim::AdamW) for [`Parameters`](crate::Parameters). What dfdx's `num_trainable_params`, `reset_params`,
//! `ModelEMA` and files say of such a model is without them too. `to_dtype` and `to_device` leave an [`Unbuilt`] in their place.

use dfdx::nn::{ModuleVisitor, NonMutableModule, TensorCollection};
use dfdx::prelude::{Cpu, Device, Dim, Dtype, HasShape, Module, ReshapeTo, Shape, Tape, Tensor};
use dfdx::tensor::CpuError;

use super::{FeedForward, LayerNorm, Linear, MoeLayer};
use crate::error::{ModelError, into_dfdx};
use crate::ops::{Pass, Rows, on_tensors};

/// What dfdx makes of a layer of this crate when it builds a model anew in another type or on another device: nothing that
/// computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unbuilt;

/// A tensor as rows of its last axis.
pub(super) fn rows<S: Shape, T: Tape<f32, Cpu>>(
    x: Tensor<S, f32, Cpu, T>,
) -> Result<Rows<T>, ModelError> {
    let sizes = x.shape().concrete();
    let Some((&width, outer)) = sizes.as_ref().split_last() else {
        return Err(ModelError::shape("input of a layer", &[1], &[]));
    };
    let count = outer.iter().product::<usize>();
    Ok(x.try_reshape_like(&(count, width))?)
}

macro_rules! layer {
    ($layer:ty) => {
        impl NonMutableModule for $layer {}

        impl TensorCollection<f32, Cpu> for $layer {
            type To<E: Dtype, D: Device<E>> = Unbuilt;

            fn iter_tensors<V: ModuleVisitor<Self, f32, Cpu>>(
                visitor: &mut V,
            ) -> Result<Option<Unbuilt>, V::Err> {
                visitor.visit_fields((), |()| Unbuilt)
            }
        }
    };
}

macro_rules! keeps_shape {
    ($layer:ty) => {
        layer!($layer);

        impl $layer {
            /// The forward pass over the last axis of a tensor, which keeps its shape.
            ///
            /// # Errors
            /// [`ModelError::Shape`] if the last axis has another size than the layer, and what the operation refuses.
            pub fn try_forward<S: Shape, T: Tape<f32, Cpu>>(
                &self,
                x: Tensor<S, f32, Cpu, T>,
            ) -> Result<Tensor<S, f32, Cpu, T>, ModelError> {
                let shape = *x.shape();
                let y = on_tensors(rows(x)?, |pass, x| self.run(pass, x))?;
                Ok(y.try_reshape_like(&shape)?)
            }
        }

        impl<S: Shape, T: Tape<f32, Cpu>> Module<Tensor<S, f32, Cpu, T>> for $layer {
            type Output = Tensor<S, f32, Cpu, T>;
            type Error = CpuError;

            fn try_forward(&self, x: Tensor<S, f32, Cpu, T>) -> Result<Self::Output, CpuError> {
                <$layer>::try_forward(self, x).map_err(into_dfdx)
            }
        }
    };
}

keeps_shape!(FeedForward);
keeps_shape!(LayerNorm);
keeps_shape!(MoeLayer);

layer!(Linear);

/// A shape whose last axis may get another size.
pub trait Widened: Shape {
    /// The shape with a last axis of a size known at run time.
    type Wide: Shape;

    /// This shape with a last axis of `width`.
    fn widened(&self, width: usize) -> Self::Wide;
}

impl<D: Dim> Widened for (D,) {
    type Wide = (usize,);

    fn widened(&self, width: usize) -> Self::Wide {
        (width,)
    }
}

impl<A: Dim, D: Dim> Widened for (A, D) {
    type Wide = (A, usize);

    fn widened(&self, width: usize) -> Self::Wide {
        (self.0, width)
    }
}

impl<A: Dim, B: Dim, D: Dim> Widened for (A, B, D) {
    type Wide = (A, B, usize);

    fn widened(&self, width: usize) -> Self::Wide {
        (self.0, self.1, width)
    }
}

impl<A: Dim, B: Dim, C: Dim, D: Dim> Widened for (A, B, C, D) {
    type Wide = (A, B, C, usize);

    fn widened(&self, width: usize) -> Self::Wide {
        (self.0, self.1, self.2, width)
    }
}

impl Linear {
    pub(crate) fn run<P: Pass>(&self, pass: &mut P, x: P::Rows) -> Result<P::Rows, ModelError> {
        pass.linear(x, &self.weight, self.bias.as_ref())
    }

    /// The forward pass over the last axis of a tensor.
    ///
    /// # Errors
    /// [`ModelError::Shape`] if the last axis has another size than the layer takes.
    pub fn try_forward<S: Widened, T: Tape<f32, Cpu>>(
        &self,
        x: Tensor<S, f32, Cpu, T>,
    ) -> Result<Tensor<S::Wide, f32, Cpu, T>, ModelError> {
        let shape = *x.shape();
        let y = on_tensors(rows(x)?, |pass, x| self.run(pass, x))?;
        let wide = shape.widened(y.shape().1);
        Ok(y.try_reshape_like(&wide)?)
    }
}

impl<S: Widened, T: Tape<f32, Cpu>> Module<Tensor<S, f32, Cpu, T>> for Linear {
    type Output = Tensor<S::Wide, f32, Cpu, T>;
    type Error = CpuError;

    fn try_forward(&self, x: Tensor<S, f32, Cpu, T>) -> Result<Self::Output, CpuError> {
        Linear::try_forward(self, x).map_err(into_dfdx)
    }
}
