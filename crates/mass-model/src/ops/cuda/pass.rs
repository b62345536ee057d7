use std::sync::Arc;

use mass_cuda::Buffer;
use mass_cuda::kernels::{
    self, Store, attention, cross_entropy, dots, elementwise, embedding, layer_norm, linear,
    patches, squared_error,
};
use mass_routing::RoutingPlan;

use super::{Cuda, CudaLoss, CudaRows, Sweep};
use crate::error::ModelError;
use crate::kernels::activation::Activation;
use crate::kernels::dropout::Dropout;
use crate::kernels::scratch::Scratch;
use crate::mirror::Mirror;
use crate::ops::{
    self, Ahead, Attention, Gate, MoeExpert, Network, Pass, Route, Routing, RoutingLoss, Sequences,
    Taps, expect_width,
};
use crate::param::Param;

impl Pass for Cuda {
    type Rows = CudaRows;
    type Loss = CudaLoss;

    fn trains(&self) -> bool {
        self.tape.is_some()
    }

    fn constant(&self, values: Scratch, shape: (usize, usize)) -> Result<CudaRows, ModelError> {
        Ok(CudaRows {
            values: Arc::new(Buffer::from_slice(&self.device, &values)?),
            shape,
            operation: None,
        })
    }

    fn shape(&self, x: &CudaRows) -> (usize, usize) {
        x.shape
    }

    fn mirror(&self, x: &CudaRows) -> Mirror {
        Mirror::of_buffer(Arc::clone(&x.values))
    }

    fn embedding(&mut self, tables: &[(&Param, &[u32])]) -> Result<CudaRows, ModelError> {
        let (n, d) = ops::embedding::check(tables)?;
        let mut y = self.room(n * d)?;
        let mut kept = Vec::with_capacity(tables.len());
        for (i, (table, ids)) in tables.iter().enumerate() {
            let index = embedding::Index::new(&self.device, ids, table.shape()[0])?;
            let store = if i == 0 { Store::Replace } else { Store::Add };
            let values = table.mirror().on(&self.device)?;
            embedding::forward(&self.device, values.view(), &index, y.view_mut(), store)?;
            kept.push((table.handle(), index));
        }
        Ok(self.output(y, (n, d), move |sweep, dy| {
            for (table, index) in &kept {
                let mut gradient = sweep.params.take_or_zeros(table)?;
                embedding::backward(&sweep.device(), dy.view(), index, gradient.view_mut())?;
                sweep.params.put(table, gradient);
            }
            Ok(())
        }))
    }

    fn linear(
        &mut self,
        x: CudaRows,
        weight: &Param,
        bias: Option<&Param>,
    ) -> Result<CudaRows, ModelError> {
        let sizes = ops::linear::check(&x.shape, weight, bias)?;
        let shape = (x.shape.0, sizes.1);
        let mut y = self.room(shape.0 * shape.1)?;
        let w = weight.mirror().on(&self.device)?;
        let b = bias.map(|b| b.mirror().on(&self.device)).transpose()?;
        let bias_view = b.as_ref().map(|b| b.view());
        linear::forward(
            &self.device,
            x.view(),
            w.view(),
            bias_view,
            y.view_mut(),
            sizes,
        )?;
        let (weight, bias) = (weight.handle(), bias.map(Param::handle));
        Ok(self.output(y, shape, move |sweep, dy| {
            let device = sweep.device();
            sweep.add(&x, |dx, store| {
                linear::backward_input(&device, dy.view(), w.view(), dx, sizes, store)
            })?;
            let (input, dy) = (x.view(), dy.view());
            sweep.params.add(&weight, |dw, store| {
                linear::backward_weight(&device, input, dy, dw, None, sizes, store)
            })?;
            match &bias {
                None => Ok(()),
                Some(bias) => sweep.params.add(bias, |y, store| {
                    let times = None;
                    let sum = dots::ColumnSum {
                        x: dy,
                        times,
                        y,
                        store,
                    };
                    dots::column_sums(&device, vec![sum])
                }),
            }
        }))
    }

    fn layer_norm(
        &mut self,
        x: CudaRows,
        gamma: &Param,
        beta: &Param,
        eps: f32,
    ) -> Result<CudaRows, ModelError> {
        ops::layer_norm::check(&x.shape, gamma, beta, eps)?;
        let (scale, shift) = (
            gamma.mirror().on(&self.device)?,
            beta.mirror().on(&self.device)?,
        );
        let (mut y, mut stats) = (self.room(x.values.len())?, self.room(2 * x.shape.0)?);
        layer_norm::forward(
            &self.device,
            x.view(),
            scale.view(),
            shift.view(),
            eps,
            y.view_mut(),
            stats.view_mut(),
        )?;
        let (gamma, beta) = (gamma.handle(), beta.handle());
        Ok(self.output(y, x.shape, move |sweep, dy| {
            let mut dgamma = sweep.params.take_or_zeros(&gamma)?;
            let mut dbeta = sweep.params.take_or_zeros(&beta)?;
            let (mut dx, store) = sweep.take(&x)?;
            layer_norm::backward(
                &sweep.device(),
                x.view(),
                scale.view(),
                stats.view(),
                dy.view(),
                (dx.view_mut(), store),
                dgamma.view_mut(),
                dbeta.view_mut(),
            )?;
            sweep.put(&x, dx);
            sweep.params.put(&gamma, dgamma);
            sweep.params.put(&beta, dbeta);
            Ok(())
        }))
    }

