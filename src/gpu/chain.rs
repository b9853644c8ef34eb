//! The kernels of one layer's step, in order, and the memory that they hand to one another.
//!
//! ```text
//! stream  append ─> page_scores or token_scores ─> select ─┬> resolve (─> fetch) ─> attend ─┬> finish
//! sides     │                                              └> tail ─────────────────────────┤
//!           └> build_pages ─> attend all tokens of heads in doubt ──────────────────────────┘
//! ```
//! or, with [`TailPlace::Joined`], `... resolve ─> tail ─> attend, which joins the tail's state ─> finish`. Kernels of the main stream start
//! while their predecessor ends, so none of them may depend on two streams but the last.
//!
//! A chain is made for a number of entries and a length class (powers of two) and can be recorded in a graph: lengths, places and
//! lists are read from device memory.

use floe_cuda::AttendParams;
use floe_cuda::device::{DevRef, Device, DeviceBuffer, DeviceError, Event, Stream};
use floe_cuda::ops::cache::{
    AppendStep, DeviceTensor, DoubtCheck, FINISH_PARTS_MAX, FinishStart, FoundUnit, PageSource, Ranges,
    Resolve, Tables, append_step, build_pages, fetch_listed, finish, resolve,
};
use floe_cuda::ops::sweep::{
    Beside, KeyCodes, PageKeys, Rotation, Selection, Sweep, TailArgs, TailUnits, TokenScores, TokenScoresMut,
    UnitsMut, ValueCodes,
};
use floe_cuda::ops::{
    DecodeArgs, DecodePlan, DeviceElem, Lists, PlanShape, ScanShape, Spans, Summaries, dense_decode,
    sparse_decode,
};
use half::f16;

use super::ahead::{AheadList, firsts};
use super::clock::{Clock, Stage};
use super::fetch::FetchMemory;
use super::layer::{DoubtMemory, LayerMemory, PageMemory, SlotMemory};
use super::options::{GpuOptions, Plan, TailPlace};
use super::standing::{NodeMemory, Standing};
use super::whole::{Beyond, State, Whole};

/// Shape of a chain: every number a power of two, so that few chains serve all steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct ChainShape {
    /// Whether all entries attend all of their tokens; else none does.
    pub(super) exact: bool,
    /// Entries of the batch.
    pub(super) entries: usize,
    /// Most rows of an entry on the device, where all are exact.
    pub(super) exact_tokens: usize,
    /// Most tokens of an exact entry that have no row there and are attended in host memory; 0: all have one.
    pub(super) beyond: usize,
    /// Most published pages of an entry, where none is.
    pub(super) pages: usize,
    /// The layer's parity where steps prefetch, else 0: what a step leaves behind is read while the next layer's runs.
    pub(super) parity: usize,
}

/// A host engine's tensors of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct StepIo {
    pub(super) q: DeviceTensor,
    pub(super) k: DeviceTensor,
    pub(super) v: DeviceTensor,
    pub(super) out: DeviceTensor,
    /// Bits of the softmax scale.
    pub(super) scale: u32,
}

/// Memory that does not depend on the shape of a step.
#[derive(Debug)]
pub(super) struct Shared {
    /// By the chain's parity.
    scores: Vec<Scores>,
    /// Of sketches.
    rotation: Option<Rounds>,
    /// For pages, for tails.
    sides: [Stream; 2],
    forks: [Event; 2],
    joins: [Event; 2],
    pub(super) clock: Clock,
}

/// Scores of a step.
#[derive(Debug)]
struct Scores {
    /// [pages / 16, group, 16]
    pages: DeviceBuffer<f32>,
    /// What tokens add to them, [pages, group, 16], with a sketch.
    residuals: DeviceBuffer<f16>,
}

impl Shared {
    pub(super) fn new(device: &Device, plan: &Plan, options: &GpuOptions) -> Result<Self, crate::Error> {
        let pages = if plan.exact { 0 } else { options.page_tokens / 16 };
        let group = plan.shape.group;
        let residuals = if plan.by_token() { pages * group * 16 } else { 0 };
        let scores = || -> Result<_, DeviceError> {
            let residuals = DeviceBuffer::zeros(device, residuals)?;
            Ok(Scores { pages: DeviceBuffer::zeros(device, pages * group)?, residuals })
        };
        let rotation = if plan.by_token() { Some(rotation(device, plan.shape.head_dim)?) } else { None };
        Ok(Self {
            scores: (0..if plan.prefetch > 0 { 2 } else { 1 }).map(|_| scores()).collect::<Result<_, _>>()?,
            rotation,
            sides: [Stream::new(device)?, Stream::new(device)?],
            forks: [Event::new(device)?, Event::new(device)?],
            joins: [Event::new(device)?, Event::new(device)?],
            clock: Clock::new(device),
        })
    }

