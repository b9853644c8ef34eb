//! What all charts share: the plotting area, grid, axis text, legend and notes.

use super::Layout;
use super::axis::{Axis, FittedAxis};
use super::label::{FONT_SIZE, LINE_HEIGHT, name_width, text_width, wrap};
use crate::report::ink::Ink;
use crate::report::markup::{Markup, coordinate};

/// The plotting area in user units.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plot {
    pub(crate) left: f64,
    pub(crate) top: f64,
    pub(crate) width: f64,
    pub(crate) height: f64,
}

impl Plot {
    pub(crate) fn right(&self) -> f64 {
        self.left + self.width
    }

    pub(crate) fn bottom(&self) -> f64 {
        self.top + self.height
    }

    pub(crate) fn x(&self, axis: &FittedAxis, value: f64) -> f64 {
        self.left + axis.place(value) * self.width
    }

    pub(crate) fn y(&self, axis: &FittedAxis, value: f64) -> f64 {
        self.bottom() - axis.place(value) * self.height
    }
}

/// Text at `(x, baseline y)` with classes.
pub(crate) fn text(m: &mut Markup, class: &str, at: (f64, f64), content: &str) {
    m.open("text").attr("class", class).num("x", at.0).num("y", at.1).text(content).close();
}

fn line(m: &mut Markup, class: &str, from: (f64, f64), to: (f64, f64)) {
    m.open("path").attr("class", class);
    let d =
        format!("M{} {}L{} {}", coordinate(from.0), coordinate(from.1), coordinate(to.0), coordinate(to.1));
    m.attr("d", &d).empty();
}

/// Space that the labels of a vertical axis need.
pub(crate) fn tick_label_width(axis: &FittedAxis) -> f64 {
    axis.ticks.iter().map(|tick| text_width(&tick.label)).fold(0.0, f64::max)
}

/// Horizontal grid lines with labels to their left.
pub(crate) fn y_grid(m: &mut Markup, plot: &Plot, axis: &FittedAxis) {
    m.open("g").attr("class", "grid").attr("aria-hidden", "true");
    let mut last_label = f64::INFINITY;
    for tick in &axis.ticks {
        let y = plot.y(axis, tick.at);
        line(m, "rule", (plot.left, y), (plot.right(), y));
        if last_label - y >= FONT_SIZE {
            text(m, "tick end", (plot.left - 8.0, y + FONT_SIZE * 0.35), &tick.label);
            last_label = y;
        }
    }
    m.close();
}

/// Ticks and labels under the plot; `full_height` draws them as grid lines. Labels that would touch are left out.
pub(crate) fn x_grid(m: &mut Markup, plot: &Plot, axis: &FittedAxis, style: XGrid) {
    m.open("g").attr("class", "grid").attr("aria-hidden", "true");
    let mut free_from = f64::NEG_INFINITY;
    for tick in &axis.ticks {
        let x = plot.x(axis, tick.at);
        match style {
            XGrid::Ticks => line(m, "axis", (x, plot.bottom()), (x, plot.bottom() + 5.0)),
            XGrid::Lines => line(m, "rule", (x, plot.top), (x, plot.bottom() + 5.0)),
        }
        let half = text_width(&tick.label) / 2.0;
        if x - half >= free_from {
            text(m, "tick middle", (x, plot.bottom() + 21.0), &tick.label);
            free_from = x + half + 6.0;
        }
    }
    line(m, "axis", (plot.left, plot.bottom()), (plot.right(), plot.bottom()));
    m.close();
}

/// How the ticks of the horizontal axis are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum XGrid {
    Ticks,
    Lines,
}

/// Height of the band under a plot that holds tick labels and the axis title.
pub(crate) const X_AXIS_HEIGHT: f64 = 46.0;

/// The title of the horizontal axis, centred under its tick labels.
pub(crate) fn x_title(m: &mut Markup, plot: &Plot, axis: &Axis) {
    let at = (plot.left + plot.width / 2.0, plot.bottom() + 42.0);
    text(m, "title middle", at, &axis.heading());
}

/// The title of the vertical axis as lines above the plot, and the height they take.
pub(crate) fn y_title(m: &mut Markup, axis: &Axis, layout: Layout) -> f64 {
    let lines = wrap(&axis.heading(), layout.width() - 8.0);
    for (i, content) in lines.iter().enumerate() {
        text(m, "title", (0.0, FONT_SIZE + i as f64 * LINE_HEIGHT), content);
    }
    lines.len() as f64 * LINE_HEIGHT + 12.0
}

