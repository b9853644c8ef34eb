//! `floe-bench kernel`: every device kernel against the bandwidth that bounds it.
//!
//! A case is a number of *sets*: launches over different memory, so many that one round over them reads far more than the
//! second-level cache holds. The round is recorded as a graph; the time of a case is the median of its replays, divided by the
//! number of sets. The first set's result is compared with the f64 twin before anything is timed.

mod decode;
mod fetch;
mod rig;
mod sweep;

use std::path::PathBuf;

use anyhow::Context;
use rig::{Bounds, Rig, Row};

/// What to measure.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only cases whose name contains one of these.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Replays of a case.
    #[arg(long, default_value_t = 31)]
    replays: usize,
    /// Number of the device.
    #[arg(long, default_value_t = 0)]
    device: usize,
    /// Also write the rows as JSON to this file.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// Measures and prints.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let rig = Rig::new(args.device, args.replays, args.only.clone())?;
    let bounds = Bounds::measure(&rig)?;
    let mut rows = Vec::new();
    for cases in [decode::run, fetch::run, sweep::run] {
        cases(&rig, &bounds, &mut rows)?;
    }
    rig.device.check_entries()?;
    print(&rig, &bounds, &rows)?;
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&serde_json::json!({
            "device": rig.device.properties().name,
            "bounds": bounds,
            "rows": rows,
        }))?;
        std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

#[expect(clippy::print_stdout, reason = "the table is what the command is for")]
fn print(rig: &Rig, bounds: &Bounds, rows: &[Row]) -> anyhow::Result<()> {
    let device = rig.device.properties();
    println!("{}, {} multiprocessors", device.name, device.multiprocessors);
    println!("copy {:.0} GB/s (read + write), host to device {:.1} GB/s", bounds.copy_gb_s, bounds.link_gb_s);
    println!();
    println!("| kernel | case | us | p10 | p90 | MB | GB/s | share of bound | error |");
    println!("|---|---|---:|---:|---:|---:|---:|---:|---:|");
    for row in rows {
        println!(
            "| {} | {} | {:.1} | {:.1} | {:.1} | {:.2} | {:.0} | {:.0} % | {:.1e} |",
            row.kernel,
            row.case,
            row.spread.median_us,
            row.spread.p10_us,
            row.spread.p90_us,
            row.bytes as f64 / 1e6,
            row.gb_s,
            row.share * 100.0,
            row.error,
        );
    }
    Ok(())
}
