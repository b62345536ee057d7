//! Gradients wherever they lie: what optimisers and growth do with them.

use std::collections::BTreeMap;
use std::ops::Range;

use mass_expand::{Alignment, Reduction, alignment, redundancy_gradient};

use super::adamw::{Due, ParameterState, Rule, sum_of_squares, update_here};
use crate::error::ModelError;
use crate::gradients::CpuGradients;
use crate::mirror::Mirror;
use crate::param::{Param, Parameters, bring_to_host};
#[cfg(feature = "cuda")]
use {
    super::adamw::update_there,
    crate::ops::CudaGradients,
    crate::param::reach_devices,
    mass_cuda::Buffer,
    mass_cuda::kernels::{dots, elementwise},
    mass_expand::redundancy_shares,
    std::sync::Arc,
};

mod sealed {
    pub trait Sealed {}
}
pub(crate) use sealed::Sealed;

/// Gradients of a model's parameters, on the host or on a device: what [`AdamW::step`](super::AdamW::step),
/// [`Grower::step`](crate::growth::Grower::step) and [`GradientAccumulator`](super::GradientAccumulator) take.
///
/// On a device they stay there: down come sums, one an expert, and the matrices of an expert that is split.
pub trait Gradients: Sealed {
    /// Adds a share to a parameter's gradient.
    ///
    /// # Errors
    /// [`ModelError::NoGradient`] if it has none, [`ModelError::Shape`] if there is not one value for each of the parameter's.
    fn add(&mut self, param: &Param, share: &[f32]) -> Result<(), ModelError>;

    /// A copy of a parameter's gradient on the host, if an operation has written one.
    ///
    /// # Errors
    /// That of a device that has failed.
    fn copy(&mut self, param: &Param) -> Result<Option<Vec<f32>>, ModelError>;

    /// The sum of squares of each parameter's gradient, if there is one.
    #[doc(hidden)]
    fn sums_of_squares(&mut self, params: &[&Param]) -> Result<Vec<Option<f64>>, ModelError>;

    /// Makes some values of a parameter's gradient zero, if there is one.
    #[doc(hidden)]
    fn zero(&mut self, param: &Param, which: Range<usize>) -> Result<(), ModelError>;

    /// Updates the parameters that are due, where their gradients lie, and uses these up. `due` is in the order of the
    /// parameters. After an error of a device nothing has changed.
    #[doc(hidden)]
    fn update<M: Parameters + ?Sized>(
        &mut self,
        model: &mut M,
        state: &mut BTreeMap<String, ParameterState>,
        rule: &Rule<'_>,
        due: &[Option<Due>],
    ) -> Result<(), ModelError>;

    /// Refuses a model whose values lie on a device that has failed. Where gradients are on the host, its values are brought
    /// there.
    #[doc(hidden)]
    fn reach<M: Parameters + ?Sized>(&mut self, model: &M) -> Result<(), ModelError>;

    /// A parameter's gradient beside its values, if there is a gradient.
    #[doc(hidden)]
    fn alignment(&mut self, param: &Param) -> Result<Option<Alignment>, ModelError>;

    /// The values of one parameter beside those of another of its size.
    #[doc(hidden)]
    fn alignment_of(&mut self, a: &Param, b: &Param) -> Result<Alignment, ModelError>;

    /// Gives a parameter a gradient, in place of any that it has.
    #[doc(hidden)]
    fn set(&mut self, param: &Param, gradient: Vec<f32>) -> Result<(), ModelError>;

    /// Gives `to` a gradient like that of `from`, a parameter of its size, if there is one.
    #[doc(hidden)]
    fn hand_on(&mut self, from: &Param, to: &Param) -> Result<(), ModelError>;

    /// Adds the gradient of the redundancy loss over pairs of rows; those that have none yet get one. Returns the loss,
    /// unweighted.
    #[doc(hidden)]
    fn add_redundancy(
        &mut self,
        rows: &[&Param],
        pairs: &[(usize, usize)],
        reduction: Reduction,
        weight: f64,
    ) -> Result<f64, ModelError>;