/// One entry of a legend.
pub(crate) struct Key<'a> {
    pub(crate) ink: Ink,
    pub(crate) label: &'a str,
    pub(crate) form: KeyForm,
}

/// What stands before the label of a legend entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KeyForm {
    Line,
    Marker,
    Patch,
}

/// Legend rows from `top` down, wrapped to the layout; returns the height they take.
pub(crate) fn legend(m: &mut Markup, keys: &[Key<'_>], top: f64, layout: Layout) -> f64 {
    if keys.is_empty() {
        return 0.0;
    }
    let (mut x, mut y) = (0.0, top);
    let row = LINE_HEIGHT + 5.0;
    m.open("g").attr("class", "legend");
    for key in keys {
        let symbol = if key.form == KeyForm::Line { 34.0 } else { 20.0 };
        let width = symbol + name_width(key.ink, key.label) + 18.0;
        if x > 0.0 && x + width - 18.0 > layout.width() {
            x = 0.0;
            y += row;
        }
        let middle = y + LINE_HEIGHT / 2.0;
        m.open("g").attr("class", &key.ink.class());
        match key.form {
            KeyForm::Line => {
                line(m, "line", (x, middle), (x + 26.0, middle));
                marker(m, key.ink.shape(), (x + 13.0, middle));
            }
            KeyForm::Marker => marker(m, key.ink.shape(), (x + 6.0, middle)),
            KeyForm::Patch => {
                m.open("rect").attr("class", "fill").num("x", x).num("y", middle - 6.0);
                m.num("width", 12.0).num("height", 12.0).attr("rx", "2").empty();
            }
        }
        text(m, "key", (x + symbol, middle + FONT_SIZE * 0.35), key.label);
        m.close();
        x += width;
    }
    m.close();
    y + row - top
}

/// Notes in muted text, wrapped; returns the height they take.
pub(crate) fn notes(m: &mut Markup, notes: &[String], top: f64, layout: Layout) -> f64 {
    let mut y = top;
    for note in notes {
        for content in wrap(note, layout.width()) {
            text(m, "note", (0.0, y + FONT_SIZE), &content);
            y += LINE_HEIGHT;
        }
    }
    y - top
}

/// The marker of a series, about nine units across; shapes differ so that colour is never needed to tell series apart.
pub(crate) fn marker(m: &mut Markup, shape: u8, at: (f64, f64)) {
    let (x, y) = at;
    let outline: &[(f64, f64)] = match shape {
        1 => &[(-3.8, -3.8), (3.8, -3.8), (3.8, 3.8), (-3.8, 3.8)],
        2 => &[(0.0, -5.0), (4.8, 3.6), (-4.8, 3.6)],
        3 => &[(0.0, -5.4), (5.0, 0.0), (0.0, 5.4), (-5.0, 0.0)],
        4 => &[(0.0, 5.0), (4.8, -3.6), (-4.8, -3.6)],
        5 => &[
            (-1.6, -5.0),
            (1.6, -5.0),
            (1.6, -1.6),
            (5.0, -1.6),
            (5.0, 1.6),
            (1.6, 1.6),
            (1.6, 5.0),
            (-1.6, 5.0),
            (-1.6, 1.6),
            (-5.0, 1.6),
            (-5.0, -1.6),
            (-1.6, -1.6),
        ],
        6 => &[(-5.0, -2.4), (5.0, -2.4), (5.0, 2.4), (-5.0, 2.4)],
        _ => {
            m.open("circle").attr("class", "mark").num("cx", x).num("cy", y).attr("r", "4.2").empty();
            return;
        }
    };
    m.open("path")
        .attr("class", "mark")
        .attr("d", &(polyline(outline.iter().map(|p| (x + p.0, y + p.1))) + "Z"));
    m.empty();
}

/// Path data through `points`.
pub(crate) fn polyline(points: impl IntoIterator<Item = (f64, f64)>) -> String {
    let mut d = String::new();
    for (i, (x, y)) in points.into_iter().enumerate() {
        d.push(if i == 0 { 'M' } else { 'L' });
        d.push_str(&coordinate(x));
        d.push(' ');
        d.push_str(&coordinate(y));
    }
    d
}
