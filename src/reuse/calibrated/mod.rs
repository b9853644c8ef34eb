//! Reuse under a measured bound: anchors, ladders, gates.
//!
//! | | |
//! |---|---|
//! | anchors | are made only by steps that reused nothing, so no state stands on another reused one |
//! | a match | is the anchor nearest before rotary embedding; one decision for all heads of the group |
//! | a step | reads shells of the matched anchor (`anchor.rs`) until every head's gate admits the prediction (`ladder.rs`, `gate.rs`) |
//! | a refusal | has read part of the context already: it reads the rest and is exact, at no extra cost |
//! | labels | every step that reused nothing measures what each rung would have cost |
//! | a shard that saves nothing | rests (`pace.rs`): its steps are not even begun |
//!
//! With a sparse policy the ladder has the retrieved tokens as shells and the policy's tail beyond them: a reused step
//! searches nothing. A refused one then goes its ordinary way, and what it read before is lost.

mod plan;

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use floe_cuda::Isa;
use floe_cuda::cpu::distances;

use crate::config::Config;
use crate::error::Result;
use crate::ids::TokenPos;
use crate::reuse::accumulate::of_head;
use crate::reuse::anchor::{Anchor, Ranking, beyond};
use crate::reuse::bytes::{Reader, Writer};
use crate::reuse::gate::{Gate, Label};
use crate::reuse::ladder::Ladder;
use crate::reuse::pace::{Event, Pace};
use crate::reuse::{
    Ask, CalibratedOptions, Outcome, ReuseCache, ReuseQuery, ReuseReport, ReuseSummary, SparseStep,
};
use crate::state::StateBuf;

/// Shares of the covered tokens within each shell. Finer rungs read less; every one costs two states an anchor.
const SHARES: [f32; 7] = [1.0 / 32.0, 1.0 / 16.0, 1.0 / 8.0, 3.0 / 16.0, 0.25, 0.375, 0.5];

/// The same of the retrieved tokens, for sparse policies.
const SPARSE_SHARES: [f32; 3] = [0.25, 0.5, 1.0];

/// Cells of a survey a side: not covered, each shell, beyond all.
const CELLS: usize = SHARES.len() + 2;

/// Steps after which an anchor is too old: what came since must be read in full.
const LAG_MAX: u32 = 512;
const SPARSE_LAG_MAX: u32 = 64;

/// Steps between two anchors of a sparse policy: making one reads the retrieved rows again.
const SPARSE_GAP: u32 = 4;

/// Fewest tokens that shells are made of: the innermost then holds two.
const COVERED_MIN: u32 = 64;

/// Fewest retrieved tokens that are worth a ladder.
const RETRIEVED_MIN: usize = 16;

/// What a shard does without reuse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Base {
    Exact,
    Sparse,
}

/// What the step under way is doing.
#[derive(Clone, Debug, Default)]
enum Phase {
    #[default]
    Idle,
    /// Reading shells of an anchor. `forced`: a lottery step, which must not reuse.
    Climb { anchor: Arc<Anchor>, forced: bool },
    /// Reading everything, in cells of (shell of the matched anchor, shell of the anchor being made).
    Survey { matched: Option<Arc<Anchor>>, ranked: bool },
    /// After a sparse step: shells of what it retrieved.
    Adopt { covered: Range<u32>, tail: StateBuf, ranked: bool },
}

/// A set of tokens to ask for.
#[derive(Clone, Debug)]
enum Tokens {
    Range(Range<u32>),
    /// Part of `Step::lists`.
    Listed(Range<usize>),
    /// A shell of the anchor being climbed.
    Shell(usize),
}

/// What its state is for. Cells count from 0 = not covered by shells, 1 = shell 0, to `rungs + 1` = beyond all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Base,
    Rung,
    Rest,
    Cell { old: usize, new: usize },
}

/// The step under way; keeps its memory.
#[derive(Default)]
struct Step {
    phase: Phase,
    epoch: u64,
    position: u32,
    q_pre: Vec<f32>,
    pieces: Vec<(Tokens, Role)>,
    next: usize,
    lists: Vec<u32>,
    ladder: Ladder,
    ranking: Ranking,
    /// Place of every covered token in the matched anchor's ladder, as a cell.
    old_places: Vec<u8>,
    old: Vec<StateBuf>,
    new: Vec<StateBuf>,
    accepted: bool,
    /// Whether `ladder` holds estimates that wait for the answer of a sparse step.
    awaiting: bool,
    report: ReuseReport,
}

