//! Which instruction set the kernels run on, as a value: holding an [`Avx512`] proves that this CPU executes it.

use std::sync::OnceLock;

/// Proof that the CPU executes AVX2 with FMA, F16C and BMI2 (every x86-64-v3 part).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Avx2(());

impl Avx2 {
    /// Asks the CPU; `None` where one of the features is missing or the target is not x86-64.
    pub fn detect() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        {
            let ok = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c")
                && is_x86_feature_detected!("bmi2");
            ok.then_some(Self(()))
        }
        #[cfg(not(target_arch = "x86_64"))]
        None
    }
}

/// Proof that the CPU executes AVX-512 F, BW, DQ, VL, VBMI and VNNI besides everything in [`Avx2`] (Ice Lake, Zen 4 and newer).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Avx512(Avx2);

impl Avx512 {
    /// Asks the CPU; `None` where one of the features is missing or the target is not x86-64.
    pub fn detect() -> Option<Self> {
        let avx2 = Avx2::detect()?;
        #[cfg(target_arch = "x86_64")]
        {
            let ok = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vbmi")
                && is_x86_feature_detected!("avx512vnni");
            ok.then_some(Self(avx2))
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            let _ = avx2;
            None
        }
    }

    /// The AVX2 proof that this one contains.
    pub fn avx2(self) -> Avx2 {
        self.0
    }
}

/// The instruction set that a kernel call runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// Portable loops: the reference, and the path of other architectures.
    Scalar,
    /// 256-bit kernels.
    Avx2(Avx2),
    /// 512-bit kernels.
    Avx512(Avx512),
}

impl Isa {
    /// The widest set that this CPU executes; asked once per process.
    pub fn detect() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| match (Avx512::detect(), Avx2::detect()) {
            (Some(avx512), _) => Isa::Avx512(avx512),
            (None, Some(avx2)) => Isa::Avx2(avx2),
            (None, None) => Isa::Scalar,
        })
    }

    /// Every set that this CPU executes, scalar first: what tests compare with each other.
    pub fn all_available() -> Vec<Self> {
        let mut all = vec![Isa::Scalar];
        all.extend(Avx2::detect().map(Isa::Avx2));
        all.extend(Avx512::detect().map(Isa::Avx512));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::Isa;

    #[test]
    fn detected_set_is_the_last_available_one() {
        assert_eq!(Isa::all_available().last(), Some(&Isa::detect()));
        assert_eq!(Isa::all_available()[0], Isa::Scalar);
    }
}
