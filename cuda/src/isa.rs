//! Which vector instructions to use, as a value.

/// Proof that this machine has AVX-512 F, BW, DQ and VL (with AVX2, FMA and F16C), perhaps also BF16.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Avx512 {
    bf16: bool,
}

impl Avx512 {
    /// `None` where an instruction set is missing.
    pub fn detect() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && Avx2::detect().is_some()
        {
            return Some(Self { bf16: is_x86_feature_detected!("avx512bf16") });
        }
        None
    }

    /// Whether AVX512-BF16 is there too: then queries that are exactly bf16 meet bf16 keys without widening.
    pub fn has_bf16(self) -> bool {
        self.bf16
    }
}

/// Proof that this machine has AVX2, FMA and F16C.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Avx2(());

impl Avx2 {
    /// `None` where an instruction set is missing.
    pub fn detect() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
        {
            return Some(Self(()));
        }
        None
    }
}

/// Instructions that a kernel is to use. Holding a variant proves that the machine has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// Sixteen f32 lanes.
    Avx512(Avx512),
    /// Eight f32 lanes.
    Avx2(Avx2),
    /// The scalar twin.
    Scalar,
}

impl Isa {
    /// The widest that this machine has.
    pub fn best() -> Self {
        match (Avx512::detect(), Avx2::detect()) {
            (Some(token), _) => Self::Avx512(token),
            (None, Some(token)) => Self::Avx2(token),
            (None, None) => Self::Scalar,
        }
    }

    /// All that this machine has, widest first; the last is always [`Isa::Scalar`].
    pub fn available() -> impl Iterator<Item = Self> {
        Avx512::detect()
            .map(Self::Avx512)
            .into_iter()
            .chain(Avx2::detect().map(Self::Avx2))
            .chain(std::iter::once(Self::Scalar))
    }

    /// Name in reports: `"avx512"`, `"avx2"` or `"scalar"`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Avx512(_) => "avx512",
            Self::Avx2(_) => "avx2",
            Self::Scalar => "scalar",
        }
    }
}
