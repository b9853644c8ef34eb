//! What trees ask of the kernels: pages whose tokens are listed, scores with spreads, whole pages under a budget of tokens.

use floe_cuda::device::DeviceBuffer;
use floe_cuda::ops::cache::{
    Counted, PageSource, Said, SequencePlace, TreePage, TreePages, announce_tree_pages, build_pages,
    build_tree_pages,
};
use floe_cuda::ops::sweep::{Selection, Sweep, UnitsMut};
use floe_cuda::ops::{DeviceElem, ScanShape, Spans, Summaries};
use floe_cuda::twin::device as twin;
use half::{bf16, f16};

use crate::cache::{PageBuffers, World, shape, tables_of};
use crate::rig::{Guarded, rig};
use crate::support::Random;

/// Everything that a page has, as bits.
fn bits_of<E: DeviceElem>(buffers: &PageBuffers<E>, rig: &crate::rig::Rig) -> Vec<Vec<u32>> {
    let stream = &rig.stream;
    let elems = |x: &DeviceBuffer<E>| x.read(stream).unwrap().iter().map(|x| x.to_f32().to_bits()).collect();
    let halves =
        |x: &DeviceBuffer<f16>| x.read(stream).unwrap().iter().map(|x| u32::from(x.to_bits())).collect();
    vec![
        elems(&buffers.mean_keys),
        elems(&buffers.mean_values),
        buffers.log_count.read(stream).unwrap().iter().map(|x| x.to_bits()).collect(),
        buffers.key_lines.read(stream).unwrap(),
        halves(&buffers.key_scales),
        buffers.value_lines.read(stream).unwrap(),
        halves(&buffers.value_scales),
        buffers.masks.read(stream).unwrap().iter().map(|x| u32::from(*x)).collect(),
    ]
}

/// What the device knows of a sequence's trees beside their pages.
struct Known {
    tokens: DeviceBuffer<u32>,
    /// Pages of each kv head, and the sums of their spreads.
    tree_pages: DeviceBuffer<u32>,
    sums: DeviceBuffer<[u32; 2]>,
}

/// Builds listed pages of a sequence at `place`, which changes nothing that counts, and announces them.
fn build_and_announce<E: DeviceElem>(
    world: &World<E>,
    (sequence, place): (usize, SequencePlace),
    list: &[TreePage],
    (pages, known): (&mut PageBuffers<E>, &mut Known),
) {
    let rig = world.rig;
    let listed = rig.buffer(list);
    let mut counts = rig.buffer(&vec![f32::NAN; list.len()]);
    let mut masks = rig.buffer(&vec![7u16; list.len()]);
    let mut spread = rig.buffer(&vec![f32::NAN; list.len()]);
    let mut said = Said { log_count: counts.view_mut(), masks: masks.view_mut(), spread: spread.view_mut() };
    let counted = |pages: &PageBuffers<E>| {
        let (counts, masks) =
            (pages.log_count.read(&rig.stream).unwrap(), pages.masks.read(&rig.stream).unwrap());
        (counts, masks, pages.spread.read(&rig.stream).unwrap())
    };
    let before = counted(pages);
    let from = TreePages { sequence, place, listed: listed.view(), tokens: known.tokens.view_mut() };
    let tables = tables_of(world.twin.shape, &world.batch, &world.sequences, &world.chunks);
    build_tree_pages(&rig.stream, &tables, from, world.kv.view(), (pages.pages(), &mut said)).unwrap();
    assert_eq!(counted(pages), before);
    let to = Counted {
        log_count: pages.log_count.view_mut(),
        masks: pages.masks.view_mut(),
        spread: pages.spread.view_mut(),
        tree_pages: known.tree_pages.view_mut(),
        sums: Some(known.sums.view_mut()),
    };
    announce_tree_pages(&rig.stream, (place, listed.view()), &said, to).unwrap();
}

