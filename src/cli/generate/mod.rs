//! `floe generate`: a GGUF model answers a prompt, its attention through floe.

#[cfg(feature = "cuda")]
mod device;

use std::io::{self, Read, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use clap::{Args, ValueEnum};
use floe::host::{
    CandleAttention, CandleKv, FloeBackend, HostError, HostResult, KvBackend, Model, PhaseTime, ReadCounters,
    Sampler, Session,
};
use floe::page::Unit;
use floe::{Backend, Config, HotConfig, KvDtype, Policy};
use indicatif::{ProgressBar, ProgressStyle};

#[derive(Args)]
pub struct GenerateArgs {
    /// Model file (GGUF: Llama family, Qwen2, Qwen3, Gemma 3); `scripts/fetch-models.sh` gets some.
    #[arg(long, value_name = "FILE")]
    model: PathBuf,
    /// Prompt file, `-` = standard input; with `--prompt`, the file comes first.
    #[arg(long, value_name = "TEXT", required_unless_present = "prompt")]
    prompt_file: Option<PathBuf>,
    /// After the prompt file's prefill, save its keys, values and index here; `--prompt` is then a question about it.
    #[arg(long, value_name = "FILE", requires = "prompt_file", conflicts_with = "load_kv")]
    save_kv: Option<PathBuf>,
    /// Ask `--prompt` about a prompt file that was saved by `--save-kv`, without prefill of that file.
    #[arg(long, value_name = "FILE", requires = "prompt", conflicts_with = "prompt_file")]
    load_kv: Option<PathBuf>,
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
    /// Where keys and values lie and decode attends: cpu, or cuda (feature `cuda`); the model itself runs on the CPU.
    #[arg(long, value_name = "NAME", default_value = "cpu")]
    backend: Backend,
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
    /// Slots of the hot tier per kv head, one token each. On the CPU 0 is none, and others save no time but tell the hit rate; on a device 0
    /// leaves room there for all tokens of the model's context.
    #[arg(long, value_name = "N", default_value_t = 0)]
    hot_slots: usize,
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
    fn config(&self, model: &Model, seed: u64) -> Config {
        let shape = model.config();
        let config = Config::new(shape.num_layers, shape.heads, self.kv_dtype.into());
        let (policy, budget, dense_layers) = (self.policy.clone(), self.budget, self.dense_layers);
        let (spans, model) = (shape.spans.clone(), model.name.clone());
        let hot = HotConfig { slots: self.hot_slots, unit: Unit::Row, ..HotConfig::default() };
        Config { model, policy, budget, dense_layers, spans, seed, hot, ..config }
    }
}

pub fn run(args: GenerateArgs) -> anyhow::Result<()> {
    // Inside one pool, candle's products and floe's attention take turns on the same threads without waking others.
    rayon::ThreadPoolBuilder::new().build()?.install(|| run_in_pool(args))
}

fn run_in_pool(args: GenerateArgs) -> anyhow::Result<()> {
    let mut sampler = Sampler::new(args.temperature, args.top_p, args.seed)?;
    let keeps = args.save_kv.as_ref().or(args.load_kv.as_ref());
    if keeps.is_some() && args.attention != AttentionArg::Floe {
        let (field, value) = ("save-kv, load-kv", "FILE".to_owned());
        let reason = "only floe's attention saves and loads".to_owned();
        return Err(HostError::Argument { field, value, reason }.into());
    }
    let on_device = args.backend == Backend::Cuda;
    if on_device && (keeps.is_some() || args.attention != AttentionArg::Floe) {
        let (field, value) = ("backend", args.backend.to_string());
        let reason = "takes floe's attention, without --save-kv and --load-kv".to_owned();
        return Err(HostError::Argument { field, value, reason }.into());
    }
    let prompt = Prompt::read(&args)?;
    let model = Model::open(&args.model)?;
    if on_device {
        #[cfg(feature = "cuda")]
        return device::run(&args, &model, (&prompt.tokens(&args, &model)?, &mut sampler));
        #[cfg(not(feature = "cuda"))]
        return {
            let (value, reason) = (args.backend.to_string(), super::NO_CUDA.to_owned());
            Err(HostError::Argument { field: "backend", value, reason }.into())
        };
    }
    let (times, read) = match args.attention {
        AttentionArg::Floe => {
            let mut kv = FloeBackend::open(args.kv.config(&model, args.seed))?;
            let times = match keeps {
                Some(path) => answer_kept(&args, (&model, &prompt), &mut sampler, (&mut kv, path))?,
                None => answer(&args, &model, (&prompt.tokens(&args, &model)?, &mut sampler), &mut kv)?,
            };
            let memory = kv.memory()?;
            (times, Some((kv.counters(), memory.kv_bytes, memory.index_bytes)))
        }
        AttentionArg::CandleFlash | AttentionArg::CandleMatmul => {
            let flash = args.attention == AttentionArg::CandleFlash;
            let attention = if flash { CandleAttention::Flash } else { CandleAttention::Matmul };
            let mut kv = CandleKv::new(model.config(), attention);
            let times = answer(&args, &model, (&prompt.tokens(&args, &model)?, &mut sampler), &mut kv)?;
            (times, None)
        }
    };
    summary(&times, read)
}

/// What the user wrote.
struct Prompt {
    file: String,
    question: String,
}

impl Prompt {
    fn read(args: &GenerateArgs) -> anyhow::Result<Self> {
        let mut file = String::new();
        match &args.prompt_file {
            Some(path) if path.as_os_str() == "-" => {
                io::stdin()
                    .read_to_string(&mut file)
                    .context("cannot read the prompt from standard input")?;
            }
            Some(path) => {
                file = std::fs::read_to_string(path)
                    .with_context(|| format!("cannot read {}", path.display()))?;
            }
            None => {}
        }
        Ok(Self { file, question: args.prompt.clone().unwrap_or_default() })
    }

    /// File and question as one.
    fn tokens(&self, args: &GenerateArgs, model: &Model) -> HostResult<Vec<u32>> {
        let gap = if self.file.is_empty() || self.question.is_empty() { "" } else { "\n\n" };
        let text = format!("{}{gap}{}", self.file, self.question);
        if args.raw { model.tokenizer.encode(&text) } else { model.chat_tokens(&text) }
    }

    /// The file, and what follows it up to the answer. The second part needs the first only where it was written.
    fn parts(&self, args: &GenerateArgs, model: &Model) -> HostResult<[Vec<u32>; 2]> {
        let around = model.chat_around(&self.file)?;
        let (before, after) = if args.raw { (self.file.clone(), String::new()) } else { around };
        let question = format!("{}{after}", self.question);
        Ok([model.tokenizer.encode(&before)?, model.tokenizer.encode_more(&question)?])
    }
}

/// Answers a question about a file whose keys and values are saved after its prefill, or loaded in place of it.
fn answer_kept(
    args: &GenerateArgs,
    (model, prompt): (&Model, &Prompt),
    sampler: &mut Sampler,
    (kv, path): (&mut FloeBackend, &Path),
) -> anyhow::Result<Times> {
    let [file, question] = prompt.parts(args, model)?;
    let mut before = Times::default();
    if args.load_kv.is_some() {
        kv.load(path)?;
    } else {
        let mut session = Session::new(model, kv);
        let bar = prefill_bar(file.len())?;
        session.prefill(&file, &mut |done| bar.inc(done as u64))?;
        bar.finish_and_clear();
        before = Times { prefill: session.prefill, index: session.index, decode: PhaseTime::default() };
        kv.save(path)?;
    }
    let mut times = answer(args, model, (&question, sampler), kv)?;
    times.prefill.add(&before.prefill);
    times.index += before.index;
    Ok(times)
}

/// Where the time went.
#[derive(Default)]
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
fn print_times(times: &Times) -> anyhow::Result<()> {
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
    Ok(())
}

/// `share` of the heads' steps; nothing where none was in doubt.
fn print_doubt(share: f64) -> io::Result<()> {
    if share == 0.0 {
        return Ok(());
    }
    writeln!(
        io::stderr(),
        "exact    {:.1} % of the heads' steps attended everything: estimates too coarse there (max_doubt)",
        100.0 * share,
    )
}

fn summary(times: &Times, read: Option<(ReadCounters, usize, usize)>) -> anyhow::Result<()> {
    print_times(times)?;
    let mut stderr = io::stderr().lock();
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
        let (doubted, all) = read.doubted;
        print_doubt(doubted as f64 / all.max(1) as f64)?;
        let asked = read.fetched;
        match asked.requests {
            0 => writeln!(
                stderr,
                "hot      off; --hot-slots 512 tells the hit rate of so many slots a kv head"
            )?,
            requests => writeln!(
                stderr,
                "hot      hit rate {:.1} %, {:.2} MB a token moved",
                100.0 * asked.hits as f64 / requests as f64,
                per_step(asked.bytes as u64),
            )?,
        }
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

/// Draws on stderr, and only when that is a terminal.
pub fn prefill_bar(tokens: usize) -> anyhow::Result<ProgressBar> {
    let style = ProgressStyle::with_template("prefill {bar:30} {pos}/{len} tokens  {per_sec} (left {eta})")?;
    Ok(ProgressBar::new(tokens as u64).with_style(style))
}
