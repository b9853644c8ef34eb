//! Recorded attention traces for tests: safetensors files (see the trace format), named by the folder in `FLOE_TRACES`.

use std::path::Path;

/// Keys and queries of one recorded shard.
pub struct Trace {
    /// File name.
    pub name: String,
    /// Coordinates of a key.
    pub dim: usize,
    /// Query heads of the shard.
    pub group: usize,
    /// Softmax scale.
    pub scale: f32,
    /// `[num_tokens, dim]`.
    pub keys: Vec<f32>,
    /// `[num_queries, group, dim]`.
    pub queries: Vec<f32>,
}

impl Trace {
    /// Every trace directly in the folder that `FLOE_TRACES` names, or `None` without that variable.
    pub fn all() -> Option<Vec<Trace>> {
        let folder = std::env::var_os("FLOE_TRACES")?;
        let mut paths: Vec<_> = std::fs::read_dir(folder)
            .expect("FLOE_TRACES names a folder")
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
            .collect();
        paths.sort();
        Some(paths.iter().map(|path| Self::read(path)).collect())
    }

    fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).expect("a readable trace");
        let (length, rest) = bytes.split_at(8);
        let length = u64::from_le_bytes(length.try_into().expect("eight bytes")) as usize;
        let header: serde_json::Value = serde_json::from_slice(&rest[..length]).expect("a JSON header");
        let number = |value: &serde_json::Value| value.as_u64().expect("a number") as usize;
        let tensor = |name: &str| -> Vec<f32> {
            let range = &header[name]["data_offsets"];
            let data = &rest[length..][number(&range[0])..number(&range[1])];
            data.as_chunks::<2>().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect()
        };
        let scale = header["__metadata__"]["softmax_scale"].as_str().expect("a softmax scale");
        Self {
            name: path.file_stem().expect("a file name").to_string_lossy().into_owned(),
            dim: number(&header["k"]["shape"][1]),
            group: number(&header["q"]["shape"][1]),
            scale: scale.parse().expect("a number"),
            keys: tensor("k"),
            queries: tensor("q"),
        }
    }
}
