//! The device and tensors on it.

use std::sync::{Mutex, MutexGuard, OnceLock};

use floe::gpu::{Device, DeviceTensor, Stream, TensorType};
use floe_cuda::device::DeviceBuffer;
use half::bf16;

/// One device, one test at a time: memory is sized for one engine.
pub struct World {
    pub device: Device,
    pub stream: Stream,
}

pub fn world() -> MutexGuard<'static, World> {
    static WORLD: OnceLock<Mutex<World>> = OnceLock::new();
    let world = WORLD.get_or_init(|| {
        let device = Device::open(0).unwrap();
        let stream = Stream::new(&device).unwrap();
        Mutex::new(World { device, stream })
    });
    world.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// A tensor with its memory.
pub struct Held {
    buffer: DeviceBuffer<bf16>,
    shape: [usize; 3],
}

impl Held {
    pub fn new(world: &World, data: &[bf16], shape: [usize; 3]) -> Self {
        Self { buffer: DeviceBuffer::from_slice(&world.device, data).unwrap(), shape }
    }

    pub fn set(&mut self, data: &[bf16]) {
        self.buffer.write(data).unwrap();
    }

    pub fn tensor(&self) -> DeviceTensor {
        // SAFETY: the buffer holds the shape and outlives the work of the test, which waits before it drops it.
        unsafe { DeviceTensor::contiguous(self.buffer.view().address(), TensorType::Bf16, self.shape) }
    }

    /// The same memory with all rows of a head side by side: [heads, tokens, dim] seen as [tokens, heads, dim].
    pub fn by_head(&self) -> DeviceTensor {
        let [tokens, _, dim] = self.shape;
        let strides = [dim, tokens * dim];
        // SAFETY: as for `tensor`; the strides stay within the shape's elements.
        unsafe { DeviceTensor::from_raw(self.buffer.view().address(), TensorType::Bf16, self.shape, strides) }
    }

    pub fn read(&self, world: &World) -> Vec<bf16> {
        self.buffer.read(&world.stream).unwrap()
    }
}

/// An f32 output.
pub struct Output {
    buffer: DeviceBuffer<f32>,
    shape: [usize; 3],
}

impl Output {
    pub fn new(world: &World, shape: [usize; 3]) -> Self {
        let nan = vec![f32::NAN; shape.iter().product()];
        Self { buffer: DeviceBuffer::from_slice(&world.device, &nan).unwrap(), shape }
    }

    pub fn tensor(&self) -> DeviceTensor {
        // SAFETY: as for `Held`.
        unsafe { DeviceTensor::contiguous(self.buffer.view().address(), TensorType::F32, self.shape) }
    }

    pub fn read(&self, world: &World) -> Vec<f32> {
        self.buffer.read(&world.stream).unwrap()
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
        let sum: f32 = (0..4).map(|_| (self.bits() >> 40) as f32 / (1u64 << 24) as f32 - 0.5).sum();
        sum * 3f32.sqrt()
    }

    pub fn normals(&mut self, n: usize) -> Vec<bf16> {
        (0..n).map(|_| bf16::from_f32(self.normal())).collect()
    }
}

/// Full attention of `[group, d]` queries over rows `k`, `v` [n, d] in f64.
pub fn full(q: &[bf16], (k, v): (&[bf16], &[bf16]), d: usize, scale: f32) -> Vec<f64> {
    let wide = |x: &bf16| f64::from(x.to_f32());
    let mut out = Vec::new();
    for q in q.chunks(d) {
        let logit =
            |k: &[bf16]| q.iter().zip(k).map(|(a, b)| wide(a) * wide(b)).sum::<f64>() * f64::from(scale);
        let logits: Vec<f64> = k.chunks(d).map(logit).collect();
        let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = logits.iter().map(|x| (x - max).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut row = vec![0.0; d];
        for (w, v) in weights.iter().zip(v.chunks(d)) {
            row.iter_mut().zip(v).for_each(|(o, x)| *o += w / total * wide(x));
        }
        out.extend(row);
    }
    out
}

/// Largest relative error of a head's output.
pub fn error(out: &[f32], want: &[f64], d: usize) -> f64 {
    let mut worst = 0.0f64;
    for (got, want) in out.chunks(d).zip(want.chunks(d)) {
        let norm: f64 = want.iter().map(|x| x * x).sum::<f64>().sqrt();
        let far: f64 = got.iter().zip(want).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum::<f64>().sqrt();
        let relative = far / norm.max(1e-30);
        worst = if relative <= worst { worst } else { relative };
    }
    worst
}
