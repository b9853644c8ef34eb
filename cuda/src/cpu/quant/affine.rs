//! Uniform quantisation of a few numbers with one scale, and packing of the codes.
//!
//! Packing is planar: with `w` codes a byte, `n` codes take `b = ceil(n / w)` bytes and code `i` lies in byte `i % b`, so that
//! consecutive numbers come from consecutive bytes with one shift: a loop that vectorises.

use half::f16;

/// Scale and zero as stored: `x = zero + code * scale`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Affine {
    pub scale: f16,
    pub zero: f16,
}

impl Affine {
    /// For codes `0..=levels` over the range of `xs`. Numbers beyond f16 saturate.
    pub fn over(xs: impl Iterator<Item = f32>, levels: u8) -> Self {
        let (min, max) =
            xs.fold((f32::INFINITY, f32::NEG_INFINITY), |(min, max), x| (min.min(x), max.max(x)));
        let zero = saturated(min);
        // From the zero as stored, so that the largest number still has a code.
        Self { scale: saturated((max - zero.to_f32()) / f32::from(levels)), zero }
    }

    /// Nearest code of `x`.
    pub fn code(self, x: f32, levels: u8) -> u8 {
        let scale = self.scale.to_f32();
        if scale == 0.0 {
            return 0;
        }
        ((x - self.zero.to_f32()) / scale).round_ties_even().clamp(0.0, f32::from(levels)) as u8
    }
}

/// Scale of symmetric signed codes `-127..=127`.
pub(super) fn symmetric_scale(xs: impl Iterator<Item = f32>) -> f16 {
    saturated(xs.fold(0f32, |max, x| max.max(x.abs())) / 127.0)
}

/// Nearest signed code of `x`, as the byte that stores it.
pub(super) fn symmetric_code(x: f32, scale: f16) -> u8 {
    let scale = scale.to_f32();
    if scale == 0.0 {
        return 0;
    }
    ((x / scale).round_ties_even().clamp(-127.0, 127.0) as i8).cast_unsigned()
}

/// Nearest finite f16.
fn saturated(x: f32) -> f16 {
    f16::from_f32(x.clamp(f16::MIN.to_f32(), f16::MAX.to_f32()))
}

/// Bytes that `len` codes of `BITS` bits take.
pub(super) const fn packed_len<const BITS: usize>(len: usize) -> usize {
    len.div_ceil(8 / BITS)
}

/// Writes code `i` of `len`; `bytes` are their [`packed_len`], zero at first.
pub(super) fn put_code<const BITS: usize>(bytes: &mut [u8], i: usize, code: u8) {
    let planes = bytes.len();
    bytes[i % planes] |= code << (BITS * (i / planes));
}

/// Codes with one scale and zero to numbers [out.len()].
#[inline(always)]
pub(super) fn unpack<const BITS: usize>(bytes: &[u8], affine: Affine, out: &mut [f32]) {
    let (scale, zero) = (affine.scale.to_f32(), affine.zero.to_f32());
    for (plane, out) in out.chunks_mut(bytes.len()).enumerate() {
        for (x, byte) in out.iter_mut().zip(bytes) {
            let code = (byte >> (BITS * plane)) & ((1 << BITS) - 1);
            *x = zero + f32::from(code) * scale;
        }
    }
}

/// Codes with a scale and a zero each to numbers; `scales`, `zeros` and `out` have one length.
#[inline(always)]
pub(super) fn unpack_each<const BITS: usize>(bytes: &[u8], scales: &[f32], zeros: &[f32], out: &mut [f32]) {
    let n = bytes.len();
    let places = out.chunks_mut(n).zip(scales.chunks(n)).zip(zeros.chunks(n));
    for (plane, ((out, scales), zeros)) in places.enumerate() {
        for (((x, byte), scale), zero) in out.iter_mut().zip(bytes).zip(scales).zip(zeros) {
            let code = (byte >> (BITS * plane)) & ((1 << BITS) - 1);
            *x = zero + f32::from(code) * scale;
        }
    }
}

/// Signed bytes to numbers.
#[inline(always)]
pub(super) fn unpack_symmetric(bytes: &[u8], scale: f16, out: &mut [f32]) {
    let scale = scale.to_f32();
    for (x, byte) in out.iter_mut().zip(bytes) {
        *x = f32::from(byte.cast_signed()) * scale;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Largest error that rounding to the nearest code allows: half a step, plus the rounding of scale and zero to f16 (2^-11
    /// each, times at most `levels` steps and the zero's size) and of f32.
    fn allowed(affine: Affine, levels: u8) -> f32 {
        let (scale, zero) = (affine.scale.to_f32(), affine.zero.to_f32().abs());
        scale * (0.5 + f32::from(levels) / 2048.0) + (zero + scale * f32::from(levels)) * 1e-6 + 1e-6
    }

    fn check<const BITS: usize>(xs: &[f32]) {
        let levels = (1u8 << BITS) - 1;
        let affine = Affine::over(xs.iter().copied(), levels);
        let mut bytes = vec![0; packed_len::<BITS>(xs.len())];
        for (i, &x) in xs.iter().enumerate() {
            put_code::<BITS>(&mut bytes, i, affine.code(x, levels));
        }
        let mut back = vec![f32::NAN; xs.len()];
        unpack::<BITS>(&bytes, affine, &mut back);
        // The zero as stored may lie above the smallest number, by its own rounding.
        let zero_off = xs.iter().fold(f32::INFINITY, |a, &b| a.min(b)) - affine.zero.to_f32();
        for (x, y) in xs.iter().zip(&back) {
            assert!((x - y).abs() <= allowed(affine, levels) + zero_off.abs(), "{x} became {y}");
        }
        let n = xs.len();
        let (scales, zeros) = (vec![affine.scale.to_f32(); n], vec![affine.zero.to_f32(); n]);
        let mut each = vec![f32::NAN; n];
        unpack_each::<BITS>(&bytes, &scales, &zeros, &mut each);
        assert_eq!(each, back);
    }

    proptest! {
        #[test]
        fn numbers_come_back_within_half_a_step(
            xs in prop::collection::vec(-1f32..1.0, 1..100), size in prop::sample::select(vec![1e-3f32, 1.0, 300.0]),
        ) {
            let xs: Vec<f32> = xs.iter().map(|x| x * size).collect();
            check::<2>(&xs);
            check::<4>(&xs);
            let scale = symmetric_scale(xs.iter().copied());
            let bytes: Vec<u8> = xs.iter().map(|&x| symmetric_code(x, scale)).collect();
            let mut back = vec![f32::NAN; xs.len()];
            unpack_symmetric(&bytes, scale, &mut back);
            for (x, y) in xs.iter().zip(&back) {
                // Half a step, and 127 steps of a scale that rounding to f16 made 2^-11 too small.
                prop_assert!((x - y).abs() <= scale.to_f32() * (0.5 + 127.0 / 2048.0) + 127.0 * 6e-8);
            }
        }
    }

    #[test]
    fn equal_numbers_come_back_and_extreme_ones_stay_finite() {
        check::<2>(&[3.0; 7]);
        check::<4>(&[0.0]);
        for x in [f32::MAX, f32::MIN] {
            let affine = Affine::over([0.0, x].into_iter(), 15);
            let mut back = [f32::NAN; 2];
            let mut bytes = [0];
            put_code::<4>(&mut bytes, 0, affine.code(0.0, 15));
            put_code::<4>(&mut bytes, 1, affine.code(x, 15));
            unpack::<4>(&bytes, affine, &mut back);
            assert!(back.iter().all(|y| y.is_finite()) && back[1].abs() > 6e4);
        }
    }
}
