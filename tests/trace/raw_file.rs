//! Small traces, and their files taken apart so that a test can damage one part.

use std::collections::BTreeMap;

use floe::trace::{Rope, Segment, TraceMeta};
use half::bf16;
use serde_json::{Value, json};

/// Metadata of a trace with 24 tokens, 5 queries of 2 heads, 16 dimensions.
pub fn small_meta() -> TraceMeta {
    TraceMeta {
        model: "test \"model\"".into(),
        layer: 1,
        kv_head: 2,
        num_layers: 2,
        num_q_heads: 6,
        num_kv_heads: 3,
        head_dim: 16,
        rope: Rope::NeoxHalf,
        rope_theta: 10000.0,
        softmax_scale: 0.25,
        num_tokens: 24,
        num_queries: 5,
        first_query_pos: 18,
        index_until: 18,
        rope_offset: 0,
        segments: vec![
            Segment { name: "early".into(), start: 0, end: 20 },
            Segment { name: "late".into(), start: 20, end: 23 },
        ],
        text: "none".into(),
        licence: "CC0".into(),
        extra: BTreeMap::from([("layout".to_string(), "as usual".to_string())]),
    }
}

/// `len` distinct finite values that start at `first`.
pub fn ramp(first: usize, len: usize) -> Vec<bf16> {
    (first..first + len).map(|i| bf16::from_bits((i % 0x7f00) as u16)).collect()
}

/// A trace file in parts.
#[derive(Clone)]
pub struct RawFile {
    /// The header, with `__metadata__` and the four tensors.
    pub header: Value,
    /// What follows the header.
    pub data: Vec<u8>,
}

impl RawFile {
    /// A valid file, built here and not by the crate's writer.
    pub fn valid() -> Self {
        let metadata = json!({
            "floe_trace": "1", "model": "m", "layer": "1", "kv_head": "2", "num_layers": "2", "num_q_heads": "6",
            "num_kv_heads": "3", "head_dim": "16", "rope": "neox-half", "rope_theta": "10000.0", "softmax_scale": "0.25",
            "num_tokens": "24", "num_queries": "5", "first_query_pos": "18", "index_until": "18",
            "segments": "{\"early\": [0, 20], \"late\": [20, 23]}", "text": "none", "licence": "CC0"
        });
        let header = json!({
            "__metadata__": metadata,
            "k": {"dtype": "BF16", "shape": [24, 16], "data_offsets": [0, 768]},
            "v": {"dtype": "BF16", "shape": [24, 16], "data_offsets": [768, 1536]},
            "q": {"dtype": "BF16", "shape": [5, 2, 16], "data_offsets": [1536, 1856]},
            "q_pre": {"dtype": "BF16", "shape": [5, 2, 16], "data_offsets": [1856, 2176]}
        });
        let data = ramp(0, 1088).iter().flat_map(|x| x.to_le_bytes()).collect();
        Self { header, data }
    }

    /// The same with metadata field `name` set.
    pub fn with_field(name: &str, value: &str) -> Self {
        let mut file = Self::valid();
        file.header["__metadata__"][name] = json!(value);
        file
    }

    /// The same without `name` in the metadata.
    pub fn without_field(name: &str) -> Self {
        let mut file = Self::valid();
        file.header["__metadata__"].as_object_mut().expect("an object").remove(name);
        file
    }

    /// The file's bytes; the header is not padded beyond `padding` spaces.
    pub fn bytes(&self, padding: usize) -> Vec<u8> {
        let mut json = self.header.to_string().into_bytes();
        json.resize(json.len() + padding, b' ');
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend(json);
        bytes.extend(&self.data);
        bytes
    }
}
