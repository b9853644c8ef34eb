//! Times the sketch kernels on one core: `cargo run --release -p floe-index --example sketch_speed [tokens]`.
//!
//! Every row is the median of repeated whole-context scans, beside the machine's own read and copy bandwidth in the same run.
#![allow(clippy::print_stdout, reason = "a measurement prints its table")]

use std::hint::black_box;
use std::time::Instant;

use floe_index::simd::{Isa, exp};
use floe_index::sketch::{EncodeScratch, Pairs, PreparedQuery, Sketch, SketchConfig, Weights};
use floe_index::{IndexError, Query};

const DIM: usize = 128;
const REPEATS: usize = 21;

/// Median seconds of a call.
fn median(mut call: impl FnMut()) -> f64 {
    let mut seconds: Vec<f64> = (0..REPEATS)
        .map(|_| {
            let start = Instant::now();
            call();
            start.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    seconds[REPEATS / 2]
}

/// Sums of twelve uniform numbers: near enough to Gaussian for timing.
fn noise(n: usize) -> Vec<f32> {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u32 << 24) as f32
    };
    (0..n).map(|_| (0..12).map(|_| next()).sum::<f32>() - 6.0).collect()
}

fn row(what: &str, seconds: f64, tokens: usize, bytes: f64) {
    println!("| {what:26} | {:8.2} | {:8.1} |", seconds * 1e9 / tokens as f64, bytes / seconds / 1e9);
}

fn main() -> Result<(), IndexError> {
    let tokens = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(128 * 1024);
    let pages: Vec<u32> = (0..tokens as u32 / 16).collect();
    println!("dim {DIM}, {tokens} tokens; bandwidth counts code and scale bytes\n");
    println!("| what                       | ns/token |     GB/s |\n|---|---|---|");
    let from = vec![1u64; 32 << 20];
    let mut to = vec![0u64; 32 << 20];
    let size_bytes = (from.len() * 8) as f64;
    let read = median(|| {
        black_box(black_box(&from[..]).iter().fold(0u64, |sum, x| sum.wrapping_add(*x)));
    });
    row("read 256 MiB, per 256 B", read, from.len() / 32, size_bytes);
    let copy = median(|| black_box(&mut to[..]).copy_from_slice(black_box(&from[..])));
    row("copy 256 MiB, per 256 B", copy, from.len() / 32, 2.0 * size_bytes);

    let residuals = noise(1024 * DIM);
    let rows = |slot: usize| &residuals[slot % 1024 * DIM..][..DIM];
    for isa in Isa::all_available().into_iter().skip(1) {
        println!("| {isa:?} | | |");
        for name in ["k1", "k2", "k4v2", "k1v1"] {
            let Ok(config) = name.parse::<SketchConfig>() else { continue };
            let mut sketch = Sketch::new(config, DIM, 1)?.with_isa(isa);
            sketch.resize_pages(pages.len());
            let mut scratch = EncodeScratch::default();
            let seconds = median_once(|| {
                for slot in 0..tokens {
                    sketch.encode(slot, Some(rows(slot)), Some(rows(slot)), &mut scratch);
                }
            });
            row(&format!("{name} encode"), seconds, tokens, (tokens * DIM * 4) as f64);
            for group in [1, 4, 8] {
                time_scan(&sketch, &pages, group);
            }
        }
        let mut scores = noise(tokens * 4);
        let seconds = median(|| {
            black_box(exp::exp_shifted(isa, black_box(&mut scores), 3.0));
        });
        row("exp, group 4", seconds, tokens, (tokens * 16) as f64);
    }
    Ok(())
}

fn median_once(call: impl FnOnce()) -> f64 {
    let start = Instant::now();
    call();
    start.elapsed().as_secs_f64()
}

fn time_scan(sketch: &Sketch, pages: &[u32], group: usize) {
    let tokens = pages.len() * 16;
    let config = sketch.config();
    let q = noise(group * DIM);
    let ends: Vec<u32> = (1..=pages.len()).map(|i| (i * group) as u32).collect();
    let heads: Vec<u16> = pages.iter().flat_map(|_| 0..group as u16).collect();
    let pairs = Pairs { pages, ends: &ends, heads: &heads };
    let mut prepared = PreparedQuery::default();
    let query = Query { q: &q, group, scale: 0.1, attended_lse: &[] };
    if config.v_bits() == 0 || config.k_bits() == 4 {
        let prepare = median(|| sketch.prepare(&query, config.k_bits(), &mut prepared));
        let mut out = vec![0.0; pages.len() * group * 16];
        let seconds = median(|| sketch.score(black_box(&prepared), black_box(&pairs), black_box(&mut out)));
        let what = format!("k{} score, group {group}", config.k_bits());
        row(&what, seconds, tokens, (tokens * (config.k_bits() * DIM / 8 + 2)) as f64);
        println!("|   prepare: {:.2} us | | |", prepare * 1e6);
    }
    if config.v_bits() > 0 {
        let weights: Vec<f32> = noise(pages.len() * group * 16).iter().map(|x| x.exp()).collect();
        let sums: Vec<f32> = weights.chunks_exact(16).map(|w| w.iter().sum()).collect();
        let (mut acc, least) = (vec![0.0; group * sketch.padded_dim()], vec![0.0; group]);
        let by = Weights { tokens: &weights, sums: &sums, least: &least };
        let seconds = median(|| sketch.add_weighted(black_box(&pairs), black_box(by), &mut acc));
        let what = format!("v{} tail, group {group}", config.v_bits());
        row(&what, seconds, tokens, (tokens * (config.v_bits() * DIM / 8 + 2)) as f64);
    }
}
