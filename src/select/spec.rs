//! Policies as users write them: `NAME[:key=value[,key=value]]`, for example `floe:tail=page`.

use std::str::FromStr;

use floe_cuda::cpu::quant::QuantKind;
use floe_index::sketch::SketchConfig;
use floe_index::{DETAIL, Tail, Unit};

use crate::reusing::{CalibratedOptions, MacOptions, ReuseKind};

/// Newest tokens that `kivi2` keeps exact: as many as the default window, within the 32 to 128 that KIVI uses.
const KIVI_RESIDUAL: usize = 64;

/// A policy, with the text it was given as.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    spec: String,
    kind: PolicyKind,
    reuse: ReuseKind,
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
    /// `open_mass`: super-nodes whose average token may hold at most this many times the mass of an average token stay unopened.
    pub open_mass: f32,
    /// `detail`: pages whose average token may hold more than this many times the mass of an average token are told apart into
    /// tokens by the sketch.
    pub detail: f32,
    /// `max_doubt`: a step is exact where the logits that the sketch estimates are off by more than this many nats (standard
    /// deviation of an average token).
    pub max_doubt: f32,
}

/// Between what serves and what does not: the 2-bit sketch of layer 0 of Qwen2.5-Coder-0.5B, whose tail errs by .5 to 1.3, is off by 5.8 and
/// 11.4 nats (1 bit: 10 and 20), all other heads looked at by .4 to 1.5 (1 bit: .7 to 2.7).
const MAX_DOUBT: f32 = 4.0;

impl IndexOptions {
    /// `floe` alone: the most accurate sketch within 17 % of the KV's bytes (bench/README.md has the curve).
    pub const FLOE: Self = Self { tail: Tail::Tree, sketch: SketchConfig::K2V1, ..Self::PAGEMEAN };
    /// `pagemean` alone: top pages, nothing else.
    pub const PAGEMEAN: Self = Self {
        tail: Tail::Off,
        sketch: SketchConfig::OFF,
        unit: Unit::Token,
        open: 1.0,
        open_mass: 0.0,
        detail: DETAIL,
        max_doubt: MAX_DOUBT,
    };
}

/// A policy text that cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// No policy of that name.
    #[error(
        "policy `{0}`: unknown name; known are full, window, quest, pagemean, icecache, hnsw, oracle, floe, int8, int4, kivi2, mac, reuse"
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
    /// Attention over every token.
    #[must_use]
    pub fn full() -> Self {
        Self { spec: "full".into(), kind: PolicyKind::Full, reuse: ReuseKind::Off }
    }

    /// The text as given.
    #[must_use]
    pub fn spec(&self) -> &str {
        &self.spec
    }

    /// What earlier steps may answer for.
    #[must_use]
    pub fn reuse(&self) -> &ReuseKind {
        &self.reuse
    }

    /// The same selection with another reuse. [`crate::Config::validate`] checks its fields.
    #[must_use]
    pub fn with_reuse(self, reuse: ReuseKind) -> Self {
        Self { reuse, ..self }
    }

    /// Whether a step without reuse is exact attention.
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
        Self { spec: "floe".into(), kind: PolicyKind::Floe(IndexOptions::FLOE), reuse: ReuseKind::Off }
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
        let mut reuse = ReuseKind::Off;
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
            "pagemean" => {
                PolicyKind::PageMean(index_options(name, options, (IndexOptions::PAGEMEAN, &mut reuse))?)
            }
            "floe" => PolicyKind::Floe(index_options(name, options, (IndexOptions::FLOE, &mut reuse))?),
            "mac" => {
                reuse = ReuseKind::Mac(mac_options(name, options)?);
                PolicyKind::Full
            }
            "reuse" => {
                reuse = ReuseKind::Calibrated(calibrated_options(name, options)?);
                PolicyKind::Full
            }
            _ => return Err(SpecError::Name(name.into())),
        };
        Ok(Self { spec: spec.into(), kind, reuse })
    }
}

fn unknown_key(policy: &str, options: &str, known: &'static str) -> SpecError {
    let key = options.split(['=', ',']).next().unwrap_or_default();
    SpecError::Key { policy: policy.into(), key: key.into(), known }
}

