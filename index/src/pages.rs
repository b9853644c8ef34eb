//! The pages of one shard: summaries in blocks, token ids by slot, and the young tokens that have no page yet.
//!
//! A page is sealed once and its summary never moves: codes of residuals stay valid for its whole life. New tokens wait
//! among the young ones, held singly at eight bits, until sixteen of them make a page. A token removed from a sealed page
//! lowers the page's count and leaves its means as they are; an emptied page is freed.

use crate::blocks::{Blocks, LANES, Summary};
use crate::error::IndexError;
use crate::frame::Frame;
use crate::grow::grow_by;
use crate::idmap::{IdMap, Place};
use crate::index::{KeyId, MemoryReport};
use crate::sketch::{EncodeScratch, Sketch, SketchConfig};

/// One rotation for all shards: it only has to be unrelated to the data.
const ROTATION_SEED: u64 = 0x666c_6f65;

/// Tokens of one future page, in the frame.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Members<'a> {
    /// `[m]`, 1 to 16 of them.
    pub ids: &'a [KeyId],
    /// `[m, dim]`
    pub keys: &'a [f32],
    /// `[m, dim]`
    pub values: &'a [f32],
}

/// Storage shared by every page index.
#[derive(Clone, Debug)]
pub(crate) struct Pages {
    pub dim: usize,
    pub frame: Frame,
    /// Page summaries; `child` is the page.
    pub blocks: Blocks,
    /// `[pages * 16]` id by token slot; meaningful where the lane is live.
    pub ids: Vec<KeyId>,
    /// `[pages]` live lanes.
    pub live: Vec<u16>,
    /// `[pages]` entry of the page's summary.
    pub entry_of: Vec<u32>,
    /// Pages without tokens, reused last in, first out.
    pub free: Vec<u32>,
    pub map: IdMap,
    /// Young tokens; `child` is the id. Entries `0..num_young` are in use.
    pub young: Blocks,
    pub num_young: usize,
    /// Codes of the residuals to the sealed means, by token slot.
    pub sketch: Option<Sketch>,
    encoder: EncodeScratch,
    /// Changes with every mutation, so that a stale `Found` is recognised.
    pub stamp: u64,
}

fn mean_into(rows: &[f32], dim: usize, out: &mut [f32]) {
    let m = (rows.len() / dim) as f64;
    for (d, o) in out.iter_mut().enumerate() {
        // f64: sixteen finite f32 cannot overflow it.
        let sum: f64 = rows.iter().skip(d).step_by(dim).map(|&x| f64::from(x)).sum();
        *o = (sum / m) as f32;
    }
}

impl Pages {
    /// No tokens yet.
    pub fn new(dim: usize, sketch: SketchConfig) -> Result<Self, IndexError> {
        let keep = sketch != SketchConfig::OFF;
        Ok(Self {
            dim,
            frame: Frame::new(dim),
            blocks: Blocks::new(dim),
            ids: Vec::new(),
            live: Vec::new(),
            entry_of: Vec::new(),
            free: Vec::new(),
            map: IdMap::default(),
            young: Blocks::new(dim),
            num_young: 0,
            sketch: keep.then(|| Sketch::new(sketch, dim, ROTATION_SEED)).transpose()?,
            encoder: EncodeScratch::default(),
            stamp: 0,
        })
    }

    /// Pages ever allocated, freed ones included.
    pub fn num_pages(&self) -> usize {
        self.live.len()
    }

    /// Seals `members` into a page whose summary becomes `entry` (an empty one). Their ids may be young: the map moves.
    pub fn seal(&mut self, entry: usize, members: Members<'_>) {
        let dim = self.dim;
        let page = match self.free.pop() {
            Some(page) => page as usize,
            None => {
                grow_by(&mut self.ids, LANES, 0);
                grow_by(&mut self.live, 1, 0);
                grow_by(&mut self.entry_of, 1, 0);
                self.live.len() - 1
            }
        };
        let mut mean = vec![0.0f32; 2 * dim];
        let (key, value) = mean.split_at_mut(dim);
        mean_into(members.keys, dim, key);
        mean_into(members.values, dim, value);
        let count = members.ids.len() as u32;
        self.blocks.set(entry, Summary { key, value, count, child: page as u32 });
        self.entry_of[page] = entry as u32;
        self.live[page] = ((1u32 << count) - 1) as u16;
        self.encode(page, entry, members);
        for (lane, &id) in members.ids.iter().enumerate() {
            self.ids[page * LANES + lane] = id;
            self.map.set(id, Place::Slot(page * LANES + lane));
        }
        self.stamp += 1;
    }

