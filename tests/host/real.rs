//! Real models. `scripts/fetch-models.sh` puts them into `models/`; `FLOE_MODELS` names another folder. Skipped with a
//! message where the file is absent.

use std::path::PathBuf;

use floe::KvDtype;
use floe::host::{CandleAttention, CandleKv, FloeBackend, KvBackend, Model, Sampler, Session, largest};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const SMOLLM2: &str = "smollm2-135m-instruct-q4_1.gguf";
const QWEN: &str = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf";
const GEMMA: &str = "gemma-3-270m-q4_k_m.gguf";

fn model_path(file: &str) -> PathBuf {
    let own = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("models");
    std::env::var_os("FLOE_MODELS").map_or(own, PathBuf::from).join(file)
}

fn open(file: &str) -> Option<Model> {
    let path = model_path(file);
    if path.exists() {
        return Some(Model::open(path).unwrap());
    }
    println!("skipped: {} is absent; scripts/fetch-models.sh gets it", path.display());
    None
}

/// Plain sentences of about `tokens` tokens.
fn filler(model: &Model, tokens: usize) -> String {
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    let mut pick = |words: &[&'static str]| words[rng.random_range(0..words.len())];
    let mut sentences = Vec::new();
    while sentences.len() * 11 < tokens {
        let who = pick(&[
            "The gardener",
            "My aunt",
            "A young sailor",
            "The miller",
            "Our neighbour",
            "The teacher",
        ]);
        let did =
            pick(&["walked to", "wrote about", "remembered", "drew a map of", "came back from", "sold"]);
        let what =
            pick(&["the old bridge", "the orchard", "a quiet harbour", "the market", "the stone house"]);
        let when =
            pick(&["in the rain", "before noon", "that winter", "without a word", "on a Sunday", "at dusk"]);
        sentences.push(format!("{who} {did} {what} {when}."));
    }
    let text = sentences.join(" ");
    let count = model.tokenizer.encode(&text).unwrap().len();
    assert!(count * 10 > tokens * 9 && count * 10 < tokens * 14, "{count} tokens for {tokens}");
    text
}

/// A prompt of some 4K tokens with a number planted in its first third, and the question for it.
fn needle(model: &Model) -> Vec<u32> {
    let text = filler(model, 3700);
    let at = text.len() / 3;
    let at = at + text[at..].find(". ").unwrap() + 2;
    let (before, after) = text.split_at(at);
    let needle = "The secret passkey of the old library is 7394182. Remember it. The passkey is 7394182. ";
    let question = "What is the secret passkey of the old library? Answer with the number.";
    let tokens = model.chat_tokens(&format!("{before}{needle}{after}\n\n{question}")).unwrap();
    assert!(tokens.len() > 3600, "{}", tokens.len());
    tokens
}

fn floe(model: &Model, dtype: KvDtype, policy: &str, budget: usize) -> FloeBackend {
    FloeBackend::new(model.config(), dtype, policy.parse().unwrap(), budget).unwrap()
}

fn answer(model: &Model, kv: &mut dyn KvBackend, prompt: &[u32], tokens: usize) -> Vec<u32> {
    let mut session = Session::new(model, kv);
    let logits = session.prefill(prompt, &mut |_| {}).unwrap();
    let mut sampler = Sampler::new(0.0, 1.0, 0).unwrap();
    let mut on_token = |_| Ok(std::ops::ControlFlow::Continue(()));
    session.generate(logits, (&mut sampler, tokens), &mut on_token).unwrap()
}

#[test]
fn tokenizers_give_the_publishers_tokens() {
    for (file, text, want) in [
        (SMOLLM2, "Hello world!", vec![19556, 905, 17]),
        (QWEN, "Hello world!", vec![9707, 1879, 0]),
        (GEMMA, "Hello world!", vec![2, 9259, 1902, 236888]),
    ] {
        let Some(model) = open(file) else { continue };
        assert_eq!(model.tokenizer.encode(text).unwrap(), want, "{file}");
        let odd = "Caf\u{e9} 1234,\n\n\tif (x == 0) { return \u{6771}\u{4eac}; }  \u{1f30a}";
        let tokens = model.tokenizer.encode(odd).unwrap();
        assert_eq!(model.tokenizer.decode(&tokens).unwrap(), odd, "{file}");
    }
}

#[test]
fn smollm2_finds_a_needle_in_4k_tokens_with_256() {
    let Some(model) = open(SMOLLM2) else { return };
    let prompt = needle(&model);
    let mut kv = floe(&model, KvDtype::F16, "floe", 256);
    let tokens = answer(&model, &mut kv, &prompt, 24);
    let text = model.tokenizer.decode(&tokens).unwrap();
    assert!(text.contains("7394182"), "{text}");
    let counters = kv.counters();
    assert!(counters.full_kv_bytes > 10 * counters.kv_bytes, "{counters:?}");
}

#[test]
fn smollm2_full_equals_candle_token_for_token() {
    let Some(model) = open(SMOLLM2) else { return };
    let text = filler(&model, 900);
    let prompt = model.chat_tokens(&format!("{text}\n\nRetell this story in your own words.")).unwrap();
    let want = answer(&model, &mut CandleKv::new(model.config(), CandleAttention::Matmul), &prompt, 48);
    assert_eq!(want.len(), 48, "the answer is long enough to tell");
    assert_eq!(answer(&model, &mut floe(&model, KvDtype::F32, "full", 256), &prompt, 48), want);
}

/// Runs `floe generate` on a model of `models/`; exit code, answer, messages.
fn generate(model: &str, args: &[&str]) -> (Option<i32>, String, String) {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_floe"));
    command.args(["generate", "--max-new-tokens", "16", "--model", model]).args(args);
    let output = command.output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn smollm2_answers_from_saved_keys_and_values() {
    let Some(model) = open(SMOLLM2) else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (document, kv, file) = (path("document.txt"), path("document.kv"), model_path(SMOLLM2));
    let file = file.to_str().unwrap();
    std::fs::write(&document, filler(&model, 900)).unwrap();
    let question = ["--prompt", "Who walked to the market, and when?"];
    let save =
        [&question[..], &["--prompt-file", &document, "--save-kv", &kv, "--hot-slots", "512"]].concat();
    let load = [&question[..], &["--load-kv", &kv, "--hot-slots", "512"]].concat();
    let (code, first, said) = generate(file, &save);
    assert_eq!(code, Some(0), "{said}");
    assert!(first.trim().len() > 10, "{first}");
    assert!(said.contains("hit rate"), "{said}");
    let (code, second, said) = generate(file, &load);
    assert_eq!((code, &second), (Some(0), &first), "{said}");
    // Question and template alone are run.
    let prefilled = said.split_whitespace().nth(1).and_then(|n| n.parse::<usize>().ok());
    assert!(prefilled.is_some_and(|n| n < 40), "{said}");

    let refused = |file: &str, kv: &str, word: &str| {
        let (code, answer, said) = generate(file, &[&question[..], &["--load-kv", kv]].concat());
        assert_eq!((code, answer.as_str()), (Some(2), ""), "{said}");
        assert!(said.starts_with("error: ") && said.contains(word), "{word}: {said}");
    };
    refused(file, &path("absent"), "absent");
    refused(file, &document, "no page file");
    let other = super::tiny::write(folder.path(), "llama", &super::tiny::metadata("llama"));
    refused(other.to_str().unwrap(), &kv, "`model`");
    let mut bytes = std::fs::read(&kv).unwrap();
    bytes.truncate(bytes.len() - 100);
    std::fs::write(&kv, bytes).unwrap();
    refused(file, &kv, "document.kv");
}

#[test]
fn smollm2_takes_back_refused_drafts() {
    let Some(model) = open(SMOLLM2) else { return };
    let prompt = model.chat_tokens(&filler(&model, 900)).unwrap();
    let mut kv = floe(&model, KvDtype::F16, "floe", 256);
    let mut session = Session::new(&model, &mut kv);
    let logits = session.prefill(&prompt, &mut |_| {}).unwrap();
    let run = |session: &mut Session<'_>| {
        let mut logits = logits.clone();
        (0..20)
            .map(|_| {
                let token = largest(&logits);
                logits = session.step(token).unwrap();
                token
            })
            .collect::<Vec<_>>()
    };
    let first = run(&mut session);
    session.truncate(prompt.len()).unwrap();
    for draft in 100..130 {
        session.step(draft).unwrap();
    }
    session.truncate(prompt.len()).unwrap();
    assert_eq!(run(&mut session), first);
}
