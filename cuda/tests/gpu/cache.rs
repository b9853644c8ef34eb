//! The kernels of `ops::cache` against their twin: prompts, steps, pages, slots, output.

use floe_cuda::StateRef;
use floe_cuda::device::{DeviceBuffer, PinnedBuffer};
use floe_cuda::ops::DeviceElem;
use floe_cuda::ops::Spans;
use floe_cuda::ops::cache::{
    Ahead, AppendStep, BatchEntry, CHUNK_ROWS, CacheShape, DeviceTensor, FetchList, FinishStart, FoundUnit,
    Ingest, PageSketch, PageSource, Pages, Ranges, Resolve, SequencePlace, Slots, Tables, TensorType,
    append_step, build_pages, fetch_listed, finish, ingest, refill, resolve, resolve_ahead,
};
use floe_cuda::ops::sweep::Rotation;
use floe_cuda::twin::device::{HostCache, HostRotation, WarmRow, encode, merge_parts};
use half::{bf16, f16};

use crate::rig::{Rig, rig};
use crate::support::Random;
use crate::sweep::rotation;

const CHUNKS: usize = 6;
const TOKENS: usize = CHUNKS * CHUNK_ROWS;

/// One layer with two sequences, the first dense, the second with slots; device memory beside the twin.
pub struct World<E: DeviceElem> {
    pub rig: &'static Rig,
    pub twin: HostCache<E>,
    host: Vec<PinnedBuffer<E>>,
    pub batch: DeviceBuffer<BatchEntry>,
    pub sequences: DeviceBuffer<SequencePlace>,
    pub chunks: DeviceBuffer<u64>,
    pub kv: DeviceBuffer<E>,
    pub random: Random,
}

/// What kernels know of all sequences: borrows no more of a [`World`] than it reads.
pub fn tables_of<'a>(
    shape: CacheShape,
    batch: &'a DeviceBuffer<BatchEntry>,
    sequences: &'a DeviceBuffer<SequencePlace>,
    chunks: &'a DeviceBuffer<u64>,
) -> Tables<'a> {
    Tables { shape, batch: batch.view(), sequences: sequences.view(), chunks: chunks.view() }
}

/// Empty slots, and what was found in them.
pub struct SlotRig {
    row_of_token: DeviceBuffer<u32>,
    token_of_row: DeviceBuffer<u32>,
    used: DeviceBuffer<u32>,
    hand: DeviceBuffer<u32>,
    pub counters: DeviceBuffer<u64>,
}

impl SlotRig {
    pub fn new<E: DeviceElem>(world: &World<E>) -> Self {
        let (rig, twin) = (world.rig, &world.twin);
        let none = |n: usize| rig.buffer(&vec![u32::MAX; n]);
        Self {
            row_of_token: none(twin.row_of_token.len()),
            token_of_row: none(twin.used.len()),
            used: DeviceBuffer::zeros(&rig.device, twin.used.len()).unwrap(),
            hand: DeviceBuffer::zeros(&rig.device, twin.hand.len()).unwrap(),
            counters: DeviceBuffer::zeros(&rig.device, 3).unwrap(),
        }
    }

    pub fn write(&mut self) -> Slots<'_> {
        Slots {
            row_of_token: self.row_of_token.view_mut(),
            token_of_row: self.token_of_row.view_mut(),
            used: self.used.view_mut(),
            hand: self.hand.view_mut(),
            counters: self.counters.view_mut(),
        }
    }
}

