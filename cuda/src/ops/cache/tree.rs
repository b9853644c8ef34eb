//! Launcher of `cache_tree`: pages whose tokens the host lists.

use bytemuck::{Pod, Zeroable};

use super::pages::PageOutParams;
use super::{CacheParams, Pages, Tables};
use crate::device::{DevMut, DevRef, DeviceError, Launch, Stream};
use crate::ops::{DeviceElem, word};

/// What the host says of a page. Mirrors `floe::TreePage`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TreePage {
    /// Number among the pages of its kv head.
    pub page: u32,
    /// Kv head.
    pub head: u32,
    /// Bit `t`: place `t` holds a token; 0: the page stands for nothing.
    pub live: u32,
    /// Zero.
    pub unused: u32,
    /// Position of each place's token.
    pub ids: [u32; 16],
}

// SAFETY: `repr(C)` of twenty u32 without padding; every bit pattern is a value.
unsafe impl Zeroable for TreePage {}
// SAFETY: as above.
unsafe impl Pod for TreePage {}

/// Mirrors `floe::TreeParams`.
#[repr(C)]
struct TreeParams {
    cache: CacheParams,
    listed: u64,
    kv: u64,
    tokens: u64,
    out: PageOutParams,
    fault: u64,
    sequence: u32,
    num_pages: u32,
    num_rows: u32,
}

/// Pages of one sequence, and what says which tokens they hold.
#[derive(Debug)]
pub struct TreePages<'a> {
    /// Index of the sequence.
    pub sequence: usize,
    /// The pages, none twice; host-mapped or device memory.
    pub listed: DevRef<'a, TreePage>,
    /// What a list says of each place, [pages, 16]: 16 times the head's first page, plus the position; written, device.
    pub tokens: DevMut<'a, u32>,
}

/// Builds the listed pages from the rows of their tokens: `kv` [rows, 2, head_dim] where the sequence lies densely, else host memory.
///
/// # Errors
/// Shapes that do not fit; what the driver reports. A page or token outside of the sequence is reported with the next check of entries.
pub fn build_tree_pages<E: DeviceElem>(
    stream: &Stream,
    tables: &Tables<'_>,
    from: TreePages<'_>,
    kv: DevRef<'_, E>,
    pages: Pages<'_, E>,
) -> Result<(), DeviceError> {
    let shape = tables.shape;
    if from.listed.is_empty() {
        return Ok(());
    }
    if from.sequence >= tables.sequences.len() {
        let expected = "one of the sequences";
        return Err(DeviceError::Unsupported { field: "sequence", value: from.sequence, expected });
    }
    let num_rows = kv.len() / shape.row_len();
    kv.check("kv", num_rows * shape.row_len())?;
    let (out, num_pages) = pages.params(shape.head_dim)?;
    from.tokens.check("tokens", num_pages as usize * 16)?;
    let params = TreeParams {
        cache: tables.params()?,
        listed: from.listed.address(),
        kv: kv.address(),
        tokens: from.tokens.address(),
        out,
        fault: stream.device().fault_address(),
        sequence: word("sequence", from.sequence)?,
        num_pages,
        num_rows: word("kv", num_rows)?,
    };
    let name = format!("cache_tree_{}_d{}", E::NAME, shape.head_dim);
    let kernel = stream.device().kernel("cache_tree", &name, 0)?;
    let launch = Launch { blocks: (word("listed", from.listed.len())?, 1), threads: 512, shared_bytes: 0 };
    // SAFETY: the layouts match and every buffer has the checked shape; the kernel checks what the pages say.
    unsafe { kernel.launch(stream, launch, &params) }
}
