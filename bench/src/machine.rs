//! What the machine can do at best: the bounds that cases are held against.

use std::hint::black_box;
use std::time::Instant;

use floe_cuda::Isa;
use floe_cuda::cpu::fma_rate;
use rayon::prelude::*;
use serde::Serialize;

/// Bytes of one side of the copy, and of the data read: eight times a large third-level cache.
const BUFFER_BYTES: usize = 256 << 20;
/// Timings, of which the best counts.
const REPEATS: usize = 9;

/// Bounds for one number of threads.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Bounds {
    /// Threads used.
    pub threads: usize,
    /// Bytes read plus bytes written per second by a large copy (the C library's `memcpy`), best of several, GB/s (10^9).
    pub copy_gb_s: f64,
    /// Bytes per second of summing a large buffer, best of several, GB/s.
    pub read_gb_s: f64,
    /// f32 multiply-adds per second with operands in registers, all threads, 10^9; `None` without vector instructions.
    pub gfma_s: Option<f64>,
}

impl Bounds {
    /// Measures them, inside `pool`.
    pub fn measure(pool: &rayon::ThreadPool, isa: Isa) -> Self {
        let threads = pool.current_num_threads();
        let words = BUFFER_BYTES / size_of::<u64>();
        let source: Vec<u64> = (0..words as u64).collect();
        let mut target = vec![1u64; words];
        let share = words.div_ceil(threads);
        let (mut copy, mut read) = (0f64, 0f64);
        pool.install(|| {
            for _ in 0..REPEATS {
                let start = Instant::now();
                target
                    .par_chunks_mut(share)
                    .zip(source.par_chunks(share))
                    .for_each(|(t, s)| t.copy_from_slice(s));
                copy = copy.max(2.0 * BUFFER_BYTES as f64 / start.elapsed().as_secs_f64());
                black_box(&target);

                let start = Instant::now();
                let sum: u64 = source.par_chunks(share).map(sum_words).reduce(|| 0, u64::wrapping_add);
                read = read.max(BUFFER_BYTES as f64 / start.elapsed().as_secs_f64());
                black_box(sum);
            }
        });
        let gfma_s = fma_rate(isa).map(|rate| rate * threads as f64 / 1e9);
        Self { threads, copy_gb_s: copy / 1e9, read_gb_s: read / 1e9, gfma_s }
    }
}

/// Wrapping sum in 32 independent parts, so that additions do not wait for one another.
fn sum_words(words: &[u64]) -> u64 {
    let mut sums = [0u64; 32];
    for line in words.chunks_exact(32) {
        for (sum, word) in sums.iter_mut().zip(line) {
            *sum = sum.wrapping_add(*word);
        }
    }
    sums.into_iter().fold(0, u64::wrapping_add)
}

/// Name of the processor as the kernel gives it, or the architecture.
pub fn processor() -> String {
    std::fs::read_to_string("/proc/cpuinfo")
        .ok()
        .and_then(|info| {
            let line = info.lines().find(|line| line.starts_with("model name"))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        })
        .unwrap_or_else(|| std::env::consts::ARCH.to_owned())
}
