//! Match-amend-complete (arXiv 2604.00235) as published, without its subtraction of states.
//!
//! ```text
//! position  0    sinks          E(match)         E(now)          now
//!           | F |     reused       |     band      |     tail     |
//!             ^ with the old query  ^ with the new query: amend, complete
//! ```
//!
//! Per query head the ring holds the last `ring` steps: the query before rotary embedding and the state over `[F, E)` with
//! `E = position + 1 - band`. The nearest entry by squared L2 is reused when it is nearer than `2 d (1 - tau)^2`. The new
//! entry is the old state merged with the band, so **reuse chains without limit**: this mode exists to be compared with,
//! and [`super::Calibrated`] to be used. The decision is per head, the reading per kv head: heads of a group share the
//! longest span that one of them needs, and a head without a match makes it the whole context.
//!
//! The published ring is bf16; this one is f32: `group * (2 head_dim + 1) * 4` bytes a step.

use std::ops::Range;
use std::sync::Arc;

use floe_cuda::Isa;
use floe_cuda::cpu::{PLANE, match_scan};

use super::accumulate::{merge_head, of_head};
use super::bytes::{Reader, Writer};
use super::{Ask, MacOptions, Outcome, ReuseCache, ReuseQuery, ReuseReport, ReuseSummary, SparseStep};
use crate::config::Config;
use crate::error::Result;
use crate::ids::TokenPos;
use crate::state::StateBuf;

/// Marks a slot without an entry.
const EMPTY: u32 = u32::MAX;

/// Entries of all heads; slot = position modulo the ring's length.
#[derive(Clone)]
struct Ring {
    /// `[group, planes, slots, PLANE]`, zeros after `head_dim`; infinite = no entry, so that its distance is.
    queries: Vec<f32>,
    /// State over `[sinks, end)`: `[slots, group, head_dim]` and `[slots, group]`.
    out: Vec<f32>,
    lse: Vec<f32>,
    /// `[slots]` position that made the entry, [`EMPTY`] = none.
    position: Vec<u32>,
    /// `[slots]` epoch of the cache when it was made.
    epoch: Vec<u64>,
    /// `[slots, group]` steps that the state stands on.
    lineage: Vec<u32>,
}

/// Which part of the context a range is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    /// Between the earliest start and `E(now)`; goes into the entries.
    Body,
    /// Sinks and tail, attended afresh by every step.
    Fresh,
}

/// The step under way.
#[derive(Default)]
struct Step {
    position: u32,
    q_pre: Vec<f32>,
    parts: Vec<(Part, Range<u32>)>,
    next: usize,
    /// `[group]` where each head starts to attend, and the slot it takes the rest from.
    starts: Vec<u32>,
    slots: Vec<Option<usize>>,
    /// State over `[sinks, E(now))`, and over everything else.
    body: StateBuf,
    rest: StateBuf,
    report: ReuseReport,
    epoch: u64,
}

/// The published cache. See the module.
pub struct Mac {
    options: MacOptions,
    group: usize,
    dim: usize,
    isa: Isa,
    epoch: u64,
    /// Shared with forks until it changes.
    ring: Arc<Ring>,
    /// A query in whole planes.
    padded: Vec<f32>,
    step: Step,
}

impl Ring {
    /// Writes the query of one head and slot; `None` takes it away.
    fn set_query(&mut self, (head, slot): (usize, usize), q: Option<&[f32]>) {
        let slots = self.position.len();
        // `lse` is `[slots, group]`.
        let planes = self.queries.len() / (self.lse.len() * PLANE);
        for plane in 0..planes {
            let at = ((head * planes + plane) * slots + slot) * PLANE;
            let place = &mut self.queries[at..at + PLANE];
            let part = q.map(|q| &q[(plane * PLANE).min(q.len())..((plane + 1) * PLANE).min(q.len())]);
            place.fill(if q.is_some() { 0.0 } else { f32::INFINITY });
            place.iter_mut().zip(part.unwrap_or_default()).for_each(|(x, q)| *x = *q);
        }
    }
}

