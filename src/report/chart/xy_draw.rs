//! Drawing of [`XyChart`]: fits the axes, then grid, bands, lines, markers, names and notes, in this order.

use super::frame::{self, Key, KeyForm, Plot, XGrid, polyline};
use super::label::{FONT_SIZE, LINE_HEIGHT, Rect, name_width, spread};
use super::xy::{Join, Naming, Point, Series, XyChart};
use super::{Drawing, Layout};
use crate::report::chart::axis::FittedAxis;
use crate::report::markup::Markup;

/// More points than this are a curve: markers would merge into a band.
const MARKERS_MAX: usize = 24;
/// Longer series carry tooltips at evenly spaced points only, to keep pages small.
const TIPS_MAX: usize = 128;
/// Distance between the plot and the names at its right, room for the leaders.
const LEADER_WIDTH: f64 = 26.0;

struct Fitted<'a> {
    chart: &'a XyChart,
    plot: Plot,
    x: FittedAxis,
    y: FittedAxis,
}

impl Fitted<'_> {
    fn at(&self, x: f64, y: f64) -> (f64, f64) {
        (self.plot.x(&self.x, x), self.plot.y(&self.y, y))
    }

    fn drawn<'s>(&self, series: &'s Series) -> Vec<(&'s Point, (f64, f64))> {
        let drawable = series.points.iter().filter(|p| self.chart.is_drawable(p.x, p.y));
        drawable.map(|p| (p, self.at(p.x, p.y))).collect()
    }
}

pub(super) fn draw(chart: &XyChart, layout: Layout) -> Drawing {
    let mut m = Markup::new();
    let top = frame::y_title(&mut m, &chart.y, layout);
    let (x, y) = fit(chart, layout);
    let direct = names_fit(chart, layout);
    let left = frame::tick_label_width(&y) + 10.0;
    let right = match direct {
        Some(width) => LEADER_WIDTH + width,
        None => 14.0,
    };
    let plot = Plot { left, top, width: layout.width() - left - right, height: layout.plot_height() };
    let fitted = Fitted { chart, plot, x, y };

    frame::y_grid(&mut m, &plot, &fitted.y);
    let scatter = chart.series.iter().any(|s| s.points.iter().any(|p| p.label.is_some()));
    frame::x_grid(&mut m, &plot, &fitted.x, if scatter { XGrid::Lines } else { XGrid::Ticks });
    frame::x_title(&mut m, &plot, &chart.x);

    let mut order: Vec<&Series> = chart.series.iter().collect();
    order.sort_by_key(|series| series.ink.layer());
    for series in &order {
        draw_band(&mut m, &fitted, series);
    }
    for series in &order {
        draw_series(&mut m, &fitted, series);
    }
    if order.iter().all(|series| fitted.drawn(series).is_empty()) {
        let at = (plot.left + plot.width / 2.0, plot.top + plot.height / 2.0);
        frame::text(&mut m, "note middle", at, "Nothing to draw.");
    }
    draw_point_labels(&mut m, &fitted, &order);

    let mut height = plot.bottom() + frame::X_AXIS_HEIGHT;
    if direct.is_some() {
        draw_names(&mut m, &fitted);
    } else {
        height += 12.0;
        height += frame::legend(&mut m, &legend_keys(chart), height, layout);
    }
    let notes = chart.all_notes();
    if !notes.is_empty() {
        height += 8.0;
        height += frame::notes(&mut m, &notes, height, layout);
    }
    Drawing { markup: m.finish(), height: height + 4.0 }
}

fn fit(chart: &XyChart, layout: Layout) -> (FittedAxis, FittedAxis) {
    let points = || {
        chart.series.iter().flat_map(|series| {
            let points = series.points.iter().map(|p| (p.x, p.y));
            let band = series.band.iter().flat_map(|(_, band)| band);
            let band = band.flat_map(|b| [(b.x, b.low), (b.x, b.high)]);
            points.chain(band).filter(|&(x, y)| chart.is_drawable(x, y))
        })
    };
    let num_x = if layout == Layout::Narrow { 5 } else { 8 };
    (chart.x.fit(points().map(|p| p.0), num_x), chart.y.fit(points().map(|p| p.1), 6))
}

/// Width of the longest name when all fit at the line ends, or nothing when a legend serves better. A series that is not
/// drawn at all has no end to be named at: its note names it.
fn names_fit(chart: &XyChart, layout: Layout) -> Option<f64> {
    let visible = || {
        let drawn = |s: &&Series| s.points.iter().any(|p| chart.is_drawable(p.x, p.y));
        chart.series.iter().filter(drawn)
    };
    let widest = visible().map(|s| name_width(s.ink, &s.label)).fold(0.0, f64::max);
    let lines = visible().count() > 0 && visible().all(|s| s.join == Join::Line);
    let tall = visible().count() as f64 * LINE_HEIGHT <= layout.plot_height();
    let wide = layout != Layout::Narrow && widest <= layout.width() * 0.3;
    (chart.naming == Naming::Auto && lines && tall && wide).then_some(widest)
}

fn legend_keys(chart: &XyChart) -> Vec<Key<'_>> {
    let form = |join| if join == Join::Line { KeyForm::Line } else { KeyForm::Marker };
    chart.series.iter().map(|s| Key { ink: s.ink, label: &s.label, form: form(s.join) }).collect()
}

