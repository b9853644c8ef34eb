//! Lines and scatters over two numeric axes: error against budget, hit rate against slots, error against bytes.

use super::axis::{Axis, Drawable};
use super::{Chart, Draw, Drawing, Layout, xy_draw};
use crate::report::ink::Ink;
use crate::report::table::{Cell, Column, Row, Table};

/// A data table with more columns than this is read by row instead.
const COLUMNS_MAX: usize = 12;

/// One measured value.
#[derive(Clone, Debug)]
pub struct Point {
    pub(crate) x: f64,
    pub(crate) y: f64,
    pub(crate) label: Option<String>,
    pub(crate) tip: Option<String>,
}

impl Point {
    /// A point at these values, in the units of the axes.
    pub fn new(x: f64, y: f64) -> Self {
        Self { x, y, label: None, tip: None }
    }

    /// Words beside the point, when there is room for them; always in its tooltip.
    pub fn label(mut self, label: impl Into<String>) -> Self {
        self.label = Some(label.into());
        self
    }

    /// A further line of the tooltip.
    pub fn tip(mut self, tip: impl Into<String>) -> Self {
        self.tip = Some(tip.into());
        self
    }
}

/// Range of values at one x, for instance mean to p95.
#[derive(Clone, Copy, Debug)]
pub struct BandPoint {
    /// Place on the horizontal axis.
    pub x: f64,
    /// Lower edge.
    pub low: f64,
    /// Upper edge.
    pub high: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Join {
    Line,
    None,
}

/// Named points of one colour.
#[derive(Clone, Debug)]
pub struct Series {
    pub(crate) label: String,
    pub(crate) ink: Ink,
    pub(crate) join: Join,
    pub(crate) points: Vec<Point>,
    pub(crate) band: Option<(String, Vec<BandPoint>)>,
}

impl Series {
    /// Points joined by a line in the order given.
    pub fn line(label: impl Into<String>, ink: Ink, points: impl IntoIterator<Item = Point>) -> Self {
        let points = points.into_iter().collect();
        Self { label: label.into(), ink, join: Join::Line, points, band: None }
    }

    /// Points alone.
    pub fn scatter(label: impl Into<String>, ink: Ink, points: impl IntoIterator<Item = Point>) -> Self {
        Self { join: Join::None, ..Self::line(label, ink, points) }
    }

    /// Shades a range around the line; `meaning` (for instance `mean to p95`) goes into the notes.
    pub fn band(mut self, meaning: impl Into<String>, band: impl IntoIterator<Item = BandPoint>) -> Self {
        self.band = Some((meaning.into(), band.into_iter().collect()));
        self
    }
}

/// Where the series are named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Naming {
    Auto,
    Legend,
}

/// A chart of series over two axes.
#[derive(Clone, Debug)]
pub struct XyChart {
    pub(crate) x: Axis,
    pub(crate) y: Axis,
    pub(crate) series: Vec<Series>,
    pub(crate) naming: Naming,
    pub(crate) notes: Vec<String>,
}

impl XyChart {
    /// An empty chart.
    pub fn new(x: Axis, y: Axis) -> Self {
        Self { x, y, series: Vec::new(), naming: Naming::Auto, notes: Vec::new() }
    }

    /// Adds a series. The legend keeps the order of pushing; own series are drawn on top.
    pub fn push(&mut self, series: Series) -> &mut Self {
        self.series.push(series);
        self
    }

    /// Names the series in a legend even where labels at the line ends would fit: for scatters whose points have labels.
    pub fn with_legend(mut self) -> Self {
        self.naming = Naming::Legend;
        self
    }

    /// Adds a line of small print under the chart.
    pub fn note(&mut self, note: impl Into<String>) -> &mut Self {
        self.notes.push(note.into());
        self
    }

    pub(crate) fn is_drawable(&self, x: f64, y: f64) -> bool {
        self.x.drawable(x) == Drawable::Yes && self.y.drawable(y) == Drawable::Yes
    }

    /// One sentence for each series that is not drawn in full, and for each band.
    pub(crate) fn all_notes(&self) -> Vec<String> {
        let mut notes = self.notes.clone();
        for series in &self.series {
            let label = &series.label;
            if series.points.is_empty() {
                notes.push(format!("{label}: no data."));
            }
            let why = |point: &Point| match (self.x.drawable(point.x), self.y.drawable(point.y)) {
                (Drawable::Yes, Drawable::Yes) => None,
                (Drawable::NotFinite, _) | (_, Drawable::NotFinite) => Some(Drawable::NotFinite),
                _ => Some(Drawable::NotPositive),
            };
            let total = series.points.len();
            for (reason, words) in [
                (Drawable::NotFinite, "not a finite number"),
                (Drawable::NotPositive, "zero or negative on a logarithmic axis"),
            ] {
                let count = series.points.iter().filter(|p| why(p) == Some(reason)).count();
                if count > 0 {
                    notes.push(format!("{label}: {count} of {total} points not drawn ({words})."));
                }
            }
            if let Some((meaning, band)) = &series.band {
                let hidden = band
                    .iter()
                    .filter(|b| !(self.is_drawable(b.x, b.low) && self.is_drawable(b.x, b.high)))
                    .count();
                let hidden = match hidden {
                    0 => String::new(),
                    n => format!(" ({n} of {} places not drawn)", band.len()),
                };
                notes.push(format!("Shaded: {meaning} of {label}{hidden}."));
            }
        }
        notes
    }
}

