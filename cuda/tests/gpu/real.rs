//! Whole budgeted steps, and skipped tiles, over a slice of a real trace: against full attention in f64.

use floe_cuda::AttendParams;
use floe_cuda::ops::sweep::{
    Beside, KeyCodes, PageKeys, Rotation, Selection, Sweep, TailArgs, TailUnits, TokenScores, TokenScoresMut,
    UnitsMut, ValueCodes,
};
use floe_cuda::ops::{DecodeArgs, DecodePlan, DevState, Lists, PlanShape, ScanShape, Spans, dense_decode};
use floe_cuda::twin::StateF64;
use floe_cuda::twin::device::HostRotation;
use half::{bf16, f16};

use crate::rig::{Guarded, errors, rig};
use crate::support::Random;
use crate::sweep::{attend_rows, rotation};

const D: usize = 128;
const GROUP: usize = 6;
const BUDGET: usize = 256;
/// Tokens that the queries see: whole pages.
const SEEN: [usize; 4] = [7952, 8032, 8112, 8192];

struct Trace {
    /// [8192, 2, 128]
    kv: Vec<bf16>,
    /// [256, 6, 128], the first at position 7936.
    q: Vec<bf16>,
}

fn trace() -> Trace {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../tests/data/qwen2.5-coder-1.5b_persuasion-8k_L20H0.safetensors"
    );
    // A binary built elsewhere finds the trace by this variable.
    let path = std::env::var("FLOE_TRACE").unwrap_or_else(|_| path.to_owned());
    let bytes = std::fs::read(path).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let read = |name: &str| -> Vec<bf16> {
        let data = tensors.tensor(name).unwrap();
        data.data().chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]])).collect()
    };
    let (k, v) = (read("k"), read("v"));
    let kv = k.chunks(D).zip(v.chunks(D)).flat_map(|(k, v)| [k, v].concat()).collect();
    Trace { kv, q: read("q") }
}

impl Trace {
    fn query(&self, seen: usize) -> &[bf16] {
        let at = (seen - 1 - 7936) * GROUP * D;
        &self.q[at..at + GROUP * D]
    }
}

/// Means, codes and scales of keys or values of consecutive pages.
struct Codes {
    means: Vec<bf16>,
    lines: Vec<u32>,
    scales: Vec<f16>,
}

/// `side` 0: keys, 1: values. One bit: signs and the mean magnitude; two: levels of the best uniform step for Gaussian coordinates.
fn encode(kv: &[bf16], side: usize, bits: usize, rotation: &HostRotation<'_>) -> Codes {
    let pages = kv.len() / (32 * D);
    let mut codes = Codes { means: Vec::new(), lines: vec![0; pages * bits * D / 2], scales: Vec::new() };
    let row = |token: usize| &kv[(2 * token + side) * D..(2 * token + side + 1) * D];
    for page in 0..pages {
        let mean: Vec<bf16> = (0..D)
            .map(|i| (0..16).map(|t| row(16 * page + t)[i].to_f32()).sum::<f32>() / 16.0)
            .map(bf16::from_f32)
            .collect();
        for t in 0..16 {
            let x: Vec<f64> = row(16 * page + t)
                .iter()
                .zip(&mean)
                .map(|(x, m)| f64::from(x.to_f32()) - f64::from(m.to_f32()))
                .collect();
            let x = rotation.rotate(&x);
            let scale = if bits == 1 {
                x.iter().map(|x| x.abs()).sum::<f64>() / D as f64
            } else {
                0.498 * (x.iter().map(|x| x * x).sum::<f64>() / D as f64).sqrt()
            };
            codes.scales.push(f16::from_f64(scale));
            for (i, x) in x.iter().enumerate() {
                let half = 1u32 << (bits - 1);
                let code = (x / (2.0 * scale.max(1e-9))).floor() + f64::from(half);
                let code = code.clamp(0.0, f64::from(2 * half - 1)) as u32;
                for plane in (0..bits).filter(|plane| code >> (bits - 1 - plane) & 1 == 1) {
                    let line = (page * bits + plane) * (D / 32) + i / 32;
                    if side == 0 {
                        codes.lines[line * 16 + t] |= 1 << (i % 32);
                    } else {
                        codes.lines[line * 16 + i % 16] |= 1 << (8 * (t / 4) + t % 4 + 4 * (i % 32 / 16));
                    }
                }
            }
        }
        codes.means.extend(mean);
    }
    codes
}

