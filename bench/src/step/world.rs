//! One case: an engine filled with keys and values, and its timed tokens.

use std::time::Instant;

use anyhow::ensure;
use floe::gpu::{
    Device, DeviceTensor, Event, GpuEngine, GpuMemory, GpuOptions, GpuReport, LayerStep, Prefer, Stream,
    Submit, TailPlace, TensorType,
};
use floe::{Config, HeadShape, HotConfig, KvDtype, LayerId, SeqId};
use floe_cuda::device::DeviceBuffer;
use half::bf16;

const HEADS: usize = 8;
const GROUP: usize = 4;
const D: usize = 128;
/// Tokens of a prefill piece.
const PIECE: usize = 4096;
/// Calls of a layer before the clock starts: recorded by the third, slots filled by the last.
const WARM_CALLS: usize = 24;
/// Queries in memory: where they do not suffice, earlier ones return, whose tokens are in their slots.
const QUERY_BYTES: usize = 256 << 20;
/// Elements between the starts of consecutive pieces in the pool of random numbers: every row of every piece is then another one.
const SHIFT: usize = 40;

/// What to measure.
#[derive(Debug, Clone)]
pub struct Case {
    pub context: usize,
    pub batch: usize,
    pub policy: String,
    pub budget: usize,
    pub hot: f64,
    pub drift: f32,
    /// Of the model.
    pub layers: usize,
    /// In memory.
    pub held: usize,
    pub tokens: usize,
    /// Rows of a layer on the device at least.
    pub rows: usize,
    pub tail: TailPlace,
    /// Tokens of a kv head brought in behind a step.
    pub prefetch: usize,
    /// Microseconds of a device copy behind each call.
    pub gap_us: f64,
    pub submit: Submit,
    pub host_lists: bool,
    /// Where the records of one token more go.
    #[cfg(feature = "timeline")]
    pub timeline: Option<std::path::PathBuf>,
    /// Wait for each token before the next is queued.
    pub paced: bool,
    /// 0: half of the cores.
    pub tree_threads: usize,
}

/// What came out.
pub struct Timed {
    /// The gaps taken off.
    pub token_ms: Vec<f64>,
    /// Time of a gap.
    pub gap_us: f64,
    /// Seconds until the trees of the prompt were built.
    pub build_s: f64,
    /// Microseconds that a layer takes longer in the calls in which sixteen tokens leave the window: medians.
    pub update_us: f64,
    pub report: GpuReport,
    pub memory: GpuMemory,
}

/// Bytes of keys and values of a layer.
pub fn layer_bytes(batch: usize, context: usize) -> usize {
    batch * context * HEADS * D * 4
}

/// Random numbers on the device that keys and values are taken from.
pub struct Kv {
    pool: DeviceBuffer<bf16>,
    pub stream: Stream,
}

impl Kv {
    pub fn new(device: &Device) -> anyhow::Result<Self> {
        let len = PIECE * HEADS * D + 2 * 512 * SHIFT + 64;
        let mut random = Random(7);
        let data: Vec<bf16> = (0..len).map(|_| bf16::from_f32(random.normal())).collect();
        Ok(Self { pool: DeviceBuffer::from_slice(device, &data)?, stream: Stream::new(device)? })
    }

    /// A run of `tokens` rows for piece `piece`.
    fn tensor(&self, piece: usize, tokens: usize) -> DeviceTensor {
        let address = self.pool.view().address() + (piece % 1024 * SHIFT * 2) as u64;
        // SAFETY: the pool holds the longest run behind the last shift, and lives until the case is done.
        unsafe { DeviceTensor::contiguous(address, TensorType::Bf16, [tokens, HEADS, D]) }
    }
}

struct Random(u64);

impl Random {
    fn normal(&mut self) -> f32 {
        let mut sum = 0.0;
        for _ in 0..2 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let x = x ^ (x >> 27);
            sum += (x as u32 as f32) / (1u64 << 32) as f32 + ((x >> 32) as f32) / (1u64 << 32) as f32 - 1.0;
        }
        sum * 3f32.sqrt()
    }
}

/// Inputs of all calls, and the places that the engine reads them at.
struct Inputs {
    /// [calls + 1 tokens, layers held, batch * heads * dim]
    all: DeviceBuffer<bf16>,
    /// [layers held, batch * heads * dim]
    now: DeviceBuffer<bf16>,
    rounds: usize,
    each: usize,
}

impl Inputs {
    fn new(device: &Device, case: &Case, rounds: usize) -> anyhow::Result<Self> {
        let each = case.batch * HEADS * GROUP * D;
        let keep = (1.0 - case.drift * case.drift).sqrt();
        let mut random = Random(99);
        // Twice the length of a random vector: attention that is neither flat nor on one token.
        let mut q: Vec<f32> = (0..case.held * each).map(|_| 2.0 * random.normal()).collect();
        let mut all = Vec::with_capacity(rounds * q.len());
        for _ in 0..rounds {
            all.extend(q.iter().map(|x| bf16::from_f32(*x)));
            if case.drift > 0.0 {
                q.iter_mut().for_each(|x| *x = keep * *x + case.drift * 2.0 * random.normal());
            }
        }
        let now = DeviceBuffer::zeros(device, case.held * each)?;
        Ok(Self { all: DeviceBuffer::from_slice(device, &all)?, now, rounds, each })
    }

