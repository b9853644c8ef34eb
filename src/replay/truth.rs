//! Full attention over the trace: what every run is compared with.

use rayon::prelude::*;

use super::MeasuredStep;
use crate::attend::{AttendScratch, AttentionBackend, CpuBackend, Tokens};
use crate::config::Config;
use crate::error::Result;
use crate::page::ShardPages;
use crate::query::GroupQuery;
use crate::select::{Oracle, SelectScratch};
use crate::shape::PageShape;
use crate::state::StateBuf;
use crate::trace::Trace;
use crate::view::TensorView;

/// Exact answers, one entry per measured step.
pub(super) struct Truth {
    steps: Vec<StepTruth>,
}

/// The exact answer of one step.
pub(super) struct StepTruth {
    /// State of full attention over `0..=position`.
    pub(super) state: StateBuf,
    /// Candidate tokens of largest mass summed over the group, largest first.
    pub(super) ranking: Vec<u32>,
}

impl Truth {
    /// Computes full attention and the ranking of the `budget` best candidates for every step, in parallel.
    pub(super) fn compute(
        trace: &Trace,
        steps: &[MeasuredStep],
        config: &Config,
        budget: usize,
    ) -> Result<Self> {
        let meta = trace.meta();
        let shape = [meta.num_tokens, 1, meta.head_dim];
        let mut pages = ShardPages::new(PageShape::new(meta.head_dim, config.kv_dtype));
        pages.append(
            &TensorView::contiguous(trace.k(), shape)?,
            &TensorView::contiguous(trace.v(), shape)?,
            0,
        )?;
        let (backend, oracle) = (CpuBackend::detect(), Oracle::new());
        let steps = steps
            .par_iter()
            .map_init(Default::default, |(attend, select): &mut (AttendScratch, SelectScratch), step| {
                let q: Vec<f32> = trace.query(step.query).iter().map(|x| x.to_f32()).collect();
                let query = GroupQuery { q: &q, group: meta.group(), scale: meta.softmax_scale as f32 };
                let num_tokens = step.position + 1;
                let mut state = StateBuf::default();
                state.reset(meta.group(), meta.head_dim);
                let all = Tokens::Range(0..num_tokens as u32);
                backend.attend(&query, &pages, all, attend, &mut state)?;
                let end = num_tokens.saturating_sub(config.window).max(config.sinks);
                let candidates = config.sinks.min(end) as u32..end as u32;
                let mut ranking = Vec::new();
                if num_tokens > end {
                    oracle.rank(&query, (&pages, num_tokens), candidates.clone(), budget, select)?;
                    ranking.extend(select.order.iter().map(|i| candidates.start + i));
                }
                Ok(StepTruth { state, ranking })
            })
            .collect::<Result<_>>()?;
        Ok(Self { steps })
    }

    pub(super) fn step(&self, i: usize) -> &StepTruth {
        &self.steps[i]
    }
}

impl StepTruth {
    /// Relative error of each head's output: `|out - out_full| / |out_full|`.
    pub(super) fn errors<'a>(&'a self, out: &'a [f32]) -> impl Iterator<Item = f32> + 'a {
        let head_dim = out.len() / self.state.lse.len();
        out.chunks_exact(head_dim).zip(self.state.out.chunks_exact(head_dim)).map(|(got, full)| {
            let square = |x: f32| f64::from(x) * f64::from(x);
            let difference: f64 = got.iter().zip(full).map(|(a, b)| square(a - b)).sum();
            let norm: f64 = full.iter().map(|x| square(*x)).sum();
            if difference == 0.0 { 0.0 } else { (difference / norm).sqrt() as f32 }
        })
    }

    /// Share of each head's attention mass that lies on the exactly attended tokens.
    pub(super) fn mass_kept<'a>(&'a self, exact_lse: &'a [f32]) -> impl Iterator<Item = f32> + 'a {
        exact_lse.iter().zip(&self.state.lse).map(|(kept, full)| (kept - full).exp())
    }

    /// Share of the best tokens, as many as were retrieved, that are among the retrieved ones (ascending).
    pub(super) fn recall(&self, retrieved: &[u32]) -> f32 {
        let best = &self.ranking[..retrieved.len().min(self.ranking.len())];
        if best.is_empty() {
            return 1.0;
        }
        best.iter().filter(|t| retrieved.binary_search(t).is_ok()).count() as f32 / best.len() as f32
    }
}
