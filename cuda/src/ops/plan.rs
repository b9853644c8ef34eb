//! How the rows of each item are divided over thread blocks.

use super::{PAGE_ROWS, check_head_dim, word};
use crate::device::{Device, DeviceBuffer, DeviceError};

/// Splits of one item at most: the joining block keeps a weight per split and head in shared memory.
const SPLITS_MAX: u32 = 256;
/// What a block costs beside its tiles, and what joining splits costs, in tiles. On an H100, 256 tokens of 8 items took 8.2 us
/// uncut and 7.6 us in six splits, 128 tokens uncut 5.2 us: a join costs about what eight to ten tiles of a block do.
const BLOCK_TILES: u64 = 8;
const JOIN_TILES: u64 = 10;
/// Blocks that share a multiprocessor: each asks for 96 KiB of shared memory, and registers allow two.
const BLOCKS_PER_MULTIPROCESSOR: u32 = 2;

/// What a plan is made for.
#[derive(Debug, Clone, Copy)]
pub struct PlanShape<'a> {
    /// Most rows (16 a page) that each item will have. An item may have fewer at any step. More are attended too, only slower, unless
    /// all items are planned to have few: then they are left out and reported.
    pub rows_max: &'a [u32],
    /// Query heads of an item, 1 to 16.
    pub group: usize,
    /// Dimensions of a head: 64, 96, 128 or 256.
    pub head_dim: usize,
}

/// A division of items over thread blocks, with the memory for partial states. Made once for a shape, used every step: the
/// division depends on `rows_max` and the device alone, and so do the bits of the results, up to each step's lists.
#[derive(Debug)]
pub struct DecodePlan {
    pub(super) work: DeviceBuffer<[u32; 4]>,
    pub(super) part_out: DeviceBuffer<f32>,
    pub(super) part_lse: DeviceBuffer<f32>,
    pub(super) arrived: DeviceBuffer<u32>,
    pub(super) blocks: u32,
    /// Tiles of a block at most.
    pub(super) share: u32,
    /// Splits of every item, or 0 where items differ: kernels save a read of `work`.
    pub(super) uniform_splits: u32,
    pub(super) items: usize,
    pub(super) group: usize,
    pub(super) head_dim: usize,
}

impl DecodePlan {
    /// Divides and allocates.
    ///
    /// # Errors
    /// A group or head size without a kernel, more rows than fit 32 bits, no memory.
    pub fn new(device: &Device, shape: PlanShape<'_>) -> Result<Self, DeviceError> {
        check_head_dim(shape.head_dim)?;
        if !(1..=16).contains(&shape.group) {
            return Err(DeviceError::Unsupported { field: "group", value: shape.group, expected: "1 to 16" });
        }
        let tiles: Vec<u32> = shape.rows_max.iter().map(|rows| rows.div_ceil(PAGE_ROWS as u32)).collect();
        let capacity = device.properties().multiprocessors * BLOCKS_PER_MULTIPROCESSOR;
        let (work, parts) = divide(&tiles, capacity);
        let heads = parts as usize * shape.group;
        let share = work.iter().map(|w| tiles[w[0] as usize].div_ceil(w[2])).max().unwrap_or(0);
        Ok(Self {
            blocks: word("blocks", work.len())?,
            share,
            uniform_splits: work
                .first()
                .map_or(0, |w| if work.iter().all(|x| x[2] == w[2]) { w[2] } else { 0 }),
            work: DeviceBuffer::from_slice(device, &work)?,
            part_out: DeviceBuffer::zeros(device, heads * shape.head_dim)?,
            part_lse: DeviceBuffer::zeros(device, heads)?,
            arrived: DeviceBuffer::zeros(device, tiles.len())?,
            items: tiles.len(),
            group: shape.group,
            head_dim: shape.head_dim,
        })
    }

    /// Items planned for.
    pub fn items(&self) -> usize {
        self.items
    }

    /// Thread blocks of a launch.
    pub fn blocks(&self) -> u32 {
        self.blocks
    }
}

/// Blocks (item, split, splits of the item, first partial state of the item), and the number of partial states.
///
/// Every split of at most `share` tiles costs its tiles and a constant; blocks run in waves of `capacity`. The share with the
/// least estimated time wins, the larger one of equals (fewer splits to join). Long items first would not help: all are cut
/// to the same share.
fn divide(tiles: &[u32], capacity: u32) -> (Vec<[u32; 4]>, u32) {
    let longest = tiles.iter().copied().max().unwrap_or(0).max(1);
    let splits_of = |tiles: u32, share: u32| tiles.div_ceil(share).clamp(1, SPLITS_MAX);
    let mut best = (u64::MAX, longest);
    for parts in 1..=SPLITS_MAX.min(longest) {
        let share = longest.div_ceil(parts);
        let blocks: u64 = tiles.iter().map(|&t| u64::from(splits_of(t, share))).sum();
        let waves = blocks.div_ceil(u64::from(capacity.max(1)));
        let join = if parts > 1 { JOIN_TILES + u64::from(parts) / 8 } else { 0 };
        let cost = waves * (u64::from(share) + BLOCK_TILES) + join;
        if cost < best.0 {
            best = (cost, share);
        }
    }
    let (mut work, mut parts) = (Vec::new(), 0);
    for (item, &tiles) in tiles.iter().enumerate() {
        let splits = splits_of(tiles, best.1);
        work.extend((0..splits).map(|split| [item as u32, split, splits, parts]));
        if splits > 1 {
            parts += splits;
        }
    }
    (work, parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divide_gives_every_item_all_its_splits_once() {
        for tiles in [vec![], vec![0], vec![0, 1, 7, 65_536], vec![16; 512], vec![8192; 8]] {
            let (work, parts) = divide(&tiles, 264);
            let mut next_part = 0;
            let mut blocks = work.iter();
            for item in 0..tiles.len() as u32 {
                let first = blocks.next().unwrap();
                assert_eq!((first[0], first[1], first[3]), (item, 0, next_part), "{tiles:?}");
                for split in 1..first[2] {
                    assert_eq!(blocks.next().unwrap(), &[item, split, first[2], first[3]]);
                }
                next_part += if first[2] > 1 { first[2] } else { 0 };
            }
            assert!(blocks.next().is_none() && parts == next_part, "{tiles:?}");
        }
    }

    #[test]
    fn divide_of_one_long_batch_fills_the_device_once() {
        let (work, _) = divide(&[8192; 8], 264);
        assert!((256..=264).contains(&work.len()), "{} blocks", work.len());
        // Many short items are not cut at all.
        assert_eq!(divide(&[16; 512], 264).0.len(), 512);
    }
}
