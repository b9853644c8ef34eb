//! The cold tier: full slabs written to page files by a worker thread, so that warm memory can go.
//!
//! Every batch of slabs is a page file of its own (append-only: none is changed later), published with its manifest or not
//! at all. A slab's warm memory is given up only after its file is durable, and only if nobody wrote to the slab meanwhile.
//! A write that fails leaves the slab warm. The files are working space: they are removed when the tier is dropped, and what
//! a killed process leaves behind can be read with [`recover`]. To keep a sequence, save it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam::channel::{Receiver, Sender, bounded};

use super::file::{FileError, MappedSlab, PageFile, PageFileWriter, SlabName, Storage};
use super::{LentSlab, OwnSlab};

/// Batches that wait for the worker at most.
const QUEUE_BATCHES: usize = 4;

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

/// What the cold tier has done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ColdReport {
    /// Files written.
    pub files: u64,
    /// Slabs in them.
    pub slabs: u64,
    /// Batches that could not be written; their slabs stayed warm.
    pub failed: u64,
    /// The last failure, in words.
    pub last_error: Option<String>,
}

/// Queue to the worker, and its answers.
pub(crate) struct ColdTier<K> {
    folder: PathBuf,
    limit_bytes: usize,
    jobs: Option<Sender<Job<K>>>,
    done: Receiver<Spilled<K>>,
    worker: Option<JoinHandle<()>>,
    written: Vec<PathBuf>,
    epoch: u64,
    in_flight: usize,
    report: ColdReport,
}

impl<K: Send + 'static> ColdTier<K> {
    /// Starts the worker. Files go to `folder`, which must exist.
    ///
    /// # Errors
    /// The system's, when the thread cannot be started.
    pub(crate) fn open(
        storage: Arc<dyn Storage>,
        folder: &Path,
        limit_bytes: usize,
    ) -> std::io::Result<Self> {
        let (jobs, queue) = bounded::<Job<K>>(QUEUE_BATCHES);
        let (answers, done) = bounded(QUEUE_BATCHES + 1);
        let worker = std::thread::Builder::new().name("floe-cold".into()).spawn(move || {
            for job in queue {
                let result = write(&*storage, &job);
                if answers.send(Spilled { slabs: job.slabs, result }).is_err() {
                    break;
                }
            }
        })?;
        Ok(Self {
            folder: folder.to_path_buf(),
            limit_bytes,
            jobs: Some(jobs),
            done,
            worker: Some(worker),
            written: Vec::new(),
            epoch: 0,
            in_flight: 0,
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
        self.jobs = None;
        while self.done.recv().is_ok() {}
        if let Some(worker) = self.worker.take() {
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
    Ok(file.manifest().slabs.iter().map(|entry| file.slab(entry)).collect())
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
