//! Launcher of `cache_ingest`: a run of a prompt's tokens.

use super::{CacheParams, DeviceTensor, Tables};
use crate::device::{DevMut, DeviceError, Launch, Stream};
use crate::ops::{DeviceElem, word};

/// Tokens and kv heads of a block, as in `cache_ingest.cu`.
const JOBS: u32 = 8;

/// Mirrors `floe::IngestParams`.
#[repr(C)]
struct IngestParams {
    cache: CacheParams,
    k: u64,
    v: u64,
    strides: [u64; 4],
    kv: u64,
    fault: u64,
    dtype: u32,
    sequence: u32,
    first: u32,
    run: u32,
    num_rows: u32,
}

/// Consecutive tokens of one sequence.
#[derive(Debug, Clone, Copy)]
pub struct Ingest {
    /// Keys [run, heads, head_dim], post-RoPE.
    pub k: DeviceTensor,
    /// Values, of the same shape and type.
    pub v: DeviceTensor,
    /// Index of the sequence.
    pub sequence: usize,
    /// Position of the run's first token.
    pub first: usize,
}

/// Stores a run: every row to host memory, those that a step reads there to `kv` [rows, 2, head_dim] too.
///
/// # Errors
/// Shapes that do not fit; what the driver reports.
pub fn ingest<E: DeviceElem>(
    stream: &Stream,
    tables: &Tables<'_>,
    run: &Ingest,
    kv: DevMut<'_, E>,
) -> Result<(), DeviceError> {
    let shape = tables.shape;
    let tokens = run.k.shape()[0];
    for (field, tensor) in [("k", &run.k), ("v", &run.v)] {
        tensor.expect(field, [tokens, shape.heads, shape.head_dim])?;
    }
    if run.k.dtype() != run.v.dtype() {
        let (value, expected) = (run.v.dtype() as usize, "the type of k");
        return Err(DeviceError::Unsupported { field: "type of v", value, expected });
    }
    if run.sequence >= tables.sequences.len() {
        return Err(DeviceError::Unsupported {
            field: "sequence",
            value: run.sequence,
            expected: "one of the sequences",
        });
    }
    word("position", run.first + tokens)?;
    let num_rows = kv.len() / shape.row_len();
    kv.check("kv", num_rows * shape.row_len())?;
    let ([k0, k1], [v0, v1]) = (run.k.strides_64(), run.v.strides_64());
    let params = IngestParams {
        cache: tables.params()?,
        k: run.k.address(),
        v: run.v.address(),
        strides: [k0, k1, v0, v1],
        kv: kv.address(),
        fault: stream.device().fault_address(),
        dtype: run.k.dtype() as u32,
        sequence: word("sequence", run.sequence)?,
        first: word("position", run.first)?,
        run: word("run", tokens)?,
        num_rows: word("kv", num_rows)?,
    };
    let name = format!("cache_ingest_{}_d{}", E::NAME, shape.head_dim);
    let kernel = stream.device().kernel("cache_ingest", &name, 0)?;
    let blocks = word("run", tokens * shape.heads)?.div_ceil(JOBS);
    let launch = Launch { blocks: (blocks, 1), threads: JOBS * 32, shared_bytes: 0 };
    // SAFETY: the layouts match, every buffer has the checked shape, and whoever made the tensors vouches for theirs.
    unsafe { kernel.launch(stream, launch, &params) }
}

/// Mirrors `floe::RefillParams`.
#[repr(C)]
struct RefillParams {
    cache: CacheParams,
    kv: u64,
    fault: u64,
    sequence: u32,
    first: u32,
    run: u32,
    num_rows: u32,
    pieces: u32,
}

/// Copies the rows of tokens `run` of a sequence from host memory to their places in `kv` [rows, 2, head_dim]: at most as many as
/// the ring holds where the sequence has slots, only such as have a row where it lies densely.
///
/// # Errors
/// Shapes that do not fit; what the driver reports.
pub fn refill<E: DeviceElem>(
    stream: &Stream,
    tables: &Tables<'_>,
    (sequence, run): (usize, std::ops::Range<usize>),
    kv: DevMut<'_, E>,
) -> Result<(), DeviceError> {
    let shape = tables.shape;
    if sequence >= tables.sequences.len() {
        let expected = "one of the sequences";
        return Err(DeviceError::Unsupported { field: "sequence", value: sequence, expected });
    }
    if run.is_empty() {
        return Ok(());
    }
    word("position", run.end)?;
    let num_rows = kv.len() / shape.row_len();
    kv.check("kv", num_rows * shape.row_len())?;
    let params = RefillParams {
        cache: tables.params()?,
        kv: kv.address(),
        fault: stream.device().fault_address(),
        sequence: word("sequence", sequence)?,
        first: word("position", run.start)?,
        run: word("run", run.len())?,
        num_rows: word("kv", num_rows)?,
        pieces: word("head_dim", shape.row_len() * size_of::<E>() / 16)?,
    };
    let kernel = stream.device().kernel("cache_ingest", "cache_refill", 0)?;
    let blocks = word("run", run.len() * shape.heads)?.div_ceil(JOBS);
    let launch = Launch { blocks: (blocks, 1), threads: JOBS * 32, shared_bytes: 0 };
    // SAFETY: the layouts match and every buffer has the checked shape.
    unsafe { kernel.launch(stream, launch, &params) }
}
