//! When each stage of a step ran, and on which stream: for profiles. Events around a kernel keep it from starting while its predecessor
//! ends, so a timed step takes some microseconds more than another one.

use floe_cuda::device::{Device, DeviceError, Event, Stream};

/// A stage of a step: one kernel, or two that follow one another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stage {
    /// New rows, queries, ranges.
    Append,
    /// Scores of pages and tokens.
    Scan,
    /// The best of them.
    Select,
    /// Slots, and missing rows from host memory.
    Resolve,
    /// These rows, where there are many items.
    Fetch,
    /// Exact attention; with [`super::TailPlace::Joined`] the tail too.
    Attend,
    /// Merge and output.
    Finish,
    /// Summaries of the page that leaves the window.
    Pages,
    /// All rows of heads in doubt.
    Whole,
    /// The state of what was not selected.
    Tail,
    /// Units for the layer's next step, their slots and rows.
    Ahead,
}

impl Stage {
    /// Every stage, in the order of the above.
    pub const ALL: [Self; 11] = [
        Self::Append,
        Self::Scan,
        Self::Select,
        Self::Resolve,
        Self::Fetch,
        Self::Attend,
        Self::Finish,
        Self::Pages,
        Self::Whole,
        Self::Tail,
        Self::Ahead,
    ];

    /// Its name in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Append => "append",
            Self::Scan => "scan",
            Self::Select => "select",
            Self::Resolve => "resolve",
            Self::Fetch => "fetch",
            Self::Attend => "attend",
            Self::Finish => "finish",
            Self::Pages => "pages",
            Self::Whole => "in doubt",
            Self::Tail => "tail",
            Self::Ahead => "prefetch",
        }
    }

    /// The stream it runs on.
    #[must_use]
    pub const fn stream(self) -> &'static str {
        match self {
            Self::Pages | Self::Whole => "pages",
            Self::Tail => "tail",
            Self::Ahead => "ahead",
            _ => "step",
        }
    }
}

/// When a stage of a layer ran, microseconds from the first stage that was timed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StageSpan {
    /// Layer.
    pub layer: usize,
    /// Stage.
    pub stage: Stage,
    /// When its stream got there.
    pub start_us: f64,
    /// When it was done.
    pub end_us: f64,
}

/// Events around stages, while it is on.
#[derive(Debug)]
pub(super) struct Clock {
    device: Device,
    pub(super) on: bool,
    pub(super) layer: usize,
    marks: Vec<(usize, Stage, [Event; 2])>,
}

impl Clock {
    pub(super) fn new(device: &Device) -> Self {
        Self { device: device.clone(), on: false, layer: 0, marks: Vec::new() }
    }

    /// Does `work`, which queues the stage on `stream`.
    pub(super) fn time<T>(
        &mut self,
        stage: Stage,
        stream: &Stream,
        work: impl FnOnce() -> Result<T, DeviceError>,
    ) -> Result<T, DeviceError> {
        if !self.on {
            return work();
        }
        let marks = [Event::new(&self.device)?, Event::new(&self.device)?];
        marks[0].record(stream)?;
        let done = work()?;
        marks[1].record(stream)?;
        self.marks.push((self.layer, stage, marks));
        Ok(done)
    }

    /// Spans since the last call; all of their work is done.
    pub(super) fn take(&mut self) -> Result<Vec<StageSpan>, DeviceError> {
        let marks = std::mem::take(&mut self.marks);
        let Some((.., [origin, _])) = marks.first() else { return Ok(Vec::new()) };
        let span = |(layer, stage, [start, end]): &(usize, Stage, [Event; 2])| {
            let (start_us, end_us) = (start.micros_since(origin)?, end.micros_since(origin)?);
            Ok(StageSpan { layer: *layer, stage: *stage, start_us, end_us })
        };
        marks.iter().map(span).collect()
    }
}