    /// Makes room for a running mean of a parameter's gradient where the gradient lies; a new one if there is none and the
    /// parameter has a gradient. No value changes.
    #[doc(hidden)]
    fn mean_room(
        &mut self,
        param: &Param,
        mean: Option<&mut Mirror>,
    ) -> Result<Option<Mirror>, ModelError>;

    /// `mean += (g - mean) share`, with a gradient of zero where there is none; the gradient itself at a share of one.
    #[doc(hidden)]
    fn mean_add(&mut self, param: &Param, mean: &mut Mirror, share: f32) -> Result<(), ModelError>;

    /// Makes a mean the gradient; none frees it.
    #[doc(hidden)]
    fn replace(&mut self, param: &Param, mean: Option<Mirror>) -> Result<(), ModelError>;
}

fn check_size(param: &Param, gradient: usize) -> Result<(), ModelError> {
    match gradient == param.len() {
        true => Ok(()),
        false => {
            let (expected, actual) = ([param.len()], [gradient]);
            Err(ModelError::shape("gradient", &expected, &actual))
        }
    }
}

impl Sealed for CpuGradients {}

impl Gradients for CpuGradients {
    fn add(&mut self, param: &Param, share: &[f32]) -> Result<(), ModelError> {
        check_size(param, share.len())?;
        let gradient = param.gradient(self)?;
        gradient.iter_mut().zip(share).for_each(|(g, d)| *g += d);
        Ok(())
    }

    fn copy(&mut self, param: &Param) -> Result<Option<Vec<f32>>, ModelError> {
        Ok(param.find_gradient(self)?.map(|g| g.clone()))
    }

    fn sums_of_squares(&mut self, params: &[&Param]) -> Result<Vec<Option<f64>>, ModelError> {
        let mut sums = Vec::with_capacity(params.len());
        for param in params {
            sums.push(param.find_gradient(self)?.map(|g| sum_of_squares(g)));
        }
        Ok(sums)
    }

    fn zero(&mut self, param: &Param, which: Range<usize>) -> Result<(), ModelError> {
        if let Some(gradient) = param.find_gradient(self)? {
            gradient[which].fill(0.0);
        }
        Ok(())
    }

    fn update<M: Parameters + ?Sized>(
        &mut self,
        model: &mut M,
        state: &mut BTreeMap<String, ParameterState>,
        rule: &Rule<'_>,
        due: &[Option<Due>],
    ) -> Result<(), ModelError> {
        update_here(self, model, state, rule, due)
    }

    fn reach<M: Parameters + ?Sized>(&mut self, model: &M) -> Result<(), ModelError> {
        bring_to_host(model)
    }

    fn alignment(&mut self, param: &Param) -> Result<Option<Alignment>, ModelError> {
        match param.find_gradient(self)? {
            Some(gradient) => Ok(Some(alignment(gradient, param.try_values()?)?)),
            None => Ok(None),
        }
    }

    fn alignment_of(&mut self, a: &Param, b: &Param) -> Result<Alignment, ModelError> {
        Ok(alignment(a.try_values()?, b.try_values()?)?)
    }

    fn set(&mut self, param: &Param, gradient: Vec<f32>) -> Result<(), ModelError> {
        param.set_gradient(self, gradient)
    }

    fn hand_on(&mut self, from: &Param, to: &Param) -> Result<(), ModelError> {
        match self.copy(from)? {
            Some(copy) => to.set_gradient(self, copy),
            None => Ok(()),
        }
    }

    fn add_redundancy(
        &mut self,
        params: &[&Param],
        pairs: &[(usize, usize)],
        reduction: Reduction,
        weight: f64,
    ) -> Result<f64, ModelError> {
        let rows = params.iter().map(|p| p.try_values());
        let rows = rows.collect::<Result<Vec<&[f32]>, _>>()?;
        let mut taken = Vec::with_capacity(rows.len());
        for param in params {
            let own = param.take_gradient(self)?;
            taken.push(own.unwrap_or_else(|| vec![0.0; param.len()]));
        }
        let mut views: Vec<&mut [f32]> = taken.iter_mut().map(Vec::as_mut_slice).collect();
        let loss = redundancy_gradient(&rows, pairs, reduction, weight, &mut views);
        for (param, gradient) in params.iter().zip(taken) {
            param.set_gradient(self, gradient)?;
        }
        Ok(loss?)
    }

