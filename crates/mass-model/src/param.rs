//! Parameters with run-time sizes, and the visitor that optimiser, checkpoints and gradient monitors walk them by.

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;

use dfdx::tensor::CpuError;
use ndarray_rand::rand_distr::{Distribution, Normal, Uniform};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use crate::error::ModelError;
use crate::gradients::{CpuGradients, Identity};
use crate::kernels::gemm::Store;
use crate::kernels::scratch::{give_back, take_vec};
use crate::lineage::Lineage;
use crate::mirror::Mirror;

/// Number of values of a shape.
fn count(shape: &[usize]) -> Result<usize, ModelError> {
    let product = shape
        .iter()
        .try_fold(1usize, |n, &size| n.checked_mul(size));
    let bytes = product.and_then(|n| n.checked_mul(size_of::<f32>()));
    match (product, bytes) {
        (Some(n), Some(bytes)) if n > 0 && isize::try_from(bytes).is_ok() => Ok(n),
        (Some(0), _) => Err(ModelError::Config(format!(
            "a parameter cannot have shape {shape:?}: each size must be at least 1"
        ))),
        _ => Err(ModelError::Config(format!(
            "a parameter cannot have shape {shape:?}: it is larger than memory can be"
        ))),
    }
}

/// Room for `n` values, if there is enough.
pub(crate) fn room<T>(n: usize, what: impl FnOnce() -> String) -> Result<Vec<T>, ModelError> {
    let mut values = Vec::new();
    match values.try_reserve_exact(n) {
        Ok(()) => Ok(values),
        Err(_) => Err(ModelError::Config(format!(
            "{} is larger than memory has room for",
            what()
        ))),
    }
}

/// Most layers of a model, and most experts of a layer, that settings may ask for: as many as mass-expand names in all.
pub(crate) const MOST: usize = 1 << 20;

/// Draws weights; if they are refused, the generator is as it was.
pub(crate) fn draw<T>(
    rng: &mut ChaCha8Rng,
    make: impl FnOnce(&mut ChaCha8Rng) -> Result<T, ModelError>,
) -> Result<T, ModelError> {
    let before = rng.clone();
    make(rng).inspect_err(|_| *rng = before)
}

/// A trainable vector or matrix (row-major).
///
/// It owns its values, which kernels read in place, and a place of its own in dfdx's `Gradients`. A clone is another
/// parameter: it has the same values and a gradient of its own, which is what duplicating an expert needs.
pub struct Param {
    values: Mirror,
    shape: Vec<usize>,
    decays: bool,
    identity: Identity,
    lineage: Lineage,
    held: Held,
}

/// Which of several ranks have the values of a parameter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Held {
    /// All.
    #[default]
    Everywhere,
    /// This one, and those in the same place of other groups.
    Here,
    /// Others: it has no values here.
    Elsewhere,
}

impl Param {
    /// A parameter from its values. `decays` says whether weight decay applies (matrices: yes, biases and norms: no).
    ///
    /// # Errors
    /// [`ModelError::Shape`] if the number of values is not the product of the sizes, [`ModelError::Config`] if a size is zero
    /// or their product larger than memory can be.
    pub fn new(values: Vec<f32>, shape: &[usize], decays: bool) -> Result<Self, ModelError> {
        if values.len() != count(shape)? {
            return Err(ModelError::shape("parameter", shape, &[values.len()]));
        }
        Ok(Self {
            identity: Identity::new(values.len())?,
            values: values.into(),
            shape: shape.to_vec(),
            decays,
            lineage: Lineage::new(),
            held: Held::Everywhere,
        })
    }

    /// Of one value after another; a size that memory has no room for is refused before there is one.
    pub(crate) fn filled(
        shape: &[usize],
        decays: bool,
        mut value: impl FnMut() -> f32,
    ) -> Result<Self, ModelError> {
        let n = count(shape)?;
        let mut values = room(n, || format!("a parameter of shape {shape:?}"))?;
        values.extend((0..n).map(|_| value()));
        Self::new(values, shape, decays)
    }

    /// All zero.
    ///
    /// # Errors
    /// [`ModelError::Config`] as [`new`](Self::new).
    pub fn zeros(shape: &[usize], decays: bool) -> Result<Self, ModelError> {
        Self::filled(shape, decays, || 0.0)
    }

