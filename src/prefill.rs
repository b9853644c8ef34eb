//! Ingest: append keys and values, attend causally with the prompt's queries, publish tokens to the selectors.

use std::sync::Arc;

use rayon::prelude::*;

use crate::attend::{AttendScratch, AttentionBackend, CausalQueries};
use crate::error::Result;
use crate::ids::TokenPos;
use crate::sequence::{LayerShards, Shard};
use crate::shape::PAGE_TOKENS;
use crate::view::{TensorView, widen};

/// Appends `[tokens, num_kv_heads, head_dim]` keys and values to every shard of a layer. Chunks of any size give the
/// same result, because nothing is published before the first decode step. When one shard cannot take the rows, none does.
pub(crate) fn append(layer: &mut LayerShards, k: &TensorView<'_>, v: &TensorView<'_>) -> Result<()> {
    let shards = layer.shards.par_iter_mut().enumerate();
    let appended = shards.map(|(head, shard)| shard.pages.append(k, v, head)).reduce(|| Ok(()), Result::and);
    match appended {
        Ok(()) => layer.num_tokens += k.shape()[0],
        Err(_) => layer.shards.iter_mut().for_each(|shard| shard.pages.truncate(layer.num_tokens)),
    }
    appended
}

/// Publishes what a decode step may find: everything at first (the prefill, at once), later whole batches of a page.
/// A token is complete in the warm tier before its selector hears of it (invariant 4).
pub(crate) fn publish(shard: &mut Shard) -> Result<()> {
    if shard.published == 0 && shard.first_batch > 0 {
        publish_until(shard, shard.first_batch.min(shard.pages.num_tokens()))?;
    }
    let num_tokens = shard.pages.num_tokens();
    let young = num_tokens - shard.published;
    let until =
        if shard.published == 0 { num_tokens } else { shard.published + young / PAGE_TOKENS * PAGE_TOKENS };
    publish_until(shard, until)
}

fn publish_until(shard: &mut Shard, until: usize) -> Result<()> {
    if until > shard.published {
        let fresh = shard.published as u32..until as u32;
        shard.pages.verify(fresh.clone())?;
        shard.selector_mut()?;
        let Shard { selector, pages, .. } = shard;
        let selector = Arc::get_mut(selector).expect("made the only owner above");
        selector.publish(pages, fresh)?;
        shard.published = until;
    }
    Ok(())
}

/// Query tokens of one work item: with a group of 3 to 8 about a hundred stacked heads, which keeps the kernels busy on
/// each row they read, and leaves a ragged part that is small against a long context.
const BLOCK_TOKENS: usize = 32;

/// Working memory of [`attend`] on one thread.
#[derive(Default)]
struct BlockScratch {
    /// Queries and output of one kv head, `[tokens, group, head_dim]`.
    q: Vec<f32>,
    out: Vec<f32>,
    attend: AttendScratch,
}

/// Causal attention of the last stored tokens of a layer with their queries `[tokens, num_q_heads, head_dim]`; `out` has
/// the same shape.
pub(crate) fn attend(
    backend: &dyn AttentionBackend,
    layer: &LayerShards,
    (q, scale): (&TensorView<'_>, f32),
    out: &mut [f32],
) -> Result<()> {
    let [num_tokens, num_q_heads, head_dim] = q.shape();
    let group = num_q_heads / layer.shards.len();
    let first = layer.num_tokens - num_tokens;
    let per_token = num_q_heads * head_dim;
    out.par_chunks_mut(BLOCK_TOKENS * per_token).enumerate().try_for_each_init(
        BlockScratch::default,
        |scratch, (block, out)| {
            let start = block * BLOCK_TOKENS;
            let tokens = out.len() / per_token;
            for (head, shard) in layer.shards.iter().enumerate() {
                scratch.q.resize(tokens * group * head_dim, 0.0);
                scratch.out.resize(tokens * group * head_dim, 0.0);
                for (i, row) in scratch.q.chunks_exact_mut(head_dim).enumerate() {
                    widen(q.row(start + i / group, head * group + i % group), row);
                }
                let queries = CausalQueries {
                    q: &scratch.q,
                    group,
                    scale,
                    first: (first + start) as TokenPos,
                    span: layer.span,
                };
                backend.attend_causal(&queries, &shard.pages, &mut scratch.attend, &mut scratch.out)?;
                let rows = scratch.out.chunks_exact(group * head_dim);
                for (token, row) in out.chunks_exact_mut(per_token).zip(rows) {
                    token[head * group * head_dim..][..group * head_dim].copy_from_slice(row);
                }
            }
            Ok(())
        },
    )
}
