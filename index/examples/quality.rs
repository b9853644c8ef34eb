//! Error of the attention output on recorded traces: sinks, window and retrieved tokens exactly, the rest by the index's tail.
//!
//! `FLOE_TRACES=dir cargo run --release -p floe-index --example quality -- [name=value ...]` prints, for each trace and segment, the
//! mean relative error and the kept mass by budget, and the time of search and tail at the last budget (one
//! thread each; set `RAYON_NUM_THREADS=1` for quiet timings). Values: `stride` (every n-th query), `budgets`, `index`, `open`, `open_mass`, `detail`, `sketch`.
#![allow(clippy::print_stdout, reason = "a report")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a tool for the bench: a bad file ends it")]

use std::collections::HashMap;
use std::path::Path;
use std::sync::Mutex;
use std::time::Instant;

use floe_index::sketch::SketchConfig;
use floe_index::{
    Batch, DETAIL, Dci, Flat, Found, KeyIndex, Query, Scratch, SearchParams, Tail, TailOut, Unit,
};
use rayon::prelude::*;

const SINKS: usize = 16;
const WINDOW: usize = 64;

struct Trace {
    dim: usize,
    group: usize,
    scale: f32,
    first: usize,
    until: usize,
    segments: Vec<(String, usize, usize)>,
    k: Vec<f32>,
    v: Vec<f32>,
    q: Vec<f32>,
}

fn load(path: &Path) -> Trace {
    let bytes = std::fs::read(path).unwrap();
    let size = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + size]).unwrap();
    let tensor = |name: &str| -> Vec<f32> {
        let at = |i: usize| header[name]["data_offsets"][i].as_u64().unwrap() as usize + 8 + size;
        bytes[at(0)..at(1)]
            .chunks_exact(2)
            .map(|b| half::bf16::from_bits(u16::from_le_bytes([b[0], b[1]])).to_f32())
            .collect()
    };
    let meta = |name: &str| header["__metadata__"][name].as_str().unwrap().to_string();
    let number = |name: &str| meta(name).parse::<usize>().unwrap();
    let segments: serde_json::Value = serde_json::from_str(&meta("segments")).unwrap();
    let segments = segments
        .as_object()
        .unwrap()
        .iter()
        .map(|(name, span)| {
            (name.clone(), span[0].as_u64().unwrap() as usize, span[1].as_u64().unwrap() as usize)
        })
        .filter(|s| s.0 != "prompt_tail" && s.0 != "question")
        .collect();
    Trace {
        dim: number("head_dim"),
        group: number("num_q_heads") / number("num_kv_heads"),
        scale: meta("softmax_scale").parse().unwrap(),
        first: number("first_query_pos"),
        until: number("index_until"),
        segments,
        k: tensor("k"),
        v: tensor("v"),
        q: tensor("q"),
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 16];
    for (a, b) in a.chunks_exact(16).zip(b.chunks_exact(16)) {
        for ((s, a), b) in sums.iter_mut().zip(a).zip(b) {
            *s += a * b;
        }
    }
    sums.iter().sum()
}

/// Attention of one head over some tokens: output, lse.
fn attend(trace: &Trace, q: &[f32], tokens: &mut dyn Iterator<Item = usize>) -> (Vec<f32>, f32) {
    let dim = trace.dim;
    let tokens: Vec<usize> = tokens.collect();
    let logits: Vec<f32> =
        tokens.iter().map(|&t| dot(q, &trace.k[t * dim..(t + 1) * dim]) * trace.scale).collect();
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut out = vec![0.0f32; dim];
    let mut sum = 0.0f64;
    for (&t, &l) in tokens.iter().zip(&logits) {
        let w = (l - max).exp();
        sum += f64::from(w);
        for (o, &v) in out.iter_mut().zip(&trace.v[t * dim..(t + 1) * dim]) {
            *o += w * v;
        }
    }
    out.iter_mut().for_each(|o| *o /= sum as f32);
    (out, max + sum.ln() as f32)
}

fn merge(a: (&[f32], f32), b: (&[f32], f32)) -> Vec<f32> {
    let max = a.1.max(b.1);
    let (wa, wb) = ((a.1 - max).exp(), (b.1 - max).exp());
    a.0.iter().zip(b.0).map(|(x, y)| (wa * x + wb * y) / (wa + wb)).collect()
}

struct Options(HashMap<String, String>);

impl Options {
    fn get(&self, name: &str, default: &str) -> String {
        self.0.get(name).cloned().unwrap_or_else(|| default.to_string())
    }
}

