//! What is brought in before a step asks for it.

/// Ways of prefetching.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum PrefetchKind {
    /// Nothing.
    #[default]
    None,
    /// After a layer's step: the selection of that step, for the layer's next step.
    Last,
    /// During a layer: the previous step's selection of the next layer.
    NextLayer,
    /// During a layer: what a search of the next layer with this layer's query finds.
    Predicted,
}

impl PrefetchKind {
    /// Every kind, in the order of reports.
    pub const ALL: [Self; 4] = [Self::None, Self::Last, Self::NextLayer, Self::Predicted];

    /// Name in configurations and reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Last => "last",
            Self::NextLayer => "next_layer",
            Self::Predicted => "predicted",
        }
    }
}

/// A name of no way to prefetch.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("prefetch `{0}`: unknown name; known are none, last, next_layer, predicted")]
pub struct UnknownPrefetch(pub String);

impl std::str::FromStr for PrefetchKind {
    type Err = UnknownPrefetch;

    fn from_str(name: &str) -> Result<Self, UnknownPrefetch> {
        Self::ALL.into_iter().find(|kind| kind.name() == name).ok_or_else(|| UnknownPrefetch(name.into()))
    }
}