    pub(super) fn rotation(&self) -> Option<Rotation<'_>> {
        view(&self.rotation)
    }

    pub(super) fn size_bytes(&self) -> usize {
        let bytes = |scores: &Scores| scores.pages.view().len() * 4 + scores.residuals.view().len() * 2;
        self.scores.iter().map(bytes).sum()
    }
}

impl Scores {
    /// What is selected from.
    fn units<'a, E: DeviceElem>(&'a mut self, plan: &Plan, pages: &'a PageMemory<E>) -> UnitsMut<'a> {
        if plan.by_token() {
            UnitsMut::Tokens { scores: self.pages.view(), residuals: self.residuals.view_mut() }
        } else if plan.tree {
            UnitsMut::PagesOfTokens { scores: self.pages.view_mut(), masks: pages.masks.view() }
        } else {
            UnitsMut::Pages(self.pages.view_mut())
        }
    }
}

/// Signs of each round of a rotation, and the order of coordinates before the second, if there is one.
type Rounds = (DeviceBuffer<f32>, Option<DeviceBuffer<u32>>);

/// The rotation of the index's sketches.
fn rotation(device: &Device, dim: usize) -> Result<Rounds, crate::Error> {
    let sketch = floe_index::sketch::Sketch::new(
        floe_index::sketch::SketchConfig::K1,
        dim,
        floe_index::ROTATION_SEED,
    )?;
    let (signs, order) = (sketch.rotation().signs().concat(), sketch.rotation().order());
    let order = (!order.is_empty()).then(|| DeviceBuffer::from_slice(device, &order)).transpose()?;
    Ok((DeviceBuffer::from_slice(device, &signs)?, order))
}

fn view(rounds: &Option<Rounds>) -> Option<Rotation<'_>> {
    let (signs, order) = rounds.as_ref()?;
    Some(Rotation { signs: signs.view(), order: order.as_ref().map(DeviceBuffer::view) })
}

/// Memory of the steps of one [`ChainShape`].
#[derive(Debug)]
pub(super) struct Chain<E> {
    shape: ChainShape,
    q: DeviceBuffer<E>,
    ranges: [DeviceBuffer<u32>; 4],
    exact: Option<(DecodePlan, State)>,
    beyond: Option<Beyond>,
    sparse: Option<Sparse>,
}

#[derive(Debug)]
struct Sparse {
    sweep: Sweep,
    attend: DecodePlan,
    unit_lse: DeviceBuffer<f32>,
    found_first: DeviceBuffer<u32>,
    found_end: DeviceBuffer<u32>,
    found: DeviceBuffer<u32>,
    list_first: DeviceBuffer<u32>,
    list_end: DeviceBuffer<u32>,
    list: DeviceBuffer<u32>,
    /// Where a kernel of its own brings rows.
    fetch: Option<FetchMemory>,
    chosen: State,
    tail: State,
    whole: Option<Whole>,
    ahead: Option<AheadList>,
    /// Where the host chooses pages.
    nodes: Option<Standing>,
}

/// Layer memory that a sparse step works on.
type LayerParts<'a, E> =
    (&'a mut DeviceBuffer<E>, &'a mut PageMemory<E>, &'a mut SlotMemory, &'a mut NodeMemory<E>);

