//! `floe profile`: what a hot tier of a given size would do for a sequence.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context;
use clap::Args;
use floe::page::Unit;
use floe::policy::{EvictionKind, PrefetchKind};
use floe::profile::{
    AccessLog, PROFILE_SCHEMA, Profile, ProfilePlan, SimPlan, collect, html, rows, simulate, tables,
};
use floe::transfer::LinkModel;
use floe::{Backend, Policy};
use indicatif::{ProgressBar, ProgressStyle};

use super::replay::{open_traces, write_file};

#[derive(Args)]
pub struct ProfileArgs {
    /// Trace files: the shards of one sequence [default: the bundled trace].
    #[arg(value_name = "TRACE", conflicts_with = "from_log")]
    traces: Vec<PathBuf>,
    /// Where attention runs: cpu simulates a link; cuda (feature `cuda`) measures times and bytes of a device, for `--select`,
    /// `--budget`, `--slots` (multiples of the budget), `--steps` and `--prefetch-tokens`, and when the stages of a step ran.
    #[arg(long, value_name = "NAME", default_value = "cpu", conflicts_with_all = ["from_log", "access_log", "json"])]
    backend: Backend,
    /// Selection policy, as in `floe replay`.
    #[arg(long, value_name = "SPEC", default_value = "floe")]
    select: Policy,
    /// Tokens attended exactly per kv head and step, sinks and window included.
    #[arg(long, value_name = "N", default_value_t = 256)]
    budget: usize,
    /// Unit of residency and transfer: row (one token) or page (16 tokens).
    #[arg(long, value_name = "UNIT", default_value = "row")]
    unit: Unit,
    /// Eviction policies.
    #[arg(long, value_name = "NAME,NAME", value_delimiter = ',', default_value = "lru,clock,lfu,mass,lrfu")]
    policies: Vec<EvictionKind>,
    /// Ways of fetching ahead.
    #[arg(
        long,
        value_name = "NAME,NAME",
        value_delimiter = ',',
        default_value = "none,last,next_layer,predicted"
    )]
    prefetch: Vec<PrefetchKind>,
    /// With cuda: tokens of a kv head that are brought in behind a step for the next one.
    #[arg(long, value_name = "N", default_value_t = 0)]
    prefetch_tokens: usize,
    /// Slots of each shard, as multiples of the units that a step retrieves.
    #[arg(long, value_name = "X,X", value_delimiter = ',', default_value = "1,1.5,2,4,8")]
    slots: Vec<f64>,
    /// Decode at most N steps; 0 = all.
    #[arg(long, value_name = "N", default_value_t = 0)]
    steps: usize,
    /// Simulated link: GB/s [default: measured PCIe 5.0 gather at the unit's size].
    #[arg(long, value_name = "GB/S")]
    link_gb_per_s: Option<f64>,
    /// Simulated link: cost of one batch, microseconds.
    #[arg(long, value_name = "US", default_value_t = 4.5)]
    link_latency_us: f64,
    /// Simulated computing time of one layer, microseconds.
    #[arg(long, value_name = "US", default_value_t = 60.0)]
    layer_us: f64,
    /// Share of a layer's computing time in which a fetch that the step waits for may run, 0 to 1.
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    overlap: f64,
    /// Seed of the selection policy's random parts.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Write the rows as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write a self-contained page with tables and plots.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Write which units every step asked for.
    #[arg(long, value_name = "FILE")]
    access_log: Option<PathBuf>,
    /// Take the access string from a log instead of traces.
    #[arg(long, value_name = "FILE")]
    from_log: Option<PathBuf>,
    /// Threads; 0 = one per core.
    #[arg(long, value_name = "N", default_value_t = 0)]
    threads: usize,
}

