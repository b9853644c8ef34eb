//! Axes: which values can be drawn, where they lie, and which ticks the reader gets.

use super::ChartError;
use crate::report::format::NumberFormat;

/// Values beyond this magnitude (or, on a logarithmic axis, below its inverse) count as not drawable: their ratios leave f64.
const MAGNITUDE_MAX: f64 = 1e150;
/// Ranges narrower than this share of their values cannot be told apart in f64 pixels and count as one value.
const RELATIVE_SPAN_MIN: f64 = 1e-9;

/// How values map to length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// Proportional.
    Linear,
    /// Logarithmic, ticks at powers of two.
    Log2,
    /// Logarithmic, ticks at 1, 2 and 5 times powers of ten, or at powers of ten alone.
    Log10,
}

/// Description of one axis; its range comes from the data when the chart is drawn.
#[derive(Clone, Debug)]
pub struct Axis {
    title: String,
    unit: Option<String>,
    scale: Scale,
    format: NumberFormat,
    includes: Vec<f64>,
    ticks: Option<Vec<f64>>,
}

impl Axis {
    fn new(title: impl Into<String>, scale: Scale) -> Self {
        let (includes, format) = (Vec::new(), NumberFormat::Plain);
        Self { title: title.into(), unit: None, scale, format, includes, ticks: None }
    }

    /// A linear axis.
    pub fn linear(title: impl Into<String>) -> Self {
        Self::new(title, Scale::Linear)
    }

    /// A base-two logarithmic axis.
    pub fn log2(title: impl Into<String>) -> Self {
        Self::new(title, Scale::Log2)
    }

    /// A base-ten logarithmic axis.
    pub fn log10(title: impl Into<String>) -> Self {
        Self::new(title, Scale::Log10)
    }

    /// Unit, shown after the title and in tooltips.
    pub fn unit(mut self, unit: impl Into<String>) -> Self {
        self.unit = Some(unit.into());
        self
    }

    /// How values are written in tooltips; tick labels use it with as many decimals as their spacing needs.
    pub fn format(mut self, format: NumberFormat) -> Self {
        self.format = format;
        self
    }

    /// Extends the range to `value`, usually zero.
    ///
    /// # Errors
    /// [`ChartError::Value`] when this axis cannot show `value`.
    pub fn include(mut self, value: f64) -> Result<Self, ChartError> {
        self.check(value)?;
        self.includes.push(value);
        Ok(self)
    }

    /// Ticks at exactly these values, for instance the budgets that were run; the range covers them.
    ///
    /// # Errors
    /// [`ChartError::Value`] when this axis cannot show one of them.
    pub fn ticks_at(mut self, values: impl IntoIterator<Item = f64>) -> Result<Self, ChartError> {
        let mut values: Vec<f64> = values.into_iter().collect();
        for &value in &values {
            self.check(value)?;
        }
        values.sort_by(f64::total_cmp);
        values.dedup();
        self.ticks = Some(values);
        Ok(self)
    }

    fn check(&self, value: f64) -> Result<(), ChartError> {
        match self.drawable(value) {
            Drawable::Yes => Ok(()),
            _ => Err(ChartError::Value { what: format!("axis {:?}", self.title), value }),
        }
    }

    pub(crate) fn scale(&self) -> Scale {
        self.scale
    }

    /// Title with unit.
    pub(crate) fn heading(&self) -> String {
        match &self.unit {
            Some(unit) => format!("{} ({unit})", self.title),
            None => self.title.clone(),
        }
    }

    /// `title: value unit`, for tooltips.
    pub(crate) fn describe(&self, value: f64) -> String {
        let unit = self.unit.as_ref().map_or(String::new(), |unit| format!(" {unit}"));
        format!("{}: {}{unit}", self.title, self.format.show(value))
    }

    pub(crate) fn number_format(&self) -> NumberFormat {
        self.format
    }

    pub(crate) fn drawable(&self, value: f64) -> Drawable {
        if !value.is_finite() || value.abs() > MAGNITUDE_MAX {
            Drawable::NotFinite
        } else if self.scale != Scale::Linear && value < 1.0 / MAGNITUDE_MAX {
            Drawable::NotPositive
        } else {
            Drawable::Yes
        }
    }

    /// Range and about `num_ticks` ticks for drawable `values`.
    pub(crate) fn fit(&self, values: impl IntoIterator<Item = f64>, num_ticks: usize) -> FittedAxis {
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        let fixed = self.ticks.iter().flatten().chain(&self.includes).copied();
        for value in values.into_iter().chain(fixed) {
            if self.drawable(value) == Drawable::Yes {
                low = low.min(value);
                high = high.max(value);
            }
        }
        let (low, high) = self.widen(low, high);
        match (&self.ticks, self.scale) {
            (Some(ticks), scale) => {
                let ticks = ticks.iter().map(|&at| self.tick(at, None)).collect();
                // Markers at the ends must not sit on the frame.
                FittedAxis::new(scale, low, high, ticks).padded(0.03)
            }
            (None, Scale::Linear) => self.fit_linear(low, high, num_ticks),
            (None, Scale::Log2) => self.fit_powers_of_two(low, high, num_ticks),
            (None, Scale::Log10) => self.fit_decades(low, high, num_ticks),
        }
    }