    /// All one.
    ///
    /// # Errors
    /// [`ModelError::Config`] as [`new`](Self::new).
    pub fn ones(shape: &[usize], decays: bool) -> Result<Self, ModelError> {
        Self::filled(shape, decays, || 1.0)
    }

    /// Drawn from U(-bound, bound).
    ///
    /// # Errors
    /// [`ModelError::Config`] as [`new`](Self::new), and for a bound that is negative or not finite.
    pub fn uniform(
        shape: &[usize],
        bound: f32,
        decays: bool,
        rng: &mut ChaCha8Rng,
    ) -> Result<Self, ModelError> {
        let d = Uniform::new_inclusive(-bound, bound).map_err(|_| {
            ModelError::Config(format!(
                "values cannot be drawn from U(-b, b) with b {bound}: it must be finite and at least 0"
            ))
        })?;
        Self::filled(shape, decays, || d.sample(rng))
    }

    /// Drawn from N(0, std²).
    ///
    /// # Errors
    /// [`ModelError::Config`] as [`new`](Self::new), and for a standard deviation that is not finite.
    pub fn normal(
        shape: &[usize],
        std: f32,
        decays: bool,
        rng: &mut ChaCha8Rng,
    ) -> Result<Self, ModelError> {
        let d = Normal::new(0.0, std).map_err(|_| {
            ModelError::Config(format!(
                "values cannot be drawn from N(0, s²) with s {std}: it must be finite"
            ))
        })?;
        Self::filled(shape, decays, || d.sample(rng))
    }

    /// The values, row-major.
    ///
    /// # Panics
    /// If they were changed on a device that has failed since: [`try_values`](Self::try_values) gives the error.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// [`values`](Self::values), copied from a device if they were changed there.
    ///
    /// # Errors
    /// That of the device, if it has failed.
    pub fn try_values(&self) -> Result<&[f32], ModelError> {
        self.values.try_values()
    }

    /// The values, shared: what an operation keeps for its backward pass.
    pub(crate) fn shared(&self) -> Arc<Vec<f32>> {
        Arc::clone(self.values.shared())
    }

    /// The values, to be changed in place.
    ///
    /// # Panics
    /// As [`values`](Self::values).
    pub fn values_mut(&mut self) -> &mut [f32] {
        &mut self.values
    }

    /// Gives it other values, wherever those lie that it has: they are not read.
    pub(crate) fn replace(&mut self, values: Vec<f32>) -> Result<(), ModelError> {
        if values.len() != self.len() {
            let (expected, found) = ([self.len()], [values.len()]);
            return Err(ModelError::shape(
                "values of a parameter",
                &expected,
                &found,
            ));
        }
        self.values = values.into();
        Ok(())
    }

    /// Whether some of the ranks that train together have its values and others do not, as of experts that are
    /// [divided](crate::parallel::divide); those that do not have an empty slice.
    pub fn is_divided(&self) -> bool {
        self.held != Held::Everywhere
    }

    /// Which ranks have its values.
    pub(crate) fn held(&self) -> Held {
        self.held
    }

    /// Says that this rank holds the values, and some others do not: those that it has, or those that are given.
    pub(crate) fn hold(&mut self, values: Option<Vec<f32>>) -> Result<(), ModelError> {
        if let Some(values) = values {
            let expected = count(&self.shape)?;
            if values.len() != expected {
                let found = [values.len()];
                return Err(ModelError::shape(
                    "values from another rank",
                    &[expected],
                    &found,
                ));
            }
            self.values = values.into();
        }
        self.held = Held::Here;
        Ok(())
    }

    /// Gives the values up, which another rank holds.
    pub(crate) fn release(&mut self) {
        self.values = Vec::new().into();
        self.held = Held::Elsewhere;
    }

    /// The values, wherever they lie.
    pub(crate) fn mirror(&self) -> &Mirror {
        &self.values
    }

    /// [`mirror`](Self::mirror), to be changed.
    pub(crate) fn mirror_mut(&mut self) -> &mut Mirror {
        &mut self.values
    }

