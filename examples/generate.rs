//! Answers a question about a text file with 256 tokens of attention a step:
//! `cargo run --release --features candle --example generate -- MODEL.gguf TEXT "QUESTION"`

#![allow(clippy::print_stdout, reason = "an example writes its answer")]

use std::ops::ControlFlow;

use floe::KvDtype;
use floe::host::{FloeBackend, Model, Sampler, Session};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, text, question] = &args[..] else {
        return Err("usage: generate MODEL.gguf TEXT QUESTION".into());
    };
    let model = Model::open(model)?;
    let prompt = model.chat_tokens(&format!("{}\n\n{question}", std::fs::read_to_string(text)?))?;

    let mut kv = FloeBackend::new(model.config(), KvDtype::F16, "floe".parse()?, 256)?;
    let mut session = Session::new(&model, &mut kv);
    let logits = session.prefill(&prompt, &mut |_| {})?;
    let mut stream = model.tokenizer.stream();
    session.generate(logits, (&mut Sampler::new(0.0, 1.0, 0)?, 200), &mut |token| {
        print!("{}", stream.push(token)?);
        Ok(ControlFlow::Continue(()))
    })?;
    println!("\n{:.1} tokens/s", session.decode.tokens_per_second());
    Ok(())
}
