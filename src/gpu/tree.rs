//! The host's tree of one kv head of a layer of a sequence, and the threads that build and extend it.
//!
//! A batch of tokens is *submitted* once the work that stores their rows is queued: a worker waits for that work, reads the rows in
//! page-locked memory, inserts them and leaves what the device has to be told, until the step that needs it *takes* it. Batches of a
//! tree are done in order, one at a time; those of different trees at once.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use floe_cuda::device::{Event, PinnedBuffer};
use floe_cuda::ops::DeviceElem;
use floe_cuda::ops::cache::{CHUNK_ROWS, TreePage};
use floe_index::{Batch, Dci, KeyIndex};
use parking_lot::{Condvar, Mutex};
use rayon::ThreadPool;

use super::mirror::Mirror;
use crate::error::{Error, Result};

/// A chunk: its block and where it begins.
pub(super) type Place = (Arc<PinnedBuffer<u8>>, usize);

/// Rows of tokens in page-locked memory.
#[derive(Debug, Clone)]
pub(super) struct Rows {
    /// First token.
    pub(super) first: usize,
    /// One past the last.
    pub(super) end: usize,
    /// Blocks and places in them of the sequence's chunks, from its first token on.
    pub(super) chunks: Arc<Vec<Place>>,
    /// Behind everything that writes them.
    pub(super) written: Arc<Event>,
}

/// What a batch did to a tree.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// Tokens `..end` are in the tree now.
    pub(super) end: usize,
    /// Tokens that joined.
    pub(super) tokens: usize,
    /// Pages that changed.
    pub(super) pages: Vec<TreePage>,
    /// Pages that a step has to look at.
    pub(super) used: u32,
    /// Microseconds of the worker, waiting for the device aside.
    pub(super) micros: f64,
}

/// The tree and its mirror.
#[derive(Debug)]
struct Tree {
    index: Dci,
    mirror: Mirror,
    end: usize,
}

impl Tree {
    /// What the device has to be told; `None`: its pages do not suffice.
    fn changes(&mut self) -> Option<Vec<TreePage>> {
        let mut pages = Vec::new();
        let Some(view) = self.index.pages() else { return Some(pages) };
        self.mirror.follow(view, &mut pages).ok().map(|()| pages)
    }
}

#[derive(Debug, Default)]
struct Mail {
    jobs: VecDeque<Rows>,
    running: bool,
    done: VecDeque<Outcome>,
    failed: Option<Error>,
}

/// Fixed numbers of a tree.
#[derive(Debug, Clone, Copy)]
pub(super) struct TreeShape {
    pub(super) head: usize,
    pub(super) dim: usize,
    /// First tokens, which no tree holds.
    pub(super) sinks: usize,
    /// Pages on the device.
    pub(super) room: usize,
}

/// One kv head's tree, with its mail.
#[derive(Debug)]
pub(super) struct TreeShard {
    shape: TreeShape,
    mail: Mutex<Mail>,
    changed: Condvar,
    tree: Mutex<Tree>,
}

impl TreeShard {
    pub(super) fn new(shape: TreeShape) -> Result<Self> {
        let tree = Tree { index: Dci::new(shape.dim)?, mirror: Mirror::new(shape.head, shape.room), end: 0 };
        Ok(Self { shape, mail: Mutex::default(), changed: Condvar::new(), tree: Mutex::new(tree) })
    }

    /// Has `rows` added behind those submitted before.
    pub(super) fn submit<E: DeviceElem>(self: &Arc<Self>, rows: Rows, pool: &ThreadPool) {
        let mut mail = self.mail.lock();
        mail.jobs.push_back(rows);
        if !mail.running {
            mail.running = true;
            let shard = self.clone();
            pool.spawn(move || shard.work::<E>());
        }
    }

    /// Does what is in the mail.
    fn work<E: DeviceElem>(&self) {
        loop {
            let rows = {
                let mut mail = self.mail.lock();
                match mail.jobs.pop_front() {
                    Some(rows) => rows,
                    None => {
                        mail.running = false;
                        self.changed.notify_all();
                        return;
                    }
                }
            };
            let done = self.add::<E>(&rows);
            let mut mail = self.mail.lock();
            match done {
                Ok(outcome) => mail.done.push_back(outcome),
                Err(error) => {
                    mail.jobs.clear();
                    mail.failed = Some(error);
                }
            }
            self.changed.notify_all();
        }
    }

