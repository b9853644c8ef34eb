//! `floe-bench attend`: exact attention against the bandwidth of the memory and the rate of the multipliers.
//!
//! A case is one group of query heads over one context. Its shards rotate, so that together they are far larger than any
//! cache and every call reads K and V from memory.

mod data;
mod report;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::ValueEnum;
use floe_cuda::twin::attend_f64;
use floe_cuda::{
    Attend, AttendParams, AttendScratch, Isa, KernelError, KvElem, KvRows, Rows, SplitScratch, StateMut,
    dense_decode, sparse_decode,
};
use half::{bf16, f16};
use serde::Serialize;

use crate::machine::Bounds;
use crate::stats::Spread;
use data::Shards;

/// Largest allowed difference to the f64 oracle, relative to the largest value: some 80 roundings of f32, and a
/// hundredth of what a wrong lane or a lost row would show.
const ERROR_MAX: f64 = 1e-5;

/// Element types by name.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Dtype {
    Bf16,
    F16,
    F32,
}

/// Instruction sets by name.
#[derive(Debug, Clone, Copy, PartialEq, ValueEnum)]
enum IsaName {
    Best,
    Avx512,
    Avx2,
    Scalar,
}

/// Precisions of queries.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Queries {
    Bf16,
    F32,
}

/// What to measure.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Element types of K and V.
    #[arg(long, value_delimiter = ',', default_value = "bf16,f16,f32")]
    dtypes: Vec<Dtype>,
    /// Query heads that share the kv head.
    #[arg(long, value_delimiter = ',', default_value = "1,4,6,7,8")]
    groups: Vec<usize>,
    /// Tokens of context.
    #[arg(long, value_delimiter = ',', default_value = "32768,131072")]
    contexts: Vec<usize>,
    /// Also attend to this many rows, evenly scattered over the context and listed, on one thread.
    #[arg(long, value_delimiter = ',', default_value = "256,1024")]
    budgets: Vec<usize>,
    /// Numbers of threads for the whole context.
    #[arg(long, value_delimiter = ',', default_value = "1,2")]
    threads: Vec<usize>,
    /// Dimensions of a head.
    #[arg(long, default_value_t = 128)]
    head_dim: usize,
    /// Precision of the queries, which are f32 in memory: models that compute in bf16 make queries that are bf16.
    #[arg(long, value_enum, default_value = "bf16")]
    queries: Queries,
    /// Vector instructions.
    #[arg(long, value_enum, default_value = "best")]
    isa: IsaName,
    /// Seconds of timing per case.
    #[arg(long, default_value_t = 0.5)]
    seconds: f64,
    /// Also write the rows as JSON to this file.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// One measured case.
#[derive(Debug, Serialize)]
struct Row {
    dtype: &'static str,
    isa: &'static str,
    group: usize,
    head_dim: usize,
    context: usize,
    /// Rows that are read: the context, or a budget.
    num_rows: usize,
    threads: usize,
    /// Bytes of K and V that one call reads.
    bytes: usize,
    #[serde(flatten)]
    spread: Spread,
    /// `bytes` per median second, 10^9.
    gb_s: f64,
    /// `bytes` per second of the shortest call, 10^9: on a shared machine what a call does when nobody is in its way, as the
    /// bandwidths are the best of several.
    best_gb_s: f64,
    /// `gb_s` over the copy bandwidth of as many threads.
    copy_share: f64,
    /// `gb_s` over the read bandwidth.
    read_share: f64,
    /// What `gb_s` would be if the multipliers never waited; `None` where their rate is not known.
    compute_bound_gb_s: Option<f64>,
    /// Largest difference to the f64 oracle over the largest value.
    error: f64,
}

/// Measures and prints.
pub fn run(args: &Args) -> anyhow::Result<()> {
    ensure!(args.head_dim > 0, "--head-dim is 0");
    for (name, list) in
        [("--groups", &args.groups), ("--contexts", &args.contexts), ("--threads", &args.threads)]
    {
        ensure!(!list.contains(&0), "{name} contains 0");
    }
    let isa = match args.isa {
        IsaName::Best => Some(Isa::best()),
        IsaName::Avx512 => Isa::available().find(|isa| isa.name() == "avx512"),
        IsaName::Avx2 => Isa::available().find(|isa| isa.name() == "avx2"),
        IsaName::Scalar => Some(Isa::Scalar),
    };
    let isa = isa.with_context(|| format!("--isa: this machine has no {:?}", args.isa))?;
    let pools = args
        .threads
        .iter()
        .map(|&threads| Ok(rayon::ThreadPoolBuilder::new().num_threads(threads).build()?))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let bounds: Vec<Bounds> = pools.iter().map(|pool| Bounds::measure(pool, isa)).collect();

    let mut rows = Vec::new();
    for dtype in &args.dtypes {
        let bench = Bench { args, isa, pools: &pools, bounds: &bounds };
        match dtype {
            Dtype::Bf16 => bench.dtype::<bf16>(&mut rows)?,
            Dtype::F16 => bench.dtype::<f16>(&mut rows)?,
            Dtype::F32 => bench.dtype::<f32>(&mut rows)?,
        }
    }
    report::print(&bounds, &rows)?;
    if let Some(path) = &args.json {
        report::write_json(path, &bounds, &rows)?;
    }
    Ok(())
}

/// Which rows of a shard a case reads.
enum Part {
    Whole,
    /// One list after the other.
    Listed(Vec<Vec<u32>>),
}

#[derive(Default)]
struct Scratch {
    split: SplitScratch,
    listed: AttendScratch,
    calls: usize,
}

