//! What a measurement looks like: aligned tables, SVG charts and self-contained HTML pages.
//!
//! Plain presentation: it takes numbers and words and knows no engine type. The same [`table::Table`] value becomes terminal
//! text, HTML and CSV; the same chart becomes a wide and a narrow SVG, so that a page reads on a phone and on paper. Equal
//! input gives equal bytes: no clock, no random ids, no hash order; dates and machine facts come from the caller.
//!
//! Nothing is dropped silently: points that cannot be drawn (not finite, or zero on a logarithmic axis) are counted in a
//! note under the chart, and a series without data keeps its place in the legend.
//!
//! The SVG and table writers are our own. Of the crates looked at, plotters 0.3 and kuva 0.6 write fixed colours into every
//! element, so one figure cannot serve light and dark pages; poloto 19 takes style sheets but has neither direct labels nor
//! tooltips; comfy-table 8 has no rows or headers that span columns and no second output format.

//! ```
//! use floe::report::chart::{Axis, Point, Series, XyChart};
//! use floe::report::page::{Figure, Page, Section};
//! use floe::report::table::{Cell, Column, Row, Table};
//! use floe::report::{Inks, NumberFormat};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let error = NumberFormat::Significant(3);
//! let budgets = [96.0, 256.0, 2048.0];
//! let mut inks = Inks::new();
//!
//! let heads = budgets.map(|b| Column::number(NumberFormat::Count.show(b)).group("mean error, by budget"));
//! let mut table = Table::new([Column::text("policy")].into_iter().chain(heads));
//! let x = Axis::log2("Budget").unit("tokens").format(NumberFormat::Count).ticks_at(budgets)?;
//! let mut chart = XyChart::new(x, Axis::log10("Mean relative error").format(error));
//!
//! table.section("story, 219 steps");
//! for (policy, ink, errors) in [
//!     ("oracle", inks.reference("oracle"), [0.464, 0.263, 0.084]),
//!     ("quest", inks.rival("quest"), [0.592, 0.479, 0.211]),
//!     ("floe", inks.own("floe"), [0.315, 0.243, 0.101]),
//! ] {
//!     let cells = errors.map(|e| Cell::number(e, error));
//!     table.push(Row::new([Cell::text(policy).ink(ink)].into_iter().chain(cells)))?;
//!     chart.push(Series::line(policy, ink, budgets.iter().zip(errors).map(|(&b, e)| Point::new(b, e))));
//! }
//!
//! assert!(table.to_text().contains("0.0840"));
//! let page = Page::new("Replay").fact("Command", "`floe replay`").section(
//!     Section::new("Error by budget").table("Mean error.", table).figure(Figure::new("Error", chart)),
//! );
//! assert!(page.to_html().starts_with("<!DOCTYPE html>"));
//! # Ok(())
//! # }
//! ```

pub mod chart;
pub mod format;
pub mod ink;
mod markup;
pub mod page;
pub mod table;

pub use format::NumberFormat;
pub use ink::{Ink, Inks};
