//! Launcher of `merge_states`.

use super::decode::DevState;
use super::word;
use crate::device::{DevRef, DeviceError, Launch, Stream};

/// States that one launch joins at most.
pub const MERGE_PARTS_MAX: usize = 8;

/// Mirrors `floe::MergeParams`.
#[repr(C)]
struct MergeParams {
    out: [u64; MERGE_PARTS_MAX],
    lse: [u64; MERGE_PARTS_MAX],
    into_out: u64,
    into_lse: u64,
    parts: u32,
    heads: u32,
    head_dim: u32,
}

/// `into` becomes the state of the tokens of all `parts`, which are disjoint: pairs of `out` [heads, head_dim] and `lse`
/// `[heads]`, 1 to 8 of them. To merge into a state, name it among the parts through a view of the same memory.
///
/// # Errors
/// Parts of different shape, none or too many; what the driver reports.
pub fn merge_states(
    stream: &Stream,
    parts: &[(DevRef<'_, f32>, DevRef<'_, f32>)],
    into: DevState<'_>,
) -> Result<(), DeviceError> {
    if parts.is_empty() || parts.len() > MERGE_PARTS_MAX {
        return Err(DeviceError::Unsupported { field: "parts", value: parts.len(), expected: "1 to 8" });
    }
    let heads = into.lse.len();
    let head_dim = into.out.len() / heads.max(1);
    into.out.check("into.out", heads * head_dim)?;
    let mut params = MergeParams {
        out: [0; MERGE_PARTS_MAX],
        lse: [0; MERGE_PARTS_MAX],
        into_out: into.out.address(),
        into_lse: into.lse.address(),
        parts: word("parts", parts.len())?,
        heads: word("heads", heads)?,
        head_dim: word("head_dim", head_dim)?,
    };
    for (i, (out, lse)) in parts.iter().enumerate() {
        out.check("part.out", into.out.len())?;
        lse.check("part.lse", heads)?;
        (params.out[i], params.lse[i]) = (out.address(), lse.address());
    }
    let kernel = stream.device().kernel("merge_states", "merge_states", 0)?;
    let launch = Launch { blocks: (params.heads.div_ceil(4), 1), threads: 128, shared_bytes: 0 };
    // SAFETY: the layouts match and every buffer has the checked shape.
    unsafe { kernel.launch(stream, launch, &params) }
}
