//! Saving a sequence to a page file, restoring it without prefill, and forking it without a copy.

use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::Engine;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::ids::SeqId;
use crate::page::file::{FileError, FsStorage, PageFile, PageFileWriter, SlabName, Storage};
use crate::page::{LentSlab, ShardPages};
use crate::sequence::Sequence;

/// Value of the `kind` field of a saved sequence.
pub const SEQUENCE_KIND: &str = "floe-sequence/1";

/// What a saved sequence says of itself, in the manifest of its page file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SavedSequence {
    /// [`SEQUENCE_KIND`].
    pub kind: String,
    /// Name of the model; empty when the engine was given none.
    #[serde(default)]
    pub model: String,
    /// Layers of the model.
    pub num_layers: usize,
    /// Query heads of a layer.
    pub num_q_heads: usize,
    /// kv heads of a layer.
    pub num_kv_heads: usize,
    /// Elements of a key.
    pub head_dim: usize,
    /// Element type of the rows.
    pub kv_dtype: String,
    /// Selection policy; its index is in the file.
    pub policy: String,
    /// Earlier states that steps may reuse are in the file where this is the engine's own kind of reuse.
    #[serde(default)]
    pub reuse: String,
    /// First tokens, always attended.
    pub sinks: usize,
    /// Last tokens, always attended.
    pub window: usize,
    /// Seed of the policy's random parts.
    pub seed: u64,
    /// Tokens of each layer.
    pub num_tokens: Vec<usize>,
    /// Tokens known to the selector of each shard, layers outermost.
    pub published: Vec<usize>,
}

impl SavedSequence {
    /// A sequence of so many tokens in each layer, of which the selectors of the shards know `published`, layers outermost.
    pub(crate) fn of(config: &Config, num_tokens: Vec<usize>, published: Vec<usize>) -> Self {
        Self {
            kind: SEQUENCE_KIND.into(),
            model: config.model.clone(),
            num_layers: config.num_layers,
            num_q_heads: config.heads.num_q_heads(),
            num_kv_heads: config.heads.num_kv_heads(),
            head_dim: config.heads.head_dim(),
            kv_dtype: config.kv_dtype.to_string(),
            policy: config.policy.spec().to_owned(),
            reuse: reuse_settings(config),
            sinks: config.sinks,
            window: config.window,
            seed: config.seed,
            num_tokens,
            published,
        }
    }

    /// As the free fields of the manifest of `path`.
    pub(crate) fn fields(&self, path: &Path) -> std::result::Result<serde_json::Value, FileError> {
        serde_json::to_value(self).map_err(|error| {
            let (path, source) = (path.to_path_buf(), std::io::Error::other(error));
            FileError::Io { path, action: "encode", source }
        })
    }

    /// What a page file says of the sequence in it.
    ///
    /// # Errors
    /// [`FileError::Format`] when it holds no sequence.
    pub fn read(file: &PageFile, path: &Path) -> std::result::Result<Self, FileError> {
        let refuse = |reason: String| FileError::Format { path: path.to_path_buf(), field: "fields", reason };
        let saved: Self = serde_json::from_value(file.manifest().fields.clone())
            .map_err(|error| refuse(format!("no saved sequence: {error}")))?;
        if saved.kind != SEQUENCE_KIND {
            return Err(refuse(format!("kind {:?}; this program reads {SEQUENCE_KIND:?}", saved.kind)));
        }
        Ok(saved)
    }

    /// Whether an index saved under these settings answers as one built under `config` would.
    fn same_index(&self, config: &Config) -> bool {
        self.policy == config.policy.spec() && self.sinks == config.sinks && self.seed == config.seed
    }

    /// Whether earlier states saved under these settings are what steps under `config` would have left.
    fn same_reuse(&self, config: &Config) -> bool {
        let same_selection = config.policy.is_exact() || self.same_index(config);
        same_selection
            && self.reuse == reuse_settings(config)
            && (self.sinks, self.window) == (config.sinks, config.window)
    }

