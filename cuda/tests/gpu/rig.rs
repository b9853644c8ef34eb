//! What every device test needs: the device, guarded outputs, and an allowed error.

use std::sync::OnceLock;

use bytemuck::Pod;
use floe_cuda::KvElem;
use floe_cuda::device::{DevMut, DevRef, Device, DeviceBuffer, Stream};
use floe_cuda::twin::StateF64;

/// Elements of a guard band on either side of an output; a multiple of what 16-byte accesses need.
const GUARD: usize = 64;

pub struct Rig {
    pub device: Device,
    pub stream: Stream,
}

/// The device, opened once: tests run in parallel threads.
pub fn rig() -> &'static Rig {
    static RIG: OnceLock<Rig> = OnceLock::new();
    RIG.get_or_init(Rig::new)
}

impl Rig {
    pub fn new() -> Self {
        let device = Device::open(0).unwrap();
        let stream = Stream::new(&device).unwrap();
        Self { device, stream }
    }

    pub fn buffer<T: Pod>(&self, data: &[T]) -> DeviceBuffer<T> {
        DeviceBuffer::from_slice(&self.device, data).unwrap()
    }
}

/// An output of NaN between bands of a pattern.
pub struct Guarded {
    buffer: DeviceBuffer<f32>,
    len: usize,
}

const BAND: f32 = 12_345.678;

impl Guarded {
    pub fn new(rig: &Rig, len: usize) -> Self {
        let mut data = vec![f32::NAN; len + 2 * GUARD];
        data[..GUARD].fill(BAND);
        data[GUARD + len..].fill(BAND);
        Self { buffer: rig.buffer(&data), len }
    }

    pub fn view(&mut self) -> DevMut<'_, f32> {
        self.buffer.view_mut().slice(GUARD..GUARD + self.len).unwrap()
    }

    pub fn reader(&self) -> DevRef<'_, f32> {
        self.buffer.view().slice(GUARD..GUARD + self.len).unwrap()
    }

    /// The output; fails if a band was touched.
    pub fn read(&self, rig: &Rig) -> Vec<f32> {
        let data = self.buffer.read(&rig.stream).unwrap();
        let (front, back) = (&data[..GUARD], &data[GUARD + self.len..]);
        assert!(front.iter().chain(back).all(|&x| x == BAND), "a guard band was written");
        data[GUARD..GUARD + self.len].to_vec()
    }
}

/// Largest relative error of a head's output, `|o - o_ref| / |o_ref|`, and largest error of its lse.
pub fn errors(out: &[f32], lse: &[f32], want: &StateF64) -> (f64, f64) {
    let d = want.out.len() / want.lse.len().max(1);
    assert_eq!((out.len(), lse.len()), (want.out.len(), want.lse.len()));
    let (mut far, mut lse_far) = (0f64, 0f64);
    for (head, &got_lse) in lse.iter().enumerate() {
        let span = head * d..(head + 1) * d;
        if want.lse[head] == f64::NEG_INFINITY {
            let zero = out[span].iter().all(|x| x.to_bits() == 0);
            assert!(zero && got_lse == f32::NEG_INFINITY, "head {head} is not the empty state");
            continue;
        }
        let norm: f64 = want.out[span.clone()].iter().map(|x| x * x).sum::<f64>().sqrt();
        let diff: f64 =
            out[span.clone()].iter().zip(&want.out[span]).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum();
        let worse = |worst: f64, x: f64| if x <= worst { worst } else { x };
        far = worse(far, diff.sqrt() / norm.max(1e-30));
        lse_far = worse(lse_far, (f64::from(got_lse) - want.lse[head]).abs());
    }
    (far, lse_far)
}

/// Allowed relative error of a head's output whose weights are rounded to `E`.
///
/// Rounding changes a weight by at most half a unit in the last place, `u` = 2^-9 (bf16) or 2^-12 (f16), independently for each
/// row. With independent values of mean zero both the output and its error are sums of as many independent terms, so their ratio
/// stays near the mean square of one rounding, below `u`. Twice `u` leaves room for small heads; f32 sums add 1e-5.
pub fn allowed<E: KvElem>() -> f64 {
    let unit: f64 = if E::NAME == "bf16" { 1.0 / 512.0 } else { 1.0 / 4096.0 };
    2.0 * unit + 1e-5
}
