//! Policies as users write them: `NAME[:key=value[,key=value]]`, for example `floe:tail=page`.

use std::str::FromStr;

use floe_cuda::cpu::quant::QuantKind;
use floe_index::sketch::SketchConfig;
use floe_index::{Tail, Unit};

/// Newest tokens that `kivi2` keeps exact: as many as the default window, within the 32 to 128 that KIVI uses.
const KIVI_RESIDUAL: usize = 64;

/// A policy, with the text it was given as.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    spec: String,
    kind: PolicyKind,
}

/// The policies of DESIGN section 5.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum PolicyKind {
    /// Attention over every token.
    Full,
    /// Sinks and window only.
    Window,
    /// Consecutive pages by min/max bound.
    Quest,
    /// Consecutive pages by mean key.
    PageMean(IndexOptions),
    /// Exact top tokens.
    Oracle,
    /// Pages of similar keys.
    Floe(IndexOptions),
    /// Top pages of the published one-projection tree.
    Icecache,
    /// Top tokens of an HNSW graph.
    Hnsw,
    /// Full attention over quantised keys and values.
    Quantised(QuantKind),
}

/// Switches of the policies that search an index.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct IndexOptions {
    /// `tail`: what stands for the tokens that are not attended.
    pub tail: Tail,
    /// `sketch`: bits kept of every key and value beside the page means.
    pub sketch: SketchConfig,
    /// `unit`: whether whole pages or single tokens are picked. Without key bits a token scores as its page does.
    pub unit: Unit,
    /// `open`: fraction of the super-nodes that a search may open, in (0, 1].
    pub open: f32,
}

impl IndexOptions {
    /// `floe` alone: the most accurate sketch within 17 % of the KV's bytes (bench/README.md has the curve).
    pub const FLOE: Self =
        Self { tail: Tail::Tree, sketch: SketchConfig::K2V1, unit: Unit::Token, open: 1.0 };
    /// `pagemean` alone: top pages, nothing else.
    pub const PAGEMEAN: Self =
        Self { tail: Tail::Off, sketch: SketchConfig::OFF, unit: Unit::Token, open: 1.0 };
}

/// A policy text that cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// No policy of that name.
    #[error(
        "policy `{0}`: unknown name; known are full, window, quest, pagemean, icecache, hnsw, oracle, floe, int8, int4, kivi2"
    )]
    Name(String),
    /// The policy has no such option.
    #[error("policy `{policy}`: unknown option `{key}`; it takes {known}")]
    Key {
        /// Policy name.
        policy: String,
        /// Option given.
        key: String,
        /// Options it has.
        known: &'static str,
    },
    /// The option does not take that value.
    #[error("policy `{policy}`: option `{key}` = `{value}`; it takes {known}")]
    Value {
        /// Policy name.
        policy: String,
        /// Option given.
        key: String,
        /// Value given.
        value: String,
        /// Values it takes.
        known: &'static str,
    },
    /// An option is given twice.
    #[error("policy `{policy}`: option `{key}` is given twice")]
    Twice {
        /// Policy name.
        policy: String,
        /// Option given.
        key: String,
    },
}

impl Policy {
    /// The text as given.
    #[must_use]
    pub fn spec(&self) -> &str {
        &self.spec
    }

    /// Whether the policy is exact attention.
    #[must_use]
    pub fn is_exact(&self) -> bool {
        self.kind == PolicyKind::Full
    }

    /// The parsed policy.
    #[must_use]
    pub fn kind(&self) -> &PolicyKind {
        &self.kind
    }
}

impl Default for Policy {
    fn default() -> Self {
        Self { spec: "floe".into(), kind: PolicyKind::Floe(IndexOptions::FLOE) }
    }
}

impl std::fmt::Display for Policy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.spec)
    }
}

impl FromStr for Policy {
    type Err = SpecError;

