//! Replays as tables and as a page.

use super::reuse_render::{reuse_section, reuse_table};
use super::summary::{ReplayRow, average, summarise};
use super::{Run, TraceReplay};
use crate::report::chart::{Axis, Point, Series, XyChart};
use crate::report::page::{Figure, Page, Section};
use crate::report::table::{Cell, Column, Row, Table};
use crate::report::{Inks, NumberFormat};

/// Steps that one point of the error-by-position plot averages: enough to see a trend through the noise of single steps.
const POSITION_POINTS: usize = 48;

/// One captioned table per trace and, for several traces, one of their average.
#[must_use]
pub fn tables(replays: &[TraceReplay]) -> Vec<(String, Table)> {
    let mut inks = policy_inks(replays);
    let mut tables: Vec<(String, Table)> =
        replays.iter().map(|r| (r.trace.clone(), table(&summarise(r), &mut inks))).collect();
    if replays.len() > 1 {
        let rows: Vec<ReplayRow> = replays.iter().flat_map(summarise).collect();
        tables.push((format!("average of {} traces", replays.len()), table(&average(&rows), &mut inks)));
    }
    tables.extend(reuse_table(replays, &mut inks));
    tables
}

/// Policy by budget, a group of columns per segment.
fn table(rows: &[ReplayRow], inks: &mut Inks) -> Table {
    let mut segments: Vec<&str> = Vec::new();
    for row in rows {
        if !segments.contains(&row.segment.as_str()) {
            segments.push(&row.segment);
        }
    }
    let mut columns = vec![Column::text("policy"), Column::number("budget")];
    for segment in &segments {
        columns.extend(["error", "p95", "kept"].map(|label| Column::number(label).group(*segment)));
    }
    columns.extend([Column::number("tokens"), Column::number("read"), Column::number("index")]);
    let mut table = Table::new(columns);
    let mut seen: Vec<(&str, usize)> = Vec::new();
    for first in rows {
        let key = (first.policy.as_str(), first.budget);
        if seen.contains(&key) {
            continue;
        }
        let of_policy = || rows.iter().filter(|r| r.policy == key.0);
        let budget = if heeds_budget(of_policy()) {
            seen.push(key);
            Cell::number(key.1 as f64, NumberFormat::Plain)
        } else {
            seen.extend(of_policy().map(|r| (key.0, r.budget)));
            Cell::text("any")
        };
        let mut cells = vec![Cell::text(key.0).ink(ink(inks, key.0)), budget];
        let of_key: Vec<&ReplayRow> = rows.iter().filter(|r| (r.policy.as_str(), r.budget) == key).collect();
        for segment in &segments {
            match of_key.iter().find(|r| r.segment == *segment) {
                Some(row) => cells.extend(
                    [row.mean_error, row.p95_error, row.mass_kept]
                        .map(|x| Cell::number(x, NumberFormat::Decimals(3))),
                ),
                None => cells.extend(std::iter::repeat_with(Cell::missing).take(3)),
            }
        }
        let mean = |f: fn(&ReplayRow) -> f64| of_key.iter().map(|r| f(r)).sum::<f64>() / of_key.len() as f64;
        cells.push(Cell::number(mean(|r| r.tokens_read), NumberFormat::Decimals(0)));
        cells.push(Cell::number(mean(|r| r.bytes_read), NumberFormat::Bytes));
        cells.push(Cell::number(mean(|r| r.index_share), NumberFormat::Percent(1)));
        let row = Row::new(cells);
        table.push_checked(if is_own(key.0) { row.emphasised() } else { row });
    }
    table
}

/// Whether the rows of one policy differ from budget to budget.
fn heeds_budget<'a>(rows: impl Iterator<Item = &'a ReplayRow>) -> bool {
    let mut firsts: Vec<&ReplayRow> = Vec::new();
    let measured = |r: &ReplayRow| (r.mean_error, r.mass_kept, r.tokens_read, r.bytes_read);
    for row in rows {
        match firsts.iter().find(|first| (&first.trace, &first.segment) == (&row.trace, &row.segment)) {
            Some(first) if measured(first) != measured(row) => return true,
            Some(_) => {}
            None => firsts.push(row),
        }
    }
    firsts.is_empty()
}

