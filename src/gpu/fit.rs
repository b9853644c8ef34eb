//! How many rows the device has room for.

use super::classes::{Classes, POLICY};
use super::options::{GpuOptions, Plan};
use super::places::chunks_of;
use crate::config::Config;
use crate::error::{Error, Result};

impl GpuOptions {
    /// The same with no more rows than `bytes` of device memory have room for, beside summaries and the rows of spans. Dense layers come
    /// first: they read all of their rows at every step.
    ///
    /// # Errors
    /// A configuration that the device does not run; [`Error::NoRoom`] where not even the fewest rows fit.
    pub fn within(self, config: &Config, bytes: usize) -> Result<Self> {
        let plan = Plan::new(config, &self)?;
        let classes = Classes::new(config, &self, &plan);
        let element = config.kv_dtype.size_bytes();
        let selecting = classes.all[POLICY];
        let shape = selecting.plan.shape;
        let row_bytes = shape.row_len() * element;
        // Which token lies in which row, and when it was used.
        let beside = if selecting.plan.exact { 0 } else { 8 };
        let dense = classes.all.iter().skip(1).find(|class| class.span.is_none());
        let each = selecting.layers * (row_bytes + beside);
        let dense_each = dense.map_or(0, |class| class.layers * row_bytes);
        let least = if selecting.plan.exact {
            0
        } else {
            let rows = selecting.plan.slot_rows().min(self.max_tokens);
            self.rows.min(self.max_sequences * shape.heads * rows)
        };
        let fixed = self.fixed_bytes(&classes, element) + least * each;
        let Some(left) = bytes.checked_sub(fixed) else {
            return Err(Error::NoRoom { what: "bytes of device memory", needed: fixed, free: bytes });
        };
        let dense_rows = self.dense_rows.min(left.checked_div(dense_each).unwrap_or(usize::MAX));
        let left = left - dense_rows * dense_each;
        let more = left.checked_div(each).unwrap_or(usize::MAX);
        Ok(Self { rows: self.rows.min(least.saturating_add(more)), dense_rows, ..self })
    }

    /// Device memory that does not depend on `rows` and `dense_rows`: summaries and tables by token, scores, the rows of spans.
    fn fixed_bytes(&self, classes: &Classes, element: usize) -> usize {
        let of_spans = classes.all.iter().filter(|class| class.span.is_some());
        let span_rows: usize = of_spans.map(|class| class.layers * class.rows).sum();
        let selecting = &classes.all[POLICY];
        let plan = &selecting.plan;
        let layers: usize = classes.all.iter().map(|class| class.layers).sum();
        // Addresses of host chunks; first slots and numbers of pages.
        let tables = self.max_sequences * (chunks_of(self.max_tokens) + plan.shape.heads) * 8;
        let rows = span_rows * plan.shape.row_len() * element + layers * tables;
        if plan.exact {
            return rows;
        }
        let pages = self.page_tokens / 16;
        // Masks and spreads; with trees what a list says of each place.
        let beside = 6 + if plan.tree { 64 } else { 0 };
        let of_layer = pages * (plan.page_bytes(element) + beside) + 4 * plan.token_words(self, pages);
        let nodes = plan.nodes(self) * (2 * plan.shape.head_dim * element + 8);
        let residuals = if plan.by_token() { 32 } else { 0 };
        let scores = pages * plan.shape.group * (4 + residuals) * if plan.prefetch > 0 { 2 } else { 1 };
        let staged = plan.staged_bytes(self.max_sequences * layers);
        rows + selecting.layers * (of_layer + nodes) + scores + staged
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::HotConfig;
    use crate::shape::{HeadShape, KvDtype};

    fn config(policy: &str) -> Config {
        let heads = HeadShape::new(32, 8, 128).unwrap();
        let hot = HotConfig { slots: 1024, ..HotConfig::default() };
        let policy = policy.parse().unwrap();
        Config { policy, hot, dense_layers: 2, ..Config::new(32, heads, KvDtype::Bf16) }
    }

    #[test]
    fn rows_are_cut_to_what_fits() {
        // 131,072 tokens of 32 layers are 17.2 GB.
        let all = |config: &Config| GpuOptions::for_load(config, 1, 131_072, 1.0);
        for policy in ["full", "pagemean:sketch=k1,tail=page", "floe"] {
            let config = config(policy);
            let wide = all(&config);
            assert_eq!(wide.clone().within(&config, 80 << 30).unwrap(), wide, "{policy}");
            let cut = wide.clone().within(&config, 8 << 30).unwrap();
            assert!(cut.rows <= wide.rows / 2 && cut.rows > 8 * 1024, "{policy}: {}", cut.rows);
            // Dense layers keep theirs.
            assert_eq!(cut.dense_rows, wide.dense_rows);
            let row = 512 * if policy == "full" { 32 } else { 30 };
            assert!(cut.rows * row + cut.dense_rows * 1024 <= 8 << 30);
            assert_eq!(wide.within(&config, 1 << 20).is_err(), policy != "full");
        }
    }
}