fn main() {
    let options = Options(
        std::env::args()
            .skip(1)
            .filter_map(|a| a.split_once('=').map(|(k, v)| (k.into(), v.into())))
            .collect(),
    );
    let Ok(dir) = std::env::var("FLOE_TRACES") else {
        println!("FLOE_TRACES is not set: nothing to measure");
        return;
    };
    let stride: usize = options.get("stride", "16").parse().unwrap();
    let budgets: Vec<usize> =
        options.get("budgets", "96,256,1024").split(',').map(|b| b.parse().unwrap()).collect();
    let open: f32 = options.get("open", "1").parse().unwrap();
    let open_mass: f32 = options.get("open_mass", "0").parse().unwrap();
    let detail: f32 = options.get("detail", &DETAIL.to_string()).parse().unwrap();
    let sketch: SketchConfig = options.get("sketch", "off").parse().unwrap();
    let unit = if options.get("unit", "page") == "page" { Unit::Page } else { Unit::Token };
    let tail = match options.get("tail", "tree").as_str() {
        "off" => Tail::Off,
        "page" => Tail::Page,
        _ => Tail::Tree,
    };
    let mut paths: Vec<_> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    paths.retain(|p| p.extension().is_some_and(|e| e == "safetensors"));
    paths.sort();
    let mut average = vec![0.0f64; budgets.len()];
    let mut cells = 0.0;
    let (mut spent, mut traces) = ([0.0; 2], 0.0);
    let repeats: usize = options.get("repeats", "3").parse().unwrap();
    for path in paths {
        let trace = load(&path);
        let mut index: Box<dyn KeyIndex> = match options.get("index", "dci").as_str() {
            "flat" => Box::new(Flat::with_sketch(trace.dim, sketch).unwrap()),
            _ => Box::new(Dci::with_sketch(trace.dim, sketch).unwrap()),
        };
        let batch = |from: usize, to: usize| {
            let ids: Vec<u32> = (from as u32..to as u32).collect();
            (ids, from * trace.dim..to * trace.dim)
        };
        let (ids, span) = batch(SINKS, trace.until);
        let start = Instant::now();
        index.build(&Batch { ids: &ids, keys: &trace.k[span.clone()], values: &trace.v[span] }).unwrap();
        let build = start.elapsed().as_secs_f64() * 1e6 / ids.len() as f64;
        let mut held = trace.until;
        let num_queries = trace.q.len() / trace.group / trace.dim;
        let times = Mutex::new(Vec::new());
        let mut sums: HashMap<String, (f64, Vec<[f64; 2]>)> = HashMap::new();
        for step in (trace.first..trace.first + num_queries).step_by(16) {
            while held + 16 <= step {
                let (ids, span) = batch(held, held + 16);
                index
                    .insert(&Batch { ids: &ids, keys: &trace.k[span.clone()], values: &trace.v[span] })
                    .unwrap();
                held += 16;
            }
            let wanted: Vec<(usize, &String)> = (step..(step + 16).min(trace.first + num_queries))
                .filter(|p| p % stride == 0 && *p >= trace.until)
                .filter_map(|p| trace.segments.iter().find(|s| s.1 <= p && p < s.2).map(|s| (p, &s.0)))
                .collect();
            let results: Vec<_> = wanted
                .par_iter()
                .map(|&(p, segment)| {
                    let size = trace.group * trace.dim;
                    let q = &trace.q[(p - trace.first) * size..(p - trace.first + 1) * size];
                    let always = |q| attend(&trace, q, &mut (0..SINKS).chain(p + 1 - WINDOW..=p)).1;
                    let lse: Vec<f32> = q.chunks_exact(trace.dim).map(always).collect();
                    let query = Query { q, group: trace.group, scale: trace.scale, attended_lse: &lse };
                    let exclude: Vec<u32> = ((p + 1 - WINDOW) as u32..=p as u32).collect();
                    let full: Vec<_> =
                        q.chunks_exact(trace.dim).map(|q| attend(&trace, q, &mut (0..=p))).collect();
                    let mut scratch = Scratch::default();
                    let mut found = Found::default();
                    let cells: Vec<[f64; 2]> = budgets
                        .iter()
                        .map(|&budget| {
                            let params = SearchParams {
                                budget: budget - SINKS - WINDOW,
                                unit,
                                tail,
                                node_budget: usize::MAX,
                                open_fraction: open,
                                open_mass,
                                detail,
                            };
                            index.search(&query, &exclude, &params, &mut scratch, &mut found).unwrap();
                            let mut out = vec![0.0; size];
                            let mut lse = vec![0.0; trace.group];
                            let state = TailOut { out: &mut out, lse: &mut lse };
                            index.tail(&query, &exclude, &found, &mut scratch, state).unwrap();
                            let mut cell = [0.0; 2];
                            for (h, q) in q.chunks_exact(trace.dim).enumerate() {
                                let window = (p + 1 - WINDOW)..=p;
                                let retrieved = found.tokens.iter().map(|t| t.id as usize);
                                let mut tokens = (0..SINKS).chain(window).chain(retrieved);
                                let (exact, exact_lse) = attend(&trace, q, &mut tokens);
                                let (o, o_lse) = &full[h];
                                let row = &out[h * trace.dim..(h + 1) * trace.dim];
                                let merged = merge((&exact, exact_lse), (row, lse[h]));
                                let diff: f32 = merged.iter().zip(o).map(|(a, b)| (a - b) * (a - b)).sum();
                                let norm: f32 = o.iter().map(|x| x * x).sum();
                                cell[0] += f64::from((diff / norm).sqrt()) / trace.group as f64;
                                cell[1] += f64::from((exact_lse - o_lse).exp()) / trace.group as f64;
                            }
                            cell
                        })
                        .collect();
                    // Time of the last budget's search and tail, the least of a few: other work on the machine only adds.
                    let mut us = [f64::INFINITY; 2];
                    let params = SearchParams {
                        budget: budgets[budgets.len() - 1] - SINKS - WINDOW,
                        unit,
                        tail,
                        node_budget: usize::MAX,
                        open_fraction: open,
                        open_mass,
                        detail,
                    };
                    let (mut out, mut lse) = (vec![0.0; size], vec![0.0; trace.group]);
                    for _ in 0..repeats {
                        let start = Instant::now();
                        index.search(&query, &exclude, &params, &mut scratch, &mut found).unwrap();
                        us[0] = us[0].min(start.elapsed().as_secs_f64() * 1e6);
                        let state = TailOut { out: &mut out, lse: &mut lse };
                        let start = Instant::now();
                        index.tail(&query, &exclude, &found, &mut scratch, state).unwrap();
                        us[1] = us[1].min(start.elapsed().as_secs_f64() * 1e6);
                    }
                    let bytes = (found.index_bytes_read + found.tail_bytes_read) as f64;
                    times.lock().unwrap().push([us[0], us[1], found.pages_refined as f64, bytes]);
                    (segment.clone(), cells)
                })
                .collect();
            for (segment, cells) in results {
                let entry = sums.entry(segment).or_insert_with(|| (0.0, vec![[0.0; 2]; budgets.len()]));
                entry.0 += 1.0;
                for (sum, cell) in entry.1.iter_mut().zip(cells) {
                    sum[0] += cell[0];
                    sum[1] += cell[1];
                }
            }
        }
        let times = times.into_inner().unwrap();
        let mean = |i: usize| times.iter().map(|t| t[i]).sum::<f64>() / times.len() as f64;
        let pages = index.pages().map_or(0, |view| view.num_pages());
        println!(
            "{} tokens of {} x {} heads: search {:.1} + tail {:.1} us, {:.0} of {pages} pages refined, {:.0} KB read",
            index.len(),
            trace.dim,
            trace.group,
            mean(0),
            mean(1),
            mean(2),
            mean(3) / 1e3
        );
        for (i, spent) in spent.iter_mut().enumerate() {
            *spent += mean(i);
        }
        traces += 1.0;
        let memory = index.memory();
        let kv = index.len() * trace.dim * 4;
        println!(
            "{} build {build:.2} us/token, memory {:.1}% ({memory:?})",
            path.file_stem().unwrap().to_string_lossy(),
            100.0 * memory.total_bytes() as f64 / kv as f64
        );
        for (segment, ..) in &trace.segments {
            let Some((n, cells)) = sums.get(segment) else { continue };
            let row: Vec<String> = cells.iter().map(|c| format!("{:.3} {:.3}", c[0] / n, c[1] / n)).collect();
            println!("  {segment:7} {n:4} queries: {}", row.join(" | "));
            for (a, c) in average.iter_mut().zip(cells) {
                *a += c[0] / n;
            }
        }
        cells += sums.len() as f64;
    }
    let row: Vec<String> = average.iter().map(|a| format!("{:.4}", a / cells)).collect();
    println!("average error at {budgets:?}: {}", row.join(" "));
    println!("average search {:.1} us, tail {:.1} us", spent[0] / traces, spent[1] / traces);
}
