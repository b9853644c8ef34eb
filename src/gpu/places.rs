//! Where each open sequence lies: its rows and pages on the device, its chunks in host memory.

use std::collections::HashMap;

use floe_cuda::ops::cache::{CHUNK_ROWS, SequencePlace};

use super::classes::{Classes, LayerClass, POLICY};
use super::host::Chunk;
use super::options::GpuOptions;
use super::runs::Runs;
use crate::error::{Error, Result};
use crate::ids::SeqId;
use crate::shape::PAGE_TOKENS;

/// One open sequence.
#[derive(Debug)]
pub(super) struct Open {
    /// Index in the tables.
    pub(super) index: usize,
    /// By class of layers.
    pub(super) places: Vec<SequencePlace>,
    /// Tokens it may have.
    pub(super) capacity: usize,
    /// Tokens stored, by layer.
    pub(super) tokens: Vec<usize>,
    /// Pages built, by layer: `0..built`.
    pub(super) built: Vec<usize>,
    /// Chunks by layer.
    pub(super) chunks: Vec<Vec<Chunk>>,
    /// Added to the number of tokens for the tick of a step: truncation must not turn it back.
    pub(super) turned_back: u32,
}

impl Open {
    /// Its place in the layers that the policy selects in.
    pub(super) fn place(&self) -> SequencePlace {
        self.places[POLICY]
    }

    /// Whether every token has its row there.
    pub(super) fn is_dense(&self) -> bool {
        self.place().slots == SequencePlace::DENSE
    }

    /// Most tokens of any layer.
    pub(super) fn longest(&self) -> usize {
        self.tokens.iter().copied().max().unwrap_or(0)
    }
}

/// A move to a larger place.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Grown {
    pub(super) from: SequencePlace,
    pub(super) to: SequencePlace,
    /// Rows of the old place may be rows of the new one: they come from host memory. Else they are taken until [`Places::give_old`].
    pub(super) overlaps: bool,
}

/// All open sequences and what is free.
#[derive(Debug)]
pub(super) struct Places {
    /// By class.
    rows: Vec<Runs>,
    /// In units of 16 pages.
    pages: Runs,
    free: Vec<usize>,
    heads: usize,
    max_tokens: usize,
    pub(super) open: HashMap<SeqId, Open>,
}

impl Places {
    pub(super) fn new(options: &GpuOptions, classes: &Classes) -> Self {
        let plan = &classes.all[POLICY].plan;
        let pages = if plan.exact { 0 } else { options.page_tokens / 256 };
        Self {
            rows: classes.all.iter().map(|class| Runs::new(class.rows)).collect(),
            pages: Runs::new(pages),
            free: (0..options.max_sequences).rev().collect(),
            heads: plan.shape.heads,
            max_tokens: options.max_tokens,
            open: HashMap::new(),
        }
    }

    /// A place for a sequence of at most `capacity` tokens.
    pub(super) fn admit(
        &mut self,
        seq: SeqId,
        capacity: usize,
        classes: &Classes,
        layers: usize,
    ) -> Result<()> {
        let (heads, plan) = (self.heads, &classes.all[POLICY].plan);
        let index =
            *self.free.last().ok_or(Error::NoRoom { what: "places for sequences", needed: 1, free: 0 })?;
        let pages_each = plan.pages_each(capacity) / 16;
        let pages = self.pages.take(pages_each * heads, 1).ok_or(Error::NoRoom {
            what: "tokens with summaries on the device (`page_tokens`)",
            needed: pages_each * heads * 256,
            free: self.pages.free() * 256,
        })?;
        // Pages of a tree hold any tokens, and not all of its pages may be on the device.
        let (tokens, tokens_each) = if plan.tree {
            let each = capacity_words(self.max_tokens);
            (index * heads * each, each)
        } else {
            (pages * 256, pages_each * 256)
        };
        let mut places = Vec::with_capacity(classes.all.len());
        for (number, class) in classes.all.iter().enumerate() {
            let Some(place) = self.take_rows(number, class, capacity) else {
                self.give_rows(&places);
                self.pages.give(pages, pages_each * heads);
                return Err(Error::NoRoom {
                    what: "rows on the device (`rows`)",
                    needed: plan.slot_rows().min(capacity) * heads,
                    free: self.rows[number].free(),
                });
            };
            places.push(place);
        }
        places[POLICY] = SequencePlace {
            pages: (pages * 16) as u32,
            pages_each: (pages_each * 16) as u32,
            tokens: tokens as u32,
            tokens_each: tokens_each as u32,
            ..places[POLICY]
        };
        self.free.pop();
        let open = Open {
            index,
            places,
            capacity,
            tokens: vec![0; layers],
            built: vec![0; layers],
            chunks: vec![Vec::new(); layers],
            turned_back: 0,
        };
        self.open.insert(seq, open);
        Ok(())
    }

