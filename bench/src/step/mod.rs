//! `floe-bench step`: attention time per token of the engine on the device, over all layers of a model, against full attention.
//!
//! A case has as many layers in memory as `--memory` allows, and a token calls the model's layers in turn, so that one layer in
//! memory may serve several of the model's: it is then a few tokens further each time. Queries drift from call to call, which
//! sets how much of a selection stays the same. What is timed is the calls alone, from an event before the first to one behind the
//! last. The host engine's own work between them is not there, or stands for as a large device copy behind each call (`--gap-us`), whose
//! time alone is taken off: it gives prefetch something to hide behind, and takes device bandwidth as weights do.

mod plot;
#[cfg(feature = "timeline")]
mod timeline;
mod world;

use std::path::PathBuf;

use anyhow::Context;
use floe::gpu::{Device, Submit, TailPlace};
use serde::Serialize;
use world::{Case, Kv, Timed};

/// What to measure. Lists are swept in all combinations.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Tokens of every sequence.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "4096,8192,16384,32768,65536,131072,262144,524288,1048576"
    )]
    contexts: Vec<usize>,
    /// Sequences of a step.
    #[arg(long, value_delimiter = ',', default_value = "1")]
    batches: Vec<usize>,
    /// Tokens attended exactly per kv head.
    #[arg(long, value_delimiter = ',', default_value = "256,1024")]
    budgets: Vec<usize>,
    /// Share of the rows that lies on the device.
    #[arg(long, value_delimiter = ',', default_value = "0.05,1")]
    hot: Vec<f64>,
    /// Policies, beside full attention.
    #[arg(long, value_delimiter = ';', default_value = "pagemean:sketch=k1,tail=page")]
    policies: Vec<String>,
    /// Share of a query that is new with every call, 0 to 1.
    #[arg(long, value_delimiter = ',', default_value = "0.1")]
    drift: Vec<f32>,
    /// Layers of the model.
    #[arg(long, default_value_t = 32)]
    layers: usize,
    /// Tokens timed.
    #[arg(long, default_value_t = 40)]
    tokens: usize,
    /// Bytes of keys and values in memory, at most; a layer is there in any case.
    #[arg(long, default_value_t = 4_000_000_000)]
    memory: usize,
    /// Bytes of the device for full attention, at most: longer contexts have no time of it.
    #[arg(long, default_value_t = 40_000_000_000)]
    device_memory: usize,
    /// Rows of a layer that lie on the device in any case, all heads together: what a short context needs to be attended exactly.
    #[arg(long, default_value_t = 262_144)]
    rows: usize,
    /// Make the tail behind the fetch, joined by the attention, instead of on a stream of its own.
    #[arg(long)]
    joined_tail: bool,
    /// Choose pages of trees on the host, with room on the device for those alone that it lists.
    #[arg(long)]
    host_lists: bool,
    /// Threads that build, extend and search trees; 0: half of the cores.
    #[arg(long, default_value_t = 0)]
    tree_threads: usize,
    /// Wait for each token before the next is queued, as a host engine does that samples: times then have what the device waits for the
    /// host.
    #[arg(long)]
    paced: bool,
    /// Tokens of a kv head that are brought in behind a step for the next one.
    #[arg(long, value_delimiter = ',', default_value = "0")]
    prefetch: Vec<usize>,
    /// Microseconds of a device copy behind each call, in place of the host engine's own work.
    #[arg(long, value_delimiter = ',', default_value = "0")]
    gap_us: Vec<f64>,
    /// How steps are submitted: auto, recorded, launches.
    #[arg(long, default_value = "auto", value_parser = submit)]
    submit: Submit,
    /// Times of PyTorch's attention, as `bench/compare/sdpa.py --csv` writes them in the same run.
    #[arg(long)]
    sdpa: Option<PathBuf>,
    /// Also print when the kernels of a step ran, and write when each of their blocks did, of the last case, as CSV.
    #[cfg(feature = "timeline")]
    #[arg(long)]
    timeline: Option<PathBuf>,
    /// Also write the rows as CSV.
    #[arg(long)]
    csv: Option<PathBuf>,
    /// Also write a plot.
    #[arg(long)]
    svg: Option<PathBuf>,
}

fn submit(name: &str) -> Result<Submit, String> {
    match name {
        "auto" => Ok(Submit::Auto),
        "recorded" => Ok(Submit::Recorded),
        "launches" => Ok(Submit::Launches),
        _ => Err("must be auto, recorded or launches".to_owned()),
    }
}

