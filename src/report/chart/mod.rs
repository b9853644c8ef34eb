//! SVG charts that read in light and dark, on a phone and on paper, without scripts.
//!
//! A chart holds data and draws itself for a [`Layout`]; it has no size of its own. Colours are CSS variables, so the page
//! decides; [`Chart::to_svg`] adds the style sheet for a file that stands alone. Every mark carries a `<title>` tooltip.

mod axis;
mod bars;
mod frame;
mod label;
mod timeline;
mod xy;
mod xy_draw;

pub use axis::{Axis, Scale};
pub use bars::{BarChart, Part};
pub use timeline::{Kind, Span, Timeline};
pub use xy::{BandPoint, Point, Series, XyChart};

use super::ink;
use super::markup::Markup;
use super::table::Table;

/// Why a chart refused its input.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ChartError {
    /// A value that the axis has no place for: not finite, or not positive where a logarithm or a length is taken.
    #[error("{what} cannot show the value {value}")]
    Value {
        /// Name of the axis, bar or span.
        what: String,
        /// The value given.
        value: f64,
    },
    /// The number of values differs from the number of parts.
    #[error("{what} has {found} values, expected {expected}")]
    Length {
        /// Name of the bar.
        what: String,
        /// Number of parts of the chart.
        expected: usize,
        /// Number of values given.
        found: usize,
    },
    /// A span names a kind that the timeline does not have.
    #[error("{what} has kind {kind}, but the timeline has {num_kinds} kinds")]
    Kind {
        /// Lane of the span.
        what: String,
        /// The kind given.
        kind: usize,
        /// Number of kinds.
        num_kinds: usize,
    },
    /// This chart type needs a linear axis.
    #[error("{what} needs a linear axis")]
    Scale {
        /// The chart type.
        what: &'static str,
    },
}

/// The space a chart is drawn for; the unit is one CSS pixel at 100 %.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Full text width.
    Wide,
    /// Two charts side by side, or one on a tablet.
    Half,
    /// A phone.
    Narrow,
}

impl Layout {
    pub(crate) fn width(self) -> f64 {
        match self {
            Self::Wide => 960.0,
            Self::Half => 472.0,
            Self::Narrow => 360.0,
        }
    }

    /// Height of the plotting area without titles and legend.
    pub(crate) fn plot_height(self) -> f64 {
        match self {
            Self::Wide => 380.0,
            Self::Half => 270.0,
            Self::Narrow => 250.0,
        }
    }

    pub(crate) fn class(self) -> &'static str {
        match self {
            Self::Wide => "wide",
            Self::Half => "half",
            Self::Narrow => "narrow",
        }
    }
}

/// Anything that draws itself as SVG. The chart types of this module implement it; others cannot.
pub trait Chart: draw::Draw {
    /// What the chart shows, in words, for readers who do not see it.
    fn description(&self) -> String;

    /// The numbers behind the picture.
    fn data(&self) -> Table;

    /// A complete SVG file headed by `title`.
    fn to_svg(&self, title: &str, layout: Layout) -> String {
        let drawing = self.draw(layout);
        let (width, height) =
            (layout.width() + 2.0 * MARGIN, drawing.height.ceil() + 2.0 * MARGIN + TITLE_HEIGHT);
        let mut m = Markup::new();
        open_svg(&mut m, title, layout, (-MARGIN, -MARGIN - TITLE_HEIGHT, width, height));
        m.num("width", width).num("height", height);
        m.leaf("title", title).leaf("desc", &self.description());
        m.leaf("style", &(include_str!("chart.css").to_owned() + &ink::style()));
        m.open("rect").attr("class", "paper").num("x", -MARGIN).num("y", -MARGIN - TITLE_HEIGHT);
        m.num("width", width).num("height", height).empty();
        let heading = label::shorten(title, layout.width());
        frame::text(&mut m, "heading", (0.0, -TITLE_HEIGHT + label::FONT_SIZE), &heading);
        m.raw(&drawing.markup);
        m.finish()
    }
}

/// Space around a chart that stands alone, and the height of its title.
const MARGIN: f64 = 24.0;
const TITLE_HEIGHT: f64 = 32.0;

/// The private half of [`Chart`].
mod draw {
    /// Finished inner markup of a chart and its height in user units.
    pub struct Drawing {
        pub(crate) markup: String,
        pub(crate) height: f64,
    }

    pub trait Draw {
        /// The inside of the picture, for the width of `layout`.
        fn draw(&self, layout: super::Layout) -> Drawing;
    }
}
use draw::{Draw, Drawing};

/// An `<svg>` element to stand in a page that carries the style sheet.
pub(crate) fn inline(chart: &dyn Chart, title: &str, layout: Layout) -> String {
    let drawing = chart.draw(layout);
    let mut m = Markup::new();
    open_svg(&mut m, title, layout, (0.0, 0.0, layout.width(), drawing.height.ceil()));
    m.leaf("desc", &chart.description());
    m.raw(&drawing.markup);
    m.finish()
}

fn open_svg(m: &mut Markup, title: &str, layout: Layout, view: (f64, f64, f64, f64)) {
    m.open("svg").attr("xmlns", "http://www.w3.org/2000/svg");
    m.attr("class", &format!("chart {}", layout.class()));
    m.attr("viewBox", &format!("{} {} {} {}", view.0, view.1, view.2, view.3));
    m.attr("role", "img").attr("aria-label", title);
}