/// Largest over the queries of the mean error of their heads.
fn step_error(trace: &Trace, (k_bits, v_bits): (usize, usize)) -> f64 {
    let rig = rig();
    let mut random = Random(11);
    let (signs, order) = rotation(&mut random, D);
    let host_rotation = HostRotation { signs: &signs, order: &order };
    let scale = 1.0 / (D as f32).sqrt();
    // Every query has a copy of the pages it sees.
    let items = SEEN.len();
    let all = SEEN[3] / 16;
    let num_pages = items * all;
    let keys = encode(&trace.kv, 0, k_bits, &host_rotation);
    let values = encode(&trace.kv, 1, v_bits.max(1), &host_rotation);
    let copies = |x: &[bf16]| rig.buffer(&x.repeat(items));
    let words = |x: &[u32]| rig.buffer(&x.repeat(items));
    let halves = |x: &[f16]| rig.buffer(&x.repeat(items));
    let (means, value_means, kv) = (copies(&keys.means), copies(&values.means), copies(&trace.kv));
    let (lines, value_lines) = (words(&keys.lines), words(&values.lines));
    let (scales, value_scales) = (halves(&keys.scales), halves(&values.scales));
    let (masks, signs_d) = (rig.buffer(&vec![u16::MAX; num_pages]), rig.buffer(&signs));
    let rotation = Rotation { signs: signs_d.view(), order: None };
    let q: Vec<bf16> = SEEN.iter().flat_map(|&seen| trace.query(seen).to_vec()).collect();
    let q = rig.buffer(&q);
    let first: Vec<u32> = (0..items).map(|i| (i * all) as u32).collect();
    let end: Vec<u32> = SEEN.iter().enumerate().map(|(i, seen)| (i * all + seen / 16) as u32).collect();
    let (first, end) = (rig.buffer(&first), rig.buffer(&end));
    let pages = Spans { first: first.view(), end: end.view() };
    let shape = ScanShape { items, group: GROUP, head_dim: D, pages_max: all, num_pages };
    let mut sweep = Sweep::new(&rig.device, shape).unwrap();
    let mut scores = rig.buffer(&vec![0f32; num_pages * GROUP]);
    let mut residuals = rig.buffer(&vec![f16::ZERO; num_pages * GROUP * 16]);
    let mut lse = rig.buffer(&[0f32; SEEN.len() * GROUP]);
    let codes = KeyCodes {
        bits: k_bits,
        lines: lines.view(),
        scales: scales.view(),
        masks: masks.view(),
        rotation,
        spread: 0.0,
    };
    let to =
        TokenScoresMut { scores: scores.view_mut(), residuals: residuals.view_mut(), lse: lse.view_mut() };
    let page_keys = PageKeys { keys: means.view(), pages };
    sweep.token_scores(&rig.stream, (q.view(), scale), &page_keys, &codes, to).unwrap();
    let list_first: Vec<u32> = (0..items).map(|i| (i * BUDGET) as u32).collect();
    let list_first = rig.buffer(&list_first);
    let (mut list_end, mut list) = (rig.buffer(&[0u32; SEEN.len()]), rig.buffer(&vec![0u32; items * BUDGET]));
    let select = Selection {
        pages,
        lse: lse.view(),
        attended: None,
        ids: None,
        budget: BUDGET as u32,
        budgets: None,
        list_first: list_first.view(),
        list_end: list_end.view_mut(),
        list: list.view_mut(),
    };
    let units = UnitsMut::Tokens { scores: scores.view(), residuals: residuals.view_mut() };
    sweep.select(&rig.stream, select, units).unwrap();
    let value_codes =
        ValueCodes { bits: v_bits, lines: value_lines.view(), scales: value_scales.view(), rotation };
    let tokens = TokenScores { scores: scores.view(), residuals: residuals.view() };
    let tail = TailArgs {
        units: TailUnits::Tokens(tokens, (v_bits > 0).then_some(value_codes)),
        lse: lse.view(),
        values: value_means.view(),
        pages,
    };
    let plan = PlanShape { rows_max: &[BUDGET as u32; SEEN.len()], group: GROUP, head_dim: D };
    let mut plan = DecodePlan::new(&rig.device, plan).unwrap();
    let params = AttendParams { scale, softcap: None };
    let args = DecodeArgs { q: q.view(), kv: kv.view(), params, skip_below: None };
    let spans = Spans { first: list_first.view(), end: list_end.view() };
    let lists = Lists::Rows { spans, rows: list.view() };
    let heads = items * GROUP;
    let (mut tail_out, mut tail_lse) = (Guarded::new(rig, heads * D), Guarded::new(rig, heads));
    let (mut out, mut out_lse) = (Guarded::new(rig, heads * D), Guarded::new(rig, heads));
    sweep
        .tail_and_decode(
            &rig.stream,
            &tail,
            DevState { out: tail_out.view(), lse: tail_lse.view() },
            Beside { plan: &mut plan, args, lists },
            DevState { out: out.view(), lse: out_lse.view() },
        )
        .unwrap();
    let out = out.read(rig);
    let mut worst = 0f64;
    for (item, &seen) in SEEN.iter().enumerate() {
        let rows: Vec<u32> = (0..seen as u32).collect();
        let want = attend_rows(trace.query(seen), &trace.kv, &rows, (D, scale));
        let mean: f64 = (0..GROUP)
            .map(|g| {
                let span = g * D..(g + 1) * D;
                let one = StateF64 { out: want.out[span.clone()].to_vec(), lse: vec![want.lse[g]] };
                let got = &out[(item * GROUP + g) * D..(item * GROUP + g + 1) * D];
                errors(got, &[want.lse[g] as f32], &one).0
            })
            .sum::<f64>()
            / GROUP as f64;
        worst = if mean <= worst { worst } else { mean };
    }
    worst
}

