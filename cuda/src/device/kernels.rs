//! The embedded kernels, loaded when first used.

use std::ffi::{CString, c_void};
use std::sync::PoisonError;

use cudarc::driver::{result, sys};

use super::context::Device;
use super::error::{DeviceError, Named};
use super::stream::Stream;

/// The driver reads the header of a fat binary in words of eight bytes.
#[repr(C, align(16))]
pub(crate) struct Aligned<T: ?Sized>(pub(crate) T);

/// A fat binary.
pub(crate) type Image = Aligned<[u8]>;

include!(concat!(env!("OUT_DIR"), "/modules.rs"));

/// A kernel of a loaded module.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kernel(sys::CUfunction);

/// Where and how wide a kernel runs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Launch {
    /// Thread blocks, in x and y.
    pub blocks: (u32, u32),
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of dynamic shared memory of a block.
    pub shared_bytes: u32,
}

impl Device {
    /// Kernel `name` of module `module` (the stem of its source), allowed `shared_bytes` of dynamic shared memory.
    pub(crate) fn kernel(
        &self,
        module: &'static str,
        name: &str,
        shared_bytes: u32,
    ) -> Result<Kernel, DeviceError> {
        let mut kernels = self.inner.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = kernels.get(name) {
            return Ok(*kernel);
        }
        self.bind()?;
        let mut modules = self.inner.modules.lock().unwrap_or_else(PoisonError::into_inner);
        let loaded = match modules.get(module) {
            Some(loaded) => *loaded,
            None => {
                let image = MODULES.iter().find(|(stem, _)| *stem == module).map(|(_, image)| *image);
                let missing = DeviceError::Driver { call: "find module", code: 0, name: module.to_owned() };
                let image = image.ok_or(missing)?;
                // SAFETY: a whole fat binary, aligned, as nvcc wrote it.
                let loaded = unsafe { result::module::load_data(image.0.as_ptr().cast()) }
                    .named("cuModuleLoadData")?;
                modules.insert(module, loaded);
                loaded
            }
        };
        let text = CString::new(name).map_err(|_| DeviceError::Driver {
            call: "name of kernel",
            code: 0,
            name: name.to_owned(),
        })?;
        // SAFETY: the module stays loaded as long as the device.
        let function = unsafe { result::module::get_function(loaded, text) }.named("cuModuleGetFunction")?;
        if shared_bytes > 48 << 10 {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let value = i32::try_from(shared_bytes).unwrap_or(i32::MAX);
            // SAFETY: the function is valid.
            unsafe { result::function::set_function_attribute(function, attribute, value) }
                .named("cuFuncSetAttribute")?;
        }
        let kernel = Kernel(function);
        kernels.insert(name.to_owned(), kernel);
        Ok(kernel)
    }
}

/// What a launch on a Hopper device may ask for beside its size. Elsewhere it means nothing: the code for other devices neither waits
/// for its predecessor by itself nor knows of clusters.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Together {
    /// Thread blocks in z.
    pub layers: u32,
    /// Blocks in x that share their memory; 1 = none do.
    pub cluster: u32,
}

impl Together {
    /// One layer, no clusters.
    pub(crate) const ALONE: Self = Self { layers: 1, cluster: 1 };
}

impl Device {
    /// Whether kernels run as their code for Hopper.
    pub(crate) fn is_hopper(&self) -> bool {
        self.properties().capability == (9, 0)
    }
}

impl Kernel {
    /// As [`Kernel::launch`]; on Hopper the kernel's blocks take their places before its predecessor in the stream is done, and
    /// wait for it themselves.
    ///
    /// # Safety
    /// - As for [`Kernel::launch`].
    /// - The kernel calls `wait_for_earlier` before it touches memory that an earlier one writes or reads.
    pub(crate) unsafe fn launch_early<P>(
        self,
        stream: &Stream,
        launch: Launch,
        together: Together,
        params: &P,
    ) -> Result<(), DeviceError> {
        if launch.blocks.0 == 0 || launch.blocks.1 == 0 || together.layers == 0 {
            return Ok(());
        }
        stream.device().bind()?;
        let hopper = stream.device().is_hopper();
        let attribute = |id, value| sys::CUlaunchAttribute { id, pad: [0; 4], value };
        let early = sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 };
        let cluster = sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: together.cluster, y: 1, z: 1 };
        let mut attributes = [
            attribute(sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, early),
            attribute(
                sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
                sys::CUlaunchAttributeValue { clusterDim: cluster },
            ),
        ];
        let config = sys::CUlaunchConfig {
            gridDimX: launch.blocks.0,
            gridDimY: launch.blocks.1,
            gridDimZ: together.layers,
            blockDimX: launch.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared_bytes,
            hStream: stream.raw(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: if hopper { if together.cluster > 1 { 2 } else { 1 } } else { 0 },
        };
        let mut pointers = [std::ptr::from_ref(params).cast_mut().cast::<c_void>()];
        // SAFETY: the caller vouches for the parameters; the driver copies them, and the configuration, before it returns.
        unsafe {
            sys::cuLaunchKernelEx(&raw const config, self.0, pointers.as_mut_ptr(), std::ptr::null_mut())
        }
        .result()
        .named("cuLaunchKernelEx")
    }

    /// Queues the kernel with one parameter struct, passed by value. No blocks: nothing to do.
    ///
    /// # Safety
    /// - `P` is `repr(C)` and has the layout of the kernel's parameter struct.
    /// - Its addresses are valid on the device, as large as the kernel takes them to be, and stay so until the work is done.
    pub(crate) unsafe fn launch<P>(
        self,
        stream: &Stream,
        launch: Launch,
        params: &P,
    ) -> Result<(), DeviceError> {
        if launch.blocks.0 == 0 || launch.blocks.1 == 0 {
            return Ok(());
        }
        stream.device().bind()?;
        let mut pointers = [std::ptr::from_ref(params).cast_mut().cast::<c_void>()];
        let grid = (launch.blocks.0, launch.blocks.1, 1);
        // SAFETY: the caller vouches for the parameters; the driver copies them before it returns.
        unsafe {
            result::launch_kernel(
                self.0,
                grid,
                (launch.threads, 1, 1),
                launch.shared_bytes,
                stream.raw(),
                &mut pointers,
            )
        }
        .named("cuLaunchKernel")
    }
}