pub fn run(args: ProfileArgs) -> anyhow::Result<()> {
    let started = Instant::now();
    if args.backend == Backend::Cuda {
        return on_device(&args);
    }
    let (log, stages_ns) = match &args.from_log {
        Some(path) => (read_log(path)?, None),
        None => {
            let traces = open_traces(&args.traces)?;
            let plan = ProfilePlan {
                policy: args.select.clone(),
                budget: args.budget,
                unit: args.unit,
                max_steps: args.steps,
                seed: args.seed,
                threads: args.threads,
            };
            let style = ProgressStyle::with_template("{bar:30} {pos}/{len} shards  {elapsed} (left {eta})")?;
            let bar = ProgressBar::new(traces.len() as u64).with_style(style);
            let collected = collect(&traces, &plan, &|| bar.inc(1))?;
            bar.finish_and_clear();
            (collected.log, Some(collected.stages_ns))
        }
    };
    if let Some(path) = &args.access_log {
        write_log(path, &log)?;
    }
    let mut link = LinkModel::pcie5(log.unit_bytes);
    link.gb_per_s = args.link_gb_per_s.unwrap_or(link.gb_per_s);
    (link.batch_latency_us, link.layer_us, link.overlap) =
        (args.link_latency_us, args.layer_us, args.overlap);
    let plan = SimPlan {
        policies: args.policies,
        prefetches: args.prefetch,
        slots_factors: args.slots,
        link,
        threads: args.threads,
    };
    let cells = simulate(&log, &plan)?;
    let profile = Profile { log: &log, plan: &plan, cells: &cells, stages_ns: stages_ns.as_deref() };

    let mut stdout = io::stdout().lock();
    for (caption, table) in tables(&profile) {
        writeln!(stdout, "{caption}\n{table}")?;
    }
    writeln!(stdout, "{}\n{:.1} s", profile.notes(), started.elapsed().as_secs_f64())?;
    if let Some(path) = &args.json {
        let document = serde_json::json!({ "schema": PROFILE_SCHEMA, "rows": rows(&profile) });
        write_file(path, &serde_json::to_string_pretty(&document)?)?;
    }
    if let Some(path) = &args.html {
        write_file(path, &html(&profile, &format!("floe {}", command(&args.traces))))?;
    }
    Ok(())
}

#[cfg(feature = "cuda")]
fn on_device(args: &ProfileArgs) -> anyhow::Result<()> {
    use floe::gpu::{
        DeviceProfilePlan, device_profile, device_profile_html, device_profile_table, overlap_table,
        step_overlap,
    };
    let plan = DeviceProfilePlan {
        policy: args.select.clone(),
        budget: args.budget,
        slots: args.slots.clone(),
        max_steps: args.steps,
        prefetch: args.prefetch_tokens,
    };
    let traces = open_traces(&args.traces)?;
    let rows = device_profile(&traces, &plan)?;
    let stages = traces.first().map_or(Ok(Vec::new()), |trace| step_overlap(trace, &plan))?;
    let device = rows.first().map_or("", |row| &row.device);
    let mut stdout = io::stdout().lock();
    writeln!(
        stdout,
        "{}, {} tokens, on {device}\n{}\nstages of a step in two layers, one behind the other, events around each kernel\n{}",
        plan.policy,
        plan.budget,
        device_profile_table(&rows)?.to_text(),
        overlap_table(&stages)?.to_text()
    )?;
    if let Some(path) = &args.html {
        write_file(path, &device_profile_html(&rows, &stages, &format!("floe {}", command(&args.traces)))?)?;
    }
    Ok(())
}

#[cfg(not(feature = "cuda"))]
fn on_device(args: &ProfileArgs) -> anyhow::Result<()> {
    let (value, reason) = (args.backend.to_string(), super::NO_CUDA.to_owned());
    Err(floe::profile::ProfileError::Plan { field: "backend", value, reason }.into())
}

/// The command line, with a long list of traces cut short.
fn command(traces: &[PathBuf]) -> String {
    let is_further = |arg: &String| traces.iter().skip(1).any(|trace| trace.as_os_str() == arg.as_str());
    let words: Vec<String> = std::env::args().skip(1).filter(|arg| !is_further(arg)).collect();
    let more = traces.len().saturating_sub(1);
    words.join(" ") + &if more > 0 { format!(" (and {more} more traces)") } else { String::new() }
}

fn read_log(path: &Path) -> anyhow::Result<AccessLog> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    AccessLog::read(&mut BufReader::new(file)).with_context(|| path.display().to_string())
}

fn write_log(path: &Path, log: &AccessLog) -> anyhow::Result<()> {
    let file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
    let mut out = BufWriter::new(file);
    log.write(&mut out).with_context(|| path.display().to_string())?;
    out.flush().with_context(|| format!("cannot write {}", path.display()))
}
