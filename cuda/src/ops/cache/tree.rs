//! Launchers of `cache_tree` and `cache_announce`: pages whose tokens the host lists.

use bytemuck::{Pod, Zeroable};

use super::pages::PageOutParams;
use super::{CacheParams, Pages, SequencePlace, Tables};
use crate::device::{DevMut, DevRef, DeviceError, Launch, Stream};
use crate::ops::{DeviceElem, word};

/// As in `cache_tree.cu`.
const ANNOUNCE_THREADS: u32 = 512;

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
    /// Pages `..used` of the kv head are those that steps look at, once this one is announced; the same for all that are announced
    /// together.
    pub used: u32,
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
    place: SequencePlace,
    sequence: u32,
    num_pages: u32,
    num_rows: u32,
}

/// Mirrors `floe::AnnounceParams`.
#[repr(C)]
struct AnnounceParams {
    listed: u64,
    said_count: u64,
    said_masks: u64,
    said_spread: u64,
    log_count: u64,
    masks: u64,
    spread: u64,
    tree_pages: u64,
    spread_sums: u64,
    fault: u64,
    place: SequencePlace,
    num: u32,
    num_pages: u32,
}

/// Pages of one sequence, and what says which tokens they hold.
#[derive(Debug)]
pub struct TreePages<'a> {
    /// Index of the sequence.
    pub sequence: usize,
    /// Where it lies. Rows are read from device memory where it is DENSE, else from host memory, which has them all.
    pub place: SequencePlace,
    /// The pages, none twice; host-mapped or device memory.
    pub listed: DevRef<'a, TreePage>,
    /// What a list says of each place, [pages, 16]: 16 times the head's first page, plus the position; written, device.
    pub tokens: DevMut<'a, u32>,
}

/// What makes listed pages count, by their places in the list: `[listed]` or more; device.
#[derive(Debug)]
pub struct Said<'a> {
    /// Natural log of their tokens; -inf: stands for nothing.
    pub log_count: DevMut<'a, f32>,
    /// Bit `t`: place `t` holds a token.
    pub masks: DevMut<'a, u16>,
    /// Mean square of a coordinate of their keys' residuals.
    pub spread: DevMut<'a, f32>,
}

impl Said<'_> {
    /// Refuses fewer than `num` places.
    fn check(&self, num: usize) -> Result<(), DeviceError> {
        self.log_count.check("said.log_count", self.log_count.len().max(num))?;
        self.masks.check("said.masks", self.masks.len().max(num))?;
        Ok(self.spread.check("said.spread", self.spread.len().max(num))?)
    }
}

/// Where announced pages count; device, written.
#[derive(Debug)]
pub struct Counted<'a> {
    /// As in [`Said`], `[pages]`.
    pub log_count: DevMut<'a, f32>,
    /// As in [`Said`], `[pages]`.
    pub masks: DevMut<'a, u16>,
    /// As in [`Said`], `[pages]`.
    pub spread: DevMut<'a, f32>,
    /// Pages that steps look at, of each kv head of the sequence, `[heads]`.
    pub tree_pages: DevMut<'a, u32>,
    /// [`super::DoubtCheck::sums`] of the sequence, `[heads]`; `None`: nobody asks.
    pub sums: Option<DevMut<'a, [u32; 2]>>,
}

/// Builds the listed pages from the rows of their tokens, `kv` [rows, 2, head_dim] or in host memory. Until they are announced they
/// count as before: what makes them count goes to `said` in place of `pages`. A page that is looked at meanwhile may have
/// parts of both contents, so only those that stand for nothing may be built beside steps.
///
/// # Errors
/// Shapes that do not fit; what the driver reports. A page or token outside of the sequence is reported with the next check of entries.
pub fn build_tree_pages<E: DeviceElem>(
    stream: &Stream,
    tables: &Tables<'_>,
    from: TreePages<'_>,
    kv: DevRef<'_, E>,
    (pages, said): (Pages<'_, E>, &mut Said<'_>),
) -> Result<(), DeviceError> {
    let shape = tables.shape;
    if from.sequence >= tables.sequences.len() {
        let expected = "one of the sequences";
        return Err(DeviceError::Unsupported { field: "sequence", value: from.sequence, expected });
    }
    let num_rows = kv.len() / shape.row_len();
    kv.check("kv", num_rows * shape.row_len())?;
    said.check(from.listed.len())?;
    let (mut out, num_pages) = pages.params(shape.head_dim)?;
    (out.log_count, out.masks, out.spread) =
        (said.log_count.address(), said.masks.address(), said.spread.address());
    from.tokens.check("tokens", num_pages as usize * 16)?;
    let params = TreeParams {
        cache: tables.params()?,
        listed: from.listed.address(),
        kv: kv.address(),
        tokens: from.tokens.address(),
        out,
        fault: stream.device().fault_address(),
        place: from.place,
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

/// Makes the listed pages of a sequence at `place` count as they were built, or stand for nothing.
///
/// # Errors
/// Shapes that do not fit; what the driver reports. A page outside of the sequence is reported with the next check of entries.
pub fn announce_tree_pages(
    stream: &Stream,
    (place, listed): (SequencePlace, DevRef<'_, TreePage>),
    said: &Said<'_>,
    to: Counted<'_>,
) -> Result<(), DeviceError> {
    let (num_pages, heads) = (to.log_count.len(), to.tree_pages.len());
    said.check(listed.len())?;
    to.masks.check("masks", num_pages)?;
    to.spread.check("spread", num_pages)?;
    if let Some(sums) = &to.sums {
        sums.check("sums", heads)?;
    }
    let params = AnnounceParams {
        listed: listed.address(),
        said_count: said.log_count.address(),
        said_masks: said.masks.address(),
        said_spread: said.spread.address(),
        log_count: to.log_count.address(),
        masks: to.masks.address(),
        spread: to.spread.address(),
        tree_pages: to.tree_pages.address(),
        spread_sums: to.sums.as_ref().map_or(0, DevMut::address),
        fault: stream.device().fault_address(),
        place,
        num: word("listed", listed.len())?,
        num_pages: word("pages", num_pages)?,
    };
    let kernel = stream.device().kernel("cache_tree", "cache_announce", 0)?;
    let launch = Launch { blocks: (word("heads", heads)?, 1), threads: ANNOUNCE_THREADS, shared_bytes: 0 };
    // SAFETY: the layouts match and every buffer has the checked shape; the kernel checks what the pages say.
    unsafe { kernel.launch(stream, launch, &params) }
}
