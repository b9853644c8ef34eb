//! What the user asks for, and its validation.

use std::path::PathBuf;

use crate::error::{Error, Result};
use crate::page::Unit;
use crate::policy::{EvictionKind, PrefetchKind};
use crate::select::Policy;
use crate::shape::{HeadShape, KvDtype, PAGE_TOKENS};

/// Slots of one kv head at most: row numbers within the slots' memory must fit 31 bits.
const SLOTS_MAX: usize = 1 << 26;

/// Where attention runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backend {
    /// [`crate::Engine`], on the CPU.
    #[default]
    Cpu,
    /// `floe::gpu::GpuEngine`, on a CUDA device; needs the feature `cuda` and a driver.
    Cuda,
}

impl std::str::FromStr for Backend {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda),
            _ => Err(Error::config("backend", name, "must be cpu or cuda")),
        }
    }
}

impl std::fmt::Display for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
        })
    }
}

/// Hot tier of every kv head. What is hot never changes a result, only time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HotConfig {
    /// Slots of one unit each; 0 = no hot tier, attention reads the warm tier where it lies. On the CPU backend that is the
    /// quickest, since slots are host memory too.
    pub slots: usize,
    /// What one slot holds.
    pub unit: Unit,
    /// Which units give way.
    pub eviction: EvictionKind,
    /// What is brought in before it is asked for.
    pub prefetch: PrefetchKind,
}

/// Cold tier: where keys and values go that memory has no room for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ColdConfig {
    /// Folder of the cold files; must exist. They are removed when the engine is dropped.
    pub folder: PathBuf,
    /// Which slabs give way first, by what steps used.
    pub eviction: EvictionKind,
    /// Slabs that a step may ask to be read ahead: those on disk that the next layer's last step used. 0 = none.
    pub read_ahead: usize,
}

impl ColdConfig {
    /// Files in `folder`, the default eviction policy, four slabs read ahead a step.
    #[must_use]
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into(), eviction: EvictionKind::default(), read_ahead: 4 }
    }
}

/// Configuration of an [`crate::Engine`]. [`Config::new`] gives the defaults; every field may be changed before
/// `Engine::open`, which validates all of them.
#[derive(Clone, Debug)]
pub struct Config {
    /// Name of the model; a saved sequence says it, and one of another name is not restored. Empty = unnamed, any fits.
    pub model: String,
    /// Attention layers of the model.
    pub num_layers: usize,
    /// Heads of every layer.
    pub heads: HeadShape,
    /// Element type in which keys and values are stored; other types are rounded to it when they are appended.
    pub kv_dtype: KvDtype,
    /// How tokens are selected.
    pub policy: Policy,
    /// Tokens attended exactly per kv head and step: sinks, window and retrieved ones together.
    pub budget: usize,
    /// First tokens, always attended.
    pub sinks: usize,
    /// Last tokens, always attended, the step's own included.
    pub window: usize,
    /// The first layers that stay dense, whatever the policy.
    pub dense_layers: usize,
    /// Hot tier of every kv head.
    pub hot: HotConfig,
    /// Bytes of warm keys and values, all sequences together; what forks share counts once. With a cold tier slabs above
    /// it are written out; without one, tokens that do not fit are refused. `None` = as much as the machine has.
    pub warm_limit_bytes: Option<usize>,
    /// Cold tier; `None` = everything stays in memory.
    pub cold: Option<ColdConfig>,
    /// Tokens that each layer attends at most, the query's own included: models with sliding-window layers. Such a layer
    /// is attended exactly over its span, whatever the policy. Empty = no layer is limited, else `[num_layers]`.
    pub spans: Vec<Option<usize>>,
    /// Own worker threads; 0 = the rayon pool that the caller is in, else one that all engines of the process share (a
    /// thread per core, or as many as `RAYON_NUM_THREADS` says). A host engine that is itself inside a pool so saves a change of threads a call.
    pub threads: usize,
    /// Seed of everything random: projections, rotations, sampling.
    pub seed: u64,
}

