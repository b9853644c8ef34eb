//! The main path: one layer of one decode step.
//!
//! ```text
//! query -> reuse match -> plan -> select -> page table -> fetch -> attend -> merge -> output, commit
//! ```

use rayon::prelude::*;

use crate::attend::{AttendScratch, AttentionBackend, HotTokens, Tokens, logits, logits_of};
use crate::config::Config;
use crate::error::Result;
use crate::page::PageTable;
use crate::plan::{HeadPath, StepFacts, choose};
use crate::policy::{EvictionKind, PrefetchKind};
use crate::prefill::publish;
use crate::query::GroupQuery;
use crate::reuse::{Ask, Outcome, ReuseQuery, ReuseReport, SparseStep};
use crate::select::{SelectCost, SelectRequest, SelectScratch};
use crate::selection::Selection;
use crate::sequence::{LayerShards, Shard};
use crate::shape::PageShape;
use crate::sim::Clock;
use crate::state::StateBuf;
use crate::step::{ShardReport, Stage, StepReport, Watch};
use crate::transfer::Fetched;
use crate::view::{TensorView, widen};

/// Working memory of one worker thread; everything a step needs beyond the shard.
#[derive(Default)]
pub(crate) struct Workspace {
    q: Vec<f32>,
    q_pre: Vec<f32>,
    selection: Selection,
    table: PageTable,
    select: SelectScratch,
    attend: AttendScratch,
    state: StateBuf,
    tail: StateBuf,
    guess: Vec<u32>,
    /// Key and value of one token while it is weighed, `[2, head_dim]`.
    row: Vec<f32>,
    reuse: ReuseSpace,
}

/// Working memory of what a reuse cache asks for.
#[derive(Default)]
struct ReuseSpace {
    attend: AttendScratch,
    part: StateBuf,
    logits: Vec<f32>,
    state: StateBuf,
}

/// One workspace per kv head, so that each has grown after one step, whichever threads run the heads. The locks are never
/// waited for: an engine takes one step at a time.
pub(crate) struct Workspaces(Vec<parking_lot::Mutex<Workspace>>);

impl Workspaces {
    pub(crate) fn new(num_kv_heads: usize) -> Self {
        Self((0..num_kv_heads).map(|_| Default::default()).collect())
    }

    fn of(&self, head: usize) -> parking_lot::MutexGuard<'_, Workspace> {
        self.0[head].lock()
    }
}

/// What every kv head of the step shares.
pub(crate) struct StepContext<'a> {
    pub(crate) config: &'a Config,
    pub(crate) backend: &'a dyn AttentionBackend,
    pub(crate) clock: &'a dyn Clock,
    pub(crate) workspaces: &'a Workspaces,
    pub(crate) layer: usize,
    pub(crate) scale: f32,
    /// Post-RoPE and, where the host gives them, pre-RoPE queries, `[1, num_q_heads, head_dim]`.
    pub(crate) q: TensorView<'a>,
    pub(crate) q_pre: Option<TensorView<'a>>,
}

/// Attends with the queries of the last stored position; `out` is `[num_q_heads, head_dim]`.
pub(crate) fn decode_layer(
    step: &StepContext<'_>,
    layer: &mut LayerShards,
    out: &mut [f32],
    report: &mut StepReport,
) -> Result<()> {
    let per_shard = step.config.heads.group() * step.config.heads.head_dim();
    report.shards.resize_with(layer.shards.len(), ShardReport::default);
    let span = layer.span;
    layer
        .shards
        .par_iter_mut()
        .zip(out.par_chunks_mut(per_shard))
        .zip(report.shards.par_iter_mut())
        .enumerate()
        .try_for_each(|(head, ((shard, out), report))| {
            let mut space = step.workspaces.of(head);
            decode_shard(step, (head, shard, span), &mut space, out, report)
        })
}

