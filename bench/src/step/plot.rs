//! Time of a token against the context.

use std::path::Path;

use anyhow::Context;
use floe::report::chart::{Axis, Chart, Layout, Point, Series, XyChart};
use floe::report::{Inks, NumberFormat};

use super::Row;

/// One line per batch, policy, budget and hot share.
pub fn write(path: &Path, rows: &[Row]) -> anyhow::Result<()> {
    let mut contexts: Vec<f64> = rows.iter().map(|row| row.context as f64).collect();
    contexts.sort_by(f64::total_cmp);
    contexts.dedup();
    let x = Axis::log2("Context").unit("tokens").format(NumberFormat::Count).ticks_at(contexts)?;
    let mut chart =
        XyChart::new(x, Axis::log10("Attention of a token").unit("ms").format(NumberFormat::Significant(3)));
    let name = |row: &Row| {
        if row.policy == "full" {
            format!("{} x full", row.batch)
        } else {
            format!("{} x {}, {} hot {:.0} %", row.batch, row.policy, row.budget, row.hot * 100.0)
        }
    };
    let mut inks = Inks::new();
    let mut names: Vec<String> = Vec::new();
    for row in rows {
        let line = name(row);
        if names.contains(&line) {
            continue;
        }
        let ink = if row.policy == "full" { inks.reference(&line) } else { inks.own(&line) };
        let points = rows.iter().filter(|r| name(r) == line).map(|r| Point::new(r.context as f64, r.p50_ms));
        chart.push(Series::line(&line, ink, points));
        names.push(line);
    }
    chart.note("Median; all layers of the model.");
    let svg = chart.to_svg("Attention time of a token on the device", Layout::Wide);
    std::fs::write(path, svg).with_context(|| format!("cannot write {}", path.display()))
}
