//! Borrowed tensors of a host engine: what crosses the contract of [`crate::Engine`]. Host memory only; device views
//! come with the CUDA backend.

use half::{bf16, f16};

use crate::error::{Error, Result};
use crate::shape::KvDtype;

/// Elements of a borrowed tensor, host memory.
#[derive(Clone, Copy, Debug)]
pub enum Elems<'a> {
    /// bfloat16 elements
    Bf16(&'a [bf16]),
    /// binary16 elements
    F16(&'a [f16]),
    /// binary32 elements
    F32(&'a [f32]),
}

impl Elems<'_> {
    /// Element type.
    #[must_use]
    pub const fn dtype(&self) -> KvDtype {
        match self {
            Self::Bf16(_) => KvDtype::Bf16,
            Self::F16(_) => KvDtype::F16,
            Self::F32(_) => KvDtype::F32,
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::Bf16(s) => s.len(),
            Self::F16(s) => s.len(),
            Self::F32(s) => s.len(),
        }
    }
}

impl<'a> From<&'a [bf16]> for Elems<'a> {
    fn from(s: &'a [bf16]) -> Self {
        Self::Bf16(s)
    }
}

impl<'a> From<&'a [f16]> for Elems<'a> {
    fn from(s: &'a [f16]) -> Self {
        Self::F16(s)
    }
}

impl<'a> From<&'a [f32]> for Elems<'a> {
    fn from(s: &'a [f32]) -> Self {
        Self::F32(s)
    }
}

/// A `[tokens, heads, head_dim]` tensor in host memory, rows contiguous, tokens and heads strided (in elements). So both
/// token-major and head-major layouts of a host engine are accepted without a copy.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    elems: Elems<'a>,
    shape: [usize; 3],
    strides: [usize; 2],
}

impl<'a> TensorView<'a> {
    /// A tensor whose tokens and heads follow one another without gaps.
    ///
    /// # Errors
    /// [`Error::Shape`] when the number of elements is not `tokens * heads * head_dim`.
    pub fn contiguous(elems: impl Into<Elems<'a>>, shape: [usize; 3]) -> Result<Self> {
        let elems = elems.into();
        let wanted = shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
        if wanted != Some(elems.len()) {
            return Err(Error::shape("view", format!("{shape:?}"), format!("{} elements", elems.len())));
        }
        Ok(Self { elems, shape, strides: [shape[1] * shape[2], shape[2]] })
    }

    /// A strided tensor: row (token, head) starts at `token * strides[0] + head * strides[1]` elements.
    ///
    /// # Errors
    /// [`Error::Shape`] when the last row ends beyond the slice.
    pub fn strided(elems: impl Into<Elems<'a>>, shape: [usize; 3], strides: [usize; 2]) -> Result<Self> {
        let elems = elems.into();
        let [tokens, heads, dim] = shape;
        let end = if tokens == 0 || heads == 0 {
            Some(0)
        } else {
            let last = (tokens - 1).checked_mul(strides[0]);
            let head = (heads - 1).checked_mul(strides[1]);
            last.zip(head).and_then(|(a, b)| a.checked_add(b)).and_then(|a| a.checked_add(dim))
        };
        match end {
            Some(end) if end <= elems.len() => Ok(Self { elems, shape, strides }),
            Some(_) | None => Err(Error::shape(
                "view",
                format!("{shape:?} with strides {strides:?} inside the slice"),
                format!("{} elements", elems.len()),
            )),
        }
    }

    /// `[tokens, heads, head_dim]`
    #[must_use]
    pub const fn shape(&self) -> [usize; 3] {
        self.shape
    }

    /// Element type.
    #[must_use]
    pub const fn dtype(&self) -> KvDtype {
        self.elems.dtype()
    }

