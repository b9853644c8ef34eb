//! Memory of the device, and host memory that the device reads.

use std::ffi::c_void;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::Ordering;

use bytemuck::Pod;
use cudarc::driver::{result, sys};

use super::context::Device;
use super::error::{DeviceError, Named};
use super::stream::Stream;
use crate::KernelError;
use crate::rows::{check_len, check_range};

/// Queues a copy of elements of `T`: of each side the address of its first element, and which ones.
///
/// # Safety
/// The device that is bound reaches both ranges, which do not overlap, until the copy is done.
unsafe fn queue_copy<T>(
    (target, to): (u64, usize),
    (source, from): (u64, Range<usize>),
    stream: &Stream,
) -> Result<(), DeviceError> {
    let size = size_of::<T>();
    let (target, source) = (target + (to * size) as u64, source + (from.start * size) as u64);
    // SAFETY: as the caller says.
    unsafe { result::memcpy_dtod_async(target, source, from.len() * size, stream.raw()) }
        .named("cuMemcpyDtoDAsync")
}

/// Elements in device memory, owned.
#[derive(Debug)]
pub struct DeviceBuffer<T> {
    device: Device,
    address: sys::CUdeviceptr,
    len: usize,
    element: PhantomData<T>,
}

/// Elements on the device, to be read.
#[derive(Debug)]
pub struct DevRef<'a, T> {
    address: u64,
    len: usize,
    element: PhantomData<&'a T>,
}

/// Elements on the device, to be written.
#[derive(Debug)]
pub struct DevMut<'a, T> {
    address: u64,
    len: usize,
    element: PhantomData<&'a mut T>,
}

impl<T> Clone for DevRef<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for DevRef<'_, T> {}

impl<'a, T> DevRef<'a, T> {
    /// Elements of a host engine's own memory.
    ///
    /// # Safety
    /// - `address` is a device address (or a host-mapped one) of `len` elements, valid until all work that reads it is done.
    pub unsafe fn from_raw(address: u64, len: usize) -> Self {
        Self { address, len, element: PhantomData }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Device address of the first element.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// A part.
    ///
    /// # Errors
    /// A range that leaves the elements.
    pub fn slice(self, range: Range<usize>) -> Result<Self, KernelError> {
        check_range(&range, self.len)?;
        let address = self.address + (range.start * size_of::<T>()) as u64;
        Ok(Self { address, len: range.len(), element: self.element })
    }

    /// Refuses another number of elements.
    pub(crate) fn check(&self, field: &'static str, expected: usize) -> Result<(), KernelError> {
        check_len(field, self.len, expected)
    }
}

impl<T> DevMut<'_, T> {
    /// Elements of a host engine's own memory.
    ///
    /// # Safety
    /// - As [`DevRef::from_raw`], and nothing else reads or writes them until the work that writes them is done.
    pub unsafe fn from_raw(address: u64, len: usize) -> Self {
        Self { address, len, element: PhantomData }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Device address of the first element.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// The same elements under a shorter borrow.
    pub fn reborrow(&mut self) -> DevMut<'_, T> {
        DevMut { address: self.address, len: self.len, element: PhantomData }
    }

    /// To be read.
    pub fn as_ref(&self) -> DevRef<'_, T> {
        DevRef { address: self.address, len: self.len, element: PhantomData }
    }

    /// A part.
    ///
    /// # Errors
    /// A range that leaves the elements.
    pub fn slice(self, range: Range<usize>) -> Result<Self, KernelError> {
        check_range(&range, self.len)?;
        let address = self.address + (range.start * size_of::<T>()) as u64;
        Ok(Self { address, len: range.len(), element: self.element })
    }

    /// Refuses another number of elements.
    pub(crate) fn check(&self, field: &'static str, expected: usize) -> Result<(), KernelError> {
        check_len(field, self.len, expected)
    }
}

