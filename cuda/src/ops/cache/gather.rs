//! Launcher of `cache_gather`: stored rows back to a host engine.

use super::{CacheParams, DeviceTensor, Tables, TensorType};
use crate::device::{DevRef, DeviceError, Launch, Stream};
use crate::ops::{DeviceElem, word};

/// Bytes that a lane copies at a time, as in `cache_gather.cu`.
const PIECE_BYTES: usize = 16;

/// Blocks at most: the link is busy with 32 of them, device memory with a few for each multiprocessor.
const BLOCKS_MAX: usize = 512;

/// Mirrors `floe::GatherParams`.
#[repr(C)]
struct GatherParams {
    cache: CacheParams,
    kv: u64,
    k: u64,
    v: u64,
    strides: [u64; 4],
    fault: u64,
    sequence: u32,
    first: u32,
    run: u32,
    stored: u32,
    num_rows: u32,
    pieces: u32,
}

/// Which stored rows go where.
#[derive(Debug, Clone, Copy)]
pub struct Gather {
    /// Keys [run, heads, head_dim] of the cache's own type, every row at a multiple of 16 bytes.
    pub k: DeviceTensor,
    /// Values, likewise.
    pub v: DeviceTensor,
    /// Index of the sequence.
    pub sequence: usize,
    /// Position of the run's first token.
    pub first: usize,
    /// Tokens of the sequence in this layer; the run ends there at the latest.
    pub stored: usize,
}

/// Copies the rows of consecutive tokens, from `kv` [rows, 2, head_dim] where they lie in their place there, else from host memory.
///
/// # Errors
/// A run that leaves what is stored, tensors of another shape or type or not aligned; what the driver reports.
pub fn gather<E: DeviceElem>(
    stream: &Stream,
    tables: &Tables<'_>,
    run: &Gather,
    kv: DevRef<'_, E>,
) -> Result<(), DeviceError> {
    let shape = tables.shape;
    let tokens = run.k.shape()[0];
    let mut strides = [0; 4];
    for (i, (field, tensor)) in [("k", &run.k), ("v", &run.v)].into_iter().enumerate() {
        tensor.expect(field, [tokens, shape.heads, shape.head_dim])?;
        check_rows::<E>(field, tensor)?;
        let pieces = tensor.strides_64().map(|stride| stride * size_of::<E>() as u64 / PIECE_BYTES as u64);
        strides[2 * i..2 * i + 2].copy_from_slice(&pieces);
    }
    let refuse = |field, value, expected| Err(DeviceError::Unsupported { field, value, expected });
    if run.sequence >= tables.sequences.len() {
        return refuse("sequence", run.sequence, "one of the sequences");
    }
    if run.first + tokens > run.stored {
        return refuse("run", run.first + tokens, "positions that are stored");
    }
    if tokens == 0 {
        return Ok(());
    }
    let num_rows = kv.len() / shape.row_len();
    kv.check("kv", num_rows * shape.row_len())?;
    let pieces = shape.row_len() * size_of::<E>() / PIECE_BYTES;
    let params = GatherParams {
        cache: tables.params()?,
        kv: kv.address(),
        k: run.k.address(),
        v: run.v.address(),
        strides,
        fault: stream.device().fault_address(),
        sequence: word("sequence", run.sequence)?,
        first: word("position", run.first)?,
        run: word("run", tokens)?,
        stored: word("position", run.stored)?,
        num_rows: word("kv", num_rows)?,
        pieces: word("head_dim", pieces)?,
    };
    let kernel = stream.device().kernel("cache_gather", "cache_gather", 0)?;
    let warps = shape.heads * tokens.div_ceil(128 / pieces);
    let blocks = word("run", warps.div_ceil(8).min(BLOCKS_MAX))?;
    let launch = Launch { blocks: (blocks, 1), threads: 256, shared_bytes: 0 };
    // SAFETY: the layouts match, every buffer has the checked shape, and whoever made the tensors vouches for theirs.
    unsafe { kernel.launch(stream, launch, &params) }
}

/// Rows are copied as they are: no other type, and pieces must not straddle.
fn check_rows<E: DeviceElem>(field: &'static str, tensor: &DeviceTensor) -> Result<(), DeviceError> {
    let own = match tensor.dtype() {
        TensorType::Bf16 => "bf16",
        TensorType::F16 => "f16",
        TensorType::F32 => "f32",
    };
    if own != E::NAME {
        let (value, expected) = (tensor.dtype() as usize, "the type that the cache stores");
        return Err(DeviceError::Unsupported { field, value, expected });
    }
    let steps = tensor.strides().map(|stride| (stride * size_of::<E>()) as u64);
    match [tensor.address(), steps[0], steps[1]].map(|bytes| bytes % PIECE_BYTES as u64).into_iter().max() {
        Some(over) if over > 0 => {
            let expected = "rows at multiples of 16 bytes";
            Err(DeviceError::Unsupported { field, value: over as usize, expected })
        }
        _ => Ok(()),
    }
}
