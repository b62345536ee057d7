//! Which processes train together.

use std::num::NonZeroUsize;

use clap::ValueEnum;
use mass_model::parallel::Ranks;

use crate::BenchError;

/// What `--parallel` names.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "lowercase")]
pub enum Parallel {
    /// Those that mpirun or srun has started together, if there are several
    #[default]
    Auto,
    /// Those of MPI, also if there is one alone
    Mpi,
    /// This one alone
    None,
}

impl Parallel {
    /// Joins the others, where there are some, in groups of `expert_parallel`, for sums of gradients as `overlap` says.
    ///
    /// # Errors
    /// [`BenchError::Usage`] if there are others and this build has no MPI, or none whom the arguments are for;
    /// [`BenchError::Parallel`] if MPI refuses.
    pub fn join(
        self,
        expert_parallel: usize,
        overlap: Option<NonZeroUsize>,
    ) -> Result<Ranks, BenchError> {
        let ranks = match (self, started()) {
            (Self::None, _) | (Self::Auto, None) => Ok(Ranks::default()),
            (Self::Mpi, _) => join("--parallel mpi"),
            (Self::Auto, Some(Started::Together(n))) => join(&format!(
                "this is one of {n} processes that were started together (--parallel none trains each on its own)"
            )),
            (Self::Auto, Some(Started::Apart(n))) => Err(BenchError::Usage(format!(
                "srun has started {n} processes that do not know each other: give it --mpi=pmix, or another protocol of this MPI \
                 library (--parallel none trains each on its own)"
            ))),
        }?;
        let ranks = match overlap {
            Some(n) if ranks.is_alone() => {
                let what =
                    format!("--overlap {n}: one process has no gradients to sum with others");
                return Err(BenchError::Usage(what));
            }
            Some(n) => ranks.overlapping(n.get()),
            None => ranks,
        };
        ranks
            .in_groups(expert_parallel)
            .map_err(|e| BenchError::Usage(format!("--expert-parallel {expert_parallel}: {e}")))
    }
}

#[cfg(feature = "mpi")]
fn join(_: &str) -> Result<Ranks, BenchError> {
    Ok(Ranks::new(mass_model::parallel::Mpi::join()?))
}

#[cfg(not(feature = "mpi"))]
fn join(why: &str) -> Result<Ranks, BenchError> {
    Err(BenchError::Usage(format!(
        "{why}: this build has no MPI, which the feature `mpi` of mass-bench brings"
    )))
}

/// Several processes, started at once.
enum Started {
    /// They can find each other.
    Together(usize),
    /// They cannot.
    Apart(usize),
}

/// What a launcher has started together with this process, if anything: by the variables of Open MPI, of MPICH and Intel MPI, and of
/// Slurm, which tells processes of each other only if it speaks one of their protocols.
fn started() -> Option<Started> {
    let number = |name: &str| std::env::var(name).ok()?.parse::<usize>().ok();
    let found = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"]
        .iter()
        .find_map(|name| number(name));
    let by_slurm = ["PMIX_RANK", "PMI_RANK"]
        .iter()
        .any(|name| number(name).is_some());
    let several = |n: &usize| *n > 1;
    match (found, number("SLURM_STEP_NUM_TASKS")) {
        (Some(n), _) => Some(n).filter(several).map(Started::Together),
        (None, n) if by_slurm => n.filter(several).map(Started::Together),
        (None, n) => n.filter(several).map(Started::Apart),
    }
}