    /// Refuses another model's shape.
    pub(crate) fn check(&self, config: &Config, path: &Path) -> Result<()> {
        let named = !self.model.is_empty() && !config.model.is_empty();
        let model = if named { &self.model } else { &config.model };
        let own = [
            ("model", model.clone(), config.model.clone()),
            ("num_layers", self.num_layers.to_string(), config.num_layers.to_string()),
            ("num_q_heads", self.num_q_heads.to_string(), config.heads.num_q_heads().to_string()),
            ("num_kv_heads", self.num_kv_heads.to_string(), config.heads.num_kv_heads().to_string()),
            ("head_dim", self.head_dim.to_string(), config.heads.head_dim().to_string()),
            ("kv_dtype", self.kv_dtype.clone(), config.kv_dtype.to_string()),
        ];
        let shards = config.num_layers * config.heads.num_kv_heads();
        let format =
            |field, reason| Err(FileError::Format { path: path.to_path_buf(), field, reason }.into());
        if let Some((field, saved, wanted)) = own.into_iter().find(|(_, saved, wanted)| saved != wanted) {
            return format(field, format!("{saved} was saved, the engine has {wanted}"));
        }
        if self.num_tokens.len() != config.num_layers || self.published.len() != shards {
            return format("num_tokens", "a number a layer and shard expected".into());
        }
        Ok(())
    }
}

fn reuse_settings(config: &Config) -> String {
    format!("{:?}", config.policy.reuse())
}

fn has_blob(file: &PageFile, name: &str) -> bool {
    file.manifest().blobs.iter().any(|blob| blob.name == name)
}

impl Engine {
    /// Writes a whole sequence to `path`: pages, index, positions. The file appears complete or not at all; an older one is
    /// replaced. Returns its bytes. After `Ok` it survives a crash.
    ///
    /// # Errors
    /// Unknown sequence, a file that cannot be written, a cold page that is damaged.
    pub fn save(&self, seq: SeqId, path: &Path) -> Result<u64> {
        self.save_to(&FsStorage, seq, path)
    }

    /// [`Self::save`] to a storage of the caller's.
    ///
    /// # Errors
    /// As [`Self::save`].
    pub fn save_to(&self, storage: &dyn Storage, seq: SeqId, path: &Path) -> Result<u64> {
        let sequence = self.sequences.get(&seq).ok_or(Error::UnknownSequence(seq))?;
        let mut writer = PageFileWriter::create(storage, path, 0)?;
        for (shard, parts) in (0u32..).zip(sequence.layers.iter().flat_map(|layer| &layer.shards)) {
            let page_bytes = parts.pages.shape().page_bytes();
            parts.pages.verify(0..parts.pages.num_tokens() as u32)?;
            for slab in 0..parts.pages.num_slabs() {
                let (rows, bytes) = parts.pages.slab_bytes(slab);
                writer.slab(SlabName { shard, slab: slab as u32, rows }, page_bytes, bytes)?;
            }
            if let Some(index) = parts.selector.snapshot() {
                writer.blob(format!("index/{shard}"), &index)?;
            }
            if let Some(reuse) = parts.reuse.snapshot() {
                writer.blob(format!("reuse/{shard}"), &reuse)?;
            }
        }
        let num_tokens = sequence.layers.iter().map(|layer| layer.num_tokens).collect();
        let shards = sequence.layers.iter().flat_map(|layer| &layer.shards);
        let saved =
            SavedSequence::of(&self.config, num_tokens, shards.map(|shard| shard.published).collect());
        Ok(writer.finish(saved.fields(path)?)?)
    }

