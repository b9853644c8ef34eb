//! Reuse in a replay as tables and charts.

use super::TraceReplay;
use super::render::{error_axis, ink};
use super::reuse::{Errors, ReuseRow, Stretch, average_reuse, reuse_rows};
use crate::report::chart::{Axis, Point, Series, XyChart};
use crate::report::page::{Figure, Section};
use crate::report::table::{Cell, Column, Row, Table};
use crate::report::{Inks, NumberFormat};

/// One captioned table of all runs with reuse, averages last; `None` = there are none.
pub(super) fn reuse_table(replays: &[TraceReplay], inks: &mut Inks) -> Option<(String, Table)> {
    let mut rows: Vec<ReuseRow> = replays.iter().flat_map(reuse_rows).collect();
    if rows.is_empty() {
        return None;
    }
    if replays.len() > 1 {
        rows.extend(average_reuse(&rows));
    }
    Some(("decode reuse, all measured steps".into(), table(&rows, inks)))
}

fn table(rows: &[ReuseRow], inks: &mut Inks) -> Table {
    let several = rows.iter().any(|r| r.budget != rows[0].budget);
    let mut columns = vec![Column::text("policy")];
    if several {
        columns.push(Column::number("budget"));
    }
    columns.extend(["match", "reused", "KV read", "all bytes", "cache"].map(Column::number));
    columns.extend(["mean", "p95", "p99"].map(|label| Column::number(label).group("error, all outputs")));
    columns.extend(["mean", "p95", "p99"].map(|label| Column::number(label).group("reused outputs")));
    columns.extend([Column::number("p95").group("second half"), Column::number("lineage")]);
    let mut table = Table::new(columns);
    let mut trace = "";
    for row in rows {
        if row.trace != trace {
            trace = &row.trace;
            table.section(trace);
        }
        let mut cells = vec![Cell::text(&row.policy).ink(ink(inks, &row.policy))];
        if several {
            cells.push(Cell::number(row.budget as f64, NumberFormat::Plain));
        }
        let shares = [row.match_rate, row.reuse_rate, row.kv_share, row.bytes_share, row.cache_share];
        cells.extend(shares.map(|share| Cell::number(share, NumberFormat::Percent(1))));
        let decimals = |x| Cell::number(x, NumberFormat::Decimals(3));
        for Errors { outputs, mean, p95, p99 } in [row.error, row.reused_error] {
            match outputs {
                0 => cells.extend(std::iter::repeat_with(Cell::missing).take(3)),
                _ => cells.extend([mean, p95, p99].map(decimals)),
            }
        }
        let held_out = row.held_out_error;
        cells.push(if held_out.outputs == 0 { Cell::missing() } else { decimals(held_out.p95) });
        cells.push(Cell::number(row.lineage_max as f64, NumberFormat::Plain));
        table.push_checked(Row::new(cells));
    }
    table
}

/// The section of a page: what every policy reads against its error, then the runs with reuse one by one.
pub(super) fn reuse_section(replays: &[TraceReplay], inks: &mut Inks) -> Option<Section> {
    let (caption, all) = reuse_table(replays, inks)?;
    let mut section = Section::new("Decode reuse").prose(
        "An earlier state answers for a part of the context. A match is an earlier step near enough to consider; a reused \
         output has a part from it. Bytes are shares of what Full-KV reads; the second half of the steps is measured with \
         thresholds that the steps before it taught.",
    );
    for replay in replays {
        let figures = [
            Figure::new(format!("Error against bytes, {}", replay.trace), error_over_bytes(replay, inks))
                .caption("All measured steps; a point per budget where it matters. Lower left is better."),
            Figure::new(
                format!("Error by the age of the state, {}", replay.trace),
                stretches(replay, inks, |row| &row.by_lag, Axis::log2("lag").unit("steps")),
            )
            .caption("Reused outputs only; each point stands for lags up to twice its own."),
            Figure::new(
                format!("Error by generated position, {}", replay.trace),
                stretches(replay, inks, |row| &row.by_position, Axis::linear("step")),
            )
            .caption("All outputs: a line that rises drifts."),
        ];
        section = section.figures(figures);
    }
    section = section.table(caption, all);
    if let Some(table) = thresholds(replays) {
        section = section
            .table("Thresholds learnt: largest accepted prediction of the error, by rung and head", table);
    }
    Some(section)
}

/// Mean error over the share of Full-KV's bytes, a line per policy through its budgets.
fn error_over_bytes(replay: &TraceReplay, inks: &mut Inks) -> XyChart {
    let mut chart =
        XyChart::new(Axis::log10("bytes read, of Full-KV").format(NumberFormat::Percent(1)), error_axis());
    let mut names: Vec<&str> = Vec::new();
    for run in &replay.runs {
        if run.policy != "full" && !names.contains(&run.policy.as_str()) {
            names.push(&run.policy);
        }
    }
    let full_tokens: f64 = replay.steps.iter().map(|s| (s.position + 1) as f64).sum();
    let last = replay.steps.last().map_or(1, |s| s.position + 1) as f64;
    for name in names {
        let points = replay.runs.iter().filter(|run| run.policy == name).map(|run| {
            let read =
                (run.kv_bytes_read.iter().sum::<usize>() + run.index_bytes_read.iter().sum::<usize>()) as f64;
            let share = read / (full_tokens * run.kv_bytes as f64 / last);
            let error = run.errors.iter().map(|e| f64::from(*e)).sum::<f64>() / run.errors.len() as f64;
            Point::new(share, error).tip(format!("budget {}", run.budget))
        });
        chart.push(Series::line(name, ink(inks, name), points.collect::<Vec<_>>()));
    }
    chart.with_legend()
}

fn stretches(replay: &TraceReplay, inks: &mut Inks, of: fn(&ReuseRow) -> &Vec<Stretch>, x: Axis) -> XyChart {
    let mut chart = XyChart::new(x.format(NumberFormat::Plain), error_axis());
    let rows = reuse_rows(replay);
    for row in rows.iter().filter(|row| row.budget == rows[0].budget) {
        let points = of(row).iter().map(|s| {
            Point::new(s.first.max(1) as f64, s.error.mean)
                .tip(format!("p95 {:.3}, {} outputs", s.error.p95, s.error.outputs))
        });
        chart.push(Series::line(&row.policy, ink(inks, &row.policy), points.collect::<Vec<_>>()));
    }
    chart.with_legend()
}

fn thresholds(replays: &[TraceReplay]) -> Option<Table> {
    let rows: Vec<ReuseRow> =
        replays.iter().flat_map(reuse_rows).filter(|r| !r.thresholds.is_empty()).collect();
    let heads = rows.iter().map(|r| r.thresholds[0].len()).max()?;
    let mut columns = vec![Column::text("trace"), Column::text("policy"), Column::number("rung")];
    columns.extend((0..heads).map(|head| Column::number(format!("head {head}"))));
    let mut table = Table::new(columns);
    for row in &rows {
        for (rung, of_heads) in row.thresholds.iter().enumerate() {
            let mut cells = vec![
                Cell::text(&row.trace),
                Cell::text(&row.policy),
                Cell::number(rung as f64, NumberFormat::Plain),
            ];
            let cell = |t: Option<&Option<f32>>| match t {
                Some(Some(t)) => Cell::number(f64::from(*t), NumberFormat::Significant(3)),
                Some(None) | None => Cell::missing(),
            };
            cells.extend((0..heads).map(|head| cell(of_heads.get(head))));
            table.push_checked(Row::new(cells));
        }
    }
    Some(table)
}
