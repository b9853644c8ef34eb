//! Which path a kv head takes in one step: a pure function of facts.

/// What is known before a step of one kv head.
#[derive(Clone, Copy, Debug)]
pub struct StepFacts {
    /// Tokens in the context, the step's own included.
    pub num_tokens: usize,
    /// Tokens that may be attended exactly.
    pub budget: usize,
    /// Whether the layer attends a limited span only (sliding-window layers).
    pub sliding_layer: bool,
    /// Whether the configuration keeps this layer dense.
    pub dense_layer: bool,
    /// Whether the policy itself is exact attention.
    pub exact_policy: bool,
    /// Whether an earlier state may answer for a part of the context.
    pub reuse: bool,
    /// Whether the policy's estimates are too coarse for these queries ([`crate::select::Selector::doubts`]).
    pub doubtful: bool,
}

/// The path, with its reason; recorded in the step's report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HeadPath {
    /// All tokens, exactly.
    #[default]
    Exact,
    /// Every token fits into the budget, so the exact path costs no more.
    ExactWithinBudget,
    /// The configuration keeps this layer dense.
    ExactDenseLayer,
    /// The policy's estimates are too coarse for these queries.
    ExactInDoubt,
    /// The tokens of the layer's own span, exactly.
    ExactSpan,
    /// Sinks, window and retrieved tokens exactly; the policy's tail for the rest.
    Sparse,
    /// As the reuse cache decides: an earlier state for a part of the context and the rest exactly, or all of it exactly. A
    /// sparse step that it declines ends as [`Self::Sparse`].
    Reuse,
}

/// Chooses the path. Exactness wins over sparsity, sparsity over nothing: a budget of at least the context is exact
/// (invariant 2), and reuse is asked only where it could spare something.
#[must_use]
pub const fn choose(facts: &StepFacts) -> HeadPath {
    if facts.sliding_layer {
        HeadPath::ExactSpan
    } else if facts.exact_policy && !facts.reuse {
        HeadPath::Exact
    } else if facts.dense_layer {
        HeadPath::ExactDenseLayer
    } else if !facts.exact_policy && facts.num_tokens <= facts.budget {
        HeadPath::ExactWithinBudget
    } else if facts.reuse {
        HeadPath::Reuse
    } else if facts.doubtful {
        HeadPath::ExactInDoubt
    } else {
        HeadPath::Sparse
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_follows_from_the_facts() {
        let facts = StepFacts {
            num_tokens: 1000,
            budget: 256,
            sliding_layer: false,
            dense_layer: false,
            exact_policy: false,
            reuse: false,
            doubtful: false,
        };
        assert_eq!(choose(&facts), HeadPath::Sparse);
        assert_eq!(choose(&StepFacts { budget: 1000, ..facts }), HeadPath::ExactWithinBudget);
        assert_eq!(choose(&StepFacts { dense_layer: true, ..facts }), HeadPath::ExactDenseLayer);
        assert_eq!(choose(&StepFacts { exact_policy: true, ..facts }), HeadPath::Exact);
        assert_eq!(choose(&StepFacts { exact_policy: true, reuse: true, ..facts }), HeadPath::Reuse);
        assert_eq!(choose(&StepFacts { doubtful: true, ..facts }), HeadPath::ExactInDoubt);
        assert_eq!(choose(&StepFacts { reuse: true, ..facts }), HeadPath::Reuse);
        assert_eq!(
            choose(&StepFacts { sliding_layer: true, exact_policy: true, ..facts }),
            HeadPath::ExactSpan
        );
        assert_eq!(choose(&StepFacts { reuse: true, budget: 1000, ..facts }), HeadPath::ExactWithinBudget);
    }
}
