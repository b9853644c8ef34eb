//! One slab of rows: memory of our own, shared between forks until somebody writes, or memory lent by somebody else, such as
//! a mapped file.
//!
//! This is the only place of the engine that reads and writes memory through pointers: the rows of 256 tokens lie wherever
//! a backend wants them, and a virtual call for each scattered row would cost what reading the row costs.
#![allow(unsafe_code, reason = "memory of a backend's choice is reached through its address")]

use std::fmt::Debug;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use floe_cuda::KvElem;

use super::file::Damage;

/// Alignment of a slab's memory: a cache line. Scattered rows are read half again as fast as from unaligned memory.
pub const SLAB_ALIGN: usize = 64;

/// Where the memory of warm slabs comes from: ordinary host memory, or what a device backend can read in place.
pub trait SlabSource: Send + Sync + Debug {
    /// Memory for `bytes` bytes (a multiple of [`SLAB_ALIGN`]). It is given back when the box is dropped, on any thread. Called
    /// once for every 256 tokens of a shard, in parallel for the shards of a layer; a source whose allocations are slow
    /// carves slabs from larger pieces.
    ///
    /// # Errors
    /// [`NoMemory`] when there is none left. Nothing is stored then.
    fn allocate(&self, bytes: usize) -> Result<Box<dyn SlabMemory>, NoMemory>;
}

/// Writable memory of one slab.
///
/// # Safety
/// Implementations promise, for as long as the box lives:
/// - `start()` always gives the same address, aligned to [`SLAB_ALIGN`];
/// - the bytes asked for from there are initialised, readable and writable by the host from any thread;
/// - nobody else writes to them, and nobody else on the host reads them. A device may read rows that are complete.
pub unsafe trait SlabMemory: Send + Sync + Debug {
    /// First byte, as the host sees it.
    fn start(&self) -> NonNull<u8>;

    /// First byte as the device of the backend sees it; `None` when it cannot.
    fn device_address(&self) -> Option<u64> {
        None
    }
}

/// A source that has no memory left.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("warm tier: no memory for a slab of {bytes} bytes: {reason}")]
pub struct NoMemory {
    /// Bytes asked for.
    pub bytes: usize,
    /// The source's answer.
    pub reason: String,
}

/// Ordinary host memory, zeroed.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostMemory;

/// `[lines]` of 64 bytes.
#[derive(Debug)]
struct HostSlab {
    /// From `Box::into_raw`.
    lines: NonNull<[Line]>,
}

#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
struct Line([u8; SLAB_ALIGN]);

// SAFETY: owns its memory as a box does.
unsafe impl Send for HostSlab {}
// SAFETY: shared access reads an address, nothing behind it.
unsafe impl Sync for HostSlab {}

// SAFETY: a boxed slice of zeroed lines keeps its place and is known to nobody else.
unsafe impl SlabMemory for HostSlab {
    fn start(&self) -> NonNull<u8> {
        self.lines.cast()
    }
}

impl Drop for HostSlab {
    fn drop(&mut self) {
        // SAFETY: made by `Box::into_raw` and dropped once.
        drop(unsafe { Box::from_raw(self.lines.as_ptr()) });
    }
}

impl SlabSource for HostMemory {
    fn allocate(&self, bytes: usize) -> Result<Box<dyn SlabMemory>, NoMemory> {
        let mut lines: Vec<Line> = Vec::new();
        let num_lines = bytes.div_ceil(SLAB_ALIGN);
        lines.try_reserve_exact(num_lines).map_err(|e| NoMemory { bytes, reason: e.to_string() })?;
        lines.resize(num_lines, Line([0; SLAB_ALIGN]));
        let lines = NonNull::from(Box::leak(lines.into_boxed_slice()));
        Ok(Box::new(HostSlab { lines }))
    }
}

/// A source, how much of it is in use, and how much may be.
#[derive(Clone, Debug)]
pub struct WarmMemory(Arc<Ledger>);

#[derive(Debug)]
struct Ledger {
    source: Box<dyn SlabSource>,
    limit_bytes: usize,
    used_bytes: AtomicUsize,
}