impl<E: DeviceElem> World<E> {
    pub fn new(shape: CacheShape, slots: usize) -> Self {
        let rig = rig();
        let pages_each = TOKENS / 16;
        let slot_rows = shape.sinks + shape.ring + slots;
        let places = vec![
            SequencePlace {
                rows: 5,
                rows_each: TOKENS as u32,
                pages: 16,
                pages_each: pages_each as u32,
                slots: SequencePlace::DENSE,
                ..SequencePlace::default()
            },
            SequencePlace {
                rows: (5 + TOKENS * shape.heads) as u32,
                rows_each: slot_rows as u32,
                pages: (16 + pages_each * shape.heads) as u32,
                pages_each: pages_each as u32,
                slots: slots as u32,
                ..SequencePlace::default()
            },
        ];
        let rows = 5 + (TOKENS + slot_rows) * shape.heads + 3;
        let pages = 16 + 2 * pages_each * shape.heads;
        let len = shape.heads * CHUNK_ROWS * shape.row_len();
        let host: Vec<PinnedBuffer<E>> =
            (0..2 * CHUNKS).map(|_| PinnedBuffer::zeros(&rig.device, len).unwrap()).collect();
        let addresses: Vec<u64> = host.iter().map(|chunk| chunk.view().address()).collect();
        Self {
            rig,
            batch: DeviceBuffer::zeros(&rig.device, 2).unwrap(),
            sequences: rig.buffer(&places),
            chunks: rig.buffer(&addresses),
            kv: DeviceBuffer::zeros(&rig.device, rows * shape.row_len()).unwrap(),
            twin: HostCache::new(shape, places, rows, pages),
            host,
            random: Random(slots as u64),
        }
    }

    pub fn elems(&mut self, n: usize) -> Vec<E> {
        (0..n).map(|_| E::from_f32(self.random.normal())).collect()
    }

    /// A prompt piece: pages before it is stored, from the rows and the run.
    pub fn prefill(&mut self, sequence: usize, first: usize, run: usize, pages: Option<&mut PageBuffers<E>>) {
        let shape = self.twin.shape;
        let (k, v) =
            (self.elems(run * shape.heads * shape.head_dim), self.elems(run * shape.heads * shape.head_dim));
        let (device_k, device_v) = (self.rig.buffer(&k), self.rig.buffer(&v));
        let dims = [run, shape.heads, shape.head_dim];
        let of = Ingest { k: tensor(&device_k, dims), v: tensor(&device_v, dims), sequence, first };
        let tables = tables_of(shape, &self.batch, &self.sequences, &self.chunks);
        let stream = &self.rig.stream;
        if let Some(buffers) = pages {
            let (from, until) = (buffers.built, (first + run).saturating_sub(shape.window) / 16);
            let source = PageSource::Run { run: &of, first: from, num: until - from };
            build_pages(stream, &tables, source, self.kv.view(), buffers.pages()).unwrap();
            buffers.built = until;
        }
        ingest(stream, &tables, &of, self.kv.view_mut()).unwrap();
        stream.synchronize().unwrap();
        self.twin.ingest(sequence, first, &k, &v);
    }

    pub fn check_rows(&self, name: &str) {
        let (got, len) = (self.kv.read(&self.rig.stream).unwrap(), self.twin.shape.row_len());
        for (row, (a, b)) in got.chunks(len).zip(self.twin.kv.chunks(len)).enumerate() {
            assert!(a.iter().zip(b).all(|(a, b)| a.to_f32() == b.to_f32()), "{name}: row {row}");
        }
        for (&(sequence, head, token), want) in &self.twin.warm {
            let chunk = self.host[sequence * CHUNKS + token / CHUNK_ROWS].as_slice();
            let at = (head * CHUNK_ROWS + token % CHUNK_ROWS) * len;
            let got = &chunk[at..at + len];
            assert!(
                got.iter().zip(want).all(|(a, b)| a.to_f32() == b.to_f32()),
                "{name}: host {sequence} {head} {token}"
            );
        }
    }

    /// Fetches on the twin's side.
    fn twin_fetch(&mut self, rows: &[(WarmRow, u32)]) {
        let len = self.twin.shape.row_len();
        for (token, row) in rows {
            self.twin.kv[*row as usize * len..(*row as usize + 1) * len]
                .copy_from_slice(&self.twin.warm[token]);
        }
    }
}

