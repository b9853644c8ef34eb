//! The engine on the device: sequences, prompts, steps.

use std::collections::HashMap;

use floe_cuda::device::{DevRef, Device, DeviceBuffer, DeviceError, Graph, Stream};
use floe_cuda::ops::DeviceElem;
use floe_cuda::ops::cache::{
    BatchEntry, CHUNK_ROWS, DeviceTensor, Ingest, PageSource, SequencePlace, Tables, build_pages, ingest,
};

use super::ahead::AheadStream;
use super::chain::{Chain, ChainShape, Shared, StepIo};
use super::classes::{Classes, POLICY};
use super::cost::{CostModel, Load};
use super::host::HostPool;
use super::host_io::HostIo;
use super::layer::LayerMemory;
use super::options::{GpuOptions, Plan, Prefer, Submit};
use super::places::{Open, Places};
use super::trees::Trees;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::ids::{LayerId, SeqId};

/// One layer's step of a batch of sequences: what a host engine hands over at its attention. `b` is the batch.
#[derive(Debug, Clone, Copy)]
pub struct LayerStep<'a> {
    /// Layer, `0..num_layers`.
    pub layer: LayerId,
    /// Sequences, none twice.
    pub sequences: &'a [SeqId],
    /// Position of each one's token: the next one of its layer.
    pub positions: &'a [usize],
    /// Post-RoPE queries `[b, num_q_heads, head_dim]`.
    pub q: DeviceTensor,
    /// New post-RoPE keys `[b, num_kv_heads, head_dim]`.
    pub k_new: DeviceTensor,
    /// New values, of the same shape and type.
    pub v_new: DeviceTensor,
    /// Softmax scale, applied to `q.k`; finite.
    pub scale: f32,
    /// Output `[b, num_q_heads, head_dim]`, of any type.
    pub out: DeviceTensor,
}

/// Who takes part in a step.
#[derive(Debug)]
pub(super) struct BatchTable {
    device: DeviceBuffer<BatchEntry>,
    /// What the device holds.
    pub(super) entries: Vec<BatchEntry>,
}

impl BatchTable {
    fn new(device: &Device, options: &GpuOptions) -> Result<Self> {
        let most = options.max_batch.next_power_of_two();
        let entries = vec![BatchEntry::default(); most];
        Ok(Self { device: DeviceBuffer::zeros(device, most)?, entries })
    }

    pub(super) fn view(&self) -> DevRef<'_, BatchEntry> {
        self.device.view()
    }
}

/// A recorded step: seen once, then recorded, then replayed.
#[derive(Debug)]
enum Recorded {
    Seen,
    Ready(Graph),
}

/// Recorded steps of one layer at most; the rest run unrecorded.
const GRAPHS_PER_LAYER: usize = 24;

/// KV cache and attention of one model on a device, for batches of sequences; `E` is the element type of the cache.
///
/// See the [module](super) for how it works.
#[derive(Debug)]
pub struct GpuEngine<E: DeviceElem> {
    // Graphs go first: they use everything below.
    graphs: HashMap<(usize, ChainShape, StepIo), Recorded>,
    pub(super) chains: HashMap<ChainShape, Chain<E>>,
    pub(super) config: Config,
    pub(super) options: GpuOptions,
    /// What the layers do that the policy selects in.
    pub(super) plan: Plan,
    pub(super) classes: Classes,
    pub(super) device: Device,
    pub(super) layers: Vec<LayerMemory<E>>,
    pub(super) shared: Shared,
    /// Where steps prefetch.
    pub(super) ahead: Option<AheadStream>,
    /// With pages of similar keys.
    pub(super) trees: Option<Trees>,
    /// Of steps that select, and of exact ones: layers of either kind follow one another with the same sequences.
    pub(super) batch: BatchTable,
    exact_batch: BatchTable,
    /// By class of layers.
    pub(super) sequences: Vec<DeviceBuffer<SequencePlace>>,
    pub(super) host: HostPool,
    pub(super) places: Places,
    pub(super) next_seq: u64,
    pub(super) cost: CostModel,
    pub(super) last: Option<ChainShape>,
    pub(super) host_io: HostIo,
    pub(super) steps: u64,
    pub(super) exact_steps: u64,
    pub(super) replayed_steps: u64,
    pub(super) sparse_head_steps: u64,
    /// Exact steps that read rows in host memory, these rows, and how often rows moved to a larger place.
    pub(super) link_steps: u64,
    pub(super) link_rows: u64,
    pub(super) moved: u64,
    pub(super) warned_of_link: bool,
}

