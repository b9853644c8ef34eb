//! The kernels of one layer's step, in order, and the memory that they hand to one another.
//!
//! ```text
//! stream  append ─> page_scores or token_scores ─> select ─┬> resolve ─> fetch ─> attend ─┬> finish
//! sides     │                                              └> tail ───────────────────────┤
//!           └> build_pages ─> attend all tokens of heads in doubt ────────────────────────┘
//! ```
//! or, with [`TailPlace::Joined`], `... fetch ─> tail ─> attend, which joins the tail's state ─> finish`. Kernels of the main stream start
//! while their predecessor ends, so none of them may depend on two streams but the last.
//!
//! A chain is made for a number of entries and a length class (powers of two) and can be recorded in a graph: lengths, places and
//! lists are read from device memory.

use floe_cuda::AttendParams;
use floe_cuda::device::{DevRef, Device, DeviceBuffer, DeviceError, Event, Stream};
use floe_cuda::ops::cache::{
    AppendStep, DeviceTensor, DoubtCheck, FetchList, FinishStart, FoundUnit, PageSource, Ranges, Resolve,
    Tables, append_step, build_pages, fetch_listed, finish, resolve,
};
use floe_cuda::ops::sweep::{
    Beside, KeyCodes, PageKeys, Rotation, Selection, Sweep, TailArgs, TailUnits, TokenScores, TokenScoresMut,
    UnitsMut, ValueCodes,
};
use floe_cuda::ops::{
    DecodeArgs, DecodePlan, DevState, DeviceElem, Lists, PlanShape, ScanShape, Spans, Summaries, WholeItems,
    dense_decode, sparse_decode, whole_decode,
};
use half::f16;

use super::layer::{DoubtMemory, LayerMemory, NodeMemory, PageMemory, SlotMemory};
use super::options::{GpuOptions, Plan, TailPlace};

/// Shape of a chain: every number a power of two, so that few chains serve all steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct ChainShape {
    /// Whether all entries attend all of their tokens; else none does.
    pub(super) exact: bool,
    /// Entries of the batch.
    pub(super) entries: usize,
    /// Most tokens of an entry, where all are exact.
    pub(super) exact_tokens: usize,
    /// Most published pages of an entry, where none is.
    pub(super) pages: usize,
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
    /// [pages / 16, group, 16]
    page_scores: DeviceBuffer<f32>,
    /// What tokens add to them, [pages, group, 16], with a sketch.
    residuals: DeviceBuffer<f16>,
    signs: Option<DeviceBuffer<f32>>,
    /// For pages, for tails.
    sides: [Stream; 2],
    forks: [Event; 2],
    joins: [Event; 2],
}

impl Shared {
    pub(super) fn new(device: &Device, plan: &Plan, options: &GpuOptions) -> Result<Self, crate::Error> {
        let pages = if plan.exact { 0 } else { options.page_tokens / 16 };
        let group = plan.shape.group;
        let signs = if plan.by_token() { Some(rotation_signs(plan.shape.head_dim)?) } else { None };
        Ok(Self {
            page_scores: DeviceBuffer::zeros(device, pages * group)?,
            residuals: DeviceBuffer::zeros(device, if plan.by_token() { pages * group * 16 } else { 0 })?,
            signs: signs.map(|signs| DeviceBuffer::from_slice(device, &signs)).transpose()?,
            sides: [Stream::new(device)?, Stream::new(device)?],
            forks: [Event::new(device)?, Event::new(device)?],
            joins: [Event::new(device)?, Event::new(device)?],
        })
    }

    pub(super) fn signs(&self) -> Option<&DeviceBuffer<f32>> {
        self.signs.as_ref()
    }

    pub(super) fn size_bytes(&self) -> usize {
        self.page_scores.view().len() * 4 + self.residuals.view().len() * 2
    }
}

/// The rotation of the index's sketches, which for a power of two is a Walsh-Hadamard transform after these signs.
fn rotation_signs(dim: usize) -> Result<Vec<f32>, crate::Error> {
    let sketch = floe_index::sketch::Sketch::new(
        floe_index::sketch::SketchConfig::K1,
        dim,
        floe_index::ROTATION_SEED,
    )?;
    let column = |d: usize| {
        let mut x = vec![0.0; dim];
        x[d] = 1.0;
        sketch.rotation().apply(&mut x);
        // The transform's first row is all ones.
        x[0]
    };
    Ok((0..dim).map(column).collect())
}