/// One line of the table.
#[derive(Debug, Clone, Serialize)]
struct Row {
    context: usize,
    batch: usize,
    policy: String,
    budget: usize,
    hot: f64,
    /// Share of the retrieved rows that were in their slots.
    hit_rate: f64,
    /// Tokens of a kv head that are brought in behind a step, and their bytes a token, all layers.
    prefetch: usize,
    prefetch_mb: f64,
    /// Device copy behind each call, microseconds; not in the times.
    gap_us: f64,
    /// Share of the steps that were exact.
    exact: f64,
    /// Milliseconds of a token: all layers.
    p50_ms: f64,
    p99_ms: f64,
    /// Microseconds of a layer.
    layer_us: f64,
    /// Bytes over the link, a token, all layers.
    link_mb: f64,
    /// Device memory, all layers: rows, and what lies beside them.
    rows_gb: f64,
    beside_gb: f64,
    /// Time over that of full attention: our own engine's, and PyTorch's.
    of_full: Option<f64>,
    of_sdpa: Option<f64>,
    /// Layers in memory.
    layers_held: usize,
}

/// Measures and prints.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let device = Device::open(0)?;
    let sdpa = args.sdpa.as_ref().map(read_sdpa).transpose()?.unwrap_or_default();
    let mut rows: Vec<Row> = Vec::new();
    print_head(&device);
    for &batch in &args.batches {
        for &context in &args.contexts {
            measure(args, &device, (batch, context), &sdpa, &mut rows)?;
        }
    }
    if let Some(path) = &args.csv {
        write_csv(path, &rows)?;
    }
    if let Some(path) = &args.svg {
        plot::write(path, &rows)?;
    }
    Ok(())
}

fn measure(
    args: &Args,
    device: &Device,
    (batch, context): (usize, usize),
    sdpa: &[Sdpa],
    rows: &mut Vec<Row>,
) -> anyhow::Result<()> {
    let of_layer = world::layer_bytes(batch, context);
    let held = (args.memory / of_layer).clamp(1, args.layers);
    let case = |policy: &str, budget: usize, hot: f64, drift: f32| Case {
        context,
        batch,
        policy: policy.to_owned(),
        budget,
        hot,
        drift,
        layers: args.layers,
        held,
        tokens: args.tokens,
        rows: args.rows,
        tail: if args.joined_tail { TailPlace::Joined } else { TailPlace::Beside },
        prefetch: 0,
        gap_us: 0.0,
        submit: args.submit,
        host_lists: args.host_lists,
        #[cfg(feature = "timeline")]
        timeline: args.timeline.clone(),
        paced: args.paced,
        tree_threads: args.tree_threads,
    };
    let torch = sdpa.iter().find(|s| s.batch == batch && s.context == context);
    let torch_ms = torch.map(|s| s.us * args.layers as f64 / 1e3);
    let mut full_ms = None;
    let mut kv = Kv::new(device)?;
    if held * of_layer <= args.device_memory {
        let full = case("full", context, 1.0, 0.0);
        let timed = world::time(device, &full, &mut kv)?;
        let row = row(&full, &timed, (None, torch_ms));
        full_ms = Some(row.p50_ms);
        print_row(&row);
        rows.push(row);
    }
    for policy in &args.policies {
        for &budget in args.budgets.iter().filter(|budget| **budget < context) {
            for &hot in &args.hot {
                for &drift in &args.drift {
                    if (held * of_layer) as f64 * hot > args.device_memory as f64 {
                        continue;
                    }
                    for &gap_us in &args.gap_us {
                        // Where all rows are there, nothing is fetched ahead.
                        for &prefetch in args.prefetch.iter().filter(|prefetch| hot < 1.0 || **prefetch == 0)
                        {
                            let case = Case { gap_us, prefetch, ..case(policy, budget, hot, drift) };
                            let timed = world::time(device, &case, &mut kv)?;
                            let row = row(&case, &timed, (full_ms, torch_ms));
                            print_row(&row);
                            print_trees(&timed);
                            rows.push(row);
                        }
                    }
                }
            }
        }
    }
    Ok(())
}

fn row(case: &Case, timed: &Timed, (full_ms, torch_ms): (Option<f64>, Option<f64>)) -> Row {
    let report = &timed.report;
    let calls = (case.layers * case.tokens) as f64;
    let scale = case.layers as f64 / case.held as f64 / 1e9;
    let mut ms = timed.token_ms.clone();
    ms.sort_by(f64::total_cmp);
    let at = |part: f64| ms[((ms.len() - 1) as f64 * part).round() as usize];
    Row {
        context: case.context,
        batch: case.batch,
        policy: case.policy.clone(),
        budget: case.budget,
        hot: case.hot,
        hit_rate: report.hit_rate(),
        prefetch: case.prefetch,
        prefetch_mb: report.bytes_prefetched as f64 / calls * case.layers as f64 / 1e6,
        gap_us: timed.gap_us,
        exact: report.exact_steps as f64 / report.steps as f64,
        p50_ms: at(0.5),
        p99_ms: at(0.99),
        layer_us: at(0.5) * 1e3 / case.layers as f64,
        link_mb: (report.bytes_fetched + report.bytes_in_place) as f64 / calls * case.layers as f64 / 1e6,
        rows_gb: timed.memory.rows_bytes as f64 * scale,
        beside_gb: timed.memory.summary_bytes as f64 * scale,
        of_full: full_ms.map(|full| at(0.5) / full),
        of_sdpa: torch_ms.map(|torch| at(0.5) / torch),
        layers_held: case.held,
    }
}