impl Scratch {
    /// The measured call.
    fn run<R: KvRows>(
        &mut self,
        attend: &Attend<'_, R>,
        part: &Part,
        state: StateMut<'_>,
    ) -> Result<(), KernelError> {
        match part {
            Part::Whole => dense_decode(attend, 0..attend.rows.num_rows(), &mut self.split, state),
            Part::Listed(lists) => {
                let list = &lists[self.calls % lists.len()];
                self.calls += 1;
                sparse_decode(attend, Rows::List(list), &mut self.listed, state)
            }
        }
    }
}

/// What was measured.
struct Case {
    group: usize,
    context: usize,
    num_rows: usize,
    error: f64,
    spread: Spread,
}

struct Bench<'a> {
    args: &'a Args,
    isa: Isa,
    pools: &'a [rayon::ThreadPool],
    bounds: &'a [Bounds],
}

impl Bench<'_> {
    /// All cases of one element type.
    fn dtype<E: KvElem>(&self, rows: &mut Vec<Row>) -> anyhow::Result<()> {
        let d = self.args.head_dim;
        for &context in &self.args.contexts {
            let shards = Shards::<E>::random(context, d);
            for &group in &self.args.groups {
                let mut q = data::queries(group, d);
                if let Queries::Bf16 = self.args.queries {
                    q.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32());
                }
                let error = self.verify(&shards, &q, &Part::Whole)?;
                for (pool, bounds) in self.pools.iter().zip(self.bounds) {
                    let spread = pool.install(|| self.time(&shards, &q, &Part::Whole))?;
                    rows.push(
                        self.row::<E>(Case { group, context, num_rows: context, error, spread }, bounds),
                    );
                }
                let Some((pool, bounds)) = self.pools.iter().zip(self.bounds).find(|(_, b)| b.threads == 1)
                else {
                    continue;
                };
                for &budget in self.args.budgets.iter().filter(|&&budget| budget < context) {
                    let part = Part::Listed(data::scattered(budget, context, 2 * d * size_of::<E>()));
                    let error = self.verify(&shards, &q, &part)?;
                    let spread = pool.install(|| self.time(&shards, &q, &part))?;
                    rows.push(
                        self.row::<E>(Case { group, context, num_rows: budget, error, spread }, bounds),
                    );
                }
            }
        }
        Ok(())
    }

    /// A measured case beside its bounds.
    fn row<E: KvElem>(&self, case: Case, bounds: &Bounds) -> Row {
        let Case { group, context, num_rows, error, spread } = case;
        let bytes = num_rows * 2 * self.args.head_dim * size_of::<E>();
        let gb_s = bytes as f64 / spread.median_us / 1e3;
        // Two multiply-adds per head and dimension, against two elements.
        let fma_per_byte = group as f64 / size_of::<E>() as f64;
        Row {
            dtype: E::NAME,
            isa: self.isa.name(),
            group,
            head_dim: self.args.head_dim,
            context,
            num_rows,
            threads: bounds.threads,
            bytes,
            spread,
            gb_s,
            best_gb_s: bytes as f64 / spread.best_us / 1e3,
            copy_share: gb_s / bounds.copy_gb_s,
            read_share: gb_s / bounds.read_gb_s,
            compute_bound_gb_s: bounds.gfma_s.map(|rate| rate / fma_per_byte),
            error,
        }
    }

    /// Error of the first shard's attention against the f64 oracle; too large a one is a failure.
    fn verify<E: KvElem>(&self, shards: &Shards<E>, q: &[f32], part: &Part) -> anyhow::Result<f64> {
        let rows = shards.rows(0)?;
        let attend = self.attend(q, &rows);
        let which = match part {
            Part::Whole => Rows::Range(0..rows.num_rows()),
            Part::Listed(lists) => Rows::List(&lists[0]),
        };
        let want = attend_f64(&attend, &which)?;
        let (mut out, mut lse) = (vec![0.0; q.len()], vec![0.0; q.len() / self.args.head_dim]);
        let state = StateMut { out: &mut out, lse: &mut lse };
        Scratch::default().run(&attend, part, state)?;
        let worst = |got: &[f32], want: &[f64]| {
            got.iter().zip(want).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max)
        };
        let error = worst(&out, &want.out).max(worst(&lse, &want.lse)) / data::VALUE_MAX;
        ensure!(error <= ERROR_MAX, "{} {}: error {error:e} is over {ERROR_MAX:e}", E::NAME, self.isa.name());
        Ok(error)
    }

    /// Times calls on one shard after the other.
    fn time<E: KvElem>(&self, shards: &Shards<E>, q: &[f32], part: &Part) -> anyhow::Result<Spread> {
        let (mut out, mut lse) = (vec![0.0; q.len()], vec![0.0; q.len() / self.args.head_dim]);
        let mut scratch = Scratch::default();
        let mut seconds = Vec::new();
        let limit = Duration::from_secs_f64(self.args.seconds);
        let start = Instant::now();
        // The first round over the shards warms up.
        for call in 0.. {
            let rows = shards.rows(call % shards.len())?;
            let attend = self.attend(q, &rows);
            let state = StateMut { out: &mut out, lse: &mut lse };
            let before = Instant::now();
            scratch.run(&attend, part, state)?;
            if call >= shards.len() {
                seconds.push(before.elapsed().as_secs_f64());
                if start.elapsed() >= limit && seconds.len() >= shards.len() {
                    break;
                }
            }
        }
        Ok(Spread::of(seconds))
    }

    fn attend<'a, R>(&self, q: &'a [f32], rows: &'a R) -> Attend<'a, R> {
        let scale = 1.0 / (self.args.head_dim as f32).sqrt();
        Attend { isa: self.isa, q, rows, params: AttendParams { scale, softcap: None } }
    }
}