    /// Codes of a page's tokens, relative to its means as stored: their rounding is coded along with the residual.
    fn encode(&mut self, page: usize, entry: usize, members: Members<'_>) {
        let Some(sketch) = &mut self.sketch else { return };
        let dim = self.dim;
        if sketch.num_pages() <= page {
            sketch.resize_pages(page + 1);
        }
        let mut rows = vec![0.0f32; 4 * dim];
        let (means, residuals) = rows.split_at_mut(2 * dim);
        let (key_mean, value_mean) = means.split_at_mut(dim);
        let (key, value) = residuals.split_at_mut(dim);
        self.blocks.read_key(entry, key_mean);
        self.blocks.read_value(entry, value_mean);
        for lane in 0..members.ids.len() {
            let row = lane * dim..(lane + 1) * dim;
            for ((r, &x), &m) in key.iter_mut().zip(&members.keys[row.clone()]).zip(key_mean.iter()) {
                *r = x - m;
            }
            for ((r, &x), &m) in value.iter_mut().zip(&members.values[row]).zip(value_mean.iter()) {
                *r = x - m;
            }
            sketch.encode(page * LANES + lane, Some(key), Some(value), &mut self.encoder);
        }
    }

    /// Adds one young token, `key` and `value` in the frame.
    pub fn add_young(&mut self, id: KeyId, key: &[f32], value: &[f32]) {
        if self.num_young == self.young.count.len() {
            self.young.add_blocks(1);
        }
        self.young.set(self.num_young, Summary { key, value, count: 1, child: id });
        self.map.set(id, Place::Young(self.num_young));
        self.num_young += 1;
        self.stamp += 1;
    }

    /// Takes a young entry out; the last one takes its place. Does not touch the map entry of the token itself.
    pub fn drop_young(&mut self, entry: usize) {
        let last = self.num_young - 1;
        if entry != last {
            self.young.copy(last, entry);
            self.map.set(self.young.child[entry], Place::Young(entry));
        }
        self.young.clear(last);
        self.num_young = last;
        self.stamp += 1;
    }

    /// Takes a token out. Returns the page entry that changed, if the token was in a page.
    pub fn remove(&mut self, id: KeyId) -> Removed {
        let place = self.map.get(id);
        match place {
            None => Removed::Unknown,
            Some(Place::Young(entry)) => {
                self.drop_young(entry);
                self.map.remove(id);
                Removed::Young
            }
            Some(Place::Slot(slot)) => {
                let (page, lane) = (slot / LANES, slot % LANES);
                let entry = self.entry_of[page] as usize;
                self.live[page] &= !(1 << lane);
                if let Some(sketch) = &mut self.sketch {
                    sketch.clear_slot(slot);
                }
                self.map.remove(id);
                self.stamp += 1;
                if self.live[page] == 0 {
                    self.blocks.clear(entry);
                    self.free.push(page as u32);
                } else {
                    self.blocks.count[entry] -= 1;
                }
                Removed::Paged { entry }
            }
        }
    }

    /// Moves a page's summary to another (empty) entry.
    pub fn move_entry(&mut self, from: usize, to: usize) {
        self.blocks.copy(from, to);
        self.blocks.clear(from);
        self.entry_of[self.blocks.child[to] as usize] = to as u32;
        self.stamp += 1;
    }
}

impl Pages {
    /// Host bytes owned, by part.
    pub fn memory(&self) -> MemoryReport {
        MemoryReport {
            summaries_bytes: self.blocks.size_bytes()
                + 2 * self.live.capacity()
                + 4 * (self.entry_of.capacity() + self.free.capacity()),
            codes_bytes: self.sketch.as_ref().map_or(0, Sketch::size_bytes),
            ids_bytes: 4 * self.ids.capacity() + self.map.size_bytes(),
            young_bytes: self.young.size_bytes(),
            ..MemoryReport::default()
        }
    }
}

/// What a removal changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Removed {
    /// The id was not held.
    Unknown,
    /// A young token left.
    Young,
    /// A token of the page with this summary entry left.
    Paged {
        /// Entry of the page.
        entry: usize,
    },
}
