//! Layers that keep their rows alike share a table of places: those that the policy selects in, dense ones, those of each span.
//!
//! ```text
//! class    layers                          rows of a sequence on the device        its step
//! policy   neither of the others           all, or sinks, newest and slots         exact or sparse
//! dense    the first `dense_layers`        as many as `dense_rows` leaves it       exact, tokens without a row in host memory
//! span     `spans[layer]` is some          its newest `span` tokens                exact over the span
//! ```
//! A policy that selects nothing (`full`) makes its own layers dense.

use super::options::{GpuOptions, Plan};
use crate::config::Config;
use crate::shape::PAGE_TOKENS;

/// The class of the layers that the policy selects in; always there.
pub(super) const POLICY: usize = 0;

/// One class.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct LayerClass {
    /// What its layers do.
    pub(super) plan: Plan,
    /// Rows of a layer on the device, all kv heads and sequences together.
    pub(super) rows: usize,
    /// Tokens that its layers attend at most.
    pub(super) span: Option<usize>,
    /// How many layers it has.
    pub(super) layers: usize,
}

impl LayerClass {
    /// Rows of a kv head that hold what a layer of a span reads.
    pub(super) fn span_rows(&self) -> Option<usize> {
        self.span.map(|_| self.plan.shape.ring.next_multiple_of(PAGE_TOKENS))
    }
}

/// All classes, that of the policy first, and the class of each layer.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Classes {
    pub(super) all: Vec<LayerClass>,
    of: Vec<usize>,
}

impl Classes {
    /// Sorts the layers of a configuration; `plan` is that of its policy.
    pub(super) fn new(config: &Config, options: &GpuOptions, plan: &Plan) -> Self {
        let span_of = |layer: usize| config.spans.get(layer).copied().flatten();
        let selects = |layer: usize| span_of(layer).is_none() && layer >= config.dense_layers;
        let exact = plan.exact;
        // Where no layer selects there is nothing to build for it.
        let plan = if (0..config.num_layers).any(selects) { *plan } else { plan.dense() };
        let mut all = vec![LayerClass { plan, rows: options.rows, span: None, layers: 0 }];
        let mut of = Vec::with_capacity(config.num_layers);
        for layer in 0..config.num_layers {
            let span = span_of(layer);
            let class = if selects(layer) || (span.is_none() && exact) {
                POLICY
            } else {
                let known = (1..all.len()).find(|class| all[*class].span == span);
                known.unwrap_or_else(|| {
                    all.push(fresh(&plan, options, span));
                    all.len() - 1
                })
            };
            all[class].layers += 1;
            of.push(class);
        }
        Self { all, of }
    }

    /// Number of a layer's class.
    pub(super) fn of(&self, layer: usize) -> usize {
        self.of[layer]
    }

    /// What a layer does.
    pub(super) fn plan(&self, layer: usize) -> &Plan {
        &self.all[self.of[layer]].plan
    }

    /// Layers of a class, ascending.
    pub(super) fn layers(&self, class: usize) -> impl Iterator<Item = usize> {
        (0..self.of.len()).filter(move |layer| self.of[*layer] == class)
    }

    /// What the classes beside that of the policy do, in words.
    pub(super) fn describe(&self) -> String {
        let what = |class: &LayerClass| match class.span {
            Some(span) => format!("; {} layers attend their newest {span} tokens", class.layers),
            None => format!("; {} layers attend all tokens", class.layers),
        };
        self.all[POLICY + 1..].iter().map(what).collect()
    }
}

/// A class of layers that are always exact.
fn fresh(plan: &Plan, options: &GpuOptions, span: Option<usize>) -> LayerClass {
    let mut plan = plan.dense();
    let Some(span) = span else { return LayerClass { plan, rows: options.dense_rows, span, layers: 0 } };
    plan.shape = plan.shape.of_span(span.min(options.max_tokens));
    let class = LayerClass { plan, rows: 0, span: Some(span), layers: 0 };
    let each = class.span_rows().unwrap_or(0);
    LayerClass { rows: options.max_sequences * plan.shape.heads * each, ..class }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::HotConfig;
    use crate::shape::{HeadShape, KvDtype};

    fn classes(config: &Config) -> Classes {
        let options = GpuOptions::for_load(config, 2, 4096, 0.1);
        Classes::new(config, &options, &Plan::new(config, &options).unwrap())
    }

    fn config(policy: &str) -> Config {
        let heads = HeadShape::new(8, 2, 128).unwrap();
        let hot = HotConfig { slots: 512, ..HotConfig::default() };
        Config { hot, policy: policy.parse().unwrap(), ..Config::new(6, heads, KvDtype::Bf16) }
    }

    #[test]
    fn layers_are_sorted_by_what_they_keep() {
        let spans = vec![Some(100), None, None, Some(100), Some(8000), None];
        let sparse = Config { dense_layers: 2, spans: spans.clone(), ..config("floe") };
        let classes = classes(&sparse);
        let of: Vec<usize> = (0..6).map(|layer| classes.of(layer)).collect();
        assert_eq!(of, [1, 2, 0, 1, 3, 0]);
        assert_eq!(classes.layers(1).collect::<Vec<_>>(), [0, 3]);
        // 100 rows in whole pages; a span longer than a sequence may be takes no more than that.
        assert_eq!(
            classes.all.iter().map(|class| class.rows).collect::<Vec<_>>()[1..],
            [2 * 2 * 112, 2 * 2 * 4096, 2 * 2 * 4096]
        );
        let exact: Vec<bool> = (0..6).map(|layer| classes.plan(layer).exact).collect();
        assert_eq!(exact, [true, true, false, true, true, false]);
        assert_eq!(classes.plan(0).shape.ring, 100);
        assert_eq!(classes.plan(4).shape.ring, 4096);
        assert!(classes.describe().contains("2 layers attend their newest 100 tokens"));
    }

    #[test]
    fn where_nothing_is_selected_nothing_is_kept_for_it() {
        // Layers that are dense by the policy and by configuration are alike.
        let full = classes(&Config { dense_layers: 2, ..config("full") });
        assert_eq!((full.all.len(), full.all[POLICY].layers), (1, 6));
        for quiet in [
            Config { dense_layers: 6, ..config("floe") },
            Config { spans: vec![Some(64); 6], ..config("floe") },
        ] {
            let quiet = classes(&quiet);
            assert!(quiet.all.iter().all(|class| class.plan.exact && !class.plan.tree));
            assert_eq!(quiet.all.iter().map(|class| class.layers).collect::<Vec<_>>(), [0, 6]);
        }
    }
}