/// The `key=value` pairs of a policy; a key given twice is refused.
fn pairs<'a>(policy: &'a str, options: &'a str) -> Result<Vec<Pair<'a>>, SpecError> {
    let mut pairs: Vec<Pair<'a>> = Vec::new();
    for option in options.split(',').filter(|o| !o.is_empty()) {
        let (key, value) = option.split_once('=').unwrap_or((option, ""));
        if pairs.iter().any(|pair| pair.key == key) {
            return Err(SpecError::Twice { policy: policy.into(), key: key.into() });
        }
        pairs.push(Pair { policy, key, value });
    }
    Ok(pairs)
}

#[derive(Clone, Copy)]
struct Pair<'a> {
    policy: &'a str,
    key: &'a str,
    value: &'a str,
}

impl Pair<'_> {
    fn refuse(&self, known: &'static str) -> SpecError {
        let (policy, key, value) = (self.policy.into(), self.key.into(), self.value.into());
        SpecError::Value { policy, key, value, known }
    }

    /// The value as a number that `within` holds for.
    fn number<T: FromStr>(&self, known: &'static str, within: impl Fn(&T) -> bool) -> Result<T, SpecError> {
        self.value.parse::<T>().ok().filter(within).ok_or_else(|| self.refuse(known))
    }
}

fn index_options(
    policy: &str,
    options: &str,
    (defaults, reuse): (IndexOptions, &mut ReuseKind),
) -> Result<IndexOptions, SpecError> {
    let mut parsed = defaults;
    let (mut on, mut bound) = (None, None);
    for pair in pairs(policy, options)? {
        match pair.key {
            "tail" => {
                parsed.tail = match pair.value {
                    "off" => Tail::Off,
                    "page" => Tail::Page,
                    "tree" => Tail::Tree,
                    _ => return Err(pair.refuse("off, page, tree")),
                }
            }
            "sketch" => {
                let sketch = pair.value.parse();
                parsed.sketch = sketch.map_err(|_| pair.refuse("off, k1, k2, k1v1, k2v1, k2v2, k4v2"))?;
            }
            "unit" => {
                parsed.unit = match pair.value {
                    "page" => Unit::Page,
                    "token" => Unit::Token,
                    _ => return Err(pair.refuse("page, token")),
                }
            }
            "open" => parsed.open = pair.number("a number in (0, 1]", |f| *f > 0.0 && *f <= 1.0)?,
            "open_mass" => parsed.open_mass = pair.number("a number of at least 0", is_multiple)?,
            "detail" => parsed.detail = pair.number("a number of at least 0", is_multiple)?,
            "max_doubt" => parsed.max_doubt = pair.number("a number of at least 0, or inf", |x| *x >= 0.0)?,
            "reuse" => {
                on = Some(match pair.value {
                    "on" => true,
                    "off" => false,
                    _ => return Err(pair.refuse("on, off")),
                });
            }
            "max_error" => bound = Some((pair, pair.number("a number in (0, 1)", is_share)?)),
            _ => {
                let known = "tail, sketch, unit, open, open_mass, detail, max_doubt, reuse, max_error";
                return Err(unknown_key(policy, pair.key, known));
            }
        }
    }
    match (on, bound) {
        (Some(true), bound) => {
            let defaults = CalibratedOptions::default();
            let max_error = bound.map_or(defaults.max_error, |(_, max_error)| max_error);
            *reuse = ReuseKind::Calibrated(CalibratedOptions { max_error, ..defaults });
        }
        (_, Some((pair, _))) => return Err(pair.refuse("a number only beside reuse=on")),
        (_, None) => {}
    }
    Ok(parsed)
}

fn is_multiple(x: &f32) -> bool {
    *x >= 0.0 && x.is_finite()
}

fn is_share(x: &f32) -> bool {
    *x > 0.0 && *x < 1.0
}