/// Memory of the steps of one [`ChainShape`].
#[derive(Debug)]
pub(super) struct Chain<E> {
    shape: ChainShape,
    q: DeviceBuffer<E>,
    ranges: [DeviceBuffer<u32>; 4],
    exact: Option<(DecodePlan, State)>,
    sparse: Option<Sparse>,
    num_fetch: DeviceBuffer<u32>,
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
    from: DeviceBuffer<u64>,
    to: DeviceBuffer<u32>,
    chosen: State,
    tail: State,
    whole: Option<Whole>,
    /// Where the host chooses pages.
    nodes: Option<Nodes>,
}

/// Layer memory that a sparse step works on.
type LayerParts<'a, E> =
    (&'a mut DeviceBuffer<E>, &'a mut PageMemory<E>, &'a mut SlotMemory, &'a mut NodeMemory<E>);

/// Attention over all tokens of the items that are in doubt.
#[derive(Debug)]
struct Whole {
    plan: DecodePlan,
    state: State,
    /// Where their rows are in host memory, `[items]`.
    warm: DeviceBuffer<u64>,
}

#[derive(Debug)]
struct State {
    out: DeviceBuffer<f32>,
    lse: DeviceBuffer<f32>,
}

impl State {
    fn new(device: &Device, heads: usize, dim: usize) -> Result<Self, DeviceError> {
        Ok(Self {
            out: DeviceBuffer::zeros(device, heads * dim)?,
            lse: DeviceBuffer::from_slice(device, &vec![f32::NEG_INFINITY; heads])?,
        })
    }

    fn write(&mut self) -> DevState<'_> {
        DevState { out: self.out.view_mut(), lse: self.lse.view_mut() }
    }

    fn read(&self) -> (DevRef<'_, f32>, DevRef<'_, f32>) {
        (self.out.view(), self.lse.view())
    }
}

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
        let firsts = |each: usize| (0..items).map(|i| (i * each) as u32).collect::<Vec<_>>();
        let rows_max = vec![list_each as u32; items];
        let decode = PlanShape { rows_max: &rows_max, group: cache.group, head_dim: cache.head_dim };
        let all_rows = vec![(shape.pages * 16 + cache.fixed_max()) as u32; items];
        let whole = || -> Result<_, DeviceError> {
            Ok(Whole {
                plan: DecodePlan::new(device, PlanShape { rows_max: &all_rows, ..decode })?,
                state: State::new(device, items * cache.group, cache.head_dim)?,
                warm: DeviceBuffer::zeros(device, items)?,
            })
        };
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
            found_first: DeviceBuffer::from_slice(device, &firsts(units))?,
            found_end: DeviceBuffer::zeros(device, items)?,
            found: DeviceBuffer::zeros(device, items * units)?,
            list_first: DeviceBuffer::from_slice(device, &firsts(list_each))?,
            list_end: DeviceBuffer::zeros(device, items)?,
            list: DeviceBuffer::zeros(device, items * list_each)?,
            from: DeviceBuffer::zeros(device, items * plan.retrieved)?,
            to: DeviceBuffer::zeros(device, items * plan.retrieved)?,
            chosen: State::new(device, items * cache.group, cache.head_dim)?,
            tail: State::new(device, items * cache.group, cache.head_dim)?,
            whole: plan.max_doubt.map(|_| whole()).transpose()?,
            nodes: plan.listed.map(|_| Nodes::new(device, plan, options, shape.entries)).transpose()?,
        })
    }
}

/// Super-nodes of the items, and their state.
#[derive(Debug)]
struct Nodes {
    sweep: Sweep,
    first: DeviceBuffer<u32>,
    end: DeviceBuffer<u32>,
    /// Sequence of each entry that `first` and `end` are of.
    of: Vec<u32>,
    scores: DeviceBuffer<f32>,
    lse: DeviceBuffer<f32>,
    state: State,
}