    /// Rows for a sequence in a class of layers. `None`: fewer are left than its steps need.
    fn take_rows(&mut self, number: usize, class: &LayerClass, capacity: usize) -> Option<SequencePlace> {
        let (heads, rows) = (self.heads, &mut self.rows[number]);
        let (each, slots) = match class.span_rows() {
            Some(each) => (each, 0),
            None => {
                // A fair share of what is free, so that places of one size follow one another without holes.
                let share = rows.free() / (heads * self.free.len()) / PAGE_TOKENS * PAGE_TOKENS;
                (share.min(capacity.next_multiple_of(PAGE_TOKENS)), SequencePlace::DENSE)
            }
        };
        // An exact layer reads what has no row in host memory.
        let enough = class.plan.exact || each >= capacity || each >= class.plan.slot_rows();
        let start = if enough { rows.take(each * heads, PAGE_TOKENS) } else { None };
        start.map(|start| SequencePlace {
            rows: start as u32,
            rows_each: each as u32,
            slots,
            ..SequencePlace::default()
        })
    }

    fn give_rows(&mut self, places: &[SequencePlace]) {
        for (rows, place) in self.rows.iter_mut().zip(places) {
            rows.give(place.rows as usize, place.rows_each as usize * self.heads);
        }
    }

    /// Moves a sequence to a larger dense place in a class of layers: for at least `tokens`, and twice as many as it had where they are to be
    /// had. `None`: the device has no room.
    pub(super) fn grow(&mut self, (seq, class): (SeqId, usize), tokens: usize) -> Result<Option<Grown>> {
        let (heads, open) = (self.heads, self.open.get_mut(&seq).ok_or(Error::UnknownSequence(seq))?);
        let (from, rows) = (open.places[class], &mut self.rows[class]);
        let had = from.rows_each as usize;
        let most = (2 * had).max(tokens).min(open.capacity);
        let sizes = [most, tokens].map(|each| each.next_multiple_of(PAGE_TOKENS));
        // Beside the old place, so that rows are copied on the device; else over it.
        for overlaps in [false, true] {
            for each in sizes {
                if rows.free() + usize::from(overlaps) * had * heads < each * heads {
                    continue;
                }
                let mut left = rows.clone();
                if overlaps {
                    left.give(from.rows as usize, had * heads);
                }
                let Some(start) = left.take(each * heads, PAGE_TOKENS) else { continue };
                *rows = left;
                let to = SequencePlace { rows: start as u32, rows_each: each as u32, ..from };
                open.places[class] = to;
                return Ok(Some(Grown { from, to, overlaps }));
            }
        }
        Ok(None)
    }

    /// The rows of the place that a sequence moved away from are free.
    pub(super) fn give_old(&mut self, class: usize, grown: &Grown) {
        if !grown.overlaps {
            self.rows[class].give(grown.from.rows as usize, grown.from.rows_each as usize * self.heads);
        }
    }

    /// Frees everything of a sequence but its chunks, which are returned.
    pub(super) fn close(&mut self, seq: SeqId) -> Result<Vec<Chunk>> {
        let open = self.open.remove(&seq).ok_or(Error::UnknownSequence(seq))?;
        self.give_rows(&open.places);
        let place = open.place();
        self.pages.give(place.pages as usize / 16, place.pages_each as usize / 16 * self.heads);
        self.free.push(open.index);
        Ok(open.chunks.into_iter().flatten().collect())
    }

    pub(super) fn get(&self, seq: SeqId) -> Result<&Open> {
        self.open.get(&seq).ok_or(Error::UnknownSequence(seq))
    }

    pub(super) fn get_mut(&mut self, seq: SeqId) -> Result<&mut Open> {
        self.open.get_mut(&seq).ok_or(Error::UnknownSequence(seq))
    }

    /// Rows free on the device, in a layer that the policy selects in.
    pub(super) fn rows_free(&self) -> usize {
        self.rows[POLICY].free()
    }
}

/// Words of a kv head in tables by token, where a tree's pages hold any of them.
pub(super) const fn capacity_words(max_tokens: usize) -> usize {
    max_tokens.next_multiple_of(CHUNK_ROWS)
}

