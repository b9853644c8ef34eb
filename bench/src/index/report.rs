//! The tables for people and the rows for programs.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::Context;
use floe::report::NumberFormat;
use floe::report::table::{Cell, Column, Row as Line, Table};
use serde::Serialize;

use super::{Args, Row, ratios};
use crate::machine;

/// The JSON file.
#[derive(Serialize)]
struct Document<'a> {
    schema: &'static str,
    processor: String,
    threads: usize,
    budget: usize,
    rows: &'a [Row],
}

/// Writes `rows` as JSON.
pub fn write_json(path: &Path, rows: &[Row], budget: usize) -> anyhow::Result<()> {
    let file = File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
    let document =
        Document { schema: "floe-bench-index/1", processor: machine::processor(), threads: 1, budget, rows };
    serde_json::to_writer_pretty(BufWriter::new(file), &document)?;
    Ok(())
}

/// All measurements, a section for each shard and operation.
pub fn table(rows: &[Row]) -> anyhow::Result<Table> {
    let numbers = ["us", "p10", "p90", "kept mass", "recall", "bytes a token"].map(Column::number);
    let mut table = Table::new([Column::text("index")].into_iter().chain(numbers));
    let mut last = None;
    let mut sorted: Vec<&Row> = rows.iter().collect();
    let order = ["build", "insert", "search", "tail"];
    // Stable: shards and indexes stay in the order of measurement.
    sorted.sort_by_key(|r| {
        let shard = rows.iter().position(|x| x.data == r.data && x.n == r.n);
        (shard, order.iter().position(|op| *op == r.op))
    });
    for row in sorted {
        let section = (&row.data, row.n, row.op);
        if last != Some(section) {
            let per = if matches!(row.op, "build" | "insert") { "a token" } else { "a query of the group" };
            let n = NumberFormat::Count.show(row.n as f64);
            table.section(format!("{}, {n} tokens, {}, us {per}", row.data, row.op));
            last = Some(section);
        }
        let time = |us: f64| Cell::number(us, NumberFormat::Significant(3));
        let part = |part: Option<f64>| {
            part.map_or_else(Cell::missing, |p| Cell::number(p, NumberFormat::Decimals(3)))
        };
        table.push(Line::new([
            Cell::text(&row.index),
            time(row.us),
            time(row.p10_us),
            time(row.p90_us),
            part(row.kept_mass),
            part(row.recall),
            Cell::number(row.bytes_per_token, NumberFormat::Decimals(1)),
        ]))?;
    }
    Ok(table)
}

/// Prints both tables to standard output.
pub fn print(rows: &[Row], args: &Args) -> anyhow::Result<()> {
    let mut to = std::io::stdout().lock();
    writeln!(to, "{}, one thread, {} tokens a search", machine::processor(), args.budget)?;
    writeln!(to, "{}", table(rows)?.to_text())?;
    writeln!(to, "{}", ratios::table(rows)?.to_text())?;
    let skipped: Vec<String> =
        args.sizes.iter().filter(|&&n| n > args.hnsw_max).map(usize::to_string).collect();
    if !skipped.is_empty() {
        let (at, most) = (skipped.join(", "), args.hnsw_max);
        writeln!(to, "hnsw left out at {at} tokens: more than --hnsw-max {most}")?;
    }
    writeln!(
        to,
        "kept mass, recall: of all built tokens' attention, mean over queries and heads; the scan is exact. \
         Answers were verified: the tree with everything open equals the flat scan of its pages token for token."
    )?;
    Ok(())
}