impl Mac {
    /// An empty ring for one shard of the configured model.
    #[must_use]
    pub fn new(config: &Config, options: MacOptions) -> Self {
        let (group, dim, slots) = (config.heads.group(), config.heads.head_dim(), options.ring);
        let ring = Ring {
            queries: vec![f32::INFINITY; group * slots * dim.next_multiple_of(PLANE)],
            out: vec![0.0; slots * group * dim],
            lse: vec![f32::NEG_INFINITY; slots * group],
            position: vec![EMPTY; slots],
            epoch: vec![0; slots],
            lineage: vec![0; slots * group],
        };
        let padded = vec![0.0; dim.next_multiple_of(PLANE)];
        let (ring, step) = (Arc::new(ring), Step::default());
        Self { options, group, dim, isa: Isa::best(), epoch: 0, ring, padded, step }
    }

    /// First position that an entry made at `position` does not cover.
    fn end(&self, position: u32) -> u32 {
        (u64::from(position) + 1).saturating_sub(self.options.band as u64).max(self.sinks()) as u32
    }

    fn sinks(&self) -> u64 {
        self.options.sinks as u64
    }

    /// Squared distance below which a query matches.
    fn bound(&self) -> f32 {
        2.0 * self.dim as f32 * (1.0 - self.options.tau).powi(2)
    }

    /// The nearest usable slot of one head.
    fn probe(&mut self, q: &[f32], head: usize, position: u32) -> Option<usize> {
        let slots = self.options.ring;
        let len = self.padded.len();
        let queries = &self.ring.queries[head * slots * len..][..slots * len];
        self.padded[..self.dim].copy_from_slice(q);
        let found = match_scan(self.isa, queries, &self.padded, self.bound());
        let (slot, _) = found.expect("the ring is whole rows of as many planes as the query")?;
        let old = self.ring.position[slot];
        let usable = old < position
            && self.ring.epoch[slot] == self.epoch
            && self.ring.lse[slot * self.group + head].is_finite()
            && (self.end(position) - self.end(old)) as usize <= slots;
        usable.then_some(slot)
    }

    /// Sets `step.parts` so that they tile `[0, position]` from the earliest start on, cut wherever a head starts.
    fn plan(&mut self) {
        let (first, end) = (self.sinks() as u32, self.end(self.step.position));
        let now = self.step.position + 1;
        let Step { parts, starts, next, .. } = &mut self.step;
        *next = 0;
        parts.clear();
        parts.push((Part::Fresh, 0..first.min(now)));
        let mut at = starts.iter().copied().min().unwrap_or(first);
        while at < end {
            let cut = starts.iter().copied().filter(|s| *s > at).min().unwrap_or(end).min(end);
            parts.push((Part::Body, at..cut));
            at = cut;
        }
        parts.push((Part::Fresh, end.min(now)..now));
        parts.retain(|(_, range)| !range.is_empty());
    }
}

impl ReuseCache for Mac {
    fn begin(&mut self, query: &ReuseQuery<'_>) -> bool {
        let (group, dim, position) = (self.group, self.dim, query.position);
        let mut step = std::mem::take(&mut self.step);
        step.position = position;
        step.epoch = self.epoch;
        step.q_pre.clear();
        step.q_pre.extend_from_slice(query.q_pre);
        step.body.reset(group, dim);
        step.rest.reset(group, dim);
        step.starts.clear();
        step.slots.clear();
        step.report = ReuseReport { active: true, ..ReuseReport::default() };
        let long_enough = position as usize >= self.options.min_tokens;
        for head in 0..group {
            let q = of_head(query.q_pre, head, dim);
            let slot = if long_enough { self.probe(q, head, position) } else { None };
            step.slots.push(slot);
            step.starts.push(slot.map_or(self.sinks() as u32, |s| self.end(self.ring.position[s])));
            if let Some(slot) = slot {
                let entry = slot * group + head;
                let (out, lse) = (&self.ring.out[entry * dim..][..dim], self.ring.lse[entry]);
                step.body.out[head * dim..][..dim].copy_from_slice(out);
                step.body.lse[head] = lse;
                step.report.heads_matched += 1;
                step.report.heads_reused += 1;
                step.report.lag = step.report.lag.max((position - self.ring.position[slot]) as usize);
                step.report.lineage = step.report.lineage.max(self.ring.lineage[entry] as usize);
                step.report.bytes_read += (dim + 1) * 4;
            }
        }
        step.report.bytes_read += if long_enough { group * self.options.ring * dim * 4 } else { 0 };
        self.step = step;
        self.plan();
        true
    }