pub fn tensor<E: DeviceElem>(buffer: &DeviceBuffer<E>, shape: [usize; 3]) -> DeviceTensor {
    let dtype = if E::NAME == "bf16" { TensorType::Bf16 } else { TensorType::F16 };
    assert_eq!(buffer.view().len(), shape.iter().product::<usize>());
    // SAFETY: the buffer has that shape; callers wait for the stream before they drop it.
    unsafe { DeviceTensor::contiguous(buffer.view().address(), dtype, shape) }
}

/// Pages of all sequences.
pub struct PageBuffers<E> {
    bits: [usize; 2],
    pub mean_keys: DeviceBuffer<E>,
    pub mean_values: DeviceBuffer<E>,
    pub log_count: DeviceBuffer<f32>,
    pub key_lines: DeviceBuffer<u32>,
    pub key_scales: DeviceBuffer<f16>,
    pub value_lines: DeviceBuffer<u32>,
    pub value_scales: DeviceBuffer<f16>,
    pub masks: DeviceBuffer<u16>,
    pub spread: DeviceBuffer<f32>,
    signs: DeviceBuffer<f32>,
    order: DeviceBuffer<u32>,
    host_rotation: (Vec<f32>, Vec<u32>),
    pub built: usize,
}

impl<E: DeviceElem> PageBuffers<E> {
    pub fn new(rig: &Rig, pages: usize, d: usize, bits: [usize; 2]) -> Self {
        let device = &rig.device;
        let host_rotation = rotation(&mut Random(d as u64), d);
        let values = if bits[1] > 0 { pages * 16 } else { 0 };
        Self {
            bits,
            mean_keys: DeviceBuffer::zeros(device, pages * d).unwrap(),
            mean_values: DeviceBuffer::zeros(device, pages * d).unwrap(),
            log_count: DeviceBuffer::zeros(device, pages).unwrap(),
            key_lines: DeviceBuffer::zeros(device, bits[0] * pages * d / 2).unwrap(),
            key_scales: DeviceBuffer::zeros(device, pages * 16).unwrap(),
            value_lines: DeviceBuffer::zeros(device, bits[1] * pages * d / 2).unwrap(),
            value_scales: DeviceBuffer::zeros(device, values).unwrap(),
            masks: DeviceBuffer::zeros(device, pages).unwrap(),
            spread: DeviceBuffer::zeros(device, pages).unwrap(),
            signs: rig.buffer(&host_rotation.0),
            order: rig.buffer(&host_rotation.1),
            host_rotation,
            built: 0,
        }
    }

