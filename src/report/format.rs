//! Numbers as a reader wants them: the same value looks the same in the terminal, in tables and in tooltips.

/// How a number is written. Values that are not finite are written as `nan`, `inf` or `-inf`, never hidden.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NumberFormat {
    /// Shortest exact decimal, for axis ticks: `0.02`, `256`.
    Plain,
    /// Fixed number of decimals: `0.131`.
    Decimals(u8),
    /// Significant digits, for errors: `0.131`, `0.0227`, `3.10e-5`.
    Significant(u8),
    /// A whole number with thousands separators: `30,738`.
    Count,
    /// A size in bytes with SI (decimal) units and three significant digits: `8.19 kB`.
    Bytes,
    /// A fraction of one as a percentage with this many decimals: `75.4 %`.
    Percent(u8),
    /// A time given in microseconds with three significant digits: `4.50 µs`, `1.20 ms`.
    Micros,
}

const BYTE_UNITS: [&str; 6] = ["B", "kB", "MB", "GB", "TB", "PB"];
const TIME_UNITS: [&str; 3] = ["µs", "ms", "s"];

impl NumberFormat {
    /// `value` as text.
    pub fn show(self, value: f64) -> String {
        if value.is_nan() {
            return "nan".to_owned();
        }
        if value.is_infinite() {
            return if value > 0.0 { "inf" } else { "-inf" }.to_owned();
        }
        match self {
            Self::Plain => plain(value),
            Self::Decimals(digits) => fixed(value, digits),
            Self::Significant(digits) => significant(value, digits),
            Self::Count => thousands(value),
            Self::Bytes => scaled(value, &BYTE_UNITS),
            Self::Percent(digits) => format!("{} %", fixed(value * 100.0, digits)),
            Self::Micros => scaled(value, &TIME_UNITS),
        }
    }

    /// `value` as the label of an axis tick whose neighbours are `step` away: just enough decimals to tell them apart,
    /// whatever this format asks for, and no trailing zeros after a unit.
    pub(crate) fn tick(self, value: f64, step: Option<f64>) -> String {
        match (self, step) {
            (Self::Plain | Self::Decimals(_) | Self::Significant(_), Some(step)) => {
                fixed(value, decimals_for(step))
            }
            (Self::Plain | Self::Decimals(_) | Self::Significant(_), None) => plain(value),
            (Self::Percent(_), Some(step)) => {
                format!("{} %", fixed(value * 100.0, decimals_for(step * 100.0)))
            }
            (Self::Percent(_), None) => format!("{} %", plain(value * 100.0)),
            (Self::Count, Some(step)) if step < 1.0 => fixed(value, decimals_for(step)),
            (Self::Count, _) => thousands(value),
            (Self::Bytes | Self::Micros, _) => match self.show(value).split_once(' ') {
                Some((number, unit)) if number.contains('.') => {
                    format!("{} {unit}", number.trim_end_matches('0').trim_end_matches('.'))
                }
                _ => self.show(value),
            },
        }
    }
}

/// Decimals that a multiple of `step` needs; at most 12, beyond which ticks are noise.
fn decimals_for(step: f64) -> u8 {
    (0..12)
        .find(|&digits| {
            let scaled = step * 10f64.powi(i32::from(digits));
            (scaled - scaled.round()).abs() < 1e-6 * scaled.abs()
        })
        .unwrap_or(12)
}

fn fixed(value: f64, digits: u8) -> String {
    let text = format!("{value:.*}", usize::from(digits));
    // A tiny negative value must not be shown as -0.000.
    if text.starts_with('-') && !text.contains(|c: char| ('1'..='9').contains(&c)) {
        return text[1..].to_owned();
    }
    text
}