/// Chunks that hold `tokens`.
pub(super) const fn chunks_of(tokens: usize) -> usize {
    tokens.div_ceil(CHUNK_ROWS)
}

#[cfg(test)]
mod tests {
    use super::super::options::Plan;
    use super::*;
    use crate::config::{Config, HotConfig};
    use crate::shape::{HeadShape, KvDtype};

    const HEADS: usize = 2;

    fn places(policy: &str, change: impl Fn(GpuOptions) -> GpuOptions) -> (Places, Classes) {
        let heads = HeadShape::new(8, HEADS, 128).unwrap();
        let hot = HotConfig { slots: 512, ..HotConfig::default() };
        let spans = vec![None, Some(64), None];
        let config = Config {
            hot,
            spans,
            dense_layers: 1,
            policy: policy.parse().unwrap(),
            ..Config::new(3, heads, KvDtype::Bf16)
        };
        let options = change(GpuOptions::for_load(&config, 3, 4096, 0.5));
        let classes = Classes::new(&config, &options, &Plan::new(&config, &options).unwrap());
        (Places::new(&options, &classes), classes)
    }

    /// Rows of a kv head by class.
    fn each(places: &Places, seq: u64) -> Vec<u32> {
        places.get(SeqId(seq)).unwrap().places.iter().map(|place| place.rows_each).collect()
    }

    #[test]
    fn every_class_has_rows_of_its_own() {
        let (mut places, classes) = places("floe", |options| options);
        let free = |places: &Places| places.rows.iter().map(Runs::free).collect::<Vec<_>>();
        let before = free(&places);
        for seq in 0..3 {
            places.admit(SeqId(seq), 4096, &classes, 3).unwrap();
            assert_eq!(each(&places, seq), [2048, 4096, 64]);
        }
        assert!(places.admit(SeqId(3), 4096, &classes, 3).is_err(), "three sequences");
        assert_eq!(free(&places), [0, 0, 0]);
        (0..3).for_each(|seq| assert!(places.close(SeqId(seq)).unwrap().is_empty()));
        assert_eq!(free(&places), before);
    }

    #[test]
    fn an_exact_place_grows_into_what_is_free() {
        let (mut places, classes) = places("full", |options| options);
        let all = 3 * HEADS * 2048;
        (0..2).for_each(|seq| places.admit(SeqId(seq), 4096, &classes, 3).unwrap());
        assert_eq!(each(&places, 0), [2048, 64]);
        // A third of the rows belongs to nobody, but not beside those of the first sequence.
        assert_eq!(places.grow((SeqId(0), POLICY), 2049).unwrap(), None);
        let over = places.grow((SeqId(1), POLICY), 2049).unwrap().unwrap();
        assert_eq!(
            (over.overlaps, over.from.rows, over.to.rows),
            (true, over.to.rows, (HEADS * 2048) as u32)
        );
        places.give_old(POLICY, &over);
        assert_eq!((each(&places, 1)[0], places.rows_free()), (4096, 0));
        places.close(SeqId(1)).unwrap();
        let beside = places.grow((SeqId(0), POLICY), 2049).unwrap().unwrap();
        assert_eq!((beside.overlaps, beside.to.slots), (false, SequencePlace::DENSE));
        assert_eq!(places.rows_free(), 0, "the old rows are still read");
        places.give_old(POLICY, &beside);
        assert_eq!(places.rows_free(), HEADS * 2048);
        places.close(SeqId(0)).unwrap();
        assert_eq!(places.rows[POLICY].take(all, 16), Some(0), "in one piece");
    }

    #[test]
    fn exact_layers_do_with_fewer_rows_and_selecting_ones_do_not() {
        let (mut full, classes) = places("full", |options| GpuOptions { rows: 100, ..options });
        full.admit(SeqId(0), 4096, &classes, 3).unwrap();
        assert_eq!(each(&full, 0), [16, 64]);
        let few = |options| GpuOptions { rows: 3 * HEADS * 512, dense_rows: 0, ..options };
        let (mut floe, classes) = places("floe", few);
        let pages = floe.pages.free();
        let error = floe.admit(SeqId(0), 4096, &classes, 3).unwrap_err().to_string();
        assert!(error.contains("`rows`"), "{error}");
        assert_eq!((floe.pages.free(), floe.rows_free()), (pages, 3 * HEADS * 512), "nothing is kept");
        floe.admit(SeqId(0), 512, &classes, 3).unwrap();
        assert_eq!(each(&floe, 0), [512, 0, 64]);
    }
}
