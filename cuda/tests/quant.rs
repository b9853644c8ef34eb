//! Quantised keys and values: unpacking, attention over them, truncation and sizes.

#![allow(clippy::unwrap_used, reason = "a test helper fails by panicking")]

mod support;

use floe_cuda::cpu::quant::{QuantKind, QuantKv, QuantScratch, attend};
use floe_cuda::{Attend, AttendParams, Isa, KernelError, Rows, SliceRows, StateMut};
use half::bf16;
use proptest::prelude::*;
use support::{Random, check_against_oracle};

const RESIDUAL: usize = 40;
const KINDS: [QuantKind; 3] = [QuantKind::Int8, QuantKind::Int4, QuantKind::Kivi2 { residual: RESIDUAL }];

/// Random keys and values of `n` tokens with a few channels that are ten times larger, as real keys have.
fn random_kv(seed: u64, n: usize, d: usize) -> (Vec<bf16>, Vec<bf16>) {
    let mut random = Random(seed);
    let mut vectors = || -> Vec<bf16> {
        let size = |channel: usize| if channel % 13 == 5 { 10.0 } else { 1.0 };
        (0..n * d).map(|i| bf16::from_f32(random.normal() * size(i % d))).collect()
    };
    (vectors(), vectors())
}

fn quantised(kind: QuantKind, k: &[bf16], v: &[bf16], d: usize) -> QuantKv<bf16> {
    let mut kv = QuantKv::new(kind, d).unwrap();
    kv.append(k, v).unwrap();
    kv
}

fn unpacked(kv: &QuantKv<bf16>, isa: Isa) -> Vec<f32> {
    let mut out = vec![f32::NAN; kv.num_rows() * 2 * kv.head_dim()];
    kv.unpack(isa, 0..kv.num_rows(), &mut QuantScratch::default(), &mut out).unwrap();
    out
}

/// Range of some numbers.
fn spread(xs: impl Iterator<Item = f32>) -> f32 {
    let (min, max) = xs.fold((f32::MAX, f32::MIN), |(min, max), x| (min.min(x), max.max(x)));
    max - min
}

/// Half a step of each number's scale, computed from the definition of the formats, [n, 2, d].
fn half_steps(kind: QuantKind, k: &[bf16], v: &[bf16], d: usize) -> Vec<f32> {
    let n = k.len() / d;
    let at = |xs: &[bf16], t: usize, c: usize| xs[t * d + c].to_f32();
    let coded = match kind {
        QuantKind::Kivi2 { residual } => n.saturating_sub(residual) / 32 * 32,
        _ => n,
    };
    let mut steps = vec![0.0; n * 2 * d];
    for (t, i, c) in (0..coded).flat_map(|t| (0..2).flat_map(move |i| (0..d).map(move |c| (t, i, c)))) {
        let xs = if i == 0 { k } else { v };
        let channels = |size: usize| c / size * size..(c / size * size + size).min(d);
        steps[(t * 2 + i) * d + c] = match kind {
            QuantKind::Int8 => channels(64).map(|c| at(xs, t, c).abs()).fold(0.0, f32::max) / 254.0,
            QuantKind::Int4 => spread(channels(64).map(|c| at(xs, t, c))) / 30.0,
            QuantKind::Kivi2 { .. } if i == 0 => {
                spread((t / 32 * 32..t / 32 * 32 + 32).map(|t| at(xs, t, c))) / 6.0
            }
            QuantKind::Kivi2 { .. } => spread(channels(32).map(|c| at(xs, t, c))) / 6.0,
        };
    }
    steps
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn rows_come_back_within_half_a_step(
        seed: u64, n in 0usize..170, d in prop_oneof![Just(64usize), Just(80), Just(128), 1usize..=200],
    ) {
        let (k, v) = random_kv(seed, n, d);
        for kind in KINDS {
            let kv = quantised(kind, &k, &v, d);
            let steps = half_steps(kind, &k, &v, d);
            let rows = unpacked(&kv, Isa::Scalar);
            for ((t, i), c) in (0..n).flat_map(|t| [(t, 0), (t, 1)]).flat_map(|ti| (0..d).map(move |c| (ti, c))) {
                let x = [&k, &v][i][t * d + c].to_f32();
                let (y, half) = (rows[(t * 2 + i) * d + c], steps[(t * 2 + i) * d + c]);
                // Scale and zero are f16 (2^-11): at most 254 half steps of scale error, and the zero's own size.
                let rounding = if half == 0.0 { 0.0 } else { half * 254.0 / 2048.0 + 40.0 / 2048.0 + 1e-4 };
                let equal_numbers = if kind == QuantKind::Int8 { 0.0 } else { x.abs() / 1024.0 };
                let exact = matches!(kind, QuantKind::Kivi2 { residual } if t >= n.saturating_sub(residual) / 32 * 32);
                let allowed = if exact { 0.0 } else { half + rounding + equal_numbers };
                prop_assert!((x - y).abs() <= allowed, "{kind:?} token {t} part {i} channel {c}: {x} became {y}");
            }
            for isa in Isa::available() {
                prop_assert_eq!(&unpacked(&kv, isa), &rows);
            }
        }
    }

    #[test]
    fn attend_is_exact_attention_over_the_unpacked_rows(
        seed: u64, group in 1usize..=9, d in 1usize..=150, n in 0usize..400, skip in 0usize..400,
    ) {
        let (k, v) = random_kv(seed, n, d);
        let q = Random(seed + 1).normals(group * d, 1.0);
        let range = skip.min(n)..n;
        let params = AttendParams { scale: 0.1, softcap: None };
        for kind in KINDS {
            let kv = quantised(kind, &k, &v, d);
            let rows = unpacked(&kv, Isa::Scalar);
            let rows = SliceRows::new(&rows, d).unwrap();
            for isa in Isa::available() {
                let (mut out, mut lse) = (vec![f32::NAN; group * d], vec![f32::NAN; group]);
                let state = StateMut { out: &mut out, lse: &mut lse };
                let mut scratch = QuantScratch::default();
                attend(&Attend { isa, q: &q, rows: &kv, params }, range.clone(), &mut scratch, state).unwrap();
                let exact = Attend { isa, q: &q, rows: &rows, params };
                check_against_oracle(&exact, &Rows::Range(range.clone()), &out, &lse)
                    .map_err(|e| TestCaseError::fail(format!("{kind:?} {}: {e}", isa.name())))?;
            }
        }
    }

    #[test]
    fn append_in_parts_is_append_at_once(seed: u64, n in 1usize..200, cuts in prop::collection::vec(0usize..200, 0..5)) {
        let d = 24;
        let (k, v) = random_kv(seed, n, d);
        let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(n)).chain([0, n]).collect();
        cuts.sort_unstable();
        for kind in KINDS {
            let whole = quantised(kind, &k, &v, d);
            let mut parts = QuantKv::new(kind, d).unwrap();
            for part in cuts.windows(2) {
                parts.append(&k[part[0] * d..part[1] * d], &v[part[0] * d..part[1] * d]).unwrap();
            }
            prop_assert_eq!(unpacked(&parts, Isa::Scalar), unpacked(&whole, Isa::Scalar));
            prop_assert_eq!(parts.size_bytes(), whole.size_bytes());
        }
    }

    #[test]
    fn truncate_leaves_no_trace_of_what_is_gone(seed: u64, n in 1usize..300, keep in 0usize..300) {
        let d = 40;
        let keep = keep.min(n);
        let (k, v) = random_kv(seed, n, d);
        for kind in KINDS {
            let mut kv = quantised(kind, &k, &v, d);
            let left = kv.truncate(keep).unwrap();
            prop_assert_eq!(kv.num_rows(), left);
            let quantises_late = matches!(kind, QuantKind::Kivi2 { .. });
            prop_assert!(left == keep || left < keep && quantises_late);
            kv.append(&k[left * d..keep * d], &v[left * d..keep * d]).unwrap();
            let fresh = quantised(kind, &k[..keep * d], &v[..keep * d], d);
            prop_assert_eq!(unpacked(&kv, Isa::Scalar), unpacked(&fresh, Isa::Scalar), "{:?}", kind);
        }
    }
}