    /// Places the queries of a round where the engine reads them.
    fn enter(&mut self, round: usize, stream: &Stream) -> anyhow::Result<()> {
        let len = self.now.view().len();
        let start = round % self.rounds * len;
        self.now.copy_part(0, (&self.all, start..start + len), stream)?;
        Ok(())
    }

    fn q(&self, layer: usize, batch: usize) -> DeviceTensor {
        let address = self.now.view().address() + (layer * self.each * 2) as u64;
        // SAFETY: the buffer holds all layers and lives until the case is done.
        unsafe { DeviceTensor::contiguous(address, TensorType::Bf16, [batch, HEADS * GROUP, D]) }
    }
}

/// What stands in for a host engine's work between two calls: a copy on the device.
struct Gap {
    buffers: Option<[DeviceBuffer<u8>; 2]>,
    /// Its time alone.
    us: f64,
}

impl Gap {
    fn new(device: &Device, us: f64, stream: &Stream) -> anyhow::Result<Self> {
        if us <= 0.0 {
            return Ok(Self { buffers: None, us: 0.0 });
        }
        // Large copies run at a rate: what a first one of 256 MiB takes says how much the time wanted moves.
        let mut trial = Self::of(device, 1 << 28, stream)?;
        let bytes = (f64::from(1 << 28) * us / trial.time(device, stream)?) as usize;
        drop(trial);
        let mut gap = Self::of(device, bytes.next_multiple_of(256), stream)?;
        gap.us = gap.time(device, stream)?;
        Ok(gap)
    }

    fn of(device: &Device, bytes: usize, stream: &Stream) -> anyhow::Result<Self> {
        let buffers = Some([DeviceBuffer::zeros(device, bytes)?, DeviceBuffer::zeros(device, bytes)?]);
        let mut gap = Self { buffers, us: 0.0 };
        gap.time(device, stream)?;
        Ok(gap)
    }

    fn queue(&mut self, stream: &Stream) -> anyhow::Result<()> {
        let Some([from, to]) = &mut self.buffers else { return Ok(()) };
        Ok(to.copy_from(from, stream)?)
    }

    /// Microseconds of one of many in a row.
    fn time(&mut self, device: &Device, stream: &Stream) -> anyhow::Result<f64> {
        const REPEATS: usize = 64;
        let (start, end) = (Event::new(device)?, Event::new(device)?);
        start.record(stream)?;
        for _ in 0..REPEATS {
            self.queue(stream)?;
        }
        end.record(stream)?;
        end.synchronize()?;
        Ok(end.micros_since(&start)? / REPEATS as f64)
    }
}

fn engine(device: &Device, case: &Case) -> anyhow::Result<GpuEngine<bf16>> {
    let heads = HeadShape::new(HEADS * GROUP, HEADS, D)?;
    let slots = ((case.context as f64 * case.hot) as usize).max(2 * case.budget).min(case.context);
    let config = Config {
        policy: case.policy.parse()?,
        budget: case.budget,
        hot: HotConfig { slots, ..HotConfig::default() },
        ..Config::new(case.held, heads, KvDtype::Bf16)
    };
    let options = GpuOptions::for_load(&config, case.batch, case.context, case.hot);
    let lists = case.host_lists && case.policy.starts_with("floe");
    let options = if lists { options.chosen_on_host(&config)? } else { options };
    let rows = options.rows.max(case.rows);
    Ok(GpuEngine::open(
        device,
        config,
        GpuOptions {
            rows,
            prefer: Prefer::Speed,
            tail: case.tail,
            submit: case.submit,
            prefetch: case.prefetch,
            tree_threads: case.tree_threads,
            ..options
        },
    )?)
}

fn median(mut x: Vec<f64>) -> f64 {
    x.sort_by(f64::total_cmp);
    x[x.len() / 2]
}

