//! `page_scores`, `sketch_scores`, `select_topk`, `page_tail`, and whole budgeted steps: 8 kv heads of 4 query heads, 256 tokens.

use anyhow::ensure;
use floe_cuda::device::{DeviceBuffer, DeviceError};
use floe_cuda::ops::{
    DecodeArgs, DecodePlan, DevState, KeySketches, Lists, PageScores, PlanShape, Scan, ScanShape, Scores,
    Select, Spans, Summaries, merge_states, sparse_decode,
};
use floe_cuda::twin::device as twin;
use half::{bf16, f16};

use super::decode::{D, GROUP, HEADS, Output, ROW, params};
use super::rig::{Bounds, Pool, Random, Rig, Row};

/// Tokens that a step attends exactly.
const BUDGET: usize = 256;

/// Which launches of a step are timed.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Part {
    PageScores,
    SketchScores(usize),
    SelectPages,
    SelectTokens,
    TailPages,
    TailTokens,
    StepPages,
    StepTokens(usize),
}

const PARTS: [(&str, Part); 11] = [
    ("page_scores", Part::PageScores),
    ("sketch_scores k1", Part::SketchScores(1)),
    ("sketch_scores k2", Part::SketchScores(2)),
    ("sketch_scores k4", Part::SketchScores(4)),
    ("select_topk pages", Part::SelectPages),
    ("select_topk tokens", Part::SelectTokens),
    ("page_tail pages", Part::TailPages),
    ("page_tail tokens", Part::TailTokens),
    ("step, page summaries", Part::StepPages),
    ("step, k1", Part::StepTokens(1)),
    ("step, k2", Part::StepTokens(2)),
];

pub fn run(rig: &Rig, bounds: &Bounds, rows: &mut Vec<Row>) -> anyhow::Result<()> {
    for context in [131_072, 1 << 20] {
        let case = format!("1 x {context}");
        let parts: Vec<_> = PARTS.into_iter().filter(|(name, _)| rig.wants(name, &case)).collect();
        if parts.is_empty() {
            continue;
        }
        let mut world = World::new(rig, context)?;
        world.verify(rig)?;
        for (kernel, part) in parts {
            let sets = world.sets.len();
            let spread = rig.time(sets, |set| world.launch(rig, set, part))?;
            let bytes = world.bytes(part);
            let gb_s = bytes as f64 / spread.median_us / 1e3;
            let share = gb_s / bounds.copy_gb_s;
            rows.push(Row { kernel, case: case.clone(), bytes, spread, gb_s, share, error: 0.0 });
        }
    }
    Ok(())
}

/// Summaries and sketches of one context.
struct Set {
    keys: DeviceBuffer<bf16>,
    values: DeviceBuffer<bf16>,
    log_count: DeviceBuffer<f32>,
    lines: DeviceBuffer<u32>,
    scales: DeviceBuffer<f16>,
    masks: DeviceBuffer<u16>,
    scores: DeviceBuffer<f32>,
    tokens: DeviceBuffer<f16>,
}

struct World {
    sets: Vec<Set>,
    pool: Pool,
    /// Rows that tokens, and pages, lie in: the identity within the pool.
    first: [DeviceBuffer<u32>; 2],
    end: [DeviceBuffer<u32>; 2],
    q: DeviceBuffer<bf16>,
    q_rotated: DeviceBuffer<f16>,
    lse: DeviceBuffer<f32>,
    list_first: DeviceBuffer<u32>,
    list_end: DeviceBuffer<u32>,
    list: DeviceBuffer<u32>,
    scan: Scan,
    plan: DecodePlan,
    exact: Output,
    tail: Output,
    merged: Output,
    /// Pages of an item.
    pages: usize,
    host_q: Vec<bf16>,
    host_keys: Vec<bf16>,
}