fn plain(value: f64) -> String {
    let magnitude = value.abs();
    if value != 0.0 && !(1e-5..1e9).contains(&magnitude) {
        return format!("{value:e}");
    }
    // Nine significant digits drop the last-bit noise of computed ticks.
    let decimals = (9 - exponent(value, 9)).clamp(0, 15);
    let text = fixed(value, decimals as u8);
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

fn significant(value: f64, digits: u8) -> String {
    let digits = digits.max(1);
    if value == 0.0 {
        return "0".to_owned();
    }
    let exponent = exponent(value, digits);
    if !(-4..9).contains(&exponent) {
        return format!("{value:.*e}", usize::from(digits) - 1);
    }
    fixed(value, (i32::from(digits) - 1 - exponent).max(0) as u8)
}

/// Decimal exponent of `value` once rounded to `digits` significant digits (0.0999 at two digits is 0.10).
fn exponent(value: f64, digits: u8) -> i32 {
    let text = format!("{value:.*e}", usize::from(digits.max(1)) - 1);
    text.rsplit_once('e').and_then(|(_, e)| e.parse().ok()).unwrap_or(0)
}

fn thousands(value: f64) -> String {
    let text = fixed(value, 0);
    let (sign, digits) = text.strip_prefix('-').map_or(("", text.as_str()), |d| ("-", d));
    let mut out = String::from(sign);
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

fn scaled(value: f64, units: &[&str]) -> String {
    let mut scaled = value;
    let mut unit = 0;
    // 999.5 and above would round to 1000 at three digits.
    while scaled.abs() >= 999.5 && unit + 1 < units.len() {
        scaled /= 1000.0;
        unit += 1;
    }
    let whole_bytes = units[0] == "B" && unit == 0 && scaled.fract() == 0.0;
    let number = if whole_bytes { fixed(scaled, 0) } else { significant(scaled, 3) };
    format!("{number} {}", units[unit])
}

#[cfg(test)]
mod tests {
    use super::NumberFormat::*;

    #[test]
    fn each_format_shows_known_values_as_documented() {
        let cases = [
            (Significant(3), 0.13149, "0.131"),
            (Significant(3), 0.022_68, "0.0227"),
            (Significant(3), 0.099_96, "0.100"),
            (Significant(3), 0.0, "0"),
            (Significant(3), 3.1e-5, "3.10e-5"),
            (Significant(3), 12345.0, "12345"),
            (Decimals(3), -0.000_01, "0.000"),
            (Decimals(2), 1.005, "1.00"),
            (Count, 30_738.0, "30,738"),
            (Count, 738.0, "738"),
            (Count, -1_234_567.0, "-1,234,567"),
            (Bytes, 8192.0, "8.19 kB"),
            (Bytes, 512.0, "512 B"),
            (Bytes, 999_700.0, "1.00 MB"),
            (Bytes, 0.0, "0 B"),
            (Percent(1), 0.7541, "75.4 %"),
            (Micros, 4.5, "4.50 µs"),
            (Micros, 2_500_000.0, "2.50 s"),
            (Plain, 0.020_000_000_000_000_004, "0.02"),
            (Plain, 256.0, "256"),
            (Plain, 0.0, "0"),
            (Plain, f64::NAN, "nan"),
            (Bytes, f64::NEG_INFINITY, "-inf"),
        ];
        for (format, value, text) in cases {
            assert_eq!(format.show(value), text, "{format:?} {value}");
        }
    }

    #[test]
    fn neighbouring_ticks_have_different_labels_whatever_the_format() {
        for format in [Plain, Decimals(0), Significant(1), Percent(0), Count] {
            for step in [0.001, 0.025, 0.5, 2.5, 20.0] {
                let labels: Vec<_> = (0..8).map(|i| format.tick(f64::from(i) * step, Some(step))).collect();
                for pair in labels.windows(2) {
                    assert_ne!(pair[0], pair[1], "{format:?} step {step}");
                }
            }
        }
        assert_eq!(Bytes.tick(2e6, None), "2 MB");
        assert_eq!(Percent(0).tick(0.125, Some(0.025)), "12.5 %");
    }
}