    /// Gives it other values at once, by no step of an optimiser: a split that parts two gate rows, or the undoing of one.
    ///
    /// Averages of weights ([`Ema`](crate::optim::Ema)) are moved by the same difference at once, where what is learnt reaches them
    /// little by little.
    ///
    /// # Errors
    /// [`ModelError::Shape`] for another number of values; that of a device that has changed the values and failed.
    pub fn move_to(&mut self, values: &[f32]) -> Result<(), ModelError> {
        if values.len() != self.len() {
            let (expected, found) = ([self.len()], [values.len()]);
            return Err(ModelError::shape("values to move to", &expected, &found));
        }
        let pairs = values.iter().zip(self.try_values()?);
        let by: Vec<f32> = pairs.map(|(new, old)| new - old).collect();
        self.values_mut().copy_from_slice(values);
        self.lineage.moved(by);
        Ok(())
    }

    /// A parameter of the same values that is split off this one, in the same model: unlike a clone it begins with the average of
    /// weights ([`Ema`](crate::optim::Ema)) that this one has.
    pub fn offspring(&self) -> Self {
        Self {
            lineage: self.lineage.of_a_newcomer(),
            ..self.clone()
        }
    }

    pub(crate) fn lineage(&self) -> &Lineage {
        &self.lineage
    }

    /// The sizes: one for a vector, two for a matrix.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// Whether there are no values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether weight decay applies.
    pub fn decays(&self) -> bool {
        self.decays
    }

    /// This parameter's gradient.
    ///
    /// # Errors
    /// [`ModelError::NoGradient`] if no operation of a backward pass has written one, or it was used up by an optimiser.
    pub fn gradient<'g>(
        &self,
        gradients: &'g mut CpuGradients,
    ) -> Result<&'g mut Vec<f32>, ModelError> {
        let missing = || ModelError::NoGradient(format!("a parameter of shape {:?}", self.shape));
        self.find_gradient(gradients)?.ok_or_else(missing)
    }

    /// This parameter's gradient, if an operation has written one: see [`gradient`](Self::gradient). There is none for a parameter
    /// that took no part, such as those of an expert that no token was routed to.
    ///
    /// # Errors
    /// [`ModelError::Tensor`] if memory is exhausted.
    pub fn find_gradient<'g>(
        &self,
        gradients: &'g mut CpuGradients,
    ) -> Result<Option<&'g mut Vec<f32>>, ModelError> {
        Ok(self.identity.find(gradients)?)
    }

    /// Takes this parameter's gradient out, if there is one.
    ///
    /// # Errors
    /// [`ModelError::Tensor`] if memory is exhausted.
    pub fn take_gradient(
        &self,
        gradients: &mut CpuGradients,
    ) -> Result<Option<Vec<f32>>, ModelError> {
        Ok(self.identity.take(gradients)?)
    }

    /// Gives this parameter a gradient, in place of any that it has.
    ///
    /// # Errors
    /// [`ModelError::Shape`] if there is not one value for each of the parameter's.
    pub fn set_gradient(
        &self,
        gradients: &mut CpuGradients,
        gradient: Vec<f32>,
    ) -> Result<(), ModelError> {
        if gradient.len() != self.len() {
            let (expected, actual) = ([self.len()], [gradient.len()]);
            return Err(ModelError::shape("gradient", &expected, &actual));
        }
        Ok(self.identity.put(gradients, gradient)?)
    }

    /// Frees this parameter's gradient, if there is one; its memory serves the next backward pass.
    ///
    /// # Errors
    /// [`ModelError::Tensor`] if memory is exhausted.
    pub fn clear_gradient(&self, gradients: &mut CpuGradients) -> Result<(), ModelError> {
        if let Some(gradient) = self.take_gradient(gradients)? {
            give_back(gradient);
        }
        Ok(())
    }

    pub(crate) fn handle(&self) -> ParamHandle {
        ParamHandle(self.identity.clone())
    }
}

impl Clone for Param {
    fn clone(&self) -> Self {
        Self {
            values: self.values.clone(),
            shape: self.shape.clone(),
            decays: self.decays,
            // Not the number of values: another rank may have them.
            identity: Identity::new(self.identity.len()).expect("room for two values"),
            lineage: self.lineage.of_a_copy(),
            held: self.held,
        }
    }
}

impl fmt::Debug for Param {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Param")
            .field("shape", &self.shape)
            .field("decays", &self.decays)
            .finish_non_exhaustive()
    }
}

/// A parameter's place among the gradients, for use inside a backward operation.
#[derive(Clone)]
pub(crate) struct ParamHandle(Identity);

impl ParamHandle {
    /// The gradient's key.
    pub(crate) fn id(&self) -> dfdx::prelude::UniqueId {
        self.0.id()
    }