impl Config {
    /// Defaults of DESIGN section 5 around a model's shape: policy `floe`, 256 tokens, 16 sinks, 64 window.
    #[must_use]
    pub fn new(num_layers: usize, heads: HeadShape, kv_dtype: KvDtype) -> Self {
        Self {
            model: String::new(),
            num_layers,
            heads,
            kv_dtype,
            policy: Policy::default(),
            budget: 256,
            sinks: 16,
            window: 64,
            dense_layers: 0,
            hot: HotConfig::default(),
            warm_limit_bytes: None,
            cold: None,
            spans: Vec::new(),
            threads: 0,
            seed: 0,
        }
    }

    /// Checks every field against the others.
    ///
    /// # Errors
    /// [`Error::Config`] naming the first field that is out of range.
    pub fn validate(&self) -> Result<()> {
        self.policy.reuse().validate()?;
        if self.num_layers == 0 {
            return Err(Error::config("num_layers", self.num_layers, "must be at least 1"));
        }
        if self.window < PAGE_TOKENS {
            // Tokens join the index sixteen at a time and must still be inside the window then (invariant 4).
            return Err(Error::config("window", self.window, format!("must be at least {PAGE_TOKENS}")));
        }
        if self.sinks > u32::MAX as usize / 2 {
            return Err(Error::config("sinks", self.sinks, "must fit 31 bits"));
        }
        if self.window > u32::MAX as usize / 2 {
            return Err(Error::config("window", self.window, "must fit 31 bits"));
        }
        if self.budget < self.sinks + self.window {
            return Err(Error::config(
                "budget",
                self.budget,
                format!("must hold {} sinks and {} window tokens", self.sinks, self.window),
            ));
        }
        if self.dense_layers > self.num_layers {
            return Err(Error::config(
                "dense_layers",
                self.dense_layers,
                format!("the model has {} layers", self.num_layers),
            ));
        }
        if self.hot.slots > SLOTS_MAX {
            return Err(Error::config("hot.slots", self.hot.slots, format!("must be at most {SLOTS_MAX}")));
        }
        if !self.spans.is_empty() && self.spans.len() != self.num_layers {
            let got = format!("{} layers", self.spans.len());
            return Err(Error::config(
                "spans",
                got,
                format!("must be empty or have {} layers", self.num_layers),
            ));
        }
        if let Some(layer) = self.spans.iter().position(|span| *span == Some(0)) {
            return Err(Error::config("spans", 0, format!("layer {layer} must attend at least 1 token")));
        }
        if self.threads > 4096 {
            return Err(Error::config("threads", self.threads, "must be at most 4096"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_bad_field_is_named() {
        let heads = HeadShape::new(4, 2, 64).unwrap();
        let ok = Config::new(2, heads, KvDtype::Bf16);
        assert!(ok.validate().is_ok());
        let hot = HotConfig { slots: 1 << 30, ..HotConfig::default() };
        let cases: [(&str, Config); 9] = [
            ("hot.slots", Config { hot, ..ok.clone() }),
            ("num_layers", Config { num_layers: 0, ..ok.clone() }),
            ("window", Config { window: 15, ..ok.clone() }),
            ("budget", Config { budget: 79, ..ok.clone() }),
            ("dense_layers", Config { dense_layers: 3, ..ok.clone() }),
            ("spans", Config { spans: vec![None], ..ok.clone() }),
            ("spans", Config { spans: vec![None, Some(0)], ..ok.clone() }),
            ("threads", Config { threads: 5000, ..ok.clone() }),
            ("sinks", Config { sinks: 1 << 40, ..ok.clone() }),
        ];
        for (field, config) in cases {
            let message = config.validate().unwrap_err().to_string();
            assert!(message.contains(&format!("`{field}`")), "{field}: {message}");
        }
    }
}
