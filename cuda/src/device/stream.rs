//! Queues of work and marks in them.

use std::ffi::c_void;

use cudarc::driver::{result, sys};

use super::context::Device;
use super::error::{DeviceError, Named};

/// A queue of work on a device, our own or borrowed from a host engine.
#[derive(Debug)]
pub struct Stream {
    device: Device,
    raw: sys::CUstream,
    owned: bool,
}

// SAFETY: a stream handle may be used from any thread; the driver serialises calls on it.
unsafe impl Send for Stream {}
// SAFETY: as for Send.
unsafe impl Sync for Stream {}

impl Stream {
    /// A new queue that does not wait for the legacy default stream.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn new(device: &Device) -> Result<Self, DeviceError> {
        device.bind()?;
        let raw = result::stream::create(result::stream::StreamKind::NonBlocking).named("cuStreamCreate")?;
        Ok(Self { device: device.clone(), raw, owned: true })
    }

    /// Works on a stream that the caller owns; null is the default stream.
    ///
    /// # Safety
    /// - `raw` is null or a valid `CUstream` of the device's context and outlives the returned value.
    pub unsafe fn borrow(device: &Device, raw: *mut c_void) -> Self {
        Self { device: device.clone(), raw: raw.cast(), owned: false }
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    pub(crate) fn raw(&self) -> sys::CUstream {
        self.raw
    }

    /// Waits until everything queued so far is done.
    ///
    /// # Errors
    /// What the driver reports, faults of earlier kernels included.
    pub fn synchronize(&self) -> Result<(), DeviceError> {
        self.device.bind()?;
        // SAFETY: the stream is valid.
        unsafe { result::stream::synchronize(self.raw) }.named("cuStreamSynchronize")
    }

    /// Work queued from here on waits for `event`.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn wait(&self, event: &Event) -> Result<(), DeviceError> {
        self.device.bind()?;
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: both handles are valid.
        unsafe { result::stream::wait_event(self.raw, event.raw, flags) }.named("cuStreamWaitEvent")
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.owned && self.device.bind().is_ok() {
            // SAFETY: created by us, destroyed once; the driver finishes what is queued.
            let _ = unsafe { result::stream::destroy(self.raw) };
        }
    }
}

/// A mark in a stream, with a time.
#[derive(Debug)]
pub struct Event {
    device: Device,
    raw: sys::CUevent,
}

// SAFETY: an event handle may be used from any thread.
unsafe impl Send for Event {}
// SAFETY: as for Send.
unsafe impl Sync for Event {}

impl Event {
    /// A mark that nothing has reached yet.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn new(device: &Device) -> Result<Self, DeviceError> {
        device.bind()?;
        let raw = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).named("cuEventCreate")?;
        Ok(Self { device: device.clone(), raw })
    }

    /// A mark for threads that may wait long: they sleep meanwhile, where [`Event::new`] has them look again and again.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn for_sleepers(device: &Device) -> Result<Self, DeviceError> {
        device.bind()?;
        let flags = sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC;
        let raw = result::event::create(flags).named("cuEventCreate")?;
        Ok(Self { device: device.clone(), raw })
    }

    /// Puts the mark behind what is queued.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn record(&self, stream: &Stream) -> Result<(), DeviceError> {
        self.device.bind()?;
        // SAFETY: both handles are valid.
        unsafe { result::event::record(self.raw, stream.raw()) }.named("cuEventRecord")
    }

    /// Waits until the mark is reached.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn synchronize(&self) -> Result<(), DeviceError> {
        self.device.bind()?;
        // SAFETY: the event is valid.
        unsafe { result::event::synchronize(self.raw) }.named("cuEventSynchronize")
    }

    /// Microseconds from `start` to this mark, both reached.
    ///
    /// # Errors
    /// What the driver reports, a mark that is not reached included.
    pub fn micros_since(&self, start: &Self) -> Result<f64, DeviceError> {
        self.device.bind()?;
        // SAFETY: both events are valid.
        let millis = unsafe { result::event::elapsed(start.raw, self.raw) }.named("cuEventElapsedTime")?;
        Ok(f64::from(millis) * 1e3)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: created by us, destroyed once.
            let _ = unsafe { result::event::destroy(self.raw) };
        }
    }
}
