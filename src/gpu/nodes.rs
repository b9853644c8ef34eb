//! Super-nodes of a tree that stand for their pages on the device, where the host's search says which pages are listed there.

use floe_index::{Dci, KeyIndex};

use super::mirror::Full;

/// What the device is told of a super-node.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct NodeUpdate {
    /// Its number.
    pub(super) node: u32,
    /// Natural log of the tokens it stands for; -inf where its pages are listed.
    pub(super) log_count: f32,
    /// Its summary, where that changed.
    pub(super) summary: Option<Summary>,
}

/// Means and spread of a super-node.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Summary {
    pub(super) key: Vec<f32>,
    pub(super) value: Vec<f32>,
    pub(super) spread: f32,
}

/// A node as the device has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sent {
    count: u32,
    spread: u32,
    opened: bool,
}

/// The device's super-nodes of one tree.
#[derive(Debug)]
pub(super) struct NodeMirror {
    sent: Vec<Sent>,
    room: usize,
}

impl NodeMirror {
    pub(super) fn new(room: usize) -> Self {
        Self { sent: Vec::new(), room }
    }

    /// Of another tree from now on.
    pub(super) fn restart(&mut self) {
        self.sent.fill(Sent { count: u32::MAX, spread: 0, opened: true });
    }

    /// Appends the nodes that differ from what was last appended, by number. Nodes with `opened` stand for nothing.
    pub(super) fn follow(
        &mut self,
        tree: &Dci,
        opened: &[bool],
        to: &mut Vec<NodeUpdate>,
    ) -> Result<(), Full> {
        let num = tree.num_super_nodes();
        if num > self.room {
            return Err(Full);
        }
        let none = Sent { count: 0, spread: 0, opened: true };
        self.sent.resize(self.sent.len().max(num), none);
        for (node, sent) in self.sent.iter_mut().enumerate() {
            let (count, spread) = if node < num { tree.super_node(node) } else { (0, 0.0) };
            let is_open = opened.get(node).copied().unwrap_or(false);
            let now = Sent { count, spread: spread.to_bits(), opened: is_open };
            if now == *sent {
                continue;
            }
            let changed = (now.count, now.spread) != (sent.count, sent.spread);
            let summary = (changed && count > 0).then(|| {
                let mut summary =
                    Summary { key: vec![0.0; tree.dim()], value: vec![0.0; tree.dim()], spread };
                tree.super_node_means(node, &mut summary.key, &mut summary.value);
                summary
            });
            let stands = count > 0 && !is_open;
            let log_count = if stands { (count as f32).ln() } else { f32::NEG_INFINITY };
            to.push(NodeUpdate { node: node as u32, log_count, summary });
            *sent = now;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use floe_index::Batch;

    use super::*;
    use crate::gpu::mirror::Mirror;

    const DIM: usize = 32;

    fn insert(index: &mut Dci, ids: std::ops::Range<u32>) {
        let ids: Vec<u32> = ids.collect();
        let noise = |x: u32| (f64::from(x).mul_add(12.9898, 4.1).sin() * 43_758.547).fract() as f32;
        let row = |id: &u32| {
            (0..DIM as u32).map(|d| noise(id * 31 + d) + noise(id % 7 * 5 + d)).collect::<Vec<_>>()
        };
        let keys: Vec<f32> = ids.iter().flat_map(row).collect();
        let batch = Batch { ids: &ids, keys: &keys, values: &keys };
        if index.is_empty() { index.build(&batch).unwrap() } else { index.insert(&batch).unwrap() }
    }

    #[test]
    fn listed_pages_and_the_other_super_nodes_hold_every_token_once() {
        let mut index = Dci::new(DIM).unwrap();
        let (mut pages, mut nodes) = (Mirror::new(0, 4096), NodeMirror::new(200));
        let (mut held, mut standing) = (BTreeMap::new(), BTreeMap::new());
        let mut end = 6000;
        insert(&mut index, 0..end);
        for turn in 0..20u32 {
            let num = index.num_super_nodes();
            let opened: Vec<bool> = (0..num).map(|node| (node as u32 * 7 + turn / 2 * 5) % 11 < 3).collect();
            let mut updates = Vec::new();
            let listed = pages.follow(index.pages().unwrap(), Some(&opened)).unwrap().pages;
            nodes.follow(&index, &opened, &mut updates).unwrap();
            held.extend(listed.iter().map(|page| (page.page, page.live.count_ones())));
            for update in updates {
                assert!(
                    update.summary.as_ref().is_none_or(|summary| summary.key.iter().all(|x| x.is_finite()))
                );
                standing.insert(update.node, update.log_count);
            }
            let of_pages: u32 = held.values().sum();
            let of_nodes: f64 = standing.values().map(|log| f64::from(*log).exp()).sum();
            assert_eq!(of_pages + of_nodes.round() as u32, end, "turn {turn}");
            assert!(of_pages < end / 2, "turn {turn}: {of_pages} listed");
            if turn % 2 == 1 {
                insert(&mut index, end..end + 48);
                end += 48;
            }
        }
        assert_eq!(NodeMirror::new(3).follow(&index, &[], &mut Vec::new()), Err(Full));
    }
}