impl<E: DeviceElem> GpuEngine<E> {
    /// Allocates all device memory.
    ///
    /// # Errors
    /// [`Error::Config`] for what this backend cannot do, naming the field; [`Error::Device`] when the device has no room.
    pub fn open(device: &Device, config: Config, options: GpuOptions) -> Result<Self> {
        let plan = Plan::new(&config, &options)?;
        if config.kv_dtype.to_string() != E::NAME {
            return Err(Error::config("kv_dtype", config.kv_dtype, format!("this engine holds {}", E::NAME)));
        }
        let classes = Classes::new(&config, &options, &plan);
        let plan = classes.all[POLICY].plan;
        let layers = (0..config.num_layers)
            .map(|layer| LayerMemory::new(device, &classes.all[classes.of(layer)], &options))
            .collect::<Result<_, _>>()?;
        let table = || DeviceBuffer::zeros(device, options.max_sequences);
        let row_bytes = plan.shape.row_len() * size_of::<E>();
        Ok(Self {
            graphs: HashMap::new(),
            chains: HashMap::new(),
            layers,
            shared: Shared::new(device, &plan, &options)?,
            ahead: (plan.prefetch > 0).then(|| AheadStream::new(device)).transpose()?,
            trees: if plan.tree {
                Some(Trees::new(device, (&plan, &options), config.num_layers)?)
            } else {
                None
            },
            batch: BatchTable::new(device, &options)?,
            exact_batch: BatchTable::new(device, &options)?,
            sequences: classes.all.iter().map(|_| table()).collect::<Result<_, _>>()?,
            host: HostPool::new(device, plan.shape.heads * CHUNK_ROWS * row_bytes, options.host_bytes),
            places: Places::new(&options, &classes),
            next_seq: 0,
            cost: CostModel::new(&plan),
            last: None,
            host_io: HostIo::default(),
            steps: 0,
            exact_steps: 0,
            replayed_steps: 0,
            sparse_head_steps: 0,
            link_steps: 0,
            link_rows: 0,
            moved: 0,
            warned_of_link: false,
            device: device.clone(),
            config,
            options,
            plan,
            classes,
        })
    }

    /// The configuration that the engine was opened with.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Memory and habits that the engine was opened with.
    #[must_use]
    pub fn options(&self) -> &GpuOptions {
        &self.options
    }

    /// Appends keys and values `[tokens, num_kv_heads, head_dim]` of a prompt to one layer. Pieces of any size give the same
    /// cache. Everything is queued on `stream`; the tensors may be reused once that work is done.
    ///
    /// # Errors
    /// Unknown sequence or layer, shapes that do not fit, no room; nothing is stored then.
    pub fn prefill(
        &mut self,
        seq: SeqId,
        layer: LayerId,
        (k, v): (&DeviceTensor, &DeviceTensor),
        stream: &Stream,
    ) -> Result<()> {
        self.check_layer(layer)?;
        let tokens = k.shape()[0];
        let shape = [tokens, self.plan.shape.heads, self.plan.shape.head_dim];
        for (field, tensor) in [("k", k), ("v", v)] {
            expect(field, tensor, shape)?;
        }
        if tokens == 0 {
            return Ok(());
        }
        let first = self.places.get(seq)?.tokens[layer.0];
        self.make_room(seq, layer.0, first + tokens, stream)?;
        let (class, plan) = (self.classes.of(layer.0), *self.classes.plan(layer.0));
        let open = self.places.get_mut(seq)?;
        let run = Ingest { k: *k, v: *v, sequence: open.index, first };
        let memory = &mut self.layers[layer.0];
        let tables = Tables {
            shape: plan.shape,
            batch: self.batch.view(),
            sequences: self.sequences[class].view(),
            chunks: memory.chunks.view(),
        };
        if !plan.exact && !open.is_dense() && !plan.tree {
            // Pages whose tokens have left the window; of the others the rows stay in the ring.
            let until = published(first + tokens + 1, plan.shape.window);
            let from = open.built[layer.0];
            if until > from {
                let source = PageSource::Run { run: &run, first: from, num: until - from };
                let pages = memory.pages.write(self.shared.rotation());
                build_pages(stream, &tables, source, memory.kv.view(), pages)?;
                open.built[layer.0] = until;
            }
        }
        ingest(stream, &tables, &run, memory.kv.view_mut())?;
        open.tokens[layer.0] = first + tokens;
        Ok(())
    }

