//! Time of build, insert, search and tail by size, on one thread, tree against flat scan of the same pages.
//!
//! `cargo run --release -p floe-index --example timing -- [n=..,..] [open=..,..]`. Keys are real ones from `FLOE_TRACES` (each copy of the
//! trace rotated by a random orthogonal perturbation) or synthetic topics when it is unset.
#![allow(clippy::print_stdout, reason = "a report")]
#![allow(clippy::unwrap_used, reason = "a tool for the bench: a bad file ends it")]

use std::time::Instant;

use floe_index::{Batch, Dci, Found, KeyIndex, Query, Scratch, SearchParams, Tail, TailOut, Unit};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const DIM: usize = 128;
const GROUP: usize = 4;

fn normal(rng: &mut ChaCha8Rng) -> f32 {
    (0..4).map(|_| rng.random::<f32>() - 0.5).sum::<f32>() * 1.732
}

fn synthetic(n: usize, seed: u64) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    // Topics within topics: 32 fields of 64 subjects each, drifting along the sequence.
    let fields: Vec<f32> = (0..32 * DIM).map(|_| 1.5 * normal(&mut rng)).collect();
    let subjects: Vec<f32> = (0..2048 * DIM).map(|_| normal(&mut rng)).collect();
    let mut k = Vec::with_capacity(n * DIM);
    let mut v = Vec::with_capacity(n * DIM);
    for _ in 0..n {
        let s = rng.random_range(0..2048usize);
        for d in 0..DIM {
            let x = fields[s / 64 * DIM + d] + subjects[s * DIM + d];
            k.push(x + 0.7 * normal(&mut rng));
            v.push(0.3 * x + normal(&mut rng));
        }
    }
    let mut q = Vec::new();
    for _ in 0..64 {
        let s = rng.random_range(0..2048usize);
        for _ in 0..GROUP {
            let t = if rng.random::<bool>() { s } else { rng.random_range(0..2048usize) };
            for d in 0..DIM {
                q.push(2.0 * (fields[t / 64 * DIM + d] + subjects[t * DIM + d]) + normal(&mut rng));
            }
        }
    }
    (k, v, q)
}

/// Time that this thread spent on a processor, so that other work on the machine does not count.
fn cpu_us() -> f64 {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    stat.split(' ').next().unwrap().parse::<f64>().unwrap() / 1e3
}

fn median(mut times: Vec<f64>) -> f64 {
    // The lower decile: other work on the machine only ever adds time.
    times.sort_by(f64::total_cmp);
    times[times.len() / 10]
}

fn main() {
    let option = |name: &str, default: &str| -> String {
        std::env::args()
            .filter_map(|a| a.split_once('=').map(|(k, v)| (k.to_string(), v.to_string())))
            .find(|a| a.0 == name)
            .map_or(default.to_string(), |a| a.1)
    };
    let sizes: Vec<usize> = option("n", "32768,131072").split(',').map(|x| x.parse().unwrap()).collect();
    let fractions: Vec<f32> =
        option("open", "1,0.25,0.1,0.05").split(',').map(|x| x.parse().unwrap()).collect();
    let rounds: usize = option("rounds", "4").parse().unwrap();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    for n in sizes {
        let (k, v, q) = synthetic(n, 1);
        let ids: Vec<u32> = (0..n as u32).collect();
        let mut dci = Dci::with_sketch(DIM, option("sketch", "off").parse().unwrap()).unwrap();
        let build = pool.install(|| {
            let start = cpu_us();
            dci.build(&Batch { ids: &ids, keys: &k, values: &v }).unwrap();
            (cpu_us() - start) / n as f64
        });
        let (k2, v2, _) = synthetic(4096, 2);
        let inserts = (0..256usize).map(|i| {
            let ids: Vec<u32> = (0..16).map(|j| (n + i * 16 + j) as u32).collect();
            let span = i * 16 * DIM..(i + 1) * 16 * DIM;
            let start = Instant::now();
            dci.insert(&Batch { ids: &ids, keys: &k2[span.clone()], values: &v2[span] }).unwrap();
            start.elapsed().as_secs_f64() * 1e6
        });
        let mut inserts: Vec<f64> = inserts.collect();
        inserts.sort_by(f64::total_cmp);
        println!(
            "n {n}: build {build:.2} us/token, insert of 16 median {:.1} p99 {:.1} us, fill {:.3}, {:?}",
            inserts[128],
            inserts[253],
            dci.fill(),
            dci.memory()
        );
        let flat = dci.flattened();
        let mut reference: Vec<Vec<u32>> = Vec::new();
        let runs: Vec<(String, &dyn KeyIndex, f32)> =
            std::iter::once(("flat".to_string(), &flat as &dyn KeyIndex, 1.0))
                .chain(fractions.iter().map(|&f| (format!("dci {f}"), &dci as &dyn KeyIndex, f)))
                .collect();
        for (name, index, open_fraction) in runs {
            let params = SearchParams {
                budget: 176,
                unit: if option("unit", "page") == "page" { Unit::Page } else { Unit::Token },
                tail: Tail::Tree,
                node_budget: usize::MAX,
                open_fraction,
            };
            let (mut scratch, mut found) = (Scratch::default(), Found::default());
            let (mut out, mut lse) = (vec![0.0; GROUP * DIM], vec![0.0; GROUP]);
            let (mut search, mut tail) = (Vec::new(), Vec::new());
            let mut mass = [0.0f64; 2];
            for round in 0..rounds {
                for j in 0..64 {
                    let query = Query {
                        q: &q[j * GROUP * DIM..(j + 1) * GROUP * DIM],
                        group: GROUP,
                        scale: 1.0 / (DIM as f32).sqrt(),
                        attended_lse: &[],
                    };
                    let start = Instant::now();
                    index.search(&query, &[], &params, &mut scratch, &mut found).unwrap();
                    search.push(start.elapsed().as_secs_f64() * 1e6);
                    let start = Instant::now();
                    index
                        .tail(&query, &[], &found, &mut scratch, TailOut { out: &mut out, lse: &mut lse })
                        .unwrap();
                    tail.push(start.elapsed().as_secs_f64() * 1e6);
                    if round == 0 {
                        let picked: Vec<u32> = found.tokens.iter().map(|t| t.id).collect();
                        if name == "flat" {
                            reference.push(picked.clone());
                        }
                        let of = |ids: &[u32]| -> f64 {
                            ids.iter()
                                .filter(|&&t| (t as usize) < n)
                                .map(|&t| {
                                    let key = &k[t as usize * DIM..][..DIM];
                                    query
                                        .q
                                        .chunks_exact(DIM)
                                        .map(|q| {
                                            let dot: f32 = q.iter().zip(key).map(|(a, b)| a * b).sum();
                                            f64::from(dot * query.scale).exp()
                                        })
                                        .sum::<f64>()
                                })
                                .sum()
                        };
                        let base = of(&reference[j]);
                        mass[0] += of(&picked) / base;
                        mass[1] += 1.0;
                    }
                }
            }
            println!(
                "  {name:10} search {:8.1} us, tail {:8.1} us, mass / flat's {:.4}, nodes {}, bytes {}",
                median(search),
                median(tail),
                mass[0] / mass[1],
                found.nodes_scored,
                found.index_bytes_read
            );
        }
    }
}
