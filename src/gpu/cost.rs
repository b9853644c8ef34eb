//! When a step over rows that are all on the device is exact: a model of both ways' times, from measurements.

use std::fmt;

use super::options::Plan;

/// What a step has to look at.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Load {
    /// Entries of the batch.
    pub entries: usize,
    /// Tokens of the longest one.
    pub longest: usize,
    /// Rows of all kv heads.
    pub rows: usize,
}

impl Load {
    pub(super) fn add(&mut self, tokens: usize, plan: &Plan) {
        self.entries += 1;
        self.longest = self.longest.max(tokens);
        self.rows += tokens * plan.shape.heads;
    }
}

/// A sparse step has to be predicted this much faster: the model is off by up to 6 % where it was measured.
const MARGIN: f64 = 0.93;

/// Times of both ways as a constant and a rate. The constants were measured on an H100 (bench/README.md, device engine); what
/// decides is their ratio, which moves little between cards of one kind.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CostModel {
    /// Bytes of a row, and of a token's share of summaries and sketches, scores included.
    row_bytes: f64,
    summary_bytes: f64,
    /// Rows that a sparse step attends for each kv head.
    attended: f64,
    heads: f64,
    /// Microseconds of a step without any row.
    pub exact_us: f64,
    /// The same for a sparse step.
    pub sparse_us: f64,
    /// Bytes a microsecond that dense attention reads.
    pub exact_rate: f64,
    /// Bytes a microsecond of the scan over summaries and of scattered rows.
    pub sparse_rate: f64,
    /// Microseconds that a sparse step takes longer for each token that a kv head attends, whatever the batch: lists are made by
    /// one block a head.
    pub sparse_token_us: f64,
}

impl CostModel {
    pub(super) fn new(plan: &Plan) -> Self {
        let (dim, group) = (plan.shape.head_dim as f64, plan.shape.group as f64);
        // Two means of a page and their scores, written and read twice; codes and scales; what each token adds to its page's
        // score, written and read twice.
        let means = (4.0 * dim + 12.0 * group) / 16.0;
        let code = |bits: usize| if bits > 0 { bits as f64 * dim / 8.0 + 2.0 } else { 0.0 };
        let scores = if plan.by_token() { 6.0 * group } else { 0.0 };
        let codes = code(plan.bits[0]) + code(plan.bits[1]) + scores;
        Self {
            row_bytes: 4.0 * dim,
            summary_bytes: means + codes,
            attended: (plan.shape.fixed_max() + plan.retrieved) as f64,
            heads: plan.shape.heads as f64,
            exact_us: 18.5,
            sparse_us: 38.0,
            exact_rate: 3.1e6,
            sparse_rate: 2.2e6,
            sparse_token_us: 0.015,
        }
    }

    /// Predicted microseconds of an exact step.
    #[must_use]
    pub fn exact(&self, load: &Load) -> f64 {
        self.exact_us + load.rows as f64 * self.row_bytes / self.exact_rate
    }

    /// Predicted microseconds of a sparse step that finds all rows on the device.
    #[must_use]
    pub fn sparse(&self, load: &Load) -> f64 {
        let attended = load.entries as f64 * self.heads * self.attended * self.row_bytes;
        let constant = self.sparse_us + self.sparse_token_us * self.attended;
        constant + (load.rows as f64 * self.summary_bytes + attended) / self.sparse_rate
    }

    pub(super) fn exact_is_faster(&self, load: &Load) -> bool {
        MARGIN * self.exact(load) <= self.sparse(load)
    }
}

impl fmt::Display for CostModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "exact where all rows are on the device and {MARGIN} x ({:.1} us + {:.0} B x rows / {:.1} TB/s) <= {:.1} us + ({:.0} B x rows + attended rows) / {:.1} TB/s",
            self.exact_us,
            self.row_bytes,
            self.exact_rate / 1e6,
            self.sparse_us + self.sparse_token_us * self.attended,
            self.summary_bytes,
            self.sparse_rate / 1e6,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, HotConfig};
    use crate::gpu::GpuOptions;
    use crate::shape::{HeadShape, KvDtype};

    #[test]
    fn short_contexts_are_exact_and_long_ones_are_not() {
        let heads = HeadShape::new(32, 8, 128).unwrap();
        let hot = HotConfig { slots: 1024, ..HotConfig::default() };
        let policy = "pagemean:sketch=k1,tail=page".parse().unwrap();
        let config = Config { hot, policy, ..Config::new(1, heads, KvDtype::Bf16) };
        let options = GpuOptions::for_load(&config, 1, 4096, 1.0);
        let plan = Plan::new(&config, &options).unwrap();
        let model = CostModel::new(&plan);
        let of = |entries: usize, tokens: usize| {
            let mut load = Load::default();
            (0..entries).for_each(|_| load.add(tokens, &plan));
            model.exact_is_faster(&load)
        };
        assert!(of(1, 4096) && of(1, 8192));
        assert!(!of(1, 131_072) && !of(64, 8192));
        assert!(model.to_string().contains("TB/s"));
    }
}