impl WarmMemory {
    /// Slabs from `source`, at most `limit_bytes` of them at a time.
    #[must_use]
    pub fn new(source: Box<dyn SlabSource>, limit_bytes: usize) -> Self {
        Self(Arc::new(Ledger { source, limit_bytes, used_bytes: AtomicUsize::new(0) }))
    }

    /// Bytes of the slabs in use; what forks share counts once.
    #[must_use]
    pub fn used_bytes(&self) -> usize {
        self.0.used_bytes.load(Ordering::Relaxed)
    }

    fn allocate(&self, bytes: usize) -> Result<OwnSlab, NoMemory> {
        // Booked before it is taken, so that threads that allocate at once cannot pass the limit together.
        let used_before = self.0.used_bytes.fetch_add(bytes, Ordering::Relaxed);
        let memory = if bytes > self.0.limit_bytes.saturating_sub(used_before) {
            let limit = self.0.limit_bytes;
            Err(NoMemory { bytes, reason: format!("{used_before} of warm_limit_bytes = {limit} are in use") })
        } else {
            self.0.source.allocate(bytes)
        };
        match memory {
            Ok(memory) => Ok(OwnSlab { memory, bytes, ledger: self.clone() }),
            Err(error) => {
                self.0.used_bytes.fetch_sub(bytes, Ordering::Relaxed);
                Err(error)
            }
        }
    }
}

impl Default for WarmMemory {
    fn default() -> Self {
        Self::new(Box::new(HostMemory), usize::MAX)
    }
}

/// Read-only memory of one slab that something else owns, such as a mapped file.
pub trait LentSlab: Send + Sync + Debug {
    /// The rows, aligned to at least 4 bytes.
    fn bytes(&self) -> &[u8];

    /// Checks the pages whose bits are set (bit `i` = page `i` of the slab), unless that was done before. Nobody may read a
    /// page that was not checked.
    ///
    /// # Errors
    /// [`Damage`] when a page is not what was written.
    fn verify(&self, pages: u16) -> Result<(), Damage>;
}

/// Memory of our own, booked.
#[derive(Debug)]
pub(crate) struct OwnSlab {
    memory: Box<dyn SlabMemory>,
    bytes: usize,
    ledger: WarmMemory,
}

impl OwnSlab {
    /// A slab of `bytes` bytes that begins with a copy of `start`.
    pub(crate) fn copy_of(memory: &WarmMemory, bytes: usize, start: &[u8]) -> Result<Self, NoMemory> {
        let own = memory.allocate(bytes)?;
        assert!(start.len() <= bytes, "a slab holds its rows");
        // SAFETY: fresh memory of at least that many bytes, which nobody else knows.
        unsafe { std::ptr::copy_nonoverlapping(start.as_ptr(), own.memory.start().as_ptr(), start.len()) };
        Ok(own)
    }

    /// All of the slab.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: the memory's promises. Writes need `&mut` to the only owner (`Slab::elems_mut`).
        unsafe { std::slice::from_raw_parts(self.memory.start().as_ptr(), self.bytes) }
    }
}