/// Fills an engine, checks it, and times its tokens.
pub fn time(device: &Device, case: &Case, kv: &mut Kv) -> anyhow::Result<Timed> {
    let mut engine = engine(device, case)?;
    let rounds_a_token = case.layers.div_ceil(case.held);
    let calls = WARM_CALLS + (case.tokens + 1) * rounds_a_token;
    ensure!(calls < case.context, "{calls} calls of a layer do not fit a context of {}", case.context);
    let prompt = case.context - calls;
    let sequences: Vec<SeqId> = (0..case.batch).map(|_| engine.admit(None)).collect::<Result<_, _>>()?;
    engine.reserve_host(case.batch * (case.context + 256))?;
    let mut piece = 0;
    for layer in 0..case.held {
        for &seq in &sequences {
            for start in (0..prompt).step_by(PIECE) {
                let tokens = PIECE.min(prompt - start);
                let (k, v) = (kv.tensor(piece, tokens), kv.tensor(piece + 1, tokens));
                engine.prefill(seq, LayerId(layer), (&k, &v), &kv.stream)?;
                piece += 2;
            }
        }
    }
    kv.stream.synchronize()?;
    let start = Instant::now();
    for layer in 0..case.held {
        for &seq in &sequences {
            engine.index(seq, LayerId(layer), &kv.stream)?;
        }
    }
    engine.wait_for_trees();
    let build_s = start.elapsed().as_secs_f64();
    let round_bytes = case.held * case.batch * HEADS * GROUP * D * 2;
    let mut inputs = Inputs::new(device, case, calls.min((QUERY_BYTES / round_bytes).max(160)))?;
    let out = DeviceBuffer::<bf16>::zeros(device, case.batch * HEADS * GROUP * D)?;
    // SAFETY: the buffer holds the shape and lives until the case is done.
    let out_tensor = unsafe {
        DeviceTensor::contiguous(out.view().address(), TensorType::Bf16, [case.batch, HEADS * GROUP, D])
    };
    let mut gap = Gap::new(device, case.gap_us, &kv.stream)?;
    let mut positions = vec![vec![prompt; case.batch]; case.held];
    let mut call = |engine: &mut GpuEngine<bf16>, inputs: &Inputs, layer: usize| -> anyhow::Result<()> {
        // Keys and values of new tokens have one address a layer, so that the step can be replayed.
        let step = LayerStep {
            layer: LayerId(layer),
            sequences: &sequences,
            positions: &positions[layer],
            q: inputs.q(layer, case.batch),
            k_new: kv.tensor(2 * layer, case.batch),
            v_new: kv.tensor(2 * layer + 1, case.batch),
            scale: (D as f32).powf(-0.5),
            out: out_tensor,
        };
        engine.attend(&step, &kv.stream)?;
        positions[layer].iter_mut().for_each(|position| *position += 1);
        Ok(())
    };
    let (mut round, mut position) = (0, prompt);
    for _ in 0..WARM_CALLS {
        position += 1;
        inputs.enter(round, &kv.stream)?;
        round += 1;
        for layer in 0..case.held {
            call(&mut engine, &inputs, layer)?;
        }
    }
    engine.report(&kv.stream)?;
    let got = out.read(&kv.stream)?;
    ensure!(got.iter().all(|x| x.is_finite()), "the output is not finite");
    engine.clear_counters(&kv.stream)?;
    // Unless paced, nothing waits until all tokens are queued: the device never waits for the host's part of a call.
    let mut marks: Vec<Vec<(Event, Event, bool)>> = Vec::with_capacity(case.tokens);
    for _ in 0..case.tokens {
        let mut left = case.layers;
        let mut of_token = Vec::new();
        while left > 0 {
            inputs.enter(round, &kv.stream)?;
            round += 1;
            let (start, end) = (Event::new(device)?, Event::new(device)?);
            start.record(&kv.stream)?;
            for layer in 0..case.held.min(left) {
                call(&mut engine, &inputs, layer)?;
                gap.queue(&kv.stream)?;
            }
            let whole = case.held <= left;
            left -= case.held.min(left);
            end.record(&kv.stream)?;
            of_token.push((start, end, whole));
        }
        marks.push(of_token);
        if case.paced {
            kv.stream.synchronize()?;
        }
    }
    kv.stream.synchronize()?;
    let mut token_ms = Vec::with_capacity(case.tokens);
    // Of calls of all layers in memory, by whether tokens leave the window.
    let mut rounds = [Vec::new(), Vec::new()];
    for of_token in &marks {
        let mut sum = 0.0;
        for (start, end, whole) in of_token {
            let us = end.micros_since(start)?;
            sum += us;
            if *whole {
                rounds[usize::from(position % 16 == 0)].push(us / case.held as f64);
            }
            position += 1;
        }
        token_ms.push((sum - case.layers as f64 * gap.us) / 1e3);
    }
    #[cfg(feature = "timeline")]
    if let Some(path) = &case.timeline {
        floe_cuda::device::timeline::take(device)?;
        let steps = case.layers.min(rounds_a_token * case.held);
        for at in 0..steps {
            if at % case.held == 0 {
                inputs.enter(round, &kv.stream)?;
                round += 1;
            }
            call(&mut engine, &inputs, at % case.held)?;
        }
        super::timeline::report(&floe_cuda::device::timeline::take(device)?, steps, path)?;
    }
    let [without, with] = rounds.map(|us| if us.is_empty() { f64::NAN } else { median(us) });
    let update_us = with - without;
    let (report, memory) = (engine.report(&kv.stream)?, engine.memory());
    for seq in sequences {
        engine.close(seq)?;
    }
    Ok(Timed { token_ms, gap_us: gap.us, build_s, update_us, report, memory })
}
