//! Logits of chosen rows: what ranks them.

use std::ops::Range;

use floe_cuda::{Isa, score_rows};

use super::AttendScratch;
use crate::error::Result;
use crate::ids::TokenPos;
use crate::page::{ShardPages, with_rows};
use crate::query::GroupQuery;

/// Logits of consecutive positions to `out`, `[group, positions]`; keeps its memory.
///
/// # Errors
/// When a shape does not fit.
pub fn logits(
    query: &GroupQuery<'_>,
    pages: &ShardPages,
    tokens: Range<TokenPos>,
    scratch: &mut AttendScratch,
    out: &mut Vec<f32>,
) -> Result<()> {
    out.clear();
    out.resize(query.group * tokens.len(), 0.0);
    with_rows!(pages, rows => {
        let attend = query.over(Isa::best(), rows);
        Ok(score_rows(&attend, tokens.start as usize..tokens.end as usize, &mut scratch.rows, out)?)
    })
}

/// Logits of ascending positions to `out`, `[group, positions]`; keeps its memory. One call of the kernel a run of neighbours: for
/// lists that are short beside the context.
///
/// # Errors
/// When a shape does not fit.
pub fn logits_of(
    query: &GroupQuery<'_>,
    pages: &ShardPages,
    tokens: &[TokenPos],
    scratch: &mut AttendScratch,
    out: &mut Vec<f32>,
) -> Result<()> {
    let num = tokens.len();
    out.clear();
    out.resize(query.group * num, 0.0);
    let mut part = std::mem::take(&mut scratch.logits);
    let mut at = 0;
    for run in tokens.chunk_by(|a, b| a + 1 == *b) {
        let range = run[0]..run[0] + run.len() as TokenPos;
        logits(query, pages, range, scratch, &mut part)?;
        for (head, row) in part.chunks_exact(run.len()).enumerate() {
            out[head * num + at..][..run.len()].copy_from_slice(row);
        }
        at += run.len();
    }
    scratch.logits = part;
    Ok(())
}