    /// Number of values.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Takes the gradient out, if there is one; give it back with [`put`](Self::put).
    pub(crate) fn take_found(
        &self,
        gradients: &mut CpuGradients,
    ) -> Result<Option<Vec<f32>>, CpuError> {
        self.0.take(gradients)
    }
}

/// A parameter's gradient, taken out to be added to.
pub(crate) struct Taken {
    /// As many values as the parameter has.
    pub(crate) values: Vec<f32>,
    /// What an operation's own share does to them: replace them when nothing has been added yet (their contents are
    /// unspecified then), else add.
    pub(crate) store: Store,
}

fn zeros(len: usize) -> Vec<f32> {
    let mut values = take_vec(len);
    values.par_chunks_mut(1 << 16).for_each(|v| v.fill(0.0));
    values
}

impl ParamHandle {
    /// Takes the gradient out (zeros if there is none yet); give it back with [`put`](Self::put).
    pub(crate) fn take(&self, gradients: &mut CpuGradients) -> Result<Vec<f32>, CpuError> {
        let gradient = self.0.take(gradients)?;
        Ok(gradient.unwrap_or_else(|| zeros(self.0.len())))
    }

    /// Takes the gradient out without clearing it if it is new; give it back with [`put`](Self::put).
    pub(crate) fn take_stored(&self, gradients: &mut CpuGradients) -> Result<Taken, CpuError> {
        Ok(match self.0.take(gradients)? {
            Some(values) => Taken {
                values,
                store: Store::Add,
            },
            None => Taken {
                values: take_vec(self.0.len()),
                store: Store::Replace,
            },
        })
    }

    /// Puts a gradient back.
    pub(crate) fn put(
        &self,
        gradients: &mut CpuGradients,
        gradient: Vec<f32>,
    ) -> Result<(), CpuError> {
        self.0.put(gradients, gradient)
    }
}