    fn add(
        &mut self,
        x: CudaRows,
        residual: CudaRows,
        dropout: Option<Dropout>,
    ) -> Result<CudaRows, ModelError> {
        ops::add::check(&x.shape, &residual.shape)?;
        let mask = dropout.map(Into::into);
        let mut y = self.room(x.values.len())?;
        elementwise::sum(&self.device, residual.view(), mask, x.view(), y.view_mut())?;
        Ok(self.output(y, x.shape, move |sweep, dy| {
            masked_backward(sweep, &x, mask, &dy)?;
            sweep.give(&residual, dy)
        }))
    }

    fn dropout(&mut self, x: CudaRows, dropout: Option<Dropout>) -> Result<CudaRows, ModelError> {
        let Some(mask) = dropout.map(Into::into) else {
            return Ok(x);
        };
        let mut y = self.room(x.values.len())?;
        let store = Store::Replace;
        elementwise::masked(&self.device, Some(mask), x.view(), y.view_mut(), store)?;
        Ok(self.output(y, x.shape, move |sweep, dy| {
            masked_backward(sweep, &x, Some(mask), &dy)
        }))
    }

    fn tanh(&mut self, x: CudaRows) -> Result<CudaRows, ModelError> {
        let mut y = self.room(x.values.len())?;
        elementwise::tanh_forward(&self.device, x.view(), y.view_mut())?;
        let y = Arc::new(y);
        let kept = Arc::clone(&y);
        Ok(self.output(y, x.shape, move |sweep, dy| {
            let device = sweep.device();
            sweep.add(&x, |dx, store| {
                elementwise::tanh_backward(&device, kept.view(), dy.view(), dx, store)
            })
        }))
    }

    fn self_attention(
        &mut self,
        qkv: CudaRows,
        sequences: &Sequences,
        how: Attention,
    ) -> Result<CudaRows, ModelError> {
        let shape = ops::attention::check(&qkv.shape, sequences, how)?;
        let (n, dim) = shape;
        let (offsets, keys) = (sequences.offsets(), sequences.keys());
        let sequences = attention::Sequences::new(&self.device, offsets, keys)?;
        let how = attention::AttentionShape {
            heads: how.heads,
            dim,
            causal: how.causal,
            dropout: how.dropout.map(Into::into),
        };
        let (mut y, mut kept) = (self.room(n * dim)?, self.room(n * how.heads * 2)?);
        attention::forward(
            &self.device,
            qkv.view(),
            &sequences,
            how,
            y.view_mut(),
            kept.view_mut(),
        )?;
        let y = Arc::new(y);
        let output = Arc::clone(&y);
        Ok(self.output(y, shape, move |sweep, dy| {
            let device = sweep.device();
            sweep.add(&qkv, |dqkv, store| {
                let (kept, given) = (kept.view(), (dqkv, store));
                attention::backward(
                    &device,
                    qkv.view(),
                    &sequences,
                    how,
                    output.view(),
                    kept,
                    dy.view(),
                    given,
                )
            })
        }))
    }

    fn feed_forward(
        &mut self,
        x: CudaRows,
        network: &Network,
        activation: Activation,
    ) -> Result<CudaRows, ModelError> {
        self.dense(x, network, activation)
    }

    fn moe_ffn(
        &mut self,
        x: CudaRows,
        experts: &[MoeExpert],
        gate: (&Gate, &[RoutingLoss]),
        activation: Activation,
        routing: Routing<'_, impl Ahead, impl Route>,
    ) -> Result<(CudaRows, Arc<RoutingPlan>), ModelError> {
        self.mixture(x, experts, gate, activation, routing)
    }

    fn pick_rows(&mut self, x: CudaRows, picked: &[usize]) -> Result<CudaRows, ModelError> {
        ops::rows::check_picked(&x.shape, picked)?;
        let (n, d) = x.shape;
        let shape = (picked.len(), d);
        // Rows that are there, of which kernels count no more than 31 bits have.
        let picked: Vec<u32> = picked.iter().map(|&row| row as u32).collect();
        let index = embedding::Index::new(&self.device, &picked, n)?;
        let mut y = self.room(shape.0 * d)?;
        let store = Store::Replace;
        embedding::forward(&self.device, x.view(), &index, y.view_mut(), store)?;
        Ok(self.output(y, shape, move |sweep, dy| {
            let device = sweep.device();
            sweep.add(&x, |mut dx, store| {
                if store == Store::Replace {
                    dx.reborrow().clear()?;
                }
                embedding::backward(&device, dy.view(), &index, dx)
            })
        }))
    }

