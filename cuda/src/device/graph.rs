//! Recorded work: queued once, replayed as a whole.

use cudarc::driver::{result, sys};

use super::context::Device;
use super::error::{DeviceError, Named};
use super::stream::Stream;

/// Launches captured from a stream. Buffers that they use must outlive it.
#[derive(Debug)]
pub struct Graph {
    device: Device,
    graph: sys::CUgraph,
    exec: sys::CUgraphExec,
}

// SAFETY: graph handles may be used from any thread, one at a time; launching takes the driver's own lock.
unsafe impl Send for Graph {}

impl Graph {
    /// Records what `work` queues on `stream` instead of running it.
    ///
    /// # Errors
    /// Of `work`, and of the driver; calls that wait cannot be recorded.
    pub fn capture<E: From<DeviceError>>(
        stream: &Stream,
        work: impl FnOnce() -> Result<(), E>,
    ) -> Result<Self, E> {
        let device = stream.device().clone();
        device.bind()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is valid.
        unsafe { result::stream::begin_capture(stream.raw(), mode) }.named("cuStreamBeginCapture")?;
        let done = work();
        // SAFETY: the capture that began above ends here, whatever `work` answered.
        let graph = unsafe { result::stream::end_capture(stream.raw()) }.named("cuStreamEndCapture");
        done?;
        let graph = graph?;
        // SAFETY: the graph is valid.
        let exec = unsafe { result::graph::instantiate(graph, sys::CUgraphInstantiate_flags_enum(0)) };
        match exec.named("cuGraphInstantiate") {
            Ok(exec) => Ok(Self { device, graph, exec }),
            Err(error) => {
                // SAFETY: destroyed once, here.
                let _ = unsafe { result::graph::destroy(graph) };
                Err(error.into())
            }
        }
    }

    /// Queues the recorded work.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn launch(&self, stream: &Stream) -> Result<(), DeviceError> {
        self.device.bind()?;
        // SAFETY: both handles are valid.
        unsafe { result::graph::launch(self.exec, stream.raw()) }.named("cuGraphLaunch")
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: instantiated by us, destroyed once.
            let _ = unsafe { result::graph::exec_destroy(self.exec) };
            // SAFETY: captured by us, destroyed once.
            let _ = unsafe { result::graph::destroy(self.graph) };
        }
    }
}