    /// Appends one token to each sequence and attends: one layer of one step. Everything is queued on `stream`; nothing waits.
    ///
    /// # Errors
    /// Unknown sequence or layer, a sequence named twice, a position that is not its layer's next, shapes that do not fit, no room;
    /// nothing is stored then.
    pub fn attend(&mut self, step: &LayerStep<'_>, stream: &Stream) -> Result<()> {
        self.check_step(step)?;
        let layer = step.layer.0;
        for (seq, position) in step.sequences.iter().zip(step.positions) {
            self.make_room(*seq, layer, position + 1, stream)?;
        }
        let exact = self.choose(step)?;
        let shape = self.enter(step, exact, stream)?;
        if !self.chains.contains_key(&shape) {
            let chain = Chain::new(&self.device, &self.plan, &self.options, shape)?;
            self.chains.insert(shape, chain);
        }
        let io =
            StepIo { q: step.q, k: step.k_new, v: step.v_new, out: step.out, scale: step.scale.to_bits() };
        let padded = pad(&io, shape.entries);
        self.before_step(layer, shape, stream)?;
        self.enter_nodes(&shape, stream)?;
        self.run(layer, shape, &padded, stream)?;
        self.queue_ahead(layer, shape, stream)?;
        if !exact {
            self.ask_trees((step.sequences, layer), (&shape, step.scale), stream)?;
        }
        self.layers[layer].doubt.warn(layer);
        let mut link_rows = 0;
        for seq in step.sequences {
            let window = self.plan.shape.window;
            let open = self.places.get(*seq)?;
            if exact {
                link_rows += self.reach(open, layer, open.tokens[layer] + 1).1 * self.plan.shape.heads;
            }
            let open = self.places.get_mut(*seq)?;
            open.tokens[layer] += 1;
            if !exact {
                // The step itself built the page that left the window.
                open.built[layer] = open.built[layer].max(published(open.tokens[layer] + 1, window));
            }
        }
        self.last = Some(shape);
        self.steps += 1;
        self.exact_steps += u64::from(exact);
        self.link_steps += u64::from(link_rows > 0);
        self.link_rows += link_rows as u64;
        self.sparse_head_steps +=
            if exact { 0 } else { (step.sequences.len() * self.plan.shape.heads) as u64 };
        Ok(())
    }

    pub(super) fn check_layer(&self, layer: LayerId) -> Result<()> {
        if layer.0 < self.config.num_layers {
            return Ok(());
        }
        Err(Error::UnknownLayer { got: layer.0, num_layers: self.config.num_layers })
    }

