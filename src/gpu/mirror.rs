//! Which page on the device stands for which page of a kv head's tree, and what of them changes.
//!
//! ```text
//! tree (host)     pages 0 1 2 ...      tokens that wait for a page
//!                       │                    │ a page of one token each
//!                       v                    v
//! device          pages 0 .. used, in any order; freed ones are used again, lowest first
//! ```
//! The device builds a page from the rows of its tokens, so that all it has to be told is which tokens these are. Pages that tokens
//! leave are used again one change later, so that those of a change can be built while steps still look at the state before it.

use std::collections::{BTreeMap, BTreeSet};

use floe_cuda::ops::cache::TreePage;
use floe_index::KeyId;
use floe_index::export::{Changes, Epoch, PageView};

/// Of a page that is not on the device.
const NONE: u32 = u32::MAX;

/// The pages that the device has do not suffice: the tree has to be built anew, densely.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Full;

/// What the device has to be told of a tree.
#[derive(Debug, Default)]
pub(super) struct Told {
    /// Pages, none twice, in rising order.
    pub(super) pages: Vec<TreePage>,
    /// Whether all of them stood for nothing or will, so that they can be built while steps look at the others.
    pub(super) beside: bool,
}

/// The device's pages of one tree.
#[derive(Debug)]
pub(super) struct Mirror {
    head: u32,
    room: u32,
    /// Device page of each page of the tree, or [`NONE`].
    of_page: Vec<u32>,
    /// Device page of a token without a page.
    of_young: BTreeMap<KeyId, u32>,
    /// Pages below `used` that stand for nothing.
    free: BTreeSet<u32>,
    /// Those that the last change freed, for the change after the next.
    left: Vec<u32>,
    used: u32,
    /// State of the tree that the device has; `None`: of none.
    seen: Option<Epoch>,
}

impl Mirror {
    /// Of the tree of kv head `head`, which has `room` pages on the device, all standing for nothing.
    pub(super) fn new(head: usize, room: usize) -> Self {
        Self {
            head: head as u32,
            room: room as u32,
            of_page: Vec::new(),
            of_young: BTreeMap::new(),
            free: BTreeSet::new(),
            left: Vec::new(),
            used: 0,
            seen: None,
        }
    }

    /// Pages that a step has to look at: `0..used`.
    pub(super) fn used(&self) -> u32 {
        self.used
    }

    /// From now on the mirror of another tree, in the same pages.
    pub(super) fn restart(&mut self) {
        self.of_page.clear();
        self.of_young.clear();
        self.left.clear();
        self.free = (0..self.used).collect();
        self.seen = None;
    }

    /// What differs from what was told last. With `opened`, by super-node, only pages of those are there. After an error the mirror has to
    /// be restarted.
    pub(super) fn follow(&mut self, tree: PageView<'_>, opened: Option<&[bool]>) -> Result<Told, Full> {
        let mut dirty: BTreeMap<u32, TreePage> = BTreeMap::new();
        // Pages of an earlier tree are overwritten.
        let mut beside = self.seen.is_some() && opened.is_none();
        self.free.extend(self.left.drain(..));
        self.of_page.resize(self.of_page.len().max(tree.num_pages()), NONE);
        let changed: BTreeSet<u32> = match self.seen.map(|epoch| tree.changes(epoch)) {
            Some(Changes::Pages(pages)) => pages.iter().copied().collect(),
            _ => {
                // Whatever stands in pages that are free is to be forgotten.
                dirty.extend(self.free.iter().map(|&page| (page, self.page(page, 0, &[]))));
                (0..tree.num_pages() as u32).collect()
            }
        };
        let live = |page: u32| match opened {
            Some(opened) if tree.live()[page as usize] != 0 => {
                let node = tree.super_node_of(page as usize);
                if opened.get(node).copied().unwrap_or(false) {
                    u32::from(tree.live()[page as usize])
                } else {
                    0
                }
            }
            _ => u32::from(tree.live()[page as usize]),
        };
        let changed = match opened {
            None => changed,
            Some(_) => {
                // Pages that came into sight or went out of it.
                let all = 0..tree.num_pages() as u32;
                let other = |page: &u32| (live(*page) != 0) != (self.of_page[*page as usize] != NONE);
                all.filter(|page| changed.contains(page) || other(page)).collect()
            }
        };
        let young: BTreeSet<KeyId> = tree.young().iter().copied().collect();
        let left = self.of_young.extract_if(.., |id, _| !young.contains(id)).map(|(_, page)| page);
        let mut freed: Vec<u32> = left.collect();
        for &page in changed.iter().filter(|&&page| live(page) == 0) {
            let at = std::mem::replace(&mut self.of_page[page as usize], NONE);
            freed.extend((at != NONE).then_some(at));
        }
        for &page in &freed {
            dirty.insert(page, self.page(page, 0, &[]));
        }
        // A list may have other pages altogether, for which there is no second room.
        if beside {
            self.left = freed;
        } else {
            self.free.extend(freed);
        }
        for &page in changed.iter().filter(|&&page| live(page) != 0) {
            let at = match self.of_page[page as usize] {
                NONE => self.take()?,
                at => {
                    beside = false;
                    at
                }
            };
            self.of_page[page as usize] = at;
            let ids = &tree.ids()[page as usize * 16..][..16];
            dirty.insert(at, self.page(at, live(page), ids));
        }
        for &id in &young {
            if !self.of_young.contains_key(&id) {
                let at = self.take()?;
                self.of_young.insert(id, at);
                dirty.insert(at, self.page(at, 1, &[id]));
            }
        }
        self.seen = Some(tree.epoch());
        Ok(Told { pages: dirty.into_values().collect(), beside })
    }

