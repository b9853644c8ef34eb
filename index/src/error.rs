//! What can go wrong, in two families: the caller's input and a damaged snapshot.

/// Which of the caller's arrays a finding is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// `Batch::keys` `[n, dim]`.
    Keys,
    /// `Batch::values` `[n, dim]`.
    Values,
    /// `Query::q` `[group, dim]`.
    Query,
    /// `Query::attended_lse` `[group]`.
    AttendedLse,
    /// `out` `[group, dim]` of the tail.
    Out,
    /// `lse` `[group]` of the tail.
    Lse,
}

impl std::fmt::Display for Field {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Field::Keys => "keys",
            Field::Values => "values",
            Field::Query => "q",
            Field::AttendedLse => "attended_lse",
            Field::Out => "out",
            Field::Lse => "lse",
        })
    }
}

/// Every failure of this crate. No index is changed by a call that returns one.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum IndexError {
    /// A configuration value lies outside its range.
    #[error("config field {field} is {value}, expected {expected}")]
    Config {
        /// Name of the field.
        field: &'static str,
        /// What was given.
        value: f64,
        /// The accepted range in words.
        expected: &'static str,
    },
    /// A slice does not have the length that its shape asks for.
    #[error("{field} has {got} elements, expected {expected}")]
    Shape {
        /// The slice.
        field: Field,
        /// Elements that the shape asks for.
        expected: usize,
        /// Elements given.
        got: usize,
    },
    /// NaN or infinity in the input.
    #[error("{field} of row {row} (id {id:?}) is {value} at dimension {position}")]
    NonFinite {
        /// The slice.
        field: Field,
        /// Row within the slice: token of a batch, head of a query.
        row: usize,
        /// The token's id; `None` for a query.
        id: Option<u32>,
        /// Dimension within the row.
        position: usize,
        /// The offending value.
        value: f32,
    },
    /// An id occurs twice in one batch or is already stored.
    #[error("id {id} is already in the index or twice in the batch")]
    DuplicateId {
        /// The id.
        id: u32,
    },
    /// `build` was called on an index that already holds tokens.
    #[error("build needs an empty index, this one holds {len} tokens")]
    NotEmpty {
        /// Tokens held.
        len: usize,
    },
    /// `exclude` must be strictly increasing.
    #[error("exclude is not strictly increasing at position {position}")]
    UnsortedExclude {
        /// First position that breaks the order.
        position: usize,
    },
    /// The index changed between `search` and `tail`, or the query has another shape.
    #[error("the search result belongs to another state of the index or another query shape")]
    StaleFound,
    /// More tokens than the index can address.
    #[error("{len} tokens exceed the limit of {limit}")]
    OverLimit {
        /// Tokens asked for.
        len: usize,
        /// Most tokens that fit.
        limit: usize,
    },
    /// The bytes are not a snapshot of this index, or are damaged.
    #[error("snapshot is damaged or foreign: {what} at byte {offset}")]
    Snapshot {
        /// The check that failed.
        what: &'static str,
        /// Where in the bytes.
        offset: usize,
    },
}
