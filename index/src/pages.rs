//! The pages of one shard: summaries in blocks, token ids by slot, and the young tokens that have no page yet.
//!
//! A page is sealed once and its summary never moves: codes of residuals stay valid for its whole life. New tokens wait
//! among the young ones, held singly at eight bits, until sixteen of them make a page. A token removed from a sealed page
//! lowers the page's count and leaves its means as they are; an emptied page is freed.

use crate::blocks::{Blocks, LANES, Summary};
use crate::error::IndexError;
use crate::export::Journal;
use crate::frame::Frame;
use crate::grow::grow_by;
use crate::idmap::{IdMap, Place};
use crate::index::{KeyId, MAX_DIM, MemoryReport};
use crate::sketch::{EncodeScratch, Sketch, SketchConfig};
use crate::snapshot::{Reader, Writer};

/// Seed of the one rotation of all shards' sketches: it only has to be unrelated to the data.
pub const ROTATION_SEED: u64 = 0x666c_6f65;

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
    /// Pages that changed lately.
    pub journal: Journal,
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
            journal: Journal::default(),
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
        let (mut spread, mut reach) = (0.0f32, 0.0f32);
        for row in members.keys.chunks_exact(dim) {
            let square = row.iter().zip(key.iter()).map(|(x, m)| (x - m) * (x - m)).sum::<f32>() / dim as f32;
            spread += square / count as f32;
            reach = reach.max(square);
        }
        self.blocks.set(entry, Summary { key, value, spread, reach, count, child: page as u32 });
        self.entry_of[page] = entry as u32;
        self.live[page] = ((1u32 << count) - 1) as u16;
        self.encode(page, entry, members);
        for (lane, &id) in members.ids.iter().enumerate() {
            self.ids[page * LANES + lane] = id;
            self.map.set(id, Place::Slot(page * LANES + lane));
        }
        self.stamp += 1;
        self.journal.log(page);
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
        self.young.set(self.num_young, Summary { key, value, spread: 0.0, reach: 0.0, count: 1, child: id });
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
                self.journal.log(page);
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
                + 4 * (self.entry_of.capacity() + self.free.capacity())
                + self.journal.size_bytes(),
            codes_bytes: self.sketch.as_ref().map_or(0, Sketch::size_bytes),
            ids_bytes: 4 * self.ids.capacity() + self.map.size_bytes(),
            young_bytes: self.young.size_bytes(),
            ..MemoryReport::default()
        }
    }
}

impl Pages {
    /// Appends everything but what follows from it.
    pub fn write_to(&self, to: &mut Writer) {
        to.len(self.dim);
        let config = self.sketch.as_ref().map_or(SketchConfig::OFF, Sketch::config);
        to.bytes(&[config.k_bits() as u8, config.v_bits() as u8]);
        self.frame.write_to(to);
        self.blocks.write_to(to);
        to.len(self.num_pages());
        to.u32s(&self.ids);
        to.u16s(&self.live);
        to.len(self.free.len());
        to.u32s(&self.free);
        self.young.write_to(to);
        to.len(self.num_young);
        if let Some(sketch) = &self.sketch {
            sketch.write_to(to.buffer());
        }
    }

    /// What `write_to` appended, every link checked.
    pub fn read_from(from: &mut Reader<'_>) -> Result<Self, IndexError> {
        let dim = from.len()?;
        from.check((1..=MAX_DIM).contains(&dim), "dimension")?;
        let bits = from.take(2)?;
        let mut pages = Self::new(dim, SketchConfig::new(bits[0], bits[1])?)?;
        pages.frame = Frame::read_from(dim, from)?;
        pages.blocks = Blocks::read_from(dim, from)?;
        let num_pages = from.len()?;
        pages.ids = from.u32s(num_pages * LANES)?;
        pages.live = from.u16s(num_pages)?;
        let num_free = from.len()?;
        pages.free = from.u32s(num_free)?;
        pages.young = Blocks::read_from(dim, from)?;
        pages.num_young = from.len()?;
        if let Some(sketch) = &mut pages.sketch {
            let bytes = from.take(num_pages * sketch.snapshot_bytes_per_page())?;
            sketch.resize_pages(num_pages);
            sketch.read_from(bytes)?;
        }
        pages.link(from)?;
        pages.journal.log_all();
        Ok(pages)
    }

    /// Rebuilds the links from pages to entries and from ids to slots.
    fn link(&mut self, from: &Reader<'_>) -> Result<(), IndexError> {
        let num_pages = self.num_pages();
        self.entry_of = vec![u32::MAX; num_pages];
        for (entry, &page) in self.blocks.child.iter().enumerate().filter(|e| *e.1 != u32::MAX) {
            let home =
                self.entry_of.get_mut(page as usize).ok_or_else(|| from.damaged("page of an entry"))?;
            from.check(*home == u32::MAX, "two entries for one page")?;
            from.check(
                self.live[page as usize].count_ones() == self.blocks.count[entry],
                "tokens of a page",
            )?;
            from.check(self.blocks.count[entry] > 0, "an entry for a free page")?;
            *home = entry as u32;
        }
        let mut idle = vec![false; num_pages];
        for &page in &self.free {
            let idle = idle.get_mut(page as usize).ok_or_else(|| from.damaged("free page"))?;
            from.check(!*idle, "a page is free twice")?;
            *idle = true;
        }
        for (page, &idle) in idle.iter().enumerate() {
            from.check(idle == (self.entry_of[page] == u32::MAX), "a page is neither used nor free")?;
            from.check(!idle || self.live[page] == 0, "tokens of a free page")?;
            for lane in (0..LANES).filter(|lane| self.live[page] >> lane & 1 == 1) {
                let slot = page * LANES + lane;
                from.check(self.map.get(self.ids[slot]).is_none(), "an id occurs twice")?;
                self.map.set(self.ids[slot], Place::Slot(slot));
            }
        }
        from.check(self.num_young <= self.young.count.len(), "young tokens")?;
        for (entry, (&id, &count)) in self.young.child.iter().zip(&self.young.count).enumerate() {
            from.check(count == u32::from(entry < self.num_young), "young tokens")?;
            if count == 1 {
                from.check(self.map.get(id).is_none(), "an id occurs twice")?;
                self.map.set(id, Place::Young(entry));
            }
        }
        let used = self.map.len() > 0;
        from.check(!used || !self.frame.key_centre.is_empty(), "tokens without a centre")
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
