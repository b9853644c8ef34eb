//! Time against the number of tokens, and kept mass against time.

use std::path::Path;

use anyhow::Context;
use floe::report::chart::{Axis, Chart, Layout, Point, Series, XyChart};
use floe::report::{Ink, Inks, NumberFormat};

use super::Row;
use super::cases::Family;

/// Writes both plots: `path`, and `STEM-mass.svg` beside it.
pub fn write(path: &Path, rows: &[Row]) -> anyhow::Result<()> {
    let save = |path: &Path, svg: String| {
        std::fs::write(path, svg).with_context(|| format!("cannot write {}", path.display()))
    };
    save(path, time_by_size(rows)?.to_svg("Search time of one query group", Layout::Wide))?;
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    save(
        &path.with_file_name(format!("{stem}-mass.svg")),
        mass_by_time(rows).to_svg("Attention mass that a search finds", Layout::Wide),
    )
}

fn ink(inks: &mut Inks, family: Family, name: &str) -> Ink {
    match family {
        Family::Dci => inks.own(name),
        Family::Scan => inks.reference(name),
        Family::Flat | Family::PageMean | Family::Hnsw | Family::Icecache => inks.rival(name),
    }
}

/// One line per search of the first shards of several sizes: all rivals, and the tree at a quarter and all of its super-nodes.
fn time_by_size(rows: &[Row]) -> anyhow::Result<XyChart> {
    // The trace itself comes first and has one size.
    let keys = rows.iter().map(|r| &r.data).find(|d| *d == "tiled" || *d == "synthetic");
    let keys = keys.context("no shard to plot")?;
    let shown: Vec<&Row> = rows
        .iter()
        .filter(|r| &r.data == keys && r.op == "search")
        .filter(|r| r.sketch == "off" || r.sketch == "k2v1" && r.family == Family::Dci)
        .filter(|r| r.family != Family::Dci || r.open == 1.0 || r.open == 0.25)
        .filter(|r| r.family != Family::Hnsw || r.open == 0.25)
        .collect();
    let mut sizes: Vec<f64> = shown.iter().map(|r| r.n as f64).collect();
    sizes.sort_by(f64::total_cmp);
    sizes.dedup();
    let x = Axis::log2("Tokens").format(NumberFormat::Count).ticks_at(sizes)?;
    let mut chart =
        XyChart::new(x, Axis::log10("Time of a search").unit("us").format(NumberFormat::Significant(3)));
    let mut inks = Inks::new();
    let mut names: Vec<&str> = Vec::new();
    for row in &shown {
        if names.contains(&row.index.as_str()) {
            continue;
        }
        names.push(&row.index);
        let points = shown.iter().filter(|r| r.index == row.index).map(|r| Point::new(r.n as f64, r.us));
        chart.push(Series::line(&row.index, ink(&mut inks, row.family, &row.index), points));
    }
    chart.note(format!("{keys} keys."));
    Ok(chart)
}

/// One series per index of the largest shard that has a graph.
fn mass_by_time(rows: &[Row]) -> XyChart {
    let n = rows.iter().filter(|r| r.family == Family::Hnsw).map(|r| r.n).max();
    let n = n.or(rows.iter().map(|r| r.n).max()).unwrap_or(0);
    let x = Axis::log10("Time of a search").unit("us").format(NumberFormat::Significant(3));
    let y = Axis::linear("Attention mass found").format(NumberFormat::Decimals(3));
    let mut chart = XyChart::new(x, y).with_legend();
    let mut inks = Inks::new();
    let data = rows.iter().find(|r| r.n == n).map_or("", |r| &r.data);
    let shown: Vec<&Row> = rows.iter().filter(|r| r.n == n && r.data == data && r.op == "search").collect();
    let stem = |r: &Row| r.index.split([',']).next().unwrap_or_default().replace("hnsw:", "hnsw ");
    let name = |r: &Row| if r.family == Family::Hnsw { "hnsw".to_owned() } else { stem(r) };
    let mut names: Vec<String> = Vec::new();
    for row in &shown {
        let series = name(row);
        if names.contains(&series) {
            continue;
        }
        let points = shown.iter().filter(|r| name(r) == series).map(|r| {
            let effort = r.index.rsplit_once([',', ':']).map_or("", |(_, effort)| effort);
            let point = Point::new(r.us, r.kept_mass.unwrap_or(f64::NAN));
            if matches!(r.family, Family::Dci | Family::Hnsw) { point.label(effort) } else { point }
        });
        chart.push(Series::line(&series, ink(&mut inks, row.family, &series), points));
        names.push(series);
    }
    chart.note(format!("{data} keys, {} tokens.", NumberFormat::Count.show(n as f64)));
    chart
}
