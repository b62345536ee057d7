//! Tokens of an image: class token, embedded patches, and the positions of both.

use super::{Placed, Store, each, given, int, product, within};
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
    /// [`CudaError::Index`] for a place that is not there, [`CudaError::Setting`] for a weight that is NaN or infinite,
    /// [`CudaError::TooLarge`], [`CudaError::OutOfMemory`],
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
            within("weight of a place", weight, f32::MIN..=f32::MAX, "finite")?;
            list.push((patch, weight));
        }
        Ok(Self {
            patches: taps.len(),
            places,
            to: Taps::new(device, taps)?,
            from: Taps::new(device, &back)?,
        })
    }

    /// Checks the arrays of a pass, and room for what all images have in common.
    fn sizes(
        &self,
        device: &Device,
        embedded: &dyn Placed,
        tokens: &dyn Placed,
        class: &dyn Placed,
        positions: &dyn Placed,
    ) -> Result<Sizes, CudaError> {
        let (d, rows) = (class.values(), self.patches + 1);
        let image = product("patches", &[self.patches, d])?;
        let images = embedded.values().checked_div(image).unwrap_or(0);
        given(
            device,
            &[
                ("class token", class, d),
                (
                    "positions",
                    positions,
                    product("positions", &[self.places + 1, d])?,
                ),
                ("embedded patches", embedded, images * image),
                ("tokens", tokens, product("tokens", &[images, rows, d])?),
                ("interpolation", &self.to.starts, self.patches + 1),
                ("interpolation", &self.from.starts, self.places + 1),
            ],
        )?;
        Ok(Sizes {
            images: int("images", images)?,
            rows: int("tokens of an image", rows)?,
            d: int("width", d)?,
            common: Buffer::uninitialised(device, product("tokens of an image", &[rows, d])?)?,
        })
    }
}

/// What a pass works with.
struct Sizes {
    images: u32,
    rows: u32,
    d: u32,
    /// `[rows, d]`
    common: Buffer<f32>,
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
    let Sizes {
        rows,
        d,
        mut common,
        ..
    } = grid.sizes(device, &embedded, &y, &class, &positions)?;
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
        &arguments.int(rows).int(d),
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
    let Sizes {
        images,
        rows,
        d,
        mut common,
    } = grid.sizes(device, &dembedded, &dy, &dclass, &dpositions)?;
    let n = dembedded.len();
    let arguments = Arguments::new().view(dy).view_mut(&dembedded).long(n);
    let arguments = arguments.int(rows - 1).int(d).int(store.add());
    each(device, "patches_backward", n, &arguments)?;
    let arguments = Arguments::new()
        .view(dy)
        .view_mut(&common.view_mut())
        .long(common.len());
    each(
        device,
        "patches_common_backward",
        common.len(),
        &arguments.int(images),
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
