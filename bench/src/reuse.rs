//! `floe-bench reuse`: what a decode step costs with reuse and without, on recorded queries.

use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, ensure};
use floe::trace::Trace;
use floe::{Config, DecodeStep, Engine, HeadShape, KvDtype, LayerId, SeqId, StepReport, TensorView};

use crate::stats::Spread;

/// Policies in pairs: without reuse, with it, and whether the second must refuse every match. Equal pairs show how far the machine's
/// noise goes.
const PAIRS: [(&str, &str, Verdict); 8] = [
    ("full", "full", Verdict::RefusesAll),
    ("floe", "floe", Verdict::RefusesAll),
    ("full", "mac:tau=1", Verdict::RefusesAll),
    ("full", "reuse:max_error=0.000001", Verdict::RefusesAll),
    ("floe", "floe:reuse=on,max_error=0.000001", Verdict::RefusesAll),
    ("full", "mac:tau=0.45", Verdict::Free),
    ("full", "reuse:max_error=0.05", Verdict::Free),
    ("full", "reuse:max_error=0.1", Verdict::Free),
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict {
    RefusesAll,
    Free,
}

/// What to measure.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Recorded trace with queries before rotary embedding; one shard.
    #[arg(long)]
    trace: PathBuf,
    /// First steps that are left out of the steady figures: the thresholds are being learnt.
    #[arg(long, default_value_t = 256)]
    learning: usize,
}

/// One engine that decodes the trace.
struct Side<'a> {
    trace: &'a Trace,
    engine: Engine,
    seq: SeqId,
    out: Vec<f32>,
    report: StepReport,
    seconds: Vec<f64>,
    reused: usize,
}

impl<'a> Side<'a> {
    fn open(trace: &'a Trace, policy: &str) -> anyhow::Result<Self> {
        let meta = trace.meta();
        let heads = HeadShape::new(meta.group(), 1, meta.head_dim)?;
        let config = Config { policy: policy.parse()?, threads: 1, ..Config::new(1, heads, KvDtype::Bf16) };
        let mut engine = Engine::open(config)?;
        let seq = engine.admit()?;
        let (k, v) = rows(trace, 0, meta.first_query_pos)?;
        engine.prefill(seq, LayerId(0), &k, &v)?;
        engine.publish(seq)?;
        let out = vec![0.0; meta.group() * meta.head_dim];
        Ok(Self { trace, engine, seq, out, report: StepReport::default(), seconds: Vec::new(), reused: 0 })
    }

    fn step(&mut self, query: usize) -> anyhow::Result<()> {
        let meta = self.trace.meta();
        let position = meta.first_query_pos + query;
        let shape = [1, meta.group(), meta.head_dim];
        let (k_new, v_new) = rows(self.trace, position, position + 1)?;
        let step = DecodeStep {
            layer: LayerId(0),
            position,
            q: TensorView::contiguous(self.trace.query(query), shape)?,
            q_pre: Some(TensorView::contiguous(self.trace.query_pre(query), shape)?),
            k_new,
            v_new,
            scale: meta.softmax_scale as f32,
        };
        let start = Instant::now();
        self.engine.decode(self.seq, &step, &mut self.out, &mut self.report)?;
        self.seconds.push(start.elapsed().as_secs_f64());
        self.reused += usize::from(self.report.shards[0].reuse.heads_reused > 0);
        Ok(())
    }
}

fn rows(trace: &Trace, from: usize, to: usize) -> anyhow::Result<(TensorView<'_>, TensorView<'_>)> {
    let dim = trace.meta().head_dim;
    let (of, shape) = (from * dim..to * dim, [to - from, 1, dim]);
    let k = TensorView::contiguous(&trace.k()[of.clone()], shape)?;
    Ok((k, TensorView::contiguous(&trace.v()[of], shape)?))
}

/// Runs every pair: step by step in turn, first place alternating.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let trace = Trace::open(&args.trace).context("the trace to decode")?;
    let steps = trace.meta().num_queries;
    ensure!(steps > args.learning, "the trace has {steps} queries, {} are left out", args.learning);
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{}: {steps} steps, the first {} apart, one thread", trace.name(), args.learning)?;
    for (plain, with, verdict) in PAIRS {
        let (mut a, mut b) = (Side::open(&trace, plain)?, Side::open(&trace, with)?);
        for query in 0..steps {
            if query % 2 == 0 {
                a.step(query)?;
                b.step(query)?;
            } else {
                b.step(query)?;
                a.step(query)?;
            }
            if verdict == Verdict::RefusesAll {
                let size = a.out.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                let off = a.out.iter().zip(&b.out).fold(0.0f32, |m, (x, y)| m.max((x - y).abs()));
                ensure!(
                    b.reused == 0 && off <= 1e-4 * size,
                    "{with}: step {query} differs by {off} of {size}"
                );
            }
        }
        let ratio = |from: usize, to: usize| {
            let pairs = a.seconds[from..to].iter().zip(&b.seconds[from..to]);
            let mut ratios: Vec<f64> = pairs.map(|(a, b)| b / a).collect();
            ratios.sort_by(f64::total_cmp);
            let total = |x: &[f64]| x[from..to].iter().sum::<f64>();
            (ratios[ratios.len() / 2], total(&b.seconds) / total(&a.seconds))
        };
        let (learning, steady) = (ratio(0, args.learning), ratio(args.learning, steps));
        let median = |x: &[f64]| Spread::of(x[args.learning..].to_vec()).median_us;
        writeln!(
            stdout,
            "{with} against {plain}: {:.1} / {:.1} us (medians), median of paired ratios {:.3}, of all time {:.3}; \
             while learning {:.3}, {:.3}; reused {:.1} % of steps",
            median(&b.seconds),
            median(&a.seconds),
            steady.0,
            steady.1,
            learning.0,
            learning.1,
            100.0 * b.reused as f64 / steps as f64,
        )?;
    }
    Ok(())
}
