//! Ingest: append keys and values, and publish them to the selectors.

use std::sync::Arc;

use rayon::prelude::*;

use crate::error::Result;
use crate::sequence::{LayerShards, Shard};
use crate::shape::PAGE_TOKENS;
use crate::view::TensorView;

/// Appends `[tokens, num_kv_heads, head_dim]` keys and values to every shard of a layer. Chunks of any size give the
/// same result, because nothing is published before the first decode step.
pub(crate) fn append(layer: &mut LayerShards, k: &TensorView<'_>, v: &TensorView<'_>) -> Result<()> {
    layer.shards.par_iter_mut().enumerate().try_for_each(|(head, shard)| shard.pages.append(k, v, head))?;
    layer.num_tokens += k.shape()[0];
    Ok(())
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
        shard.selector_mut();
        let Shard { selector, pages, .. } = shard;
        let selector = Arc::get_mut(selector).expect("made the only owner above");
        selector.publish(pages, fresh)?;
        shard.published = until;
    }
    Ok(())
}