impl Nodes {
    fn new(device: &Device, plan: &Plan, options: &GpuOptions, entries: usize) -> Result<Self, DeviceError> {
        let cache = plan.shape;
        let (items, num) = (entries * cache.heads, plan.nodes(options));
        let each = plan.nodes_each(options.max_tokens);
        let scan = ScanShape {
            items,
            group: cache.group,
            head_dim: cache.head_dim,
            pages_max: each,
            num_pages: num,
        };
        Ok(Self {
            sweep: Sweep::new(device, scan)?,
            first: DeviceBuffer::zeros(device, items)?,
            end: DeviceBuffer::zeros(device, items)?,
            of: vec![u32::MAX; entries],
            scores: DeviceBuffer::zeros(device, num * cache.group)?,
            lse: DeviceBuffer::zeros(device, items * cache.group)?,
            state: State::new(device, items * cache.group, cache.head_dim)?,
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
        if nodes.of[..] == *sequences {
            return Ok(());
        }
        let heads = plan.shape.heads as u32;
        let (mut first, mut end) = (Vec::new(), Vec::new());
        for &sequence in sequences {
            for head in 0..heads {
                let there = sequence != u32::MAX;
                let start = if there { (sequence * heads + head) * each as u32 } else { 0 };
                first.push(start);
                end.push(if there { start + each as u32 } else { 0 });
            }
        }
        nodes.first.write_async(0, &first, stream)?;
        nodes.end.write_async(0, &end, stream)?;
        nodes.of = sequences.to_vec();
        Ok(())
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
        Ok(Self {
            q: DeviceBuffer::zeros(device, heads * cache.head_dim)?,
            ranges: [words()?, words()?, words()?, words()?],
            exact: shape.exact.then(exact).transpose()?,
            sparse: (!shape.exact).then(sparse).transpose()?,
            num_fetch: DeviceBuffer::zeros(device, 1)?,
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
        let LayerMemory { kv, chunks, pages, slots, doubt, nodes } = layer;
        let batch = tables.0.slice(0..self.shape.entries)?;
        let tables = &Tables { shape: plan.shape, batch, sequences: tables.1, chunks: chunks.view() };
        let scale = f32::from_bits(io.scale);
        let [page_first, page_end, row_first, row_end] = &mut self.ranges;
        let whole = self.sparse.as_mut().and_then(|sparse| sparse.whole.as_mut());
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
            num_fetch: self.num_fetch.view_mut(),
            tree_pages: plan.tree.then(|| pages.tree_pages.view()),
            doubt,
        };
        append_step(stream, tables, append)?;
        let params = AttendParams { scale, softcap: None };
        if let Some((attend, state)) = &mut self.exact {
            let args = DecodeArgs { q: self.q.view(), kv: kv.view(), params, skip_below: None };
            let rows = Spans { first: self.ranges[2].view(), end: self.ranges[3].view() };
            dense_decode(stream, attend, &args, rows, state.write())?;
        }
        if self.sparse.is_some() {
            self.queue_sparse(stream, (plan, shared), tables, (kv, pages, slots, nodes), params)?;
        }
        if let Some((_, state)) = &self.exact {
            finish(stream, tables, &[state.read()], &io.out, FinishStart::Early)?;
        }
        let Some(sparse) = &self.sparse else { return Ok(()) };
        stream.wait(&shared.joins[0])?;
        let mut parts = vec![sparse.chosen.read()];
        if plan.tail && plan.tail_place == TailPlace::Beside {
            parts.push(sparse.tail.read());
        }
        parts.extend(sparse.nodes.as_ref().map(|nodes| nodes.state.read()));
        parts.extend(sparse.whole.as_ref().map(|whole| whole.state.read()));
        finish(stream, tables, &parts, &io.out, FinishStart::AfterAll)
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
        shared.forks[0].record(stream)?;
        shared.sides[0].wait(&shared.forks[0])?;
        if !plan.tree {
            let built = memory.write(shared.signs.as_ref());
            build_pages(&shared.sides[0], tables, PageSource::Step, kv.view(), built)?;
        }
        if let Some(nodes) = &mut sparse.nodes {
            let pages = Spans { first: nodes.first.view(), end: nodes.end.view() };
            let summaries = Summaries {
                keys: of_nodes.mean_keys.view(),
                log_count: of_nodes.log_count.view(),
                pages,
                spreads: Some((of_nodes.spread.view(), floe_index::export::PAGE_SPREAD)),
            };
            let (query, side) = ((self.q.view(), params.scale), &shared.sides[0]);
            nodes.sweep.page_scores(
                side,
                query,
                &summaries,
                nodes.scores.view_mut(),
                nodes.lse.view_mut(),
            )?;
            if plan.tail {
                let units = TailUnits::Pages(nodes.scores.view());
                let (lse, values) = (nodes.lse.view(), of_nodes.mean_values.view());
                nodes.sweep.tail(side, &TailArgs { units, lse, values, pages }, nodes.state.write())?;
            }
        }
        let whole_rows = Spans { first: self.ranges[2].view(), end: self.ranges[3].view() };
        let args = DecodeArgs { q: self.q.view(), kv: kv.view(), params, skip_below: None };
        if let Some(Whole { plan: attend, state, warm }) = &mut sparse.whole {
            let items = WholeItems { rows: whole_rows, warm: warm.view(), heads: plan.shape.heads };
            whole_decode(&shared.sides[0], attend, &args, items, state.write())?;
        }
        shared.joins[0].record(&shared.sides[0])?;
        let pages = Spans { first: self.ranges[0].view(), end: self.ranges[1].view() };
        let query = (self.q.view(), params.scale);
        let rotation = shared.signs.as_ref().map(|signs| Rotation { signs: signs.view(), order: None });
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
                scores: shared.page_scores.view_mut(),
                residuals: shared.residuals.view_mut(),
                lse: sparse.unit_lse.view_mut(),
            };
            let means = PageKeys { keys: memory.mean_keys.view(), pages };
            sparse.sweep.token_scores(stream, query, &means, &codes, to)?;
        } else {
            let summaries = Summaries {
                keys: memory.mean_keys.view(),
                log_count: memory.log_count.view(),
                pages,
                spreads: plan.tree.then(|| (memory.spread.view(), floe_index::export::PAGE_SPREAD)),
            };
            let (scores, lse) = (shared.page_scores.view_mut(), sparse.unit_lse.view_mut());
            sparse.sweep.page_scores(stream, query, &summaries, scores, lse)?;
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
        let units = if plan.by_token() {
            UnitsMut::Tokens { scores: shared.page_scores.view(), residuals: shared.residuals.view_mut() }
        } else if plan.tree {
            UnitsMut::PagesOfTokens { scores: shared.page_scores.view_mut(), masks: memory.masks.view() }
        } else {
            UnitsMut::Pages(shared.page_scores.view_mut())
        };
        sparse.sweep.select(stream, selection, units)?;
        let tail = {
            let scores = shared.page_scores.view();
            let units = match rotation {
                None => TailUnits::Pages(scores),
                Some(rotation) => {
                    let values = (plan.bits[1] > 0).then(|| ValueCodes {
                        bits: plan.bits[1],
                        lines: memory.value_lines.view(),
                        scales: memory.value_scales.view(),
                        rotation,
                    });
                    TailUnits::Tokens(TokenScores { scores, residuals: shared.residuals.view() }, values)
                }
            };
            let (lse, values) = (sparse.unit_lse.view(), memory.mean_values.view());
            TailArgs { units, lse, values, pages }
        };
        let beside = plan.tail && plan.tail_place == TailPlace::Beside;
        if beside {
            shared.forks[1].record(stream)?;
            shared.sides[1].wait(&shared.forks[1])?;
            sparse.sweep.tail(&shared.sides[1], &tail, sparse.tail.write())?;
            shared.joins[1].record(&shared.sides[1])?;
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
        let mut fetch = FetchList {
            from: sparse.from.view_mut(),
            to: sparse.to.view_mut(),
            num: self.num_fetch.view_mut(),
        };
        resolve::<E>(stream, tables, found, slots.write(), &mut fetch)?;
        fetch_listed(stream, plan.shape.head_dim, &fetch, kv.view_mut())?;
        let args = DecodeArgs { q: self.q.view(), kv: kv.view(), params, skip_below: None };
        let lists = Lists::Rows {
            spans: Spans { first: sparse.list_first.view(), end: sparse.list_end.view() },
            rows: sparse.list.view(),
        };
        let Sparse { attend, chosen, tail: tail_state, sweep, .. } = sparse;
        if plan.tail && !beside {
            let attention = Beside { plan: attend, args, lists };
            return sweep.tail_and_decode(stream, &tail, tail_state.write(), attention, chosen.write());
        }
        sparse_decode(stream, attend, &args, lists, chosen.write())?;
        if beside { stream.wait(&shared.joins[1]) } else { Ok(()) }
    }

    /// What the last step left on the device; waits.
    pub(super) fn read(&self, stream: &Stream) -> Result<StepRead, DeviceError> {
        if let Some((_, state)) = &self.exact {
            return Ok(StepRead { lse: state.lse.read(stream)?, ..StepRead::default() });
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
