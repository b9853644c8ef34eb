//! Passes over summaries and sketches, and whole budgeted steps: 8 kv heads of 4 query heads, 256 tokens attended exactly.

use anyhow::ensure;
use floe_cuda::device::{DeviceBuffer, DeviceError, PinnedBuffer};
use floe_cuda::ops::sweep::{
    Beside, KeyCodes, PageKeys, Rotation, Selection, Sweep, TailArgs, TailUnits, TokenScores, TokenScoresMut,
    UnitsMut, ValueCodes,
};
use floe_cuda::ops::{DecodeArgs, DecodePlan, HOST_ENTRY, Lists, PlanShape, ScanShape, Spans, Summaries};
use floe_cuda::twin::device as twin;
use half::{bf16, f16};

use super::decode::{D, GROUP, HEADS, Output, ROW, params};
use super::rig::{Bounds, Pool, Random, Rig, Row};

/// Tokens that a step attends exactly.
const BUDGET: usize = 256;
/// Rows of the host side; lists name them at random.
const HOST_ROWS: usize = 1 << 17;
/// Every so many rows or pages are absent from the device, in steps with misses.
const MISS_EVERY: u32 = 10;

/// Bits of keys and values, or whole pages.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Unit {
    Pages,
    Tokens(usize, usize),
}

/// Which launches are timed.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Part {
    Scores(Unit),
    Select(Unit),
    ScoresAndSelect(Unit),
    Tail(Unit),
    Exact(Unit),
    /// Everything, with every row on the device or one in ten on the host.
    Step(Unit),
    StepWithMisses(Unit),
}

const K1: Unit = Unit::Tokens(1, 0);
const K2V1: Unit = Unit::Tokens(2, 1);

const PARTS: [(&str, Part); 23] = [
    ("page_scores", Part::Scores(Unit::Pages)),
    ("token_scores k1", Part::Scores(K1)),
    ("token_scores k2", Part::Scores(K2V1)),
    ("token_scores k4", Part::Scores(Unit::Tokens(4, 2))),
    ("select pages", Part::Select(Unit::Pages)),
    ("select tokens", Part::Select(K1)),
    ("scores and select pages", Part::ScoresAndSelect(Unit::Pages)),
    ("scores and select k1", Part::ScoresAndSelect(K1)),
    ("scores and select k2", Part::ScoresAndSelect(K2V1)),
    ("tail pages", Part::Tail(Unit::Pages)),
    ("tail v0", Part::Tail(K1)),
    ("tail v1", Part::Tail(K2V1)),
    ("tail v2", Part::Tail(Unit::Tokens(2, 2))),
    ("exact pages", Part::Exact(Unit::Pages)),
    ("exact rows", Part::Exact(K1)),
    ("step pages", Part::Step(Unit::Pages)),
    ("step k1", Part::Step(K1)),
    ("step k1v1", Part::Step(Unit::Tokens(1, 1))),
    ("step k2v1", Part::Step(K2V1)),
    ("step k2v2", Part::Step(Unit::Tokens(2, 2))),
    ("step pages, 1 in 10 absent", Part::StepWithMisses(Unit::Pages)),
    ("step k1, 1 in 10 absent", Part::StepWithMisses(K1)),
    ("step k2v1, 1 in 10 absent", Part::StepWithMisses(K2V1)),
];

