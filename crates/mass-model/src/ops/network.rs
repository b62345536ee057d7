use crate::error::ModelError;
use crate::kernels::moe_ffn::ExpertWeights;
use crate::param::{Param, Parameters, join};

/// The parameters of a feed-forward network, dense or one of a mixture's: `fc1: [h, d]`, `[h]`, `fc2: [d, h]`, `[d]`.
#[derive(Clone, Debug)]
pub struct Network {
    /// First matrix and bias.
    pub fc1: (Param, Param),
    /// Second matrix and bias.
    pub fc2: (Param, Param),
    /// Matrix and bias of the factor on the activation (SwiGLU and its kin), shaped as `fc1`.
    pub up: Option<(Param, Param)>,
}

impl Network {
    /// Matrices and biases, the factor's last.
    pub(crate) fn params(&self) -> impl Iterator<Item = &Param> {
        let up = self.up.iter().flat_map(|(w, b)| [w, b]);
        [&self.fc1.0, &self.fc1.1, &self.fc2.0, &self.fc2.1]
            .into_iter()
            .chain(up)
    }

    /// [`params`](Self::params), to be changed.
    pub(crate) fn params_mut(&mut self) -> impl Iterator<Item = &mut Param> {
        let up = self.up.iter_mut().flat_map(|(w, b)| [w, b]);
        [
            &mut self.fc1.0,
            &mut self.fc1.1,
            &mut self.fc2.0,
            &mut self.fc2.1,
        ]
        .into_iter()
        .chain(up)
    }

    pub(crate) fn offspring(&self) -> Self {
        let pair = |(w, b): &(Param, Param)| (w.offspring(), b.offspring());
        Self {
            fc1: pair(&self.fc1),
            fc2: pair(&self.fc2),
            up: self.up.as_ref().map(pair),
        }
    }

    /// What kernels of the host read.
    ///
    /// # Errors
    /// That of a device that has changed them and failed.
    pub(crate) fn weights(&self) -> Result<ExpertWeights<'_>, ModelError> {
        Ok(ExpertWeights {
            w1: self.fc1.0.try_values()?,
            b1: self.fc1.1.try_values()?,
            w2: self.fc2.0.try_values()?,
            b2: self.fc2.1.try_values()?,
            up: match &self.up {
                Some((w, b)) => Some((w.try_values()?, b.try_values()?)),
                None => None,
            },
        })
    }

    /// Hidden and outer width; an error if the shapes do not fit each other, or are not those `wanted`.
    pub(crate) fn check(
        &self,
        what: &str,
        wanted: Option<(usize, usize)>,
    ) -> Result<(usize, usize), ModelError> {
        let (hidden, dim) = match (wanted, self.fc1.0.shape()) {
            (Some(wanted), _) => wanted,
            (None, &[hidden, dim]) => (hidden, dim),
            (None, other) => return Err(ModelError::shape(what, &[0, 0], other)),
        };
        let shapes: [&[usize]; 6] = [
            &[hidden, dim],
            &[hidden],
            &[dim, hidden],
            &[dim],
            &[hidden, dim],
            &[hidden],
        ];
        for (param, wanted) in self.params().zip(shapes) {
            if param.shape() != wanted {
                return Err(ModelError::shape(what, wanted, param.shape()));
            }
        }
        Ok((hidden, dim))
    }
}

impl Parameters for Network {
    fn visit<'a>(&'a self, prefix: &str, f: &mut dyn FnMut(String, &'a Param)) {
        f(join(prefix, "fc1.weight"), &self.fc1.0);
        f(join(prefix, "fc1.bias"), &self.fc1.1);
        f(join(prefix, "fc2.weight"), &self.fc2.0);
        f(join(prefix, "fc2.bias"), &self.fc2.1);
        if let Some((weight, bias)) = &self.up {
            f(join(prefix, "up.weight"), weight);
            f(join(prefix, "up.bias"), bias);
        }
    }

    fn visit_mut(&mut self, prefix: &str, f: &mut dyn FnMut(String, &mut Param)) {
        f(join(prefix, "fc1.weight"), &mut self.fc1.0);
        f(join(prefix, "fc1.bias"), &mut self.fc1.1);
        f(join(prefix, "fc2.weight"), &mut self.fc2.0);
        f(join(prefix, "fc2.bias"), &mut self.fc2.1);
        if let Some((weight, bias)) = &mut self.up {
            f(join(prefix, "up.weight"), weight);
            f(join(prefix, "up.bias"), bias);
        }
    }
}
