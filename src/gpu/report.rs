//! What the engine on the device did, and what it holds.

/// What has happened since the engine was opened, or since the counters were cleared (hits, fetches, steps of heads, steps over the link).
#[derive(Debug, Clone, PartialEq)]
pub struct GpuReport {
    /// The device's name.
    pub device: String,
    /// Steps of single layers.
    pub steps: u64,
    /// Of these, exact ones.
    pub exact_steps: u64,
    /// Of the exact ones, those that read rows in host memory, over the link, because the device has no room for them: every such step is
    /// as slow as the link.
    pub link_steps: u64,
    /// Bytes of rows that they read.
    pub bytes_in_place: u64,
    /// How often the rows of a growing sequence moved to a larger place on the device.
    pub rows_moved: u64,
    /// Of all steps, those replayed from a recording.
    pub replayed_steps: u64,
    /// Steps of single kv heads in steps that were not exact.
    pub head_steps: u64,
    /// Of these, those that attended all tokens because their estimates were too coarse.
    pub head_steps_in_doubt: u64,
    /// Retrieved rows that were in their slots.
    pub rows_hit: u64,
    /// Retrieved rows that came from host memory.
    pub rows_fetched: u64,
    /// Their bytes.
    pub bytes_fetched: u64,
    /// Bytes of rows that were brought in for later steps (`GpuOptions::prefetch`).
    pub bytes_prefetched: u64,
    /// When a step is exact, in words.
    pub rule: String,
    /// Work on the host's trees; `None` where pages are runs of tokens.
    pub tree: Option<TreeReport>,
}

/// What was done to the trees of all layers.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct TreeReport {
    /// Threads that work on them.
    pub threads: usize,
    /// Trees that were built: one a kv head and prompt.
    pub builds: u64,
    /// Microseconds of all threads together for them.
    pub build_us: f64,
    /// Batches of tokens that joined a tree later: one a kv head for every sixteen tokens.
    pub batches: u64,
    /// Microseconds of all threads together for them.
    pub batch_us: f64,
    /// Pages that the device built or cleared for them.
    pub batch_pages: u64,
    /// Searches of a tree by the host, and microseconds of all threads together for them.
    pub searches: u64,
    /// See `searches`.
    pub search_us: f64,
    /// Steps of a layer and sequence whose pages were listed for a query older than the step before, because the host was not done.
    pub stale_lists: u64,
    /// Steps of a layer that waited for the threads: the first after a prompt; others only where the host is more than a window
    /// of tokens ahead of the device, or the threads are too slow.
    pub waits: u64,
}

impl GpuReport {
    /// Share of retrieved rows that were in their slots; 1 when none was retrieved.
    #[must_use]
    pub fn hit_rate(&self) -> f64 {
        let all = self.rows_hit + self.rows_fetched;
        if all == 0 { 1.0 } else { self.rows_hit as f64 / all as f64 }
    }

    /// Share of the heads' steps that attended all tokens because their estimates were too coarse; 0 before the first.
    #[must_use]
    pub fn doubt_rate(&self) -> f64 {
        self.head_steps_in_doubt as f64 / self.head_steps.max(1) as f64
    }
}

/// What a step did for one kv head of one sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct LastStep {
    /// Whether all tokens were attended.
    pub exact: bool,
    /// Whether that was because the estimates of a selection would have been too coarse (`max_doubt`).
    pub in_doubt: bool,
    /// Positions that retrieval picked, ascending.
    pub retrieved: Vec<u32>,
    /// lse of the exactly attended tokens alone, `[group]`.
    pub exact_lse: Vec<f32>,
}

/// Bytes of an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GpuMemory {
    /// Rows on the device, all layers: the hot tier.
    pub rows_bytes: usize,
    /// Rows of a layer that belong to no sequence.
    pub rows_free: usize,
    /// Summaries, sketches, slot tables and scores on the device, all layers.
    pub summary_bytes: usize,
    /// Page-locked host memory: the warm tier.
    pub host_bytes: usize,
}
