//! What the decode steps of a sequence did, added up, and the last step in detail.

use std::collections::BTreeMap;

use floe::step::{Stage, StepReport};
use floe::transfer::Fetched;
use serde_json::{Value, json};

/// Sums over the decode steps of one sequence. A step is one token of one layer.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    steps: u64,
    shards: u64,
    tokens_attended: u64,
    kv_bytes_read: u64,
    index_bytes_read: u64,
    full_kv_bytes: u64,
    fetched: Fetched,
    stage_ns: [u64; Stage::ALL.len()],
    paths: BTreeMap<String, u64>,
}

impl Metrics {
    /// Adds one step. `full_kv_bytes`: what attention over every token would have read.
    pub fn add(&mut self, report: &StepReport, full_kv_bytes: usize) {
        self.steps += 1;
        self.full_kv_bytes += full_kv_bytes as u64;
        for shard in &report.shards {
            self.shards += 1;
            self.tokens_attended += shard.tokens_attended as u64;
            self.kv_bytes_read += shard.kv_bytes_read as u64;
            self.index_bytes_read += shard.index_bytes_read as u64;
            self.fetched.add(&shard.fetched);
            self.stage_ns.iter_mut().zip(shard.stages.ns).for_each(|(sum, ns)| *sum += ns);
            *self.paths.entry(snake_case(&format!("{:?}", shard.path))).or_default() += 1;
        }
    }

    /// The sums under their names.
    pub fn to_json(&self) -> Value {
        json!({
            "steps": self.steps,
            "tokens_attended_mean": (self.shards > 0).then(|| self.tokens_attended as f64 / self.shards as f64),
            "kv_bytes_read": self.kv_bytes_read,
            "index_bytes_read": self.index_bytes_read,
            "full_kv_bytes": self.full_kv_bytes,
            "hot_requests": self.fetched.requests,
            "hot_hits": self.fetched.hits,
            "hit_rate": hit_rate(&self.fetched),
            "bytes_moved": self.fetched.bytes,
            "units_ahead": self.fetched.ahead,
            "units_in_place": self.fetched.in_place,
            "paths": self.paths,
            "stage_ns": stages(&self.stage_ns),
        })
    }
}

/// One step, kv head by kv head.
pub fn step_json(report: &StepReport) -> Value {
    let shards = report.shards.iter().map(|shard| {
        json!({
            "path": snake_case(&format!("{:?}", shard.path)),
            "tokens_attended": shard.tokens_attended,
            "retrieved": shard.retrieved,
            "pages_touched": shard.pages_touched,
            "kv_bytes_read": shard.kv_bytes_read,
            "index_bytes_read": shard.index_bytes_read,
            "hit_rate": hit_rate(&shard.fetched),
            "bytes_moved": shard.fetched.bytes,
            "stage_ns": stages(&shard.stages.ns),
        })
    });
    Value::Array(shards.collect())
}

/// `None` without a hot tier.
fn hit_rate(fetched: &Fetched) -> Option<f64> {
    (fetched.requests > 0).then(|| fetched.hits as f64 / fetched.requests as f64)
}

fn stages(ns: &[u64]) -> Value {
    Stage::ALL.iter().zip(ns).map(|(stage, ns)| (stage.name().to_owned(), json!(ns))).collect()
}

/// `ExactWithinBudget` as `exact_within_budget`.
fn snake_case(name: &str) -> String {
    let mut snake = String::with_capacity(name.len() + 4);
    for (i, letter) in name.chars().enumerate() {
        if letter.is_uppercase() && i > 0 {
            snake.push('_');
        }
        snake.extend(letter.to_lowercase());
    }
    snake
}
