//! The device and its context.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use cudarc::driver::{result, sys};

use super::error::{DeviceError, Named};
use super::kernels::Kernel;

/// What launchers need to know of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Properties {
    /// Product name.
    pub name: String,
    /// Compute capability, major and minor.
    pub capability: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of the second-level cache.
    pub l2_bytes: usize,
    /// Bytes of shared memory that a block may ask for.
    pub shared_bytes_max: usize,
    /// Bytes of shared memory of a multiprocessor.
    pub shared_bytes_per_multiprocessor: usize,
}

/// An open device; a cheap handle. Calls may come from any thread.
#[derive(Debug, Clone)]
pub struct Device {
    pub(super) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(super) struct Inner {
    device: sys::CUdevice,
    context: sys::CUcontext,
    /// Whether the primary context was retained by us.
    retained: bool,
    properties: Properties,
    /// One word in device memory that kernels set when a list entry lies outside its buffer; 0 until allocated.
    fault: sys::CUdeviceptr,
    /// Bytes of the buffers in device memory.
    pub(super) held: AtomicUsize,
    /// Loaded modules and functions, by name.
    pub(super) kernels: Mutex<HashMap<String, Kernel>>,
    pub(super) modules: Mutex<HashMap<&'static str, sys::CUmodule>>,
}

// SAFETY: the handles are addresses of driver objects; the driver API may be called from any thread, and every method makes
// the context current in the calling thread first.
unsafe impl Send for Inner {}
// SAFETY: as for Send; what changes is behind a mutex.
unsafe impl Sync for Inner {}

impl Device {
    /// Opens device `ordinal` in its primary context.
    ///
    /// # Errors
    /// `NoDriver`, `NoDevice`, and what the driver reports.
    pub fn open(ordinal: usize) -> Result<Self, DeviceError> {
        let device = driver_device(ordinal)?;
        // SAFETY: `device` comes from cuDeviceGet.
        let context = unsafe { result::primary_ctx::retain(device) }.named("cuDevicePrimaryCtxRetain")?;
        Self::with_context(device, context, true)
    }

    /// Works in a context that the caller owns.
    ///
    /// # Safety
    /// - `context` is a valid `CUcontext` of device `ordinal` and outlives every object made from the returned one.
    ///
    /// # Errors
    /// As [`Device::open`].
    pub unsafe fn borrow(ordinal: usize, context: *mut c_void) -> Result<Self, DeviceError> {
        let device = driver_device(ordinal)?;
        Self::with_context(device, context.cast(), false)
    }

    fn with_context(
        device: sys::CUdevice,
        context: sys::CUcontext,
        retained: bool,
    ) -> Result<Self, DeviceError> {
        // Owns the retained context from here on: an error below releases it.
        let mut inner = Inner {
            device,
            context,
            retained,
            properties: Properties {
                name: String::new(),
                capability: (0, 0),
                multiprocessors: 0,
                l2_bytes: 0,
                shared_bytes_max: 0,
                shared_bytes_per_multiprocessor: 0,
            },
            fault: 0,
            held: AtomicUsize::new(0),
            kernels: Mutex::default(),
            modules: Mutex::default(),
        };
        inner.properties = inner.read_properties()?;
        // SAFETY: the context is valid; the allocation is freed with `inner`.
        unsafe {
            result::ctx::set_current(context).named("cuCtxSetCurrent")?;
            inner.fault = result::malloc_sync(size_of::<u32>()).named("cuMemAlloc")?;
            result::memset_d8_sync(inner.fault, 0, size_of::<u32>()).named("cuMemsetD8")?;
        }
        result::ctx::synchronize().named("cuCtxSynchronize")?;
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Address of the word that kernels set when they meet an entry outside its buffer.
    pub(crate) fn fault_address(&self) -> u64 {
        self.inner.fault
    }

    /// Waits for the device and refuses if a kernel met a list entry outside its buffer since the last check.
    ///
    /// Lists may be written by the device itself, so launchers cannot look at them; tests and shutdown should.
    ///
    /// # Errors
    /// `EntryOutside`; what the driver reports.
    pub fn check_entries(&self) -> Result<(), DeviceError> {
        self.synchronize()?;
        let mut word = [0u32];
        // SAFETY: both sides are one word.
        unsafe { result::memcpy_dtoh_sync(&mut word, self.inner.fault) }.named("cuMemcpyDtoH")?;
        if word == [0] {
            return Ok(());
        }
        // SAFETY: the allocation is one word.
        unsafe { result::memset_d8_sync(self.inner.fault, 0, size_of::<u32>()) }.named("cuMemsetD8")?;
        self.synchronize()?;
        Err(DeviceError::EntryOutside)
    }

    /// What the device is.
    pub fn properties(&self) -> &Properties {
        &self.inner.properties
    }

    /// Makes the context current in this thread; every driver call below needs it.
    pub(super) fn bind(&self) -> Result<(), DeviceError> {
        // SAFETY: the context is valid for the lifetime of `inner`.
        unsafe { result::ctx::set_current(self.inner.context) }.named("cuCtxSetCurrent")
    }

    /// Bytes of device memory that are free, of any process, and all bytes.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn memory(&self) -> Result<(usize, usize), DeviceError> {
        self.bind()?;
        result::mem_get_info().named("cuMemGetInfo")
    }