impl Draw for XyChart {
    fn draw(&self, layout: Layout) -> Drawing {
        xy_draw::draw(self, layout)
    }
}

impl Chart for XyChart {
    fn description(&self) -> String {
        let mut text = format!("{} against {}.", self.y.heading(), self.x.heading());
        for series in &self.series {
            let drawn: Vec<&Point> = series.points.iter().filter(|p| self.is_drawable(p.x, p.y)).collect();
            if let (Some(first), Some(last)) = (drawn.first(), drawn.last()) {
                text.push_str(&format!(
                    " {}: {} at {} to {} at {}.",
                    series.label,
                    self.y.number_format().show(first.y),
                    self.x.number_format().show(first.x),
                    self.y.number_format().show(last.y),
                    self.x.number_format().show(last.x),
                ));
            }
        }
        for note in self.all_notes() {
            text.push(' ');
            text.push_str(&note);
        }
        text
    }

    fn data(&self) -> Table {
        self.data_by_x().unwrap_or_else(|| self.data_by_point())
    }
}

impl XyChart {
    /// One row per x and one column per series, when every series has at most one unlabelled point at each x.
    fn data_by_x(&self) -> Option<Table> {
        let mut places: Vec<f64> = self.series.iter().flat_map(|s| s.points.iter().map(|p| p.x)).collect();
        places.sort_by(f64::total_cmp);
        places.dedup_by(|a, b| a.total_cmp(b).is_eq());
        let at = |series: &Series, x: f64| -> Vec<f64> {
            series.points.iter().filter(|p| p.x.total_cmp(&x).is_eq()).map(|p| p.y).collect()
        };
        let labelled = self.series.iter().any(|s| s.points.iter().any(|p| p.label.is_some()));
        let repeated = self.series.iter().any(|s| places.iter().any(|&x| at(s, x).len() > 1));
        if labelled || repeated || self.series.len() > COLUMNS_MAX {
            return None;
        }
        let group = self.y.heading();
        let heads = self.series.iter().map(|s| Column::number(&s.label).group(&group));
        let mut table = Table::new([Column::number(self.x.heading())].into_iter().chain(heads));
        for x in places {
            let cells = self.series.iter().map(|series| match at(series, x).first() {
                Some(&y) => Cell::number(y, self.y.number_format()),
                None => Cell::missing(),
            });
            let place = Cell::number(x, self.x.number_format());
            table.push_checked(Row::new([place].into_iter().chain(cells)));
        }
        Some(table)
    }

    /// One row per point.
    fn data_by_point(&self) -> Table {
        let mut table = Table::new([
            Column::text("series"),
            Column::text("point"),
            Column::number(self.x.heading()),
            Column::number(self.y.heading()),
        ]);
        for series in &self.series {
            for point in &series.points {
                table.push_checked(Row::new([
                    Cell::text(&series.label).ink(series.ink),
                    Cell::text(point.label.as_deref().unwrap_or("")),
                    Cell::number(point.x, self.x.number_format()),
                    Cell::number(point.y, self.y.number_format()),
                ]));
            }
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(points: [&[(f64, f64)]; 2]) -> XyChart {
        let mut chart = XyChart::new(Axis::linear("x"), Axis::linear("y"));
        for (i, points) in points.into_iter().enumerate() {
            let points = points.iter().map(|&(x, y)| Point::new(x, y));
            chart.push(Series::line(format!("s{i}"), Ink::Category(i as u8), points));
        }
        chart
    }

    #[test]
    fn data_has_a_column_per_series_when_x_is_unique_and_a_row_per_point_otherwise() {
        let wide = chart([&[(2.0, 0.5), (1.0, 0.25)], &[(2.0, 1.0)]]).data();
        assert_eq!(wide.to_csv(), "x,y s0,y s1\r\n1,0.25,\r\n2,0.5,1\r\n");
        let long = chart([&[(1.0, 0.5), (1.0, 0.25)], &[]]).data();
        assert_eq!(long.to_csv(), "series,point,x,y\r\ns0,,1,0.5\r\ns0,,1,0.25\r\n");
    }

    #[test]
    fn description_names_every_series_with_its_ends() {
        let text = chart([&[(1.0, 0.5), (2.0, 0.25)], &[]]).description();
        assert_eq!(text, "y against x. s0: 0.5 at 1 to 0.25 at 2. s1: no data.");
    }
}