impl Drop for OwnSlab {
    fn drop(&mut self) {
        self.ledger.0.used_bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// A slab of `E`.
#[derive(Clone, Debug)]
pub(crate) enum Slab<E> {
    /// Memory of our own; more than one owner after a fork.
    Own(OwnRows<E>),
    /// Somebody else's memory.
    Lent(Arc<dyn LentSlab>),
}

/// Elements in a slab of our own. The address stands here a second time so that reading a row does not touch the owner's
/// cache line first.
#[derive(Clone, Debug)]
pub(crate) struct OwnRows<E> {
    start: NonNull<E>,
    len: usize,
    owner: Arc<OwnSlab>,
    /// The same rows on disk, durable; given up by the first write.
    backing: Option<Arc<dyn LentSlab>>,
}

// SAFETY: the owner is `Send + Sync` and elements are plain data; access follows the borrow of the slab.
unsafe impl<E: Send + Sync> Send for OwnRows<E> {}
// SAFETY: as for Send.
unsafe impl<E: Send + Sync> Sync for OwnRows<E> {}

impl<E: KvElem> OwnRows<E> {
    pub(crate) fn new(owner: OwnSlab, backing: Option<Arc<dyn LentSlab>>) -> Self {
        let start = owner.memory.start().cast::<E>();
        assert!(start.is_aligned() && align_of::<E>() <= SLAB_ALIGN, "a source's promise");
        Self { start, len: owner.bytes / size_of::<E>(), owner: Arc::new(owner), backing }
    }

    /// The owner of the memory.
    pub(crate) fn owner(&self) -> &Arc<OwnSlab> {
        &self.owner
    }

    /// The same rows on disk, if they are there.
    pub(crate) fn backing(&self) -> Option<&Arc<dyn LentSlab>> {
        self.backing.as_ref()
    }

    /// Notes that the rows are durable on disk.
    pub(crate) fn back(&mut self, lent: Arc<dyn LentSlab>) {
        self.backing = Some(lent);
    }

    #[inline]
    fn get(&self) -> &[E] {
        // SAFETY: `owner` keeps `len` initialised elements there; any bits are an element. Writes need `&mut self` and
        // that no other slab shares the owner.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    /// The elements for writing, if nobody else sees them.
    fn get_mut(&mut self) -> Option<&mut [E]> {
        Arc::get_mut(&mut self.owner)?;
        self.backing = None;
        // SAFETY: as in `get`; the owner has no other handle, so no other reference into the memory exists.
        Some(unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) })
    }
}

impl<E: KvElem> Slab<E> {
    /// A slab of `elems` elements, contents unspecified.
    pub(crate) fn allocate(memory: &WarmMemory, elems: usize) -> Result<Self, NoMemory> {
        Ok(Self::Own(OwnRows::new(memory.allocate(elems * size_of::<E>())?, None)))
    }

    #[inline]
    pub(crate) fn elems(&self) -> &[E] {
        match self {
            Self::Own(own) => own.get(),
            Self::Lent(slab) => bytemuck::cast_slice(slab.bytes()),
        }
    }

    /// The slab for writing, `elems` long: copied first when others see it too or when it is not ours.
    pub(crate) fn elems_mut(&mut self, memory: &WarmMemory, elems: usize) -> Result<&mut [E], NoMemory> {
        let shared = match self {
            Self::Own(own) => Arc::get_mut(&mut own.owner).is_none(),
            Self::Lent(_) => true,
        };
        if shared {
            *self = self.copied(memory, elems)?;
        }
        match self {
            Self::Own(own) => Ok(own.get_mut().expect("a copy just made, or found to have one owner")),
            Self::Lent(_) => unreachable!("lent slabs were copied above"),
        }
    }

    /// The same elements in memory of our own, room for `elems`.
    fn copied(&self, memory: &WarmMemory, elems: usize) -> Result<Self, NoMemory> {
        let bytes = bytemuck::cast_slice(self.elems());
        Ok(Self::Own(OwnRows::new(OwnSlab::copy_of(memory, elems * size_of::<E>(), bytes)?, None)))
    }

    /// Address of the first element for the backend's device.
    pub(crate) fn device_address(&self) -> Option<u64> {
        match self {
            Self::Own(own) => own.owner.memory.device_address(),
            Self::Lent(_) => None,
        }
    }

