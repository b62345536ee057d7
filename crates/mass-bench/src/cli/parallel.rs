//! Which processes train together.

use clap::ValueEnum;
use mass_model::parallel::Ranks;

use crate::BenchError;

/// So many gradients are worth a sum of their own while the backward pass goes on: 4 MiB, a message's worth.
const OVERLAPPED: usize = 1 << 20;

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
    /// Joins the others, where there are some, in groups of `expert_parallel`; with `overlap` gradients are summed while the backward
    /// pass goes on.
    ///
    /// # Errors
    /// [`BenchError::Usage`] if there are others and this build has no MPI, [`BenchError::Parallel`] if MPI refuses.
    pub fn join(self, expert_parallel: usize, overlap: bool) -> Result<Ranks, BenchError> {
        let ranks = match (self, started()) {
            (Self::None, _) | (Self::Auto, None) => Ok(Ranks::default()),
            (Self::Mpi, _) => join("--parallel mpi"),
            (Self::Auto, Some(n)) => join(&format!(
                "this is one of {n} processes that were started together (--parallel none trains each on its own)"
            )),
        }?;
        let ranks = match overlap {
            true => ranks.overlapping(OVERLAPPED),
            false => ranks,
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

/// How many processes a launcher has started together with this one, if several: by the variables of Open MPI, of MPICH and Intel MPI,
/// and of Slurm where it speaks one of their protocols.
fn started() -> Option<usize> {
    let number = |name: &str| std::env::var(name).ok()?.parse::<usize>().ok();
    let by_slurm = ["PMIX_RANK", "PMI_RANK"]
        .iter()
        .any(|name| number(name).is_some());
    let slurm = by_slurm.then(|| number("SLURM_STEP_NUM_TASKS")).flatten();
    let found = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"]
        .iter()
        .find_map(|name| number(name));
    found.or(slurm).filter(|&n| n > 1)
}
