//! The parts of a profile's page that run over steps: units and bytes, stall against computing, the simulated clock layer
//! by layer, and measured stages.

use super::render::{Profile, SHOWN_FACTOR, ink};
use super::{AccessLog, SimStep, Simulated, timed_steps};
use crate::report::chart::{Axis, BarChart, ChartError, Kind, Part, Point, Series, Span, Timeline, XyChart};
use crate::report::page::{Figure, Section};
use crate::report::table::{Cell, Column, Row, Table};
use crate::report::{Inks, NumberFormat};
use crate::step::Stage;

/// Points of a plot over steps: enough to see a trend through the noise of single steps.
const STEP_POINTS: usize = 96;

/// Steps whose measured stages are drawn one by one.
const DRAWN_STEPS: usize = 12;

/// Name and value of a line over steps.
type Line = (&'static str, fn(&SimStep) -> f64);

/// Means of `value` over stretches of consecutive steps.
fn over_steps<T>(log: &AccessLog, items: &[T], value: impl Fn(&T) -> f64) -> Vec<Point> {
    let stretch = stretch(log);
    let stretches = log.positions.chunks(stretch).zip(items.chunks(stretch));
    let mean = |items: &[T]| items.iter().map(&value).sum::<f64>() / items.len() as f64;
    stretches.map(|(at, items)| Point::new(at[at.len() / 2] as f64, mean(items))).collect()
}

fn stretch(log: &AccessLog) -> usize {
    log.positions.len().div_ceil(STEP_POINTS).max(1)
}

fn chart(y: Axis) -> XyChart {
    XyChart::new(Axis::linear("position").unit("tokens").format(NumberFormat::Count), y).with_legend()
}

/// Hits and misses, bytes, stall against computing, and every policy's hit rate.
pub(super) fn by_step(profile: &Profile<'_>, inks: &mut Inks) -> Section {
    let (log, shown) = (profile.log, profile.shown());
    let factor = shown.map_or(SHOWN_FACTOR, |c| c.cell.slots_factor);
    let mut rate = chart(Axis::linear("hit rate").format(NumberFormat::Percent(0)));
    let wanted =
        |c: &&Simulated| c.cell.slots_factor == factor && c.cell.prefetch == profile.plan.prefetches[0];
    for cell in profile.cells.iter().filter(wanted) {
        let points = over_steps(log, &cell.steps, SimStep::hit_rate);
        rate.push(Series::line(cell.cell.policy.name(), ink(inks, cell.cell.policy), points));
    }
    let mut figures = Vec::new();
    if let Some(cell) = shown {
        let name = format!(" of {}", cell.cell.policy);
        let mut own = Inks::new();
        let mut lines = |y: Axis, lines: &[Line]| {
            let mut chart = chart(y);
            for (label, value) in lines {
                chart.push(Series::line(*label, own.category(label), over_steps(log, &cell.steps, value)));
            }
            chart
        };
        let units = lines(
            Axis::linear("units a step").format(NumberFormat::Count),
            &[
                ("hits", |s| s.fetched.hits as f64),
                ("misses", |s| (s.fetched.requests - s.fetched.hits) as f64),
                ("fetched ahead", |s| s.fetched.ahead as f64),
            ],
        );
        let bytes = lines(
            Axis::linear("bytes a step").format(NumberFormat::Bytes),
            &[("fetched", |s| s.fetched.bytes as f64)],
        );
        let time = lines(
            Axis::linear("simulated time").format(NumberFormat::Micros),
            &[("computing", |s| s.compute_us), ("stall", |s| s.stall_us)],
        );
        figures = vec![
            Figure::new(format!("Hits and misses{name}"), units)
                .caption("All shards of the profile together; the first step finds empty slots."),
            Figure::new(format!("Fetched bytes{name}"), bytes).caption("Over the link, ahead or on demand."),
            Figure::new(format!("Stall against computing{name}"), time)
                .caption("Sum over the layers of the profile; simulated."),
        ];
    }
    figures.push(Figure::new("Hit rate of every policy", rate).caption("The same steps under each policy."));
    Section::new(format!("A timeline of steps, {factor}x slots"))
        .prose(format!("Each point averages {} consecutive steps.", stretch(log)))
        .figures(figures)
}

/// Some steps on the simulated clock: when each layer waits and works, and when the link is busy.
pub(super) fn on_the_clock(profile: &Profile<'_>, cell: &Simulated) -> Section {
    let steps = timed_steps(profile.log);
    let positions = &profile.log.positions[steps];
    let at = match positions {
        [only] => format!("position {only}"),
        [first, .., last] => format!("positions {first} to {last}"),
        [] => String::new(),
    };
    let heading = format!("Layer by layer on the simulated clock, {at}");
    let section = Section::new(heading).prose(format!(
        "Policy {}, prefetch {}, {}x slots. A layer asks for its units, waits for what is missing, then works; what is fetched \
         ahead moves meanwhile. All times simulated.",
        cell.cell.policy,
        cell.cell.prefetch.name(),
        cell.cell.slots_factor
    ));
    match clock(profile.log, cell) {
        Ok(chart) => section.figure(Figure::new("Waiting, computing, moving", chart).caption(
            "Labels inside the bars are layers of the model; the link moves what all their heads miss. A bar of the lane `steps` adds \
                     up the waits of its layers.",
        )),
        Err(reason) => section.prose(format!("No chart: {reason}.")),
    }
}

fn clock(log: &AccessLog, cell: &Simulated) -> Result<Timeline, ChartError> {
    let mut inks = Inks::new();
    let kinds = ["computing", "stall", "link busy"]
        .map(|label| Kind { label: label.into(), ink: inks.category(label) });
    let mut timeline = Timeline::new(Axis::linear("simulated time").format(NumberFormat::Micros), kinds)?;
    let origin = cell.layers.first().map_or(0.0, |layer| layer.start_us);
    let span = |from: f64, to: f64, kind: usize, label: String| Span {
        start: from - origin,
        end: to - origin,
        kind,
        label,
    };
    let (mut layers, mut link) = (Vec::new(), Vec::new());
    for time in &cell.layers {
        let label = format!("L{}", time.layer);
        let works = time.start_us + time.stall_us;
        if time.stall_us > 0.0 {
            layers.push(span(time.start_us, works, 1, String::new()));
        }
        layers.push(span(works, time.end_us, 0, label.clone()));
        if let Some((from, to)) = time.link_us {
            link.push(span(from, to, 2, label));
        }
    }
    let steps = cell.layers.chunk_by(|a, b| a.step == b.step);
    let steps = steps.map(|step| {
        let (first, last) = (step[0], step[step.len() - 1]);
        let stall: f64 = step.iter().map(|layer| layer.stall_us).sum();
        let label = format!("token {}", log.positions[first.step]);
        let works = first.start_us + stall;
        [span(first.start_us, works, 1, String::new()), span(works, last.end_us, 0, label)]
    });
    let steps: Vec<Span> = steps.flatten().collect();
    if steps.len() < 2 * cell.layers.len() {
        timeline.lane("steps", steps)?;
    }
    timeline.lane("layers", layers)?;
    timeline.lane("link", link)?;
    Ok(timeline)
}

/// Mean over the steps.
pub(super) fn mean_stages(stages_ns: &[[f64; 9]]) -> [f64; 9] {
    let num_steps = stages_ns.len().max(1) as f64;
    std::array::from_fn(|stage| stages_ns.iter().map(|step| step[stage]).sum::<f64>() / num_steps)
}

/// Measured stages: the mean step, some steps one by one, all steps as lines.
pub(super) fn by_stage(log: &AccessLog, stages_ns: &[[f64; 9]]) -> Section {
    let mut inks = Inks::new();
    let mean = mean_stages(stages_ns);
    let parts = Stage::ALL.map(|stage| Part { label: stage.name().into(), ink: inks.category(stage.name()) });
    let mut table =
        Table::new([Column::text("stage"), Column::number("measured time"), Column::number("share")]);
    let total: f64 = mean.iter().sum();
    for (stage, ns) in Stage::ALL.iter().zip(&mean) {
        table.push_checked(Row::new([
            Cell::text(stage.name()),
            Cell::number(ns / 1e3, NumberFormat::Micros),
            Cell::number(ns / total.max(f64::MIN_POSITIVE), NumberFormat::Percent(1)),
        ]));
    }
    let section = Section::new("Where a step's time goes")
        .prose("Measured on the machine that made this profile, per step and kv head, CPU backend, shards side by side.");
    let axis = Axis::linear("measured time").format(NumberFormat::Micros);
    let first = (stages_ns.len() - stages_ns.len().min(DRAWN_STEPS)) / 2;
    let chart = BarChart::new(axis, parts).and_then(|mut chart| {
        let micros = |step: &[f64]| step.iter().map(|ns| ns / 1e3).collect::<Vec<f64>>();
        chart.push("mean step", &micros(&mean))?;
        for (step, position) in stages_ns.iter().zip(&log.positions).skip(first).take(DRAWN_STEPS) {
            chart.push(format!("token {position}"), &micros(step))?;
        }
        Ok(chart)
    });
    let section = match chart {
        Ok(chart) => section.figure(Figure::new("Stages of a step", chart).caption(
            "The mean over all steps, then consecutive steps from the middle, mean over the kv heads.",
        )),
        Err(reason) => section.prose(format!("No chart: {reason}.")),
    };
    section.table("Stages of the mean step", table)
}
