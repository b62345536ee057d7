//! Which of the experts is split.

use rand_chacha::rand_core::RngCore;

use super::params::Choice;
use super::pending::Candidate;
use super::state::LayerState;

/// Chooses among `candidates` or, for the choices that do not look at the trigger, among all active experts.
///
/// `candidates` is in the layer's order and not empty. Every comparison is strict, so ties go to the lowest index.
pub(super) fn choose(
    choice: Choice,
    layer: &LayerState,
    candidates: &[Candidate],
    generator: &mut impl RngCore,
) -> Option<Candidate> {
    let first = *candidates.first()?;
    let largest = |figure: &dyn Fn(usize) -> f64| {
        let mut best = 0;
        for at in 1..layer.ids.len() {
            if figure(at) > figure(best) {
                best = at;
            }
        }
        best
    };
    let at = match choice {
        Choice::TriggeredLowestIndex => return Some(first),
        Choice::TriggeredSmallestP => {
            // Without a p-value of its own (an alarm of the layer or of the loss) an expert ranks last.
            let p = |c: &Candidate| c.p_value.or(c.p_horizon).unwrap_or(f64::INFINITY);
            return Some(
                candidates
                    .iter()
                    .fold(first, |best, c| if p(c) < p(&best) { *c } else { best }),
            );
        }
        Choice::LossShare => largest(&|at| layer.experts[at].loss_share.value),
        Choice::MostLoaded => largest(&|at| layer.experts[at].load.value),
        Choice::LeastUsed => largest(&|at| -layer.experts[at].load.value),
        Choice::RoutingEntropy => largest(&|at| layer.experts[at].entropy.value),
        Choice::Random => {
            let scaled = u128::from(generator.next_u64()) * layer.ids.len() as u128;
            (scaled >> 64) as usize
        }
    };
    let id = *layer.ids.get(at)?;
    let known = candidates.iter().find(|candidate| candidate.id == id);
    Some(known.copied().unwrap_or(Candidate {
        id,
        p_value: None,
        p_horizon: None,
        alarm: None,
        cosine: None,
        awaits_cosine: false,
    }))
}
