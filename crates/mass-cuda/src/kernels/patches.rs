//! Tokens of an image: class token, embedded patches, and the positions of both.

use super::{Store, each, int, product, same_device};
use crate::driver::Arguments;
use crate::{Buffer, CudaError, Device, View, ViewMut};

/// Positions of a grid of patches as weighted sums of the positions of another grid.
#[derive(Debug)]
pub struct Interpolation {
    patches: usize,
    places: usize,
    /// Of each patch the places it is made of, and their weights; and of each place the patches it is in, in their
    /// order.
    to: Taps,
    from: Taps,
}

#[derive(Debug)]
struct Taps {
    starts: Buffer<u32>,
    others: Buffer<u32>,
    weights: Buffer<f32>,
}

impl Taps {
    fn new(device: &Device, lists: &[Vec<(usize, f32)>]) -> Result<Self, CudaError> {
        let mut starts = vec![0];
        let mut count = 0;
        for list in lists {
            count += list.len();
            starts.push(int("taps", count)?);
        }
        let others: Vec<u32> = lists.iter().flatten().map(|tap| tap.0 as u32).collect();
        let weights: Vec<f32> = lists.iter().flatten().map(|tap| tap.1).collect();
        Ok(Self {
            starts: Buffer::from_slice(device, &starts)?,
            others: Buffer::from_slice(device, &others)?,
            weights: Buffer::from_slice(device, &weights)?,
        })
    }
}

impl Interpolation {
    /// `taps[i]` lists the places, of `places`, whose positions patch i takes, with their weights.
    ///
    /// # Errors
    /// [`CudaError::Index`] for a place that is not there, [`CudaError::TooLarge`], [`CudaError::OutOfMemory`],
    /// [`CudaError::Call`].
    pub fn new(
        device: &Device,
        taps: &[Vec<(usize, f32)>],
        places: usize,
    ) -> Result<Self, CudaError> {
        int("places", places)?;
        int("patches", taps.len())?;
        let mut back = vec![Vec::new(); places];
        for (patch, (place, weight)) in taps
            .iter()
            .enumerate()
            .flat_map(|(i, list)| list.iter().map(move |&tap| (i, tap)))
        {
            let list = back.get_mut(place).ok_or(CudaError::Index {
                what: "place of a patch",
                index: place,
                position: patch,
                len: places,
            })?;
            list.push((patch, weight));
        }
        Ok(Self {
            patches: taps.len(),
            places,
            to: Taps::new(device, taps)?,
            from: Taps::new(device, &back)?,
        })
    }

    fn images(
        &self,
        embedded: usize,
        tokens: usize,
        class: usize,
        positions: usize,
    ) -> Result<usize, CudaError> {
        let d = class;
        CudaError::check(
            "positions",
            product("positions", &[self.places + 1, d])?,
            positions,
        )?;
        let image = product("patches", &[self.patches, d])?;
        let images = embedded.checked_div(image).unwrap_or(0);
        CudaError::check("embedded patches", images * image, embedded)?;
        CudaError::check(
            "tokens",
            product("tokens", &[images, self.patches + 1, d])?,
            tokens,
        )?;
        Ok(images)
    }
}

/// `y: [images, 1 + patches, d]`: the class token, then the embedded patches, plus the position of each.
///
/// `class: [d]`, `positions: [1 + places, d]`, of which the first is the class token's; `embedded: [images, patches,
/// d]`.
///
/// # Errors
/// [`CudaError::Length`] if lengths do not fit, [`CudaError::OutOfMemory`], [`CudaError::Call`],
/// [`CudaError::OtherDevice`].
pub fn forward(
    device: &Device,
    embedded: View<'_, f32>,
    class: View<'_, f32>,
    positions: View<'_, f32>,
    grid: &Interpolation,
    y: ViewMut<'_, f32>,
) -> Result<(), CudaError> {
    same_device(
        device,
        &[
            ("embedded", &embedded),
            ("class", &class),
            ("positions", &positions),
            ("y", &y),
        ],
    )?;
    grid.images(embedded.len(), y.len(), class.len(), positions.len())?;
    let (d, rows) = (int("width", class.len())?, grid.patches + 1);
    let mut common = Buffer::<f32>::uninitialised(device, rows * class.len())?;
    let Taps {
        starts,
        others,
        weights,
    } = &grid.to;
    let arguments = Arguments::new()
        .view(class)
        .view(positions)
        .view(starts.view())
        .view(others.view())
        .view(weights.view());
    let arguments = arguments
        .view_mut(&common.view_mut())
        .long(common.len())
        .int(d);
    each(device, "patches_common", common.len(), &arguments)?;
    let arguments = Arguments::new()
        .view(common.view())
        .view(embedded)
        .view_mut(&y)
        .long(y.len());
    each(
        device,
        "patches_forward",
        y.len(),
        &arguments.int(int("tokens", rows)?).int(d),
    )
}

/// Adds to `dclass` and `dpositions`, and writes `dembedded` or adds to it, for an upstream gradient `dy`.
///
/// # Errors
/// As [`forward`].
pub fn backward(
    device: &Device,
    dy: View<'_, f32>,
    grid: &Interpolation,
    (dembedded, store): (ViewMut<'_, f32>, Store),
    dclass: ViewMut<'_, f32>,
    dpositions: ViewMut<'_, f32>,
) -> Result<(), CudaError> {
    same_device(
        device,
        &[
            ("dy", &dy),
            ("dembedded", &dembedded),
            ("dclass", &dclass),
            ("dpositions", &dpositions),
        ],
    )?;
    let images = grid.images(dembedded.len(), dy.len(), dclass.len(), dpositions.len())?;
    let (d, rows) = (int("width", dclass.len())?, grid.patches + 1);
    let n = dembedded.len();
    let arguments = Arguments::new().view(dy).view_mut(&dembedded).long(n);
    let arguments = arguments
        .int(int("patches", grid.patches)?)
        .int(d)
        .int(store.add());
    each(device, "patches_backward", n, &arguments)?;
    let mut common = Buffer::<f32>::uninitialised(device, rows * dclass.len())?;
    let arguments = Arguments::new()
        .view(dy)
        .view_mut(&common.view_mut())
        .long(common.len());
    each(
        device,
        "patches_common_backward",
        common.len(),
        &arguments.int(int("images", images)?),
    )?;
    let Taps {
        starts,
        others,
        weights,
    } = &grid.from;
    let arguments = Arguments::new()
        .view(common.view())
        .view(starts.view())
        .view(others.view())
        .view(weights.view());
    let arguments = arguments
        .view_mut(&dclass)
        .view_mut(&dpositions)
        .long(dpositions.len())
        .int(d);
    each(
        device,
        "patches_positions_backward",
        dpositions.len(),
        &arguments,
    )
}
