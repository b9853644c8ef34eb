//! Random models of a few thousand weights, written as GGUF files: the host engine is tested whole without a download.

use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

pub const FAMILIES: [&str; 4] = ["llama", "qwen2", "qwen3", "gemma3"];
pub const CONTEXT: usize = 2048;
/// Span of the sliding layers of the Gemma model.
pub const SPAN: usize = 40;

const HIDDEN: usize = 64;
const WIDE: usize = 96;
const Q_HEADS: usize = 4;
const KV_HEADS: usize = 2;
const DIM: usize = 32;

/// Metadata of a model, with a byte-level tokenizer of 256 bytes and one end token.
pub fn metadata(family: &str) -> Vec<(String, Value)> {
    let mut alphabet: Vec<char> =
        tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let mut tokens: Vec<Value> = alphabet.iter().map(|c| Value::String(c.to_string())).collect();
    tokens.push(Value::String("<|im_end|>".into()));
    let types = (0..tokens.len()).map(|id| Value::I32(if id == 256 { 3 } else { 1 })).collect();
    let mut fields = vec![
        ("general.architecture".to_owned(), Value::String(family.into())),
        ("general.name".to_owned(), Value::String(format!("tiny {family}"))),
        ("tokenizer.ggml.model".to_owned(), Value::String("gpt2".into())),
        ("tokenizer.ggml.pre".to_owned(), Value::String("gpt-2".into())),
        ("tokenizer.ggml.tokens".to_owned(), Value::Array(tokens)),
        ("tokenizer.ggml.token_type".to_owned(), Value::Array(types)),
        ("tokenizer.ggml.merges".to_owned(), Value::Array(vec![])),
        ("tokenizer.ggml.eos_token_id".to_owned(), Value::U32(256)),
    ];
    let counts = [
        ("block_count", num_layers(family)),
        ("context_length", CONTEXT),
        ("embedding_length", HIDDEN),
        ("feed_forward_length", WIDE),
        ("attention.head_count", Q_HEADS),
        ("attention.head_count_kv", KV_HEADS),
        ("attention.key_length", DIM),
    ];
    fields.extend(counts.map(|(name, n)| (format!("{family}.{name}"), Value::U32(n as u32))));
    fields.push((format!("{family}.rope.freq_base"), Value::F32(10_000.0)));
    if family == "gemma3" {
        fields.push(("gemma3.attention.sliding_window".into(), Value::U32(SPAN as u32)));
    }
    fields
}

fn num_layers(family: &str) -> usize {
    if family == "gemma3" { 6 } else { 2 }
}

/// Writes a random model and returns its path.
pub fn write(folder: &Path, family: &str, metadata: &[(String, Value)]) -> PathBuf {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let mut tensors: Vec<(String, QTensor)> = Vec::new();
    let mut add = |name: &str, shape: &[usize], (mean, spread): (f32, f32), dtype: GgmlDType| {
        let len = shape.iter().product::<usize>();
        let data: Vec<f32> = (0..len).map(|_| mean + spread * rng.random_range(-1.0f32..1.0)).collect();
        let tensor = Tensor::from_vec(data, shape, &Device::Cpu).unwrap();
        tensors.push((name.to_owned(), QTensor::quantize(&tensor, dtype).unwrap()));
    };
    let (q8, f32) = (GgmlDType::Q8_0, GgmlDType::F32);
    add("token_embd.weight", &[257, HIDDEN], (0.0, 0.5), q8);
    add("output_norm.weight", &[HIDDEN], (1.0, 0.2), f32);
    for layer in 0..num_layers(family) {
        let name = |part: &str| format!("blk.{layer}.{part}");
        let (q_rows, kv_rows) = (Q_HEADS * DIM, KV_HEADS * DIM);
        let matrices = [
            ("attn_q", q_rows, HIDDEN),
            ("attn_k", kv_rows, HIDDEN),
            ("attn_v", kv_rows, HIDDEN),
            ("attn_output", HIDDEN, q_rows),
            ("ffn_gate", WIDE, HIDDEN),
            ("ffn_up", WIDE, HIDDEN),
            ("ffn_down", HIDDEN, WIDE),
        ];
        for (i, (part, rows, width)) in matrices.into_iter().enumerate() {
            // One format of each kind: a quick one, a slow one that becomes f32.
            let dtype = if i % 2 == 0 { q8 } else { GgmlDType::Q4_1 };
            add(&name(&format!("{part}.weight")), &[rows, width], (0.0, 0.35), dtype);
            if family == "qwen2" && i < 3 {
                add(&name(&format!("{part}.bias")), &[rows], (0.5, 1.0), f32);
            }
        }
        add(&name("attn_norm.weight"), &[HIDDEN], (1.0, 0.2), f32);
        add(&name("ffn_norm.weight"), &[HIDDEN], (1.0, 0.2), f32);
        if matches!(family, "qwen3" | "gemma3") {
            add(&name("attn_q_norm.weight"), &[DIM], (1.5, 0.2), f32);
            add(&name("attn_k_norm.weight"), &[DIM], (1.5, 0.2), f32);
        }
        if family == "gemma3" {
            add(&name("post_attention_norm.weight"), &[HIDDEN], (1.0, 0.2), f32);
            add(&name("post_ffw_norm.weight"), &[HIDDEN], (1.0, 0.2), f32);
        }
    }
    let path = folder.join(format!("{family}.gguf"));
    let mut file = std::fs::File::create(&path).unwrap();
    let fields: Vec<(&str, &Value)> = metadata.iter().map(|(name, value)| (name.as_str(), value)).collect();
    let tensors: Vec<(&str, &QTensor)> =
        tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    gguf_file::write(&mut file, &fields, &tensors).unwrap();
    path
}