    /// Bytes that only this slab holds in memory of our own; shared ones count once for each owner's share.
    pub(crate) fn own_bytes(&self) -> f64 {
        match self {
            Self::Own(own) => own.owner.bytes as f64 / Arc::strong_count(&own.owner) as f64,
            Self::Lent(_) => 0.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slab_is_aligned_and_copied_only_when_others_see_it() {
        let memory = WarmMemory::default();
        let mut slab = Slab::<f32>::allocate(&memory, 100).unwrap();
        assert_eq!(slab.elems().as_ptr().align_offset(SLAB_ALIGN), 0);
        slab.elems_mut(&memory, 100).unwrap()[3] = 7.0;
        let place = slab.elems().as_ptr();
        slab.elems_mut(&memory, 100).unwrap()[4] = 8.0;
        assert_eq!(slab.elems().as_ptr(), place);
        let fork = slab.clone();
        assert_eq!(memory.used_bytes(), 400);
        slab.elems_mut(&memory, 100).unwrap()[3] = 9.0;
        assert_eq!((fork.elems()[3], slab.elems()[3], slab.elems()[4]), (7.0, 9.0, 8.0));
        assert_eq!((fork.elems().as_ptr(), memory.used_bytes()), (place, 800));
        drop((slab, fork));
        assert_eq!(memory.used_bytes(), 0);
    }

    #[test]
    fn a_limit_holds_for_all_threads_together() {
        let memory = WarmMemory::new(Box::new(HostMemory), 10 * 64);
        let taken: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|_| {
                    scope.spawn(|| (0..5).map(|_| Slab::<f32>::allocate(&memory, 16)).collect::<Vec<_>>())
                })
                .collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(taken.iter().filter(|slab| slab.is_ok()).count(), 10);
        let refusal = taken.iter().find_map(|slab| slab.as_ref().err()).unwrap().to_string();
        assert!(refusal.contains("64 bytes") && refusal.contains("warm_limit_bytes = 640"), "{refusal}");
        drop(taken);
        assert_eq!(memory.used_bytes(), 0);
    }

    /// Memory with addresses of its own for a device, as a backend that pins and maps it has.
    #[derive(Debug)]
    struct Mapped(AtomicUsize);

    #[derive(Debug)]
    struct MappedPiece {
        host: Box<dyn SlabMemory>,
        device: u64,
    }

    // SAFETY: the promises of the memory inside.
    unsafe impl SlabMemory for MappedPiece {
        fn start(&self) -> NonNull<u8> {
            self.host.start()
        }

        fn device_address(&self) -> Option<u64> {
            Some(self.device)
        }
    }

    impl SlabSource for Mapped {
        fn allocate(&self, bytes: usize) -> Result<Box<dyn SlabMemory>, NoMemory> {
            let device = 0x1000 + self.0.fetch_add(bytes, Ordering::Relaxed) as u64;
            Ok(Box::new(MappedPiece { host: HostMemory.allocate(bytes)?, device }))
        }
    }

    #[test]
    fn a_backend_s_memory_holds_the_rows_and_growth_moves_none() {
        use crate::page::{SLAB_ROWS, ShardPages};
        use crate::shape::{KvDtype, PageShape};
        use floe_cuda::KvRows;
        let memory = WarmMemory::new(Box::new(Mapped(AtomicUsize::new(0))), usize::MAX);
        let shape = PageShape::new(8, KvDtype::F32);
        let mut pages = ShardPages::with_memory(shape, &memory);
        let slab_bytes = SLAB_ROWS * shape.row_bytes();
        let mut first = None;
        for row in 0..3 * SLAB_ROWS {
            let data = [row as f32; 8];
            let view = crate::TensorView::contiguous(&data[..], [1, 1, 8]).unwrap();
            pages.append(&view, &view, 0).unwrap();
            let ShardPages::F32(rows) = &pages else { panic!("f32 was asked for") };
            let place = rows.run(0).as_ptr();
            assert_eq!(*first.get_or_insert(place), place);
            assert_eq!(rows.run(row)[..16], [row as f32; 16]);
        }
        for slab in 0..3 {
            assert_eq!(pages.device_address(slab), Some((0x1000 + slab * slab_bytes) as u64));
        }
        assert_eq!((pages.device_address(3), memory.used_bytes()), (None, 3 * slab_bytes));
        // A fork reads the same memory and gets a piece of its own when it writes.
        let mut fork = pages.clone();
        fork.truncate(SLAB_ROWS + 1);
        let data = [0.5f32; 8];
        let view = crate::TensorView::contiguous(&data[..], [1, 1, 8]).unwrap();
        fork.append(&view, &view, 0).unwrap();
        assert_eq!(fork.device_address(0), pages.device_address(0));
        assert_eq!(fork.device_address(1), Some((0x1000 + 3 * slab_bytes) as u64));
    }
}
