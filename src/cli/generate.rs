//! `floe generate`: a GGUF model answers a prompt, its attention through floe.

use std::io::{self, Read, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, ValueEnum};
use floe::host::{
    CandleAttention, CandleKv, FloeBackend, KvBackend, Model, PhaseTime, ReadCounters, Sampler, Session,
};
use floe::{Config, KvDtype, Policy};
use indicatif::{ProgressBar, ProgressStyle};

#[derive(Args)]
pub struct GenerateArgs {
    /// Model file (GGUF: Llama family, Qwen2, Qwen3, Gemma 3); `scripts/fetch-models.sh` gets some.
    #[arg(long, value_name = "FILE")]
    model: PathBuf,
    /// Prompt file, `-` = standard input; with `--prompt`, the file comes first.
    #[arg(long, value_name = "TEXT", required_unless_present = "prompt")]
    prompt_file: Option<PathBuf>,
    /// Prompt on the command line.
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// Continue the bare text instead of answering it in the model's chat form.
    #[arg(long)]
    raw: bool,
    #[command(flatten)]
    kv: KvArgs,
    /// Tokens to generate at most.
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_new_tokens: usize,
    /// 0 = always the likeliest token.
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    temperature: f32,
    /// Draw from the smallest set of tokens that holds this much probability.
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    top_p: f32,
    /// Seed of sampling and of the policy's random parts.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Whose attention runs: floe's, or candle's own over all tokens, for comparison.
    #[arg(long, value_enum, default_value_t = AttentionArg::Floe)]
    attention: AttentionArg,
}

/// How keys and values are kept and selected.
#[derive(Args)]
pub struct KvArgs {
    /// Policy as NAME[:key=value[,key=value]], for example `full` or `floe:tail=page`.
    #[arg(long, value_name = "SPEC", default_value = "floe")]
    policy: Policy,
    /// Tokens attended exactly per kv head and step, sinks and window included.
    #[arg(long, value_name = "N", default_value_t = 256)]
    budget: usize,
    /// First layers that stay dense.
    #[arg(long, value_name = "N", default_value_t = 0)]
    dense_layers: usize,
    /// Element type of the stored keys and values.
    #[arg(long, value_enum, default_value_t = DtypeArg::F16)]
    kv_dtype: DtypeArg,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum AttentionArg {
    Floe,
    CandleFlash,
    CandleMatmul,
}

/// Element types of the KV cache.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DtypeArg {
    Bf16,
    F16,
    F32,
}

impl From<DtypeArg> for KvDtype {
    fn from(dtype: DtypeArg) -> Self {
        match dtype {
            DtypeArg::Bf16 => Self::Bf16,
            DtypeArg::F16 => Self::F16,
            DtypeArg::F32 => Self::F32,
        }
    }
}

impl KvArgs {
    /// An empty sequence of `model`.
    pub fn open(&self, model: &Model, seed: u64) -> anyhow::Result<FloeBackend> {
        let shape = model.config();
        let config = Config::new(shape.num_layers, shape.heads, self.kv_dtype.into());
        let (policy, budget, dense_layers) = (self.policy.clone(), self.budget, self.dense_layers);
        let spans = shape.spans.clone();
        Ok(FloeBackend::open(Config { policy, budget, dense_layers, spans, seed, ..config })?)
    }
}

pub fn run(args: GenerateArgs) -> anyhow::Result<()> {
    // Inside one pool, candle's products and floe's attention take turns on the same threads without waking others.
    rayon::ThreadPoolBuilder::new().build()?.install(|| run_in_pool(args))
}

fn run_in_pool(args: GenerateArgs) -> anyhow::Result<()> {
    let mut sampler = Sampler::new(args.temperature, args.top_p, args.seed)?;
    let text = prompt(&args)?;
    let model = Model::open(&args.model)?;
    let tokens = if args.raw { model.tokenizer.encode(&text)? } else { model.chat_tokens(&text)? };
    let (times, read) = match args.attention {
        AttentionArg::Floe => {
            let mut kv = args.kv.open(&model, args.seed)?;
            let times = answer(&args, &model, (&tokens, &mut sampler), &mut kv)?;
            let memory = kv.memory()?;
            (times, Some((kv.counters(), memory.kv_bytes, memory.index_bytes)))
        }
        AttentionArg::CandleFlash | AttentionArg::CandleMatmul => {
            let flash = args.attention == AttentionArg::CandleFlash;
            let attention = if flash { CandleAttention::Flash } else { CandleAttention::Matmul };
            let mut kv = CandleKv::new(model.config(), attention);
            let times = answer(&args, &model, (&tokens, &mut sampler), &mut kv)?;
            (times, None)
        }
    };
    summary(&times, read)
}