    fn take(&mut self) -> Result<u32, Full> {
        if let Some(page) = self.free.pop_first() {
            return Ok(page);
        }
        if self.used == self.room {
            return Err(Full);
        }
        self.used += 1;
        Ok(self.used - 1)
    }

    fn page(&self, page: u32, live: u32, ids: &[KeyId]) -> TreePage {
        let mut to = TreePage { page, head: self.head, live, ..TreePage::default() };
        for (place, id) in
            to.ids.iter_mut().zip(ids).enumerate().filter(|(i, _)| live >> i & 1 == 1).map(|x| x.1)
        {
            *place = *id;
        }
        to
    }
}

#[cfg(test)]
mod tests {
    use floe_index::{Batch, Dci, KeyIndex};

    use super::*;

    const DIM: usize = 32;

    /// What the device would hold: tokens by page.
    #[derive(Default)]
    struct Held(BTreeMap<u32, Vec<u32>>);

    impl Held {
        /// What can be built beside steps touches no page that they look at.
        fn apply(&mut self, told: &Told) {
            let Told { pages, beside } = told;
            let looked_at = |page: &TreePage| self.0.get(&page.page).is_some_and(|held| !held.is_empty());
            assert!(!beside || pages.iter().all(|page| page.live == 0 || !looked_at(page)));
            assert!(pages.windows(2).all(|two| two[0].page < two[1].page), "no page twice");
            for page in pages {
                let live = (0..16).filter(|i| page.live >> i & 1 == 1).map(|i| page.ids[i as usize]);
                self.0.insert(page.page, live.collect());
            }
        }

        fn tokens(&self, used: u32) -> Vec<u32> {
            let mut all: Vec<u32> = self
                .0
                .iter()
                .flat_map(|(page, ids)| {
                    assert!(*page < used, "page {page} of {used}");
                    ids.clone()
                })
                .collect();
            all.sort_unstable();
            all
        }
    }

    fn rows(ids: &[u32]) -> Vec<f32> {
        let noise = |x: u32| (f64::from(x).mul_add(12.9898, 4.1).sin() * 43_758.547).fract() as f32;
        ids.iter()
            .flat_map(|&id| (0..DIM as u32).map(move |d| noise(id * 31 + d) + noise(id % 7 * 5 + d)))
            .collect()
    }

    fn insert(index: &mut Dci, ids: std::ops::Range<u32>) {
        let ids: Vec<u32> = ids.collect();
        let keys = rows(&ids);
        let batch = Batch { ids: &ids, keys: &keys, values: &keys };
        if index.is_empty() { index.build(&batch).unwrap() } else { index.insert(&batch).unwrap() }
    }

    #[test]
    fn device_pages_hold_every_token_once_through_inserts_and_removals() {
        let (mut index, mut mirror, mut held) =
            (Dci::new(DIM).unwrap(), Mirror::new(3, 4096), Held::default());
        let mut step = |index: &Dci, mirror: &mut Mirror, end: u32| {
            let told = mirror.follow(index.pages().unwrap(), None).unwrap();
            assert!(told.pages.iter().all(|page| page.head == 3 && page.page < mirror.used()));
            held.apply(&told);
            assert_eq!(held.tokens(mirror.used()), (16..end).collect::<Vec<_>>());
            (told.pages.len(), told.beside)
        };
        insert(&mut index, 16..2000);
        let (built, beside) = step(&index, &mut mirror, 2000);
        assert!(built >= 124 && !beside);
        assert_eq!(step(&index, &mut mirror, 2000), (0, true), "nothing changed");
        let mut end = 2000;
        let mut sent = 0;
        for _ in 0..40 {
            insert(&mut index, end..end + 16);
            end += 16;
            let (pages, beside) = step(&index, &mut mirror, end);
            assert!(beside, "tokens that join change no page of others");
            sent = pages;
        }
        // Sixteen tokens come, as many leave for a page.
        assert!(sent <= 40, "{sent} pages for sixteen tokens");
        let gone: Vec<u32> = (end - 300..end).collect();
        index.remove(&gone).unwrap();
        step(&index, &mut mirror, end - 300);
        insert(&mut index, end - 300..end + 500);
        step(&index, &mut mirror, end + 500);
        let tight = 125 + 96 + 16 + 1200 / 16;
        assert!((mirror.used() as usize) < tight, "{} pages", mirror.used());
    }

    #[test]
    fn a_full_mirror_says_so_and_starts_anew() {
        let mut index = Dci::new(DIM).unwrap();
        insert(&mut index, 0..320);
        let (mut mirror, mut held) = (Mirror::new(0, 40), Held::default());
        held.apply(&mirror.follow(index.pages().unwrap(), None).unwrap());
        insert(&mut index, 320..400);
        assert!(mirror.follow(index.pages().unwrap(), None).is_err());
        let mut dense = Dci::new(DIM).unwrap();
        insert(&mut dense, 0..400);
        mirror.restart();
        let told = mirror.follow(dense.pages().unwrap(), None).unwrap();
        assert!(!told.beside, "pages of the old tree are looked at");
        held.apply(&told);
        assert_eq!(held.tokens(mirror.used()), (0..400).collect::<Vec<_>>());
    }
}
