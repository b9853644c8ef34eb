//! `merge_states`, `append_kv` and `match_scan`.

use floe_cuda::StateRef;
use floe_cuda::device::DeviceBuffer;
use floe_cuda::ops::{DevState, NewRows, Ring, append_kv, match_scan, merge_states};
use floe_cuda::twin::device::{self as twin, NOWHERE, append_rows, merge_parts};
use half::{bf16, f16};

use crate::rig::{Guarded, errors, rig};
use crate::support::Random;

/// Random states; every third head is empty, one lse is huge.
fn states(random: &mut Random, heads: usize, d: usize) -> (Vec<f32>, Vec<f32>) {
    let mut out = random.normals(heads * d, 1.0);
    let mut lse = random.normals(heads, 10.0);
    for head in 0..heads {
        match random.bits() % 4 {
            0 => {
                out[head * d..(head + 1) * d].fill(0.0);
                lse[head] = f32::NEG_INFINITY;
            }
            1 => lse[head] = 1e30,
            _ => {}
        }
    }
    (out, lse)
}

#[test]
fn merge_of_random_states_is_that_of_its_twin() {
    let rig = rig();
    for (heads, d, num) in [(1, 64, 1), (3, 96, 2), (32, 128, 3), (7, 256, 8), (129, 128, 4)] {
        let mut random = Random((heads * d + num) as u64);
        let parts: Vec<_> = (0..num).map(|_| states(&mut random, heads, d)).collect();
        let buffers: Vec<_> = parts.iter().map(|(o, l)| (rig.buffer(o), rig.buffer(l))).collect();
        let views: Vec<_> = buffers.iter().map(|(o, l)| (o.view(), l.view())).collect();
        let (mut out, mut lse) = (Guarded::new(rig, heads * d), Guarded::new(rig, heads));
        merge_states(&rig.stream, &views, DevState { out: out.view(), lse: lse.view() }).unwrap();
        let refs: Vec<_> = parts.iter().map(|(out, lse)| StateRef { out, lse }).collect();
        let want = merge_parts(&refs).unwrap();
        let (out, lse) = (out.read(rig), lse.read(rig));
        let scale = want.lse.iter().map(|x| if x.is_finite() { x.abs() } else { 0.0 }).fold(1.0, f64::max);
        let (far, lse_far) = errors(&out, &lse, &want);
        // Eight products and an exponential of f32; an lse of 10 carries 10 roundings into each weight.
        assert!(far < 1e-5 && lse_far <= scale * 1e-6, "{heads} {d} {num}: {far:e} {lse_far:e}");
        if num == 1 {
            assert_eq!((&out, &lse), (&parts[0].0, &parts[0].1), "one part comes through bit for bit");
        }
    }
}

#[test]
fn merge_into_a_part_is_the_same_merge() {
    let rig = rig();
    let mut random = Random(5);
    let (a, b) = (states(&mut random, 32, 128), states(&mut random, 32, 128));
    let (mut a_out, mut a_lse) = (rig.buffer(&a.0), rig.buffer(&a.1));
    let (b_out, b_lse) = (rig.buffer(&b.0), rig.buffer(&b.1));
    let (mut out, mut lse) = (Guarded::new(rig, a.0.len()), Guarded::new(rig, 32));
    let parts = [(a_out.view(), a_lse.view()), (b_out.view(), b_lse.view())];
    merge_states(&rig.stream, &parts, DevState { out: out.view(), lse: lse.view() }).unwrap();
    let want = (out.read(rig), lse.read(rig));
    // SAFETY: the buffers live to the end of the test, and one kernel alone uses them.
    let again = unsafe {
        use floe_cuda::device::DevRef;
        (DevRef::from_raw(a_out.view().address(), 32 * 128), DevRef::from_raw(a_lse.view().address(), 32))
    };
    let into = DevState { out: a_out.view_mut(), lse: a_lse.view_mut() };
    merge_states(&rig.stream, &[again, (b_out.view(), b_lse.view())], into).unwrap();
    assert_eq!((a_out.read(&rig.stream).unwrap(), a_lse.read(&rig.stream).unwrap()), want);
}

fn append<E: floe_cuda::ops::DeviceElem>(d: usize, rows: usize) {
    let rig = rig();
    let mut random = Random((d * rows) as u64);
    let elems = |random: &mut Random, n| -> Vec<E> { (0..n).map(|_| E::from_f32(random.normal())).collect() };
    let (k, v) = (elems(&mut random, rows * d), elems(&mut random, rows * d));
    let num_rows = 2 * rows + 3;
    let mut kv = elems(&mut random, num_rows * 2 * d);
    let mut device_kv = rig.buffer(&kv);
    let mut to: Vec<u32> = (0..rows as u32).map(|i| (i * 5 + 3) % num_rows as u32).collect();
    if rows > 1 {
        to[rows / 2] = NOWHERE;
    }
    let distinct: std::collections::BTreeSet<_> = to.iter().collect();
    assert_eq!(distinct.len(), rows, "rows must be distinct");
    append_rows(&k, &v, &to, &mut kv).unwrap();
    let (k, v, to) = (rig.buffer(&k), rig.buffer(&v), rig.buffer(&to));
    let new = NewRows { k: k.view(), v: v.view(), to: to.view() };
    append_kv(&rig.stream, &new, d, device_kv.view_mut()).unwrap();
    let got = device_kv.read(&rig.stream).unwrap();
    assert_eq!(bytemuck::cast_slice::<E, u16>(&got), bytemuck::cast_slice::<E, u16>(&kv));
}

#[test]
fn append_kv_writes_the_rows_named_and_no_other() {
    for d in [64, 96, 128, 256] {
        for rows in [1, 8, 100] {
            append::<bf16>(d, rows);
            append::<f16>(d, rows);
        }
    }
}

#[test]
fn nearest_query_is_that_of_the_twin() {
    let rig = rig();
    let (heads, places, dim) = (32, 300, 128);
    let mut random = Random(3);
    let mut ring = random.normals(heads * places * dim, 1.0);
    let q = random.normals(heads * dim, 1.0);
    let num: Vec<u32> = (0..heads as u32).map(|h| [0, 1, 7, 300][h as usize % 4]).collect();
    // Every fourth head has two equal nearest queries.
    for head in (3..heads).step_by(4) {
        for place in [41, 200] {
            ring[(head * places + place) * dim..][..dim].copy_from_slice(&q[head * dim..][..dim]);
        }
    }
    let (ring_d, q_d, num_d) = (rig.buffer(&ring), rig.buffer(&q), rig.buffer(&num));
    let mut distance = Guarded::new(rig, heads);
    let mut place: DeviceBuffer<u32> = rig.buffer(&vec![u32::MAX; heads]);
    let of = Ring { queries: ring_d.view(), num: num_d.view() };
    match_scan(&rig.stream, &of, q_d.view(), distance.view(), place.view_mut()).unwrap();
    let (distance, place) = (distance.read(rig), place.read(&rig.stream).unwrap());
    for head in 0..heads {
        let start = head * places * dim;
        let (want, at) =
            twin::match_scan(&ring[start..start + num[head] as usize * dim], &q[head * dim..][..dim]);
        assert_eq!(place[head], at, "head {head}");
        let far = (f64::from(distance[head]) - want).abs();
        assert!(
            f64::from(distance[head]) == want || far <= want * 1e-5,
            "head {head}: {} is not {want}",
            distance[head]
        );
    }
}