    /// What happened up to the tokens `..end`, in order, and whether it was waited for; what was not submitted has not happened.
    pub(super) fn take(&self, end: usize) -> Result<(Vec<Outcome>, bool)> {
        let mut mail = self.mail.lock();
        let mut waited = false;
        loop {
            if let Some(error) = mail.failed.take() {
                return Err(error);
            }
            if let Some(last) = mail.done.iter().position(|outcome| outcome.end == end) {
                return Ok((mail.done.drain(..=last).collect(), waited));
            }
            if !mail.running {
                return Ok((Vec::new(), waited));
            }
            waited = true;
            self.changed.wait(&mut mail);
        }
    }

    /// Waits until nothing is in the mail.
    pub(super) fn rest(&self) {
        let mut mail = self.mail.lock();
        while mail.running {
            self.changed.wait(&mut mail);
        }
    }

    /// Forgets the tokens from `end` on; with everything that happened since the last outcome taken.
    pub(super) fn truncate(&self, end: usize) -> Result<Vec<Outcome>> {
        self.rest();
        let mut outcomes: Vec<Outcome> = {
            let mut mail = self.mail.lock();
            match mail.failed.take() {
                Some(error) => return Err(error),
                None => mail.done.drain(..).collect(),
            }
        };
        let mut tree = self.tree.lock();
        if tree.end > end {
            let gone: Vec<u32> = (end.max(self.shape.sinks) as u32..tree.end as u32).collect();
            tree.index.remove(&gone)?;
            tree.end = end;
            if tree.index.is_empty() {
                tree.index = Dci::new(self.shape.dim)?;
                tree.mirror.restart();
            }
            let pages = tree.changes().ok_or_else(|| self.no_room())?;
            outcomes.push(Outcome { end, tokens: 0, pages, used: tree.mirror.used(), micros: 0.0 });
        }
        Ok(outcomes)
    }

    fn add<E: DeviceElem>(&self, rows: &Rows) -> Result<Outcome> {
        rows.written.synchronize()?;
        let start = Instant::now();
        let mut tree = self.tree.lock();
        let tree = &mut *tree;
        self.insert::<E>(&mut tree.index, rows, rows.first)?;
        let pages = match tree.changes() {
            Some(pages) => pages,
            None => {
                // Truncations left too many pages of few tokens: a new tree has full ones.
                tree.index = Dci::new(self.shape.dim)?;
                tree.mirror.restart();
                self.insert::<E>(&mut tree.index, rows, 0)?;
                tree.changes().ok_or_else(|| self.no_room())?
            }
        };
        tree.end = rows.end;
        let micros = start.elapsed().as_secs_f64() * 1e6;
        let tokens = rows.end - rows.first;
        Ok(Outcome { end: rows.end, tokens, pages, used: tree.mirror.used(), micros })
    }

    fn no_room(&self) -> Error {
        let (what, room) = ("pages of a tree on the device", self.shape.room);
        Error::NoRoom { what, needed: room + 1, free: room }
    }

    /// Adds the tokens from `first` on.
    fn insert<E: DeviceElem>(&self, index: &mut Dci, rows: &Rows, first: usize) -> Result<()> {
        let fresh = first.max(self.shape.sinks)..rows.end;
        if fresh.is_empty() {
            return Ok(());
        }
        let ids: Vec<u32> = (fresh.start as u32..fresh.end as u32).collect();
        let keys = self.keys::<E>(rows, fresh)?;
        // The device makes the summaries of values, from the rows: nobody asks this tree for them, and keys stand in.
        let batch = Batch { ids: &ids, keys: &keys, values: &keys };
        if index.is_empty() {
            index.build(&batch)?
        } else {
            index.insert(&batch)?
        }
        Ok(())
    }

    /// Keys [tokens, dim] of a kv head.
    fn keys<E: DeviceElem>(&self, rows: &Rows, tokens: Range<usize>) -> Result<Vec<f32>> {
        let (dim, bytes) = (self.shape.dim, 2 * self.shape.dim * size_of::<E>());
        let mut keys = Vec::with_capacity(tokens.len() * dim);
        let mut held = vec![0u8; CHUNK_ROWS * bytes];
        let mut at = tokens.start;
        while at < tokens.end {
            let n = (CHUNK_ROWS - at % CHUNK_ROWS).min(tokens.end - at);
            let (block, start) = &rows.chunks[at / CHUNK_ROWS];
            let held = &mut held[..n * bytes];
            block.read_at(start + (self.shape.head * CHUNK_ROWS + at % CHUNK_ROWS) * bytes, held)?;
            for row in held.chunks_exact(bytes) {
                let key = row[..bytes / 2].chunks_exact(size_of::<E>());
                keys.extend(key.map(|x| bytemuck::pod_read_unaligned::<E>(x).to_f32()));
            }
            at += n;
        }
        Ok(keys)
    }
}
