//! A model as its mixture layers: what growth and checkpoints see of it.

use crate::error::ModelError;
use crate::kernels::dropout::DropoutKeys;
use crate::nn::{Block, MoeConfig, MoeLayer};
use crate::parallel::Ranks;
use crate::param::{Parameters, join};
use crate::pass::{LayerTrace, Masked};

/// A model with mixture layers, counted among themselves, bottom first.
///
/// [`mixtures!`](crate::mixtures!) says where they are. The two visitors are all that a model of one's own has to give if it
/// does so by hand.
///
/// ```
/// use mass_model::growth::Mixtures;
/// use mass_model::nn::{Linear, MoeConfig, MoeLayer};
/// # use mass_model::{Activation, seeded_rng};
/// # use mass_routing::{Combine, RouterConfig};
///
/// struct Model {
///     layers: Vec<MoeLayer>,
///     head: Linear,
/// }
/// mass_model::parameters!(Model { layers, head });
/// mass_model::mixtures!(Model { layers });
///
/// # let router = RouterConfig::TopP { p: 0.5, combine: Combine::Renormalised };
/// # let config = MoeConfig::new(4, 8, 2, Activation::Relu, router);
/// # let mut rng = seeded_rng(0);
/// let layers = vec![MoeLayer::new(&config, &mut rng)?, MoeLayer::new(&config, &mut rng)?];
/// let model = Model { layers, head: Linear::new(4, 3, true, &mut rng)? };
/// assert_eq!((model.mixtures(), model.mixture_name(1)), (2, "layers.1".to_owned()));
/// # Ok::<(), mass_model::ModelError>(())
/// ```
pub trait Mixtures: Parameters {
    /// Calls `f` with every mixture layer, bottom first, and the prefix of its parameters' names.
    fn visit_mixtures<'a>(&'a self, prefix: &str, f: &mut dyn FnMut(String, &'a MoeLayer)) {
        let _ = (prefix, f);
    }

    /// Calls `f` with every mixture layer, to be changed, in the order of [`visit_mixtures`](Self::visit_mixtures).
    fn visit_mixtures_mut<'a>(
        &'a mut self,
        prefix: &str,
        f: &mut dyn FnMut(String, &'a mut MoeLayer),
    ) {
        let _ = (prefix, f);
    }

    /// Number of mixture layers.
    fn mixtures(&self) -> usize {
        let mut count = 0;
        self.visit_mixtures("", &mut |_, _| count += 1);
        count
    }

    /// One of them, counted from the bottom.
    ///
    /// # Panics
    /// If there are no more than `layer` of them; so do the other two.
    fn mixture(&self, layer: usize) -> &MoeLayer {
        let mut all = Vec::new();
        self.visit_mixtures("", &mut |_, moe| all.push(moe));
        all.into_iter().nth(layer).expect(MISSING)
    }

    /// One of them, to be changed.
    fn mixture_mut(&mut self, layer: usize) -> &mut MoeLayer {
        let mut all = Vec::new();
        self.visit_mixtures_mut("", &mut |_, moe| all.push(moe));
        all.into_iter().nth(layer).expect(MISSING)
    }

    /// Lets every router that balances itself learn from the plans of a training pass (a balancing bias, a controlled p). Call it
    /// once a step, before a [`Grower`](crate::growth::Grower) changes the pools that the plans are of.
    ///
    /// # Errors
    /// [`ModelError::Shape`] if the traces are of another number of mixture layers, [`ModelError::Routing`] if a plan is of another
    /// number of experts than its layer.
    fn adapt(&mut self, layers: &[LayerTrace]) -> Result<(), ModelError> {
        self.adapt_among(&Ranks::default(), layers)
    }

    /// [`adapt`](Self::adapt), where the plans are of this rank's share of a batch.
    ///
    /// # Errors
    /// As there, and [`ModelError::Parallel`].
    fn adapt_among(&mut self, ranks: &Ranks, layers: &[LayerTrace]) -> Result<(), ModelError> {
        let (expected, found) = (self.mixtures(), layers.len());
        if expected != found {
            return Err(ModelError::shape(
                "mixture layers traced",
                &[expected],
                &[found],
            ));
        }
        for (l, trace) in layers.iter().enumerate() {
            self.mixture_mut(l).adapt_among(ranks, &trace.plan)?;
        }
        Ok(())
    }

    /// Tells every layer which ranks it computes its routing losses and noise with, of which this one has a share of each batch.
    /// It is asked in training passes alone.
    fn set_ranks(&mut self, ranks: &Ranks) {
        self.visit_mixtures_mut("", &mut |_, moe| moe.set_ranks(ranks.clone()));
    }

    /// The prefix of its parameters' names; empty if the layer is all there is.
    fn mixture_name(&self, layer: usize) -> String {
        let mut all = Vec::new();
        self.visit_mixtures("", &mut |name, _| all.push(name));
        all.into_iter().nth(layer).expect(MISSING)
    }
}