    fn check_step(&self, step: &LayerStep<'_>) -> Result<()> {
        self.check_layer(step.layer)?;
        let (batch, shape) = (step.sequences.len(), self.plan.shape);
        if batch == 0 || batch > self.options.max_batch {
            let reason = format!("must be 1 to {}", self.options.max_batch);
            return Err(Error::config("sequences", batch, reason));
        }
        if step.positions.len() != batch {
            return Err(Error::shape("positions", format!("{batch}"), step.positions.len().to_string()));
        }
        let q_heads = shape.heads * shape.group;
        expect("q", &step.q, [batch, q_heads, shape.head_dim])?;
        expect("k_new", &step.k_new, [batch, shape.heads, shape.head_dim])?;
        expect("v_new", &step.v_new, [batch, shape.heads, shape.head_dim])?;
        expect("out", &step.out, [batch, q_heads, shape.head_dim])?;
        if !step.scale.is_finite() || step.scale <= 0.0 {
            return Err(Error::config("scale", step.scale, "must be finite and above 0"));
        }
        for (i, (seq, position)) in step.sequences.iter().zip(step.positions).enumerate() {
            let expected = self.places.get(*seq)?.tokens[step.layer.0];
            if *position != expected {
                return Err(Error::Position { seq: *seq, layer: step.layer, got: *position, expected });
            }
            if step.sequences[..i].contains(seq) {
                return Err(Error::config("sequences", seq, "is named twice"));
            }
        }
        Ok(())
    }

    /// Whether the step is exact.
    fn choose(&self, step: &LayerStep<'_>) -> Result<bool> {
        if self.classes.plan(step.layer.0).exact {
            return Ok(true);
        }
        let mut load = Load::default();
        let mut all_dense = true;
        for (seq, position) in step.sequences.iter().zip(step.positions) {
            all_dense &= self.places.get(*seq)?.is_dense();
            load.add(position + 1, &self.plan);
        }
        // Within the budget everything is attended in any case.
        let within = load.longest <= self.config.budget;
        let faster = || self.options.prefer == Prefer::Exact || self.cost.exact_is_faster(&load);
        Ok(all_dense && (within || faster()))
    }

    /// Of `tokens` tokens that a step of a layer attends exactly: those that have rows on the device, and those that have none.
    fn reach(&self, open: &Open, layer: usize, tokens: usize) -> (usize, usize) {
        let class = self.classes.of(layer);
        let place = open.places[class];
        if place.slots != SequencePlace::DENSE {
            return (tokens.min(self.classes.all[class].plan.shape.ring), 0);
        }
        let near = tokens.min(place.rows_each as usize);
        (near, tokens - near)
    }

    /// Brings the batch table up to date and says which chain the step needs.
    fn enter(&mut self, step: &LayerStep<'_>, exact: bool, stream: &Stream) -> Result<ChainShape> {
        let layer = step.layer.0;
        let mut shape = ChainShape {
            exact,
            entries: step.sequences.len().next_power_of_two(),
            exact_tokens: 0,
            beyond: 0,
            pages: 0,
            parity: if self.ahead.is_some() && !exact { layer % 2 } else { 0 },
        };
        let mut entries = vec![BatchEntry::default(); shape.entries];
        for ((seq, position), entry) in step.sequences.iter().zip(step.positions).zip(&mut entries) {
            let tokens = position + 1;
            let (sequence, tick, near, beyond) = {
                let open = self.places.get(*seq)?;
                let (near, beyond) = self.reach(open, layer, tokens);
                (open.index as u32, tokens as u32 + open.turned_back, near, beyond)
            };
            *entry = BatchEntry { sequence, tokens: tokens as u32, tick, exact: u32::from(exact) };
            if exact {
                shape.exact_tokens = shape.exact_tokens.max(near.next_power_of_two());
                if beyond > 0 {
                    shape.beyond = shape.beyond.max(beyond.next_power_of_two().max(1024));
                }
            } else {
                let mut pages = published(tokens, self.plan.shape.window);
                if self.plan.tree {
                    pages = self.follow_trees((*seq, layer), *position, stream)?;
                } else {
                    self.catch_up(*seq, layer, pages, stream)?;
                }
                shape.pages = shape.pages.max(pages.next_power_of_two()).max(64);
            }
        }
        if exact {
            shape.exact_tokens = shape.exact_tokens.max(1024);
        }
        let table = if exact { &mut self.exact_batch } else { &mut self.batch };
        if table.entries[..entries.len()] != entries[..] {
            if let Some(ahead) = &self.ahead {
                ahead.wait_for_lists(stream)?;
            }
            table.device.write_async(0, &entries, stream)?;
            table.entries[..entries.len()].copy_from_slice(&entries);
        }
        Ok(shape)
    }

