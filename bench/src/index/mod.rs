//! `floe-bench index`: build, insertion and search of every index kind, with the mass and the tokens that each search finds.
//!
//! One thread, one shard, a group of query heads. Searches take turns query by query, so that all of them see the same machine;
//! a shard is searched again and again, so its summaries are as warm as the caches hold them.

mod cases;
mod data;
mod plot;
mod ratios;
mod report;
mod scan;

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, ensure};
use floe::trace::Trace;
use floe_index::{Dci, Found, KeyIndex, Scratch, TailOut};
use serde::Serialize;

use crate::stats::Spread;
use cases::{Built, Case, Family};
use data::Data;
use scan::Scan;

/// The trace that is measured when none is named.
const BUNDLED: (&str, &[u8]) = (
    "qwen2.5-coder-1.5b_persuasion-8k_L20H0.safetensors",
    include_bytes!("../../../tests/data/qwen2.5-coder-1.5b_persuasion-8k_L20H0.safetensors"),
);
/// Tokens that join an index together while decoding.
const BATCH: usize = 16;
/// Builds of a small index are repeated until this time is used up, at most so many times.
const BUILD_SECONDS: f64 = 1.0;
const BUILDS_MAX: usize = 5;

/// Where keys for any number of tokens come from.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Keys {
    /// The trace, repeated: each repetition turned on to its positions.
    Tiled,
    /// Generated.
    Synthetic,
}

/// What to measure.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Tokens of the shards.
    #[arg(long, value_delimiter = ',', default_value = "4096,32768,131072,1048576")]
    sizes: Vec<usize>,
    /// Keys of those shards.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "tiled,synthetic")]
    keys: Vec<Keys>,
    /// Needles among the synthetic keys; half of the queries look for one, and find it or lose most of their mass.
    #[arg(long, value_name = "N", default_value_t = 0)]
    needles: usize,
    /// A recorded trace to measure besides, whole [default: the bundled one].
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Tokens that a search returns.
    #[arg(long, value_name = "N", default_value_t = 176)]
    budget: usize,
    /// Queries of each shard.
    #[arg(long, value_name = "N", default_value_t = 64)]
    queries: usize,
    /// The graph is left out above so many tokens: its build takes minutes.
    #[arg(long, value_name = "N", default_value_t = 131_072)]
    hnsw_max: usize,
    /// Least number of timings of each search.
    #[arg(long, value_name = "N", default_value_t = 256)]
    samples: usize,
    /// Write the rows as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the rows as CSV.
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Plot time against the number of tokens; a second plot, mass against time, goes beside it as STEM-mass.svg.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// One measurement.
#[derive(Clone, Debug, Serialize)]
struct Row {
    data: String,
    index: String,
    #[serde(skip)]
    family: Family,
    #[serde(skip)]
    sketch: &'static str,
    #[serde(skip)]
    open: f32,
    n: usize,
    dim: usize,
    /// `build`, `insert`, `search` or `tail`.
    op: &'static str,
    /// Median: of a token for build and insert, of a query of the whole group for search and tail.
    us: f64,
    p10_us: f64,
    p90_us: f64,
    samples: usize,
    /// Attention mass of the returned tokens, mean over queries and heads, of searches.
    kept_mass: Option<f64>,
    /// Part of the exact top tokens among the returned ones, of searches.
    recall: Option<f64>,
    /// Host bytes of the index per token.
    bytes_per_token: f64,
}

/// Measures and prints.
pub fn run(args: &Args) -> anyhow::Result<()> {
    ensure!(args.budget > 0, "--budget is 0");
    ensure!(args.queries > 0, "--queries is 0");
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build()?;
    let mut rows = Vec::new();
    let trace = match &args.trace {
        Some(path) => Trace::open(path)?,
        None => Trace::from_bytes(BUNDLED.0, BUNDLED.1.to_vec())?,
    };
    let real = Data::real(&trace, Data::most(&trace), args.queries)?;
    pool.install(|| Bench { args, data: &real }.run(&mut rows))?;
    drop(real);
    for keys in &args.keys {
        for &n in &args.sizes {
            let data = match keys {
                Keys::Tiled => Data::tiled(&trace, n, args.queries)?,
                Keys::Synthetic => Data::synthetic(n, args.queries, args.needles, &std::env::temp_dir())?,
            };
            pool.install(|| Bench { args, data: &data }.run(&mut rows))?;
        }
    }
    report::print(&rows, args)?;
    if let Some(path) = &args.json {
        report::write_json(path, &rows, args.budget)?;
    }
    if let Some(path) = &args.csv {
        std::fs::write(path, report::table(&rows)?.to_csv()).with_context(|| path.display().to_string())?;
    }
    if let Some(path) = &args.svg {
        plot::write(path, &rows)?;
    }
    Ok(())
}