/// Where the time went.
struct Times {
    prefill: PhaseTime,
    index: Duration,
    decode: PhaseTime,
}

/// Streams the answer to stdout.
fn answer(
    args: &GenerateArgs,
    model: &Model,
    (tokens, sampler): (&[u32], &mut Sampler),
    kv: &mut dyn KvBackend,
) -> anyhow::Result<Times> {
    let mut session = Session::new(model, kv);
    let bar = prefill_bar(tokens.len())?;
    let logits = session.prefill(tokens, &mut |done| bar.inc(done as u64))?;
    bar.finish_and_clear();
    let mut stdout = io::stdout().lock();
    let mut stream = model.tokenizer.stream();
    let mut closed = None;
    session.generate(logits, (sampler, args.max_new_tokens), &mut |token| {
        let text = stream.push(token)?;
        match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
            Ok(()) => Ok(ControlFlow::Continue(())),
            Err(error) => {
                closed = Some(error);
                Ok(ControlFlow::Break(()))
            }
        }
    })?;
    if let Some(error) = closed {
        return Err(error.into());
    }
    writeln!(stdout)?;
    Ok(Times { prefill: session.prefill, index: session.index, decode: session.decode })
}

/// On stderr, so that stdout holds the answer alone.
fn summary(times: &Times, read: Option<(ReadCounters, usize, usize)>) -> anyhow::Result<()> {
    let mut stderr = io::stderr().lock();
    for (name, time) in [("prefill", &times.prefill), ("decode", &times.decode)] {
        let share = 100.0 * time.attend.as_secs_f64() / time.total.as_secs_f64().max(f64::MIN_POSITIVE);
        writeln!(
            stderr,
            "{name:8} {:6} tokens  {:8.2} s  {:8.1} tokens/s  attention {:8.3} ms a token, {share:.0} % of the time",
            time.tokens,
            time.total.as_secs_f64(),
            time.tokens_per_second(),
            1e3 * time.attend.as_secs_f64() / time.tokens.max(1) as f64,
        )?;
    }
    if let Some((read, kv_bytes, index_bytes)) = read {
        let per_step = |bytes: u64| bytes as f64 / read.steps.max(1) as f64 / 1e6;
        let both = read.kv_bytes + read.index_bytes;
        writeln!(
            stderr,
            "read     {:.2} MB a token (KV {:.2}, index {:.2}); Full-KV {:.2} MB, {:.1} times as much",
            per_step(both),
            per_step(read.kv_bytes),
            per_step(read.index_bytes),
            per_step(read.full_kv_bytes),
            read.full_kv_bytes as f64 / both.max(1) as f64,
        )?;
        writeln!(
            stderr,
            "memory   KV {:.1} MB, index {:.1} MB, built in {:.2} s",
            kv_bytes as f64 / 1e6,
            index_bytes as f64 / 1e6,
            times.index.as_secs_f64(),
        )?;
    }
    Ok(())
}

fn prompt(args: &GenerateArgs) -> anyhow::Result<String> {
    let mut text = String::new();
    if let Some(path) = &args.prompt_file {
        if path.as_os_str() == "-" {
            io::stdin().read_to_string(&mut text).context("cannot read the prompt from standard input")?;
        } else {
            text =
                std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        }
    }
    if let Some(more) = &args.prompt {
        if !text.is_empty() {
            text.push_str("\n\n");
        }
        text.push_str(more);
    }
    Ok(text)
}

/// Draws on stderr, and only when that is a terminal.
pub fn prefill_bar(tokens: usize) -> anyhow::Result<ProgressBar> {
    let style = ProgressStyle::with_template("prefill {bar:30} {pos}/{len} tokens  {per_sec} (left {eta})")?;
    Ok(ProgressBar::new(tokens as u64).with_style(style))
}
