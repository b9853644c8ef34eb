//! What the model said at the recorded queries: the file beside recorded traces that end-to-end judgements start from.
//!
//! A safetensors file, format 1. Metadata (strings): `floe_logits` ("1"), `model`, `text`, `licence`, `num_tokens`,
//! `first_query_pos`, `vocab`. Tensors, with Q = queries and K = [`TOP`] (less for a smaller vocabulary):
//!
//! | tensor | dtype, shape | what |
//! |---|---|---|
//! | `token_ids` | U32 `[num_tokens]` | the text as tokens, so that the run can be repeated |
//! | `top_ids` | U32 `[Q, K]` | likeliest next tokens at position `first_query_pos + j`, likeliest first |
//! | `top_log_probs` | F32 `[Q, K]` | their log-probabilities over the whole vocabulary, nats |
//! | `next_log_probs` | F32 `[Q - 1]` | log-probability of the token that does come next |
//!
//! So agreement is that of the first column, NLL differences come from `next_log_probs`, and KL(full || policy) from the top
//! K up to the mass that they leave out, which the file tells too.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use serde_json::{Value, json};

use super::{HostError, HostResult};

/// Next tokens kept at each query.
pub const TOP: usize = 64;

/// Collects logits, query by query.
pub(super) struct LogitsFile {
    path: PathBuf,
    metadata: BTreeMap<String, String>,
    tokens: Vec<u32>,
    first_query: usize,
    top: usize,
    ids: Vec<u32>,
    log_probs: Vec<f32>,
    next: Vec<f32>,
}

impl LogitsFile {
    /// Of a text whose queries begin at `first_query`. `metadata` names model, text and licence.
    pub(super) fn new(
        path: PathBuf,
        (tokens, first_query, vocab): (&[u32], usize, usize),
        metadata: impl IntoIterator<Item = (&'static str, String)>,
    ) -> Self {
        let own = [
            ("floe_logits", "1".to_owned()),
            ("num_tokens", tokens.len().to_string()),
            ("first_query_pos", first_query.to_string()),
            ("vocab", vocab.to_string()),
        ];
        let metadata = metadata.into_iter().chain(own).map(|(k, v)| (k.to_owned(), v)).collect();
        let (ids, log_probs, next) = (Vec::new(), Vec::new(), Vec::new());
        let (tokens, top) = (tokens.to_vec(), TOP.min(vocab));
        Self { path, metadata, tokens, first_query, top, ids, log_probs, next }
    }

    /// Takes the logits `[queries, vocab]` of the next queries.
    pub(super) fn push(&mut self, logits: &Tensor) -> HostResult<()> {
        for row in logits.to_vec2::<f32>()? {
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let ln_sum = row.iter().map(|x| f64::from(x - max).exp()).sum::<f64>().ln() as f32;
            let log_prob = |id: u32| row[id as usize] - max - ln_sum;
            let mut order: Vec<u32> = (0..row.len() as u32).collect();
            let likelier = |a: &u32, b: &u32| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b));
            order.select_nth_unstable_by(self.top - 1, likelier);
            order.truncate(self.top);
            order.sort_unstable_by(likelier);
            self.log_probs.extend(order.iter().map(|id| log_prob(*id)));
            let position = self.first_query + self.ids.len() / self.top;
            self.ids.extend(order);
            self.next.extend(self.tokens.get(position + 1).map(|token| log_prob(*token)));
        }
        Ok(())
    }

    /// Writes the file; it appears complete or not at all.
    pub(super) fn finish(self) -> HostResult<PathBuf> {
        let queries = self.ids.len() / self.top;
        let bytes_u32 = |values: &[u32]| bytemuck::cast_slice::<u32, u8>(values).to_vec();
        let bytes_f32 = |values: &[f32]| bytemuck::cast_slice::<f32, u8>(values).to_vec();
        let tensors = [
            ("token_ids", "U32", vec![self.tokens.len()], bytes_u32(&self.tokens)),
            ("top_ids", "U32", vec![queries, self.top], bytes_u32(&self.ids)),
            ("top_log_probs", "F32", vec![queries, self.top], bytes_f32(&self.log_probs)),
            ("next_log_probs", "F32", vec![self.next.len()], bytes_f32(&self.next)),
        ];
        let mut header = serde_json::Map::from_iter([("__metadata__".to_owned(), json!(self.metadata))]);
        let mut data = Vec::new();
        for (name, dtype, shape, bytes) in tensors {
            let offsets = [data.len(), data.len() + bytes.len()];
            data.extend(bytes);
            header
                .insert(name.to_owned(), json!({ "dtype": dtype, "shape": shape, "data_offsets": offsets }));
        }
        let mut header = Value::Object(header).to_string();
        // Elements begin at a multiple of 8, as the format's own writers arrange it.
        header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.into_bytes());
        bytes.extend(data);
        let partial = self.path.with_extension("partial");
        let written = fs::write(&partial, bytes).and_then(|()| fs::rename(&partial, &self.path));
        written.map_err(|source| write_error(&self.path, source))?;
        Ok(self.path)
    }
}

fn write_error(path: &Path, source: std::io::Error) -> HostError {
    HostError::Write { path: path.to_path_buf(), source }
}
