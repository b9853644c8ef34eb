//! `floe replay`: accuracy of policies against full attention on recorded traces.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use floe::replay::{
    DecodeFrom, REPLAY_SCHEMA, ReplayPlan, TraceReplay, html, num_runs, replay, reuse_rows, summarise, tables,
};
use floe::trace::Trace;
use floe::{Backend, Policy};
use indicatif::{ProgressBar, ProgressStyle};

/// The trace that is replayed when none is named: part of the binary, so that it runs from any folder.
const BUNDLED: (&str, &[u8]) = (
    "qwen2.5-coder-1.5b_persuasion-8k_L20H0.safetensors",
    include_bytes!("../../tests/data/qwen2.5-coder-1.5b_persuasion-8k_L20H0.safetensors"),
);

/// Policies of a replay without `--policy`.
const POLICIES: [&str; 10] = [
    "full",
    "int4",
    "kivi2",
    "window",
    "quest",
    "pagemean",
    "oracle",
    "floe:sketch=off",
    "floe:sketch=k1",
    "floe",
];

/// The same with `--backend cuda`.
const DEVICE_POLICIES: [&str; 4] = [
    "full",
    "pagemean:unit=page,tail=page",
    "pagemean:sketch=k1,tail=page",
    "pagemean:sketch=k2v1,tail=page",
];

#[derive(Args)]
pub struct ReplayArgs {
    /// Trace files; several give a table each and their average [default: the bundled trace].
    #[arg(value_name = "TRACE")]
    traces: Vec<PathBuf>,
    /// Policy as NAME[:key=value[,key=value]], for example `floe:tail=page`; repeatable [default: all].
    #[arg(long = "policy", value_name = "SPEC")]
    policies: Vec<Policy>,
    /// Tokens attended exactly per kv head and step, sinks and window included.
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_value = "96,256,1024")]
    budgets: Vec<usize>,
    /// Segments to measure [default: all in the decoded part].
    #[arg(long, value_name = "NAME,NAME", value_delimiter = ',')]
    segments: Vec<String>,
    /// Measure at most N queries of each trace, evenly spaced; 0 = all.
    #[arg(long, value_name = "N", default_value_t = 0)]
    queries: usize,
    /// Where the prefill ends and decoding starts: `first-query` measures every recorded query, for policies that learn.
    #[arg(long, value_enum, value_name = "PLACE", default_value_t = Start::IndexUntil)]
    decode_from: Start,
    /// Seed of the policies' random parts.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Write the rows as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write a self-contained page with tables and plots.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Where attention runs: cpu, or cuda (feature `cuda`; `full` and `pagemean` only).
    #[arg(long, value_name = "NAME", default_value = "cpu")]
    backend: Backend,
    /// Threads; 0 = one per core.
    #[arg(long, value_name = "N", default_value_t = 0)]
    threads: usize,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Start {
    IndexUntil,
    FirstQuery,
}

pub fn run(args: ReplayArgs) -> anyhow::Result<()> {
    let started = Instant::now();
    let traces = open_traces(&args.traces)?;
    let policies = match &args.policies[..] {
        [] if args.backend == Backend::Cuda => {
            DEVICE_POLICIES.iter().map(|spec| spec.parse()).collect::<Result<_, _>>()?
        }
        [] => POLICIES.iter().map(|spec| spec.parse()).collect::<Result<_, _>>()?,
        given => given.to_vec(),
    };
    let (budgets, segments) = (args.budgets, args.segments);
    let (max_queries, seed, threads) = (args.queries, args.seed, args.threads);
    let backend = args.backend;
    let decode_from = match args.decode_from {
        Start::IndexUntil => DecodeFrom::IndexUntil,
        Start::FirstQuery => DecodeFrom::FirstQuery,
    };
    let plan = ReplayPlan { policies, budgets, decode_from, segments, max_queries, seed, threads, backend };

    let bar = progress_bar(traces.len() * num_runs(&plan))?;
    let mut replays: Vec<TraceReplay> = Vec::with_capacity(traces.len());
    for trace in &traces {
        bar.set_message(trace.name());
        replays.push(replay(trace, &plan, &|| bar.inc(1))?);
    }
    bar.finish_and_clear();

    let mut stdout = io::stdout().lock();
    for (caption, table) in tables(&replays) {
        writeln!(stdout, "{caption}\n{table}")?;
    }
    writeln!(
        stdout,
        "attention on {backend}; error = |o - o_full| / |o_full| per query head; kept = attention mass on the exactly attended tokens; \
         read = exact KV and index bytes a step and kv head\n{} runs in {:.1} s",
        replays.len() * num_runs(&plan),
        started.elapsed().as_secs_f64()
    )?;
    if let Some(path) = &args.json {
        let rows: Vec<_> = replays.iter().flat_map(summarise).collect();
        let reuse: Vec<_> = replays.iter().flat_map(reuse_rows).collect();
        let document = serde_json::json!({ "schema": REPLAY_SCHEMA, "rows": rows, "reuse": reuse });
        write_file(path, &serde_json::to_string_pretty(&document)?)?;
    }
    if let Some(path) = &args.html {
        let command = std::env::args().skip(1).collect::<Vec<_>>().join(" ");
        write_file(path, &html(&replays, &format!("floe {command}")))?;
    }
    Ok(())
}

pub(super) fn open_traces(paths: &[PathBuf]) -> anyhow::Result<Vec<Trace>> {
    if paths.is_empty() {
        return Ok(vec![Trace::from_bytes(BUNDLED.0, BUNDLED.1.to_vec())?]);
    }
    Ok(paths.iter().map(Trace::open).collect::<Result<_, _>>()?)
}

/// Draws on stderr, and only when that is a terminal.
fn progress_bar(length: usize) -> anyhow::Result<ProgressBar> {
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} runs  {elapsed} (left {eta})  {msg}")?;
    Ok(ProgressBar::new(length as u64).with_style(style))
}

pub(super) fn write_file(path: &Path, text: &str) -> anyhow::Result<()> {
    use anyhow::Context;
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}