impl Sparse {
    fn new(
        device: &Device,
        plan: &Plan,
        options: &GpuOptions,
        shape: ChainShape,
    ) -> Result<Self, DeviceError> {
        let cache = plan.shape;
        let num_pages = options.page_tokens / 16;
        let items = shape.entries * cache.heads;
        let units = plan.units();
        let list_each = cache.fixed_max() + plan.retrieved;
        let rows_max = vec![list_each as u32; items];
        let decode = PlanShape { rows_max: &rows_max, group: cache.group, head_dim: cache.head_dim };
        let all_rows = vec![(shape.pages * 16 + cache.fixed_max()) as u32; items];
        let scan = ScanShape {
            items,
            group: cache.group,
            head_dim: cache.head_dim,
            pages_max: shape.pages,
            num_pages,
        };
        Ok(Self {
            sweep: Sweep::new(device, scan)?,
            attend: DecodePlan::new(device, decode)?,
            unit_lse: DeviceBuffer::zeros(device, items * cache.group)?,
            found_first: DeviceBuffer::from_slice(device, &firsts(items, units))?,
            found_end: DeviceBuffer::zeros(device, items)?,
            found: DeviceBuffer::zeros(device, items * units)?,
            list_first: DeviceBuffer::from_slice(device, &firsts(items, list_each))?,
            list_end: DeviceBuffer::zeros(device, items)?,
            list: DeviceBuffer::zeros(device, items * list_each)?,
            fetch: FetchMemory::new(device, items, plan.retrieved)?,
            chosen: State::new(device, items * cache.group, cache.head_dim)?,
            tail: State::new(device, items * cache.group, cache.head_dim)?,
            whole: plan
                .max_doubt
                .map(|_| Whole::new(device, PlanShape { rows_max: &all_rows, ..decode }))
                .transpose()?,
            ahead: (plan.prefetch > 0)
                .then(|| AheadList::new(device, items, plan.prefetch_units()))
                .transpose()?,
            nodes: plan.listed.map(|_| Standing::new(device, plan, options, shape.entries)).transpose()?,
        })
    }
}

