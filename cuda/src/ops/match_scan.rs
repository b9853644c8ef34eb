//! Launcher of `match_scan`.

use super::word;
use crate::device::{DevMut, DevRef, DeviceError, Launch, Stream};

/// Mirrors `floe::MatchParams`.
#[repr(C)]
struct MatchParams {
    ring: u64,
    q: u64,
    num: u64,
    distance: u64,
    place: u64,
    places: u32,
    dim: u32,
}

/// Earlier queries of each head, before rotary position.
#[derive(Debug, Clone, Copy)]
pub struct Ring<'a> {
    /// [heads, places, dim] f32; device.
    pub queries: DevRef<'a, f32>,
    /// Places in use, `[heads]`; device.
    pub num: DevRef<'a, u32>,
}

/// The nearest earlier query of each head: squared distance to `distance` `[heads]` (infinite for an empty ring) and its place
/// to `place` `[heads]`; the lower place of equals. `q` is [heads, dim].
///
/// # Errors
/// Shapes that do not fit; what the driver reports.
pub fn match_scan(
    stream: &Stream,
    ring: &Ring<'_>,
    q: DevRef<'_, f32>,
    distance: DevMut<'_, f32>,
    place: DevMut<'_, u32>,
) -> Result<(), DeviceError> {
    let heads = ring.num.len();
    let dim = q.len() / heads.max(1);
    q.check("q", heads * dim)?;
    let places = ring.queries.len() / (heads * dim).max(1);
    ring.queries.check("ring", heads * places * dim)?;
    distance.check("distance", heads)?;
    place.check("place", heads)?;
    let params = MatchParams {
        ring: ring.queries.address(),
        q: q.address(),
        num: ring.num.address(),
        distance: distance.address(),
        place: place.address(),
        places: word("ring", places)?,
        dim: word("dim", dim)?,
    };
    let kernel = stream.device().kernel("match_scan", "match_scan", 0)?;
    let launch = Launch { blocks: (word("heads", heads)?, 1), threads: 256, shared_bytes: 0 };
    // SAFETY: the layouts match and every buffer has the checked shape.
    unsafe { kernel.launch(stream, launch, &params) }
}