    /// Bytes of device memory that buffers opened with this handle or its copies hold.
    #[must_use]
    pub fn held_bytes(&self) -> usize {
        self.inner.held.load(Ordering::Relaxed)
    }

    /// Waits for all work of the device.
    ///
    /// # Errors
    /// What the driver reports, faults of earlier kernels included.
    pub fn synchronize(&self) -> Result<(), DeviceError> {
        self.bind()?;
        result::ctx::synchronize().named("cuCtxSynchronize")
    }
}

impl Inner {
    fn read_properties(&self) -> Result<Properties, DeviceError> {
        use sys::CUdevice_attribute as A;
        let get = |attribute| {
            // SAFETY: `device` comes from cuDeviceGet.
            unsafe { result::device::get_attribute(self.device, attribute) }
                .named("cuDeviceGetAttribute")
                .map(|value| value.unsigned_abs())
        };
        Ok(Properties {
            name: result::device::get_name(self.device).named("cuDeviceGetName")?,
            capability: (
                get(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                get(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            multiprocessors: get(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            l2_bytes: get(A::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize,
            shared_bytes_max: get(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize,
            shared_bytes_per_multiprocessor: get(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)?
                as usize,
        })
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Errors have nowhere to go here; the process keeps what could not be released.
        // SAFETY: the context is still valid.
        if unsafe { result::ctx::set_current(self.context) }.is_ok() {
            if self.fault != 0 {
                // SAFETY: allocated once, freed once.
                let _ = unsafe { result::free_sync(self.fault) };
            }
            let modules = self.modules.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner);
            for module in modules.values() {
                // SAFETY: loaded by us, unloaded once; kernels that hold its functions hold `inner`.
                let _ = unsafe { result::module::unload(*module) };
            }
        }
        if self.retained {
            // SAFETY: retained once, released once.
            let _ = unsafe { result::primary_ctx::release(self.device) };
        }
    }
}

/// Initialises the driver and finds a device.
fn driver_device(ordinal: usize) -> Result<sys::CUdevice, DeviceError> {
    // SAFETY: loads the driver library, whose initialisers have no preconditions.
    if !unsafe { sys::is_culib_present() } {
        return Err(DeviceError::NoDriver);
    }
    result::init().named("cuInit")?;
    let count = result::device::get_count().named("cuDeviceGetCount")?.unsigned_abs() as usize;
    match i32::try_from(ordinal) {
        Ok(index) if ordinal < count => result::device::get(index).named("cuDeviceGet"),
        _ => Err(DeviceError::NoDevice { ordinal, count }),
    }
}
