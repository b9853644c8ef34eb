//! Every family, as a tiny random model: floe's exact path against candle's attention, truncation, errors.

use candle_core::quantized::gguf_file::Value;
use floe::KvDtype;
use floe::host::{
    CandleAttention, CandleKv, FloeBackend, HostError, KvBackend, Model, Sampler, Session, TOP, largest,
};

use super::tiny::{CONTEXT, FAMILIES, SPAN, metadata, write};

/// Largest difference of two logits that stand for the same number. f32 sums in another order over at most 800 tokens;
/// measured 2e-5 with logits up to 10.
const SAME: f32 = 5e-4;

fn open(family: &str) -> Model {
    let folder = tempfile::tempdir().unwrap();
    Model::open(write(folder.path(), family, &metadata(family))).unwrap()
}

/// Longer than one pass of the prefill.
fn prompt(model: &Model) -> Vec<u32> {
    let text: String = (0..140).map(|i| format!("w{} ", i * i % 97)).collect();
    let tokens = model.tokenizer.encode(&text).unwrap();
    assert!(tokens.len() > 520, "{}", tokens.len());
    tokens
}

fn floe(model: &Model, policy: &str, budget: usize) -> FloeBackend {
    FloeBackend::new(model.config(), KvDtype::F32, policy.parse().unwrap(), budget).unwrap()
}

/// Greedy tokens and the logits before each.
fn greedy(model: &Model, kv: &mut dyn KvBackend, prompt: &[u32], tokens: usize) -> Vec<(u32, Vec<f32>)> {
    let mut session = Session::new(model, kv);
    let mut logits = session.prefill(prompt, &mut |_| {}).unwrap();
    let mut steps = Vec::new();
    for _ in 0..tokens {
        let token = largest(&logits);
        steps.push((token, logits));
        logits = session.step(token).unwrap();
    }
    steps
}