impl<E: DeviceElem> Chain<E> {
    /// The queries of the step, [items, group, head_dim].
    pub(super) fn queries(&self) -> DevRef<'_, E> {
        self.q.view()
    }

    /// Says whose super-nodes the entries have, where the host chooses pages; entries of nobody have none.
    pub(super) fn enter(
        &mut self,
        (plan, each): (&Plan, usize),
        sequences: &[u32],
        stream: &Stream,
    ) -> Result<(), DeviceError> {
        let Some(nodes) = self.sparse.as_mut().and_then(|sparse| sparse.nodes.as_mut()) else {
            return Ok(());
        };
        nodes.enter(plan.shape.heads, each, sequences, stream)
    }

    pub(super) fn new(
        device: &Device,
        plan: &Plan,
        options: &GpuOptions,
        shape: ChainShape,
    ) -> Result<Self, DeviceError> {
        let cache = plan.shape;
        let items = shape.entries * cache.heads;
        let heads = items * cache.group;
        let words = || DeviceBuffer::zeros(device, items);
        let rows_max = vec![shape.exact_tokens as u32; items];
        let exact = PlanShape { rows_max: &rows_max, group: cache.group, head_dim: cache.head_dim };
        let exact = || -> Result<_, DeviceError> {
            Ok((DecodePlan::new(device, exact)?, State::new(device, heads, cache.head_dim)?))
        };
        let sparse = || Sparse::new(device, plan, options, shape);
        let most = vec![shape.beyond as u32; items];
        let most = PlanShape { rows_max: &most, group: cache.group, head_dim: cache.head_dim };
        let beyond = || Beyond::new(device, most);
        Ok(Self {
            q: DeviceBuffer::zeros(device, heads * cache.head_dim)?,
            ranges: [words()?, words()?, words()?, words()?],
            exact: shape.exact.then(exact).transpose()?,
            beyond: (shape.beyond > 0).then(beyond).transpose()?,
            sparse: (!shape.exact).then(sparse).transpose()?,
            shape,
        })
    }

    /// Queues the step of one layer.
    pub(super) fn queue(
        &mut self,
        stream: &Stream,
        (plan, shared): (&Plan, &mut Shared),
        tables: (
            DevRef<'_, floe_cuda::ops::cache::BatchEntry>,
            DevRef<'_, floe_cuda::ops::cache::SequencePlace>,
        ),
        layer: &mut LayerMemory<E>,
        io: &StepIo,
    ) -> Result<(), DeviceError> {
        let LayerMemory { kv, chunks, pages, slots, doubt, nodes, .. } = layer;
        let batch = tables.0.slice(0..self.shape.entries)?;
        let tables = &Tables { shape: plan.shape, batch, sequences: tables.1, chunks: chunks.view() };
        let scale = f32::from_bits(io.scale);
        let [page_first, page_end, row_first, row_end] = &mut self.ranges;
        let (whole, fetch) = match &mut self.sparse {
            Some(sparse) => (sparse.whole.as_mut(), sparse.fetch.as_mut()),
            None => (None, None),
        };
        let doubt = whole.zip(plan.doubt_factor(scale)).map(|(whole, factor)| {
            let DoubtMemory { sums, doubted, noticed, .. } = doubt;
            DoubtCheck {
                factor,
                spread: pages.spread.view(),
                sums: sums.view_mut(),
                warm: whole.warm.view_mut(),
                doubted: doubted.view_mut(),
                noticed: noticed.view_mut(),
            }
        });
        let append = AppendStep {
            q: io.q,
            k: io.k,
            v: io.v,
            kv: kv.view_mut(),
            q_out: self.q.view_mut(),
            ranges: Ranges {
                page_first: page_first.view_mut(),
                page_end: page_end.view_mut(),
                row_first: row_first.view_mut(),
                row_end: row_end.view_mut(),
            },
            beyond: self.beyond.as_mut().map(Beyond::write),
            num_fetch: fetch.map(|fetch| fetch.num.view_mut()),
            tree_pages: plan.tree.then(|| pages.tree_pages.view()),
            doubt,
        };
        shared.clock.time(Stage::Append, stream, || append_step(stream, tables, append))?;
        let params = AttendParams { scale, softcap: None };
        if let Some((attend, state)) = &mut self.exact {
            let args = DecodeArgs { q: self.q.view(), kv: kv.view(), params, skip_below: None };
            let rows = Spans { first: self.ranges[2].view(), end: self.ranges[3].view() };
            let work = || dense_decode(stream, attend, &args, rows, state.write());
            shared.clock.time(Stage::Attend, stream, work)?;
            if let Some(beyond) = &mut self.beyond {
                let work = || beyond.queue(stream, &args, plan.shape.heads);
                shared.clock.time(Stage::Whole, stream, work)?;
            }
        }
        if self.sparse.is_some() {
            self.queue_sparse(stream, (plan, shared), tables, (kv, pages, slots, nodes), params)?;
        }
        if let Some((_, state)) = &self.exact {
            let beyond = self.beyond.as_ref().map(Beyond::read);
            let parts = [state.read(), beyond.unwrap_or(state.read())];
            let parts = &parts[..1 + usize::from(beyond.is_some())];
            let work = || finish(stream, tables, parts, &io.out, FinishStart::Early);
            shared.clock.time(Stage::Finish, stream, work)?;
        }
        let Some(sparse) = &self.sparse else { return Ok(()) };
        stream.wait(&shared.joins[0])?;
        let beside = plan.tail && plan.tail_place == TailPlace::Beside;
        let others = [
            beside.then(|| sparse.tail.read()),
            sparse.nodes.as_ref().map(|nodes| nodes.state.read()),
            sparse.whole.as_ref().map(|whole| whole.state.read()),
        ];
        let (mut parts, mut num) = ([sparse.chosen.read(); FINISH_PARTS_MAX], 1);
        for part in others.into_iter().flatten() {
            parts[num] = part;
            num += 1;
        }
        let work = || finish(stream, tables, &parts[..num], &io.out, FinishStart::AfterAll);
        shared.clock.time(Stage::Finish, stream, work)
    }

    fn queue_sparse(
        &mut self,
        stream: &Stream,
        (plan, shared): (&Plan, &mut Shared),
        tables: &Tables<'_>,
        (kv, memory, slots, of_nodes): LayerParts<'_, E>,
        params: AttendParams,
    ) -> Result<(), DeviceError> {
        let Some(sparse) = &mut self.sparse else { return Ok(()) };
        let scores = &mut shared.scores[self.shape.parity];
        shared.forks[0].record(stream)?;
        shared.sides[0].wait(&shared.forks[0])?;
        let side = &shared.sides[0];
        if !plan.tree {
            let built = memory.write(view(&shared.rotation));
            let work = || build_pages(side, tables, PageSource::Step, kv.view(), built);
            shared.clock.time(Stage::Pages, side, work)?;
        }
        if let Some(standing) = sparse.nodes.as_mut().filter(|_| plan.tail) {
            let query = (self.q.view(), params.scale);
            let work = || standing.queue(side, query, of_nodes);
            shared.clock.time(Stage::Tail, side, work)?;
        }
        let whole_rows = Spans { first: self.ranges[2].view(), end: self.ranges[3].view() };
        let args = DecodeArgs { q: self.q.view(), kv: kv.view(), params, skip_below: None };
        if let Some(whole) = &mut sparse.whole {
            let work = || whole.queue(side, &args, whole_rows, plan.shape.heads);
            shared.clock.time(Stage::Whole, side, work)?;
        }
        shared.joins[0].record(&shared.sides[0])?;
        let pages = Spans { first: self.ranges[0].view(), end: self.ranges[1].view() };
        let query = (self.q.view(), params.scale);
        let rotation = view(&shared.rotation);
        if let Some(rotation) = rotation {
            let codes = KeyCodes {
                bits: plan.bits[0],
                lines: memory.key_lines.view(),
                scales: memory.key_scales.view(),
                masks: memory.masks.view(),
                rotation,
                spread: floe_index::export::token_spread(plan.bits[0]),
            };
            let to = TokenScoresMut {
                scores: scores.pages.view_mut(),
                residuals: scores.residuals.view_mut(),
                lse: sparse.unit_lse.view_mut(),
            };
            let means = PageKeys { keys: memory.mean_keys.view(), pages };
            let work = || sparse.sweep.token_scores(stream, query, &means, &codes, to);
            shared.clock.time(Stage::Scan, stream, work)?;
        } else {
            let summaries = Summaries {
                keys: memory.mean_keys.view(),
                log_count: memory.log_count.view(),
                pages,
                spreads: plan.tree.then(|| (memory.spread.view(), floe_index::export::PAGE_SPREAD)),
            };
            let (to, lse) = (scores.pages.view_mut(), sparse.unit_lse.view_mut());
            let work = || sparse.sweep.page_scores(stream, query, &summaries, to, lse);
            shared.clock.time(Stage::Scan, stream, work)?;
        }
        let selection = Selection {
            pages,
            lse: sparse.unit_lse.view(),
            attended: None,
            ids: plan.tree.then(|| memory.tokens.view()),
            budget: plan.units() as u32,
            budgets: None,
            list_first: sparse.found_first.view(),
            list_end: sparse.found_end.view_mut(),
            list: sparse.found.view_mut(),
        };
        let units = scores.units(plan, memory);
        let work = || sparse.sweep.select(stream, selection, units);
        shared.clock.time(Stage::Select, stream, work)?;
        let tail = {
            let (scores, residuals) = (scores.pages.view(), scores.residuals.view());
            let units = match rotation {
                None => TailUnits::Pages(scores),
                Some(rotation) => {
                    let values = (plan.bits[1] > 0).then(|| ValueCodes {
                        bits: plan.bits[1],
                        lines: memory.value_lines.view(),
                        scales: memory.value_scales.view(),
                        rotation,
                    });
                    TailUnits::Tokens(TokenScores { scores, residuals }, values)
                }
            };
            let (lse, values) = (sparse.unit_lse.view(), memory.mean_values.view());
            TailArgs { units, lse, values, pages }
        };
        let beside = plan.tail && plan.tail_place == TailPlace::Beside;
        // Beside the tail, whose reads fill the device's memory, looking for the slots of 64 items took 40 us, four times as long as
        // before it. A tail with value codes is long enough for that and for what is fetched.
        let slots_first = sparse.fetch.is_some() && plan.bits[1] == 0;
        if beside && !slots_first {
            shared.forks[1].record(stream)?;
        }
        let found = Resolve {
            whole: whole_rows,
            spans: Spans { first: sparse.found_first.view(), end: sparse.found_end.view() },
            found: sparse.found.view(),
            unit: if plan.lists_tokens() { FoundUnit::Tokens } else { FoundUnit::Pages },
            retrieved: plan.retrieved,
            list: sparse.list.view_mut(),
            list_end: sparse.list_end.view_mut(),
        };
        let mut fetch = sparse.fetch.as_mut().map(FetchMemory::write);
        let work = || resolve(stream, tables, found, slots.write(), (kv.view_mut(), fetch.as_mut()));
        shared.clock.time(Stage::Resolve, stream, work)?;
        if beside && slots_first {
            shared.forks[1].record(stream)?;
        }
        if let Some(fetch) = &fetch {
            let work = || fetch_listed(stream, plan.shape.head_dim, fetch, kv.view_mut());
            shared.clock.time(Stage::Fetch, stream, work)?;
        }
        if beside {
            shared.sides[1].wait(&shared.forks[1])?;
            let side = &shared.sides[1];
            let work = || sparse.sweep.tail(side, &tail, sparse.tail.write());
            shared.clock.time(Stage::Tail, side, work)?;
            shared.joins[1].record(&shared.sides[1])?;
        }
        let args = DecodeArgs { q: self.q.view(), kv: kv.view(), params, skip_below: None };
        let lists = Lists::Rows {
            spans: Spans { first: sparse.list_first.view(), end: sparse.list_end.view() },
            rows: sparse.list.view(),
        };
        let Sparse { attend, chosen, tail: tail_state, sweep, .. } = sparse;
        if plan.tail && !beside {
            let attention = Beside { plan: attend, args, lists };
            let work = || sweep.tail_and_decode(stream, &tail, tail_state.write(), attention, chosen.write());
            return shared.clock.time(Stage::Attend, stream, work);
        }
        let work = || sparse_decode(stream, attend, &args, lists, chosen.write());
        shared.clock.time(Stage::Attend, stream, work)?;
        if beside { stream.wait(&shared.joins[1]) } else { Ok(()) }
    }

    /// Behind a sparse step: the next best units of its scores, which are then gone.
    pub(super) fn select_ahead(
        &mut self,
        stream: &Stream,
        (plan, shared): (&Plan, &mut Shared),
        pages: &PageMemory<E>,
    ) -> Result<Option<&AheadList>, DeviceError> {
        let Some(Sparse { sweep, unit_lse, ahead: Some(ahead), .. }) = &mut self.sparse else {
            return Ok(None);
        };
        let selection = Selection {
            pages: Spans { first: self.ranges[0].view(), end: self.ranges[1].view() },
            lse: unit_lse.view(),
            attended: None,
            ids: None,
            budget: plan.prefetch_units() as u32,
            budgets: None,
            list_first: ahead.first.view(),
            list_end: ahead.end.view_mut(),
            list: ahead.list.view_mut(),
        };
        let units = shared.scores[self.shape.parity].units(plan, pages);
        shared.clock.time(Stage::Ahead, stream, || sweep.select(stream, selection, units))?;
        Ok(Some(ahead))
    }

    /// What the last step left on the device; waits.
    pub(super) fn read(&self, stream: &Stream) -> Result<StepRead, DeviceError> {
        if let Some((_, state)) = &self.exact {
            let mut lse = state.lse.read(stream)?;
            if let Some(beyond) = &self.beyond {
                beyond.add_lse(&mut lse, stream)?;
            }
            return Ok(StepRead { lse, ..StepRead::default() });
        }
        let Some(sparse) = &self.sparse else { return Ok(StepRead::default()) };
        let (first, end) = (sparse.found_first.read(stream)?, sparse.found_end.read(stream)?);
        let found = sparse.found.read(stream)?;
        let of = |(first, end): (&u32, &u32)| found[*first as usize..(*end).max(*first) as usize].to_vec();
        let mut read = StepRead {
            found: first.iter().zip(&end).map(of).collect(),
            lse: sparse.chosen.lse.read(stream)?,
            in_doubt: vec![false; first.len()],
        };
        if let Some(whole) = &sparse.whole {
            let (first, end) = (self.ranges[2].read(stream)?, self.ranges[3].read(stream)?);
            let (lse, group) = (whole.state.lse.read(stream)?, read.lse.len() / first.len());
            for (item, _) in first.iter().zip(&end).enumerate().filter(|(_, (first, end))| end > first) {
                let heads = item * group..(item + 1) * group;
                read.lse[heads.clone()].copy_from_slice(&lse[heads]);
                read.in_doubt[item] = true;
            }
        }
        Ok(read)
    }
}

/// Results of a step beside its output.
#[derive(Debug, Default)]
pub(super) struct StepRead {
    /// Retrieved units, by item; empty where all were exact.
    pub(super) found: Vec<Vec<u32>>,
    /// lse of the exactly attended tokens, [items, group].
    pub(super) lse: Vec<f32>,
    /// Items that attended everything because their estimates were in doubt; empty where all were exact.
    pub(super) in_doubt: Vec<bool>,
}