impl<T: Pod> DeviceBuffer<T> {
    /// `len` elements of zero bytes. Waits for the device; not for the step.
    ///
    /// # Errors
    /// What the driver reports, no memory included.
    pub fn zeros(device: &Device, len: usize) -> Result<Self, DeviceError> {
        device.bind()?;
        let bytes = len * size_of::<T>();
        // The driver refuses empty allocations.
        // SAFETY: freed on drop.
        let address = unsafe { result::malloc_sync(bytes.max(1)) }.named("cuMemAlloc")?;
        device.inner.held.fetch_add(bytes, Ordering::Relaxed);
        let buffer = Self { device: device.clone(), address, len, element: PhantomData };
        // SAFETY: the allocation is that large.
        unsafe { result::memset_d8_sync(address, 0, bytes.max(1)) }.named("cuMemsetD8")?;
        // The clear runs on the legacy stream, which other streams do not wait for.
        device.synchronize()?;
        Ok(buffer)
    }

    /// A copy of `data`. Waits for the device.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn from_slice(device: &Device, data: &[T]) -> Result<Self, DeviceError> {
        let mut buffer = Self::zeros(device, data.len())?;
        buffer.write(data)?;
        Ok(buffer)
    }

    /// Overwrites all elements. Waits for the copy.
    ///
    /// # Errors
    /// `data` of another length; what the driver reports.
    pub fn write(&mut self, data: &[T]) -> Result<(), DeviceError> {
        check_len("data", data.len(), self.len)?;
        self.write_at(0, data)
    }

    /// Overwrites elements from `start` on. Waits for the copy.
    ///
    /// # Errors
    /// A range that leaves the buffer; what the driver reports.
    pub fn write_at(&mut self, start: usize, data: &[T]) -> Result<(), DeviceError> {
        check_range(&(start..start.saturating_add(data.len())), self.len)?;
        if data.is_empty() {
            return Ok(());
        }
        self.device.bind()?;
        let address = self.address + (start * size_of::<T>()) as u64;
        // SAFETY: the range was checked.
        unsafe { result::memcpy_htod_sync(address, data) }.named("cuMemcpyHtoD")?;
        self.device.synchronize()
    }

    /// All elements, after the work queued on `stream`.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn read(&self, stream: &Stream) -> Result<Vec<T>, DeviceError> {
        stream.synchronize()?;
        let mut data = vec![T::zeroed(); self.len];
        if self.len > 0 {
            // SAFETY: both sides hold `len` elements.
            unsafe { result::memcpy_dtoh_sync(&mut data, self.address) }.named("cuMemcpyDtoH")?;
        }
        Ok(data)
    }

    /// Queues a copy from another buffer of the device.
    ///
    /// # Errors
    /// Another length; what the driver reports.
    pub fn copy_from(&mut self, other: &Self, stream: &Stream) -> Result<(), DeviceError> {
        check_len("other", other.len, self.len)?;
        self.device.bind()?;
        // SAFETY: both sides hold `len` elements.
        unsafe {
            result::memcpy_dtod_async(self.address, other.address, self.len * size_of::<T>(), stream.raw())
        }
        .named("cuMemcpyDtoDAsync")
    }

    /// Queues a copy from page-locked host memory.
    ///
    /// # Errors
    /// Another length; what the driver reports.
    pub fn copy_from_host(&mut self, host: &PinnedBuffer<T>, stream: &Stream) -> Result<(), DeviceError> {
        check_len("host", host.len, self.len)?;
        self.device.bind()?;
        // SAFETY: both sides hold `len` elements; dropping either waits for the device.
        unsafe { result::memcpy_htod_async(self.address, host.as_slice(), stream.raw()) }
            .named("cuMemcpyHtoDAsync")
    }

    /// Queues an overwrite of the elements from `start` on. `data` has been taken when this returns.
    ///
    /// # Errors
    /// A range that leaves the buffer; what the driver reports.
    pub fn write_async(&mut self, start: usize, data: &[T], stream: &Stream) -> Result<(), DeviceError> {
        check_range(&(start..start.saturating_add(data.len())), self.len)?;
        if data.is_empty() {
            return Ok(());
        }
        self.device.bind()?;
        let address = self.address + (start * size_of::<T>()) as u64;
        // SAFETY: the range was checked; the driver stages pageable memory before it returns, and refuses to in a capture.
        unsafe { result::memcpy_htod_async(address, data, stream.raw()) }.named("cuMemcpyHtoDAsync")
    }

    /// Queues a copy of a part of another buffer of the device to the elements from `to` on.
    ///
    /// # Errors
    /// Ranges that leave their buffers; what the driver reports.
    pub fn copy_part(
        &mut self,
        to: usize,
        (other, from): (&Self, Range<usize>),
        stream: &Stream,
    ) -> Result<(), DeviceError> {
        check_range(&from, other.len)?;
        check_range(&(to..to.saturating_add(from.len())), self.len)?;
        self.device.bind()?;
        // SAFETY: both ranges lie in their allocations, which are different ones.
        unsafe { queue_copy::<T>((self.address, to), (other.address, from), stream) }
    }

    /// Queues a copy of a part of the buffer to its elements from `to` on.
    ///
    /// # Errors
    /// Ranges that leave the buffer or overlap; what the driver reports.
    pub fn copy_within(&mut self, from: Range<usize>, to: usize, stream: &Stream) -> Result<(), DeviceError> {
        check_range(&from, self.len)?;
        check_range(&(to..to.saturating_add(from.len())), self.len)?;
        if to < from.end && from.start < to + from.len() {
            let expected = "a part that does not overlap the other";
            return Err(DeviceError::Unsupported { field: "to", value: to, expected });
        }
        self.device.bind()?;
        // SAFETY: both ranges lie in the allocation and share no element.
        unsafe { queue_copy::<T>((self.address, to), (self.address, from), stream) }
    }

    /// Queues a fill of a range with one byte.
    ///
    /// # Errors
    /// A range that leaves the buffer; what the driver reports.
    pub fn fill_range(&mut self, range: Range<usize>, byte: u8, stream: &Stream) -> Result<(), DeviceError> {
        check_range(&range, self.len)?;
        self.device.bind()?;
        let address = self.address + (range.start * size_of::<T>()) as u64;
        // SAFETY: the range lies in the allocation.
        unsafe { result::memset_d8_async(address, byte, range.len() * size_of::<T>(), stream.raw()) }
            .named("cuMemsetD8Async")
    }

    /// Queues a fill with one byte.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn fill_bytes(&mut self, byte: u8, stream: &Stream) -> Result<(), DeviceError> {
        self.device.bind()?;
        // SAFETY: the allocation is that large.
        unsafe { result::memset_d8_async(self.address, byte, self.len * size_of::<T>(), stream.raw()) }
            .named("cuMemsetD8Async")
    }
}

