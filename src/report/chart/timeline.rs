//! Lanes of coloured spans over time: what overlapped with what during a step.

use super::axis::{Axis, Scale};
use super::frame::{self, Key, KeyForm, Plot, XGrid};
use super::label::{FONT_SIZE, LINE_HEIGHT, shorten, text_width};
use super::{Chart, ChartError, Draw, Drawing, Layout};
use crate::report::ink::Ink;
use crate::report::markup::Markup;
use crate::report::table::{Cell, Column, Row, Table};

const LANE_HEIGHT: f64 = 26.0;
const LANE_GAP: f64 = 8.0;
/// Shorter spans are drawn this wide, or they would vanish.
const SPAN_WIDTH_MIN: f64 = 1.5;

/// What a span was busy with.
#[derive(Clone, Debug)]
pub struct Kind {
    /// Name in the legend.
    pub label: String,
    /// Colour, usually [`Ink::Category`].
    pub ink: Ink,
}

/// A stretch of time `[start, end)` in the unit of the axis.
#[derive(Clone, Debug)]
pub struct Span {
    /// First moment.
    pub start: f64,
    /// Moment after the last.
    pub end: f64,
    /// Index into the kinds of the timeline.
    pub kind: usize,
    /// Words inside the span where they fit; always in its tooltip.
    pub label: String,
}

/// Lanes of spans under one time axis.
#[derive(Clone, Debug)]
pub struct Timeline {
    axis: Axis,
    kinds: Vec<Kind>,
    lanes: Vec<(String, Vec<Span>)>,
}

impl Timeline {
    /// A timeline without lanes.
    ///
    /// # Errors
    /// [`ChartError::Scale`] when the axis is logarithmic.
    pub fn new(axis: Axis, kinds: impl IntoIterator<Item = Kind>) -> Result<Self, ChartError> {
        if axis.scale() != Scale::Linear {
            return Err(ChartError::Scale { what: "a timeline" });
        }
        Ok(Self { axis, kinds: kinds.into_iter().collect(), lanes: Vec::new() })
    }

    /// Adds a lane with its spans, later spans above earlier ones.
    ///
    /// # Errors
    /// [`ChartError::Value`] when a span is not finite or ends before it starts, [`ChartError::Kind`] when its kind does
    /// not exist.
    pub fn lane(
        &mut self,
        label: impl Into<String>,
        spans: impl IntoIterator<Item = Span>,
    ) -> Result<(), ChartError> {
        let label = label.into();
        let spans: Vec<Span> = spans.into_iter().collect();
        for (i, span) in spans.iter().enumerate() {
            let what = format!("lane {label:?}, span {i}");
            if span.kind >= self.kinds.len() {
                return Err(ChartError::Kind { what, kind: span.kind, num_kinds: self.kinds.len() });
            }
            for value in [span.start, span.end, span.end - span.start] {
                if !value.is_finite() || value.abs() > 1e150 {
                    return Err(ChartError::Value { what, value });
                }
            }
            if span.end < span.start {
                return Err(ChartError::Value {
                    what: format!("{what}, duration"),
                    value: span.end - span.start,
                });
            }
        }
        self.lanes.push((label, spans));
        Ok(())
    }
}

impl Draw for Timeline {
    fn draw(&self, layout: Layout) -> Drawing {
        let mut m = Markup::new();
        let keys: Vec<Key<'_>> =
            self.kinds.iter().map(|k| Key { ink: k.ink, label: &k.label, form: KeyForm::Patch }).collect();
        let top = frame::legend(&mut m, &keys, 0.0, layout) + 8.0;

        let above = layout == Layout::Narrow;
        let widest = self.lanes.iter().map(|(label, _)| text_width(label)).fold(0.0, f64::max);
        let left = if above { 0.0 } else { widest.min(layout.width() * 0.3) + 12.0 };
        let pitch = LANE_HEIGHT + LANE_GAP + if above { LINE_HEIGHT } else { 0.0 };
        let height = (self.lanes.len() as f64 * pitch).max(LANE_HEIGHT);
        let plot = Plot { left, top, width: layout.width() - left - 20.0, height };
        let ends = self.lanes.iter().flat_map(|(_, spans)| spans.iter().flat_map(|s| [s.start, s.end]));
        let x = self.axis.fit(ends, if above { 4 } else { 8 });

        frame::x_grid(&mut m, &plot, &x, XGrid::Lines);
        frame::x_title(&mut m, &plot, &self.axis);
        if self.lanes.is_empty() {
            frame::text(
                &mut m,
                "note middle",
                (plot.left + plot.width / 2.0, top + 16.0),
                "Nothing to draw.",
            );
        }
        for (i, (label, spans)) in self.lanes.iter().enumerate() {
            let bar_top = top + i as f64 * pitch + LANE_GAP / 2.0 + if above { LINE_HEIGHT } else { 0.0 };
            let baseline = bar_top + LANE_HEIGHT / 2.0 + FONT_SIZE * 0.35;
            if above {
                frame::text(&mut m, "lane", (0.0, bar_top - 4.0), &shorten(label, layout.width()));
            } else {
                frame::text(&mut m, "lane end", (left - 12.0, baseline), &shorten(label, left - 12.0));
            }
            for span in spans {
                let kind = &self.kinds[span.kind];
                let (from, to) = (plot.x(&x, span.start), plot.x(&x, span.end));
                let width = (to - from).max(SPAN_WIDTH_MIN);
                m.open("g").attr("class", &kind.ink.class());
                let tip = format!(
                    "{label}: {}\n{}\n{}\nduration: {}",
                    kind.label,
                    span.label,
                    self.axis.describe(span.start),
                    self.axis.number_format().show(span.end - span.start)
                );
                m.leaf("title", &tip);
                m.open("rect").attr("class", "span").num("x", from).num("y", bar_top).num("width", width);
                m.num("height", LANE_HEIGHT).attr("rx", "2").empty();
                if !span.label.is_empty() && text_width(&span.label) + 8.0 <= width {
                    frame::text(&mut m, "inside middle", (from + width / 2.0, baseline), &span.label);
                }
                m.close();
            }
        }
        Drawing { markup: m.finish(), height: plot.bottom() + frame::X_AXIS_HEIGHT + 4.0 }
    }
}

impl Chart for Timeline {
    fn description(&self) -> String {
        let mut text = format!("Timeline over {}.", self.axis.heading());
        for (label, spans) in &self.lanes {
            let busy: f64 = spans.iter().map(|s| s.end - s.start).sum();
            let busy = self.axis.number_format().show(busy);
            text.push_str(&format!(" {label}: {} spans, {busy} in all.", spans.len()));
        }
        text
    }

    fn data(&self) -> Table {
        let mut table = Table::new([
            Column::text("lane"),
            Column::text("kind"),
            Column::text("label"),
            Column::number("start").group(self.axis.heading()),
            Column::number("end").group(self.axis.heading()),
        ]);
        let format = self.axis.number_format();
        for (label, spans) in &self.lanes {
            for span in spans {
                table.push_checked(Row::new([
                    Cell::text(label),
                    Cell::text(&self.kinds[span.kind].label),
                    Cell::text(&span.label),
                    Cell::number(span.start, format),
                    Cell::number(span.end, format),
                ]));
            }
        }
        table
    }
}