    pub fn pages(&mut self) -> Pages<'_, E> {
        Pages {
            mean_keys: self.mean_keys.view_mut(),
            mean_values: self.mean_values.view_mut(),
            log_count: self.log_count.view_mut(),
            masks: Some(self.masks.view_mut()),
            spread: Some(self.spread.view_mut()),
            sketch: Some(PageSketch {
                bits: self.bits,
                key_lines: self.key_lines.view_mut(),
                key_scales: self.key_scales.view_mut(),
                value_lines: self.value_lines.view_mut(),
                value_scales: self.value_scales.view_mut(),
                rotation: Rotation {
                    signs: self.signs.view(),
                    order: (!self.order.view().is_empty()).then(|| self.order.view()),
                },
            }),
        }
    }

    /// Pages `0..built` of sequence 1.
    fn check(&self, world: &World<E>, name: &str) {
        let stream = &world.rig.stream;
        let (shape, place) = (world.twin.shape, world.twin.places[1]);
        let d = shape.head_dim;
        let rotation = HostRotation { signs: &self.host_rotation.0, order: &self.host_rotation.1 };
        let (keys, values) = (self.mean_keys.read(stream).unwrap(), self.mean_values.read(stream).unwrap());
        let spreads = self.spread.read(stream).unwrap();
        let (counts, masks) = (self.log_count.read(stream).unwrap(), self.masks.read(stream).unwrap());
        let lines = [self.key_lines.read(stream).unwrap(), self.value_lines.read(stream).unwrap()];
        let scales = [self.key_scales.read(stream).unwrap(), self.value_scales.read(stream).unwrap()];
        let mut unlike = 0usize;
        for (head, page) in (0..shape.heads).flat_map(|head| (0..self.built).map(move |page| (head, page))) {
            let at = place.pages as usize + head * place.pages_each as usize + page;
            let want = world.twin.means(1, head, page);
            let got = keys[at * d..(at + 1) * d].iter().chain(&values[at * d..(at + 1) * d]);
            // f32 sums of sixteen; a sum near the middle of two values of E may round either way.
            let close = |a: f32, b: f32| (a - b).abs() <= b.abs() / 100.0 + 1e-3;
            assert!(got.zip(&want).all(|(a, b)| close(a.to_f32(), *b)), "{name}: means of page {page}");
            let sink = page * 16 < shape.sinks;
            assert_eq!((counts[at] == f32::NEG_INFINITY, masks[at]), (sink, if sink { 0 } else { u16::MAX }));
            let spread = world.twin.spread(1, head, page);
            assert!(
                (f64::from(spreads[at]) - spread).abs() <= spread / 50.0,
                "{name}: spread of page {page}"
            );
            for (token, value) in (0..16).flat_map(|token| [(token, false), (token, true)]) {
                let bits = self.bits[usize::from(value)];
                if bits == 0 {
                    continue;
                }
                let x = world.twin.rotated((1, head, page * 16 + token), value, &rotation);
                let (want, scale) = encode(&x, bits);
                let got_scale = scales[usize::from(value)][at * 16 + token].to_f64();
                assert!(
                    (got_scale - scale).abs() <= scale / 500.0,
                    "{name}: scale {got_scale} is not {scale}"
                );
                for (i, want) in want.iter().enumerate() {
                    let mut code = 0;
                    for plane in 0..bits {
                        let line = ((at * bits + plane) * (d / 32) + i / 32) * 16;
                        let bit = if value {
                            let to = 8 * (token / 4) + token % 4 + if i % 32 >= 16 { 4 } else { 0 };
                            lines[1][line + i % 16] >> to & 1
                        } else {
                            lines[0][line + token] >> (i % 32) & 1
                        };
                        code = 2 * code + bit as i32;
                    }
                    unlike += usize::from(2 * code - ((1 << bits) - 1) != *want);
                }
            }
        }
        let coordinates = shape.heads
            * self.built
            * 16
            * d
            * (usize::from(self.bits[0] > 0) + usize::from(self.bits[1] > 0));
        // Coordinates on the edge of two codes, and means that round the other way.
        assert!(unlike * 200 <= coordinates, "{name}: {unlike} of {coordinates} codes differ");
    }
}

pub fn shape(heads: usize, group: usize, head_dim: usize) -> CacheShape {
    CacheShape { heads, group, head_dim, sinks: 16, window: 64, ring: 128 }
}

fn check_prompt<E: DeviceElem>(heads: usize, d: usize, bits: [usize; 2]) {
    let mut world = World::<E>::new(shape(heads, 2, d), 256);
    let name = format!("{} heads {heads} d {d} bits {bits:?}", E::NAME);
    let pages = world.twin.row_of_token.len() / 16;
    let mut buffers = PageBuffers::new(world.rig, pages, d, bits);
    let mut first = 0;
    for run in [1, 15, 200, 77, 500] {
        world.prefill(0, first, run, None);
        world.prefill(1, first, run, Some(&mut buffers));
        first += run;
        world.check_rows(&name);
    }
    buffers.check(&world, &name);
    // Forgotten rows of the ring come back from host memory.
    let ring = world.twin.shape.ring;
    let tables = tables_of(world.twin.shape, &world.batch, &world.sequences, &world.chunks);
    let until = first - 100;
    refill(&world.rig.stream, &tables, (1, until - ring..until), world.kv.view_mut()).unwrap();
    for head in 0..heads {
        (until - ring..until).for_each(|token| world.twin.place(1, head, token));
    }
    world.check_rows(&format!("{name}, refilled"));
    world.rig.device.check_entries().unwrap();
}

