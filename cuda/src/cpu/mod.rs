//! The kernels as the CPU runs them.

#[cfg(target_arch = "x86_64")]
mod attend_block;
#[cfg(target_arch = "x86_64")]
mod block;
mod dense_decode;
#[cfg(target_arch = "x86_64")]
mod dot;
#[cfg(target_arch = "x86_64")]
mod entry;
mod fma_rate;
mod match_scan;
pub mod quant;
mod score_rows;
mod scratch;
pub(crate) mod simd;
mod sparse_decode;
#[cfg(target_arch = "x86_64")]
mod tile;
#[cfg(target_arch = "x86_64")]
mod vector;

pub use dense_decode::{SplitScratch, dense_decode};
pub use fma_rate::fma_rate;
pub use match_scan::{PLANE, distances, match_scan};
pub use score_rows::score_rows;
pub use scratch::AttendScratch;
pub use sparse_decode::sparse_decode;

use crate::{Attend, KernelError, KvRows};

impl<R: KvRows> Attend<'_, R> {
    /// The group, where queries, head and numbers are in order.
    pub(crate) fn check(&self) -> Result<usize, KernelError> {
        let head_dim = self.rows.head_dim();
        if head_dim == 0 {
            return Err(KernelError::EmptyHead);
        }
        if self.q.is_empty() || !self.q.len().is_multiple_of(head_dim) {
            return Err(KernelError::Queries { len: self.q.len(), head_dim });
        }
        if !self.params.scale.is_finite() {
            return Err(KernelError::Scale { scale: self.params.scale });
        }
        match self.params.softcap {
            Some(softcap) if !(softcap.is_finite() && softcap > 0.0) => Err(KernelError::Softcap { softcap }),
            _ => Ok(self.q.len() / head_dim),
        }
    }
}
