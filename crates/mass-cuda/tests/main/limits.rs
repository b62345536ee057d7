//! Sizes that no memory holds, and settings that make no sense: error values, before anything is launched.

use mass_cuda::kernels::attention::{self, AttentionShape, Sequences};
use mass_cuda::kernels::cross_entropy::{self, Targets};
use mass_cuda::kernels::dots::{ColumnSum, column_sums};
use mass_cuda::kernels::gemm::{self, Job, Matrix, MatrixMut};
use mass_cuda::kernels::moe_ffn::{FfnShape, Grouped, Hidden, forward};
use mass_cuda::kernels::optimiser::{AdamWStep, Update, adamw};
use mass_cuda::kernels::{
    Activation, Dropout, Store, ceiling, elementwise, layer_norm, linear, rows,
};
use mass_cuda::{Buffer, CudaError};

use super::emulator::{Word, device, get, set};

/// Beyond 31 and 32 bits, and where products of two wrap around to something small.
const HUGE: [usize; 8] = [
    1 << 31,
    (1 << 31) - 1,
    (1 << 32) - 1,
    1 << 32,
    (1 << 32) + 1,
    1 << 33,
    1 << 63,
    usize::MAX,
];

#[test]
fn emulated_sizes_that_no_memory_holds_are_refused() {
    on_device!();
    let device = device();
    set(Word::Memory, 1 << 20);
    let launches = get(Word::Launches);
    let nothing = Buffer::<f32>::zeros(&device, 0).unwrap();
    let mut to = Buffer::<f32>::zeros(&device, 0).unwrap();
    let mut other = Buffer::<f32>::zeros(&device, 0).unwrap();
    let none = Buffer::<u32>::zeros(&device, 0).unwrap();
    let zero = Buffer::<u32>::zeros(&device, 1).unwrap();
    for a in HUGE {
        for b in HUGE.into_iter().chain([0, 1, 2]) {
            for (inp, out) in [(a, b), (b, a)] {
                let (x, d) = (nothing.view(), &device);
                let both = (inp, out);
                assert!(
                    linear::forward(d, x, x, None, to.view_mut(), both).is_err(),
                    "{both:?}"
                );
                let given = (to.view_mut(), both, Store::Add);
                let wrong = linear::backward_input(d, x, x, given.0, given.1, given.2);
                assert!(wrong.is_err(), "{both:?}");
                let db = Some(other.view_mut());
                let wrong = linear::backward_weight(d, x, x, to.view_mut(), db, both, Store::Add);
                assert!(wrong.is_err(), "{both:?}");
                // Without values there may be matrices of any length and no width, but none that kernels cannot count.
                let matrix = Matrix::new(x, inp, out);
                assert_eq!(matrix.is_ok(), inp == 0 || out == 0, "{both:?}");
                if let Ok(matrix) = matrix {
                    let (m, n) = (matrix.shape().0, matrix.t().shape().0);
                    let c = MatrixMut::new(to.view_mut(), m, 0).unwrap();
                    let b = Matrix::new(x, n, 0).unwrap();
                    let wrong = gemm::run(d, &[Job::new(matrix, b, c)]);
                    assert!(matches!(wrong, Err(CudaError::TooLarge { .. })), "{both:?}");
                }
                for gated in [false, true] {
                    let shape = FfnShape {
                        dim: inp,
                        hidden: out,
                        activation: Activation::Silu,
                        gated,
                    };
                    let plan = Grouped {
                        expert_offsets: &[0],
                        expert_offsets_on_device: zero.view(),
                        tokens: none.view(),
                        weights: nothing.view(),
                        token_offsets: zero.view(),
                        token_assignments: none.view(),
                    };
                    assert!(forward(d, x, &[], plan, shape, None, to.view_mut()).is_err());
                    if out > 2 {
                        assert!(Hidden::new(d, shape, inp.max(1)).is_err());
                    }
                }
            }
        }
        let wrong = rows::gather(&device, nothing.view(), none.view(), None, to.view_mut(), a);
        assert!(matches!(wrong, Err(CudaError::TooLarge { .. })));
        let wrong = ceiling::multiply_adds(&device, a, 1.0, to.view_mut());
        assert!(wrong.is_ok(), "without values there is nothing to do");
        let sequences = Sequences::new(&device, &[0, 0], None).unwrap();
        for heads in [1, a] {
            let shape = AttentionShape {
                heads,
                dim: a,
                causal: false,
                dropout: None,
            };
            let (y, kept) = (to.view_mut(), other.view_mut());
            assert!(
                attention::forward(&device, nothing.view(), &sequences, shape, y, kept).is_err()
            );
        }
        assert!(matches!(
            Sequences::new(&device, &[0, a], None),
            Err(CudaError::TooLarge { .. })
        ));
        if a > u32::MAX as usize {
            assert!(Buffer::<u64>::uninitialised(&device, a).is_err());
        }
        let targets = Targets::new(&device, &[0], a).unwrap();
        let probs = nothing.view();
        assert!(
            cross_entropy::forward(&device, probs, &targets, to.view_mut(), other.view_mut())
                .is_err()
        );
    }
    assert_eq!(get(Word::Launches), launches);
    set(Word::Memory, 0);
}

