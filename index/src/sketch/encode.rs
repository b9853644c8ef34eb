//! From one rotated residual to its codes and its scale.

use crate::simd::Isa;
use crate::simd::codes;

/// Coordinates beyond this are clamped to it (and NaN becomes it): every scale then fits f16 and no sum overflows.
const COORDINATE_MAX: f32 = 65504.0;

/// Residuals whose root mean square is at most this have a scale that rounds to zero in f16.
const RMS_MIN: f32 = 1.0 / (1u32 << 25) as f32;

/// Steps that are tried, as multiples of the residual's root mean square. They surround the best uniform steps for Gaussian
/// coordinates (.9957 for two bits, .3352 for four; Max 1960) so that a token with a light or heavy tail finds a better one.
const STEPS_2_BITS: [f32; 6] = [0.70, 0.85, 1.0, 1.15, 1.35, 1.6];
const STEPS_4_BITS: [f32; 6] = [0.22, 0.27, 0.32, 0.37, 0.44, 0.55];

/// Copies a rotated residual to `padded` (zero beyond it), with every coordinate inside the range of the codes.
pub(super) fn pad(x: &[f32], padded: &mut [f32]) {
    let (head, rest) = padded.split_at_mut(x.len());
    for (to, &x) in head.iter_mut().zip(x) {
        let below = if x < COORDINATE_MAX { x } else { COORDINATE_MAX };
        *to = if below > -COORDINATE_MAX { below } else { -COORDINATE_MAX };
    }
    rest.fill(0.0);
}

/// Codes of a rotated residual of `dim` coordinates, `x` being padded to a multiple of 32, written to `words`
/// `[bits][x.len() / 32]`. Returns the f16 bits of the scale: the codes' levels times the scale approximate `x`.
///
/// One bit: signs, the scale is the mean magnitude (least squares). Two and four bits: uniform levels; of the candidate steps
/// the one that explains the most energy after its least-squares scale is kept, then every coordinate takes the level nearest
/// to it under the scale as stored.
pub(super) fn encode(isa: Isa, bits: usize, dim: usize, x: &[f32], words: &mut [u32]) -> u16 {
    let rms = (codes::energy(isa, x) / dim as f32).sqrt();
    // Padding is coded as the first level above zero, whose square is 1.
    let padding = (x.len() - dim) as i32;
    let explained = |inverse_step: f32| {
        let fit = codes::fit(isa, bits, x, inverse_step);
        let levels_sq = (fit.levels_sq - padding) as f32;
        (fit.along * fit.along / levels_sq, fit.along / levels_sq)
    };
    let mut best = (f32::NEG_INFINITY, 0.0);
    if rms > RMS_MIN {
        let steps: &[f32] = match bits {
            // The sign does not depend on the step.
            1 => &[1.0],
            2 => &STEPS_2_BITS,
            _ => &STEPS_4_BITS,
        };
        for step in steps {
            let candidate = explained(1.0 / (step * rms));
            if candidate.0 > best.0 {
                best = candidate;
            }
        }
    }
    let scale = half::f16::from_f32(best.1);
    if scale == half::f16::ZERO {
        words.fill(0);
        return 0;
    }
    codes::quantise(isa, bits, x, 0.5 / scale.to_f32(), words);
    scale.to_bits()
}
