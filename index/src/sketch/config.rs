//! How many bits a sketch spends on a token's key and value.

use std::fmt;
use std::str::FromStr;

use crate::error::IndexError;

/// Bits per coordinate of the key and of the value residual; zero keeps nothing of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SketchConfig {
    k_bits: u8,
    v_bits: u8,
}

impl SketchConfig {
    /// No sketch: page means stand for their tokens.
    pub const OFF: Self = Self { k_bits: 0, v_bits: 0 };
    /// 1-bit keys.
    pub const K1: Self = Self { k_bits: 1, v_bits: 0 };
    /// 2-bit keys.
    pub const K2: Self = Self { k_bits: 2, v_bits: 0 };
    /// 1-bit keys and values.
    pub const K1V1: Self = Self { k_bits: 1, v_bits: 1 };
    /// 2-bit keys, 1-bit values.
    pub const K2V1: Self = Self { k_bits: 2, v_bits: 1 };
    /// 2-bit keys and values.
    pub const K2V2: Self = Self { k_bits: 2, v_bits: 2 };
    /// 4-bit keys, 2-bit values.
    pub const K4V2: Self = Self { k_bits: 4, v_bits: 2 };

    /// The configurations that policies name, by growing size.
    pub const NAMED: [Self; 7] =
        [Self::OFF, Self::K1, Self::K2, Self::K1V1, Self::K2V1, Self::K2V2, Self::K4V2];

    /// Any combination that the kernels know.
    ///
    /// # Errors
    /// `Config` unless `k_bits` is 0, 1, 2 or 4 and `v_bits` 0, 1 or 2.
    pub fn new(k_bits: u8, v_bits: u8) -> Result<Self, IndexError> {
        if !matches!(k_bits, 0 | 1 | 2 | 4) {
            return Err(IndexError::Config {
                field: "k_bits",
                value: f64::from(k_bits),
                expected: "0, 1, 2 or 4",
            });
        }
        if !matches!(v_bits, 0..=2) {
            return Err(IndexError::Config {
                field: "v_bits",
                value: f64::from(v_bits),
                expected: "0, 1 or 2",
            });
        }
        Ok(Self { k_bits, v_bits })
    }

    /// Bits per coordinate of a key residual.
    pub fn k_bits(self) -> usize {
        usize::from(self.k_bits)
    }

    /// Bits per coordinate of a value residual.
    pub fn v_bits(self) -> usize {
        usize::from(self.v_bits)
    }
}

impl fmt::Display for SketchConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.k_bits, self.v_bits) {
            (0, 0) => f.write_str("off"),
            (k, 0) => write!(f, "k{k}"),
            (0, v) => write!(f, "v{v}"),
            (k, v) => write!(f, "k{k}v{v}"),
        }
    }
}

/// The text is not the name of a sketch.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("sketch is {given:?}, expected off, k1, k2, k1v1, k2v1, k2v2 or k4v2")]
pub struct ParseSketchError {
    /// What was given.
    pub given: String,
}

impl FromStr for SketchConfig {
    type Err = ParseSketchError;

    fn from_str(text: &str) -> Result<Self, ParseSketchError> {
        Self::NAMED
            .into_iter()
            .find(|config| config.to_string() == text)
            .ok_or_else(|| ParseSketchError { given: text.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::SketchConfig;

    #[test]
    fn names_parse_to_what_prints_them() {
        let names: Vec<String> = SketchConfig::NAMED.iter().map(ToString::to_string).collect();
        assert_eq!(names, ["off", "k1", "k2", "k1v1", "k2v1", "k2v2", "k4v2"]);
        for (name, config) in names.iter().zip(SketchConfig::NAMED) {
            assert_eq!(name.parse(), Ok(config));
        }
        for wrong in ["", "k3", "K1", "k2v4", "k1v1 ", "v1"] {
            assert_eq!(wrong.parse::<SketchConfig>().unwrap_err().given, wrong);
        }
    }

    #[test]
    fn widths_without_a_kernel_are_refused() {
        assert_eq!(SketchConfig::new(4, 1).unwrap().to_string(), "k4v1");
        assert!(SketchConfig::new(3, 0).is_err());
        assert!(SketchConfig::new(0, 4).is_err());
    }
}
