//! The host's tree of one kv head of a layer of a sequence, and the threads that build and extend it.
//!
//! A batch of tokens is *submitted* once the work that stores their rows is queued: a worker waits for that work, reads the rows in
//! page-locked memory, inserts them and leaves what the device has to be told, until the step that needs it *takes* it. Batches of a
//! tree are done in order, one at a time; those of different trees at once. Workers take the batches of all trees in the order in which
//! they were submitted: one that went on with its tree would wait for steps of the future while batches of other trees,
//! which the device is waiting for, had nobody.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use floe_cuda::device::{Event, PinnedBuffer};
use floe_cuda::ops::DeviceElem;
use floe_cuda::ops::cache::CHUNK_ROWS;
use floe_index::{Batch, Dci, Found, KeyIndex, Query, Scratch, SearchParams, Tail, Unit};
use parking_lot::{Condvar, Mutex};
use rayon::ThreadPool;

use super::mirror::{Mirror, Told};
use super::nodes::{NodeMirror, NodeUpdate};
use super::turns::Turns;
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

/// A query of an earlier step, to be searched for.
#[derive(Debug, Clone)]
pub(super) struct Asked {
    /// Queries [heads, group, dim], and where this kv head's begin, in bytes.
    pub(super) queries: Arc<PinnedBuffer<u8>>,
    pub(super) group: usize,
    pub(super) scale: f32,
    /// Behind the copy that writes them.
    pub(super) written: Arc<Event>,
}

#[derive(Debug)]
enum Job {
    Add(Rows),
    Search(Asked),
}

/// What a batch or a search did to a tree.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// Tokens `..end` are in the tree now.
    pub(super) end: usize,
    /// Tokens that joined.
    pub(super) tokens: usize,
    /// Whether a search chose the pages that are listed.
    pub(super) searched: bool,
    /// Super-nodes that changed.
    pub(super) nodes: Vec<NodeUpdate>,
    /// Pages that changed.
    pub(super) told: Told,
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
    /// Where the host chooses which pages the device sees.
    lists: Option<Lists>,
    end: usize,
}

/// Which super-nodes' pages the device sees; the others stand for themselves.
#[derive(Debug)]
struct Lists {
    opened: Vec<bool>,
    /// Super-nodes opened at most.
    most: usize,
    nodes: NodeMirror,
    scratch: Scratch,
    found: Found,
}

impl Lists {
    /// The first super-nodes: nobody has asked yet.
    fn open_first(&mut self, index: &Dci) {
        let num = index.num_super_nodes();
        self.opened.clear();
        self.opened.resize(num.max(1), false);
        self.opened.iter_mut().take(self.most).for_each(|opened| *opened = true);
    }

    /// Those that the search for a query opens.
    fn search(&mut self, index: &Dci, query: &Query<'_>) -> Result<()> {
        let num = index.num_super_nodes().max(1);
        let part = (self.most as f32 / num as f32).min(1.0);
        let exact = SearchParams::exact(1, Unit::Page, Tail::Tree);
        let params = SearchParams { open_fraction: part, ..exact };
        index.search(query, &[], &params, &mut self.scratch, &mut self.found)?;
        self.opened.clear();
        self.opened.resize(num, false);
        for node in self.found.opened().take(self.most) {
            self.opened[node] = true;
        }
        Ok(())
    }
}

impl Tree {
    /// What the device has to be told; `None`: its pages do not suffice.
    fn changes(&mut self) -> Option<(Told, Vec<NodeUpdate>)> {
        let mut nodes = Vec::new();
        let Some(view) = self.index.pages() else { return Some((Told::default(), nodes)) };
        let opened = match &mut self.lists {
            Some(lists) => {
                if lists.opened.is_empty() {
                    lists.open_first(&self.index);
                }
                if self.index.num_super_nodes() > 0 {
                    lists.nodes.follow(&self.index, &lists.opened, &mut nodes).ok()?;
                }
                Some(lists.opened.as_slice())
            }
            None => None,
        };
        let told = self.mirror.follow(view, opened).ok()?;
        Some((told, nodes))
    }

