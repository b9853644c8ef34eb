//! When the kernels of a step ran, from records that their blocks leave (feature `timeline`).

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, ensure};
use floe_cuda::device::timeline::{Record, WORKS};

/// Times of one kernel of a step, microseconds from the moment at which the step's first kernel could work.
#[derive(Debug, Clone, Copy)]
struct Span {
    /// The first and the last block took their places.
    placed: [f64; 2],
    /// What they waited for was done, the first and the last time.
    ready: [f64; 2],
    /// The first and the last block were done.
    done: [f64; 2],
}

/// Prints medians over the steps that left `records`, and writes the records as CSV.
#[expect(clippy::print_stdout, reason = "the table is what the command is for")]
pub fn report(records: &[Record], steps: usize, csv: &Path) -> anyhow::Result<()> {
    let mut by_work: Vec<Vec<[u64; 4]>> = vec![Vec::new(); WORKS.len()];
    let mut text = String::from("work,block,multiprocessor,start_ns,ready_ns,end_ns\n");
    let origin = records.iter().map(|record| record.times()[0]).min().unwrap_or_default();
    for record in records {
        let [start, ready, end] = record.times().map(|t| t - origin);
        let work = record.work as usize;
        ensure!(work < WORKS.len(), "a record names kernel {work}");
        by_work[work].push([start, ready, end, u64::from(record.multiprocessor)]);
        writeln!(text, "{},{},{},{start},{ready},{end}", WORKS[work], record.block, record.multiprocessor)?;
    }
    std::fs::write(csv, text).with_context(|| format!("cannot write {}", csv.display()))?;
    by_work.iter_mut().for_each(|records| records.sort_unstable());
    // Every step runs the same kernels on as many blocks, and they never overlap those of the next step.
    let of_step = |work: usize, step: usize| {
        let records = &by_work[work];
        let each = records.len() / steps;
        &records[step * each..(step + 1) * each]
    };
    let begin =
        |step: usize| of_step(0, step).iter().map(|record| record[1]).min().unwrap_or_default() as f64;
    println!("    | kernel | blocks | multiprocessors | placed | may work | done |");
    println!("    |---|---:|---:|---:|---:|---:|");
    for (work, name) in WORKS.iter().enumerate().filter(|(work, _)| !by_work[*work].is_empty()) {
        ensure!(by_work[work].len().is_multiple_of(steps), "{name} left {} records", by_work[work].len());
        let span = |step: usize| {
            let records = of_step(work, step);
            let range = |at: usize| {
                let of = || records.iter().map(move |record| (record[at] as f64 - begin(step)) / 1e3);
                [of().fold(f64::INFINITY, f64::min), of().fold(f64::NEG_INFINITY, f64::max)]
            };
            Span { placed: range(0), ready: range(1), done: range(2) }
        };
        let spans: Vec<Span> = (0..steps).map(span).collect();
        let median = |of: fn(&Span) -> [f64; 2]| {
            [0, 1].map(|side| {
                let mut all: Vec<f64> = spans.iter().map(|span| of(span)[side]).collect();
                all.sort_by(f64::total_cmp);
                all[all.len() / 2]
            })
        };
        let mut places: Vec<u64> = of_step(work, steps / 2).iter().map(|record| record[3]).collect();
        places.sort_unstable();
        places.dedup();
        let text = |[first, last]: [f64; 2]| format!("{first:.1} to {last:.1}");
        println!(
            "    | {name} | {} | {} | {} | {} | {} |",
            by_work[work].len() / steps,
            places.len(),
            text(median(|span| span.placed)),
            text(median(|span| span.ready)),
            text(median(|span| span.done)),
        );
    }
    Ok(())
}