/// A self-contained page: tables, error and mass against budget, error by position.
#[must_use]
pub fn html(replays: &[TraceReplay], command: &str) -> String {
    let mut inks = policy_inks(replays);
    let mut page = Page::new("Sparse attention against full attention")
        .lead(
            "Each policy attends at most `budget` tokens exactly per kv head and step; error is `|o - o_full| / |o_full|` \
             of the attention output, per query head, against attention over every token.",
        )
        .fact("command", format!("`{command}`"))
        .fact("version", env!("CARGO_PKG_VERSION"));
    for replay in replays {
        let rows = summarise(replay);
        page = page.section(section(&replay.trace, &rows, &mut inks).figures(positions(replay, &mut inks)));
    }
    if replays.len() > 1 {
        let rows: Vec<ReplayRow> = replays.iter().flat_map(summarise).collect();
        let heading = format!("Average of {} traces", replays.len());
        page = page.section(section(&heading, &average(&rows), &mut inks));
    }
    if let Some(section) = reuse_section(replays, &mut inks) {
        page = page.section(section);
    }
    page.to_html()
}

fn section(heading: &str, rows: &[ReplayRow], inks: &mut Inks) -> Section {
    let mut segments: Vec<&str> = rows.iter().map(|r| r.segment.as_str()).collect();
    segments.dedup();
    let mut names: Vec<&str> = Vec::new();
    for segment in segments {
        if !names.contains(&segment) {
            names.push(segment);
        }
    }
    let mut section = Section::new(heading);
    for segment in names {
        let of_segment: Vec<&ReplayRow> = rows.iter().filter(|r| r.segment == segment).collect();
        let error = curves(&of_segment, inks, error_axis(), |r| {
            (r.policy != "full").then_some((r.mean_error, r.p95_error))
        });
        let mass =
            curves(&of_segment, inks, Axis::linear("attention mass kept"), |r| Some((r.mass_kept, f64::NAN)));
        section = section.figures([
            Figure::new(format!("Error against budget, segment {segment}"), error)
                .caption("Lower is better; the tooltip of a point has its 95th percentile."),
            Figure::new(format!("Mass on exactly attended tokens, segment {segment}"), mass)
                .caption("What a policy leaves out it drops or, with a tail, estimates."),
            Figure::new(format!("Error against bytes read, segment {segment}"), bytes_read(&of_segment, inks))
                .caption("Exact keys and values, summaries and codes read in one step of one kv head; a point per budget."),
            Figure::new(format!("Error against bytes kept, segment {segment}"), bytes_kept(&of_segment, inks))
                .caption(format!("What a policy keeps beside the exact keys and values, at {} tokens.", middle_budget(rows))),
        ]);
    }
    section.table(
        "Mean and p95 error, mass kept; tokens and bytes read a step; index bytes beside the exact KV",
        table(rows, inks),
    )
}

/// One line per policy over the budgets; `value` gives the height and a second number for the tooltip.
fn curves(
    rows: &[&ReplayRow],
    inks: &mut Inks,
    y: Axis,
    value: impl Fn(&ReplayRow) -> Option<(f64, f64)>,
) -> XyChart {
    let mut chart = XyChart::new(Axis::log2("budget").unit("tokens").format(NumberFormat::Plain), y);
    for policy in policies(rows) {
        let points: Vec<Point> = rows
            .iter()
            .filter(|r| r.policy == policy)
            .filter_map(|r| value(r).map(|(y, p95)| (r, y, p95)))
            .map(|(r, y, p95)| {
                let point = Point::new(r.budget as f64, y);
                if p95.is_nan() { point } else { point.tip(format!("p95 {p95:.3}")) }
            })
            .collect();
        if !points.is_empty() {
            chart.push(Series::line(policy, ink(inks, policy), points));
        }
    }
    chart
}