fn decode_shard(
    step: &StepContext<'_>,
    (head, shard, span): (usize, &mut Shard, Option<usize>),
    space: &mut Workspace,
    out: &mut [f32],
    report: &mut ShardReport,
) -> Result<()> {
    let mut watch = Watch::start(step.clock);
    if span.is_none() {
        publish(shard)?;
    }
    watch.lap(Stage::Publish);
    let config = step.config;
    let (group, head_dim) = (config.heads.group(), config.heads.head_dim());
    let num_tokens = shard.pages.num_tokens() as u32;
    let position = num_tokens - 1;

    // 1 query
    load_query(&step.q, head, group, &mut space.q);
    let query = GroupQuery { q: &space.q, group, scale: step.scale };

    watch.lap(Stage::Query);

    // 2 reuse match, 3 plan; a cache that declines leaves the step to its ordinary path
    let mut facts = StepFacts {
        num_tokens: num_tokens as usize,
        budget: config.budget,
        sliding_layer: span.is_some(),
        dense_layer: step.layer < config.dense_layers,
        exact_policy: config.policy.is_exact(),
        reuse: step.q_pre.is_some() && config.policy.reuse().is_on(),
        doubtful: false,
    };
    let mut path = choose(&facts);
    let asked = path == HeadPath::Reuse;
    if let (true, Some(q_pre)) = (asked, &step.q_pre) {
        load_query(q_pre, head, group, &mut space.q_pre);
        if reuse(step, &query, (shard, position), (&space.q_pre, &mut space.reuse))? == Outcome::Declined {
            facts.reuse = false;
            path = choose(&facts);
        }
    }
    if path == HeadPath::Sparse {
        facts.doubtful = shard.selector.doubts(&query);
        path = choose(&facts);
    }

    watch.lap(Stage::Reuse);

    // 4 select; sinks and window are attended first, because they tell how much each head has left to look for
    let selection = &mut space.selection;
    let mut select_bytes = 0;
    space.state.reset(group, head_dim);
    match path {
        HeadPath::Exact
        | HeadPath::ExactWithinBudget
        | HeadPath::ExactDenseLayer
        | HeadPath::ExactInDoubt => selection.reset(num_tokens, 0, 0),
        HeadPath::ExactSpan => {
            let attended =
                span.map_or(num_tokens, |span| num_tokens.min(u32::try_from(span).unwrap_or(u32::MAX)));
            selection.reset(num_tokens, 0, num_tokens - attended);
        }
        HeadPath::Reuse => {
            selection.reset(num_tokens, 0, 0);
            space.state.clone_from(&space.reuse.state);
        }
        HeadPath::Sparse => {
            let cost = select_sparse(
                step,
                &query,
                shard,
                (selection, &mut space.state),
                (&mut space.attend, &mut space.select),
            )?;
            select_bytes = cost.bytes_read;
        }
    }
    debug_assert!(selection.is_well_formed(), "{selection:?}");

    watch.lap(Stage::Select);

    // 5 page table
    space.table.resolve(selection);

    // 6 fetch
    watch.lap(Stage::Table);
    let mut hot = shard.hot.as_mut().filter(|_| path == HeadPath::Sparse);
    if let Some(hot) = &mut hot {
        hot.demand(&selection.retrieved, &shard.pages)?;
    }
    watch.lap(Stage::Fetch);

    // 7 attend
    if !matches!(path, HeadPath::Sparse | HeadPath::Reuse) {
        shard.pages.verify(selection.window.clone())?;
    }
    let tokens = match path {
        HeadPath::Reuse => Tokens::List(&[]),
        HeadPath::Sparse => match hot.as_ref().map(|hot| hot.view()) {
            Some((table, memory)) => Tokens::Hot(HotTokens { tokens: &selection.retrieved, table, memory }),
            None => Tokens::List(&selection.retrieved),
        },
        _ => Tokens::Range(selection.window.clone()),
    };
    step.backend.attend(&query, &shard.pages, tokens, &mut space.attend, &mut space.state)?;
    report.exact_lse.clone_from(&space.state.lse);
    report.reuse = if asked { shard.reuse.report() } else { ReuseReport::default() };
    if report.reuse.heads_reused > 0 {
        report.exact_lse.copy_from_slice(shard.reuse.fresh_lse());
    }
    report.fetched = match hot {
        Some(hot) => hot.finish(&query, &selection.retrieved, (&shard.pages, &space.state.lse))?,
        None => Fetched::default(),
    };

    watch.lap(Stage::Attend);

    // 8 merge
    let mut tail_bytes = 0;
    if path == HeadPath::Sparse {
        space.tail.reset(group, head_dim);
        let tail = space.tail.as_mut();
        tail_bytes = shard.selector.tail(&query, selection, &mut space.select, tail)?.bytes_read;
        space.state.merge(&space.tail)?;
    }

    watch.lap(Stage::Tail);

    // 9 output, commit
    out.copy_from_slice(&space.state.out);
    if asked && path == HeadPath::Sparse {
        let sparse = SparseStep { selection, state: &space.state, tail: &space.tail };
        if shard.reuse.settle(&sparse)? {
            answer_asks(step, &query, shard, &mut space.reuse)?;
            shard.reuse.finish(&mut space.reuse.state)?;
        }
        report.reuse = shard.reuse.report();
    }
    if let Some(cold) = &config.cold {
        let (row, lse) = (&mut space.row, &report.exact_lse);
        row.resize(2 * head_dim, 0.0);
        let (key, value) = row.split_at_mut(head_dim);
        shard.touch(&space.table, |pages, token| match cold.eviction {
            EvictionKind::Mass => {
                pages.widen_row(token, key, value);
                query.mass(key, lse)
            }
            _ => 0.0,
        });
    }
    report.fill(path, selection, &space.table, PageShape::new(head_dim, config.kv_dtype));
    watch.lap(Stage::Commit);
    report.stages = watch.times();
    report.index_bytes_read = select_bytes + tail_bytes + report.reuse.bytes_read;
    if report.reuse.active {
        // What the cache read goes on top of a sparse step, and in place of everything else.
        let own = if path == HeadPath::Sparse { report.tokens_attended } else { 0 };
        report.tokens_attended = own + report.reuse.tokens_read;
        report.kv_bytes_read = report.tokens_attended * PageShape::new(head_dim, config.kv_dtype).row_bytes();
    }
    Ok(())
}

