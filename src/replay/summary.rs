//! Rows of the report: one per trace, segment, policy and budget.

use serde::Serialize;

use super::{Run, TraceReplay};

/// Value of the report's `schema` field. Later versions add fields and never rename them.
pub const REPLAY_SCHEMA: &str = "floe-replay/1";

/// One row of the JSON report. Errors are relative, masses and recalls shares in 0..=1; tokens and bytes are means per
/// step and kv head.
#[derive(Clone, Debug, Serialize)]
pub struct ReplayRow {
    /// File name of the trace, or `average`.
    pub trace: String,
    /// Segment of the trace.
    pub segment: String,
    /// Policy as given.
    pub policy: String,
    /// Tokens that may be attended exactly.
    pub budget: usize,
    /// Measured steps.
    pub steps: usize,
    /// Mean over steps and query heads of `|o - o_full| / |o_full|`.
    pub mean_error: f64,
    /// 95th percentile of the same.
    pub p95_error: f64,
    /// 99th percentile of the same.
    pub p99_error: f64,
    /// Mean attention mass on the exactly attended tokens.
    pub mass_kept: f64,
    /// Mean share of the exact top tokens that were retrieved.
    pub recall: f64,
    /// Tokens attended exactly.
    pub tokens_read: f64,
    /// Bytes read in all: keys and values attended exactly, and whatever the policy read beside them.
    pub bytes_read: f64,
    /// The part of `bytes_read` that is keys and values attended exactly.
    pub kv_bytes_read: f64,
    /// Warm pages that hold the attended tokens.
    pub pages_read: f64,
    /// Bytes kept beside the exact keys and values, as a share of them.
    pub index_share: f64,
}

/// The rows of one trace: runs in order, segments inside.
#[must_use]
pub fn summarise(replay: &TraceReplay) -> Vec<ReplayRow> {
    let mut rows = Vec::with_capacity(replay.runs.len() * replay.segments.len());
    for run in &replay.runs {
        for (segment, name) in replay.segments.iter().enumerate() {
            let steps: Vec<usize> =
                (0..replay.steps.len()).filter(|&i| replay.steps[i].segment == segment).collect();
            if !steps.is_empty() {
                rows.push(row(&replay.trace, name, run, &steps));
            }
        }
    }
    rows
}

fn row(trace: &str, segment: &str, run: &Run, steps: &[usize]) -> ReplayRow {
    let group = run.errors.len() / run.recall.len();
    let per_head = |values: &[f32]| -> Vec<f64> {
        steps.iter().flat_map(|&i| &values[i * group..(i + 1) * group]).map(|x| f64::from(*x)).collect()
    };
    let per_step = |values: &[usize]| mean(steps.iter().map(|&i| values[i] as f64));
    let mut errors = per_head(&run.errors);
    errors.sort_by(f64::total_cmp);
    let (kv, index) = (per_step(&run.kv_bytes_read), per_step(&run.index_bytes_read));
    ReplayRow {
        trace: trace.into(),
        segment: segment.into(),
        policy: run.policy.clone(),
        budget: run.budget,
        steps: steps.len(),
        mean_error: mean(errors.iter().copied()),
        p95_error: percentile(&errors, 0.95),
        p99_error: percentile(&errors, 0.99),
        mass_kept: mean(per_head(&run.mass_kept).into_iter()),
        recall: mean(steps.iter().map(|&i| f64::from(run.recall[i]))),
        tokens_read: per_step(&run.tokens_read),
        bytes_read: kv + index,
        kv_bytes_read: kv,
        pages_read: per_step(&run.pages_read),
        index_share: run.index_bytes as f64 / run.kv_bytes.max(1) as f64,
    }
}

/// Rows averaged over the traces that have them: every trace counts the same, whatever its number of steps.
#[must_use]
pub fn average(rows: &[ReplayRow]) -> Vec<ReplayRow> {
    let mut groups: Vec<Vec<&ReplayRow>> = Vec::new();
    for row in rows {
        let same = |g: &&mut Vec<&ReplayRow>| {
            (&g[0].segment, &g[0].policy, g[0].budget) == (&row.segment, &row.policy, row.budget)
        };
        match groups.iter_mut().find(same) {
            Some(group) => group.push(row),
            None => groups.push(vec![row]),
        }
    }
    groups
        .iter()
        .map(|group| {
            let over = |f: fn(&ReplayRow) -> f64| mean(group.iter().map(|r| f(r)));
            ReplayRow {
                trace: "average".into(),
                segment: group[0].segment.clone(),
                policy: group[0].policy.clone(),
                budget: group[0].budget,
                steps: group.iter().map(|r| r.steps).sum(),
                mean_error: over(|r| r.mean_error),
                p95_error: over(|r| r.p95_error),
                p99_error: over(|r| r.p99_error),
                mass_kept: over(|r| r.mass_kept),
                recall: over(|r| r.recall),
                tokens_read: over(|r| r.tokens_read),
                bytes_read: over(|r| r.bytes_read),
                kv_bytes_read: over(|r| r.kv_bytes_read),
                pages_read: over(|r| r.pages_read),
                index_share: over(|r| r.index_share),
            }
        })
        .collect()
}

pub(super) fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, n) = values.fold((0.0, 0usize), |(sum, n), x| (sum + x, n + 1));
    if n == 0 { 0.0 } else { sum / n as f64 }
}

/// Percentile with linear interpolation between neighbours (numpy's default), of ascending values.
pub(super) fn percentile(sorted: &[f64], share: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
    let place = share * last as f64;
    let (low, high) = (place.floor() as usize, place.ceil() as usize);
    sorted[low] + (sorted[high] - sorted[low]) * (place - low as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentile_interpolates_like_numpy() {
        let values = [1.0, 2.0, 3.0, 4.0, 10.0];
        assert_eq!(percentile(&values, 0.0), 1.0);
        assert_eq!(percentile(&values, 1.0), 10.0);
        assert!((percentile(&values, 0.95) - 8.8).abs() < 1e-12);
        assert_eq!(percentile(&[], 0.5), 0.0);
    }
}
