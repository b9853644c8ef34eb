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