    /// Another tree in its place.
    fn restart(&mut self, dim: usize) -> Result<()> {
        self.index = Dci::new(dim)?;
        self.mirror.restart();
        if let Some(lists) = &mut self.lists {
            lists.opened.clear();
            lists.nodes.restart();
        }
        Ok(())
    }
}

#[derive(Debug, Default)]
struct Mail {
    jobs: Turns<Job>,
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
    /// Where the host chooses which pages the device sees.
    pub(super) lists: Option<ListShape>,
}

/// How many pages the host lists.
#[derive(Debug, Clone, Copy)]
pub(super) struct ListShape {
    /// Super-nodes that a search opens.
    pub(super) most: usize,
    /// Super-nodes on the device.
    pub(super) nodes: usize,
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
        let lists = shape.lists.map(|lists| Lists {
            opened: Vec::new(),
            most: lists.most,
            nodes: NodeMirror::new(lists.nodes),
            scratch: Scratch::default(),
            found: Found::default(),
        });
        let mirror = Mirror::new(shape.head, shape.room);
        let tree = Tree { index: Dci::new(shape.dim)?, mirror, lists, end: 0 };
        Ok(Self { shape, mail: Mutex::default(), changed: Condvar::new(), tree: Mutex::new(tree) })
    }

    /// Has `rows` added behind those submitted before.
    pub(super) fn submit<E: DeviceElem>(self: &Arc<Self>, rows: Rows, pool: &ThreadPool) {
        self.post::<E>(Job::Add(rows), pool);
    }

    /// Has the pages for a query listed, if nothing else is to be done.
    pub(super) fn ask<E: DeviceElem>(self: &Arc<Self>, asked: Asked, pool: &ThreadPool) {
        self.post::<E>(Job::Search(asked), pool);
    }

    /// Whether nothing is to be done.
    pub(super) fn is_idle(&self) -> bool {
        self.mail.lock().jobs.is_idle()
    }

    fn post<E: DeviceElem>(self: &Arc<Self>, job: Job, pool: &ThreadPool) {
        self.mail.lock().jobs.put(job);
        let shard = self.clone();
        // Tasks from outside of the pool are begun in order.
        pool.spawn(move || shard.work::<E>());
    }

    /// Does the jobs whose turn has come.
    fn work<E: DeviceElem>(&self) {
        let mut next = self.mail.lock().jobs.begin();
        while let Some(job) = next {
            let done = match &job {
                Job::Add(rows) => self.add::<E>(rows),
                Job::Search(asked) => self.search::<E>(asked),
            };
            let mut mail = self.mail.lock();
            match done {
                Ok(outcome) => mail.done.push_back(outcome),
                Err(error) => {
                    mail.jobs.clear();
                    mail.failed = Some(error);
                }
            }
            next = mail.jobs.next();
            self.changed.notify_all();
        }
    }

    /// What happened up to the tokens `..end`, in order, and whether it was waited for, as it is if it `must` be there; what was not
    /// submitted has not happened.
    pub(super) fn take(&self, end: usize, must: bool) -> Result<(Vec<Outcome>, bool)> {
        let mut mail = self.mail.lock();
        let mut waited = false;
        loop {
            if let Some(error) = mail.failed.take() {
                return Err(error);
            }
            let there = mail.done.iter().any(|outcome| outcome.end == end) || !must;
            if let Some(last) = mail.done.iter().rposition(|outcome| outcome.end <= end).filter(|_| there) {
                return Ok((mail.done.drain(..=last).collect(), waited));
            }
            if mail.jobs.is_idle() || !must {
                return Ok((Vec::new(), waited));
            }
            waited = true;
            self.changed.wait(&mut mail);
        }
    }

    /// Pages of the first outcome not yet taken, if that has the tokens `..end` in the tree and can be built beside steps.
    pub(super) fn ready(&self, end: usize) -> Option<usize> {
        let mail = self.mail.lock();
        let first = mail.done.front().filter(|outcome| outcome.end == end && outcome.told.beside)?;
        Some(first.told.pages.len())
    }

    /// Waits until nothing is in the mail.
    pub(super) fn rest(&self) {
        let mut mail = self.mail.lock();
        while !mail.jobs.is_idle() {
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
                tree.restart(self.shape.dim)?;
            }
            let (told, nodes) = tree.changes().ok_or_else(|| self.no_room())?;
            outcomes.push(Outcome { end, told, nodes, used: tree.mirror.used(), ..Outcome::default() });
        }
        Ok(outcomes)
    }

    fn add<E: DeviceElem>(&self, rows: &Rows) -> Result<Outcome> {
        rows.written.synchronize()?;
        let start = Instant::now();
        let mut tree = self.tree.lock();
        let tree = &mut *tree;
        self.insert::<E>(&mut tree.index, rows, rows.first)?;
        let (told, nodes) = match tree.changes() {
            Some(changes) => changes,
            None => {
                // Truncations left too many pages of few tokens: a new tree has full ones.
                tree.restart(self.shape.dim)?;
                self.insert::<E>(&mut tree.index, rows, 0)?;
                tree.changes().ok_or_else(|| self.no_room())?
            }
        };
        tree.end = rows.end;
        let micros = start.elapsed().as_secs_f64() * 1e6;
        let tokens = rows.end - rows.first;
        Ok(Outcome { end: rows.end, tokens, searched: false, nodes, told, used: tree.mirror.used(), micros })
    }

    fn search<E: DeviceElem>(&self, asked: &Asked) -> Result<Outcome> {
        asked.written.synchronize()?;
        let start = Instant::now();
        let each = asked.group * self.shape.dim;
        let mut bytes = vec![0u8; each * size_of::<E>()];
        asked.queries.read_at(self.shape.head * bytes.len(), &mut bytes)?;
        let q: Vec<f32> = bytes
            .chunks_exact(size_of::<E>())
            .map(|x| bytemuck::pod_read_unaligned::<E>(x).to_f32())
            .collect();
        let query = Query { q: &q, group: asked.group, scale: asked.scale, attended_lse: &[] };
        let mut tree = self.tree.lock();
        let tree = &mut *tree;
        if let Some(lists) = &mut tree.lists {
            lists.search(&tree.index, &query)?;
        }
        let (told, nodes) = tree.changes().ok_or_else(|| self.no_room())?;
        let micros = start.elapsed().as_secs_f64() * 1e6;
        Ok(Outcome {
            end: tree.end,
            tokens: 0,
            searched: true,
            nodes,
            told,
            used: tree.mirror.used(),
            micros,
        })
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
        let keys = self.half::<E>(rows, fresh.clone(), 0)?;
        // Without lists nobody asks this tree for values: the device makes the summaries of pages, from the rows. Keys stand in.
        let values = self.shape.lists.map(|_| self.half::<E>(rows, fresh, 1)).transpose()?;
        let values = values.as_deref().unwrap_or(&keys);
        let batch = Batch { ids: &ids, keys: &keys, values };
        if index.is_empty() {
            index.build(&batch)?
        } else {
            index.insert(&batch)?
        }
        Ok(())
    }

    /// Keys (0) or values (1) [tokens, dim] of a kv head.
    fn half<E: DeviceElem>(&self, rows: &Rows, tokens: Range<usize>, which: usize) -> Result<Vec<f32>> {
        let (dim, bytes) = (self.shape.dim, 2 * self.shape.dim * size_of::<E>());
        let mut wide = Vec::with_capacity(tokens.len() * dim);
        let mut held = vec![0u8; CHUNK_ROWS * bytes];
        let mut at = tokens.start;
        while at < tokens.end {
            let n = (CHUNK_ROWS - at % CHUNK_ROWS).min(tokens.end - at);
            let (block, start) = &rows.chunks[at / CHUNK_ROWS];
            let held = &mut held[..n * bytes];
            block.read_at(start + (self.shape.head * CHUNK_ROWS + at % CHUNK_ROWS) * bytes, held)?;
            for row in held.chunks_exact(bytes) {
                let half = row[which * bytes / 2..][..bytes / 2].chunks_exact(size_of::<E>());
                wide.extend(half.map(|x| bytemuck::pod_read_unaligned::<E>(x).to_f32()));
            }
            at += n;
        }
        Ok(wide)
    }
}