fn worst(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn full_equals_both_attentions_of_candle_token_for_token() {
    for family in FAMILIES {
        let model = open(family);
        let prompt = prompt(&model);
        let want = greedy(&model, &mut CandleKv::new(model.config(), CandleAttention::Matmul), &prompt, 24);
        let flash = greedy(&model, &mut CandleKv::new(model.config(), CandleAttention::Flash), &prompt, 24);
        let got = greedy(&model, &mut floe(&model, "full", 256), &prompt, 24);
        for (name, steps) in [("flash", flash), ("floe", got)] {
            for (i, ((token, logits), (want_token, want_logits))) in steps.iter().zip(&want).enumerate() {
                assert!(
                    worst(logits, want_logits) < SAME,
                    "{family} {name} step {i}: {}",
                    worst(logits, want_logits)
                );
                assert_eq!(token, want_token, "{family} {name} step {i}");
            }
        }
        let spread = want[0].1.iter().fold(0.0f32, |a, x| a.max(x.abs()));
        assert!(spread > 0.5, "{family}: logits up to {spread} could not show a difference");
    }
}

#[test]
fn a_budget_of_the_whole_context_is_exact_and_a_small_one_is_not() {
    let model = open("llama");
    let prompt = prompt(&model);
    let full = greedy(&model, &mut floe(&model, "full", 256), &prompt, 8);
    for policy in ["floe", "quest", "window"] {
        let wide = greedy(&model, &mut floe(&model, policy, CONTEXT), &prompt, 8);
        assert!(wide.iter().zip(&full).all(|(a, b)| worst(&a.1, &b.1) < SAME), "{policy}");
        let narrow = greedy(&model, &mut floe(&model, policy, 96), &prompt, 8);
        assert!(narrow.iter().zip(&full).any(|(a, b)| worst(&a.1, &b.1) > SAME), "{policy}");
    }
}

#[test]
fn refused_drafts_leave_no_trace() {
    for (family, policy) in [("llama", "floe"), ("qwen2", "full"), ("gemma3", "quest")] {
        let model = open(family);
        let prompt = prompt(&model);
        let mut kv = floe(&model, policy, 128);
        let mut session = Session::new(&model, &mut kv);
        let logits = session.prefill(&prompt, &mut |_| {}).unwrap();
        let first = session.step(largest(&logits)).unwrap();
        for draft in [3, 1, 4, 1, 5] {
            session.step(draft).unwrap();
        }
        session.truncate(prompt.len()).unwrap();
        assert_eq!(session.step(largest(&logits)).unwrap(), first, "{family} {policy}");
    }
}

#[test]
fn counters_tell_what_full_attention_would_have_read() {
    let model = open("gemma3");
    let prompt = prompt(&model);
    let mut kv = floe(&model, "window", 96);
    greedy(&model, &mut kv, &prompt, 2);
    let row_bytes = 2 * 32 * 4;
    let global = prompt.len() + 1 + prompt.len() + 2;
    let counters = kv.counters();
    assert_eq!(counters.steps, 2);
    assert_eq!(counters.full_kv_bytes, ((5 * 2 * SPAN + global) * 2 * row_bytes) as u64);
    assert!(counters.kv_bytes < counters.full_kv_bytes);
    assert_eq!(kv.num_tokens(), prompt.len() + 2);
}

#[test]
fn sampling_repeats_with_its_seed() {
    let model = open("qwen3");
    let prompt = prompt(&model);
    let draw = |seed: u64| {
        let mut kv = floe(&model, "floe", 128);
        let mut session = Session::new(&model, &mut kv);
        let logits = session.prefill(&prompt, &mut |_| {}).unwrap();
        let mut sampler = Sampler::new(1.0, 0.95, seed).unwrap();
        let mut on_token = |_| Ok(std::ops::ControlFlow::Continue(()));
        session.generate(logits, (&mut sampler, 20), &mut on_token).unwrap()
    };
    assert_eq!(draw(1), draw(1));
    assert_ne!(draw(1), draw(2));
}

#[test]
fn text_streams_in_whole_characters() {
    let model = open("llama");
    let text = "naïve 東京 \u{1f30a} ok";
    let tokens = model.tokenizer.encode(text).unwrap();
    assert_eq!(tokens.len(), text.len(), "one token a byte");
    let mut stream = model.tokenizer.stream();
    let parts: Vec<String> = tokens.iter().map(|token| stream.push(*token).unwrap()).collect();
    assert_eq!(parts.concat(), text);
    assert!(parts.iter().all(|part| !part.contains('\u{fffd}')));
}

#[test]
fn a_full_context_and_an_empty_prompt_are_refused() {
    let model = open("llama");
    let mut kv = floe(&model, "full", 256);
    let mut session = Session::new(&model, &mut kv);
    let error = session.prefill(&vec![5; CONTEXT + 1], &mut |_| {}).unwrap_err();
    assert!(error.to_string().contains("2048"), "{error}");
    assert!(matches!(session.prefill(&[], &mut |_| {}), Err(HostError::Argument { field: "prompt", .. })));
    assert!(session.step(257).unwrap_err().to_string().contains("257"));
}

#[test]
fn what_a_model_file_lacks_is_named() {
    let folder = tempfile::tempdir().unwrap();
    type Change<'a> = &'a dyn Fn(&mut Vec<(String, Value)>);
    let with = |change: Change<'_>| {
        let mut fields = metadata("llama");
        change(&mut fields);
        Model::open(write(folder.path(), "llama", &fields)).err().unwrap().to_string()
    };
    let set = |name: &'static str, value: Value| {
        move |fields: &mut Vec<(String, Value)>| {
            fields.retain(|(field, _)| field != name);
            fields.push((name.into(), value.clone()));
        }
    };
    let cases = [
        (with(&set("general.architecture", Value::String("mamba".into()))), "mamba"),
        (with(&|fields| fields.retain(|(field, _)| field != "llama.block_count")), "llama.block_count"),
        (with(&set("llama.block_count", Value::U32(3))), "blk.2."),
        (with(&set("llama.feed_forward_length", Value::U32(128))), "ffn_gate"),
        (with(&set("llama.rope.scaling.type", Value::String("yarn".into()))), "yarn"),
        (with(&set("tokenizer.ggml.pre", Value::String("klingon".into()))), "klingon"),
        (with(&set("tokenizer.ggml.model", Value::String("t5".into()))), "t5"),
        (with(&set("tokenizer.chat_template", Value::String("{% if %}".into()))), "template"),
    ];
    for (message, word) in cases {
        assert!(message.contains(word), "{word}: {message}");
    }
    let text = folder.path().join("text.gguf");
    std::fs::write(&text, "no model").unwrap();
    assert!(Model::open(&text).err().unwrap().to_string().contains("text.gguf"));
    assert!(matches!(Model::open(folder.path().join("absent")).err().unwrap(), HostError::Read { .. }));
}

