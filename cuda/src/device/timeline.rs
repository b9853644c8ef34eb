//! When and where the blocks of a step's kernels ran (feature `timeline`; see `kernels/timeline.cuh`).
//!
//! Events around a kernel keep the next one from starting while it ends. Here each block reads the device's clock itself, so that a
//! replayed step runs as it does otherwise, but for a few instructions at the beginning and the end of every block.

use std::ffi::CStr;
use std::sync::PoisonError;

use bytemuck::{Pod, Zeroable};
use cudarc::driver::{result, sys};

use super::context::Device;
use super::error::{DeviceError, Named};

/// Names of `Record::work`, as in `timeline.cuh`.
pub const WORKS: [&str; 10] =
    ["append", "scan", "select", "resolve", "fetch", "attend", "finish", "pages", "in doubt", "tail"];

/// Records that a module has room for.
const RECORDS: usize = 1 << 16;

/// One block of one kernel. Mirrors `floe::Record`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Record {
    /// When it was done, nanoseconds of the device's clock.
    pub end: u64,
    /// Low word of when it began.
    pub start: u32,
    /// Low word of when what it waits for was done.
    pub ready: u32,
    /// Index into [`WORKS`].
    pub work: u32,
    /// Where it ran.
    pub multiprocessor: u32,
    /// Number in the grid.
    pub block: u32,
    /// Zero.
    pub unused: u32,
}

// SAFETY: `repr(C)` of a u64 and six u32 without padding; every bit pattern is a value.
unsafe impl Zeroable for Record {}
// SAFETY: as above.
unsafe impl Pod for Record {}

impl Record {
    /// Start, readiness and end, nanoseconds of one clock.
    #[must_use]
    pub fn times(&self) -> [u64; 3] {
        let before = |low: u32| self.end - u64::from((self.end as u32).wrapping_sub(low));
        [before(self.start), before(self.ready), self.end]
    }
}

/// Takes what blocks left since the last call, in order of their end. Waits for the device.
///
/// # Errors
/// What the driver reports.
pub fn take(device: &Device) -> Result<Vec<Record>, DeviceError> {
    device.synchronize()?;
    let modules = device.inner.modules.lock().unwrap_or_else(PoisonError::into_inner);
    let mut records = Vec::new();
    for module in modules.values() {
        let address = |name: &CStr| {
            let (mut address, mut bytes) = (0, 0);
            // SAFETY: the module is loaded; a name that it does not have is an error code.
            unsafe { sys::cuModuleGetGlobal_v2(&raw mut address, &raw mut bytes, *module, name.as_ptr()) }
                .result()
                .ok()
                .map(|()| address)
        };
        // Kernels beside a step's leave no records.
        let (Some(num_at), Some(at)) = (address(c"floe_timeline_num"), address(c"floe_timeline")) else {
            continue;
        };
        let mut num = [0u32];
        // SAFETY: both sides are one word.
        unsafe { result::memcpy_dtoh_sync(&mut num, num_at) }.named("cuMemcpyDtoH")?;
        let mut of_module = vec![Record::default(); (num[0] as usize).min(RECORDS)];
        if !of_module.is_empty() {
            // SAFETY: the array has room for `RECORDS`.
            unsafe { result::memcpy_dtoh_sync(&mut of_module, at) }.named("cuMemcpyDtoH")?;
        }
        // SAFETY: one word.
        unsafe { result::memset_d8_sync(num_at, 0, size_of::<u32>()) }.named("cuMemsetD8")?;
        records.append(&mut of_module);
    }
    records.sort_by_key(|record| record.end);
    Ok(records)
}