pub fn run(rig: &Rig, bounds: &Bounds, rows: &mut Vec<Row>) -> anyhow::Result<()> {
    for context in [32_768, 131_072, 139_264, 1 << 20] {
        let case = format!("1 x {context}");
        let parts: Vec<_> = PARTS.into_iter().filter(|(name, _)| rig.wants(name, &case)).collect();
        if parts.is_empty() {
            continue;
        }
        let mut world = World::new(rig, context)?;
        world.verify(rig)?;
        for (kernel, part) in parts {
            // A selection marks what it took: each starts from scores of its own kind.
            if let Part::Select(unit) | Part::Tail(unit) | Part::Exact(unit) = part {
                for set in 0..world.sets.len() {
                    world.launch(rig, set, Part::Scores(unit))?;
                    world.launch(rig, set, Part::Select(unit))?;
                }
            }
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
    key_lines: DeviceBuffer<u32>,
    value_lines: DeviceBuffer<u32>,
    scales: DeviceBuffer<f16>,
    masks: DeviceBuffer<u16>,
    scores: DeviceBuffer<f32>,
    residuals: DeviceBuffer<f16>,
}

struct World {
    sets: Vec<Set>,
    pool: Pool,
    host: PinnedBuffer<bf16>,
    /// Row or page of each unit, one in ten on the host: of pages and of tokens.
    absent: [DeviceBuffer<u32>; 2],
    first: DeviceBuffer<u32>,
    end: DeviceBuffer<u32>,
    signs: DeviceBuffer<f32>,
    q: DeviceBuffer<bf16>,
    lse: DeviceBuffer<f32>,
    list_first: DeviceBuffer<u32>,
    list_end: DeviceBuffer<u32>,
    list: DeviceBuffer<u32>,
    sweep: Sweep,
    plan: DecodePlan,
    tail: Output,
    all: Output,
    /// Pages of an item.
    pages: usize,
    host_q: Vec<bf16>,
    host_keys: Vec<bf16>,
    host_bits: Vec<u32>,
    host_signs: Vec<f32>,
}

/// Scale of every key code.
const KEY_SCALE: f32 = 0.4;

impl World {
    fn new(rig: &Rig, context: usize) -> anyhow::Result<Self> {
        let pages = context / 16;
        let num = HEADS * pages;
        let mut random = Random(context as u64);
        let device = &rig.device;
        let host_keys = random.normals(1 << 20);
        let host_bits: Vec<u32> = (0..1 << 20).map(|_| random.bits() as u32).collect();
        // Two sets of a 128K context are 230 MB and more; of a 32K context it takes six.
        let count = if context < 100_000 { 6 } else { 2 };
        let means = || -> Result<DeviceBuffer<bf16>, DeviceError> {
            let mut buffer = DeviceBuffer::zeros(device, num * D)?;
            repeat(num * D, host_keys.len(), |start, len| buffer.write_at(start, &host_keys[..len]))?;
            Ok(buffer)
        };
        let lines = |bits: usize| -> Result<DeviceBuffer<u32>, DeviceError> {
            let len = num * bits * D / 2;
            let mut buffer = DeviceBuffer::zeros(device, len)?;
            repeat(len, host_bits.len(), |start, len| buffer.write_at(start, &host_bits[..len]))?;
            Ok(buffer)
        };
        let sets = (0..count)
            .map(|_| {
                Ok(Set {
                    keys: means()?,
                    values: means()?,
                    log_count: DeviceBuffer::from_slice(device, &vec![16f32.ln(); num])?,
                    key_lines: lines(4)?,
                    value_lines: lines(2)?,
                    scales: DeviceBuffer::from_slice(device, &vec![f16::from_f32(KEY_SCALE); num * 16])?,
                    masks: DeviceBuffer::from_slice(device, &vec![u16::MAX; num])?,
                    scores: DeviceBuffer::zeros(device, num * GROUP)?,
                    residuals: DeviceBuffer::zeros(device, num * GROUP * 16)?,
                })
            })
            .collect::<Result<_, DeviceError>>()?;
        let at = |i: usize| (i * pages) as u32;
        let first: Vec<u32> = (0..HEADS).map(at).collect();
        let end: Vec<u32> = (1..=HEADS).map(at).collect();
        let host_q = random.normals(HEADS * GROUP * D);
        let size = 1.0 / (D as f32).sqrt();
        let host_signs: Vec<f32> =
            (0..D).map(|_| if random.bits().is_multiple_of(2) { size } else { -size }).collect();
        let mut absent = |units: usize, of_host: usize| -> Result<DeviceBuffer<u32>, DeviceError> {
            let ids: Vec<u32> = (0..units as u32)
                .map(|unit| {
                    let bits = random.bits() as u32;
                    if bits.is_multiple_of(MISS_EVERY) {
                        HOST_ENTRY + (bits / MISS_EVERY) % of_host as u32
                    } else {
                        unit
                    }
                })
                .collect();
            DeviceBuffer::from_slice(device, &ids)
        };
        let absent = [absent(num, HOST_ROWS / 16)?, absent(num * 16, HOST_ROWS)?];
        let shape = ScanShape { items: HEADS, group: GROUP, head_dim: D, pages_max: pages, num_pages: num };
        let rows_max = [BUDGET as u32; HEADS];
        let list_first: Vec<u32> = (0..HEADS).map(|i| (i * BUDGET) as u32).collect();
        Ok(Self {
            sets,
            pool: Pool::new(rig, num * 16 * ROW)?,
            host: PinnedBuffer::zeros(device, HOST_ROWS * ROW)?,
            absent,
            first: DeviceBuffer::from_slice(device, &first)?,
            end: DeviceBuffer::from_slice(device, &end)?,
            signs: DeviceBuffer::from_slice(device, &host_signs)?,
            q: DeviceBuffer::from_slice(device, &host_q)?,
            lse: DeviceBuffer::zeros(device, HEADS * GROUP)?,
            list_first: DeviceBuffer::from_slice(device, &list_first)?,
            list_end: DeviceBuffer::zeros(device, HEADS)?,
            list: DeviceBuffer::zeros(device, HEADS * BUDGET)?,
            sweep: Sweep::new(device, shape)?,
            plan: DecodePlan::new(device, PlanShape { rows_max: &rows_max, group: GROUP, head_dim: D })?,
            tail: Output::new(rig, HEADS * GROUP)?,
            all: Output::new(rig, HEADS * GROUP)?,
            pages,
            host_q,
            host_keys,
            host_bits,
            host_signs,
        })
    }

    /// Scores and selection of the first item against their twins; 1 bit of key.
    fn verify(&mut self, rig: &Rig) -> anyhow::Result<()> {
        let n = self.pages;
        self.launch(rig, 0, Part::Scores(K1))?;
        let scores = self.sets[0].scores.read(&rig.stream)?;
        let residuals = self.sets[0].residuals.read(&rig.stream)?;
        let lse = self.lse.read(&rig.stream)?;
        self.launch(rig, 0, Part::Select(K1))?;
        let list = self.list.read(&rig.stream)?;
        let unit = |g: usize, u: usize| {
            let page = u / 16;
            let base = scores[(page / 16 * GROUP + g) * 16 + page % 16] - lse[g];
            base + residuals[(page * GROUP + g) * 16 + u % 16].to_f32()
        };
        let wide: Vec<f32> =
            (0..GROUP).flat_map(|g| (0..16 * n).map(move |u| (g, u))).map(|(g, u)| unit(g, u)).collect();
        let want = twin::select_units(&wide, &[0.0; GROUP], BUDGET);
        ensure!(list[..want.len()] == want, "the selection differs from the twin's");
        // A few pages are enough to tell whether the scores are right.
        let some = n.min(256);
        let keys: Vec<bf16> = self.host_keys.iter().cycle().take(some * D).copied().collect();
        let lines: Vec<u32> = self.host_bits.iter().cycle().take(some * D / 2).copied().collect();
        let sketches = twin::HostSketches {
            bits: 1,
            lines: &lines,
            scales: &vec![f16::from_f32(KEY_SCALE); some * 16],
            masks: &vec![u16::MAX; some],
        };
        let rotation = twin::HostRotation { signs: &self.host_signs, order: &[] };
        let q = (&self.host_q[..GROUP * D], params().scale);
        let want = twin::token_scores(q, &keys, &sketches, &rotation, 0.0);
        for g in 0..GROUP {
            for u in 0..16 * some {
                let got = f64::from(residuals[(u / 16 * GROUP + g) * 16 + u % 16].to_f32());
                let want = want.residuals[g * 16 * some + u];
                ensure!((got - want).abs() < 0.02, "token {u} of head {g} scores {got}, not {want}");
            }
        }
        Ok(())
    }

    /// Bytes that have to cross the memory bus: every summary and code once. Scores that pass from kernel to kernel count where a
    /// single kernel is timed, not in steps, where they stay in the second-level cache up to 128K tokens.
    fn bytes(&self, part: Part) -> usize {
        let pages = HEADS * self.pages;
        let (means, page_scores, residuals) = (pages * D * 2, pages * GROUP * 4, pages * 16 * GROUP * 2);
        let codes = |bits: usize| if bits > 0 { pages * 16 * (bits * D / 8 + 2) } else { 0 };
        let exact = HEADS * BUDGET * ROW * 2;
        let scores = |unit: Unit| match unit {
            Unit::Pages => (means, page_scores),
            Unit::Tokens(k, _) => (means + codes(k), page_scores + residuals),
        };
        let values = |unit: Unit| match unit {
            Unit::Pages => means,
            Unit::Tokens(_, v) => means + codes(v),
        };
        match part {
            Part::Scores(unit) => scores(unit).0 + scores(unit).1,
            Part::Select(unit) => scores(unit).1,
            Part::ScoresAndSelect(unit) => scores(unit).0,
            Part::Tail(unit) => values(unit) + scores(unit).1,
            Part::Exact(_) => exact,
            Part::Step(unit) | Part::StepWithMisses(unit) => scores(unit).0 + values(unit) + exact,
        }
    }

    fn launch(&mut self, rig: &Rig, set: usize, part: Part) -> Result<(), DeviceError> {
        match part {
            Part::Scores(unit) => self.scores(rig, set, unit),
            Part::Select(unit) => self.select(rig, set, unit, false),
            Part::ScoresAndSelect(unit) => {
                self.scores(rig, set, unit)?;
                self.select(rig, set, unit, false)
            }
            Part::Tail(unit) => self.finish(rig, set, unit, Finish::Tail),
            Part::Exact(unit) => self.finish(rig, set, unit, Finish::Exact),
            Part::Step(unit) => {
                self.scores(rig, set, unit)?;
                self.select(rig, set, unit, false)?;
                self.finish(rig, set, unit, Finish::Both)
            }
            Part::StepWithMisses(unit) => {
                self.scores(rig, set, unit)?;
                self.select(rig, set, unit, true)?;
                self.finish(rig, set, unit, Finish::Both)
            }
        }
    }

    fn scores(&mut self, rig: &Rig, set: usize, unit: Unit) -> Result<(), DeviceError> {
        let pages = Spans { first: self.first.view(), end: self.end.view() };
        let q = (self.q.view(), params().scale);
        let set = &mut self.sets[set];
        match unit {
            Unit::Pages => {
                let summaries = Summaries {
                    keys: set.keys.view(),
                    log_count: set.log_count.view(),
                    pages,
                    spreads: None,
                };
                let (scores, lse) = (set.scores.view_mut(), self.lse.view_mut());
                self.sweep.page_scores(&rig.stream, q, &summaries, scores, lse)
            }
            Unit::Tokens(bits, _) => {
                let codes = KeyCodes {
                    bits,
                    lines: set.key_lines.view().slice(0..HEADS * self.pages * bits * D / 2)?,
                    scales: set.scales.view(),
                    masks: set.masks.view(),
                    rotation: Rotation { signs: self.signs.view(), order: None },
                    spread: 0.0,
                };
                let to = TokenScoresMut {
                    scores: set.scores.view_mut(),
                    residuals: set.residuals.view_mut(),
                    lse: self.lse.view_mut(),
                };
                self.sweep.token_scores(
                    &rig.stream,
                    q,
                    &PageKeys { keys: set.keys.view(), pages },
                    &codes,
                    to,
                )
            }
        }
    }

    fn select(&mut self, rig: &Rig, set: usize, unit: Unit, misses: bool) -> Result<(), DeviceError> {
        let tokens = usize::from(unit != Unit::Pages);
        let select = Selection {
            pages: Spans { first: self.first.view(), end: self.end.view() },
            lse: self.lse.view(),
            attended: None,
            ids: misses.then(|| self.absent[tokens].view()),
            budget: if tokens == 1 { BUDGET } else { BUDGET / 16 } as u32,
            budgets: None,
            list_first: self.list_first.view(),
            list_end: self.list_end.view_mut(),
            list: self.list.view_mut(),
        };
        let set = &mut self.sets[set];
        let units = match unit {
            Unit::Pages => UnitsMut::Pages(set.scores.view_mut()),
            Unit::Tokens(..) => {
                UnitsMut::Tokens { scores: set.scores.view(), residuals: set.residuals.view_mut() }
            }
        };
        self.sweep.select(&rig.stream, select, units)
    }

    fn finish(&mut self, rig: &Rig, set: usize, unit: Unit, what: Finish) -> Result<(), DeviceError> {
        let set = &self.sets[set];
        let units = match unit {
            Unit::Pages => TailUnits::Pages(set.scores.view()),
            Unit::Tokens(_, bits) => {
                let codes = ValueCodes {
                    bits,
                    lines: set.value_lines.view().slice(0..HEADS * self.pages * bits * D / 2)?,
                    scales: set.scales.view(),
                    rotation: Rotation { signs: self.signs.view(), order: None },
                };
                let tokens = TokenScores { scores: set.scores.view(), residuals: set.residuals.view() };
                TailUnits::Tokens(tokens, (bits > 0).then_some(codes))
            }
        };
        let tail = TailArgs {
            units,
            lse: self.lse.view(),
            values: set.values.view(),
            pages: Spans { first: self.first.view(), end: self.end.view() },
        };
        let spans = Spans { first: self.list_first.view(), end: self.list_end.view() };
        let host = self.host.view();
        let lists = if unit == Unit::Pages {
            Lists::PagesAndHost { spans, slots: self.list.view(), masks: None, host }
        } else {
            Lists::RowsAndHost { spans, rows: self.list.view(), host }
        };
        let args =
            DecodeArgs { q: self.q.view(), kv: self.pool.device.view(), params: params(), skip_below: None };
        match what {
            Finish::Tail => self.sweep.tail(&rig.stream, &tail, self.tail.state()),
            Finish::Exact => {
                floe_cuda::ops::sparse_decode(&rig.stream, &mut self.plan, &args, lists, self.all.state())
            }
            Finish::Both => {
                let beside = Beside { plan: &mut self.plan, args, lists };
                self.sweep.tail_and_decode(&rig.stream, &tail, self.tail.state(), beside, self.all.state())
            }
        }
    }
}

/// What follows a selection.
#[derive(Debug, Clone, Copy)]
enum Finish {
    Tail,
    Exact,
    Both,
}

/// Fills `buffer` with repetitions of a block, through `write` (start, elements).
fn repeat(
    len: usize,
    block: usize,
    mut write: impl FnMut(usize, usize) -> Result<(), DeviceError>,
) -> Result<(), DeviceError> {
    (0..len).step_by(block).try_for_each(|start| write(start, block.min(len - start)))
}
