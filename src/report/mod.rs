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

pub mod chart;
pub mod format;
pub mod ink;
mod markup;
pub mod page;
pub mod table;

pub use format::NumberFormat;
pub use ink::{Ink, Inks};
