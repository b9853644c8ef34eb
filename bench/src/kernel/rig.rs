//! The device, its bounds, and how a case is timed.

use anyhow::ensure;
use floe_cuda::device::{Device, DeviceBuffer, DeviceError, Event, Graph, PinnedBuffer, Stream};
use half::bf16;
use serde::Serialize;

use crate::stats::Spread;

/// Bytes that one round over the sets reads at least: three times an H100's second-level cache.
const ROUND_BYTES: usize = 160 << 20;
/// Sets at most; recording more only takes time.
const SETS_MAX: usize = 160;

/// One measured case.
#[derive(Debug, Serialize)]
pub struct Row {
    pub kernel: &'static str,
    pub case: String,
    /// Bytes that one launch has to move over what bounds it.
    pub bytes: usize,
    #[serde(flatten)]
    pub spread: Spread,
    pub gb_s: f64,
    /// `gb_s` over the bound: the copy bandwidth, or the link to the host.
    pub share: f64,
    /// Largest relative error against the f64 twin.
    pub error: f64,
}

/// Measured bandwidths, GB/s (10^9).
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Bounds {
    /// Large copy on the device, bytes read plus bytes written.
    pub copy_gb_s: f64,
    /// Large copy from page-locked host memory.
    pub link_gb_s: f64,
}

pub struct Rig {
    pub device: Device,
    pub stream: Stream,
    replays: usize,
    only: Vec<String>,
}

impl Rig {
    pub fn new(ordinal: usize, replays: usize, only: Vec<String>) -> anyhow::Result<Self> {
        ensure!(replays > 0, "--replays is 0");
        let device = Device::open(ordinal)?;
        let stream = Stream::new(&device)?;
        Ok(Self { device, stream, replays, only })
    }

    /// Whether a case was asked for.
    pub fn wants(&self, kernel: &str, case: &str) -> bool {
        let name = format!("{kernel} {case}");
        self.only.is_empty() || self.only.iter().any(|part| name.contains(part.as_str()))
    }

    /// Sets of a case that reads `bytes` a launch.
    pub fn sets(bytes: usize) -> usize {
        ROUND_BYTES.div_ceil(bytes.max(1)).clamp(2, SETS_MAX)
    }

    /// Times rounds of `sets` launches; microseconds per launch.
    pub fn time(
        &self,
        sets: usize,
        mut launch: impl FnMut(usize) -> Result<(), DeviceError>,
    ) -> anyhow::Result<Spread> {
        let graph = Graph::capture(&self.stream, || (0..sets).try_for_each(&mut launch))?;
        let (start, end) = (Event::new(&self.device)?, Event::new(&self.device)?);
        let mut seconds = Vec::with_capacity(self.replays);
        for replay in 0..self.replays + 3 {
            start.record(&self.stream)?;
            graph.launch(&self.stream)?;
            end.record(&self.stream)?;
            end.synchronize()?;
            // The first rounds warm up.
            if replay >= 3 {
                seconds.push(end.micros_since(&start)? / 1e6 / sets as f64);
            }
        }
        Ok(Spread::of(seconds))
    }
}

impl Bounds {
    pub fn measure(rig: &Rig) -> anyhow::Result<Self> {
        let len = 1 << 30;
        let source = DeviceBuffer::<u8>::zeros(&rig.device, len)?;
        let mut target = DeviceBuffer::<u8>::zeros(&rig.device, len)?;
        let copy = rig.time(2, |_| target.copy_from(&source, &rig.stream))?;
        drop((source, target));
        let len = 256 << 20;
        let mut target = DeviceBuffer::<u8>::zeros(&rig.device, len)?;
        let host = PinnedBuffer::<u8>::zeros(&rig.device, len)?;
        let link = rig.time(1, |_| target.copy_from_host(&host, &rig.stream))?;
        Ok(Self {
            copy_gb_s: 2.0 * f64::from(1 << 30) / copy.median_us / 1e3,
            link_gb_s: len as f64 / link.median_us / 1e3,
        })
    }
}

/// Small deterministic generator (SplitMix64).
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// Roughly normal, variance 1.
    pub fn normal(&mut self) -> f32 {
        let bits = self.bits();
        let sum: f32 = (0..4).map(|i| ((bits >> (16 * i)) & 0xffff) as f32 / 65536.0 - 0.5).sum();
        sum * 3f32.sqrt()
    }

    pub fn normals(&mut self, len: usize) -> Vec<bf16> {
        (0..len).map(|_| bf16::from_f32(self.normal())).collect()
    }

    /// `len` distinct numbers below `n`.
    pub fn distinct(&mut self, n: usize, len: usize) -> Vec<u32> {
        let mut all: Vec<u32> = (0..n as u32).collect();
        for i in 0..len {
            let j = i + self.bits() as usize % (n - i);
            all.swap(i, j);
        }
        all.truncate(len);
        all
    }
}

/// Rows that repeat a random block, on the host and on the device: gigabytes without gigabytes of random numbers.
pub struct Pool {
    block: Vec<bf16>,
    pub device: DeviceBuffer<bf16>,
}

impl Pool {
    /// `len` elements. The block's length is odd in pages, so that neighbouring shards differ.
    pub fn new(rig: &Rig, len: usize) -> anyhow::Result<Self> {
        const BLOCK: usize = 1021 * 4096;
        let block = Random(7).normals(BLOCK.min(len));
        let mut device = DeviceBuffer::zeros(&rig.device, len)?;
        for start in (0..len).step_by(block.len()) {
            device.write_at(start, &block[..block.len().min(len - start)])?;
        }
        Ok(Self { block, device })
    }

    /// Elements `start..start + len`.
    pub fn host(&self, start: usize, len: usize) -> Vec<bf16> {
        (start..start + len).map(|i| self.block[i % self.block.len()]).collect()
    }
}

/// Largest relative error of a head's output, `|o - o_ref| / |o_ref|`.
pub fn error(out: &[f32], want: &[f64], d: usize) -> f64 {
    let mut worst = 0f64;
    for (out, want) in out.chunks(d).zip(want.chunks(d)) {
        let norm: f64 = want.iter().map(|x| x * x).sum::<f64>().sqrt();
        let far: f64 = out.iter().zip(want).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum::<f64>().sqrt();
        let far = far / norm.max(1e-30);
        // Not `f64::max`, which would drop a NaN.
        worst = if far <= worst { worst } else { far };
    }
    worst
}
