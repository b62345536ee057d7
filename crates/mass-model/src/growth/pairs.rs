use mass_expand::ExpertId;

use crate::error::ModelError;
use crate::nn::MoeLayer;
use crate::optim::Gradients;
use crate::parallel::Ranks;
use crate::pass::LayerTrace;

/// How far the two halves of a split have come apart.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PairFigures {
    /// `cos(G, W)` of the first matrix of the expert that was split; `None` if it got no gradient.
    pub source_cosine: Option<f64>,
    /// The same of the newcomer.
    pub new_cosine: Option<f64>,
    /// Tokens that both have over tokens that either has (Jaccard); `None` if neither has any.
    pub routing_overlap: Option<f64>,
    /// The newcomer's part of all tokens that the two have, counting one twice that both have; `None` likewise.
    pub new_share: Option<f64>,
    /// Cosine of the two gate rows; `None` if one is zero.
    pub gate_cosine: Option<f64>,
}

/// The figures of a pair in one step: gradients before they are applied, and what the router did with the step's tokens.
///
/// # Errors
/// [`ModelError::NoSuchExpert`] if the layer has no such expert, [`ModelError::Shape`] if it has other experts than when it was
/// traced, [`ModelError::NoGradient`] if the gradients are not those of that pass.
pub fn pair_figures(
    layer: &MoeLayer,
    trace: &LayerTrace,
    gradients: &mut impl Gradients,
    source: ExpertId,
    newcomer: ExpertId,
) -> Result<PairFigures, ModelError> {
    let alone = Ranks::default();
    pair_figures_among(&alone, layer, trace, gradients, (source, newcomer))
}

/// [`pair_figures`], where the trace is of this rank's share of a batch, and the gradients are of all of it.
///
/// # Errors
/// As there, and [`ModelError::Parallel`].
pub fn pair_figures_among(
    ranks: &Ranks,
    layer: &MoeLayer,
    trace: &LayerTrace,
    gradients: &mut impl Gradients,
    (source, newcomer): (ExpertId, ExpertId),
) -> Result<PairFigures, ModelError> {
    let plan = &trace.plan;
    let (traced, experts) = (plan.num_experts(), layer.experts().len());
    if traced != experts {
        return Err(ModelError::shape("experts traced", &[experts], &[traced]));
    }
    let [a, b] = [layer.index_of(source)?, layer.index_of(newcomer)?];
    // Tokens of an expert are in ascending order, each once.
    let [of_a, of_b] = [a, b].map(|e| &plan.tokens()[plan.segment(e)]);
    let both = of_a
        .iter()
        .filter(|t| of_b.binary_search(t).is_ok())
        .count();
    let mut counts = [both, of_a.len(), of_b.len()].map(|n| n as f64);
    ranks.sum(&mut counts)?;
    let [both, of_a, of_b] = counts.map(|n| n as usize);
    let loads = of_a + of_b;
    let of_loads = |n: usize, all: usize| (loads > 0).then(|| n as f64 / all as f64);
    let [row, other] = [a, b].map(|e| &layer.experts()[e].gate);
    Ok(PairFigures {
        source_cosine: cosine_among(ranks, layer, trace, gradients, a)?,
        new_cosine: cosine_among(ranks, layer, trace, gradients, b)?,
        routing_overlap: of_loads(both, loads - both),
        new_share: of_loads(of_b, loads),
        gate_cosine: gradients.alignment_of(row, other)?.cosine,
    })
}

/// [`fc1_cosine`], wherever the expert is.
pub(super) fn cosine_among(
    ranks: &Ranks,
    layer: &MoeLayer,
    trace: &LayerTrace,
    gradients: &mut impl Gradients,
    place: usize,
) -> Result<Option<f64>, ModelError> {
    let Some(&owner) = layer.owners().get(place) else {
        return fc1_cosine(layer, trace, gradients, place);
    };
    let mut own = [0.0; 2];
    // That of the first group counts: all of them have the same.
    if owner == ranks.rank()
        && let Some(cosine) = fc1_cosine(layer, trace, gradients, place)?
    {
        own = [1.0, cosine];
    }
    ranks.sum(&mut own)?;
    Ok((own[0] > 0.0).then_some(own[1]))
}

/// `cos(G, W)` of the first matrix of the expert at a place; `None` if either is zero, as the gradient is of one without tokens.
fn fc1_cosine(
    layer: &MoeLayer,
    trace: &LayerTrace,
    gradients: &mut impl Gradients,
    place: usize,
) -> Result<Option<f64>, ModelError> {
    let fc1 = &layer.experts()[place].network.fc1.0;
    match gradients.alignment(fc1)? {
        Some(alignment) => Ok(alignment.cosine),
        None if trace.plan.load(place) == 0 => Ok(None),
        None => {
            let expert = layer.ids()[place];
            Err(ModelError::NoGradient(format!("expert {expert}")))
        }
    }
}
