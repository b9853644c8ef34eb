//! What a user can ask of decode reuse, and its validation: plain types, shared by policies and caches.

use crate::error::{Error, Result};

/// Which cache a shard has.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum ReuseKind {
    /// None.
    #[default]
    Off,
    /// Match-amend-complete as published.
    Mac(MacOptions),
    /// Reuse under a measured bound.
    Calibrated(CalibratedOptions),
}

/// Settings of [`crate::reuse::Mac`]; the defaults are those the method ships with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MacOptions {
    /// `tau`: a match needs `dist^2 < 2 head_dim (1 - tau)^2`; larger is stricter. In [0, 1].
    pub tau: f32,
    /// `ring`: earlier steps kept per query head.
    pub ring: usize,
    /// `band`: newest tokens that are always attended afresh, and that no entry covers.
    pub band: usize,
    /// `sinks`: first tokens that are always attended afresh.
    pub sinks: usize,
    /// `min`: shorter contexts do not reuse, tokens.
    pub min_tokens: usize,
}

impl Default for MacOptions {
    fn default() -> Self {
        Self { tau: 0.45, ring: 512, band: 256, sinks: 0, min_tokens: 2048 }
    }
}

/// Settings of [`crate::reuse::Calibrated`]. Bounds and rates are shares, lengths are steps or tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CalibratedOptions {
    /// `max_error`: 95 of 100 reused outputs are to be nearer than this to what the step would have given without reuse,
    /// relative, per query head. In (0, 1).
    pub max_error: f32,
    /// `lottery`: share of steps that measure although they could reuse. In [0, 0.5].
    pub lottery: f32,
    /// `anchors`: earlier steps kept.
    pub anchors: usize,
    /// `refresh`: steps after which a new anchor is made, whatever the old ones are good for.
    pub refresh: usize,
    /// `labels`: newest measurements that a threshold rests on.
    pub labels: usize,
    /// `min`: shorter contexts do not reuse, tokens.
    pub min_tokens: usize,
}

impl Default for CalibratedOptions {
    fn default() -> Self {
        Self { max_error: 0.05, lottery: 0.015, anchors: 8, refresh: 32, labels: 256, min_tokens: 2048 }
    }
}

impl ReuseKind {
    /// Whether anything is reused.
    #[must_use]
    pub fn is_on(&self) -> bool {
        *self != Self::Off
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::Config`] naming the first field that is out of range.
    pub fn validate(&self) -> Result<()> {
        let within = |field, value: usize, low: usize, high: usize| {
            if (low..=high).contains(&value) {
                return Ok(());
            }
            Err(Error::config(field, value, format!("must be in {low}..={high}")))
        };
        match self {
            Self::Off => Ok(()),
            Self::Mac(o) => {
                if !(0.0..=1.0).contains(&o.tau) {
                    return Err(Error::config("reuse.tau", o.tau, "must be in [0, 1]"));
                }
                within("reuse.ring", o.ring, 1, 1 << 16)?;
                within("reuse.band", o.band, 1, 1 << 24)?;
                within("reuse.sinks", o.sinks, 0, 1 << 24)?;
                within("reuse.min", o.min_tokens, 0, 1 << 30)
            }
            Self::Calibrated(o) => {
                if !(o.max_error > 0.0 && o.max_error < 1.0) {
                    return Err(Error::config("reuse.max_error", o.max_error, "must be in (0, 1)"));
                }
                if !(0.0..=0.5).contains(&o.lottery) {
                    return Err(Error::config("reuse.lottery", o.lottery, "must be in [0, 0.5]"));
                }
                within("reuse.anchors", o.anchors, 1, 1024)?;
                within("reuse.refresh", o.refresh, 1, 1 << 20)?;
                within("reuse.labels", o.labels, 32, 1 << 16)?;
                within("reuse.min", o.min_tokens, 0, 1 << 30)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_bad_field_is_named() {
        let (mac, own) = (MacOptions::default(), CalibratedOptions::default());
        for kind in [ReuseKind::Off, ReuseKind::Mac(mac), ReuseKind::Calibrated(own)] {
            assert!(kind.validate().is_ok());
        }
        let cases = [
            ("reuse.tau", ReuseKind::Mac(MacOptions { tau: f32::NAN, ..mac })),
            ("reuse.ring", ReuseKind::Mac(MacOptions { ring: 0, ..mac })),
            ("reuse.band", ReuseKind::Mac(MacOptions { band: 0, ..mac })),
            ("reuse.sinks", ReuseKind::Mac(MacOptions { sinks: 1 << 30, ..mac })),
            ("reuse.min", ReuseKind::Mac(MacOptions { min_tokens: 1 << 31, ..mac })),
            ("reuse.max_error", ReuseKind::Calibrated(CalibratedOptions { max_error: 0.0, ..own })),
            ("reuse.lottery", ReuseKind::Calibrated(CalibratedOptions { lottery: 0.6, ..own })),
            ("reuse.anchors", ReuseKind::Calibrated(CalibratedOptions { anchors: 0, ..own })),
            ("reuse.refresh", ReuseKind::Calibrated(CalibratedOptions { refresh: 0, ..own })),
            ("reuse.labels", ReuseKind::Calibrated(CalibratedOptions { labels: 31, ..own })),
        ];
        for (field, kind) in cases {
            let message = kind.validate().unwrap_err().to_string();
            assert!(message.contains(&format!("`{field}`")), "{field}: {message}");
        }
    }
}
