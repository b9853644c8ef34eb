//! Asking for memory ahead of its use.

/// Bytes of a cache line on every supported machine.
#[cfg(target_arch = "x86_64")]
const LINE: usize = 64;

/// Starts loading a slice into the caches; a hint without effect on results.
#[inline]
pub(crate) fn prefetch<T>(slice: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for at in (0..size_of_val(slice)).step_by(LINE) {
        // SAFETY: a prefetch reads nothing that the program can see, and the address lies inside the slice.
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T0>(slice.as_ptr().cast::<i8>().add(at));
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = slice;
}