/// Anything with named parameters.
///
/// Names are stable: an expert keeps its own while others come and go, so optimiser state and checkpoints are keyed by
/// them. [`parameters!`](crate::parameters!) implements it for a struct.
pub trait Parameters {
    /// Calls `f` with every parameter and its name, always in the same order.
    fn visit<'a>(&'a self, prefix: &str, f: &mut dyn FnMut(String, &'a Param));

    /// Calls `f` with every parameter, to be changed, and its name, in the order of [`visit`](Self::visit).
    fn visit_mut(&mut self, prefix: &str, f: &mut dyn FnMut(String, &mut Param));

    /// Number of trainable values.
    fn num_values(&self) -> usize {
        let mut n = 0;
        self.visit("", &mut |_, p| n += p.len());
        n
    }
}

/// Refuses a model two parameters of which have one name, where something is kept by name.
pub(crate) fn check_names(model: &(impl Parameters + ?Sized)) -> Result<(), ModelError> {
    let (mut names, mut twice) = (HashSet::new(), None);
    model.visit("", &mut |name, _| {
        if twice.is_none() {
            twice = names.replace(name);
        }
    });
    match twice {
        Some(name) => Err(ModelError::Config(format!(
            "two parameters have the name {name:?}, and what belongs to one is kept by its name"
        ))),
        None => Ok(()),
    }
}

/// Refuses a NaN or an infinity among the values that belong to a parameter.
pub(crate) fn check_finite(what: &str, name: &str, values: &[f32]) -> Result<(), ModelError> {
    match values.iter().find(|x| !x.is_finite()) {
        Some(x) => Err(ModelError::NonFinite(format!(
            "{x} among the {what} of {name}"
        ))),
        None => Ok(()),
    }
}

/// Copies all values to the host that a device has changed: none of them fails to be read afterwards.
pub(crate) fn bring_to_host(model: &(impl Parameters + ?Sized)) -> Result<(), ModelError> {
    let mut outcome = Ok(());
    model.visit("", &mut |_, p| {
        if outcome.is_ok() {
            outcome = p.try_values().map(|_| ());
        }
    });
    outcome
}

/// Refuses a model some of whose values are on a device alone that has failed.
pub(crate) fn reach_devices(model: &(impl Parameters + ?Sized)) -> Result<(), ModelError> {
    #[cfg(feature = "cuda")]
    {
        let mut devices: Vec<mass_cuda::Device> = Vec::new();
        model.visit("", &mut |_, p| {
            if let Some(device) = p.mirror().only_on().filter(|d| !devices.contains(d)) {
                devices.push(device);
            }
        });
        for device in devices {
            device.synchronise()?;
        }
    }
    #[cfg(not(feature = "cuda"))]
    let _ = model;
    Ok(())
}

/// Joins a prefix and a name by a dot; either may be empty.
#[doc(hidden)]
pub fn join(prefix: &str, name: &str) -> String {
    match (prefix, name) {
        ("", one) | (one, "") => one.to_owned(),
        _ => format!("{prefix}.{name}"),
    }
}

/// The name of a field, below a prefix.
#[doc(hidden)]
#[macro_export]
macro_rules! parameter_name {
    ($prefix:expr, $field:ident) => {
        $crate::join($prefix, stringify!($field))
    };
    ($prefix:expr, $field:ident as $name:literal) => {
        $crate::join($prefix, $name)
    };
}

/// Implements [`Parameters`](crate::Parameters) for a struct: its fields that have parameters, in the order of their names.
///
/// A parameter is named by its field, or by what follows `as`; an empty name leaves the prefix as it is. A field is a
/// [`Param`](crate::Param), or anything that implements `Parameters`, such as a `Vec` or an `Option` of them.
///
/// ```
/// use mass_model::nn::{LayerNorm, Linear};
/// use mass_model::{Parameters, parameters, seeded_rng};
///
/// struct Model {
///     layers: Vec<Linear>,
///     last: Option<LayerNorm>,
/// }
/// parameters!(Model { layers, last as "norm" });
///
/// let layers = vec![Linear::new(2, 3, false, &mut seeded_rng(0))?];
/// let model = Model { layers, last: Some(LayerNorm::new(3, 1e-5)?) };
/// let mut names = Vec::new();
/// model.visit("", &mut |name, _| names.push(name));
/// assert_eq!(names, ["layers.0.weight", "norm.weight", "norm.bias"]);
/// # Ok::<(), mass_model::ModelError>(())
/// ```
#[macro_export]
macro_rules! parameters {
    ($model:ty { $($field:ident $(as $name:literal)?),* $(,)? }) => {
        impl $crate::Parameters for $model {
            fn visit<'a>(
                &'a self,
                prefix: &str,
                f: &mut dyn FnMut(::std::string::String, &'a $crate::Param),
            ) {
                $(
                    let name = $crate::parameter_name!(prefix, $field $(as $name)?);
                    $crate::Parameters::visit(&self.$field, &name, f);
                )*
            }

            fn visit_mut(
                &mut self,
                prefix: &str,
                f: &mut dyn FnMut(::std::string::String, &mut $crate::Param),
            ) {
                $(
                    let name = $crate::parameter_name!(prefix, $field $(as $name)?);
                    $crate::Parameters::visit_mut(&mut self.$field, &name, f);
                )*
            }
        }
    };
}

/// Itself, by the prefix alone.
impl Parameters for Param {
    fn visit<'a>(&'a self, prefix: &str, f: &mut dyn FnMut(String, &'a Param)) {
        f(prefix.to_owned(), self);
    }

    fn visit_mut(&mut self, prefix: &str, f: &mut dyn FnMut(String, &mut Param)) {
        f(prefix.to_owned(), self);
    }
}

/// Each by its number.
impl<M: Parameters> Parameters for Vec<M> {
    fn visit<'a>(&'a self, prefix: &str, f: &mut dyn FnMut(String, &'a Param)) {
        for (i, part) in self.iter().enumerate() {
            part.visit(&join(prefix, &i.to_string()), f);
        }
    }

    fn visit_mut(&mut self, prefix: &str, f: &mut dyn FnMut(String, &mut Param)) {
        for (i, part) in self.iter_mut().enumerate() {
            part.visit_mut(&join(prefix, &i.to_string()), f);
        }
    }
}

impl<M: Parameters> Parameters for Option<M> {
    fn visit<'a>(&'a self, prefix: &str, f: &mut dyn FnMut(String, &'a Param)) {
        self.iter().for_each(|part| part.visit(prefix, f));
    }

    fn visit_mut(&mut self, prefix: &str, f: &mut dyn FnMut(String, &mut Param)) {
        self.iter_mut().for_each(|part| part.visit_mut(prefix, f));
    }
}