    /// A range of positive width around no value, one value or nearly equal values.
    fn widen(&self, low: f64, high: f64) -> (f64, f64) {
        let log = self.scale != Scale::Linear;
        if low > high {
            return if log { (1.0, 10.0) } else { (0.0, 1.0) };
        }
        if high - low > RELATIVE_SPAN_MIN * low.abs().max(high.abs()) {
            return (low, high);
        }
        match (log, low == 0.0) {
            (true, _) => (low / 1.5, high * 1.5),
            (false, true) => (0.0, 1.0),
            (false, false) => (low - 0.1 * low.abs(), high + 0.1 * high.abs()),
        }
    }

    fn fit_linear(&self, low: f64, high: f64, num_ticks: usize) -> FittedAxis {
        let num_ticks = num_ticks.max(2) as f64;
        let raw = (high - low) / num_ticks;
        let exponent = raw.log10().floor() as i32;
        // The small shift keeps 0.30000000000000004 from asking for a step more than 0.3 does.
        let outer = |step: f64| ((low / step + 1e-6).floor(), (high / step - 1e-6).ceil());
        let steps = [(1.0, exponent), (2.0, exponent), (2.5, exponent), (5.0, exponent), (1.0, exponent + 1)];
        let step = steps
            .map(|(digit, exponent)| decimal(digit, exponent))
            .into_iter()
            .find(|&step| outer(step).1 - outer(step).0 <= num_ticks + 1.0)
            .unwrap_or(decimal(2.0, exponent + 1));
        let (first, last) = (outer(step).0, outer(step).1.max(outer(step).0 + 1.0));
        let count = (last - first).round() as u32;
        let ticks = (0..=count).map(|i| self.tick((first + f64::from(i)) * step, Some(step))).collect();
        FittedAxis::new(Scale::Linear, (first * step).min(low), (last * step).max(high), ticks)
    }

    fn fit_powers_of_two(&self, low: f64, high: f64, num_ticks: usize) -> FittedAxis {
        let first = (low.log2() + 1e-9).floor() as i32;
        let last = ((high.log2() - 1e-9).ceil() as i32).max(first + 1);
        let stride = stride(last - first, num_ticks);
        let ticks =
            (first..=last).step_by(stride).map(|exponent| self.tick(2f64.powi(exponent), None)).collect();
        FittedAxis::new(Scale::Log2, 2f64.powi(first).min(low), 2f64.powi(last).max(high), ticks)
    }

    fn fit_decades(&self, low: f64, high: f64, num_ticks: usize) -> FittedAxis {
        let first = (low.log10() + 1e-9).floor() as i32;
        let last = ((high.log10() - 1e-9).ceil() as i32).max(first + 1);
        let decades = high.log10() - low.log10();
        let digits: &[f64] = if decades < 0.7 {
            &[1.0, 1.5, 2.0, 3.0, 5.0, 7.0]
        } else if decades * 3.0 <= num_ticks as f64 + 2.0 {
            &[1.0, 2.0, 5.0]
        } else {
            &[1.0]
        };
        let stride = if digits.len() > 1 { 1 } else { stride(last - first, num_ticks) };
        let mut candidates: Vec<f64> = (first..last)
            .step_by(stride)
            .flat_map(|exponent| digits.iter().map(move |&digit| decimal(digit, exponent)))
            .collect();
        candidates.push(decimal(1.0, last));
        // Keep the ticks from the last one at or below the data to the first one at or above it.
        let from = candidates.iter().rposition(|&t| t <= low * (1.0 + 1e-9)).unwrap_or(0);
        let to = candidates
            .iter()
            .position(|&t| t >= high * (1.0 - 1e-9))
            .unwrap_or(candidates.len() - 1)
            .max(from);
        let kept = &candidates[from..=to];
        let range = (kept[0].min(low), kept[kept.len() - 1].max(high));
        let ticks = kept.iter().map(|&at| self.tick(at, None)).collect();
        FittedAxis::new(Scale::Log10, range.0, range.1, ticks)
    }

    fn tick(&self, at: f64, step: Option<f64>) -> Tick {
        // -0 and the rounding of first * step at zero must read "0".
        let at = if step.is_some_and(|step| at.abs() < step * 1e-6) { 0.0 } else { at };
        Tick { at, label: self.format.tick(at, step) }
    }
}

fn stride(num_steps: i32, num_ticks: usize) -> usize {
    (num_steps.max(1) as usize).div_ceil(num_ticks.max(1))
}

/// `digit * 10^exponent`, correctly rounded (a product with `powi` is not).
fn decimal(digit: f64, exponent: i32) -> f64 {
    format!("{digit}e{exponent}").parse().unwrap_or(digit)
}