/// A training pass. If it fails, routers and the keys of dropout are as before it: made again, it has the same noise and masks.
pub(crate) fn attempt<M: Mixtures, T>(
    model: &M,
    mut dropout: Option<&mut DropoutKeys>,
    pass: impl FnOnce(Option<&mut DropoutKeys>) -> Result<T, ModelError>,
) -> Result<T, ModelError> {
    let (mut routers, keys) = (Vec::new(), dropout.as_deref().cloned());
    model.visit_mixtures("", &mut |_, moe| {
        let router = moe.router().clone();
        routers.push((moe, router));
    });
    let outcome = pass(dropout.as_deref_mut());
    if outcome.is_err() {
        for (moe, router) in routers {
            *moe.router() = router;
        }
        if let (Some(now), Some(before)) = (dropout, keys) {
            *now = before;
        }
    }
    outcome
}

const MISSING: &str = "a mixture layer of the model";

/// Implements [`Mixtures`](crate::growth::Mixtures) for a struct: its fields with mixture layers, bottom first, with the
/// names that [`parameters!`](crate::parameters!) gives them.
///
/// A field is a [`MoeLayer`](crate::nn::MoeLayer), or anything that implements `Mixtures`, such as a `Vec` or an `Option` of them.
#[macro_export]
macro_rules! mixtures {
    ($model:ty { $($field:ident $(as $name:literal)?),* $(,)? }) => {
        impl $crate::growth::Mixtures for $model {
            fn visit_mixtures<'a>(
                &'a self,
                prefix: &str,
                f: &mut dyn FnMut(::std::string::String, &'a $crate::nn::MoeLayer),
            ) {
                $(
                    let name = $crate::parameter_name!(prefix, $field $(as $name)?);
                    $crate::growth::Mixtures::visit_mixtures(&self.$field, &name, f);
                )*
            }

            fn visit_mixtures_mut<'a>(
                &'a mut self,
                prefix: &str,
                f: &mut dyn FnMut(::std::string::String, &'a mut $crate::nn::MoeLayer),
            ) {
                $(
                    let name = $crate::parameter_name!(prefix, $field $(as $name)?);
                    $crate::growth::Mixtures::visit_mixtures_mut(&mut self.$field, &name, f);
                )*
            }
        }
    };
}

impl Mixtures for MoeLayer {
    fn visit_mixtures<'a>(&'a self, prefix: &str, f: &mut dyn FnMut(String, &'a MoeLayer)) {
        f(prefix.to_owned(), self);
    }

    fn visit_mixtures_mut<'a>(
        &'a mut self,
        prefix: &str,
        f: &mut dyn FnMut(String, &'a mut MoeLayer),
    ) {
        f(prefix.to_owned(), self);
    }
}

mixtures!(Block { moe });

/// Each by its number.
impl<M: Mixtures> Mixtures for Vec<M> {
    fn visit_mixtures<'a>(&'a self, prefix: &str, f: &mut dyn FnMut(String, &'a MoeLayer)) {
        for (i, part) in self.iter().enumerate() {
            part.visit_mixtures(&join(prefix, &i.to_string()), f);
        }
    }

    fn visit_mixtures_mut<'a>(
        &'a mut self,
        prefix: &str,
        f: &mut dyn FnMut(String, &'a mut MoeLayer),
    ) {
        for (i, part) in self.iter_mut().enumerate() {
            part.visit_mixtures_mut(&join(prefix, &i.to_string()), f);
        }
    }
}

impl<M: Mixtures> Mixtures for Option<M> {
    fn visit_mixtures<'a>(&'a self, prefix: &str, f: &mut dyn FnMut(String, &'a MoeLayer)) {
        self.iter().for_each(|part| part.visit_mixtures(prefix, f));
    }

    fn visit_mixtures_mut<'a>(
        &'a mut self,
        prefix: &str,
        f: &mut dyn FnMut(String, &'a mut MoeLayer),
    ) {
        self.iter_mut()
            .for_each(|part| part.visit_mixtures_mut(prefix, f));
    }
}

/// Whether a model's mixtures are what its configuration says, which may have changed since it was made.
pub(crate) fn check_mixtures<'a>(
    model: &impl Mixtures,
    configured: impl Iterator<Item = &'a MoeConfig>,
) -> Result<(), ModelError> {
    for (layer, configured) in configured.enumerate() {
        if layer >= model.mixtures() || model.mixture(layer).config() != configured {
            return Err(ModelError::Config(format!(
                "mixture layer {layer} is not what the model's configuration says, which a checkpoint would not keep"
            )));
        }
    }
    Ok(())
}

/// Refuses a masked expert of a mixture layer that is not there.
pub(crate) fn check_masked(masked: Option<Masked>, mixtures: usize) -> Result<(), ModelError> {
    match masked {
        Some(m) if m.layer >= mixtures => Err(ModelError::Config(format!(
            "an expert of mixture layer {} is masked, there are {mixtures}",
            m.layer
        ))),
        _ => Ok(()),
    }
}
