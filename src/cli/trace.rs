//! `floe trace`: look at trace files and make new ones.

use std::io::{self, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::{Args, Subcommand, ValueEnum};
use floe::report::NumberFormat;
use floe::report::table::{Cell, Column, Row, Table};
use floe::trace::{QueryRange, Rope, SliceRequest, SynthRequest, Trace, rope_error};
use indicatif::{ProgressBar, ProgressStyle};

/// Queries whose rotation `info` checks, per trace.
const ROPE_QUERIES_CHECKED: usize = 64;

/// Above this relative error rounding to bf16 (2^-9 per element before and after rotation) is no explanation.
const ROPE_ERROR_MAX: f64 = 1.0 / 128.0;

#[derive(Subcommand)]
pub enum TraceCommand {
    /// Validate traces and print what they hold.
    Info(InfoArgs),
    /// Cut a trace to a shorter context and fewer queries.
    ///
    /// Keeps the first tokens (sinks) and the tokens that end with the last kept query; the middle is dropped and
    /// positions are renumbered. Keys and queries stay as recorded, after rotary embedding.
    Slice(SliceArgs),
    /// Make a synthetic trace with planted needles.
    ///
    /// The same options give the same bytes on every machine.
    Synth(SynthArgs),
}

#[derive(Args)]
pub struct InfoArgs {
    /// Trace files.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
}

#[derive(Args)]
pub struct SliceArgs {
    /// The trace to cut.
    #[arg(value_name = "IN")]
    source: PathBuf,
    /// The trace to write.
    #[arg(value_name = "OUT")]
    target: PathBuf,
    /// Tokens to keep, sinks included [default: all up to the last kept query].
    #[arg(long, value_name = "N")]
    tokens: Option<usize>,
    /// Queries to keep: the last N, or those at positions A..B [default: all].
    #[arg(long, value_name = "N|A..B")]
    queries: Option<Queries>,
    /// Tokens to keep from the start of the context.
    #[arg(long, value_name = "N", default_value_t = 16)]
    sinks: usize,
}

#[derive(Args)]
pub struct SynthArgs {
    /// The trace to write.
    #[arg(value_name = "OUT")]
    target: PathBuf,
    /// Tokens of context.
    #[arg(long, value_name = "N", default_value_t = 131_072)]
    tokens: usize,
    /// Queries, at the last positions: half story, half answer.
    #[arg(long, value_name = "N", default_value_t = 256)]
    queries: usize,
    /// Dimensions of a head.
    #[arg(long, value_name = "N", default_value_t = 128)]
    head_dim: usize,
    /// Query heads that share the kv head.
    #[arg(long, value_name = "N", default_value_t = 4)]
    group: usize,
    /// Needles to plant.
    #[arg(long, value_name = "N", default_value_t = 16)]
    needles: usize,
    /// Rotary embedding.
    #[arg(long, value_enum, default_value_t = RopeArg::NeoxHalf)]
    rope: RopeArg,
    /// Seed of everything random.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

#[derive(Clone, Copy, ValueEnum)]
enum RopeArg {
    NeoxHalf,
    Interleaved,
    None,
}

/// The value of `--queries`.
#[derive(Clone)]
struct Queries(QueryRange);

impl FromStr for Queries {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |part: &str| part.parse().map_err(|_| format!("{part:?} is not a number"));
        Ok(Self(match text.split_once("..") {
            Some((start, end)) => QueryRange::Positions(Range { start: number(start)?, end: number(end)? }),
            None => QueryRange::Last(number(text)?),
        }))
    }
}

pub fn run(command: TraceCommand) -> anyhow::Result<()> {
    match command {
        TraceCommand::Info(args) => info(&args),
        TraceCommand::Slice(args) => slice(args),
        TraceCommand::Synth(args) => synth(&args),
    }
}

fn info(args: &InfoArgs) -> anyhow::Result<()> {
    let numbers = |labels: &'static [&str]| labels.iter().map(|label| Column::number(*label));
    let mut table = Table::new(
        [Column::text("trace"), Column::text("layer"), Column::text("kv head")]
            .into_iter()
            .chain(numbers(&["tokens", "prefill", "queries", "group", "dim"]))
            .chain([Column::text("rope")])
            .chain(numbers(&["rope error", "size"])),
    );
    // Traces of one recording share most facts: each set of facts is printed once, with the traces it holds for.
    let mut facts: Vec<(Facts, Vec<String>)> = Vec::new();
    let mut mismatched = Vec::new();
    for path in &args.files {
        let trace = Trace::open(path)?;
        let meta = trace.meta();
        let error = rope_error(&trace, ROPE_QUERIES_CHECKED);
        if error > ROPE_ERROR_MAX {
            mismatched.push(trace.name());
        }
        let counts = [meta.num_tokens, meta.index_until, meta.num_queries, meta.group(), meta.head_dim];
        table.push(Row::new(
            [
                Cell::text(trace.name()),
                Cell::text(format!("{}/{}", meta.layer, meta.num_layers)),
                Cell::text(format!("{}/{}", meta.kv_head, meta.num_kv_heads)),
            ]
            .into_iter()
            .chain(counts.map(|n| Cell::number(n as f64, NumberFormat::Count)))
            .chain([
                Cell::text(meta.rope.name()),
                Cell::number(error, NumberFormat::Decimals(4)),
                Cell::number(trace.size_bytes() as f64, NumberFormat::Bytes),
            ]),
        ))?;
        let own = Facts::of(&trace);
        match facts.iter_mut().find(|(known, _)| *known == own) {
            Some((_, names)) => names.push(trace.name()),
            None => facts.push((own, vec![trace.name()])),
        }
    }
    let mut out = io::stdout().lock();
    write!(out, "{table}")?;
    for (own, names) in &facts {
        writeln!(out)?;
        if facts.len() > 1 {
            writeln!(out, "traces    {}", names.join(", "))?;
        }
        writeln!(out, "model     {}", own.model)?;
        writeln!(out, "text      {}", own.text)?;
        writeln!(out, "licence   {}", own.licence)?;
        writeln!(out, "segments  {}", own.segments)?;
        if let Some(origin) = &own.slice_of {
            writeln!(out, "slice of  {origin}")?;
        }
    }
    if !mismatched.is_empty() {
        writeln!(out, "\nq is not RoPE(q_pre) to bf16 rounding in: {}", mismatched.join(", "))?;
    }
    Ok(())
}

/// What traces of one recording have in common.
#[derive(PartialEq)]
struct Facts {
    model: String,
    text: String,
    licence: String,
    segments: String,
    slice_of: Option<String>,
}

impl Facts {
    fn of(trace: &Trace) -> Self {
        let meta = trace.meta();
        let segments = meta.segments.iter().map(|s| format!("{} {}..{}", s.name, s.start, s.end));
        let segments: Vec<String> = segments.collect();
        Self {
            model: meta.model.clone(),
            text: meta.text.clone(),
            licence: meta.licence.clone(),
            segments: segments.join(", "),
            slice_of: meta.extra.get("slice_of").cloned(),
        }
    }
}

fn slice(args: SliceArgs) -> anyhow::Result<()> {
    let source = Trace::open(&args.source)?;
    let all = QueryRange::Last(source.meta().num_queries);
    let request = SliceRequest {
        num_tokens: args.tokens.unwrap_or(usize::MAX),
        num_sinks: args.sinks,
        queries: args.queries.map_or(all, |queries| queries.0),
    };
    request.write(&source, &args.target)?;
    report_written(&args.target)
}

fn synth(args: &SynthArgs) -> anyhow::Result<()> {
    let request = SynthRequest {
        num_tokens: args.tokens,
        num_queries: args.queries,
        head_dim: args.head_dim,
        group: args.group,
        num_needles: args.needles,
        rope: match args.rope {
            RopeArg::NeoxHalf => Rope::NeoxHalf,
            RopeArg::Interleaved => Rope::Interleaved,
            RopeArg::None => Rope::None,
        },
        seed: args.seed,
    };
    // Draws on stderr, and only when that is a terminal.
    let bar = ProgressBar::new(args.tokens as u64)
        .with_style(ProgressStyle::with_template("{bar:40} {human_pos}/{human_len} tokens, {eta} left")?);
    let result = request.write(&args.target, &mut |done| bar.set_position(done as u64));
    bar.finish_and_clear();
    result?;
    report_written(&args.target)
}

/// Opens what was written, which validates it, and says what it is.
fn report_written(path: &Path) -> anyhow::Result<()> {
    let trace = Trace::open(path)?;
    let meta = trace.meta();
    writeln!(
        io::stdout(),
        "{}: {} tokens, {} queries of {} heads, {}",
        path.display(),
        meta.num_tokens,
        meta.num_queries,
        meta.group(),
        NumberFormat::Bytes.show(trace.size_bytes() as f64),
    )?;
    Ok(())
}