fn check_built<E: DeviceElem>(sequence: usize, d: usize) {
    let name = format!("{} d {d} sequence {sequence}", E::NAME);
    let mut world = World::<E>::new(shape(2, 2, d), 256);
    // Runs long enough that most of sequence 1 has left the ring.
    world.prefill(sequence, 0, 700, None);
    let rig = world.rig;
    let num_pages = world.twin.row_of_token.len() / 16;
    let place = world.twin.places[sequence];
    let first = |head: usize| place.pages as usize + head * place.pages_each as usize;
    let mut of_runs = PageBuffers::<E>::new(rig, num_pages, d, [2, 1]);
    let mut of_lists = PageBuffers::<E>::new(rig, num_pages, d, [2, 1]);
    let mut known = Known {
        tokens: rig.buffer(&vec![7u32; num_pages * 16]),
        tree_pages: rig.buffer(&[0u32; 2]),
        sums: rig.buffer(&[[u32::MAX, 0]; 2]),
    };
    // The same pages, from lists: the same bits.
    let whole = |head: usize, page: usize| {
        let ids = std::array::from_fn(|i| (page * 16 + i) as u32);
        TreePage { page: page as u32, head: head as u32, live: 0xffff, used: 41, ids }
    };
    let all: Vec<TreePage> = (0..2).flat_map(|head| (1..40).map(move |page| whole(head, page))).collect();
    build_and_announce(&world, (sequence, place), &all, (&mut of_lists, &mut known));
    // Host memory has the same rows.
    let mut of_host = PageBuffers::<E>::new(rig, num_pages, d, [2, 1]);
    let on_host = SequencePlace { slots: 0, ..place };
    build_and_announce(&world, (sequence, on_host), &all, (&mut of_host, &mut known));
    assert_eq!(bits_of(&of_host, rig), bits_of(&of_lists, rig), "{name}");
    if sequence == 0 {
        let source = PageSource::Rows { sequence, first: 1, num: 39 };
        let tables = tables_of(world.twin.shape, &world.batch, &world.sequences, &world.chunks);
        build_pages(&rig.stream, &tables, source, world.kv.view(), of_runs.pages()).unwrap();
        assert_eq!(bits_of(&of_runs, rig), bits_of(&of_lists, rig), "{name}");
    }
    let said = known.tokens.read(&rig.stream).unwrap();
    for page in &all {
        let at = first(page.head as usize) + page.page as usize;
        for (i, id) in page.ids.iter().enumerate() {
            assert_eq!(said[at * 16 + i], first(page.head as usize) as u32 * 16 + id, "{name}");
        }
    }

    // Pages of any tokens, some places empty, with spreads.
    let mut random = Random(d as u64);
    let some: Vec<TreePage> = (0..24)
        .map(|i| {
            let live =
                [1, 0xffff, 0, 0x8001][i % 4] | if i % 4 == 3 { random.bits() as u32 & 0xffff } else { 0 };
            let ids = std::array::from_fn(|_| (16 + random.bits() % 684) as u32);
            TreePage { page: (i * 3 % 41) as u32, head: (i % 2) as u32, live, used: 41, ids }
        })
        .collect();
    build_and_announce(&world, (sequence, place), &some, (&mut of_lists, &mut known));
    let stream = &rig.stream;
    let (keys, counts, masks) = (
        of_lists.mean_keys.read(stream).unwrap(),
        of_lists.log_count.read(stream).unwrap(),
        of_lists.masks.read(stream).unwrap(),
    );
    let (scales, spreads) =
        (of_lists.key_scales.read(stream).unwrap(), of_lists.spread.read(stream).unwrap());
    let said = known.tokens.read(stream).unwrap();
    assert_eq!(known.tree_pages.read(stream).unwrap(), [41; 2], "{name}");
    for (head, [num, sum]) in known.sums.read(stream).unwrap().into_iter().enumerate() {
        let want = spreads[first(head)..first(head) + 41].iter().map(|x| f64::from(*x)).sum::<f64>();
        let sum = f64::from(f32::from_bits(sum));
        assert!(num == 41 && (sum - want).abs() <= want * 1e-5, "{name}: sum {sum} of {num}, not {want}");
    }
    for page in &some {
        let (head, at) = (page.head as usize, first(page.head as usize) + page.page as usize);
        let live: Vec<usize> = (0..16).filter(|i| page.live >> i & 1 == 1).collect();
        assert_eq!(u32::from(masks[at]), page.live, "{name}");
        // The empty page's is -inf on both sides.
        let count = (live.len() as f32).ln();
        assert!(
            counts[at] == count || (counts[at] - count).abs() < 1e-6,
            "{name}: {} is not {count}",
            counts[at]
        );
        if live.is_empty() {
            // What else it had nobody reads.
            assert_eq!(spreads[at], 0.0, "{name}");
            continue;
        }
        for i in 0..16 {
            let want = if live.contains(&i) { first(head) as u32 * 16 + page.ids[i] } else { u32::MAX };
            assert_eq!(said[at * 16 + i], want, "{name}");
            // A token alone is its page's mean; an empty place has no scale.
            let none = !live.contains(&i) || live.len() == 1;
            assert_eq!(scales[at * 16 + i] == f16::ZERO, none, "{name}: scale of place {i} of {live:?}");
        }
        let row = |i: usize| &world.twin.warm[&(sequence, head, page.ids[i] as usize)][..d];
        let mean = &keys[at * d..(at + 1) * d];
        let mut square = 0.0;
        for (x, mean) in mean.iter().enumerate() {
            let values: Vec<f64> = live.iter().map(|&i| f64::from(row(i)[x].to_f32())).collect();
            let want = values.iter().sum::<f64>() / live.len().max(1) as f64;
            assert!((f64::from(mean.to_f32()) - want).abs() <= want.abs() / 100.0 + 1e-3, "{name}: mean");
            square += values.iter().map(|v| (v - f64::from(mean.to_f32())).powi(2)).sum::<f64>();
        }
        let want = square / (16 * d) as f64;
        assert!(
            (f64::from(spreads[at]) - want).abs() <= want * 1e-4 + 1e-9,
            "{name}: spread {} {want}",
            spreads[at]
        );
    }
    world.rig.device.check_entries().unwrap();
}