fn draw_band(m: &mut Markup, fitted: &Fitted<'_>, series: &Series) {
    let Some((meaning, band)) = &series.band else { return };
    let drawable =
        |b: &&super::BandPoint| fitted.chart.is_drawable(b.x, b.low) && fitted.chart.is_drawable(b.x, b.high);
    let band: Vec<_> = band.iter().filter(drawable).collect();
    if band.len() < 2 {
        return;
    }
    let upper = band.iter().map(|b| fitted.at(b.x, b.high));
    let lower = band.iter().rev().map(|b| fitted.at(b.x, b.low));
    m.line().open("g").attr("class", &series.ink.class()).open("path").attr("class", "band");
    m.attr("d", &(polyline(upper.chain(lower)) + "Z"));
    m.leaf("title", &format!("{}: {meaning}", series.label)).close().close();
}

fn draw_series(m: &mut Markup, fitted: &Fitted<'_>, series: &Series) {
    let drawn = fitted.drawn(series);
    m.line().open("g").attr("class", &format!("series {}", series.ink.class()));
    if series.join == Join::Line && drawn.len() > 1 {
        m.open("path").attr("class", "line").attr("d", &polyline(drawn.iter().map(|(_, at)| *at)));
        m.leaf("title", &series.label).close();
    }
    let stride = drawn.len().div_ceil(TIPS_MAX).max(1);
    let markers = series.join == Join::None || drawn.len() <= MARKERS_MAX;
    for (i, (point, at)) in drawn.iter().enumerate() {
        let tip = i % stride == 0;
        if !tip && !markers {
            continue;
        }
        m.open("g").attr("class", "point");
        if tip {
            m.leaf("title", &tooltip(fitted.chart, series, point));
            m.open("circle").attr("class", "hit").num("cx", at.0).num("cy", at.1).attr("r", "9").empty();
        }
        if markers {
            frame::marker(m, series.ink.shape(), *at);
        }
        m.close();
    }
    m.close();
}

fn tooltip(chart: &XyChart, series: &Series, point: &Point) -> String {
    let mut lines = vec![series.label.clone()];
    lines.extend(point.label.clone());
    lines.push(chart.x.describe(point.x));
    lines.push(chart.y.describe(point.y));
    lines.extend(point.tip.clone());
    lines.join("\n")
}

/// Names at the right, each at the height of its line's end, moved apart where they would touch and then led by a thin line.
fn draw_names(m: &mut Markup, fitted: &Fitted<'_>) {
    let mut ends = Vec::new();
    for series in &fitted.chart.series {
        if let Some((_, at)) = fitted.drawn(series).into_iter().max_by(|a, b| a.1.0.total_cmp(&b.1.0)) {
            ends.push((series, at));
        }
    }
    let wanted: Vec<f64> = ends.iter().map(|(_, at)| at.1).collect();
    let placed = spread(&wanted, LINE_HEIGHT, (fitted.plot.top, fitted.plot.bottom()));
    let x = fitted.plot.right() + LEADER_WIDTH;
    m.line().open("g").attr("class", "names");
    for ((series, end), y) in ends.into_iter().zip(placed) {
        m.open("g").attr("class", &series.ink.class());
        let bend = x - 12.0;
        let leader = [(end.0 + 7.0, end.1), (end.0.max(x - 20.0), end.1), (bend, y), (x - 5.0, y)];
        m.open("path").attr("class", "leader").attr("d", &polyline(leader)).empty();
        frame::text(m, "name", (x, y + FONT_SIZE * 0.35), &series.label);
        m.close();
    }
    m.close();
}

/// Labels of single points where they touch no marker, no line and no earlier label; own series choose first. A label without
/// room is left to the tooltip.
fn draw_point_labels(m: &mut Markup, fitted: &Fitted<'_>, back_to_front: &[&Series]) {
    let plot = &fitted.plot;
    let area =
        Rect { left: plot.left, top: plot.top - 10.0, right: plot.right() + 10.0, bottom: plot.bottom() };
    let mut taken: Vec<Rect> = Vec::new();
    let mut lines: Vec<((f64, f64), (f64, f64))> = Vec::new();
    for series in back_to_front {
        let drawn = fitted.drawn(series);
        for (_, (x, y)) in &drawn {
            taken.push(Rect { left: x - 5.0, top: y - 5.0, right: x + 5.0, bottom: y + 5.0 });
        }
        if series.join == Join::Line {
            lines.extend(drawn.windows(2).map(|pair| (pair[0].1, pair[1].1)));
        }
    }
    for series in back_to_front.iter().rev() {
        for (point, at) in fitted.drawn(series) {
            let Some(label) = &point.label else { continue };
            let free = label_places(at, name_width(series.ink, label)).into_iter().find(|place| {
                place.inside(&area)
                    && !taken.iter().any(|t| t.overlaps(&place.grown(2.0)))
                    && !lines.iter().any(|&(from, to)| place.is_crossed(from, to))
            });
            if let Some(place) = free {
                m.open("g").attr("class", &series.ink.class());
                frame::text(m, "name small", (place.left, place.bottom - FONT_SIZE * 0.15), label);
                m.close();
                taken.push(place);
            }
        }
    }
}

/// Boxes around a point where its label may stand, best first.
fn label_places(at: (f64, f64), width: f64) -> [Rect; 8] {
    let (x, y) = at;
    let centres = [
        (x + 8.0, y - 12.0),
        (x - width - 8.0, y + 12.0),
        (x - width / 2.0, y - 17.0),
        (x - width / 2.0, y + 17.0),
        (x + 10.0, y + 2.0),
        (x - width - 10.0, y - 2.0),
        (x + 8.0, y + 12.0),
        (x - width - 8.0, y - 12.0),
    ];
    let half = FONT_SIZE / 2.0;
    centres.map(|(left, middle)| Rect {
        left,
        top: middle - half,
        right: left + width,
        bottom: middle + half,
    })
}