#[test]
fn emulated_rates_and_other_settings_that_make_no_sense_are_refused() {
    on_device!();
    let device = device();
    let launches = get(Word::Launches);
    let no_numbers = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
    let setting = |outcome: Result<(), CudaError>, what: &str| {
        assert!(
            matches!(outcome, Err(CudaError::Setting { .. })),
            "{what}: {outcome:?}"
        );
    };
    // Whether or not there is anything to do.
    for n in [0, 3] {
        let (x, a) = (
            Buffer::<f32>::zeros(&device, n).unwrap(),
            Buffer::<f32>::zeros(&device, n).unwrap(),
        );
        let mut y = Buffer::<f32>::zeros(&device, n).unwrap();
        for rate in no_numbers.into_iter().chain([0.0, -0.1, 1.000_001, 2.0]) {
            let dropout = Some(Dropout { rate, key: 1 });
            let what = format!("rate {rate}, {n} values");
            let sum = elementwise::sum(&device, a.view(), dropout, x.view(), y.view_mut());
            setting(sum, &what);
            let masked = elementwise::masked(&device, dropout, x.view(), y.view_mut(), Store::Add);
            setting(masked, &what);
            let sequences = Sequences::new(&device, &[0, n], None).unwrap();
            let shape = AttentionShape {
                heads: 1,
                dim: 2,
                causal: false,
                dropout,
            };
            let room = |each| Buffer::<f32>::zeros(&device, each * n).unwrap();
            let (qkv, mut out, mut kept, dy, mut d) = (room(6), room(2), room(2), room(2), room(6));
            let (to, sums) = (out.view_mut(), kept.view_mut());
            let there = attention::forward(&device, qkv.view(), &sequences, shape, to, sums);
            setting(there, &what);
            let back = attention::backward(
                &device,
                qkv.view(),
                &sequences,
                shape,
                out.view(),
                kept.view(),
                dy.view(),
                (d.view_mut(), Store::Add),
            );
            setting(back, &what);
        }
        for share in no_numbers.into_iter().chain([-0.1, 1.1]) {
            let what = format!("share {share}");
            setting(
                elementwise::moving_average(&device, share, x.view(), y.view_mut()),
                &what,
            );
            setting(
                elementwise::running_mean(&device, share, x.view(), y.view_mut()),
                &what,
            );
        }
        for eps in no_numbers.into_iter().chain([-1e-5]) {
            let (gamma, mut stats) = (
                Buffer::<f32>::zeros(&device, 3).unwrap(),
                Buffer::<f32>::zeros(&device, 2 * n / 3).unwrap(),
            );
            let (g, stats) = (gamma.view(), stats.view_mut());
            let outcome = layer_norm::forward(&device, x.view(), g, g, eps, y.view_mut(), stats);
            setting(outcome, &format!("eps {eps}"));
        }
        let good = AdamWStep {
            lr: 0.1,
            beta1: 0.9,
            beta2: 0.99,
            take1: 0.1,
            take2: 0.01,
            eps: 1e-8,
            weight_decay: 0.0,
            bias1: 0.1,
            bias2: 0.01,
            gradient_scale: 1.0,
        };
        let mut steps = Vec::new();
        for bad in no_numbers {
            steps.extend([
                AdamWStep { lr: bad, ..good },
                AdamWStep { beta1: bad, ..good },
                AdamWStep { beta2: bad, ..good },
                AdamWStep { take1: bad, ..good },
                AdamWStep { take2: bad, ..good },
                AdamWStep { eps: bad, ..good },
                AdamWStep {
                    weight_decay: bad,
                    ..good
                },
                AdamWStep {
                    gradient_scale: bad,
                    ..good
                },
            ]);
        }
        for bad in no_numbers.into_iter().chain([0.0, -0.1, 1.1]) {
            steps.extend([
                AdamWStep { bias1: bad, ..good },
                AdamWStep { bias2: bad, ..good },
            ]);
        }
        for step in steps {
            let (mut m, mut v) = (
                Buffer::<f32>::zeros(&device, n).unwrap(),
                Buffer::<f32>::zeros(&device, n).unwrap(),
            );
            let update = Update {
                theta: y.view_mut(),
                gradient: x.view(),
                first: m.view_mut(),
                second: v.view_mut(),
                step,
            };
            setting(adamw(&device, &mut [update]), &format!("{step:?}"));
        }
    }
    assert_eq!(get(Word::Launches), launches);
}

#[test]
fn at_a_rate_of_one_everything_is_dropped() {
    on_device!();
    let device = device();
    let x = Buffer::from_slice(&device, &[1.0_f32; 100]).unwrap();
    let mut y = Buffer::<f32>::uninitialised(&device, 100).unwrap();
    let all = Some(Dropout { rate: 1.0, key: 7 });
    elementwise::masked(&device, all, x.view(), y.view_mut(), Store::Replace).unwrap();
    assert_eq!(y.to_vec().unwrap(), [0.0; 100]);
}

#[test]
fn columns_that_are_not_there_have_no_sums() {
    on_device!();
    let device = device();
    let x = Buffer::<f32>::zeros(&device, 4).unwrap();
    let mut y = Buffer::<f32>::zeros(&device, 0).unwrap();
    let mut of = |n| {
        let job = ColumnSum {
            x: x.view().range(0..n).unwrap(),
            times: None,
            y: y.view_mut(),
            store: Store::Add,
        };
        column_sums(&device, vec![job])
    };
    of(0).unwrap();
    assert!(matches!(of(4), Err(CudaError::Length { .. })));
}