/// The file of 30 queries against candle's own attention.
fn check_logits(model: &Model, prompt: &[u32], file: &[u8]) {
    use safetensors::SafeTensors;
    let (_, header) = SafeTensors::read_metadata(file).unwrap();
    let about = header.metadata().clone().unwrap();
    let first = prompt.len() - 30;
    assert_eq!((about["floe_logits"].as_str(), about["text"].as_str()), ("1", "words"));
    assert_eq!(about["first_query_pos"], first.to_string());
    let tensors = SafeTensors::deserialize(file).unwrap();
    let u32s = |name: &str| -> Vec<u32> {
        let bytes = tensors.tensor(name).unwrap().data().chunks_exact(4);
        bytes.map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect()
    };
    let f32s = |name: &str| u32s(name).into_iter().map(f32::from_bits).collect::<Vec<_>>();
    assert_eq!(u32s("token_ids"), prompt);
    assert_eq!(tensors.tensor("top_ids").unwrap().shape(), [30, TOP]);
    let (ids, top, next) = (u32s("top_ids"), f32s("top_log_probs"), f32s("next_log_probs"));
    assert_eq!(next.len(), 29);
    let mut kv = CandleKv::new(model.config(), CandleAttention::Matmul);
    let mut session = Session::new(model, &mut kv);
    session.prefill(&prompt[..first], &mut |_| {}).unwrap();
    for query in 0..30 {
        let logits = session.step(prompt[first + query]).unwrap();
        let ln_sum = logits.iter().map(|x| f64::from(*x).exp()).sum::<f64>().ln() as f32;
        let row = query * TOP..(query + 1) * TOP;
        for (id, log_prob) in ids[row.clone()].iter().zip(&top[row.clone()]) {
            assert!((log_prob - (logits[*id as usize] - ln_sum)).abs() < SAME, "query {query} token {id}");
        }
        assert!(top[row.clone()].is_sorted_by(|a, b| a >= b));
        let mut best = logits.clone();
        best.sort_unstable_by(|a, b| b.total_cmp(a));
        assert!((top[row.end - 1] - (best[TOP - 1] - ln_sum)).abs() < SAME, "query {query}: not the top");
        if let Some(next) = next.get(query) {
            let id = prompt[first + query + 1] as usize;
            assert!((next - (logits[id] - ln_sum)).abs() < SAME, "query {query}");
        }
    }
}

#[test]
fn a_recorded_trace_holds_what_attention_saw() {
    use floe::host::{RecordPlan, Recorder};
    use floe::trace::{Trace, rope_error};
    for family in ["llama", "qwen2"] {
        let model = open(family);
        let prompt = prompt(&model);
        let folder = tempfile::tempdir().unwrap();
        let plan = RecordPlan {
            layers: vec![1],
            heads: vec![],
            num_tokens: prompt.len(),
            num_queries: 30,
            text: "words".into(),
            licence: "none".into(),
        };
        let recorder = Recorder::create(&model, &plan, folder.path()).unwrap();
        let mut paths = recorder.run(&model, &prompt, &mut |_| {}).unwrap();
        let logits = paths.pop().unwrap();
        assert_eq!(paths.len(), 2);
        check_logits(&model, &prompt, &std::fs::read(logits).unwrap());
        for path in paths {
            let trace = Trace::open(&path).unwrap();
            assert_eq!(trace.meta().num_tokens, prompt.len());
            // Two roundings to bf16.
            assert!(rope_error(&trace, 30) < 1.0 / 128.0, "{family}");
        }
        let error =
            Recorder::create(&model, &RecordPlan { layers: vec![9], ..plan }, folder.path()).err().unwrap();
        assert!(error.to_string().contains("`layers` = 9"), "{error}");
    }
}
