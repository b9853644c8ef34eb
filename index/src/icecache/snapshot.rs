//! The tree as bytes and back: link by link, because a tree that grew by insertions and removals is not the one that a build
//! from its tokens would give, and a restored index has to go on as the saved one.

use half::bf16;

use super::Icecache;
use super::levels::Levels;
use super::store::{Child, Line, NONE, Node, ROOT, Store};
use crate::blocks::LANES;
use crate::error::IndexError;
use crate::idmap::{IdMap, Place};
use crate::snapshot::{Reader, Writer};

pub(super) fn write(index: &Icecache, to: &mut Writer) {
    let Icecache { store, levels, .. } = index;
    to.len(store.dim);
    to.f32s(&store.line.direction);
    to.f32s(&[store.line.lift]);
    to.f64s(&[store.radius_sq]);
    let counts: Vec<u32> = levels.counts.iter().map(|&n| n as u32).collect();
    list(to, &counts);
    to.len(levels.next);

    list(to, &store.ids);
    to.bytes(&store.live.iter().map(|&live| u8::from(live)).collect::<Vec<u8>>());
    to.f64s(&store.norm_sq);
    to.f32s(&store.along);
    to.bytes(&store.level);
    to.u32s(&store.parent);
    to.f32s(&store.parent_dot);
    to.u32s(&store.node);
    to.u32s(&store.place);
    list(to, &store.free);

    list(to, &store.owner);
    for node in &store.nodes {
        to.f64s(&[node.radius_sq]);
        to.len(node.level);
        list(to, &node.children.iter().map(|c| c.token).collect::<Vec<u32>>());
        to.f32s(&node.children.iter().map(|c| c.along).collect::<Vec<f32>>());
    }
    list(to, &store.free_nodes);

    list(to, &store.fill);
    to.u32s(&store.lanes);
    to.u16s(&store.keys.iter().map(|k| k.to_bits()).collect::<Vec<u16>>());
    list(to, &store.free_pages);
}

fn list(to: &mut Writer, x: &[u32]) {
    to.len(x.len());
    to.u32s(x);
}

fn read_list(from: &mut Reader<'_>) -> Result<Vec<u32>, IndexError> {
    let len = from.len()?;
    from.u32s(len)
}

/// Store and levels of a snapshot with the map from ids to slots, every link checked.
pub(super) fn read(from: &mut Reader<'_>, mut store: Store) -> Result<(Store, Levels, IdMap), IndexError> {
    store.line = Line { direction: from.f32s(store.dim)?, lift: from.f32s(1)?[0] };
    store.radius_sq = from.f64s(1)?[0];
    let counts = read_list(from)?.into_iter().map(|n| n as usize).collect();
    let levels = Levels { counts, next: from.len()? };

    store.ids = read_list(from)?;
    let n = store.ids.len();
    store.live = from.take(n)?.iter().map(|&live| live != 0).collect();
    store.norm_sq = from.f64s(n)?;
    store.along = from.f32s(n)?;
    store.level = from.take(n)?.to_vec();
    store.parent = from.u32s(n)?;
    store.parent_dot = from.f32s(n)?;
    store.node = from.u32s(n)?;
    store.place = from.u32s(n)?;
    store.free = read_list(from)?;

    store.owner = read_list(from)?;
    store.nodes.clear();
    for _ in 0..store.owner.len() {
        let (radius_sq, level, tokens) = (from.f64s(1)?[0], from.len()?, read_list(from)?);
        let along = from.f32s(tokens.len())?;
        let children = tokens.into_iter().zip(along).map(|(token, along)| Child { along, token }).collect();
        store.nodes.push(Node { radius_sq, level, children });
    }
    store.free_nodes = read_list(from)?;

    store.fill = read_list(from)?;
    let slots = store.fill.len().checked_mul(LANES).ok_or_else(|| from.damaged("length"))?;
    store.lanes = from.u32s(slots)?;
    let elems = slots.checked_mul(store.dim).ok_or_else(|| from.damaged("length"))?;
    store.keys = from.u16s(elems)?.into_iter().map(bf16::from_bits).collect();
    from.check(store.keys.iter().all(|k| k.is_finite()), "a number is not finite")?;
    store.free_pages = read_list(from)?;

    if let Some(what) = fault(&store, &levels) {
        return Err(from.damaged(what));
    }
    let mut map = IdMap::default();
    for slot in (0..n).filter(|&slot| store.live[slot]) {
        from.check(map.get(store.ids[slot]).is_none(), "an id occurs twice")?;
        map.set(store.ids[slot], Place::Slot(slot));
    }
    Ok((store, levels, map))
}

