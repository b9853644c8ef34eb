//! Decode reuse on real queries: the bundled trace, and every trace in the folder that `FLOE_TRACES` names.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking and says why it is skipped"
)]

use std::path::{Path, PathBuf};

use floe::replay::{DecodeFrom, ReplayPlan, ReuseRow, replay, reuse_rows};
use floe::trace::Trace;

/// A held-out 95th percentile may be above the bound by one part in ten: it is an estimate itself.
const SLACK: f64 = 1.1;

const BUNDLED: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/qwen2.5-coder-1.5b_persuasion-8k_L20H0.safetensors");

fn rows(path: &Path, policies: &[&str]) -> Vec<ReuseRow> {
    let parsed = policies.iter().map(|p| p.parse().unwrap()).collect();
    let plan =
        ReplayPlan { decode_from: DecodeFrom::FirstQuery, threads: 2, ..ReplayPlan::new(parsed, vec![256]) };
    let rows = reuse_rows(&replay(&Trace::open(path).unwrap(), &plan, &|| {}).unwrap());
    assert_eq!(rows.len(), policies.len());
    rows
}

/// The long traces and the short ones, where there is a folder of them.
fn traces() -> Vec<PathBuf> {
    let Some(folder) = std::env::var_os("FLOE_TRACES") else {
        println!("only the bundled trace: FLOE_TRACES is not set to the folder of the long traces");
        return Vec::new();
    };
    let (mut folders, mut found) = (vec![PathBuf::from(folder)], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "safetensors") {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

/// Share of (query, head) with an earlier query among the last `ring` below the published distance, in f64.
fn match_rate(path: &Path, ring: usize, tau: f64) -> f64 {
    let trace = Trace::open(path).unwrap();
    let meta = trace.meta();
    let (group, dim) = (meta.group(), meta.head_dim);
    let queries: Vec<Vec<f64>> = (0..meta.num_queries)
        .map(|i| trace.query_pre(i).iter().map(|x| f64::from(x.to_f32())).collect())
        .collect();
    let bound = 2.0 * dim as f64 * (1.0 - tau).powi(2);
    let mut matched = 0;
    for (i, q) in queries.iter().enumerate() {
        for head in 0..group {
            let of = head * dim..(head + 1) * dim;
            let near = queries[i.saturating_sub(ring)..i].iter().any(|then| {
                let mut square = 0.0;
                then[of.clone()].iter().zip(&q[of.clone()]).all(|(a, b)| {
                    square += (a - b) * (a - b);
                    square < bound
                })
            });
            matched += usize::from(near);
        }
    }
    matched as f64 / (queries.len() * group) as f64
}

#[test]
fn mac_matches_as_often_as_a_count_over_all_pairs() {
    for path in traces().iter().map(PathBuf::as_path).chain([Path::new(BUNDLED)]) {
        let rows = rows(path, &["mac:tau=0.45", "mac:tau=0.75"]);
        for (row, tau) in rows.iter().zip([0.45, 0.75]) {
            let counted = match_rate(path, 512, tau);
            assert!((row.match_rate - counted).abs() < 0.005, "{path:?} {tau}: {} {counted}", row.match_rate);
        }
        // Thresholds that match this often are not safe, which is why they are not the default.
        assert!(rows[0].reuse_rate < 0.1 || rows[0].reused_error.p95 > 0.1, "{path:?}: {:?}", rows[0]);
    }
}

#[test]
fn calibrated_keeps_its_bound_on_held_out_steps() {
    let policies = ["reuse:max_error=0.02", "reuse:max_error=0.05", "reuse:max_error=0.1"];
    for path in traces().iter().map(PathBuf::as_path).chain([Path::new(BUNDLED)]) {
        for (row, bound) in rows(path, &policies).iter().zip([0.02, 0.05, 0.1]) {
            let p95 = row.held_out_error.p95;
            assert!(p95 <= SLACK * bound, "{path:?}: p95 {p95} on held-out steps at {bound}");
            assert!(row.error.p95 <= SLACK * bound && row.lineage_max <= 1, "{path:?}: {row:?}");
        }
    }
}

#[test]
fn calibrated_spares_bytes_on_the_bundled_trace() {
    let row = &rows(Path::new(BUNDLED), &["reuse:max_error=0.1"])[0];
    assert!(row.reuse_rate > 0.3 && row.bytes_share < 0.85, "{row:?}");
}