impl World {
    fn new(rig: &Rig, context: usize) -> anyhow::Result<Self> {
        let pages = context / 16;
        let num = HEADS * pages;
        let mut random = Random(context as u64);
        let device = &rig.device;
        let host_keys = random.normals(1 << 20);
        let repeat = |block: &[bf16], len: usize| -> Result<DeviceBuffer<bf16>, DeviceError> {
            let mut buffer = DeviceBuffer::zeros(device, len)?;
            for start in (0..len).step_by(block.len()) {
                buffer.write_at(start, &block[..block.len().min(len - start)])?;
            }
            Ok(buffer)
        };
        let bits: Vec<u32> = (0..num * 4 * D / 2).map(|_| random.bits() as u32).collect();
        let scales: Vec<f16> = (0..num * 16).map(|_| f16::from_f32(0.4)).collect();
        // Two sets of a 128K context are 230 MB and more.
        let sets = (0..2)
            .map(|_| {
                Ok(Set {
                    keys: repeat(&host_keys, num * D)?,
                    values: repeat(&host_keys, num * D)?,
                    log_count: DeviceBuffer::from_slice(device, &vec![16f32.ln(); num])?,
                    lines: DeviceBuffer::from_slice(device, &bits)?,
                    scales: DeviceBuffer::from_slice(device, &scales)?,
                    masks: DeviceBuffer::from_slice(device, &vec![u16::MAX; num])?,
                    scores: DeviceBuffer::zeros(device, num * GROUP)?,
                    tokens: DeviceBuffer::zeros(device, num * GROUP * 16)?,
                })
            })
            .collect::<Result<_, DeviceError>>()?;
        let spans = |unit: usize| -> Result<[DeviceBuffer<u32>; 2], DeviceError> {
            let at = |i: usize| (i * pages * unit) as u32;
            let first: Vec<u32> = (0..HEADS).map(at).collect();
            let end: Vec<u32> = (1..=HEADS).map(at).collect();
            Ok([DeviceBuffer::from_slice(device, &first)?, DeviceBuffer::from_slice(device, &end)?])
        };
        let ([page_first, page_end], [token_first, token_end]) = (spans(1)?, spans(16)?);
        let host_q = random.normals(HEADS * GROUP * D);
        let rotated: Vec<f16> = host_q.iter().map(|x| f16::from_f32(x.to_f32() * params().scale)).collect();
        let shape = ScanShape { items: HEADS, group: GROUP, head_dim: D, pages_max: pages, num_pages: num };
        let rows_max = [BUDGET as u32; HEADS];
        let list_first: Vec<u32> = (0..HEADS).map(|i| (i * BUDGET) as u32).collect();
        Ok(Self {
            sets,
            pool: Pool::new(rig, num * 16 * ROW)?,
            first: [page_first, token_first],
            end: [page_end, token_end],
            q: DeviceBuffer::from_slice(device, &host_q)?,
            q_rotated: DeviceBuffer::from_slice(device, &rotated)?,
            lse: DeviceBuffer::zeros(device, HEADS * GROUP)?,
            list_first: DeviceBuffer::from_slice(device, &list_first)?,
            list_end: DeviceBuffer::zeros(device, HEADS)?,
            list: DeviceBuffer::zeros(device, HEADS * BUDGET)?,
            scan: Scan::new(device, shape)?,
            plan: DecodePlan::new(device, PlanShape { rows_max: &rows_max, group: GROUP, head_dim: D })?,
            exact: Output::new(rig, HEADS * GROUP)?,
            tail: Output::new(rig, HEADS * GROUP)?,
            merged: Output::new(rig, HEADS * GROUP)?,
            pages,
            host_q,
            host_keys,
        })
    }

    /// Page scores and selection of the first item against their twins.
    fn verify(&mut self, rig: &Rig) -> anyhow::Result<()> {
        self.launch(rig, 0, Part::PageScores)?;
        let tiles = self.sets[0].scores.read(&rig.stream)?;
        let lse = self.lse.read(&rig.stream)?;
        let n = self.pages;
        let keys: Vec<bf16> = self.host_keys.iter().cycle().take(n * D).copied().collect();
        let counts = vec![16f32.ln(); n];
        let (want, want_lse) = twin::page_scores(&self.host_q[..GROUP * D], &keys, &counts, params().scale);
        let got: Vec<f32> = (0..GROUP)
            .flat_map(|g| (0..n).map(move |u| (u / 16 * GROUP + g) * 16 + u % 16))
            .map(|at| tiles[at])
            .collect();
        let far = |x: &[f32], y: &[f64]| x.iter().zip(y).all(|(x, y)| (f64::from(*x) - y).abs() < 1e-3);
        ensure!(far(&got, &want) && far(&lse[..GROUP], &want_lse), "page scores differ from the twin's");
        self.launch(rig, 0, Part::SelectPages)?;
        let list = self.list.read(&rig.stream)?;
        let want = twin::select_topk(&got, &lse[..GROUP], BUDGET / 16);
        ensure!(list[..want.len()] == want, "the selection differs from the twin's");
        // Token scores exist from here on, so that a selection or tail of its own has something to read.
        for set in 0..self.sets.len() {
            self.launch(rig, set, Part::PageScores)?;
            self.launch(rig, set, Part::SketchScores(1))?;
        }
        Ok(())
    }

    /// Bytes that have to cross the memory bus.
    fn bytes(&self, part: Part) -> usize {
        let pages = HEADS * self.pages;
        let (means, page_scores, token_scores) = (pages * D * 2, pages * GROUP * 4, pages * 16 * GROUP * 2);
        let sketch = |bits: usize| pages * 16 * (bits * D / 8 + 2);
        let exact = HEADS * BUDGET * ROW * 2;
        match part {
            Part::PageScores => means + page_scores,
            Part::SketchScores(bits) => sketch(bits) + page_scores + token_scores,
            Part::SelectPages => page_scores,
            Part::SelectTokens => token_scores,
            Part::TailPages => means + page_scores,
            Part::TailTokens => means + token_scores,
            Part::StepPages => 2 * means + 3 * page_scores + exact,
            Part::StepTokens(bits) => 2 * means + 2 * page_scores + sketch(bits) + 3 * token_scores + exact,
        }
    }