/// The cache. See the module.
pub struct Calibrated {
    options: CalibratedOptions,
    base: Base,
    group: usize,
    dim: usize,
    sinks: u32,
    window: u32,
    /// Bytes of a token's key.
    key_bytes: usize,
    /// Of the lottery.
    seed: u64,
    isa: Isa,
    epoch: u64,
    anchors: VecDeque<Arc<Anchor>>,
    /// `[rungs, group]`
    gates: Vec<Gate>,
    pace: Pace,
    sorted: Vec<Label>,
    step: Step,
}

impl Calibrated {
    /// An empty cache for shard number `shard` of the configured model.
    #[must_use]
    pub fn new(config: &Config, options: CalibratedOptions, shard: usize) -> Self {
        let base = if config.policy.is_exact() { Base::Exact } else { Base::Sparse };
        let (group, dim) = (config.heads.group(), config.heads.head_dim());
        Self {
            options,
            base,
            group,
            dim,
            sinks: config.sinks as u32,
            window: config.window as u32,
            key_bytes: dim * config.kv_dtype.size_bytes(),
            seed: mix(config.seed ^ mix(shard as u64)),
            isa: Isa::best(),
            epoch: 0,
            anchors: VecDeque::new(),
            gates: vec![Gate::new(); shares(base).len() * group],
            pace: Pace::new(),
            sorted: Vec::new(),
            step: Step::default(),
        }
    }

    /// Whether the lottery falls on this step.
    fn drawn(&self, position: u32) -> bool {
        let ticket = mix(self.seed ^ u64::from(position)) >> 11;
        (ticket as f64) < f64::from(self.options.lottery) * (1u64 << 53) as f64
    }

    /// The usable anchor whose queries are nearest: least over the anchors of the largest over the
    /// heads of `|q - q'|^2 / |q|^2`; the newest of equals.
    fn nearest(&mut self, query: &ReuseQuery<'_>) -> Option<Arc<Anchor>> {
        let lag_max = if self.base == Base::Exact { LAG_MAX } else { SPARSE_LAG_MAX };
        let (epoch, position, dim) = (self.epoch, query.position, self.dim);
        let mut best: Option<(f32, &Arc<Anchor>)> = None;
        let usable =
            |a: &&Arc<Anchor>| a.epoch == epoch && a.position < position && position - a.position <= lag_max;
        for anchor in self.anchors.iter().rev().filter(usable) {
            let mut farthest = 0.0f32;
            for head in 0..self.group {
                let (q, then) = (of_head(query.q_pre, head, dim), of_head(&anchor.q_pre, head, dim));
                let mut square = [0.0];
                let shapes = distances(self.isa, then, q, &mut square);
                shapes.expect("both are one row of head_dim elements");
                farthest = farthest.max(square[0] / q.iter().map(|x| x * x).sum::<f32>());
            }
            self.step.report.bytes_read += self.group * dim * 4;
            if best.is_none_or(|(least, _)| farthest < least) {
                best = Some((farthest, anchor));
            }
        }
        best.map(|(_, anchor)| anchor.clone())
    }

    /// Whether some rung admits some prediction for every head.
    fn is_open(&self) -> bool {
        self.gates.chunks(self.group).any(|rung| rung.iter().all(|gate| gate.threshold().is_finite()))
    }

    fn num_labels(&self) -> usize {
        self.gates.iter().map(|gate| gate.labels().len()).min().unwrap_or(0)
    }

    /// Compares every rung reached with the answer.
    fn learn(&mut self, truth: &StateBuf) {
        let rule = (self.options.labels, self.options.max_error);
        for (rung, head, label) in self.step.ladder.labels(truth) {
            self.gates[rung * self.group + head].learn(label, rule, &mut self.sorted);
        }
    }

    /// Keeps the shells of the step's own ranking, with the states of `inner` and of what lies beyond them all.
    fn keep(&mut self, covered: Range<u32>, inner: &[StateBuf], rest: &StateBuf) -> Result<()> {
        let mut shells: Vec<Vec<u32>> = vec![Vec::new(); inner.len()];
        for (tokens, role) in &self.step.pieces {
            if let (Tokens::Listed(range), Role::Cell { new, .. }) = (tokens, role)
                && (1..=inner.len()).contains(new)
            {
                shells[new - 1].extend_from_slice(&self.step.lists[range.clone()]);
            }
        }
        shells.iter_mut().for_each(|shell| shell.sort_unstable());
        let cuts = std::iter::once(0).chain(shells.iter().scan(0, |at, shell| {
            *at += shell.len() as u32;
            Some(*at)
        }));
        let anchor = Anchor {
            epoch: self.epoch,
            position: self.step.position,
            q_pre: self.step.q_pre.clone(),
            covered,
            cuts: cuts.collect(),
            tokens: shells.concat(),
            inner: inner.to_vec(),
            beyond: beyond(inner, rest)?,
        };
        if self.anchors.len() == self.options.anchors {
            self.anchors.pop_front();
        }
        self.anchors.push_back(Arc::new(anchor));
        Ok(())
    }