#[test]
fn pages_are_built_from_lists_of_tokens() {
    for d in [64, 128, 256] {
        check_built::<bf16>(0, d);
        check_built::<bf16>(1, d);
    }
    check_built::<f16>(1, 128);
}

/// As the kernel's.
fn key_of(best: f32) -> i64 {
    if best == f32::NEG_INFINITY { 0 } else { ((best + 31.5) * 128.0).clamp(1.0, 4095.0) as i64 }
}

fn check_selected(lens: &[usize], group: usize, budget: u32) {
    let (rig, d) = (rig(), 128);
    let items = lens.len();
    let name = format!("group {group} budget {budget} of {lens:?}");
    let mut random = Random(u64::from(budget) + group as u64);
    let (mut first, mut num_pages) = (Vec::new(), 16);
    for len in lens {
        first.push(num_pages as u32);
        num_pages = (num_pages + len).next_multiple_of(16);
    }
    let end: Vec<u32> = first.iter().zip(lens).map(|(f, len)| f + *len as u32).collect();
    let elems = |random: &mut Random, n: usize, size: f32| -> Vec<bf16> {
        (0..n).map(|_| bf16::from_f32(random.normal() * size)).collect()
    };
    let (keys, q) = (elems(&mut random, num_pages * d, 1.0), elems(&mut random, items * group * d, 2.0));
    // Full pages, pages of one token, pages of some, empty ones.
    let masks: Vec<u16> = (0..num_pages)
        .map(|i| match i % 7 {
            0 => 1 << (i % 16),
            1 => random.bits() as u16,
            2 if i % 3 == 0 => 0,
            _ => u16::MAX,
        })
        .collect();
    let log_count: Vec<f32> = masks.iter().map(|m| (m.count_ones() as f32).ln()).collect();
    let spreads: Vec<f32> = (0..num_pages).map(|_| random.normal().abs()).collect();
    let ids: Vec<u32> = (0..num_pages as u32 * 16).map(|i| i ^ 0x5000_0000).collect();
    let (scale, by_spread) = (1.0 / (d as f32).sqrt(), 0.33);
    let shape = ScanShape { items, group, head_dim: d, pages_max: *lens.iter().max().unwrap(), num_pages };
    let mut sweep = Sweep::new(&rig.device, shape).unwrap();
    let (first_d, end_d) = (rig.buffer(&first), rig.buffer(&end));
    let pages = Spans { first: first_d.view(), end: end_d.view() };
    let (keys_d, q_d, log_d, masks_d) =
        (rig.buffer(&keys), rig.buffer(&q), rig.buffer(&log_count), rig.buffer(&masks));
    let (spreads_d, ids_d) = (rig.buffer(&spreads), rig.buffer(&ids));
    let mut scores = rig.buffer(&vec![f32::NAN; num_pages * group]);
    let mut lse = Guarded::new(rig, items * group);
    let summaries = Summaries {
        keys: keys_d.view(),
        log_count: log_d.view(),
        pages,
        spreads: Some((spreads_d.view(), by_spread)),
    };
    let query = (q_d.view(), scale);
    sweep.page_scores(&rig.stream, query, &summaries, scores.view_mut(), lse.view()).unwrap();
    let (got, got_lse) = (scores.read(&rig.stream).unwrap(), lse.read(rig));
    let list_first: Vec<u32> = (0..items as u32).map(|i| i * budget).collect();
    let list_first_d = rig.buffer(&list_first);
    let mut list_end: DeviceBuffer<u32> = rig.buffer(&vec![u32::MAX; items]);
    let mut list: DeviceBuffer<u32> = rig.buffer(&vec![u32::MAX; items * budget as usize + 7]);
    let select = Selection {
        pages,
        lse: lse.reader(),
        attended: None,
        ids: Some(ids_d.view()),
        budget,
        budgets: None,
        list_first: list_first_d.view(),
        list_end: list_end.view_mut(),
        list: list.view_mut(),
    };
    let units = UnitsMut::PagesOfTokens { scores: scores.view_mut(), masks: masks_d.view() };
    sweep.select(&rig.stream, select, units).unwrap();
    let left = scores.read(&rig.stream).unwrap();
    let (list, list_end) = (list.read(&rig.stream).unwrap(), list_end.read(&rig.stream).unwrap());
    assert!(list[items * budget as usize..].iter().all(|x| *x == u32::MAX), "{name}: wrote beyond the lists");
    for item in 0..items {
        let (a, b) = (first[item] as usize, end[item] as usize);
        let score = |of: &[f32], page: usize, head: usize| of[(page / 16 * group + head) * 16 + page % 16];
        let q_item = &q[item * group * d..(item + 1) * group * d];
        let (plain, _) = twin::page_scores(q_item, &keys[a * d..b * d], &log_count[a..b], scale);
        let mut keys_of = Vec::new();
        for page in a..b {
            let mut best = f32::NEG_INFINITY;
            for head in 0..group {
                let square: f64 =
                    q_item[head * d..(head + 1) * d].iter().map(|x| f64::from(x.to_f32()).powi(2)).sum();
                let lift =
                    f64::from(by_spread) * square * f64::from(scale).powi(2) * f64::from(spreads[page]);
                let (want, have) =
                    (plain[head * (b - a) + page - a] + lift, f64::from(score(&got, page, head)));
                assert!(
                    want == have || (want - have).abs() < 2e-4 * (1.0 + lift),
                    "{name}: score {have} is not {want}"
                );
                best = best.max(score(&got, page, head) - got_lse[item * group + head]);
            }
            let count = masks[page].count_ones();
            keys_of.push(if count == 0 { 0 } else { key_of(best - (count as f32).ln()) });
        }
        let chosen = &list[list_first[item] as usize..list_end[item] as usize];
        let pages_of: std::collections::BTreeSet<usize> =
            chosen.iter().map(|id| (id ^ 0x5000_0000) as usize / 16).collect();
        let mut tokens: Vec<u32> = chosen.to_vec();
        tokens.sort_unstable();
        let places = |page: usize| (0..16).filter(|i| masks[page] >> i & 1 == 1).collect::<Vec<_>>();
        let mut want: Vec<u32> = pages_of
            .iter()
            .flat_map(|&page| places(page).into_iter().map(move |i| (page * 16 + i) as u32 ^ 0x5000_0000))
            .collect();
        want.sort_unstable();
        assert_eq!(tokens, want, "{name}: whole pages");
        assert!(tokens.len() <= budget as usize, "{name}");
        let all: u32 = masks[a..b].iter().map(|m| m.count_ones()).sum();
        assert!(tokens.len() + 15 >= (budget.min(all)) as usize, "{name}: {} tokens", tokens.len());
        let worst = pages_of.iter().map(|&page| keys_of[page - a]).min().unwrap_or(i64::MAX);
        for page in a..b {
            let taken = pages_of.contains(&page);
            assert_eq!(
                taken,
                score(&left, page, 0) == f32::NEG_INFINITY && masks[page] != 0,
                "{name}: page {page}"
            );
            // A key on the edge of two steps may fall on either side.
            assert!(
                taken || keys_of[page - a] <= worst + 1,
                "{name}: page {page} is better than what was taken"
            );
        }
    }
}

#[test]
fn whole_pages_are_selected_under_a_budget_of_tokens() {
    for (lens, group, budget) in [
        (&[300, 17, 1000][..], 4, 160),
        (&[5000][..], 4, 176),
        (&[9000, 40, 33][..], 6, 944),
        (&[200, 0, 16][..], 12, 48),
        (&[3][..], 1, 4000),
    ] {
        check_selected(lens, group, budget);
    }
}
