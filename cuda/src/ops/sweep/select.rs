//! The best units under a budget.

use half::f16;

use super::super::decode::Spans;
use super::super::{check_aligned, word};
use super::{ScanShape, Sweep};
use crate::device::{DevMut, DevRef, Device, DeviceError, Launch, Stream, Together};

/// As in `select.cu`.
const THREADS: u32 = 1024;
const CLUSTER_MAX: u32 = 8;
/// Static shared memory of a block, and some room.
const SHARED_OTHER: usize = 40 << 10;
/// Bytes that a block keeps for each of its pages: a key, and a place among the pages to be looked at.
const PAGE_BYTES: u32 = 4;

/// What is selected from; what was selected has score -inf afterwards.
#[derive(Debug)]
pub enum UnitsMut<'a> {
    /// Pages, by their scores [num_pages / 16, group, 16]; device.
    Pages(DevMut<'a, f32>),
    /// Whole pages under a budget of tokens, by score less ln count; the list says `ids` [num_pages, 16] of their tokens.
    PagesOfTokens {
        /// [num_pages / 16, group, 16]; device.
        scores: DevMut<'a, f32>,
        /// Places of each page that hold a token, `[num_pages]`, device.
        masks: DevRef<'a, u16>,
    },
    /// Tokens.
    Tokens {
        /// Of pages, [num_pages / 16, group, 16]; device.
        scores: DevRef<'a, f32>,
        /// Of tokens, [num_pages, group, 16]; device.
        residuals: DevMut<'a, f16>,
    },
}

/// What to select and where to put it.
#[derive(Debug)]
pub struct Selection<'a> {
    /// Pages of each item, also where units are tokens.
    pub pages: Spans<'a>,
    /// Log-sum-exp of all units, [items, group]; device.
    pub lse: DevRef<'a, f32>,
    /// Log-sum-exp of what is attended anyway, [items, group]: heads whose mass lies there weigh less. Device.
    pub attended: Option<DevRef<'a, f32>>,
    /// What the list says of a unit, one word each (`num_pages` of pages, `16 num_pages` of tokens, also those of whole pages);
    /// `None`: its number. Device.
    pub ids: Option<DevRef<'a, u32>>,
    /// Units of an item at most; tokens, where whole pages count by theirs.
    pub budget: u32,
    /// Units of each item at most, if fewer, `[items]`; device.
    pub budgets: Option<DevRef<'a, u32>>,
    /// Where each item's list begins in `list`, `[items]`; device.
    pub list_first: DevRef<'a, u32>,
    /// Where it ends, `[items]`, written; device.
    pub list_end: DevMut<'a, u32>,
    /// Room for `budget` entries an item; device.
    pub list: DevMut<'a, u32>,
}

/// Mirrors `floe::SelectParams`.
#[repr(C)]
struct SelectParams {
    scores: u64,
    residuals: u64,
    lse: u64,
    attended: u64,
    first: u64,
    end: u64,
    ids: u64,
    masks: u64,
    budgets: u64,
    list_first: u64,
    list_end: u64,
    list: u64,
    group: u32,
    budget: u32,
    num_pages: u32,
    list_len: u32,
    share: u32,
}

/// Blocks of a cluster, and pages of a block at most.
pub(super) fn division(device: &Device, shape: &ScanShape) -> Result<(u32, u32), DeviceError> {
    let (mut cluster, items) = (1, word("items", shape.items)?.max(1));
    while device.is_hopper()
        && cluster < CLUSTER_MAX
        && items * cluster * 2 <= device.properties().multiprocessors
    {
        cluster *= 2;
    }
    let tiles = word("pages_max", shape.pages_max.div_ceil(16))?;
    let pages = tiles.div_ceil(cluster) * 16;
    let fits = pages as usize * PAGE_BYTES as usize + SHARED_OTHER <= device.properties().shared_bytes_max;
    if !fits || pages > 1 << 16 {
        let expected = "pages whose keys fit into the shared memory of the blocks of an item";
        return Err(DeviceError::Unsupported { field: "pages_max", value: shape.pages_max, expected });
    }
    Ok((cluster, pages))
}

impl Sweep {
    /// Lists the units of the highest keys of each item, at most the budget, and gives them score -inf. A key is the largest
    /// normalised score of the group in steps of 1/128 nat from -31.5 to 0.5; first come those above the last step taken, then those of
    /// that step, each by number.
    ///
    /// # Errors
    /// Shapes that do not fit; what the driver reports.
    pub fn select(
        &mut self,
        stream: &Stream,
        select: Selection<'_>,
        units: UnitsMut<'_>,
    ) -> Result<(), DeviceError> {
        let ScanShape { items, group, num_pages, .. } = self.shape;
        self.check_spans(&select.pages)?;
        select.lse.check("lse", items * group)?;
        if let Some(attended) = select.attended {
            attended.check("attended", items * group)?;
        }
        if let Some(budgets) = select.budgets {
            budgets.check("budgets", items)?;
        }
        select.list_first.check("list_first", items)?;
        select.list_end.check("list_end", items)?;
        select.list.check("list", select.list.len().max(items * select.budget as usize))?;
        let mut of_tokens = 0;
        let (unit, scores, residuals, per_page) = match &units {
            UnitsMut::Pages(scores) => {
                self.check_scores(scores.len(), None)?;
                ("pages", scores.address(), 0, 1)
            }
            UnitsMut::PagesOfTokens { scores, masks } => {
                self.check_scores(scores.len(), None)?;
                masks.check("masks", num_pages)?;
                if let Some(ids) = &select.ids {
                    check_aligned("ids", ids.address())?;
                }
                of_tokens = masks.address();
                if select.ids.is_none() {
                    let expected = "ids of the tokens of pages";
                    return Err(DeviceError::Unsupported { field: "ids", value: 0, expected });
                }
                ("pages", scores.address(), 0, 16)
            }
            UnitsMut::Tokens { scores, residuals } => {
                self.check_scores(scores.len(), Some(residuals.len()))?;
                check_aligned("residuals", residuals.address())?;
                ("tokens", scores.address(), residuals.address(), 16)
            }
        };
        if let Some(ids) = select.ids {
            ids.check("ids", num_pages * per_page)?;
        }
        let params = SelectParams {
            scores,
            residuals,
            lse: select.lse.address(),
            attended: select.attended.map_or(0, |lse| lse.address()),
            first: select.pages.first.address(),
            end: select.pages.end.address(),
            ids: select.ids.map_or(0, |ids| ids.address()),
            masks: of_tokens,
            budgets: select.budgets.map_or(0, |budgets| budgets.address()),
            list_first: select.list_first.address(),
            list_end: select.list_end.address(),
            list: select.list.address(),
            group: word("group", group)?,
            budget: select.budget,
            num_pages: word("num_pages", num_pages)?,
            list_len: word("list", select.list.len())?,
            share: self.select_pages,
        };
        let width = if group <= 4 { 4 } else { group.next_power_of_two() };
        let shared_bytes = self.select_pages * PAGE_BYTES;
        let name = format!("select_{unit}_g{width}");
        let allowed = stream.device().properties().shared_bytes_max - SHARED_OTHER;
        let kernel = stream.device().kernel("select", &name, word("shared memory", allowed)?)?;
        let blocks = (self.cluster, word("items", items)?);
        let launch = Launch { blocks, threads: THREADS, shared_bytes };
        let together = Together { layers: 1, cluster: self.cluster };
        // SAFETY: the layouts match, every buffer has the checked shape, and the kernel begins by waiting for earlier ones.
        unsafe { kernel.launch_early(stream, launch, together, &params) }
    }
}