    fn book(&mut self, event: Event) {
        let full = u64::from(self.step.position) + 1;
        let read = match self.base {
            Base::Exact => {
                (self.step.report.tokens_read + self.step.report.bytes_read / (2 * self.key_bytes)) as u64
            }
            Base::Sparse if event == Event::Reused => 0,
            Base::Sparse => full,
        };
        self.pace.book(event, (read, full));
        let (labels, open) = (self.num_labels(), self.is_open());
        self.pace.judge(labels, open);
    }

    fn finish_survey(&mut self, matched: Option<Arc<Anchor>>, state: &mut StateBuf) -> Result<Outcome> {
        state.reset(self.group, self.dim);
        self.step.new.iter().try_for_each(|cell| state.merge(cell))?;
        if let Some(anchor) = matched {
            let Step { ladder, old, .. } = &mut self.step;
            ladder.start(self.group, self.dim);
            ladder.add(&old[0])?;
            (0..anchor.num_rungs()).try_for_each(|rung| ladder.climb(&anchor, &old[rung + 1]))?;
            self.learn(state);
        }
        let new = std::mem::take(&mut self.step.new);
        let end = covered_end(self.step.position + 1, self.window, self.sinks);
        let kept = self.keep(self.sinks..end, &new[1..=SHARES.len()], &new[SHARES.len() + 1]);
        self.step.new = new;
        kept?;
        self.book(Event::Anchored);
        Ok(Outcome::Attended)
    }

    fn finish_climb(&mut self, state: &mut StateBuf) -> Result<Outcome> {
        if self.step.accepted {
            if let Some(estimate) = self.step.ladder.estimate() {
                state.clone_from(estimate);
            }
            self.step.report.heads_reused = self.group;
            self.step.report.lineage = 1;
            self.book(Event::Reused);
            return Ok(Outcome::Attended);
        }
        if self.base == Base::Sparse {
            self.step.awaiting = true;
            return Ok(Outcome::Declined);
        }
        state.clone_from(self.step.ladder.fresh());
        self.learn(state);
        self.book(Event::Refused);
        Ok(Outcome::Attended)
    }

    /// After a rung: give it out, go on, or read the rest too.
    fn decide(&mut self, anchor: &Anchor, forced: bool) {
        let rung =
            self.step.next - self.step.pieces.iter().filter(|(_, role)| *role == Role::Base).count() - 1;
        let gates = &self.gates[rung * self.group..][..self.group];
        let predicted = self.step.ladder.predicted();
        if !forced && gates.iter().zip(predicted).all(|(gate, predicted)| gate.admits(*predicted)) {
            self.step.accepted = true;
            self.step.pieces.truncate(self.step.next);
        } else if rung + 1 == anchor.num_rungs() && self.base == Base::Exact {
            anchor.rest(&mut self.step.old_places, &mut self.step.lists);
            self.step.pieces.push((Tokens::Listed(0..self.step.lists.len()), Role::Rest));
        }
    }
}

impl ReuseCache for Calibrated {
    fn begin(&mut self, query: &ReuseQuery<'_>) -> bool {
        self.step.phase = Phase::Idle;
        (self.step.accepted, self.step.awaiting, self.step.next) = (false, false, 0);
        self.step.report = ReuseReport::default();
        let covered = covered_end(query.position + 1, self.window, self.sinks) - self.sinks;
        let too_short = (query.position as usize) < self.options.min_tokens || covered < COVERED_MIN;
        if too_short || self.pace.rests() {
            return false;
        }
        self.step.report.active = true;
        self.step.epoch = self.epoch;
        self.step.position = query.position;
        self.step.q_pre.clear();
        self.step.q_pre.extend_from_slice(query.q_pre);
        let matched = self.nearest(query);
        if let Some(anchor) = &matched {
            self.step.report.heads_matched = self.group;
            self.step.report.lag = (query.position - anchor.position) as usize;
        }
        let forced = self.drawn(query.position);
        match (self.base, matched) {
            (Base::Exact, Some(anchor)) if !self.pace.anchor_is_due(&self.options) => {
                self.step.ladder.start(self.group, self.dim);
                self.plan_climb(&anchor);
                self.step.phase = Phase::Climb { anchor, forced };
                true
            }
            (Base::Exact, matched) => {
                self.clear_cells();
                self.step.pieces.clear();
                self.step.phase = Phase::Survey { matched, ranked: false };
                true
            }
            // Here a measurement costs reading: it is made to learn, by lottery, and on the way to a refusal.
            (Base::Sparse, Some(anchor))
                if forced || self.is_open() || self.num_labels() < self.options.labels / 2 =>
            {
                self.step.ladder.start(self.group, self.dim);
                self.plan_climb(&anchor);
                self.step.phase = Phase::Climb { anchor, forced };
                true
            }
            (Base::Sparse, _) => false,
        }
    }

