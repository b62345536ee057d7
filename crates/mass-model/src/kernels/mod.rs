//! CPU kernels: slices in, slices out, no tensors.
//!
//! Everything above this module speaks of tensors and tapes; everything in it speaks of row-major `f32` slices. Every sum
//! is taken in one fixed order: it is cut into pieces whose size does not depend on the number of threads. Only what is no
//! sum, such as the rows of a product, is cut by it. So a result has the same bits on one thread as on many.
//!
//! This is the only place in the crate that may contain `unsafe` code: the call into the `gemm` crate and the instruction
//! sets of `product`.

pub mod activation;
pub mod adamw;
pub mod attention;
pub mod cross_entropy;
pub mod dropout;
pub mod gemm;
pub mod layer_norm;
pub mod linear;
pub mod moe_ffn;
pub(crate) mod product;
pub mod scratch;
pub mod transpose;
pub mod vector;

/// Rows handled by one task. Fixed, so that partial sums are the same whatever the number of threads.
pub(crate) const ROW_BLOCK: usize = 256;

/// Most rows of a product that make a task: enough to repay the packing of the weights.
const PRODUCT_ROWS: usize = 512;

/// Fewest rows of a product that make a task.
const FEWEST_PRODUCT_ROWS: usize = 64;

/// Rows of each of the nearly equal tasks that a product over `rows` rows is cut into: as many as keep all threads busy to the
/// end.
pub(crate) fn task_rows(rows: usize) -> usize {
    let threads = product::threads();
    let tasks = rows.div_ceil(PRODUCT_ROWS).next_multiple_of(threads);
    rows.div_ceil(tasks.min(rows / FEWEST_PRODUCT_ROWS).max(1))
        .max(1)
}

/// Runs `f` compiled for the widest vectors that this CPU has (AVX-512, AVX2 with FMA, or the baseline).
#[inline(always)]
pub(crate) fn vectorised<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}
