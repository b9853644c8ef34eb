//! A KV backend of one's own: keys and values in plain vectors, attention over the first and the last tokens only
//! (StreamingLLM, arXiv 2309.17453). An engine calls `attend` once per layer; that is the whole contract.
//!
//! `cargo run --release --features candle --example own_backend -- MODEL.gguf "PROMPT"`

#![allow(clippy::print_stdout, reason = "an example writes its answer")]

use std::ops::ControlFlow;

use floe::TensorView;
use floe::host::{AttendArgs, HostResult, KvBackend, Model, Phase, Sampler, Session};
use floe::view::Elems;

const SINKS: usize = 4;
const WINDOW: usize = 128;

/// Rows of every layer, `[tokens, num_kv_heads, head_dim]` f32.
#[derive(Default, Clone)]
struct Layer {
    k: Vec<f32>,
    v: Vec<f32>,
}

struct SinksAndWindow {
    layers: Vec<Layer>,
    per_token: usize,
}

impl KvBackend for SinksAndWindow {
    fn attend(&mut self, args: &AttendArgs<'_>, out: &mut [f32]) -> HostResult<()> {
        let layer = &mut self.layers[args.layer];
        append(&args.k, &mut layer.k)?;
        append(&args.v, &mut layer.v)?;
        let [tokens, q_heads, dim] = args.q.shape();
        let group = q_heads / args.k.shape()[1];
        let mut q = Vec::new();
        append(&args.q, &mut q)?;
        for (i, (q, out)) in q.chunks_exact(dim).zip(out.chunks_exact_mut(dim)).enumerate() {
            let (token, head) = (i / q_heads, i % q_heads / group);
            let end = args.position + token + 1;
            // A prompt is attended in full: what comes later builds on it.
            let window = if args.phase == Phase::Prefill { end } else { WINDOW };
            let seen = (0..end).filter(|t| *t < SINKS || t + window >= end);
            let row = |rows: &'_ [f32], t: usize| rows[t * self.per_token + head * dim..][..dim].to_vec();
            let scores: Vec<(usize, f32)> = seen
                .map(|t| (t, row(&layer.k, t).iter().zip(q).map(|(k, q)| k * q).sum::<f32>() * args.scale))
                .collect();
            let max = scores.iter().map(|(_, s)| *s).fold(f32::NEG_INFINITY, f32::max);
            let total: f32 = scores.iter().map(|(_, s)| (s - max).exp()).sum();
            out.fill(0.0);
            for (t, score) in scores {
                let weight = (score - max).exp() / total;
                out.iter_mut().zip(row(&layer.v, t)).for_each(|(o, v)| *o += weight * v);
            }
        }
        debug_assert_eq!(tokens * q_heads * dim, out.len());
        Ok(())
    }

    fn prompt_ended(&mut self) -> HostResult<()> {
        Ok(())
    }

    fn truncate(&mut self, num_tokens: usize) -> HostResult<()> {
        for layer in &mut self.layers {
            layer.k.truncate(num_tokens * self.per_token);
            layer.v.truncate(num_tokens * self.per_token);
        }
        Ok(())
    }

    fn num_tokens(&self) -> usize {
        self.layers.last().map_or(0, |layer| layer.k.len() / self.per_token)
    }
}

/// Appends all rows of a view. This engine hands over f32.
fn append(view: &TensorView<'_>, rows: &mut Vec<f32>) -> HostResult<()> {
    let [tokens, heads, _] = view.shape();
    for (token, head) in (0..tokens).flat_map(|t| (0..heads).map(move |h| (t, h))) {
        match view.row(token, head) {
            Elems::F32(row) => rows.extend_from_slice(row),
            Elems::Bf16(row) => rows.extend(row.iter().map(|x| x.to_f32())),
            Elems::F16(row) => rows.extend(row.iter().map(|x| x.to_f32())),
        }
    }
    Ok(())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, prompt] = &args[..] else { return Err("usage: own_backend MODEL.gguf PROMPT".into()) };
    let model = Model::open(model)?;
    let heads = model.config().heads;
    let per_token = heads.num_kv_heads() * heads.head_dim();
    let mut kv = SinksAndWindow { layers: vec![Layer::default(); model.config().num_layers], per_token };
    let mut session = Session::new(&model, &mut kv);
    let logits = session.prefill(&model.chat_tokens(prompt)?, &mut |_| {})?;
    let mut stream = model.tokenizer.stream();
    session.generate(logits, (&mut Sampler::new(0.0, 1.0, 0)?, 100), &mut |token| {
        print!("{}", stream.push(token)?);
        Ok(ControlFlow::Continue(()))
    })?;
    println!();
    Ok(())
}