#[test]
fn truncate_of_speculated_tokens_leaves_no_trace() {
    let d = 64;
    let (k, v) = random_kv(3, 300, d);
    for kind in KINDS {
        let mut kv = quantised(kind, &k[..200 * d], &v[..200 * d], d);
        // Four tokens that will be refused; the exact residual takes them in and gives them back.
        kv.append(&k[290 * d..294 * d], &v[290 * d..294 * d]).unwrap();
        kv.truncate(200).unwrap();
        kv.append(&k[200 * d..], &v[200 * d..]).unwrap();
        let whole = quantised(kind, &k, &v, d);
        assert_eq!(unpacked(&kv, Isa::Scalar), unpacked(&whole, Isa::Scalar), "{kind:?}");
    }
}

#[test]
fn sizes_are_those_of_the_formats() {
    let (n, d) = (32 * 10 + RESIDUAL, 128);
    let (k, v) = random_kv(1, n, d);
    let sizes = KINDS.map(|kind| quantised(kind, &k, &v, d).size_bytes());
    assert_eq!(sizes, [n * 264, n * 144, 320 * 96 + RESIDUAL * 512]);
}

#[test]
fn wrong_arguments_are_errors_that_name_them() {
    assert_eq!(QuantKv::<bf16>::new(QuantKind::Int8, 0).unwrap_err(), KernelError::EmptyHead);
    let mut kv = QuantKv::new(QuantKind::Int4, 8).unwrap();
    let zeros = [bf16::ZERO; 32];
    assert_eq!(
        kv.append(&zeros[..9], &zeros[..9]),
        Err(KernelError::Length { field: "k", len: 9, expected: 8 })
    );
    assert_eq!(
        kv.append(&zeros[..8], &zeros[..16]),
        Err(KernelError::Length { field: "v", len: 16, expected: 8 })
    );
    kv.append(&zeros, &zeros).unwrap();
    assert_eq!(kv.truncate(5), Err(KernelError::Range { start: 0, end: 5, num_rows: 4 }));
    let params = AttendParams { scale: 1.0, softcap: None };
    let (mut out, mut lse) = ([0.0; 9], [0.0]);
    let refused = Attend { isa: Isa::best(), q: &[0.0; 9], rows: &kv, params };
    let state = StateMut { out: &mut out, lse: &mut lse };
    let error = attend(&refused, 0..4, &mut QuantScratch::default(), state);
    assert_eq!(error, Err(KernelError::Queries { len: 9, head_dim: 8 }));
    let state = StateMut { out: &mut out, lse: &mut lse };
    let error = attend(&refused, 2..5, &mut QuantScratch::default(), state);
    assert_eq!(error, Err(KernelError::Range { start: 2, end: 5, num_rows: 4 }));
}