    fn ask(&self) -> Option<Ask<'_>> {
        let now = self.step.position + 1;
        let anchor = match &self.step.phase {
            Phase::Idle => return None,
            Phase::Survey { ranked: false, .. } => return Some(Ask::Logits(0..now)),
            Phase::Adopt { ranked: false, .. } => return Some(Ask::LogitsOf(&self.step.lists)),
            Phase::Climb { anchor, .. } => Some(anchor),
            Phase::Survey { .. } | Phase::Adopt { .. } => None,
        };
        let (tokens, _) = self.step.pieces.get(self.step.next)?;
        Some(match tokens {
            Tokens::Range(range) => Ask::Range(range.clone()),
            Tokens::Listed(range) => Ask::List(&self.step.lists[range.clone()]),
            Tokens::Shell(shell) => Ask::List(anchor?.shell(*shell)),
        })
    }

    fn answer(&mut self, part: &StateBuf) -> Result<()> {
        let Some((tokens, role)) = self.step.pieces.get(self.step.next) else { return Ok(()) };
        self.step.report.tokens_read += match tokens {
            Tokens::Range(range) => range.len(),
            Tokens::Listed(range) => range.len(),
            Tokens::Shell(shell) => match &self.step.phase {
                Phase::Climb { anchor, .. } => anchor.shell(*shell).len(),
                Phase::Idle | Phase::Survey { .. } | Phase::Adopt { .. } => 0,
            },
        };
        self.step.next += 1;
        match *role {
            Role::Base | Role::Rest => self.step.ladder.add(part),
            Role::Cell { old, new } => {
                self.step.old[old].merge(part)?;
                self.step.new[new].merge(part)
            }
            Role::Rung => {
                let Phase::Climb { anchor, forced } = self.step.phase.clone() else { return Ok(()) };
                self.step.ladder.climb(&anchor, part)?;
                self.step.report.bytes_read += 8 * self.group * (self.dim + 1);
                self.decide(&anchor, forced);
                Ok(())
            }
        }
    }

    fn answer_logits(&mut self, logits: &mut [f32]) {
        let num = logits.len() / self.group;
        let phase = std::mem::take(&mut self.step.phase);
        match phase {
            Phase::Survey { matched, .. } => {
                self.step.report.bytes_read += num * self.key_bytes;
                let end = covered_end(self.step.position + 1, self.window, self.sinks);
                let candidates = self.sinks as usize..end as usize;
                self.step.ranking.rank(logits, self.group, candidates, &SHARES);
                self.plan_survey(matched.as_deref());
                self.step.phase = Phase::Survey { matched, ranked: true };
            }
            Phase::Adopt { covered, tail, .. } => {
                self.step.report.bytes_read += num * self.key_bytes;
                self.step.ranking.rank(logits, self.group, 0..num, &SPARSE_SHARES);
                self.plan_adopt();
                self.step.phase = Phase::Adopt { covered, tail, ranked: true };
            }
            Phase::Idle | Phase::Climb { .. } => {}
        }
    }

    fn finish(&mut self, state: &mut StateBuf) -> Result<Outcome> {
        let phase = std::mem::take(&mut self.step.phase);
        if self.step.epoch != self.epoch {
            self.step.awaiting = false;
            return Ok(Outcome::Declined);
        }
        match phase {
            Phase::Idle => Ok(Outcome::Declined),
            Phase::Climb { .. } => self.finish_climb(state),
            Phase::Survey { matched, .. } => self.finish_survey(matched, state),
            Phase::Adopt { covered, tail, .. } => {
                let new = std::mem::take(&mut self.step.new);
                let kept = self.keep(covered, &new[1..=SPARSE_SHARES.len()], &tail);
                self.step.new = new;
                kept.map(|()| Outcome::Declined)
            }
        }
    }

    fn settle(&mut self, step: &SparseStep<'_>) -> Result<bool> {
        if self.base == Base::Exact || !self.step.report.active || self.step.epoch != self.epoch {
            return Ok(false);
        }
        if std::mem::take(&mut self.step.awaiting) {
            self.learn(step.state);
        }
        let recent = self.anchors.back().is_some_and(|a| self.step.position - a.position < SPARSE_GAP);
        let selection = step.selection;
        let adopts = !recent && selection.retrieved.len() >= RETRIEVED_MIN;
        self.book(if adopts { Event::Anchored } else { Event::Refused });
        if adopts {
            self.clear_cells();
            self.step.next = 0;
            self.step.pieces.clear();
            self.step.lists.clear();
            self.step.lists.extend_from_slice(&selection.retrieved);
            let (covered, tail) = (selection.candidates(), step.tail.clone());
            self.step.phase = Phase::Adopt { covered, tail, ranked: false };
        }
        Ok(adopts)
    }

    fn report(&self) -> ReuseReport {
        self.step.report
    }

    fn fresh_lse(&self) -> &[f32] {
        &self.step.ladder.fresh().lse
    }

    fn truncate(&mut self, num_tokens: TokenPos) {
        self.epoch += 1;
        let epoch = self.epoch;
        self.anchors.retain(|anchor| anchor.position < num_tokens);
        for anchor in &mut self.anchors {
            Arc::make_mut(anchor).epoch = epoch;
        }
        if num_tokens == 0 {
            self.gates.iter_mut().for_each(Gate::clear);
            self.pace = Pace::new();
        }
    }

    fn fork(&self) -> Box<dyn ReuseCache> {
        Box::new(Self {
            anchors: self.anchors.clone(),
            gates: self.gates.clone(),
            sorted: Vec::new(),
            step: Step::default(),
            ..*self
        })
    }

    fn snapshot(&self) -> Option<Vec<u8>> {
        let mut bytes = Writer::default();
        [self.base as u64, self.group as u64, self.dim as u64, self.anchors.len() as u64]
            .into_iter()
            .chain(self.pace.words())
            .for_each(|word| bytes.word(word));
        self.anchors.iter().for_each(|anchor| anchor.write(&mut bytes));
        self.gates.iter().for_each(|gate| gate.write(&mut bytes));
        Some(bytes.done())
    }

    fn restore(&mut self, bytes: &[u8]) -> bool {
        let mut bytes = Reader::new(bytes);
        let shape = (self.group, self.dim, self.epoch);
        let read = (|| {
            let own = [self.base as u64, self.group as u64, self.dim as u64];
            for word in own {
                (bytes.word()? == word).then_some(())?;
            }
            let num_anchors = bytes.word()?;
            let mut words = [0; 8];
            for word in &mut words {
                *word = bytes.word()?;
            }
            let pace = Pace::from_words(words)?;
            let mut anchors = VecDeque::new();
            for _ in 0..num_anchors {
                let anchor = Anchor::read(&mut bytes, shape)?;
                (anchor.num_rungs() == shares(self.base).len()).then_some(())?;
                anchors.push_back(Arc::new(anchor));
            }
            let num_gates = self.gates.len();
            let gates = (0..num_gates).map(|_| Gate::read(&mut bytes, self.options.labels));
            let gates = gates.collect::<Option<Vec<_>>>()?;
            bytes.is_done().then_some((pace, anchors, gates))
        })();
        let Some((pace, anchors, gates)) = read else { return false };
        (self.pace, self.anchors, self.gates) = (pace, anchors, gates);
        true
    }

    fn summary(&self) -> ReuseSummary {
        let step = &self.step;
        let anchors: usize = self.anchors.iter().map(|anchor| anchor.size_bytes()).sum();
        let labels: usize = self.gates.iter().map(|gate| 8 * gate.labels().len()).sum();
        let scratch = 4 * step.lists.capacity() + step.old_places.capacity() + step.ranking.size_bytes();
        let threshold = |gate: &Gate| Some(gate.threshold()).filter(|t| t.is_finite()).unwrap_or(f32::NAN);
        ReuseSummary {
            entries: self.anchors.len(),
            size_bytes: anchors + labels + scratch + step.ladder.size_bytes(),
            labels: self.num_labels(),
            resting: self.pace.is_resting(),
            thresholds: self.gates.iter().map(threshold).collect(),
        }
    }
}

fn shares(base: Base) -> &'static [f32] {
    match base {
        Base::Exact => &SHARES,
        Base::Sparse => &SPARSE_SHARES,
    }
}

/// End of what shells may cover: `now` less the window.
fn covered_end(now: u32, window: u32, sinks: u32) -> u32 {
    now.saturating_sub(window).max(sinks)
}

/// SplitMix64 (Steele et al. 2014): one output of the generator at state `x`.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