impl<T> DeviceBuffer<T> {
    /// All elements, to be read.
    pub fn view(&self) -> DevRef<'_, T> {
        DevRef { address: self.address, len: self.len, element: PhantomData }
    }

    /// All elements, to be written.
    pub fn view_mut(&mut self) -> DevMut<'_, T> {
        DevMut { address: self.address, len: self.len, element: PhantomData }
    }
}

impl<T> Drop for DeviceBuffer<T> {
    fn drop(&mut self) {
        self.device.inner.held.fetch_sub(self.len * size_of::<T>(), Ordering::Relaxed);
        if self.device.bind().is_ok() {
            // SAFETY: allocated by us, freed once; the driver waits for the work that uses it.
            let _ = unsafe { result::free_sync(self.address) };
        }
    }
}

/// Page-locked host memory that kernels read in place.
///
/// Writing to it while queued work reads it gives that work old or new elements; order them with an event.
#[derive(Debug)]
pub struct PinnedBuffer<T> {
    device: Device,
    host: *mut T,
    address: sys::CUdeviceptr,
    len: usize,
}

// SAFETY: owns its memory; access follows the borrow rules.
unsafe impl<T: Send> Send for PinnedBuffer<T> {}
// SAFETY: as for Send.
unsafe impl<T: Sync> Sync for PinnedBuffer<T> {}

