//! The table for people and the rows for programs.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::Context;
use serde::Serialize;

use super::Row;
use crate::machine::{self, Bounds};

/// The JSON file.
#[derive(Serialize)]
struct Document<'a> {
    schema: &'static str,
    processor: String,
    bounds: &'a [Bounds],
    rows: &'a [Row],
}

/// Writes `rows` as JSON.
pub fn write_json(path: &Path, bounds: &[Bounds], rows: &[Row]) -> anyhow::Result<()> {
    let file = File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
    let document = Document { schema: "floe-bench-attend/1", processor: machine::processor(), bounds, rows };
    serde_json::to_writer_pretty(BufWriter::new(file), &document)?;
    Ok(())
}

/// Prints an aligned table to standard output.
pub fn print(bounds: &[Bounds], rows: &[Row]) -> anyhow::Result<()> {
    let mut to = std::io::stdout().lock();
    writeln!(to, "{}", machine::processor())?;
    for b in bounds {
        let fma = b.gfma_s.map_or(String::new(), |rate| format!(", {rate:.0} G multiply-adds/s"));
        writeln!(
            to,
            "{} thread(s): copy {:.1} GB/s (read + written), read {:.1} GB/s{fma}",
            b.threads, b.copy_gb_s, b.read_gb_s
        )?;
    }
    writeln!(
        to,
        "\n{:>5} {:>7} {:>5} {:>7} {:>7} {:>7} {:>8} {:>10} {:>19} {:>7} {:>7} {:>6} {:>6} {:>8} {:>8}",
        "dtype",
        "isa",
        "group",
        "context",
        "rows",
        "threads",
        "MB",
        "median us",
        "p10..p90 us",
        "GB/s",
        "best",
        "/copy",
        "/read",
        "compute",
        "error"
    )?;
    for r in rows {
        let spread = format!("{:.1}..{:.1}", r.spread.p10_us, r.spread.p90_us);
        let compute = r.compute_bound_gb_s.map_or("-".to_owned(), |bound| format!("{bound:.1}"));
        writeln!(
            to,
            "{:>5} {:>7} {:>5} {:>7} {:>7} {:>7} {:>8.2} {:>10.1} {:>19} {:>7.1} {:>7.1} {:>5.0}% {:>5.0}% {:>8} {:>8.0e}",
            r.dtype,
            r.isa,
            r.group,
            r.context,
            r.num_rows,
            r.threads,
            r.bytes as f64 / 1e6,
            r.spread.median_us,
            spread,
            r.gb_s,
            r.best_gb_s,
            r.copy_share * 100.0,
            r.read_share * 100.0,
            compute,
            r.error
        )?;
    }
    writeln!(to, "\ncompute: GB/s at which the multiply-adds alone would take the whole time")?;
    Ok(())
}
