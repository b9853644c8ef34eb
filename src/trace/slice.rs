//! Cutting a trace: a shorter context and fewer queries, still a valid trace.

use std::ops::Range;
use std::path::Path;

use super::{Segment, Tensor, Trace, TraceData, TraceError, TraceMeta, write_trace};

/// What a slice keeps.
///
/// ```text
/// source   |sinks|......dropped......|.........kept tail.........|..later..|
///                                              |----queries-----|
/// slice    |sinks|.........kept tail.........|
///                          |----queries-----|
/// ```
/// The tail ends with the last kept query, since no kept query sees a later token, and it contains every kept query's
/// own position. Kept tokens are renumbered without a gap, and segments, `first_query_pos` and `index_until` follow.
///
/// Exact attention of a slice is attention over the slice: the dropped middle is gone, so an answer whose source lay
/// there attends elsewhere. Keys and queries stay as recorded, after rotary embedding: phases between tail and queries,
/// and between sinks and queries, are those of the source. A query's rotation is therefore that of its position plus
/// [`TraceMeta::rope_offset`], which grows by the number of dropped tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SliceRequest {
    /// Tokens of the slice, sinks included; all up to the last kept query when the source has fewer.
    pub num_tokens: usize,
    /// Tokens kept from the start of the source.
    pub num_sinks: usize,
    /// Which queries.
    pub queries: QueryRange,
}

/// The queries that a slice keeps: consecutive, as format 1 demands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum QueryRange {
    /// This many, the last ones.
    Last(usize),
    /// Those at these positions of the source.
    Positions(Range<usize>),
}

impl SliceRequest {
    /// Writes the slice of `source` to `path`.
    ///
    /// `index_until` becomes the first kept query's position unless the source's prefill ended later. The metadata
    /// field `slice_of` says which tokens of which file these are.
    ///
    /// # Errors
    /// [`TraceError::Request`] when the source has not what is asked for, and those of [`write_trace`].
    pub fn write(&self, source: &Trace, path: impl AsRef<Path>) -> Result<(), TraceError> {
        let cut = Cut::plan(self, source.meta())?;
        let mut meta = cut.apply(source.meta());
        let origin = cut.describe(source);
        let earlier = meta.extra.remove("slice_of").map(|earlier| format!(", itself {earlier}"));
        meta.extra.insert("slice_of".into(), origin + &earlier.unwrap_or_default());
        let head_dim = meta.head_dim;
        let query_len = meta.group() * head_dim;
        let tokens = |tensor| {
            let all = source.elements(tensor);
            let tail = &all[cut.tail.start * head_dim..cut.tail.end * head_dim];
            [&all[..cut.num_sinks * head_dim], tail].concat()
        };
        let queries =
            |tensor| &source.elements(tensor)[cut.queries.start * query_len..cut.queries.end * query_len];
        let (k, v) = (tokens(Tensor::K), tokens(Tensor::V));
        write_trace(
            path,
            meta,
            TraceData { k: &k, v: &v, q: queries(Tensor::Q), q_pre: queries(Tensor::QPre) },
        )
    }
}

/// What to keep, in the source's positions and query numbers.
struct Cut {
    num_sinks: usize,
    /// Positions kept after the sinks; starts at `num_sinks` when nothing is dropped.
    tail: Range<usize>,
    /// Query numbers.
    queries: Range<usize>,
}

impl Cut {
    fn plan(request: &SliceRequest, meta: &TraceMeta) -> Result<Self, TraceError> {
        let first = meta.first_query_pos;
        let queries = match &request.queries {
            QueryRange::Last(count) => {
                if *count == 0 || *count > meta.num_queries {
                    let expected = format!("1 to {} (the trace's num_queries)", meta.num_queries);
                    return Err(TraceError::request("queries", count, expected));
                }
                meta.num_queries - count..meta.num_queries
            }
            QueryRange::Positions(range) => {
                let all = first..first + meta.num_queries;
                if range.is_empty() || range.start < all.start || range.end > all.end {
                    let expected = format!(
                        "a non-empty part of {}..{} (the trace's query positions)",
                        all.start, all.end
                    );
                    return Err(TraceError::request(
                        "queries",
                        format!("{}..{}", range.start, range.end),
                        expected,
                    ));
                }
                range.start - first..range.end - first
            }
        };
        let end = first + queries.end;
        let num_tokens = request.num_tokens.min(end);
        let num_sinks = request.num_sinks;
        // Both hold exactly when the tail covers the kept queries' positions and does not reach into the sinks.
        let least = num_sinks.saturating_add(queries.len());
        if num_tokens < end && num_tokens < least {
            let expected = format!("at least {least} (sinks + queries)");
            return Err(TraceError::request("tokens", num_tokens, expected));
        }
        let dropped = end - num_tokens;
        let num_sinks = if dropped == 0 { 0 } else { num_sinks };
        Ok(Self { num_sinks, tail: num_sinks + dropped..end, queries })
    }

    fn describe(&self, source: &Trace) -> String {
        let Range { start, end } = &self.tail;
        match self.num_dropped() {
            0 => format!("tokens 0..{end} of {}", source.name()),
            _ => format!("tokens 0..{} and {start}..{end} of {}", self.num_sinks, source.name()),
        }
    }

    fn num_dropped(&self) -> usize {
        self.tail.start - self.num_sinks
    }

    /// Where a boundary between positions of the source comes to lie; one inside the dropped part, at its place.
    fn map(&self, position: usize) -> usize {
        if position < self.num_sinks {
            return position;
        }
        position.clamp(self.tail.start, self.tail.end) - self.num_dropped()
    }

    fn apply(&self, source: &TraceMeta) -> TraceMeta {
        let first_query_pos = self.map(source.first_query_pos + self.queries.start);
        let segments = source.segments.iter().map(|segment| {
            let (start, end) = (self.map(segment.start), self.map(segment.end));
            Segment { name: segment.name.clone(), start, end }
        });
        TraceMeta {
            num_tokens: self.num_sinks + self.tail.len(),
            num_queries: self.queries.len(),
            first_query_pos,
            index_until: self.map(source.index_until).max(first_query_pos),
            rope_offset: source.rope_offset + self.num_dropped(),
            segments: segments.filter(|segment| segment.start < segment.end).collect(),
            ..source.clone()
        }
    }
}