/// A reference implementation over sequential pages of the whole trace errs by .18 with k1 and .06 with k2v1 at this budget and
/// four times the tokens; what is asserted here is that more bits help, by about as much.
#[test]
fn steps_over_a_real_trace_err_as_their_bits_allow() {
    let trace = trace();
    let k1 = step_error(&trace, (1, 0));
    let k2v1 = step_error(&trace, (2, 1));
    let k2v2 = step_error(&trace, (2, 2));
    #[expect(clippy::print_stderr, reason = "the figures are worth reading")]
    {
        eprintln!("error of a step over {} tokens: k1 {k1:.3}, k2v1 {k2v1:.3}, k2v2 {k2v2:.3}", SEEN[3]);
    }
    assert!(k1 < 0.3 && k2v1 < 0.12 && k2v2 < 0.08, "k1 {k1:.3}, k2v1 {k2v1:.3}, k2v2 {k2v2:.3}");
    assert!(k2v2 < k2v1 && k2v1 < k1, "k1 {k1:.3}, k2v1 {k2v1:.3}, k2v2 {k2v2:.3}");
}

/// What skipping sixteen rows at a time costs on real scores: no more than the weight that it leaves out.
#[test]
fn skipping_on_a_real_trace_errs_by_less_than_what_is_skipped() {
    let (rig, trace) = (rig(), trace());
    let scale = 1.0 / (D as f32).sqrt();
    let kv = rig.buffer(&trace.kv);
    let q: Vec<bf16> = SEEN.iter().flat_map(|&seen| trace.query(seen).to_vec()).collect();
    let q = rig.buffer(&q);
    let heads = SEEN.len() * GROUP;
    let rows_max = SEEN.map(|seen| seen as u32);
    let (first, end) = (rig.buffer(&[0u32; SEEN.len()]), rig.buffer(&rows_max));
    let params = AttendParams { scale, softcap: None };
    for lambda in [1e-6f32, 1e-4, 1e-3, 1e-2] {
        let shape = PlanShape { rows_max: &rows_max, group: GROUP, head_dim: D };
        let mut plan = DecodePlan::new(&rig.device, shape).unwrap();
        let (mut out, mut lse) = (Guarded::new(rig, heads * D), Guarded::new(rig, heads));
        let args = DecodeArgs { q: q.view(), kv: kv.view(), params, skip_below: Some(lambda.ln()) };
        let spans = Spans { first: first.view(), end: end.view() };
        dense_decode(&rig.stream, &mut plan, &args, spans, DevState { out: out.view(), lse: lse.view() })
            .unwrap();
        let (out, lse) = (out.read(rig), lse.read(rig));
        let (mut worst, mut lost) = (0f64, 0f64);
        for (item, &seen) in SEEN.iter().enumerate() {
            let rows: Vec<u32> = (0..seen as u32).collect();
            let want = attend_rows(trace.query(seen), &trace.kv, &rows, (D, scale));
            let span = item * GROUP * D..(item + 1) * GROUP * D;
            let heads = item * GROUP..(item + 1) * GROUP;
            worst = worst.max(errors(&out[span], &lse[heads.clone()], &want).0);
            for (got, want) in lse[heads].iter().zip(&want.lse) {
                lost = lost.max(1.0 - (f64::from(*got) - want).exp());
            }
        }
        #[expect(clippy::print_stderr, reason = "the figures are worth reading")]
        {
            eprintln!("lambda {lambda:e}: error {worst:.5}, weight left out {lost:.5}");
        }
        // Every row left out weighs less than lambda of the largest one, which weighs less than all.
        let most = f64::from(lambda) * SEEN[3] as f64;
        assert!(lost <= most + 2e-3, "lambda {lambda:e}: {lost} left out");
        // A value left out differs from the mean by a few times its length at most.
        assert!(worst < 0.006 + 6.0 * lost.max(0.0), "lambda {lambda:e}: error {worst}, weight {lost}");
    }
}
