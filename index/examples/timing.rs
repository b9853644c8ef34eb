//! Time of build, insert, search and tail by size, on one thread, tree against flat scan of the same pages.
//!
//! `cargo run --release -p floe-index --example timing -- [n=..,..] [open=..,..] [trace=FILE noise=0.3] [sketch=k1 unit=token] [hnsw=yes]`: keys are noisy
//! copies of a recorded trace, or topics within topics.
#![allow(clippy::print_stdout, reason = "a report")]
#![allow(clippy::unwrap_used, reason = "a tool for the bench: a bad file ends it")]

use std::time::Instant;

use floe_index::{Batch, Dci, Found, Hnsw, KeyIndex, Query, Scratch, SearchParams, Tail, TailOut, Unit};
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

/// Copies of a recorded trace, each with its own noise of `by` times a coordinate's deviation, and four heads of its queries.
fn copies(path: &str, n: usize, by: f32) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let bytes = std::fs::read(path).unwrap();
    let size = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + size]).unwrap();
    let tensor = |name: &str| -> Vec<f32> {
        let at = |i: usize| header[name]["data_offsets"][i].as_u64().unwrap() as usize + 8 + size;
        let words = bytes[at(0)..at(1)].chunks_exact(2);
        words.map(|b| half::bf16::from_bits(u16::from_le_bytes([b[0], b[1]])).to_f32()).collect()
    };
    let (k, v, q) = (tensor("k"), tensor("v"), tensor("q"));
    let heads = header["q"]["shape"][1].as_u64().unwrap() as usize;
    let queries = q.len() / heads / DIM;
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let spread = |rows: &[f32]| -> Vec<f32> {
        let num = (rows.len() / DIM) as f32;
        (0..DIM)
            .map(|d| {
                let of = || rows.iter().skip(d).step_by(DIM);
                let mean = of().sum::<f32>() / num;
                (of().map(|x| (x - mean) * (x - mean)).sum::<f32>() / num).sqrt() * by
            })
            .collect()
    };
    let (sk, sv) = (spread(&k), spread(&v));
    let many = |rows: &[f32], spread: &[f32], rng: &mut ChaCha8Rng| -> Vec<f32> {
        (0..n * DIM).map(|i| rows[i % rows.len()] + spread[i % DIM] * normal(rng)).collect()
    };
    let (keys, values) = (many(&k, &sk, &mut rng), many(&v, &sv, &mut rng));
    let chosen = (0..64).flat_map(|j| {
        let at = (queries - 450 + j * 7) * heads * DIM;
        q[at..at + GROUP * DIM].to_vec()
    });
    (keys, values, chosen.collect())
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
        let trace = option("trace", "");
        // The last 4096 tokens are inserted after the build.
        let all = n + 4096;
        let (k, v, q) = if trace.is_empty() {
            synthetic(all, 1)
        } else {
            copies(&trace, all, option("noise", "0.3").parse().unwrap())
        };
        let ids: Vec<u32> = (0..n as u32).collect();
        let mut dci = Dci::with_sketch(DIM, option("sketch", "off").parse().unwrap()).unwrap();
        let build = pool.install(|| {
            let start = cpu_us();
            dci.build(&Batch { ids: &ids, keys: &k[..n * DIM], values: &v[..n * DIM] }).unwrap();
            (cpu_us() - start) / n as f64
        });
        let inserts = (0..256usize).map(|i| {
            let ids: Vec<u32> = (0..16).map(|j| (n + i * 16 + j) as u32).collect();
            let span = (n + i * 16) * DIM..(n + (i + 1) * 16) * DIM;
            let start = Instant::now();
            dci.insert(&Batch { ids: &ids, keys: &k[span.clone()], values: &v[span] }).unwrap();
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
        let graph = (option("hnsw", "no") == "yes").then(|| {
            let mut graph = Hnsw::new(DIM, floe_index::HnswConfig::default()).unwrap();
            let ids: Vec<u32> = (0..all as u32).collect();
            let start = cpu_us();
            graph.build(&Batch { ids: &ids, keys: &k, values: &v }).unwrap();
            println!("  hnsw build {:.1} us/token", (cpu_us() - start) / all as f64);
            graph
        });
        let mut reference: Vec<Vec<u32>> = Vec::new();
        let runs: Vec<(String, &dyn KeyIndex, f32)> =
            std::iter::once(("flat".to_string(), &flat as &dyn KeyIndex, 1.0))
                .chain(graph.iter().map(|g| ("hnsw".to_string(), g as &dyn KeyIndex, 1.0)))
                .chain(fractions.iter().map(|&f| (format!("dci {f}"), &dci as &dyn KeyIndex, f)))
                .collect();
        for (name, index, open_fraction) in runs {
            let params = SearchParams {
                budget: 176,
                unit: if option("unit", "page") == "page" { Unit::Page } else { Unit::Token },
                tail: Tail::Tree,
                node_budget: usize::MAX,
                open_fraction,
                open_mass: option("open_mass", "0").parse().unwrap(),
                detail: option("detail", &floe_index::DETAIL.to_string()).parse().unwrap(),
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
                        // Mean over the heads of the exact mass of the tokens, relative to that of the flat scan's.
                        let of = |ids: &[u32], q: &[f32]| -> f64 {
                            let logits: Vec<f64> = ids
                                .iter()
                                .map(|&t| {
                                    let key = &k[t as usize * DIM..][..DIM];
                                    let dot: f32 = q.iter().zip(key).map(|(a, b)| a * b).sum();
                                    f64::from(dot * query.scale)
                                })
                                .collect();
                            let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                            max + logits.iter().map(|l| (l - max).exp()).sum::<f64>().ln()
                        };
                        for q in query.q.chunks_exact(DIM) {
                            mass[0] += (of(&picked, q) - of(&reference[j], q)).exp() / GROUP as f64;
                        }
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