#[test]
fn prompts_are_stored_and_summarised_as_their_twin_does() {
    for d in [64, 96, 128, 256] {
        for bits in [[1, 0], [1, 1], [2, 1], [2, 2]] {
            check_prompt::<bf16>(2, d, bits);
        }
        check_prompt::<f16>(3, d, [2, 1]);
    }
}

#[test]
fn steps_store_list_and_fetch_what_their_twin_does() {
    let (hits, misses, brought) = check_steps(60, 64, (48, 120), Brought::Beside);
    assert!(brought > 100, "{brought} rows came ahead");
    assert!(misses * 10 > hits && misses < hits, "{misses} of {hits}: the case must have both");
    // More rows at a time than a block has under way, of two copies each.
    let (_, misses, _) = check_steps(12, 256, (200, 600), Brought::Beside);
    assert!(misses > 500, "{misses}");
    check_steps(12, 256, (200, 600), Brought::Apart);
    check_steps(12, 64, (48, 120), Brought::Apart);
    // More slots than are looked at in one step.
    check_steps(12, 128, (60, 9000), Brought::Beside);
}

/// By which kernel missing rows are brought.
#[derive(Clone, Copy, PartialEq)]
enum Brought {
    Beside,
    Apart,
}

/// Steps that retrieve so many tokens into so many slots; rows found or fetched, fetched, and fetched ahead.
fn check_steps(
    steps: usize,
    d: usize,
    (retrieved, slots): (usize, usize),
    brought_by: Brought,
) -> (u64, u64, u64) {
    let (heads, group) = (2, 3);
    let mut world = World::<bf16>::new(shape(heads, group, d), slots);
    let rig = world.rig;
    let prompt = 700;
    for (first, run) in [(0, 300), (300, 400)] {
        world.prefill(0, first, run, None);
        world.prefill(1, first, run, None);
    }
    let items = 2 * heads;
    let list_each = world.twin.shape.fixed_max() + retrieved;
    let zeros = |n: usize| DeviceBuffer::<u32>::zeros(&rig.device, n).unwrap();
    let mut ranges = [zeros(items), zeros(items), zeros(items), zeros(items)];
    let mut q_out = DeviceBuffer::<bf16>::zeros(&rig.device, items * group * d).unwrap();
    let (mut list, mut list_end) = (zeros(items * list_each), zeros(items));
    let mut from = DeviceBuffer::<u64>::zeros(&rig.device, items * retrieved).unwrap();
    let (mut to, mut num_fetch) = (zeros(items * retrieved), rig.buffer(&[77u32]));
    let mut ahead_rows = zeros(items * retrieved);
    let mut slots = SlotRig::new(&world);
    let (mut hits, mut misses, mut brought) = (0, 0, 0);
    for step in 0..steps {
        // The dense sequence now and then selects, is absent, or is attended exactly.
        let entry = |sequence: u32, tokens: usize| BatchEntry {
            sequence,
            tokens: tokens as u32,
            tick: tokens as u32,
            exact: 0,
        };
        let tokens = prompt + step + 1;
        let mut batch = [entry(1, tokens), entry(0, tokens)];
        batch[1].exact = u32::from(step % 3 == 1);
        world.batch.write(&batch).unwrap();
        let dims = |n: usize| [2, n, d];
        let (q, k, v) =
            (world.elems(2 * heads * group * d), world.elems(2 * heads * d), world.elems(2 * heads * d));
        let device = [rig.buffer(&q), rig.buffer(&k), rig.buffer(&v)];
        let tables = tables_of(world.twin.shape, &world.batch, &world.sequences, &world.chunks);
        let [page_first, page_end, row_first, row_end] = &mut ranges;
        let append = AppendStep {
            q: tensor(&device[0], dims(heads * group)),
            k: tensor(&device[1], dims(heads)),
            v: tensor(&device[2], dims(heads)),
            kv: world.kv.view_mut(),
            q_out: q_out.view_mut(),
            ranges: Ranges {
                page_first: page_first.view_mut(),
                page_end: page_end.view_mut(),
                row_first: row_first.view_mut(),
                row_end: row_end.view_mut(),
            },
            beyond: None,
            num_fetch: Some(num_fetch.view_mut()),
            tree_pages: None,
            doubt: None,
        };
        append_step(&rig.stream, &tables, append).unwrap();
        // Tokens that move slowly, so that some are found again.
        let published = world.twin.published(tokens) * 16;
        let found: Vec<Vec<u32>> = (0..items)
            .map(|item| {
                let place = world.twin.places[batch[item / heads].sequence as usize];
                let base = (place.pages + (item % heads) as u32 * place.pages_each) * 16;
                let mut tokens: Vec<u32> = (0..retrieved * 2)
                    .map(|i| {
                        16 + ((i * 7 + step * 3 + (world.random.bits() % 30) as usize) % (published - 16))
                            as u32
                    })
                    .collect();
                tokens.sort_unstable();
                tokens.dedup();
                tokens.truncate(retrieved - item);
                tokens.iter().map(|token| base + token).collect()
            })
            .collect();
        let flat: Vec<u32> =
            found.iter().flat_map(|f| f.iter().copied().chain(vec![0; retrieved - f.len()])).collect();
        let firsts: Vec<u32> = (0..items).map(|i| (i * retrieved) as u32).collect();
        let ends: Vec<u32> = firsts.iter().zip(&found).map(|(first, f)| first + f.len() as u32).collect();
        let (device_found, first, end) = (rig.buffer(&flat), rig.buffer(&firsts), rig.buffer(&ends));
        let request = Resolve {
            whole: Spans { first: ranges[2].view(), end: ranges[3].view() },
            spans: Spans { first: first.view(), end: end.view() },
            found: device_found.view(),
            unit: FoundUnit::Tokens,
            retrieved,
            list: list.view_mut(),
            list_end: list_end.view_mut(),
        };
        let mut wanted = FetchList { from: from.view_mut(), to: to.view_mut(), num: num_fetch.view_mut() };
        let fetch = (brought_by == Brought::Apart).then_some(&mut wanted);
        resolve(&rig.stream, &tables, request, slots.write(), (world.kv.view_mut(), fetch)).unwrap();
        if brought_by == Brought::Apart {
            fetch_listed(&rig.stream, d, &wanted, world.kv.view_mut()).unwrap();
        }

        for (i, entry) in batch.iter().enumerate() {
            let span = i * heads * d..(i + 1) * heads * d;
            world.twin.ingest(entry.sequence as usize, tokens - 1, &k[span.clone()], &v[span]);
        }
        let want = world.twin.resolve(&batch, &found);
        let name = format!("step {step}");
        assert_eq!(q_out.read(&rig.stream).unwrap(), q, "{name}: queries");
        let (lists, ends) = (list.read(&rig.stream).unwrap(), list_end.read(&rig.stream).unwrap());
        for (item, want) in want.lists.iter().enumerate() {
            assert_eq!(
                &lists[item * list_each..ends[item] as usize],
                &want[..],
                "{name}: list of item {item}"
            );
        }
        world.twin_fetch(&want.fetch);
        misses += want.fetch.len() as u64;
        world.check_rows(&name);
        // What comes next, some of it there, some of it found just now: as many rows as slots are old enough.
        let next: Vec<Vec<u32>> =
            found.iter().map(|f| f.iter().map(|token| token + step as u32 % 7).collect()).collect();
        let flat: Vec<u32> =
            next.iter().flat_map(|f| f.iter().copied().chain(vec![0; retrieved - f.len()])).collect();
        let device_next = rig.buffer(&flat);
        let ahead = Ahead {
            spans: Spans { first: first.view(), end: end.view() },
            found: device_next.view(),
            unit: FoundUnit::Tokens,
            most: retrieved,
            rows: ahead_rows.view_mut(),
        };
        let tables = tables_of(world.twin.shape, &world.batch, &world.sequences, &world.chunks);
        resolve_ahead(&rig.stream, &tables, ahead, slots.write(), world.kv.view_mut()).unwrap();
        let expected = world.twin.resolve_ahead(&batch, &next);
        world.twin_fetch(&expected);
        brought += expected.len() as u64;
        hits += want.lists[..heads].iter().zip(&found).map(|(_, f)| f.len() as u64).sum::<u64>();
        world.check_rows(&format!("{name}, ahead"));
        for (what, got, want) in [
            ("rows of tokens", &slots.row_of_token, &world.twin.row_of_token),
            ("tokens of rows", &slots.token_of_row, &world.twin.token_of_row),
            ("ticks", &slots.used, &world.twin.used),
            ("hands", &slots.hand, &world.twin.hand),
        ] {
            assert_eq!(&got.read(&rig.stream).unwrap(), want, "{name}: {what}");
        }
        let (pages, rows_end) = (ranges[1].read(&rig.stream).unwrap(), ranges[3].read(&rig.stream).unwrap());
        let (page_first, row_first) =
            (ranges[0].read(&rig.stream).unwrap(), ranges[2].read(&rig.stream).unwrap());
        for item in 0..items {
            let exact = batch[item / heads].exact == 1;
            let num = if exact { 0 } else { published as u32 / 16 };
            assert_eq!(pages[item] - page_first[item], num, "{name}: pages of item {item}");
            assert_eq!(rows_end[item] - row_first[item], if exact { tokens as u32 } else { 0 });
        }
    }
    let counted = slots.counters.read(&rig.stream).unwrap();
    assert_eq!(
        (counted[0] + counted[1], counted[1], counted[2]),
        (hits, misses, brought),
        "rows found and fetched"
    );
    rig.device.check_entries().unwrap();
    (hits, misses, brought)
}