    /// Builds the pages that a sequence attended exactly until now has not built.
    pub(super) fn catch_up(&mut self, seq: SeqId, layer: usize, pages: usize, stream: &Stream) -> Result<()> {
        let open = self.places.get_mut(seq)?;
        let first = open.built[layer];
        if first >= pages {
            return Ok(());
        }
        let memory = &mut self.layers[layer];
        let tables = Tables {
            shape: self.plan.shape,
            batch: self.batch.view(),
            sequences: self.sequences[POLICY].view(),
            chunks: memory.chunks.view(),
        };
        let source = PageSource::Rows { sequence: open.index, first, num: pages - first };
        let built = memory.pages.write(self.shared.rotation());
        build_pages(stream, &tables, source, memory.kv.view(), built)?;
        open.built[layer] = pages;
        Ok(())
    }

    /// Replays the step if it is recorded, else runs it; a step seen before is recorded on the way.
    fn run(&mut self, layer: usize, shape: ChainShape, io: &StepIo, stream: &Stream) -> Result<()> {
        let key = (layer, shape, *io);
        if let (Some(Recorded::Ready(graph)), false) = (self.graphs.get(&key), self.shared.clock.on) {
            self.replayed_steps += 1;
            return Ok(graph.launch(stream)?);
        }
        let Some(chain) = self.chains.get_mut(&shape) else {
            return Err(Error::NoRoom { what: "chains", needed: 1, free: 0 });
        };
        let memory = &mut self.layers[layer];
        let class = self.classes.of(layer);
        let (plan, shared) = (&self.classes.all[class].plan, &mut self.shared);
        let batch = if shape.exact { &self.exact_batch } else { &self.batch };
        let tables = (batch.view(), self.sequences[class].view());
        shared.clock.layer = layer;
        // Recorded events have no time.
        let launched = match self.options.submit {
            _ if shared.clock.on => true,
            Submit::Auto => shape.exact,
            Submit::Recorded => false,
            Submit::Launches => true,
        };
        match self.graphs.get(&key) {
            _ if launched => Ok(chain.queue(stream, (plan, shared), tables, memory, io)?),
            None => {
                chain.queue(stream, (plan, shared), tables, memory, io)?;
                let room = GRAPHS_PER_LAYER * self.config.num_layers;
                if self.graphs.len() < room {
                    self.graphs.insert(key, Recorded::Seen);
                }
                Ok(())
            }
            Some(_) => {
                // The capture needs a stream of its own: that of the host engine may be the default one.
                let own = Stream::new(&self.device)?;
                let record = || chain.queue(&own, (plan, shared), tables, memory, io);
                let graph = Graph::capture::<DeviceError>(&own, record)?;
                graph.launch(stream)?;
                self.graphs.insert(key, Recorded::Ready(graph));
                Ok(())
            }
        }
    }
}

/// Pages that a step with `tokens` tokens, its own included, selects from.
pub(super) fn published(tokens: usize, window: usize) -> usize {
    tokens.saturating_sub(window + 1) / 16
}

/// The step's tensors under the shape that the chain was made for. Entries beyond the batch are nobody's: they are never touched.
fn pad(io: &StepIo, entries: usize) -> StepIo {
    let pad = |tensor: &DeviceTensor| tensor.padded(entries);
    StepIo { q: pad(&io.q), k: pad(&io.k), v: pad(&io.v), out: pad(&io.out), scale: io.scale }
}

pub(super) fn expect(field: &'static str, tensor: &DeviceTensor, shape: [usize; 3]) -> Result<()> {
    if tensor.shape() == shape {
        return Ok(());
    }
    Err(Error::shape(field, format!("{shape:?}"), format!("{:?}", tensor.shape())))
}
