//! The cold tier: full slabs written to page files by one worker thread, so that warm memory can go, and read ahead by
//! another, so that a step finds them checked and in memory.
//!
//! Every batch of slabs is a page file of its own (append-only: none is changed later), published with its manifest or not
//! at all, and read back once. A slab's warm memory is given up only after its file is durable, and only if nobody wrote to
//! the slab meanwhile. A write that fails leaves the slab warm; a read that fails leaves it on disk, where the step that
//! needs it meets the same error. The files are working space: they are removed when the tier is dropped, and what
//! a killed process leaves behind can be read with [`recover`]. To keep a sequence, save it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam::channel::{Receiver, Sender, bounded};

use super::file::{Damage, FileError, MappedSlab, PageFile, PageFileWriter, SlabName, Storage};
use super::{LentSlab, OwnSlab, WarmMemory};

/// Batches that wait for the worker at most.
const QUEUE_BATCHES: usize = 4;

/// Slabs that wait to be read ahead at most.
const QUEUE_READS: usize = 16;

/// Slabs of one file at most: 8 MiB at d = 128 bf16.
pub(crate) const BATCH_SLABS: usize = 64;

/// Bytes of a slab, kept alive while a worker writes them.
pub(crate) trait SlabBytes: Send + Sync {
    fn bytes(&self) -> &[u8];
}

impl SlabBytes for Arc<OwnSlab> {
    fn bytes(&self) -> &[u8] {
        OwnSlab::bytes(self)
    }
}

/// One slab on its way to disk. `K` says whose it is.
pub(crate) struct SpillSlab<K> {
    pub(crate) key: K,
    pub(crate) name: SlabName,
    pub(crate) page_bytes: usize,
    pub(crate) bytes: Box<dyn SlabBytes>,
}

struct Job<K> {
    path: PathBuf,
    epoch: u64,
    slabs: Vec<SpillSlab<K>>,
}

/// A batch that the worker is done with; on success one mapped slab for each written.
pub(crate) struct Spilled<K> {
    pub(crate) slabs: Vec<SpillSlab<K>>,
    pub(crate) result: Result<Vec<Arc<MappedSlab>>, FileError>,
}

/// One slab to be read ahead.
pub(crate) struct ReadSlab<K> {
    pub(crate) key: K,
    pub(crate) lent: Arc<dyn LentSlab>,
    /// Where a copy shall be made, and its bytes; `None` = only read and check it.
    pub(crate) into: Option<(WarmMemory, usize)>,
}

/// A slab that was read.
pub(crate) struct ReadBack<K> {
    pub(crate) key: K,
    pub(crate) lent: Arc<dyn LentSlab>,
    /// Its copy, where one was wanted and there was memory.
    pub(crate) result: Result<Option<OwnSlab>, Damage>,
}

/// What the cold tier has done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ColdReport {
    /// Files written.
    pub files: u64,
    /// Slabs in them.
    pub slabs: u64,
    /// Batches that could not be written; their slabs stayed warm.
    pub failed: u64,
    /// Slabs whose warm memory was given up.
    pub released: u64,
    /// Slabs read ahead and checked.
    pub read_ahead: u64,
    /// Of these, copied back into warm memory.
    pub brought_back: u64,
    /// Slabs found damaged while they were read ahead.
    pub damaged: u64,
    /// The last failure, in words.
    pub last_error: Option<String>,
}

/// Queue to the worker, and its answers.
pub(crate) struct ColdTier<K> {
    folder: PathBuf,
    limit_bytes: usize,
    jobs: Option<Sender<Job<K>>>,
    done: Receiver<Spilled<K>>,
    reads: Option<Sender<ReadSlab<K>>>,
    read_back: Receiver<ReadBack<K>>,
    workers: Vec<JoinHandle<()>>,
    written: Vec<PathBuf>,
    epoch: u64,
    in_flight: usize,
    reading: usize,
    report: ColdReport,
}