    /// Opens a sequence from `path` as a new one. The file is mapped: a page is read, and checked, when a step first needs
    /// it; new tokens go to memory. An index saved under another policy, seed or number of sinks is built anew from the rows
    /// by the first step. The file must not be changed in place while the sequence is open.
    ///
    /// # Errors
    /// A file that cannot be read, is damaged, or holds another model's shape.
    pub fn restore(&mut self, path: &Path) -> Result<SeqId> {
        self.restore_from(&FsStorage, path)
    }

    /// [`Self::restore`] from a storage of the caller's.
    ///
    /// # Errors
    /// As [`Self::restore`].
    pub fn restore_from(&mut self, storage: &dyn Storage, path: &Path) -> Result<SeqId> {
        let file = PageFile::open(storage, path)?;
        let saved = SavedSequence::read(&file, path)?;
        saved.check(&self.config, path)?;
        let mut sequence = Sequence::new(&self.config, &self.memory)?;
        let num_kv_heads = self.config.heads.num_kv_heads();
        let num_shards = saved.published.len();
        let mut slabs: Vec<Vec<(u32, Arc<dyn LentSlab>)>> = vec![Vec::new(); num_shards];
        let format =
            |field, reason| Error::from(FileError::Format { path: path.to_path_buf(), field, reason });
        for entry in &file.manifest().slabs {
            let of_shard = slabs.get_mut(entry.shard as usize);
            let of_shard =
                of_shard.ok_or_else(|| format("slabs", format!("shard {} of {num_shards}", entry.shard)))?;
            if entry.slab as usize != of_shard.len() {
                return Err(format(
                    "slabs",
                    format!("shard {}: slab {} is out of order", entry.shard, entry.slab),
                ));
            }
            of_shard.push((entry.rows, file.slab(entry)));
        }
        for (shard, slabs) in slabs.into_iter().enumerate() {
            let layer = &mut sequence.layers[shard / num_kv_heads];
            layer.num_tokens = saved.num_tokens[shard / num_kv_heads];
            let parts = &mut layer.shards[shard % num_kv_heads];
            let shape = parts.pages.shape();
            parts.pages = ShardPages::from_lent(shape, &self.memory, slabs)
                .ok_or_else(|| format("slabs", format!("shard {shard}: a slab has the wrong size")))?;
            let (rows, published) = (parts.pages.num_tokens(), saved.published[shard]);
            if rows != layer.num_tokens || published > rows {
                let reason =
                    format!("shard {shard}: {rows} rows, {published} published, {} tokens", layer.num_tokens);
                return Err(format("num_tokens", reason));
            }
            parts.first_batch = published;
            let name = format!("reuse/{shard}");
            if saved.same_reuse(&self.config)
                && has_blob(&file, &name)
                && !parts.reuse.restore(file.blob(&name)?)
            {
                return Err(format("blobs", format!("{name} is no cache of earlier states of this shape")));
            }
            // An entry that saw a token which the file does not hold is of no use.
            parts.reuse.truncate(rows as u32);
            let name = format!("index/{shard}");
            if has_blob(&file, &name) && saved.same_index(&self.config) {
                let index = file.blob(&name)?;
                parts.selector = parts.selector.restored(index, published as u32)?.into();
                parts.published = published;
            }
        }
        Ok(self.insert(sequence))
    }

    /// Opens a new sequence with the contents of `seq`. Pages and indexes are shared until one side changes them: a page is
    /// copied when one side writes to it, an index when tokens join or leave it. Closing in any order is safe.
    ///
    /// # Errors
    /// Unknown sequence.
    pub fn fork(&mut self, seq: SeqId) -> Result<SeqId> {
        let sequence = self.sequences.get(&seq).ok_or(Error::UnknownSequence(seq))?;
        let fork = sequence.fork(&self.config);
        Ok(self.insert(fork))
    }

    fn insert(&mut self, sequence: Sequence) -> SeqId {
        let seq = SeqId(self.next_seq);
        self.next_seq += 1;
        self.sequences.insert(seq, sequence);
        seq
    }
}
