//! What overlaps with what in a step on the device: the stages of two layers, one behind the other, with device events around each.

use floe_cuda::device::Device;

use super::{DeviceProfilePlan, DeviceProfileRow, Run, device_profile_table};
use crate::error::Result;
use crate::gpu::clock::{Stage, StageSpan};
use crate::report::NumberFormat;
use crate::report::chart::{Axis, ChartError, Kind, Span, Timeline};
use crate::report::ink::Inks;
use crate::report::page::{Figure, Page, Section};
use crate::report::table::{Cell, Column, Row, Table, TableError};
use crate::trace::Trace;

/// Layers that are shown: the second shows what runs beside the first one's prefetch.
const LAYERS: usize = 2;
/// Steps that are timed, the last ones of the trace; the median of each stage is shown.
const TIMED: usize = 31;

/// A stage of a layer of the step, medians over some steps.
#[derive(Debug, Clone, PartialEq)]
pub struct StageRow {
    /// Layer, 0 or 1; both hold the same trace.
    pub layer: usize,
    /// Stage.
    pub stage: Stage,
    /// Microseconds from the start of the step.
    pub start_us: f64,
    /// See `start_us`.
    pub end_us: f64,
}

/// Times the stages of the last steps of a trace, at the first number of slots of the plan, in two layers that follow one another.
///
/// # Errors
/// As [`super::device_profile`].
pub fn step_overlap(trace: &Trace, plan: &DeviceProfilePlan) -> Result<Vec<StageRow>> {
    let device = Device::open(0)?;
    let slots = super::slots_of(plan, plan.slots.first().copied().unwrap_or(1.0), trace);
    let mut run = Run::new(&device, trace, (plan, slots, LAYERS))?;
    let mut out = vec![0.0f32; trace.meta().group() * trace.meta().head_dim];
    let timed = run.decoded.end.saturating_sub(TIMED).max(run.decoded.start);
    let mut steps: Vec<Vec<StageSpan>> = Vec::new();
    for position in run.decoded.clone() {
        run.engine.time_stages(position >= timed);
        run.step(position, &mut out)?;
        if position >= timed {
            steps.push(run.engine.stages()?);
        }
    }
    Ok(medians(&steps))
}

/// Medians of starts and ends, by layer and stage, in the order of the starts.
fn medians(steps: &[Vec<StageSpan>]) -> Vec<StageRow> {
    let median = |values: &mut Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or(0.0)
    };
    let mut rows = Vec::new();
    for layer in 0..LAYERS {
        for stage in Stage::ALL {
            // A stage of two kernels is one stretch of time.
            let of_step = |step: &Vec<StageSpan>| {
                let spans = step.iter().filter(|span| (span.layer, span.stage) == (layer, stage));
                spans.fold(None, |whole: Option<(f64, f64)>, span| {
                    let (start, end) = whole.unwrap_or((span.start_us, span.end_us));
                    Some((start.min(span.start_us), end.max(span.end_us)))
                })
            };
            let (mut starts, mut ends): (Vec<f64>, Vec<f64>) = steps.iter().filter_map(of_step).unzip();
            if !starts.is_empty() {
                let (start_us, end_us) = (median(&mut starts), median(&mut ends));
                rows.push(StageRow { layer, stage, start_us, end_us: end_us.max(start_us) });
            }
        }
    }
    rows.sort_by(|a, b| a.start_us.total_cmp(&b.start_us));
    rows
}

/// The stages as a table.
///
/// # Errors
/// Never for rows of [`step_overlap`].
pub fn overlap_table(rows: &[StageRow]) -> std::result::Result<Table, TableError> {
    let columns = ["stream", "stage"].map(Column::text).into_iter();
    let mut table = Table::new(columns.chain(["layer", "start us", "end us", "us"].map(Column::number)));
    for row in rows {
        let us = |value| Cell::number(value, NumberFormat::Decimals(1));
        table.push(Row::new([
            Cell::text(row.stage.stream()),
            Cell::text(row.stage.name()),
            Cell::number(row.layer as f64, NumberFormat::Count),
            us(row.start_us),
            us(row.end_us),
            us(row.end_us - row.start_us),
        ]))?;
    }
    Ok(table)
}