impl<T: Pod> PinnedBuffer<T> {
    /// `len` elements of zero bytes.
    ///
    /// # Errors
    /// What the driver reports, no memory included.
    pub fn zeros(device: &Device, len: usize) -> Result<Self, DeviceError> {
        device.bind()?;
        let bytes = (len * size_of::<T>()).max(1);
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: freed on drop.
        let host = unsafe { result::malloc_host(bytes, flags) }.named("cuMemHostAlloc")?;
        // SAFETY: the allocation is that large; page-locked memory is aligned to pages.
        unsafe { host.cast::<u8>().write_bytes(0, bytes) };
        let mut buffer = Self { device: device.clone(), host: host.cast(), address: 0, len };
        // SAFETY: `host` is mapped memory.
        unsafe { sys::cuMemHostGetDevicePointer_v2(&mut buffer.address, host.cast::<c_void>(), 0) }
            .result()
            .named("cuMemHostGetDevicePointer")?;
        Ok(buffer)
    }

    /// The elements, on the host.
    pub fn as_slice(&self) -> &[T] {
        // SAFETY: `len` initialised elements, owned.
        unsafe { std::slice::from_raw_parts(self.host, self.len) }
    }

    /// Copies elements from `start` on to `to`, without a claim on the others: the device may be writing those.
    ///
    /// # Errors
    /// A range outside of the buffer.
    pub fn read_at(&self, start: usize, to: &mut [T]) -> Result<(), DeviceError> {
        check_range(&(start..start.saturating_add(to.len())), self.len)?;
        // SAFETY: the range was checked and `to` is memory of somebody else.
        unsafe { std::ptr::copy_nonoverlapping(self.host.add(start), to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    /// The elements, on the host, writable.
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: `len` initialised elements, owned, borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.host, self.len) }
    }

    /// Queues a copy of a part of another buffer to `to` and on, done by the device.
    ///
    /// # Errors
    /// Ranges outside of the buffers; what the driver reports.
    pub fn copy_part(
        &self,
        to: usize,
        (other, from): (&Self, Range<usize>),
        stream: &Stream,
    ) -> Result<(), DeviceError> {
        check_range(&from, other.len)?;
        check_range(&(to..to.saturating_add(from.len())), self.len)?;
        self.device.bind()?;
        // SAFETY: both ranges lie in their allocations, as the device sees them.
        unsafe { queue_copy::<T>((self.address, to), (other.address, from), stream) }
    }

    /// An element as it is now, which kernels may be writing; `None` beyond the last.
    pub fn peek(&self, index: usize) -> Option<T> {
        // SAFETY: an initialised element, owned; a volatile read of a type that any bits are a value of.
        (index < self.len).then(|| unsafe { self.host.add(index).read_volatile() })
    }

    /// The elements as the device sees them, to be written.
    pub fn view_mut(&mut self) -> DevMut<'_, T> {
        DevMut { address: self.address, len: self.len, element: PhantomData }
    }

    /// The elements as the device sees them.
    pub fn view(&self) -> DevRef<'_, T> {
        DevRef { address: self.address, len: self.len, element: PhantomData }
    }
}

impl PinnedBuffer<u8> {
    /// Queues a copy of device memory to the first bytes.
    ///
    /// # Errors
    /// More than the buffer holds; what the driver reports.
    pub fn copy_from<T: Pod>(&self, from: DevRef<'_, T>, stream: &Stream) -> Result<(), DeviceError> {
        let bytes = from.len() * size_of::<T>();
        check_range(&(0..bytes), self.len)?;
        self.device.bind()?;
        // SAFETY: both sides hold so many bytes, as the device sees them.
        unsafe { result::memcpy_dtod_async(self.address, from.address, bytes, stream.raw()) }
            .named("cuMemcpyDtoDAsync")
    }
}

impl<T> Drop for PinnedBuffer<T> {
    fn drop(&mut self) {
        if self.device.synchronize().is_ok() {
            // SAFETY: allocated by us, freed once; nothing on the device reads it any more.
            let _ = unsafe { result::free_host(self.host.cast()) };
        }
    }
}