    fn mean_room(
        &mut self,
        param: &Param,
        mean: Option<&mut Mirror>,
    ) -> Result<Option<Mirror>, ModelError> {
        match mean {
            Some(mean) => mean.try_values().map(|_| None),
            None => {
                let found = param.find_gradient(self)?;
                Ok(found.map(|g| vec![0.0; g.len()].into()))
            }
        }
    }

    fn mean_add(&mut self, param: &Param, mean: &mut Mirror, share: f32) -> Result<(), ModelError> {
        match param.find_gradient(self)? {
            Some(g) if share == 1.0 => mean.copy_from_slice(g),
            Some(g) => {
                for (mean, g) in mean.iter_mut().zip(g.iter()) {
                    *mean += (g - *mean) * share;
                }
            }
            None => mean.iter_mut().for_each(|mean| *mean -= *mean * share),
        }
        Ok(())
    }

    fn replace(&mut self, param: &Param, mean: Option<Mirror>) -> Result<(), ModelError> {
        match mean {
            Some(mean) => {
                mean.try_values()?;
                param.set_gradient(self, mean.into_values())
            }
            None => param.clear_gradient(self),
        }
    }
}

#[cfg(feature = "cuda")]
impl Sealed for CudaGradients {}

#[cfg(feature = "cuda")]
impl Gradients for CudaGradients {
    fn add(&mut self, param: &Param, share: &[f32]) -> Result<(), ModelError> {
        check_size(param, share.len())?;
        if self.find(param).is_none() {
            let what = format!("a parameter of shape {:?}", param.shape());
            return Err(ModelError::NoGradient(what));
        }
        self.add_values(&param.handle(), share)
    }

    fn copy(&mut self, param: &Param) -> Result<Option<Vec<f32>>, ModelError> {
        self.of(param)
    }

    fn sums_of_squares(&mut self, params: &[&Param]) -> Result<Vec<Option<f64>>, ModelError> {
        let found: Vec<_> = params.iter().map(|param| self.find(param)).collect();
        let there: Vec<_> = found.iter().flatten().copied().collect();
        let mut sums = dots::sums_of_squares(self.device(), &there)?.into_iter();
        let sums = found.iter().map(|found| found.and_then(|_| sums.next()));
        let of = |(sum, param): (Option<f64>, &&Param)| match sum {
            // Squares that are too large for the blocks there are summed here.
            Some(sum) if !sum.is_finite() => Ok(self.of(param)?.map(|g| sum_of_squares(&g))),
            sum => Ok(sum),
        };
        sums.zip(params).map(of).collect()
    }

    fn zero(&mut self, param: &Param, which: Range<usize>) -> Result<(), ModelError> {
        self.zero(param, which)
    }

    fn update<M: Parameters + ?Sized>(
        &mut self,
        model: &mut M,
        state: &mut BTreeMap<String, ParameterState>,
        rule: &Rule<'_>,
        due: &[Option<Due>],
    ) -> Result<(), ModelError> {
        update_there(self, model, state, rule, due)
    }

    fn reach<M: Parameters + ?Sized>(&mut self, model: &M) -> Result<(), ModelError> {
        self.device().synchronise()?;
        reach_devices(model)
    }

    fn alignment(&mut self, param: &Param) -> Result<Option<Alignment>, ModelError> {
        let Some(g) = self.find(param) else {
            return Ok(None);
        };
        let values = param.mirror().on(self.device())?;
        let w = values.view();
        let products = dots::dots(self.device(), &[(g, g), (g, w), (w, w)])?;
        Ok(Some(Alignment::of_products(
            products[0],
            products[1],
            products[2],
        )?))
    }