    fn ask(&self) -> Option<Ask<'_>> {
        self.step.parts.get(self.step.next).map(|(_, range)| Ask::Range(range.clone()))
    }

    fn answer(&mut self, part: &StateBuf) -> Result<()> {
        let Step { parts, next, starts, body, rest, report, .. } = &mut self.step;
        let Some((kind, range)) = parts.get(*next) else { return Ok(()) };
        *next += 1;
        report.tokens_read += range.len();
        match kind {
            Part::Fresh => rest.merge(part),
            Part::Body => {
                let mut begun = (0..starts.len()).filter(|head| starts[*head] <= range.start);
                begun.try_for_each(|head| merge_head(body, part, head))
            }
        }
    }

    fn answer_logits(&mut self, _logits: &mut [f32]) {}

    fn finish(&mut self, state: &mut StateBuf) -> Result<Outcome> {
        if self.step.epoch != self.epoch {
            return Ok(Outcome::Declined);
        }
        let (group, dim, slots) = (self.group, self.dim, self.options.ring);
        let (step, position) = (&self.step, self.step.position);
        let slot = position as usize % slots;
        let ring = Arc::make_mut(&mut self.ring);
        for head in 0..group {
            let earlier = step.slots[head].map_or(0, |slot| ring.lineage[slot * group + head]);
            ring.set_query((head, slot), Some(of_head(&step.q_pre, head, dim)));
            ring.lineage[slot * group + head] = earlier + 1;
        }
        ring.out[slot * group * dim..][..group * dim].copy_from_slice(&step.body.out);
        ring.lse[slot * group..][..group].copy_from_slice(&step.body.lse);
        ring.position[slot] = position;
        ring.epoch[slot] = self.epoch;
        state.clone_from(&step.body);
        state.merge(&step.rest)?;
        Ok(Outcome::Attended)
    }

    fn settle(&mut self, _step: &SparseStep<'_>) -> Result<bool> {
        Ok(false)
    }

    fn report(&self) -> ReuseReport {
        self.step.report
    }

    fn fresh_lse(&self) -> &[f32] {
        &self.step.rest.lse
    }

    fn truncate(&mut self, num_tokens: TokenPos) {
        self.epoch += 1;
        let (group, slots) = (self.group, self.options.ring);
        let ring = Arc::make_mut(&mut self.ring);
        for slot in 0..slots {
            if ring.position[slot] < num_tokens {
                ring.epoch[slot] = self.epoch;
                continue;
            }
            ring.position[slot] = EMPTY;
            for head in 0..group {
                ring.set_query((head, slot), None);
            }
        }
    }

    fn fork(&self) -> Box<dyn ReuseCache> {
        let (options, ring, step) = (self.options, self.ring.clone(), Step::default());
        let (group, dim, isa, epoch) = (self.group, self.dim, self.isa, self.epoch);
        Box::new(Self { options, group, dim, isa, epoch, ring, padded: self.padded.clone(), step })
    }

    fn snapshot(&self) -> Option<Vec<u8>> {
        let mut bytes = Writer::default();
        for floats in [&self.ring.queries, &self.ring.out, &self.ring.lse] {
            bytes.floats(floats);
        }
        bytes.words(&self.ring.position);
        bytes.words(&self.ring.lineage);
        Some(bytes.done())
    }

    fn restore(&mut self, bytes: &[u8]) -> bool {
        let mut bytes = Reader::new(bytes);
        let read = (|| {
            let (queries, out, lse) = (bytes.floats()?, bytes.floats()?, bytes.floats()?);
            let (position, lineage) = (bytes.words()?, bytes.words()?);
            let epoch = vec![self.epoch; position.len()];
            bytes.is_done().then_some(Ring { queries, out, lse, position, epoch, lineage })
        })();
        let own = &self.ring;
        let lens = |r: &Ring| [r.queries.len(), r.out.len(), r.lse.len(), r.position.len(), r.lineage.len()];
        let Some(ring) = read.filter(|ring| lens(ring) == lens(own)) else { return false };
        self.ring = Arc::new(ring);
        true
    }

    fn summary(&self) -> ReuseSummary {
        let ring = &self.ring;
        let floats = ring.queries.len() + ring.out.len() + ring.lse.len() + ring.lineage.len();
        ReuseSummary {
            entries: ring.position.iter().filter(|p| **p != EMPTY).count(),
            size_bytes: (floats + 3 * ring.position.len()) * 4,
            ..ReuseSummary::default()
        }
    }
}
