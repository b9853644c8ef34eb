//! Order statistics of a few timings.

use serde::Serialize;

/// Spread of repeated timings, in microseconds.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Spread {
    /// The shortest.
    pub best_us: f64,
    /// Half of the timings were shorter.
    pub median_us: f64,
    /// A tenth were shorter.
    pub p10_us: f64,
    /// A tenth were longer.
    pub p90_us: f64,
    /// How many.
    pub samples: usize,
}

impl Spread {
    /// Of timings in seconds, at least one.
    pub fn of(mut seconds: Vec<f64>) -> Self {
        seconds.sort_by(f64::total_cmp);
        let at = |part: f64| seconds[((seconds.len() - 1) as f64 * part).round() as usize] * 1e6;
        Self {
            best_us: at(0.0),
            median_us: at(0.5),
            p10_us: at(0.1),
            p90_us: at(0.9),
            samples: seconds.len(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_of_one_to_eleven_is_its_order_statistics() {
        let spread = Spread::of((1..=11).rev().map(|x| f64::from(x) * 1e-6).collect());
        let got = [spread.best_us, spread.p10_us, spread.median_us, spread.p90_us].map(|x| x.round() as i32);
        assert_eq!((got, spread.samples), ([1, 2, 6, 10], 11));
    }
}
