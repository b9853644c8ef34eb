//! `floe-bench tiers`: attention over the slabs of the warm tier against the same attention over one flat array.

use std::time::Instant;

use anyhow::ensure;
use floe::attend::{AttendScratch, AttentionBackend, CpuBackend, Tokens};
use floe::page::{SLAB_ALIGN, ShardPages};
use floe::query::GroupQuery;
use floe::shape::PageShape;
use floe::state::StateBuf;
use floe::{KvDtype, TensorView};
use floe_cuda::{Attend, AttendParams, Isa, Rows, SliceRows, SplitScratch, dense_decode, sparse_decode};
use half::bf16;

use crate::stats::Spread;

/// What to measure.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Tokens of context of each shard.
    #[arg(long, default_value_t = 32768)]
    context: usize,
    /// Rows, evenly scattered, that the sparse case attends.
    #[arg(long, default_value_t = 256)]
    budget: usize,
    /// Query heads that share the kv head.
    #[arg(long, default_value_t = 4)]
    group: usize,
    /// Shards in rotation: together larger than the caches.
    #[arg(long, default_value_t = 16)]
    shards: usize,
    /// Pairs of timings.
    #[arg(long, default_value_t = 400)]
    samples: usize,
}

const DIM: usize = 128;

/// Runs the comparison: pairs of calls on the same shard, the two layouts in turn, first place alternating.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let (mut slabs, mut flats) = (Vec::new(), Vec::new());
    for shard in 0..args.shards {
        let value = |i: usize| bf16::from_f32(((i * 31 + shard * 7) % 1009) as f32 / 1009.0 - 0.5);
        let k: Vec<bf16> = (0..args.context * DIM).map(value).collect();
        let v: Vec<bf16> = (0..args.context * DIM).map(|i| value(i + 5)).collect();
        let mut pages = ShardPages::new(PageShape::new(DIM, KvDtype::Bf16));
        let shape = [args.context, 1, DIM];
        pages.append(&TensorView::contiguous(&k[..], shape)?, &TensorView::contiguous(&v[..], shape)?, 0)?;
        slabs.push(pages);
        let rows = k.chunks_exact(DIM).zip(v.chunks_exact(DIM));
        flats.push(Aligned::of(rows.flat_map(|(k, v)| [k, v].concat()).collect()));
    }
    let q: Vec<f32> =
        (0..args.group * DIM).map(|i| bf16::from_f32((i % 97) as f32 / 97.0).to_f32()).collect();
    let query = GroupQuery { q: &q, group: args.group, scale: 0.09 };
    let stride = (args.context / args.budget).max(1) as u32;
    let list: Vec<u32> = (0..args.budget as u32).map(|i| i * stride).collect();
    let all = 0..args.context as u32;
    for (name, tokens) in [("sparse", Tokens::List(&list)), ("dense", Tokens::Range(all))] {
        let (backend, mut scratch, mut state) =
            (CpuBackend::detect(), AttendScratch::default(), StateBuf::default());
        let (mut rows, mut splits, mut part) =
            <(floe_cuda::AttendScratch, SplitScratch, StateBuf)>::default();
        let mut merged = StateBuf::default();
        let (mut of_slabs, mut of_flat, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        let samples = if name == "sparse" { args.samples } else { args.samples.div_ceil(4) };
        for sample in 0..samples + args.shards {
            let mut seconds = [0.0; 2];
            for turn in 0..2 {
                // A different shard for each of the pair, so that the second finds no warm cache.
                let shard = (sample * 2 + turn) % args.shards;
                let start = Instant::now();
                if (turn + sample) % 2 == 0 {
                    state.reset(args.group, DIM);
                    backend.attend(&query, &slabs[shard], tokens.clone(), &mut scratch, &mut state)?;
                    seconds[0] = start.elapsed().as_secs_f64();
                } else {
                    // The engine merges into the state of sinks and window; so does the rival.
                    merged.reset(args.group, DIM);
                    part.reset(args.group, DIM);
                    let flat = SliceRows::new(flats[shard].elems(), DIM)?;
                    let params = AttendParams { scale: query.scale, softcap: None };
                    let attend = Attend { isa: Isa::best(), q: &q, rows: &flat, params };
                    match &tokens {
                        Tokens::Range(r) => {
                            dense_decode(
                                &attend,
                                r.start as usize..r.end as usize,
                                &mut splits,
                                part.as_mut(),
                            )?;
                        }
                        _ => sparse_decode(&attend, Rows::List(&list), &mut rows, part.as_mut())?,
                    }
                    merged.merge(&part)?;
                    seconds[1] = start.elapsed().as_secs_f64();
                }
            }
            if sample >= args.shards {
                of_slabs.push(seconds[0]);
                of_flat.push(seconds[1]);
                ratios.push(seconds[0] / seconds[1]);
            }
        }
        // The same bits, on the same shard.
        state.reset(args.group, DIM);
        backend.attend(&query, &slabs[0], tokens.clone(), &mut scratch, &mut state)?;
        let flat = SliceRows::new(flats[0].elems(), DIM)?;
        let params = AttendParams { scale: query.scale, softcap: None };
        let attend = Attend { isa: Isa::best(), q: &q, rows: &flat, params };
        part.reset(args.group, DIM);
        match &tokens {
            Tokens::Range(r) => {
                dense_decode(&attend, r.start as usize..r.end as usize, &mut splits, part.as_mut())?
            }
            _ => sparse_decode(&attend, Rows::List(&list), &mut rows, part.as_mut())?,
        }
        merged.reset(args.group, DIM);
        merged.merge(&part)?;
        ensure!(merged == state, "{name}: slabs and flat array differ");
        ratios.sort_by(f64::total_cmp);
        let (slab, flat) = (Spread::of(of_slabs), Spread::of(of_flat));
        print_line(&format!(
            "{name}: slabs {:.2} us, flat {:.2} us (medians), best {:.2} / {:.2}, median of paired ratios {:.3}",
            slab.median_us,
            flat.median_us,
            slab.best_us,
            flat.best_us,
            ratios[ratios.len() / 2]
        ))?;
    }
    Ok(())
}

/// A flat array that starts on a cache line, as the slabs do: otherwise alignment would be what is compared.
struct Aligned {
    data: Vec<bf16>,
    first: usize,
}

impl Aligned {
    fn of(rows: Vec<bf16>) -> Self {
        let per_line = SLAB_ALIGN / size_of::<bf16>();
        let mut data = vec![bf16::ZERO; rows.len() + per_line];
        let first = data.as_ptr().align_offset(SLAB_ALIGN).min(per_line);
        data[first..first + rows.len()].copy_from_slice(&rows);
        data.truncate(first + rows.len());
        Self { data, first }
    }

    fn elems(&self) -> &[bf16] {
        &self.data[self.first..]
    }
}

fn print_line(line: &str) -> anyhow::Result<()> {
    use std::io::Write;
    Ok(writeln!(std::io::stdout(), "{line}")?)
}