/// One lane a stream.
fn timeline(rows: &[StageRow]) -> std::result::Result<Timeline, ChartError> {
    let mut inks = Inks::new();
    let shown: Vec<Stage> =
        Stage::ALL.into_iter().filter(|stage| rows.iter().any(|row| row.stage == *stage)).collect();
    let kinds =
        shown.iter().map(|stage| Kind { label: stage.name().into(), ink: inks.category(stage.name()) });
    let mut chart = Timeline::new(Axis::linear("time").format(NumberFormat::Micros), kinds)?;
    for stream in ["step", "pages", "tail", "ahead"] {
        let spans = rows.iter().filter(|row| row.stage.stream() == stream).map(|row| Span {
            start: row.start_us,
            end: row.end_us,
            kind: shown.iter().position(|stage| *stage == row.stage).unwrap_or(0),
            label: format!("{} L{}", row.stage.name(), row.layer),
        });
        let spans: Vec<Span> = spans.collect();
        if !spans.is_empty() {
            chart.lane(stream, spans)?;
        }
    }
    Ok(chart)
}

/// A self-contained page: times and bytes by slots, and the overlap of the stages.
///
/// # Errors
/// Never for rows of [`super::device_profile`] and [`step_overlap`].
pub fn device_profile_html(
    rows: &[DeviceProfileRow],
    stages: &[StageRow],
    command: &str,
) -> std::result::Result<String, TableError> {
    let device = rows.first().map_or("", |row| row.device.as_str());
    let caption = "One lane a stream. Medians over the last steps of the first trace, in two layers that hold it. Events around \
                   each kernel keep it from starting while its predecessor ends, which a step otherwise does.";
    let section = Section::new("What overlaps with what in a step");
    let section = match timeline(stages) {
        Ok(chart) => section.figure(Figure::new("Stages by stream", chart).caption(caption)),
        Err(reason) => section.prose(format!("No chart: {reason}.")),
    };
    Ok(Page::new("Hot tier on the device: measured times and bytes")
        .lead("A step of one layer and kv head, with its rows in a limited number of slots of device memory and all others in host memory.")
        .fact("command", format!("`{command}`"))
        .fact("device", device)
        .fact("version", env!("CARGO_PKG_VERSION"))
        .section(section.table("Stages, microseconds from the start of the step", overlap_table(stages)?))
        .section(Section::new("By slots").table("Times and bytes", device_profile_table(rows)?))
        .to_html())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_of_steps_become_medians_a_table_and_a_page() {
        let span = |layer, stage, start_us: f64, end_us: f64| StageSpan { layer, stage, start_us, end_us };
        let step = |late: f64| {
            vec![
                span(0, Stage::Append, 0.0, 2.0),
                span(0, Stage::Tail, 4.0 + late, 9.0),
                span(1, Stage::Ahead, 10.0, 12.0),
                span(1, Stage::Ahead, 13.0, 15.0 + late),
            ]
        };
        let rows = medians(&[step(0.0), step(1.0), step(2.0)]);
        let of = |stage| rows.iter().find(|row| row.stage == stage).map(|row| (row.start_us, row.end_us));
        assert_eq!(of(Stage::Tail), Some((5.0, 9.0)));
        assert_eq!(of(Stage::Ahead), Some((10.0, 16.0)));
        assert_eq!(of(Stage::Attend), None);
        let text = overlap_table(&rows).unwrap().to_text();
        assert!(text.contains("prefetch") && text.contains("tail"), "{text}");
        let html = device_profile_html(&[], &rows, "profile").unwrap();
        assert!(html.contains("<svg") && html.contains("prefetch"));
    }
}