    /// The row of one token and head, `[head_dim]`.
    ///
    /// # Panics
    /// When the token or head lies outside [`Self::shape`].
    #[must_use]
    pub fn row(&self, token: usize, head: usize) -> Elems<'a> {
        assert!(token < self.shape[0] && head < self.shape[1], "row ({token}, {head}) of {:?}", self.shape);
        let start = token * self.strides[0] + head * self.strides[1];
        let range = start..start + self.shape[2];
        match self.elems {
            Elems::Bf16(s) => Elems::Bf16(&s[range]),
            Elems::F16(s) => Elems::F16(&s[range]),
            Elems::F32(s) => Elems::F32(&s[range]),
        }
    }

    /// Tokens `range` of this tensor.
    ///
    /// # Panics
    /// When the range ends beyond the tensor.
    #[must_use]
    pub fn tokens(&self, range: std::ops::Range<usize>) -> Self {
        assert!(range.end <= self.shape[0], "tokens {range:?} of {:?}", self.shape);
        let skip = (range.start * self.strides[0]).min(self.elems.len());
        let elems = match self.elems {
            Elems::Bf16(s) => Elems::Bf16(&s[skip..]),
            Elems::F16(s) => Elems::F16(&s[skip..]),
            Elems::F32(s) => Elems::F32(&s[skip..]),
        };
        Self { elems, shape: [range.len(), self.shape[1], self.shape[2]], strides: self.strides }
    }

    /// First element that is not finite, as (token, element of the token's heads).
    #[must_use]
    pub fn first_not_finite(&self) -> Option<(usize, usize)> {
        for token in 0..self.shape[0] {
            for head in 0..self.shape[1] {
                let bad = match self.row(token, head) {
                    Elems::Bf16(s) => s.iter().position(|x| !x.is_finite()),
                    Elems::F16(s) => s.iter().position(|x| !x.is_finite()),
                    Elems::F32(s) => s.iter().position(|x| !x.is_finite()),
                };
                if let Some(element) = bad {
                    return Some((token, head * self.shape[2] + element));
                }
            }
        }
        None
    }

    /// Refuses a tensor whose shape differs from `[tokens, heads, head_dim]`.
    pub(crate) fn expect(&self, field: &'static str, shape: [usize; 3]) -> Result<()> {
        if self.shape == shape {
            Ok(())
        } else {
            Err(Error::shape(field, format!("{shape:?}"), format!("{:?}", self.shape)))
        }
    }
}

/// Copies one row to f32, exactly (every dtype widens without rounding).
pub(crate) fn widen(row: Elems<'_>, out: &mut [f32]) {
    match row {
        Elems::Bf16(s) => out.iter_mut().zip(s).for_each(|(o, x)| *o = x.to_f32()),
        Elems::F16(s) => out.iter_mut().zip(s).for_each(|(o, x)| *o = x.to_f32()),
        Elems::F32(s) => out.copy_from_slice(s),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn head_major_and_token_major_views_of_the_same_numbers_agree() {
        let token_major: Vec<f32> = (0..24).map(|x| x as f32).collect();
        let a = TensorView::contiguous(&token_major[..], [3, 2, 4]).unwrap();
        let mut head_major = [0.0f32; 24];
        for t in 0..3 {
            for h in 0..2 {
                for e in 0..4 {
                    head_major[h * 12 + t * 4 + e] = token_major[t * 8 + h * 4 + e];
                }
            }
        }
        let b = TensorView::strided(&head_major[..], [3, 2, 4], [4, 12]).unwrap();
        for t in 0..3 {
            for h in 0..2 {
                let (Elems::F32(x), Elems::F32(y)) = (a.row(t, h), b.tokens(t..3).row(0, h)) else {
                    unreachable!()
                };
                assert_eq!(x, y);
            }
        }
    }

    #[test]
    fn a_view_beyond_its_slice_is_refused() {
        let x = [0.0f32; 10];
        assert!(TensorView::contiguous(&x[..], [3, 1, 4]).is_err());
        assert!(TensorView::strided(&x[..], [2, 1, 4], [7, 4]).is_err());
        assert!(TensorView::strided(&x[..], [usize::MAX, 2, 4], [7, 4]).is_err());
        assert!(TensorView::strided(&x[..], [2, 1, 4], [6, 4]).is_ok());
    }

    #[test]
    fn first_not_finite_names_token_and_element() {
        let mut x = [0.0f32; 12];
        x[9] = f32::NAN;
        assert_eq!(TensorView::contiguous(&x[..], [3, 2, 2]).unwrap().first_not_finite(), Some((2, 1)));
    }
}