impl<K: Send + 'static> ColdTier<K> {
    /// Starts the workers. Files go to `folder`, which must exist.
    ///
    /// # Errors
    /// The system's, when a thread cannot be started.
    pub(crate) fn open(
        storage: Arc<dyn Storage>,
        folder: &Path,
        limit_bytes: usize,
    ) -> std::io::Result<Self> {
        let (jobs, queue) = bounded::<Job<K>>(QUEUE_BATCHES);
        let (answers, done) = bounded(QUEUE_BATCHES + 1);
        let writer = std::thread::Builder::new().name("floe-cold-write".into()).spawn(move || {
            for job in queue {
                let result = write(&*storage, &job);
                if answers.send(Spilled { slabs: job.slabs, result }).is_err() {
                    break;
                }
            }
        })?;
        let (reads, queue) = bounded::<ReadSlab<K>>(QUEUE_READS);
        let (answers, read_back) = bounded(QUEUE_READS + 1);
        let reader = std::thread::Builder::new().name("floe-cold-read".into()).spawn(move || {
            for job in queue {
                let result = read(&job);
                if answers.send(ReadBack { key: job.key, lent: job.lent, result }).is_err() {
                    break;
                }
            }
        })?;
        Ok(Self {
            folder: folder.to_path_buf(),
            limit_bytes,
            jobs: Some(jobs),
            done,
            reads: Some(reads),
            read_back,
            workers: vec![writer, reader],
            written: Vec::new(),
            epoch: 0,
            in_flight: 0,
            reading: 0,
            report: ColdReport::default(),
        })
    }

    pub(crate) fn limit_bytes(&self) -> usize {
        self.limit_bytes
    }

    pub(crate) fn report(&self) -> &ColdReport {
        &self.report
    }

    /// Batches submitted and not taken back.
    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Hands a batch to the worker; false when the queue is full, which is no error: ask again later.
    pub(crate) fn submit(&mut self, slabs: Vec<SpillSlab<K>>) -> bool {
        if self.in_flight >= QUEUE_BATCHES || slabs.is_empty() {
            return false;
        }
        let Some(jobs) = &self.jobs else { return false };
        let name = format!("cold-{}-{:06}.kv", std::process::id(), self.epoch);
        let (path, epoch) = (self.folder.join(name), self.epoch);
        self.epoch += 1;
        self.written.push(path.clone());
        let sent = jobs.try_send(Job { path, epoch, slabs }).is_ok();
        self.in_flight += usize::from(sent);
        sent
    }

    /// A batch that is done, if there is one.
    pub(crate) fn poll(&mut self) -> Option<Spilled<K>> {
        let spilled = self.done.try_recv().ok()?;
        Some(self.book(spilled))
    }

    /// Waits for a batch; `None` when none is on its way.
    pub(crate) fn wait(&mut self) -> Option<Spilled<K>> {
        if self.in_flight == 0 {
            return None;
        }
        let spilled = self.done.recv().ok()?;
        Some(self.book(spilled))
    }

    /// Asks for a slab to be read ahead; false when the queue is full: it is read when a step needs it.
    pub(crate) fn read_ahead(&mut self, slab: ReadSlab<K>) -> bool {
        let Some(reads) = self.reads.as_ref().filter(|_| self.reading < QUEUE_READS) else { return false };
        let sent = reads.try_send(slab).is_ok();
        self.reading += usize::from(sent);
        sent
    }

    /// A slab that was read, if there is one.
    pub(crate) fn poll_read(&mut self) -> Option<ReadBack<K>> {
        let back = self.read_back.try_recv().ok()?;
        self.reading -= 1;
        match &back.result {
            Ok(_) => self.report.read_ahead += 1,
            Err(damage) => {
                self.report.damaged += 1;
                self.report.last_error = Some(damage.to_string());
            }
        }
        Some(back)
    }

    /// Slabs asked for and not taken back.
    pub(crate) fn reading(&self) -> usize {
        self.reading
    }

    /// Counts slabs given up and slabs taken back.
    pub(crate) fn count(&mut self, released: u64, brought_back: u64) {
        self.report.released += released;
        self.report.brought_back += brought_back;
    }

    fn book(&mut self, spilled: Spilled<K>) -> Spilled<K> {
        self.in_flight -= 1;
        match &spilled.result {
            Ok(slabs) => {
                self.report.files += 1;
                self.report.slabs += slabs.len() as u64;
            }
            Err(error) => {
                self.report.failed += 1;
                self.report.last_error = Some(error.to_string());
            }
        }
        spilled
    }
}

impl<K> Drop for ColdTier<K> {
    fn drop(&mut self) {
        (self.jobs, self.reads) = (None, None);
        while self.done.recv().is_ok() {}
        while self.read_back.recv().is_ok() {}
        for worker in self.workers.drain(..) {
            // A worker that panicked has nothing left to hand over.
            let _ = worker.join();
        }
        for path in &self.written {
            // Working space; maps of removed files stay valid. What cannot be removed only takes up room.
            let _ = std::fs::remove_file(path);
        }
    }
}

fn write<K>(storage: &dyn Storage, job: &Job<K>) -> Result<Vec<Arc<MappedSlab>>, FileError> {
    let mut writer = PageFileWriter::create(storage, &job.path, job.epoch)?;
    for slab in &job.slabs {
        writer.slab(slab.name, slab.page_bytes, slab.bytes.bytes())?;
    }
    writer.finish(serde_json::json!({ "kind": "floe-cold/1" }))?;
    let file = PageFile::open(storage, &job.path)?;
    // Once while the rows are still in memory; the slabs handed out are checked again when somebody reads them.
    file.verify()?;
    Ok(file.manifest().slabs.iter().map(|entry| file.slab(entry)).collect())
}

fn read<K>(job: &ReadSlab<K>) -> Result<Option<OwnSlab>, Damage> {
    job.lent.verify(u16::MAX)?;
    let copy = job.into.as_ref().map(|(memory, bytes)| OwnSlab::copy_of(memory, *bytes, job.lent.bytes()));
    Ok(copy.and_then(Result::ok))
}

/// Newest copy of every slab (by shard and number) in the cold files of a folder, each checked. Drafts and files that are
/// not whole are passed over: nothing in them was ever reported durable.
///
/// # Errors
/// When the folder cannot be read, or a whole file holds a damaged page.
pub fn recover(
    storage: &dyn Storage,
    folder: &Path,
) -> Result<BTreeMap<(u32, u32), Arc<MappedSlab>>, FileError> {
    let io = |source| FileError::Io { path: folder.to_path_buf(), action: "list", source };
    let mut newest: BTreeMap<(u32, u32), (u64, Arc<MappedSlab>)> = BTreeMap::new();
    for entry in std::fs::read_dir(folder).map_err(io)? {
        let path = entry.map_err(io)?.path();
        let named = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("cold-"));
        let Some(file) = named.then(|| PageFile::open(storage, &path).ok()).flatten() else { continue };
        let epoch = file.manifest().epoch;
        for entry in &file.manifest().slabs {
            let slab = file.slab(entry);
            slab.verify(u16::MAX)?;
            let known = newest.get(&(entry.shard, entry.slab)).is_some_and(|(known, _)| *known >= epoch);
            if !known {
                newest.insert((entry.shard, entry.slab), (epoch, slab));
            }
        }
    }
    Ok(newest.into_iter().map(|(key, (_, slab))| (key, slab)).collect())
}
