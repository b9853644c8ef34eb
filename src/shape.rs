//! Head and page shapes: the only place that derives strides and byte sizes.

use crate::error::{Error, Result};

/// Tokens of a page, the unit of lookup (DESIGN: up to 16 tokens of one shard, K and V adjacent).
pub const PAGE_TOKENS: usize = 16;

/// Element type of the stored keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvDtype {
    /// bfloat16
    Bf16,
    /// IEEE binary16
    F16,
    /// IEEE binary32
    F32,
}

impl KvDtype {
    /// Bytes of one element.
    #[must_use]
    pub const fn size_bytes(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
        }
    }
}

impl std::fmt::Display for KvDtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::F32 => "f32",
        })
    }
}

/// Heads of one attention layer. Multi-head attention has a group of 1, multi-query attention one kv head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadShape {
    num_q_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
}

impl HeadShape {
    /// Checks the three numbers once, so that every later division is exact.
    ///
    /// # Errors
    /// [`Error::Config`] naming the field when a count is zero or `num_q_heads` is no multiple of `num_kv_heads`.
    pub fn new(num_q_heads: usize, num_kv_heads: usize, head_dim: usize) -> Result<Self> {
        for (field, value) in
            [("num_q_heads", num_q_heads), ("num_kv_heads", num_kv_heads), ("head_dim", head_dim)]
        {
            if value == 0 {
                return Err(Error::config(field, value, "must be at least 1"));
            }
        }
        if !num_q_heads.is_multiple_of(num_kv_heads) {
            return Err(Error::config(
                "num_q_heads",
                num_q_heads,
                format!("must be a multiple of num_kv_heads {num_kv_heads}"),
            ));
        }
        Ok(Self { num_q_heads, num_kv_heads, head_dim })
    }

    /// Query heads of the layer.
    #[must_use]
    pub const fn num_q_heads(&self) -> usize {
        self.num_q_heads
    }

    /// Key/value heads of the layer.
    #[must_use]
    pub const fn num_kv_heads(&self) -> usize {
        self.num_kv_heads
    }

    /// Elements of one key, value or query row.
    #[must_use]
    pub const fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Query heads that share one kv head.
    #[must_use]
    pub const fn group(&self) -> usize {
        self.num_q_heads / self.num_kv_heads
    }
}

/// Memory layout of stored tokens: a row is K then V of one token, adjacent; a page is [`PAGE_TOKENS`] rows.
///
/// ```text
/// page  | K0 V0 | K1 V1 | ... | K15 V15 |      one contiguous run, page_bytes
/// row           | K1 V1 |                      one contiguous run, row_bytes
/// ```
/// So both units of transfer, page and row, are single copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageShape {
    head_dim: usize,
    dtype: KvDtype,
}

impl PageShape {
    /// Layout for rows of `head_dim` elements of `dtype`.
    #[must_use]
    pub const fn new(head_dim: usize, dtype: KvDtype) -> Self {
        Self { head_dim, dtype }
    }

    /// Elements of one row: K and V.
    #[must_use]
    pub const fn row_elems(&self) -> usize {
        2 * self.head_dim
    }

    /// Bytes of one row.
    #[must_use]
    pub const fn row_bytes(&self) -> usize {
        self.row_elems() * self.dtype.size_bytes()
    }

    /// Bytes of one full page.
    #[must_use]
    pub const fn page_bytes(&self) -> usize {
        PAGE_TOKENS * self.row_bytes()
    }

    /// Element type.
    #[must_use]
    pub const fn dtype(&self) -> KvDtype {
        self.dtype
    }

    /// Elements of one key or value.
    #[must_use]
    pub const fn head_dim(&self) -> usize {
        self.head_dim
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_of_16_tokens_at_128_bf16_is_8_kib() {
        let shape = PageShape::new(128, KvDtype::Bf16);
        assert_eq!((shape.row_bytes(), shape.page_bytes()), (512, 8192));
    }

    #[test]
    fn head_shape_names_the_field_it_refuses() {
        let message = HeadShape::new(12, 5, 64).unwrap_err().to_string();
        assert!(message.contains("num_q_heads") && message.contains("12"), "{message}");
        assert!(HeadShape::new(4, 4, 0).unwrap_err().to_string().contains("head_dim"));
        assert_eq!(HeadShape::new(8, 1, 64).unwrap().group(), 8);
    }
}