/// Whether a value has a place on an axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Drawable {
    Yes,
    NotFinite,
    NotPositive,
}

/// A labelled value of an axis.
#[derive(Clone, Debug)]
pub(crate) struct Tick {
    pub(crate) at: f64,
    pub(crate) label: String,
}

/// An axis with its range: maps drawable values to [0, 1].
#[derive(Clone, Debug)]
pub(crate) struct FittedAxis {
    scale: Scale,
    low: f64,
    high: f64,
    pub(crate) ticks: Vec<Tick>,
}

impl FittedAxis {
    fn new(scale: Scale, low: f64, high: f64, ticks: Vec<Tick>) -> Self {
        let map = |v: f64| if scale == Scale::Linear { v } else { v.ln() };
        Self { scale, low: map(low), high: map(high), ticks }
    }

    fn padded(mut self, share: f64) -> Self {
        let padding = (self.high - self.low) * share;
        self.low -= padding;
        self.high += padding;
        self
    }

    /// Place of a drawable value along the axis, 0 at its low end.
    pub(crate) fn place(&self, value: f64) -> f64 {
        let value = if self.scale == Scale::Linear { value } else { value.ln() };
        (value - self.low) / (self.high - self.low)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(axis: &FittedAxis) -> Vec<&str> {
        axis.ticks.iter().map(|t| t.label.as_str()).collect()
    }

    #[test]
    fn ticks_are_round_and_cover_the_data() {
        let fitted = Axis::linear("error").fit([0.021, 0.592], 6);
        assert_eq!(labels(&fitted), ["0.0", "0.1", "0.2", "0.3", "0.4", "0.5", "0.6"]);
        let fitted = Axis::log2("budget").fit([96.0, 2048.0], 8);
        assert_eq!(labels(&fitted), ["64", "128", "256", "512", "1024", "2048"]);
        let fitted = Axis::log10("error").fit([0.021, 0.592], 6);
        assert_eq!(labels(&fitted), ["0.02", "0.05", "0.1", "0.2", "0.5", "1"]);
        let fitted = Axis::log10("bytes").format(NumberFormat::Bytes).fit([5e3, 9e8], 6);
        assert_eq!(labels(&fitted), ["1 kB", "10 kB", "100 kB", "1 MB", "10 MB", "100 MB", "1 GB"]);
    }

    #[test]
    fn any_data_lies_inside_the_range_and_between_the_outer_ticks() {
        let magnitudes = [1e-140, 1e-9, 0.3, 1.0, 7.0, 1e6, 3.3e140];
        for scale in [Scale::Linear, Scale::Log2, Scale::Log10] {
            for low in magnitudes {
                for factor in [1.0, 1.0 + 1e-12, 1.01, 1.9, 37.0, 1e8] {
                    let axis = Axis::new("v", scale);
                    let high = low * factor;
                    let fitted = axis.fit([low, high], 6);
                    for value in [low, high] {
                        let place = fitted.place(value);
                        assert!((-1e-9..=1.0 + 1e-9).contains(&place), "{scale:?} {low} {high}: {place}");
                    }
                    assert!(
                        (2..=30).contains(&fitted.ticks.len()),
                        "{scale:?} {low} {high}: {:?}",
                        fitted.ticks
                    );
                    let first = fitted.ticks[0].at;
                    assert!(first <= low * (1.0 + 1e-6), "{scale:?} {low} {high}: first tick {first}");
                    assert!(fitted.ticks.iter().all(|t| fitted.place(t.at).is_finite()));
                }
            }
        }
    }

    #[test]
    fn no_value_one_value_and_equal_values_still_give_a_range() {
        for axis in [Axis::linear("x"), Axis::log2("x"), Axis::log10("x")] {
            assert!(axis.fit([], 5).ticks.len() >= 2);
            let fitted = axis.fit([4.0, 4.0], 5);
            let place = fitted.place(4.0);
            assert!(place > 0.0 && place < 1.0, "{axis:?} {place}");
        }
        assert_eq!(Axis::linear("x").fit([0.0], 5).place(0.0), 0.0);
    }

    #[test]
    fn negative_ranges_cross_zero_with_a_zero_tick() {
        let fitted = Axis::linear("change").fit([-0.3, 0.2], 5);
        assert_eq!(labels(&fitted), ["-0.3", "-0.2", "-0.1", "0.0", "0.1", "0.2"]);
    }

    #[test]
    fn given_ticks_are_kept_and_a_tick_off_the_axis_is_refused() {
        let budgets = [96.0, 128.0, 2048.0];
        let fitted = Axis::log2("budget").ticks_at(budgets).unwrap().fit([96.0], 5);
        assert_eq!(labels(&fitted), ["96", "128", "2048"]);
        let error = Axis::log2("budget").ticks_at([0.0]).unwrap_err();
        assert_eq!(error.to_string(), "axis \"budget\" cannot show the value 0");
        assert!(Axis::linear("error").include(f64::NAN).is_err());
    }
}