    fn alignment_of(&mut self, a: &Param, b: &Param) -> Result<Alignment, ModelError> {
        let device = self.device();
        let (a, b) = (a.mirror().on(device)?, b.mirror().on(device)?);
        let (a, b) = (a.view(), b.view());
        let products = dots::dots(device, &[(a, a), (a, b), (b, b)])?;
        Ok(Alignment::of_products(
            products[0],
            products[1],
            products[2],
        )?)
    }

    fn set(&mut self, param: &Param, gradient: Vec<f32>) -> Result<(), ModelError> {
        check_size(param, gradient.len())?;
        let gradient = Buffer::from_slice(self.device(), &gradient)?;
        self.put(&param.handle(), gradient);
        Ok(())
    }

    fn hand_on(&mut self, from: &Param, to: &Param) -> Result<(), ModelError> {
        if let Some(gradient) = self.find(from) {
            check_size(to, gradient.len())?;
            let mut copy = Buffer::uninitialised(self.device(), gradient.len())?;
            copy.view_mut().copy_from(gradient)?;
            self.put(&to.handle(), copy);
        }
        Ok(())
    }

    fn add_redundancy(
        &mut self,
        rows: &[&Param],
        pairs: &[(usize, usize)],
        reduction: Reduction,
        weight: f64,
    ) -> Result<f64, ModelError> {
        let device = self.device().clone();
        let values = rows.iter().map(|row| row.mirror().on(&device));
        let values = values.collect::<Result<Vec<_>, _>>()?;
        let mut products = Vec::with_capacity(3 * pairs.len());
        for &(first, second) in pairs {
            let (Some(a), Some(b)) = (values.get(first), values.get(second)) else {
                let rows = rows.len();
                return Err(mass_expand::ExpandError::Pair {
                    first,
                    second,
                    rows,
                }
                .into());
            };
            let (a, b) = (a.view(), b.view());
            products.extend([(a, a), (a, b), (b, b)]);
        }
        let products = dots::dots(&device, &products)?;
        let products: Vec<[f64; 3]> = products
            .chunks_exact(3)
            .map(|p| [p[0], p[1], p[2]])
            .collect();
        let (loss, shares) = redundancy_shares(&products, pairs, reduction, weight)?;
        // Every row gets a gradient, as on the host.
        for row in rows {
            let gradient = self.take_or_zeros(&row.handle())?;
            self.put(&row.handle(), gradient);
        }
        for share in shares {
            let (row, to) = (values[share.row].view(), rows[share.gradient].handle());
            self.write(&to, |gradient| {
                elementwise::add_scaled(&device, share.factor as f32, row, gradient)
            })?;
        }
        Ok(loss)
    }

    fn mean_room(
        &mut self,
        param: &Param,
        mean: Option<&mut Mirror>,
    ) -> Result<Option<Mirror>, ModelError> {
        match mean {
            Some(mean) => mean.own_on(self.device()).map(|()| None),
            None if self.find(param).is_some() => {
                let zeros = Buffer::zeros(self.device(), param.len())?;
                Ok(Some(Mirror::of_buffer(Arc::new(zeros))))
            }
            None => Ok(None),
        }
    }

    fn mean_add(&mut self, param: &Param, mean: &mut Mirror, share: f32) -> Result<(), ModelError> {
        {
            let mut lent = mean.lend();
            let to = lent.buffer().view_mut();
            match self.find(param) {
                Some(g) if share == 1.0 => to.copy_from(g)?,
                Some(g) => elementwise::running_mean(self.device(), share, g, to)?,
                None => elementwise::scale(self.device(), 1.0 - share, to)?,
            }
        }
        mean.device_written();
        Ok(())
    }

    fn replace(&mut self, param: &Param, mean: Option<Mirror>) -> Result<(), ModelError> {
        match mean {
            Some(mut mean) => {
                mean.own_on(self.device())?;
                if let Some(own) = mean.into_buffer() {
                    self.put(&param.handle(), own);
                }
            }
            None => drop(self.take(param)),
        }
        Ok(())
    }
}
