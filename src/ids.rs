//! Newtype ids. They carry no arithmetic: a mapping between them is defined in one place, beside its data.

/// A sequence admitted to one [`crate::Engine`]. Never reused within an engine, so a stale id is an error, not
/// somebody else's cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(transparent)]
pub struct SeqId(pub(crate) u64);

impl std::fmt::Display for SeqId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "#{}", self.0)
    }
}

/// Layer of the model, `0..num_layers`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(transparent)]
pub struct LayerId(pub usize);

/// Key/value head of a layer, `0..num_kv_heads`. Query heads `h * group .. (h + 1) * group` share it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(transparent)]
pub struct KvHeadId(pub usize);

/// Position of a token in its sequence, counted from 0. Positions fit 32 bits: 4 G tokens a sequence.
pub type TokenPos = u32;