    fn launch(&mut self, rig: &Rig, set: usize, part: Part) -> Result<(), DeviceError> {
        match part {
            Part::PageScores => self.page_scores(rig, set),
            Part::SketchScores(bits) => self.sketch_scores(rig, set, bits),
            Part::SelectPages => self.select(rig, set, false),
            Part::SelectTokens => self.select(rig, set, true),
            Part::TailPages => self.tail(rig, set, false),
            Part::TailTokens => self.tail(rig, set, true),
            Part::StepPages => {
                self.page_scores(rig, set)?;
                self.select(rig, set, false)?;
                self.tail(rig, set, false)?;
                self.exact(rig, false)
            }
            Part::StepTokens(bits) => {
                self.page_scores(rig, set)?;
                self.sketch_scores(rig, set, bits)?;
                self.select(rig, set, true)?;
                self.tail(rig, set, true)?;
                self.exact(rig, true)
            }
        }
    }

    fn page_scores(&mut self, rig: &Rig, set: usize) -> Result<(), DeviceError> {
        let pages = Spans { first: self.first[0].view(), end: self.end[0].view() };
        let set = &mut self.sets[set];
        let summaries = Summaries { keys: set.keys.view(), log_count: set.log_count.view(), pages };
        let q = (self.q.view(), params().scale);
        self.scan.page_scores(&rig.stream, q, &summaries, set.scores.view_mut(), self.lse.view_mut())
    }

    fn sketch_scores(&mut self, rig: &Rig, set: usize, bits: usize) -> Result<(), DeviceError> {
        let pages = Spans { first: self.first[0].view(), end: self.end[0].view() };
        let set = &mut self.sets[set];
        let lines = set.lines.view().slice(0..HEADS * self.pages * bits * D / 2)?;
        let sketches = KeySketches { bits, lines, scales: set.scales.view(), masks: set.masks.view() };
        let of = PageScores {
            scores: set.scores.view(),
            log_count: set.log_count.view(),
            lse: self.lse.view(),
            pages,
        };
        self.scan.sketch_scores(&rig.stream, self.q_rotated.view(), &sketches, &of, set.tokens.view_mut())
    }

    fn select(&mut self, rig: &Rig, set: usize, tokens: bool) -> Result<(), DeviceError> {
        let unit = usize::from(tokens);
        let select = Select {
            pages: Spans { first: self.first[unit].view(), end: self.end[unit].view() },
            lse: (!tokens).then(|| self.lse.view()),
            ids: None,
            budget: if tokens { BUDGET } else { BUDGET / 16 } as u32,
            list_first: self.list_first.view(),
            list_end: self.list_end.view_mut(),
            list: self.list.view_mut(),
        };
        let set = &mut self.sets[set];
        let scores =
            if tokens { Scores::Tokens(set.tokens.view_mut()) } else { Scores::Pages(set.scores.view_mut()) };
        self.scan.select_topk(&rig.stream, select, scores)
    }

    fn tail(&mut self, rig: &Rig, set: usize, tokens: bool) -> Result<(), DeviceError> {
        let pages = Spans { first: self.first[0].view(), end: self.end[0].view() };
        let Set { scores, tokens: token_scores, values, log_count, .. } = &mut self.sets[set];
        let of =
            if tokens { Scores::Tokens(token_scores.view_mut()) } else { Scores::Pages(scores.view_mut()) };
        let empty = scores_of_pages(log_count, &self.lse, pages)?;
        let state = DevState { out: self.tail.out.view_mut(), lse: self.tail.lse.view_mut() };
        self.scan.page_tail(&rig.stream, &of, values.view(), &empty, state)
    }

    fn exact(&mut self, rig: &Rig, tokens: bool) -> Result<(), DeviceError> {
        let args =
            DecodeArgs { q: self.q.view(), kv: self.pool.device.view(), params: params(), skip_below: None };
        let spans = Spans { first: self.list_first.view(), end: self.list_end.view() };
        let lists = if tokens {
            Lists::Rows { spans, rows: self.list.view() }
        } else {
            Lists::Pages { spans, slots: self.list.view(), masks: None }
        };
        sparse_decode(&rig.stream, &mut self.plan, &args, lists, self.exact.state())?;
        let parts =
            [(self.exact.out.view(), self.exact.lse.view()), (self.tail.out.view(), self.tail.lse.view())];
        merge_states(&rig.stream, &parts, self.merged.state())
    }
}

/// The parts of [`PageScores`] that a tail reads.
fn scores_of_pages<'a>(
    log_count: &'a DeviceBuffer<f32>,
    lse: &'a DeviceBuffer<f32>,
    pages: Spans<'a>,
) -> Result<PageScores<'a>, DeviceError> {
    Ok(PageScores {
        scores: log_count.view().slice(0..0)?,
        log_count: log_count.view(),
        lse: lse.view(),
        pages,
    })
}
