//! `fetch_pages` and `fetch_rows`: bytes must arrive exactly.

use floe_cuda::device::{DeviceError, PinnedBuffer};
use floe_cuda::ops::{Fetch, fetch_pages, fetch_rows};
use floe_cuda::twin::device::{self as twin, fetch_units};
use half::bf16;

use crate::rig::rig;
use crate::support::Random;

/// Distinct random numbers below `n`.
fn distinct(random: &mut Random, n: u32, len: usize) -> Vec<u32> {
    let mut all: Vec<u32> = (0..n).collect();
    for i in 0..len {
        let j = i + random.bits() as usize % (all.len() - i);
        all.swap(i, j);
    }
    all.truncate(len);
    all
}

/// `rows` 16 for pages, 1 for rows.
fn check(d: usize, rows: usize, units: usize) {
    let rig = rig();
    let mut random = Random((d + rows + units) as u64);
    let unit_len = rows * 2 * d;
    let (host_units, slots) = (3 * units as u32 + 5, units as u32 + 9);
    let mut host = PinnedBuffer::<bf16>::zeros(&rig.device, host_units as usize * unit_len).unwrap();
    host.as_mut_slice().iter_mut().for_each(|x| *x = bf16::from_bits(random.bits() as u16));
    let mut from = distinct(&mut random, host_units, units);
    if units > 1 {
        from[units / 3] = twin::NOWHERE;
    }
    let slot = distinct(&mut random, slots, units);
    let mut kv = vec![bf16::from_bits(0x7fc1); slots as usize * unit_len];
    let mut device_kv = rig.buffer(&kv);
    let counted = units / 2;
    for num in [None, Some(counted)] {
        let count = num.unwrap_or(units);
        kv.fill(bf16::from_bits(0x7fc1));
        device_kv.write(&kv).unwrap();
        fetch_units(host.as_slice(), unit_len, &from[..count], &slot[..count], &mut kv).unwrap();
        let (from, slot) = (rig.buffer(&from), rig.buffer(&slot));
        let word = num.map(|n| rig.buffer(&[n as u32]));
        let num = word.as_ref().map(|w| w.view());
        let fetch = Fetch { host: host.view(), from: from.view(), slot: slot.view(), num };
        let run = if rows == 1 { fetch_rows } else { fetch_pages };
        run(&rig.stream, &fetch, d, device_kv.view_mut()).unwrap();
        let got = device_kv.read(&rig.stream).unwrap();
        assert!(
            bytemuck::cast_slice::<_, u16>(&got) == bytemuck::cast_slice::<_, u16>(&kv),
            "d {d}, {rows} rows a unit, {count} of {units} units"
        );
    }
}

#[test]
fn fetch_of_random_units_moves_exactly_their_bytes() {
    for d in [64, 96, 128, 256] {
        for (rows, units) in [(16, 1), (16, 700), (1, 1), (1, 5000)] {
            check(d, rows, units);
        }
    }
}

#[test]
fn lists_of_different_length_are_refused() {
    let rig = rig();
    let host = PinnedBuffer::<bf16>::zeros(&rig.device, 4096 * 2).unwrap();
    let mut kv = rig.buffer(&vec![bf16::ZERO; 4096 * 2]);
    let (from, slot) = (rig.buffer(&[0u32, 1]), rig.buffer(&[0u32]));
    let fetch = Fetch { host: host.view(), from: from.view(), slot: slot.view(), num: None };
    let error = fetch_pages(&rig.stream, &fetch, 128, kv.view_mut());
    assert!(matches!(error, Err(DeviceError::Kernel(_))), "{error:?}");
}