/// Offers the step to the shard's reuse cache.
fn reuse(
    step: &StepContext<'_>,
    query: &GroupQuery<'_>,
    (shard, position): (&mut Shard, u32),
    (q_pre, space): (&[f32], &mut ReuseSpace),
) -> Result<Outcome> {
    if !shard.reuse.begin(&ReuseQuery { q_pre, position }) {
        return Ok(Outcome::Declined);
    }
    answer_asks(step, query, shard, space)?;
    shard.reuse.finish(&mut space.state)
}

/// Attends and scores what the reuse cache asks for until it has enough.
fn answer_asks(
    step: &StepContext<'_>,
    query: &GroupQuery<'_>,
    shard: &mut Shard,
    space: &mut ReuseSpace,
) -> Result<()> {
    let head_dim = step.config.heads.head_dim();
    let ReuseSpace { attend, part, logits: scores, .. } = space;
    let Shard { pages, reuse, .. } = shard;
    while let Some(ask) = reuse.ask() {
        let tokens = match ask {
            Ask::Logits(tokens) => {
                pages.verify(tokens.clone())?;
                logits(query, pages, tokens, attend, scores)?;
                reuse.answer_logits(scores);
                continue;
            }
            Ask::LogitsOf(tokens) => {
                pages.verify_tokens(tokens)?;
                logits_of(query, pages, tokens, attend, scores)?;
                reuse.answer_logits(scores);
                continue;
            }
            Ask::Range(tokens) => {
                pages.verify(tokens.clone())?;
                Tokens::Range(tokens)
            }
            Ask::List(tokens) => {
                pages.verify_tokens(tokens)?;
                Tokens::List(tokens)
            }
        };
        part.reset(query.group, head_dim);
        step.backend.attend(query, pages, tokens, attend, part)?;
        reuse.answer(part)?;
    }
    Ok(())
}

