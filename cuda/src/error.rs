//! What a kernel refuses.

/// A wrong size, row or number given to a kernel. Nothing has been written when one is returned, unless it says so.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// The rows have no dimensions.
    #[error("head_dim is 0: a row needs at least one key and one value element")]
    EmptyHead,
    /// The queries are not a whole, non-zero number of heads.
    #[error("q has {len} elements: not [group, head_dim] for head_dim {head_dim} and a group of at least 1")]
    Queries {
        /// Elements given.
        len: usize,
        /// Dimensions of a head.
        head_dim: usize,
    },
    /// A buffer has not the length that its shape asks for.
    #[error("{field} has {len} elements, its shape asks for {expected}")]
    Length {
        /// Which buffer.
        field: &'static str,
        /// Elements given.
        len: usize,
        /// Elements needed.
        expected: usize,
    },
    /// A range that ends before it starts or after the last row.
    #[error("row range {start}..{end} does not lie in the {num_rows} rows of the shard")]
    Range {
        /// First row.
        start: usize,
        /// One past the last row.
        end: usize,
        /// Rows of the shard.
        num_rows: usize,
    },
    /// A listed row that the shard does not have.
    #[error("listed row {row} does not lie in the {num_rows} rows of the shard")]
    Row {
        /// The row.
        row: u32,
        /// Rows of the shard.
        num_rows: usize,
    },
    /// A list that is not strictly ascending.
    #[error("row list is not strictly ascending: {next} follows {previous} at place {at}")]
    Order {
        /// Place of the second of the two in the list.
        at: usize,
        /// Row before.
        previous: u32,
        /// Row that should have been larger.
        next: u32,
    },
    /// A scale that is not finite.
    #[error("scale is {scale}: not a finite number")]
    Scale {
        /// The value given.
        scale: f32,
    },
    /// A softcap that is not finite and positive.
    #[error("softcap is {softcap}: not a finite number above zero")]
    Softcap {
        /// The value given.
        softcap: f32,
    },
    /// A [`KvRows`](crate::KvRows) whose run is not a whole, non-zero number of rows. The output is unspecified.
    #[error("run of rows from {first} has {len} elements: not a whole number of rows of {row_len}")]
    Run {
        /// First row asked for.
        first: usize,
        /// Elements of the answer.
        len: usize,
        /// Elements of a row.
        row_len: usize,
    },
}
