//! `floe generate --backend cuda`.

use std::io::{self, Write};

use floe::HotConfig;
use floe::host::{GpuBackend, HostError, Model, Sampler};
use floe_cuda::ops::DeviceElem;
use half::{bf16, f16};

use super::{DtypeArg, GenerateArgs, answer, print_doubt, print_times};

/// Slots of a kv head where the user names no number, for each token that a step attends.
const SLOTS_PER_TOKEN: usize = 4;

pub fn run(
    args: &GenerateArgs,
    model: &Model,
    (prompt, sampler): (&[u32], &mut Sampler),
) -> anyhow::Result<()> {
    match args.kv.kv_dtype {
        DtypeArg::Bf16 => run_as::<bf16>(args, model, (prompt, sampler)),
        DtypeArg::F16 => run_as::<f16>(args, model, (prompt, sampler)),
        DtypeArg::F32 => {
            let (value, reason) = ("f32".to_owned(), "on a device it is bf16 or f16".to_owned());
            Err(HostError::Argument { field: "kv-dtype", value, reason }.into())
        }
    }
}

fn run_as<E: DeviceElem>(
    args: &GenerateArgs,
    model: &Model,
    (prompt, sampler): (&[u32], &mut Sampler),
) -> anyhow::Result<()> {
    let mut config = args.kv.config(model, args.seed);
    let keep_all = config.hot.slots == 0;
    if keep_all {
        config.hot = HotConfig { slots: SLOTS_PER_TOKEN * config.budget, ..config.hot };
    }
    let mut kv = GpuBackend::<E>::open(config, model.config().context, keep_all)?;
    let times = answer(args, model, (prompt, sampler), &mut kv)?;
    print_times(&times)?;
    let (report, memory) = (kv.report()?, kv.memory());
    let mut stderr = io::stderr().lock();
    writeln!(stderr, "device   {}", report.device)?;
    writeln!(
        stderr,
        "steps    {:.1} % of the layers' exact; {}",
        100.0 * report.exact_steps as f64 / report.steps.max(1) as f64,
        report.rule,
    )?;
    if report.link_steps > 0 {
        let share = 100.0 * report.link_steps as f64 / report.steps.max(1) as f64;
        let bytes = report.bytes_in_place as f64 / times.decode.tokens.max(1) as f64;
        writeln!(stderr, "link     {share:.1} % of the layers' steps, {:.2} MB a token", bytes / 1e6)?;
    }
    print_doubt(report.doubt_rate())?;
    writeln!(
        stderr,
        "hot      hit rate {:.1} %, {:.2} MB a token moved",
        100.0 * report.hit_rate(),
        report.bytes_fetched as f64 / times.decode.tokens.max(1) as f64 / 1e6,
    )?;
    writeln!(
        stderr,
        "memory   device {:.1} MB of rows, {:.1} MB beside; host {:.1} MB, page-locked",
        memory.rows_bytes as f64 / 1e6,
        memory.summary_bytes as f64 / 1e6,
        memory.host_bytes as f64 / 1e6,
    )?;
    Ok(())
}
