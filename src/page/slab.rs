//! One slab of rows: owned memory, shared between forks until somebody writes, or memory lent by somebody else, such as a
//! mapped file.

use std::sync::Arc;

use floe_cuda::KvElem;

use super::file::Damage;

/// Read-only memory of one slab that something else owns. The seam through which mapped files, and pinned memory of a
/// device backend, become warm pages.
pub trait LentSlab: Send + Sync + std::fmt::Debug {
    /// The rows, aligned to at least 4 bytes.
    fn bytes(&self) -> &[u8];

    /// Checks the pages whose bits are set (bit `i` = page `i` of the slab), unless that was done before. Nobody may read a
    /// page that was not checked.
    ///
    /// # Errors
    /// [`Damage`] when a page is not what was written.
    fn verify(&self, pages: u16) -> Result<(), Damage>;
}

/// A slab of `E`.
#[derive(Clone, Debug)]
pub(crate) enum Slab<E> {
    /// Memory of our own; more than one owner after a fork.
    Own(Arc<[E]>),
    /// Somebody else's memory.
    Lent(Arc<dyn LentSlab>),
}

impl<E: KvElem> Slab<E> {
    pub(crate) fn zeroed(elems: usize) -> Self {
        Self::Own(std::iter::repeat_n(E::zeroed(), elems).collect())
    }

    #[inline]
    pub(crate) fn elems(&self) -> &[E] {
        match self {
            Self::Own(elems) => elems,
            Self::Lent(slab) => bytemuck::cast_slice(slab.bytes()),
        }
    }

    /// The slab for writing, `elems` long: copied first when others see it too or when it is not ours.
    pub(crate) fn elems_mut(&mut self, elems: usize) -> &mut [E] {
        let unshared =
            matches!(self, Self::Own(own) if Arc::strong_count(own) == 1 && Arc::weak_count(own) == 0);
        if !unshared {
            let old = self.elems();
            let rest = std::iter::repeat_n(E::zeroed(), elems.saturating_sub(old.len()));
            *self = Self::Own(old.iter().copied().chain(rest).collect());
        }
        match self {
            Self::Own(own) => Arc::get_mut(own).expect("a copy just made, or found to have one owner"),
            Self::Lent(_) => unreachable!("lent slabs were copied above"),
        }
    }

    /// Bytes that only this slab holds in memory of our own; shared ones count once for each owner's share.
    pub(crate) fn own_bytes(&self) -> f64 {
        match self {
            Self::Own(own) => size_of_val(&own[..]) as f64 / Arc::strong_count(own) as f64,
            Self::Lent(_) => 0.0,
        }
    }
}