/// A time of PyTorch's attention, one layer.
#[derive(Debug, Clone, Copy)]
struct Sdpa {
    batch: usize,
    context: usize,
    us: f64,
}

fn read_sdpa(path: &PathBuf) -> anyhow::Result<Vec<Sdpa>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let parse = |line: &str| -> Option<Sdpa> {
        let mut fields = line.split(',');
        let batch = fields.next()?.trim().parse().ok()?;
        let context = fields.next()?.trim().parse().ok()?;
        Some(Sdpa { batch, context, us: fields.next()?.trim().parse().ok()? })
    };
    let lines =
        text.lines().skip(1).map(|line| parse(line).with_context(|| format!("not a row of times: {line}")));
    lines.collect()
}

fn write_csv(path: &PathBuf, rows: &[Row]) -> anyhow::Result<()> {
    let mut text = String::from(
        "context,batch,policy,budget,hot,hit_rate,exact,p50_ms,p99_ms,link_mb,rows_gb,beside_gb,of_full,of_sdpa,layers_held,prefetch,prefetch_mb,gap_us\n",
    );
    let optional = |x: Option<f64>| x.map_or(String::new(), |x| format!("{x:.4}"));
    for r in rows {
        text += &format!(
            "{},{},\"{}\",{},{},{:.4},{:.3},{:.4},{:.4},{:.3},{:.3},{:.3},{},{},{},{},{:.3},{:.1}\n",
            r.context,
            r.batch,
            r.policy,
            r.budget,
            r.hot,
            r.hit_rate,
            r.exact,
            r.p50_ms,
            r.p99_ms,
            r.link_mb,
            r.rows_gb,
            r.beside_gb,
            optional(r.of_full),
            optional(r.of_sdpa),
            r.layers_held,
            r.prefetch,
            r.prefetch_mb,
            r.gap_us
        );
    }
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

#[expect(clippy::print_stdout, reason = "the table is what the command is for")]
fn print_head(device: &Device) {
    println!("{}", device.properties().name);
    println!(
        "| context | batch | policy | budget | hot | hit rate | exact steps | ms a token p50 | p99 | us a layer | link MB | rows GB | beside GB | of full | of SDPA | layers held | prefetch | its MB | gap us |"
    );
    println!("|---:|---:|---|{}", "---:|".repeat(16));
}

/// What a policy with trees did beside its steps.
#[expect(clippy::print_stdout, reason = "the table is what the command is for")]
fn print_trees(timed: &Timed) {
    let Some(tree) = timed.report.tree else { return };
    let (builds, batches) = (tree.builds.max(1) as f64, tree.batches.max(1) as f64);
    println!(
        "    {} trees of the prompt built in {:.2} s by {} threads, {:.0} ms each; sixteen tokens: {:.0} us of a thread and {:.1} pages a kv head, {:.1} us a layer on the device; {} waits; {} searches of {:.0} us, {} stale lists of {} steps",
        tree.builds,
        timed.build_s,
        tree.threads,
        tree.build_us / builds / 1e3,
        tree.batch_us / batches,
        tree.batch_pages as f64 / batches,
        timed.update_us,
        tree.waits,
        tree.searches,
        tree.search_us / tree.searches.max(1) as f64,
        tree.stale_lists,
        timed.report.steps,
    );
}

#[expect(clippy::print_stdout, reason = "the table is what the command is for")]
fn print_row(r: &Row) {
    let optional = |x: Option<f64>| x.map_or("-".to_owned(), |x| format!("{x:.2}"));
    println!(
        "| {} | {} | {} | {} | {} | {:.3} | {:.2} | {:.3} | {:.3} | {:.1} | {:.2} | {:.2} | {:.2} | {} | {} | {} | {} | {:.2} | {:.0} |",
        r.context,
        r.batch,
        r.policy,
        r.budget,
        r.hot,
        r.hit_rate,
        r.exact,
        r.p50_ms,
        r.p99_ms,
        r.layer_us,
        r.link_mb,
        r.rows_gb,
        r.beside_gb,
        optional(r.of_full),
        optional(r.of_sdpa),
        r.layers_held,
        r.prefetch,
        r.prefetch_mb,
        r.gap_us
    );
}