/// Attends sinks and window, then fills the selection with what the policy finds beside them.
fn select_sparse(
    step: &StepContext<'_>,
    query: &GroupQuery<'_>,
    shard: &Shard,
    (selection, state): (&mut Selection, &mut StateBuf),
    (attend, select): (&mut AttendScratch, &mut SelectScratch),
) -> Result<SelectCost> {
    let config = step.config;
    let num_tokens = shard.pages.num_tokens() as u32;
    let window = num_tokens.saturating_sub(config.window as u32).min(shard.published as u32);
    selection.reset(num_tokens, config.sinks as u32, window);
    let budget = config.budget.saturating_sub(selection.num_tokens());
    shard.pages.verify(selection.sinks.clone())?;
    shard.pages.verify(selection.window.clone())?;
    if shard.selector.reads_rows() {
        shard.pages.verify(selection.candidates())?;
    }
    for fixed in [&selection.sinks, &selection.window] {
        step.backend.attend(query, &shard.pages, Tokens::Range(fixed.clone()), attend, state)?;
    }
    let request = SelectRequest { query: *query, pages: &shard.pages, budget, attended_lse: &state.lse };
    let cost = shard.selector.select(&request, select, selection)?;
    shard.pages.verify_tokens(&selection.retrieved)?;
    Ok(cost)
}

/// Brings in what the shards of a layer may ask for next. The queries of `step` are those of the layer before.
pub(crate) fn prefetch_layer(step: &StepContext<'_>, layer: &mut LayerShards) -> Result<()> {
    let kind = step.config.hot.prefetch;
    layer.shards.par_iter_mut().enumerate().try_for_each(|(head, shard)| {
        if shard.hot.is_none() || shard.published == 0 || kind == PrefetchKind::None {
            return Ok(());
        }
        if kind != PrefetchKind::Predicted {
            return shard.hot.as_mut().map_or(Ok(()), |hot| hot.prefetch(None, &shard.pages));
        }
        let mut space = step.workspaces.of(head);
        let mut guess = std::mem::take(&mut space.guess);
        guess.clear();
        let guessed = guess_with(step, (head, shard), &mut space, &mut guess);
        let fetched = guessed.and_then(|()| match &mut shard.hot {
            Some(hot) => hot.prefetch(Some(&guess), &shard.pages),
            None => Ok(()),
        });
        space.guess = guess;
        fetched
    })
}

/// What a sparse step with these queries would retrieve, appended to `found`.
pub(crate) fn guess_shard(
    step: &StepContext<'_>,
    (head, shard): (usize, &Shard),
    found: &mut Vec<u32>,
) -> Result<()> {
    guess_with(step, (head, shard), &mut step.workspaces.of(head), found)
}

fn guess_with(
    step: &StepContext<'_>,
    (head, shard): (usize, &Shard),
    space: &mut Workspace,
    found: &mut Vec<u32>,
) -> Result<()> {
    let heads = step.config.heads;
    load_query(&step.q, head, heads.group(), &mut space.q);
    let query = GroupQuery { q: &space.q, group: heads.group(), scale: step.scale };
    space.state.reset(heads.group(), heads.head_dim());
    let scratch = (&mut space.attend, &mut space.select);
    let cost = select_sparse(step, &query, shard, (&mut space.selection, &mut space.state), scratch);
    found.extend_from_slice(&space.selection.retrieved);
    cost.map(|_| ())
}

/// The group's rows of `[1, num_q_heads, head_dim]` queries, widened to `[group, head_dim]` f32.
fn load_query(view: &TensorView<'_>, head: usize, group: usize, q: &mut Vec<f32>) {
    let head_dim = view.shape()[2];
    q.resize(group * head_dim, 0.0);
    for (i, row) in q.chunks_exact_mut(head_dim).enumerate() {
        widen(view.row(0, head * group + i), row);
    }
}