/// The first link that leads astray, in words. Whatever passes can be searched, grown and cut without a panic.
fn fault(store: &Store, levels: &Levels) -> Option<&'static str> {
    let n = store.ids.len();
    let mut unused = vec![false; n];
    for &slot in &store.free {
        match unused.get_mut(slot as usize) {
            Some(seen) if !*seen && !store.live[slot as usize] => *seen = true,
            _ => return Some("a free slot"),
        }
    }
    let mut counts = vec![0; levels.counts.len()];
    for slot in (0..n).filter(|&slot| !unused[slot]) {
        match counts.get_mut(usize::from(store.level[slot])) {
            Some(count) => *count += 1,
            None => return Some("a token's level"),
        }
        let node = store.node[slot];
        if (node == NONE) != (store.level[slot] == 0)
            || (node != NONE && store.owner.get(node as usize) != Some(&(slot as u32)))
        {
            return Some("a token's node");
        }
    }
    if counts != levels.counts || levels.next > levels.counts.len() {
        return Some("level counts");
    }
    nodes_fault(store, levels, &unused).or_else(|| pages_fault(store))
}

fn nodes_fault(store: &Store, levels: &Levels, unused: &[bool]) -> Option<&'static str> {
    if store.owner.first() != Some(&NONE) || store.nodes[ROOT as usize].level != levels.top() {
        return Some("the root");
    }
    let mut idle = vec![false; store.nodes.len()];
    for &node in &store.free_nodes {
        match idle.get_mut(node as usize) {
            Some(seen) if !*seen && node != ROOT => *seen = true,
            _ => return Some("a free node"),
        }
    }
    let mut placed = vec![false; store.ids.len()];
    let mut runs = 0;
    for (i, node) in store.nodes.iter().enumerate() {
        let owner = store.owner[i];
        let owned = match owner {
            NONE => i == ROOT as usize || (idle[i] && node.children.is_empty()),
            token => {
                let token = token as usize;
                store.node.get(token) == Some(&(i as u32))
                    && !unused[token]
                    && !idle[i]
                    && usize::from(store.level[token]) == node.level + 1
            }
        };
        if !owned {
            return Some("a node's owner");
        }
        let mut page_before = None;
        for child in &node.children {
            let token = child.token as usize;
            let ok = token < placed.len()
                && !placed[token]
                && !unused[token]
                && store.parent[token] == i as u32
                && usize::from(store.level[token]) == node.level
                && store.lanes.get(store.place[token] as usize) == Some(&child.token);
            if !ok {
                return Some("a node's child");
            }
            placed[token] = true;
            let page = store.place[token] as usize / LANES;
            runs += usize::from(page_before != Some(page));
            page_before = Some(page);
        }
        if !node.children.is_sorted_by(|a, b| a.along.total_cmp(&b.along).is_le()) {
            return Some("the order of a node's children");
        }
    }
    if placed.iter().zip(unused).any(|(placed, unused)| placed == unused) {
        return Some("a token without a parent");
    }
    // Each page is one run of one node's children.
    (runs != store.fill.iter().filter(|&&fill| fill > 0).count()).then_some("a page of two nodes")
}

fn pages_fault(store: &Store) -> Option<&'static str> {
    let mut lanes = store.lanes.chunks_exact(LANES).zip(&store.fill).enumerate();
    let full = lanes.all(|(page, (lanes, &fill))| {
        let held = lanes.iter().enumerate().filter(|(_, t)| **t != NONE);
        let mut at_home = held
            .clone()
            .map(|(lane, &t)| store.place.get(t as usize) == Some(&((page * LANES + lane) as u32)));
        held.count() == fill as usize && at_home.all(|home| home)
    });
    if !full {
        return Some("a page's tokens");
    }
    let mut free: Vec<u32> = store.free_pages.clone();
    free.sort_unstable();
    let empty = (0..store.fill.len() as u32).filter(|&page| store.fill[page as usize] == 0);
    (!free.into_iter().eq(empty)).then_some("a free page")
}
