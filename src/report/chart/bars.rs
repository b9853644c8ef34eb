//! Stacked horizontal bars: where the time or the bytes of a step go.

use super::axis::{Axis, Scale};
use super::frame::{self, Key, KeyForm, Plot, XGrid};
use super::label::{FONT_SIZE, LINE_HEIGHT, shorten, text_width};
use super::{Chart, ChartError, Draw, Drawing, Layout};
use crate::report::ink::Ink;
use crate::report::markup::Markup;
use crate::report::table::{Cell, Column, Row, Table};

const BAR_HEIGHT: f64 = 24.0;
const BAR_GAP: f64 = 14.0;

/// One part of every bar, for instance a stage.
#[derive(Clone, Debug)]
pub struct Part {
    /// Name in the legend.
    pub label: String,
    /// Colour, usually [`Ink::Category`].
    pub ink: Ink,
}

/// Bars made of the same parts, one bar a row.
#[derive(Clone, Debug)]
pub struct BarChart {
    axis: Axis,
    parts: Vec<Part>,
    bars: Vec<(String, Vec<f64>)>,
}

impl BarChart {
    /// A chart without bars; `axis` gives title, unit and format of the values.
    ///
    /// # Errors
    /// [`ChartError::Scale`] when the axis is logarithmic: lengths could not be added.
    pub fn new(axis: Axis, parts: impl IntoIterator<Item = Part>) -> Result<Self, ChartError> {
        if axis.scale() != Scale::Linear {
            return Err(ChartError::Scale { what: "a stacked bar chart" });
        }
        Ok(Self { axis, parts: parts.into_iter().collect(), bars: Vec::new() })
    }

    /// Adds a bar with one value per part.
    ///
    /// # Errors
    /// [`ChartError::Length`] when the number of values differs from the number of parts, [`ChartError::Value`] when one
    /// is negative or not finite: a stack cannot show it.
    pub fn push(&mut self, label: impl Into<String>, values: &[f64]) -> Result<(), ChartError> {
        let label = label.into();
        if values.len() != self.parts.len() {
            let (expected, found) = (self.parts.len(), values.len());
            return Err(ChartError::Length { what: format!("bar {label:?}"), expected, found });
        }
        for (&value, part) in values.iter().zip(&self.parts) {
            if !(0.0..1e150).contains(&value) {
                return Err(ChartError::Value {
                    what: format!("bar {label:?}, part {:?}", part.label),
                    value,
                });
            }
        }
        self.bars.push((label, values.to_vec()));
        Ok(())
    }
}

impl Draw for BarChart {
    fn draw(&self, layout: Layout) -> Drawing {
        let mut m = Markup::new();
        let keys: Vec<Key<'_>> =
            self.parts.iter().map(|p| Key { ink: p.ink, label: &p.label, form: KeyForm::Patch }).collect();
        let top = frame::legend(&mut m, &keys, 0.0, layout) + 8.0;

        let totals: Vec<f64> = self.bars.iter().map(|(_, values)| values.iter().sum()).collect();
        let total_label = |total: f64| self.axis.number_format().show(total);
        let right = totals.iter().map(|&t| text_width(&total_label(t))).fold(0.0, f64::max) + 14.0;
        // On a phone the names stand above the bars.
        let above = layout == Layout::Narrow;
        let widest = self.bars.iter().map(|(label, _)| text_width(label)).fold(0.0, f64::max);
        let left = if above { 0.0 } else { widest.min(layout.width() * 0.34) + 12.0 };
        let pitch = BAR_HEIGHT + BAR_GAP + if above { LINE_HEIGHT } else { 0.0 };
        let height = (self.bars.len() as f64 * pitch).max(BAR_HEIGHT);
        let plot = Plot { left, top, width: layout.width() - left - right, height };
        let x = self.axis.fit(totals.iter().copied().chain([0.0]), if above { 4 } else { 7 });

        frame::x_grid(&mut m, &plot, &x, XGrid::Lines);
        frame::x_title(&mut m, &plot, &self.axis);
        if self.bars.is_empty() {
            frame::text(
                &mut m,
                "note middle",
                (plot.left + plot.width / 2.0, top + 16.0),
                "Nothing to draw.",
            );
        }
        for (i, ((label, values), total)) in self.bars.iter().zip(totals).enumerate() {
            let row_top = top + i as f64 * pitch;
            let bar_top = row_top + if above { LINE_HEIGHT + BAR_GAP / 2.0 - 2.0 } else { BAR_GAP / 2.0 };
            let baseline = bar_top + BAR_HEIGHT / 2.0 + FONT_SIZE * 0.35;
            if above {
                let name = shorten(label, layout.width());
                frame::text(&mut m, "lane", (0.0, bar_top - 5.0), &name);
            } else {
                frame::text(&mut m, "lane end", (left - 12.0, baseline), &shorten(label, left - 12.0));
            }
            let mut sum = 0.0;
            for (value, part) in values.iter().zip(&self.parts) {
                let (from, to) = (plot.x(&x, sum), plot.x(&x, sum + value));
                sum += value;
                if *value <= 0.0 {
                    continue;
                }
                m.open("rect").attr("class", &format!("span {}", part.ink.class()));
                m.num("x", from).num("y", bar_top).num("width", to - from).num("height", BAR_HEIGHT);
                let share = crate::report::NumberFormat::Percent(1).show(value / total);
                let tip = format!("{label}\n{}: {share}\n{}", part.label, self.axis.describe(*value));
                m.leaf("title", &tip).close();
            }
            frame::text(&mut m, "total", (plot.x(&x, sum) + 7.0, baseline), &total_label(total));
        }
        Drawing { markup: m.finish(), height: plot.bottom() + frame::X_AXIS_HEIGHT + 4.0 }
    }
}

impl Chart for BarChart {
    fn description(&self) -> String {
        let mut text = format!("Stacked bars of {}.", self.axis.heading());
        for (label, values) in &self.bars {
            let total: f64 = values.iter().sum();
            text.push_str(&format!(" {label}: {} in all.", self.axis.number_format().show(total)));
        }
        text
    }

    fn data(&self) -> Table {
        let group = self.axis.heading();
        let columns = self.parts.iter().map(|p| Column::number(&p.label).group(&group));
        let mut table = Table::new([Column::text("bar")].into_iter().chain(columns));
        for (label, values) in &self.bars {
            let cells = values.iter().map(|&v| Cell::number(v, self.axis.number_format()));
            table.push_checked(Row::new([Cell::text(label)].into_iter().chain(cells)));
        }
        table
    }
}