/// Error over the bytes that a step reads, a line per policy through its budgets.
fn bytes_read(rows: &[&ReplayRow], inks: &mut Inks) -> XyChart {
    let x = Axis::log10("bytes read a step").format(NumberFormat::Bytes);
    let mut chart = XyChart::new(x, error_axis());
    for policy in policies(rows).into_iter().filter(|p| *p != "full") {
        let of_policy = rows.iter().filter(|r| r.policy == policy);
        let points =
            of_policy.map(|r| Point::new(r.bytes_read, r.mean_error).tip(format!("budget {}", r.budget)));
        chart.push(Series::line(policy, ink(inks, policy), points));
    }
    chart
}

/// Error over the bytes kept beside the exact keys and values, a point per policy at the middle budget.
fn bytes_kept(rows: &[&ReplayRow], inks: &mut Inks) -> XyChart {
    let x = Axis::linear("bytes kept beside the exact KV").format(NumberFormat::Percent(0));
    let mut chart = XyChart::new(x, error_axis());
    let budget = middle_budget(rows.iter().copied());
    for row in rows.iter().filter(|r| r.budget == budget && r.policy != "full") {
        let point = Point::new(row.index_share, row.mean_error).label(&row.policy);
        chart.push(Series::scatter(&row.policy, ink(inks, &row.policy), [point]));
    }
    chart.with_legend()
}

pub(super) fn error_axis() -> Axis {
    Axis::log10("mean relative error").format(NumberFormat::Significant(3))
}

/// Policies in the order of the rows.
fn policies<'a>(rows: &[&'a ReplayRow]) -> Vec<&'a str> {
    let mut policies: Vec<&str> = rows.iter().map(|r| r.policy.as_str()).collect();
    policies.dedup();
    policies
}

/// The budget in the middle of those replayed.
fn middle_budget<'a>(rows: impl IntoIterator<Item = &'a ReplayRow>) -> usize {
    let mut budgets: Vec<usize> = rows.into_iter().map(|r| r.budget).collect();
    budgets.sort_unstable();
    budgets.dedup();
    budgets.get(budgets.len() / 2).copied().unwrap_or(0)
}

/// Error by position at the middle budget, averaged over stretches of steps.
fn positions(replay: &TraceReplay, inks: &mut Inks) -> Vec<Figure> {
    let mut budgets: Vec<usize> = replay.runs.iter().map(|r| r.budget).collect();
    budgets.sort_unstable();
    budgets.dedup();
    let Some(&budget) = budgets.get(budgets.len() / 2) else { return Vec::new() };
    let stretch = replay.steps.len().div_ceil(POSITION_POINTS).max(1);
    let mut chart =
        XyChart::new(Axis::linear("position").unit("tokens").format(NumberFormat::Count), error_axis());
    let at_budget: Vec<&Run> =
        replay.runs.iter().filter(|r| r.budget == budget && r.policy != "full").collect();
    for run in at_budget {
        let group = run.errors.len() / replay.steps.len();
        let points =
            replay.steps.chunks(stretch).zip(run.errors.chunks(stretch * group)).map(|(steps, errors)| {
                let mean = errors.iter().map(|e| f64::from(*e)).sum::<f64>() / errors.len() as f64;
                Point::new(steps[steps.len() / 2].position as f64, mean)
            });
        chart.push(Series::line(&run.policy, ink(inks, &run.policy), points));
    }
    let figure = Figure::new(format!("Error by position at {budget} tokens"), chart)
        .caption(format!("Each point averages {stretch} consecutive steps and all query heads."));
    vec![figure]
}

fn is_own(policy: &str) -> bool {
    let name = policy.split(':').next().unwrap_or_default();
    matches!(name, "floe" | "reuse")
}

pub(super) fn ink(inks: &mut Inks, policy: &str) -> crate::report::Ink {
    match policy {
        "full" | "oracle" => inks.reference(policy),
        own if is_own(own) => inks.own(own),
        rival => inks.rival(rival),
    }
}

/// Colours in the order of the policies, so that tables and charts agree.
fn policy_inks(replays: &[TraceReplay]) -> Inks {
    let mut inks = Inks::new();
    for run in replays.iter().flat_map(|r| &r.runs) {
        ink(&mut inks, &run.policy);
    }
    inks
}