    fn from_str(spec: &str) -> Result<Self, SpecError> {
        let (name, options) = spec.split_once(':').unwrap_or((spec, ""));
        let plain =
            |kind| if options.is_empty() { Ok(kind) } else { Err(unknown_key(name, options, "no options")) };
        let kind = match name {
            "full" => plain(PolicyKind::Full)?,
            "window" => plain(PolicyKind::Window)?,
            "quest" => plain(PolicyKind::Quest)?,
            "oracle" => plain(PolicyKind::Oracle)?,
            "icecache" => plain(PolicyKind::Icecache)?,
            "hnsw" => plain(PolicyKind::Hnsw)?,
            "int8" => plain(PolicyKind::Quantised(QuantKind::Int8))?,
            "int4" => plain(PolicyKind::Quantised(QuantKind::Int4))?,
            "kivi2" => plain(PolicyKind::Quantised(QuantKind::Kivi2 { residual: KIVI_RESIDUAL }))?,
            "pagemean" => PolicyKind::PageMean(index_options(name, options, IndexOptions::PAGEMEAN)?),
            "floe" => PolicyKind::Floe(index_options(name, options, IndexOptions::FLOE)?),
            _ => return Err(SpecError::Name(name.into())),
        };
        Ok(Self { spec: spec.into(), kind })
    }
}

fn unknown_key(policy: &str, options: &str, known: &'static str) -> SpecError {
    let key = options.split(['=', ',']).next().unwrap_or_default();
    SpecError::Key { policy: policy.into(), key: key.into(), known }
}

fn index_options(policy: &str, options: &str, defaults: IndexOptions) -> Result<IndexOptions, SpecError> {
    let mut parsed = defaults;
    let mut seen: Vec<&str> = Vec::new();
    for option in options.split(',').filter(|o| !o.is_empty()) {
        let (key, value) = option.split_once('=').unwrap_or((option, ""));
        if seen.contains(&key) {
            return Err(SpecError::Twice { policy: policy.into(), key: key.into() });
        }
        seen.push(key);
        let refuse =
            |known| SpecError::Value { policy: policy.into(), key: key.into(), value: value.into(), known };
        match key {
            "tail" => {
                parsed.tail = match value {
                    "off" => Tail::Off,
                    "page" => Tail::Page,
                    "tree" => Tail::Tree,
                    _ => return Err(refuse("off, page, tree")),
                }
            }
            "sketch" => {
                parsed.sketch = value.parse().map_err(|_| refuse("off, k1, k2, k1v1, k2v1, k2v2, k4v2"))?;
            }
            "unit" => {
                parsed.unit = match value {
                    "page" => Unit::Page,
                    "token" => Unit::Token,
                    _ => return Err(refuse("page, token")),
                }
            }
            "open" => {
                let fraction = value.parse::<f32>().ok().filter(|f| *f > 0.0 && *f <= 1.0);
                parsed.open = fraction.ok_or_else(|| refuse("a number in (0, 1]"))?;
            }
            _ => return Err(unknown_key(policy, key, "tail, sketch, unit, open")),
        }
    }
    Ok(parsed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_round_trips_and_sets_the_options() {
        for spec in [
            "full",
            "window",
            "quest",
            "pagemean",
            "oracle",
            "icecache",
            "hnsw",
            "int8",
            "int4",
            "kivi2",
            "floe",
            "floe:tail=off",
            "pagemean:sketch=k1,tail=page",
            "floe:tail=tree,sketch=k2v2,unit=token,open=0.25",
        ] {
            assert_eq!(spec.parse::<Policy>().unwrap().to_string(), spec);
        }
        assert_eq!(*"floe".parse::<Policy>().unwrap().kind(), *Policy::default().kind());
        let PolicyKind::Floe(options) = *"floe:tail=off".parse::<Policy>().unwrap().kind() else {
            unreachable!()
        };
        assert_eq!(options.tail, Tail::Off);
    }

    #[test]
    fn errors_name_policy_option_and_value() {
        for (spec, words) in [
            ("flow", vec!["flow", "unknown name"]),
            ("quest:tail=page", vec!["quest", "tail", "no options"]),
            ("floe:tail=maybe", vec!["floe", "tail", "maybe", "off, page, tree"]),
            ("floe:tial=page", vec!["floe", "tial"]),
            ("floe:sketch=k3", vec!["sketch", "k3", "k2v1"]),
            ("floe:open=0", vec!["open", "`0`", "(0, 1]"]),
            ("pagemean:unit=word", vec!["pagemean", "unit", "word"]),
            ("floe:tail=page,tail=off", vec!["twice"]),
        ] {
            let message = spec.parse::<Policy>().unwrap_err().to_string();
            assert!(words.iter().all(|w| message.contains(w)), "{spec}: {message}");
        }
    }
}