/// Ranges are those of [`ReuseKind::validate`], which has the last word.
fn mac_options(policy: &str, options: &str) -> Result<MacOptions, SpecError> {
    let mut parsed = MacOptions::default();
    for pair in pairs(policy, options)? {
        match pair.key {
            "tau" => parsed.tau = pair.number("a number in [0, 1]", |x| (0.0..=1.0).contains(x))?,
            "ring" => parsed.ring = pair.number("a number of steps", |x| *x > 0)?,
            "band" => parsed.band = pair.number("a number of tokens", |x| *x > 0)?,
            "sinks" => parsed.sinks = pair.number("a number of tokens", |_| true)?,
            "min" => parsed.min_tokens = pair.number("a number of tokens", |_| true)?,
            _ => return Err(unknown_key(policy, pair.key, "tau, ring, band, sinks, min")),
        }
    }
    Ok(parsed)
}

fn calibrated_options(policy: &str, options: &str) -> Result<CalibratedOptions, SpecError> {
    let mut parsed = CalibratedOptions::default();
    for pair in pairs(policy, options)? {
        match pair.key {
            "max_error" => parsed.max_error = pair.number("a number in (0, 1)", is_share)?,
            "lottery" => parsed.lottery = pair.number("a number in [0, 0.5]", |x| (0.0..=0.5).contains(x))?,
            "anchors" => parsed.anchors = pair.number("a number of steps", |x| *x > 0)?,
            "refresh" => parsed.refresh = pair.number("a number of steps", |x| *x > 0)?,
            "labels" => parsed.labels = pair.number("a number of at least 32", |x| *x >= 32)?,
            "min" => parsed.min_tokens = pair.number("a number of tokens", |_| true)?,
            _ => {
                let known = "max_error, lottery, anchors, refresh, labels, min";
                return Err(unknown_key(policy, pair.key, known));
            }
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
            "floe:open_mass=0.1,detail=1,max_doubt=2.5",
            "floe:reuse=on,max_error=0.1",
            "mac",
            "mac:tau=0.75,ring=1024,band=128,sinks=4,min=0",
            "reuse:max_error=0.02,lottery=0.01,anchors=4,refresh=8,labels=128,min=512",
        ] {
            assert_eq!(spec.parse::<Policy>().unwrap().to_string(), spec);
        }
        assert_eq!(*"floe".parse::<Policy>().unwrap().kind(), *Policy::default().kind());
        let PolicyKind::Floe(options) = *"floe:tail=off".parse::<Policy>().unwrap().kind() else {
            unreachable!()
        };
        assert_eq!(options.tail, Tail::Off);
        let reuse = |spec: &str| *spec.parse::<Policy>().unwrap().reuse();
        assert_eq!(reuse("floe:reuse=off"), ReuseKind::Off);
        assert_eq!(reuse("mac:tau=0.45"), ReuseKind::Mac(MacOptions::default()));
        assert_eq!(reuse("reuse:max_error=0.05"), ReuseKind::Calibrated(CalibratedOptions::default()));
        assert_eq!(reuse("pagemean:reuse=on"), ReuseKind::Calibrated(CalibratedOptions::default()));
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
            ("floe:open_mass=-1", vec!["open_mass", "`-1`", "at least 0"]),
            ("floe:max_doubt=-1", vec!["max_doubt", "`-1`", "at least 0"]),
            ("floe:detail=inf", vec!["detail", "`inf`", "at least 0"]),
            ("pagemean:unit=word", vec!["pagemean", "unit", "word"]),
            ("floe:tail=page,tail=off", vec!["twice"]),
            ("floe:reuse=yes", vec!["reuse", "yes", "on, off"]),
            ("floe:max_error=0.1", vec!["max_error", "reuse=on"]),
            ("mac:tau=2", vec!["tau", "`2`", "[0, 1]"]),
            ("mac:tua=2", vec!["mac", "tua", "ring"]),
            ("reuse:max_error=0", vec!["max_error", "(0, 1)"]),
            ("reuse:labels=3", vec!["labels", "32"]),
        ] {
            let message = spec.parse::<Policy>().unwrap_err().to_string();
            assert!(words.iter().all(|w| message.contains(w)), "{spec}: {message}");
        }
    }
}