#[test]
fn output_is_the_merge_of_the_parts_in_the_asked_type() {
    let rig = rig();
    for (heads, group, d, parts, entries) in
        [(2, 3, 64, 1, 1), (8, 4, 128, 2, 3), (1, 7, 96, 3, 2), (2, 16, 256, 2, 4)]
    {
        let mut world = World::<bf16>::new(shape(heads, group, d), 64);
        let rows = entries * heads * group;
        let batch: Vec<BatchEntry> = (0..entries)
            .map(|i| BatchEntry {
                sequence: 0,
                tokens: u32::from(i != 1 || entries == 1) * 9,
                tick: 1,
                exact: 1,
            })
            .collect();
        world.batch = rig.buffer(&batch);
        let states: Vec<(Vec<f32>, Vec<f32>)> = (0..parts)
            .map(|part| {
                let mut lse = world.random.normals(rows, 4.0);
                let mut out = world.random.normals(rows * d, 1.0);
                if part == 1 {
                    lse[0] = f32::NEG_INFINITY;
                    out[..d].fill(0.0);
                }
                (out, lse)
            })
            .collect();
        let refs: Vec<_> = states.iter().map(|(out, lse)| StateRef { out, lse }).collect();
        let want = merge_parts(&refs).unwrap();
        let held: Vec<_> = states.iter().map(|(out, lse)| (rig.buffer(out), rig.buffer(lse))).collect();
        let views: Vec<_> = held.iter().map(|(out, lse)| (out.view(), lse.view())).collect();
        let tables = tables_of(world.twin.shape, &world.batch, &world.sequences, &world.chunks);
        let out = rig.buffer(&vec![f32::NAN; rows * d]);
        // SAFETY: the buffer has the shape, and is read after the work is done.
        let target = unsafe {
            DeviceTensor::contiguous(out.view().address(), TensorType::F32, [entries, heads * group, d])
        };
        let start = if parts == 1 { FinishStart::Early } else { FinishStart::AfterAll };
        finish(&rig.stream, &tables, &views, &target, start).unwrap();
        let got = out.read(&rig.stream).unwrap();
        for (i, (got, want)) in got.iter().zip(&want.out).enumerate() {
            let entry = i / (heads * group * d);
            if batch[entry].tokens == 0 {
                assert!(got.is_nan(), "entry of nobody is written");
            } else {
                assert!((f64::from(*got) - want).abs() < 1e-5, "{parts} parts: {got} is not {want}");
            }
        }
    }
}