struct Bench<'a> {
    args: &'a Args,
    data: &'a Data,
}

/// What the searches of one case found, summed over the queries.
#[derive(Clone, Copy, Default)]
struct Quality {
    kept: f64,
    recall: f64,
}

impl Bench<'_> {
    /// All measurements of one shard.
    fn run(&self, rows: &mut Vec<Row>) -> anyhow::Result<()> {
        let mut built = self.build_all(rows)?;
        let cases = cases::searches(&built, self.args.budget);
        let quality = self.verify(&built, &cases)?;
        let times = self.time_searches(&built, &cases)?;
        for ((case, quality), [search, tail]) in cases.iter().zip(quality).zip(times) {
            let bytes = case.built.map_or(0.0, |at| self.bytes_per_token(built[at].index.as_ref()));
            let row = Row {
                kept_mass: Some(quality.kept / self.data.num_queries() as f64),
                recall: Some(quality.recall / self.data.num_queries() as f64),
                bytes_per_token: bytes,
                open: case.open,
                ..self.row((&case.name, case.family, case.sketch), "search", Spread::of(search))
            };
            rows.push(row.clone());
            if !tail.is_empty() {
                let spread = Spread::of(tail);
                let (us, p10_us, p90_us) = (spread.median_us, spread.p10_us, spread.p90_us);
                rows.push(Row { op: "tail", us, p10_us, p90_us, kept_mass: None, recall: None, ..row });
            }
        }
        self.insert_all(&mut built, rows)
    }

    fn row(&self, of: (&str, Family, &'static str), op: &'static str, spread: Spread) -> Row {
        Row {
            data: self.data.name.clone(),
            index: of.0.to_owned(),
            family: of.1,
            sketch: of.2,
            open: 1.0,
            n: self.data.num_built,
            dim: self.data.dim,
            op,
            us: spread.median_us,
            p10_us: spread.p10_us,
            p90_us: spread.p90_us,
            samples: spread.samples,
            kept_mass: None,
            recall: None,
            bytes_per_token: 0.0,
        }
    }

    fn bytes_per_token(&self, index: &dyn KeyIndex) -> f64 {
        index.memory().total_bytes() as f64 / index.len() as f64
    }

    /// Builds every index; the flat ones over the trees' pages come with them.
    fn build_all(&self, rows: &mut Vec<Row>) -> anyhow::Result<Vec<Built>> {
        let dim = self.data.dim;
        let mut built = Vec::new();
        for (sketch, config) in cases::SKETCHES {
            let (tree, spread) = self.build(|| cases::tree(dim, config))?;
            let flat: Box<dyn KeyIndex> = Box::new(Dci::flattened(&tree));
            let name = |family: &str| format!("{family}:sketch={sketch}");
            let tree = Built { name: name("dci"), family: Family::Dci, sketch, index: Box::new(tree) };
            rows.push(Row {
                bytes_per_token: self.bytes_per_token(tree.index.as_ref()),
                ..self.row((&tree.name, tree.family, sketch), "build", spread)
            });
            built.extend([tree, Built { name: name("flat"), family: Family::Flat, sketch, index: flat }]);
        }
        for rival in 0..cases::rivals(dim, self.data.num_built, self.args.hnsw_max)?.len() {
            let take = || -> anyhow::Result<Built> {
                Ok(cases::rivals(dim, self.data.num_built, self.args.hnsw_max)?.swap_remove(rival))
            };
            let (index, spread) = self.build(take)?;
            rows.push(Row {
                bytes_per_token: self.bytes_per_token(index.index.as_ref()),
                ..self.row((&index.name, index.family, index.sketch), "build", spread)
            });
            built.push(index);
        }
        Ok(built)
    }

    /// The last of a few builds, and their times by token.
    fn build<T: AsIndex>(&self, empty: impl Fn() -> anyhow::Result<T>) -> anyhow::Result<(T, Spread)> {
        let n = self.data.num_built;
        let mut seconds = Vec::new();
        loop {
            let mut index = empty()?;
            let start = Instant::now();
            index.as_index().build(&self.data.batch(0..n))?;
            seconds.push(start.elapsed().as_secs_f64() / n as f64);
            let spent = seconds.iter().sum::<f64>() * n as f64;
            if spent >= BUILD_SECONDS || seconds.len() >= BUILDS_MAX {
                return Ok((index, Spread::of(seconds)));
            }
        }
    }

    /// Checks the answers of every case against one another and the exact scan, and measures what they find.
    fn verify(&self, built: &[Built], cases: &[Case]) -> anyhow::Result<Vec<Quality>> {
        let (data, budget) = (self.data, self.args.budget.min(self.data.num_built));
        let mut quality = vec![Quality::default(); cases.len()];
        let (mut scan, mut scratch) = (Scan::default(), Scratch::default());
        for at in 0..data.num_queries() {
            let query = data.query(at);
            let best: Vec<usize> = scan.search(data, &query, budget)?.iter().map(|&p| p as usize).collect();
            let mut whole: Vec<(usize, Found)> = Vec::new();
            for (case, quality) in cases.iter().zip(&mut quality) {
                let mut found = Found::default();
                let places: Vec<usize> = match case.built {
                    None => best.clone(),
                    Some(b) => {
                        built[b].index.search(&query, &[], &case.params, &mut scratch, &mut found)?;
                        found.tokens.iter().map(|hit| data.place(hit.id)).collect()
                    }
                };
                let mut distinct = places.clone();
                distinct.sort_unstable();
                distinct.dedup();
                ensure!(distinct.len() == places.len(), "{}: a token is returned twice", case.name);
                let enough = places.len() == budget || case.params.node_budget < budget;
                ensure!(enough, "{}: {} tokens, not {budget}", case.name, places.len());
                quality.kept += scan.kept(places.iter().copied(), data.group);
                quality.recall += scan.recall(places.iter().copied());
                match (case.family, case.built) {
                    (Family::Dci, Some(b)) if case.open == 1.0 => whole.push((b, found)),
                    (Family::Flat, Some(b)) => {
                        let tree = whole.iter().find(|(tree, _)| tree + 1 == b);
                        let same = tree.is_some_and(|(_, tree)| tree.tokens == found.tokens);
                        ensure!(same, "{} differs from the tree with everything open", case.name);
                    }
                    _ => {}
                }
            }
        }
        Ok(quality)
    }

    /// Seconds of the searches and of the tails of each case; the cases take turns query by query.
    fn time_searches(&self, built: &[Built], cases: &[Case]) -> anyhow::Result<Vec<[Vec<f64>; 2]>> {
        let data = self.data;
        let mut times = vec![[Vec::new(), Vec::new()]; cases.len()];
        let (mut scan, mut scratch, mut found) = (Scan::default(), Scratch::default(), Found::default());
        let (mut out, mut lse) = (vec![0.0; data.group * data.dim], vec![0.0; data.group]);
        let rounds = self.args.samples.div_ceil(data.num_queries());
        // The first round warms up. Within a round each case runs over all queries, as a step runs over many shards.
        for round in 0..=rounds {
            for (case, times) in cases.iter().zip(&mut times) {
                for at in 0..data.num_queries() {
                    let query = data.query(at);
                    let start = Instant::now();
                    let Some(b) = case.built else {
                        // Milliseconds at best: a few timings are enough.
                        if at < 8 {
                            scan.search(data, &query, self.args.budget)?;
                            times[0].push(start.elapsed().as_secs_f64());
                        }
                        continue;
                    };
                    let index = built[b].index.as_ref();
                    index.search(&query, &[], &case.params, &mut scratch, &mut found)?;
                    let searched = start.elapsed().as_secs_f64();
                    if case.params.tail != floe_index::Tail::Off {
                        let state = TailOut { out: &mut out, lse: &mut lse };
                        let start = Instant::now();
                        index.tail(&query, &[], &found, &mut scratch, state)?;
                        times[1].push(start.elapsed().as_secs_f64());
                    }
                    times[0].push(searched);
                }
                if round == 0 {
                    times.iter_mut().for_each(Vec::clear);
                }
            }
        }
        Ok(times)
    }

    /// Inserts the tokens after the built ones, sixteen at a time.
    fn insert_all(&self, built: &mut [Built], rows: &mut Vec<Row>) -> anyhow::Result<()> {
        let data = self.data;
        for Built { name, family, sketch, index } in built {
            // The flat copy of the tree's pages is never inserted into.
            if *family == Family::Flat {
                continue;
            }
            let mut seconds = Vec::new();
            for at in (data.num_built..data.len()).step_by(BATCH) {
                let end = (at + BATCH).min(data.len());
                let start = Instant::now();
                index.insert(&data.batch(at..end))?;
                seconds.push(start.elapsed().as_secs_f64() / (end - at) as f64);
            }
            ensure!(index.len() == data.len(), "{name}: {} tokens after insertion", index.len());
            if !seconds.is_empty() {
                rows.push(Row {
                    bytes_per_token: self.bytes_per_token(index.as_ref()),
                    ..self.row((name, *family, sketch), "insert", Spread::of(seconds))
                });
            }
        }
        Ok(())
    }
}

/// An index by itself or with its name.
trait AsIndex {
    fn as_index(&mut self) -> &mut dyn KeyIndex;
}

impl AsIndex for Dci {
    fn as_index(&mut self) -> &mut dyn KeyIndex {
        self
    }
}

impl AsIndex for Built {
    fn as_index(&mut self) -> &mut dyn KeyIndex {
        self.index.as_mut()
    }
}