    fn scale_rows(&mut self, x: CudaRows, factor: &Param) -> Result<CudaRows, ModelError> {
        expect_width("input of a layer scale", &x.shape, factor.len())?;
        let values = factor.mirror().on(&self.device)?;
        let mut y = self.room(x.values.len())?;
        let store = Store::Replace;
        elementwise::scale_columns(&self.device, x.view(), values.view(), y.view_mut(), store)?;
        let factor = factor.handle();
        Ok(self.output(y, x.shape, move |sweep, dy| {
            let device = sweep.device();
            sweep.params.add(&factor, |y, store| {
                let sum = dots::ColumnSum {
                    x: dy.view(),
                    times: Some(x.view()),
                    y,
                    store,
                };
                dots::column_sums(&device, vec![sum])
            })?;
            sweep.add(&x, |dx, store| {
                elementwise::scale_columns(&device, dy.view(), values.view(), dx, store)
            })
        }))
    }

    fn assemble(
        &mut self,
        embedded: CudaRows,
        class: &Param,
        positions: &Param,
        taps: Taps,
    ) -> Result<CudaRows, ModelError> {
        let (d, patches) = (class.len(), taps.len());
        expect_width("embedded patches", &embedded.shape, d)?;
        let shape = (embedded.shape.0 / patches * (1 + patches), d);
        let grid = patches::Interpolation::new(&self.device, &taps, positions.shape()[0] - 1)?;
        let (token, table) = (
            class.mirror().on(&self.device)?,
            positions.mirror().on(&self.device)?,
        );
        let mut y = self.room(shape.0 * d)?;
        patches::forward(
            &self.device,
            embedded.view(),
            token.view(),
            table.view(),
            &grid,
            y.view_mut(),
        )?;
        let (class, positions) = (class.handle(), positions.handle());
        Ok(self.output(y, shape, move |sweep, dy| {
            let mut dclass = sweep.params.take_or_zeros(&class)?;
            let mut dpositions = sweep.params.take_or_zeros(&positions)?;
            let (mut dx, store) = sweep.take(&embedded)?;
            patches::backward(
                &sweep.device(),
                dy.view(),
                &grid,
                (dx.view_mut(), store),
                dclass.view_mut(),
                dpositions.view_mut(),
            )?;
            sweep.put(&embedded, dx);
            sweep.params.put(&class, dclass);
            sweep.params.put(&positions, dpositions);
            Ok(())
        }))
    }

    fn cross_entropy(
        &mut self,
        logits: CudaRows,
        targets: &[u32],
    ) -> Result<(CudaLoss, Vec<f32>), ModelError> {
        let (n, classes) = ops::cross_entropy::check(&logits.shape, targets)?;
        let targets = cross_entropy::Targets::new(&self.device, targets, classes)?;
        let (mut probs, mut nll) = (self.room(n * classes)?, self.room(n)?);
        cross_entropy::forward(
            &self.device,
            logits.view(),
            &targets,
            probs.view_mut(),
            nll.view_mut(),
        )?;
        self.loss(&nll, move |sweep| {
            let device = sweep.device();
            sweep.add(&logits, |d, store| {
                cross_entropy::backward(&device, probs.view(), &targets, 1.0 / n as f32, d, store)
            })
        })
    }

    fn mean_squared_error(
        &mut self,
        outputs: CudaRows,
        targets: &[f32],
    ) -> Result<(CudaLoss, Vec<f32>), ModelError> {
        let n = ops::cross_entropy::check_values(&outputs.shape, targets)?;
        let targets = Buffer::from_slice(&self.device, targets)?;
        let (mut residuals, mut squares) = (self.room(n)?, self.room(n)?);
        squared_error::forward(
            &self.device,
            outputs.view(),
            targets.view(),
            residuals.view_mut(),
            squares.view_mut(),
        )?;
        self.loss(&squares, move |sweep| {
            let device = sweep.device();
            sweep.add(&outputs, |dx, store| {
                squared_error::backward(&device, residuals.view(), 1.0, dx, store)
            })
        })
    }
}

/// Adds `dy`, masked as `x` was, to the gradient of `x`.
fn masked_backward(
    sweep: &mut Sweep,
    x: &CudaRows,
    mask: Option<kernels::Dropout>,
    dy: &Buffer<f32>,
) -> Result<(), ModelError> {
    let device = sweep.device();
    sweep.add(x, |dx, store| {
        elementwise::masked(&device, mask, dy.view(), dx, store)
    })
}

impl Cuda {
    /// The mean of losses, and each of them; `backward` is put on the tape, if there is one.
    fn loss(
        &mut self,
        losses: &Buffer<f32>,
        backward: impl FnOnce(&mut Sweep) -> Result<(), ModelError> + 'static,
    ) -> Result<(CudaLoss, Vec<f32>), ModelError> {
        let losses = losses.to_vec()?;
        if let Some(tape) = &mut self.tape {
            tape.push(Box::new(backward));
        }
        Ok((CudaLoss(ops::cross_entropy::mean_of(&losses)), losses))
    }
}
