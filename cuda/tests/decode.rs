//! Attention kernels against the f64 oracle, on every instruction set of the machine.

#![allow(clippy::unwrap_used, reason = "a test helper fails by panicking")]

mod support;

use floe_cuda::{
    Attend, AttendParams, AttendScratch, Isa, KernelError, KvElem, KvRows, Rows, SliceRows, SplitScratch,
    StateMut, dense_decode, score_rows, sparse_decode,
};
use half::{bf16, f16};
use proptest::prelude::*;
use support::{Random, SlabRows, check_against_oracle};

/// One random problem.
#[derive(Debug, Clone)]
struct Case {
    seed: u64,
    group: usize,
    head_dim: usize,
    num_rows: usize,
    slab_rows: usize,
    /// Percent of the rows that are listed; `None` = a range.
    list_percent: Option<u64>,
    params: AttendParams,
    /// Magnitude of queries, keys and values.
    sizes: [f32; 3],
}

fn case() -> impl Strategy<Value = Case> {
    let head_dim = prop_oneof![
        4 => prop::sample::select(vec![64usize, 80, 96, 128, 256]),
        1 => Just(576usize),
        3 => 1usize..=200
    ];
    let num_rows = prop_oneof![1 => 0usize..=3, 4 => 1usize..=200, 1 => 200usize..=400];
    let scale = prop_oneof![4 => Just(0.1f32), 1 => -1f32..1.0, 1 => Just(30.0f32), 1 => Just(0.0f32), 1 => Just(1e-30f32)];
    let softcap = prop_oneof![3 => Just(None), 1 => (0.5f32..60.0).prop_map(Some)];
    let sizes = prop_oneof![
        6 => Just([1f32, 1.0, 1.0]),
        1 => Just([5.0, 8.0, 1000.0]),
        // Scores far beyond what f32 can order, scores that overflow f32 when scaled, and f32 denormals everywhere.
        1 => Just([1e10, 1e8, 1.0]),
        1 => Just([1e15, 1e20, 1e4]),
        1 => Just([1e-40, 1e-40, 1e-40]),
        1 => Just([1e4, 6e-8, 6e-8]),
    ];
    let list = prop_oneof![Just(None), (1u64..=100).prop_map(Some)];
    (any::<u64>(), 1usize..=17, head_dim, num_rows, 1usize..=70, list, (scale, softcap), sizes).prop_map(
        |(seed, group, head_dim, num_rows, slab_rows, list_percent, (scale, softcap), sizes)| Case {
            seed,
            group,
            head_dim,
            num_rows,
            slab_rows,
            list_percent,
            params: AttendParams { scale, softcap },
            sizes,
        },
    )
}

fn problem<E: KvElem>(case: &Case) -> (Vec<f32>, SlabRows<E>) {
    let mut random = Random(case.seed);
    let n = case.num_rows * case.head_dim;
    // f16 has no room for the large sizes: they would become infinite.
    let limit = if E::NAME == "f16" { 1e3 } else { f32::MAX };
    let mut q = random.normals(case.group * case.head_dim, case.sizes[0]);
    // Half of the problems have queries as a bf16 model makes them, which take another path.
    if case.seed.is_multiple_of(2) {
        q.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32());
    }
    let k = random.normals(n, case.sizes[1].min(limit));
    let v = random.normals(n, case.sizes[2].min(limit));
    (q, SlabRows::new(&k, &v, case.head_dim, case.slab_rows).unwrap())
}

fn check_sparse<E: KvElem>(case: &Case) -> Result<(), TestCaseError> {
    let (q, rows) = problem::<E>(case);
    let mut random = Random(!case.seed);
    let list: Vec<u32> =
        (0..case.num_rows as u32).filter(|_| random.bits() % 100 < case.list_percent.unwrap_or(0)).collect();
    let start = random.bits() as usize % (case.num_rows + 1);
    let which =
        if case.list_percent.is_some() { Rows::List(&list) } else { Rows::Range(start..case.num_rows) };
    for isa in Isa::available() {
        let attend = Attend { isa, q: &q, rows: &rows, params: case.params };
        let (mut out, mut lse) = (vec![f32::NAN; q.len()], vec![f32::NAN; case.group]);
        let state = StateMut { out: &mut out, lse: &mut lse };
        sparse_decode(&attend, which.clone(), &mut AttendScratch::default(), state).unwrap();
        check_against_oracle(&attend, &which, &out, &lse)
            .map_err(|e| TestCaseError::fail(format!("{} {}: {e}", isa.name(), E::NAME)))?;
    }
    Ok(())
}

fn check_scores<E: KvElem>(case: &Case) -> Result<(), TestCaseError> {
    let (q, rows) = problem::<E>(case);
    let range = case.num_rows / 3..case.num_rows;
    let exact: Vec<Vec<f32>> = [Isa::Scalar]
        .into_iter()
        .chain(Isa::available())
        .map(|isa| {
            let attend = Attend { isa, q: &q, rows: &rows, params: case.params };
            let mut out = vec![f32::NAN; case.group * range.len()];
            score_rows(&attend, range.clone(), &mut AttendScratch::default(), &mut out).unwrap();
            out
        })
        .collect();
    for (h, i) in (0..case.group).flat_map(|h| (0..range.len()).map(move |i| (h, i))) {
        let d = case.head_dim;
        let row = rows.run(range.start + i);
        let terms = q[h * d..(h + 1) * d].iter().zip(&row[..d]);
        let reach: f64 = terms.map(|(q, k)| (f64::from(*q) * f64::from(k.to_f32())).abs()).sum();
        let reach = reach * f64::from(case.params.scale.abs());
        if reach > f64::from(f32::MAX) {
            continue;
        }
        // Rounding of a sum of d products, each partial sum at most `reach`; products below 1e-38 lose bits or vanish.
        let tiny = d as f64 * 1e-44 * f64::from(case.params.scale.abs().max(1.0));
        let allowed = f64::from(f32::EPSILON) * reach * (8.0 + (d as f64).sqrt()) + tiny;
        let at = h * range.len() + i;
        for scores in &exact[1..] {
            let far = f64::from((scores[at] - exact[0][at]).abs());
            prop_assert!(
                far <= allowed,
                "head {h} row {i}: {} is not {} ({allowed:e})",
                scores[at],
                exact[0][at]
            );
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn sparse_decode_of_bf16_agrees_with_oracle(case in case()) {
        check_sparse::<bf16>(&case)?;
    }

    #[test]
    fn sparse_decode_of_f16_agrees_with_oracle(case in case()) {
        check_sparse::<f16>(&case)?;
    }

    #[test]
    fn sparse_decode_of_f32_agrees_with_oracle(case in case()) {
        check_sparse::<f32>(&case)?;
    }

    #[test]
    fn score_rows_agrees_with_twin(case in case()) {
        check_scores::<bf16>(&case)?;
        check_scores::<f16>(&case)?;
        check_scores::<f32>(&case)?;
    }
}

/// Runs `f` on a pool of `threads`.
fn on_threads<T: Send>(threads: usize, f: impl FnOnce() -> T + Send) -> T {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(f)
}

#[test]
fn dense_decode_agrees_with_oracle_and_does_not_depend_on_threads() {
    let (group, head_dim, num_rows) = (4, 64, 5000);
    let mut random = Random(11);
    let q = random.normals(group * head_dim, 2.0);
    let (k, v) = (random.normals(num_rows * head_dim, 1.0), random.normals(num_rows * head_dim, 1.0));
    let rows = SlabRows::<bf16>::new(&k, &v, head_dim, 333).unwrap();
    for isa in Isa::available() {
        let attend = Attend { isa, q: &q, rows: &rows, params: AttendParams { scale: 0.125, softcap: None } };
        let results: Vec<_> = [1, 2, 3]
            .into_iter()
            .map(|threads| {
                let (mut out, mut lse) = (vec![0.0; q.len()], vec![0.0; group]);
                let state = StateMut { out: &mut out, lse: &mut lse };
                on_threads(threads, || {
                    dense_decode(&attend, 7..num_rows, &mut SplitScratch::default(), state)
                })
                .unwrap();
                (out, lse)
            })
            .collect();
        check_against_oracle(&attend, &Rows::Range(7..num_rows), &results[0].0, &results[0].1).unwrap();
        assert_eq!(results[0], results[1], "{}", isa.name());
        assert_eq!(results[0], results[2], "{}", isa.name());
    }
}

#[test]
fn scratch_of_another_shape_does_not_change_the_result() {
    let mut random = Random(5);
    let mut scratch = AttendScratch::default();
    for (group, head_dim, num_rows) in [(8, 128, 100), (1, 64, 3), (17, 80, 65), (8, 128, 100)] {
        let q = random.normals(group * head_dim, 1.0);
        let data: Vec<f32> = random.normals(num_rows * 2 * head_dim, 1.0);
        let rows = SliceRows::new(&data, head_dim).unwrap();
        for isa in Isa::available() {
            let attend =
                Attend { isa, q: &q, rows: &rows, params: AttendParams { scale: 0.2, softcap: None } };
            let run = |scratch: &mut AttendScratch| {
                let (mut out, mut lse) = (vec![0.0; q.len()], vec![0.0; group]);
                let state = StateMut { out: &mut out, lse: &mut lse };
                sparse_decode(&attend, Rows::Range(0..num_rows), scratch, state).unwrap();
                (out, lse)
            };
            assert_eq!(run(&mut scratch), run(&mut AttendScratch::default()));
        }
    }
}

#[test]
fn keys_of_minus_infinity_have_no_weight_and_all_of_them_are_the_empty_state() {
    let head_dim = 32;
    let q = vec![1.0; head_dim];
    let mut data = vec![1.0f32; 40 * 2 * head_dim];
    for row in data.chunks_exact_mut(2 * head_dim).take(39) {
        row[..head_dim].fill(f32::NEG_INFINITY);
    }
    let rows = SliceRows::new(&data, head_dim).unwrap();
    for isa in Isa::available() {
        let attend = Attend { isa, q: &q, rows: &rows, params: AttendParams { scale: 1.0, softcap: None } };
        let run = |end| {
            let (mut out, mut lse) = (vec![9.0; head_dim], vec![9.0]);
            let state = StateMut { out: &mut out, lse: &mut lse };
            sparse_decode(&attend, Rows::Range(0..end), &mut AttendScratch::default(), state).unwrap();
            (out, lse)
        };
        assert_eq!(run(39), (vec![0.0; head_dim], vec![f32::NEG_INFINITY]), "{}", isa.name());
        assert_eq!(run(40), (vec![1.0; head_dim], vec![32.0]), "{}", isa.name());
    }
}

#[test]
fn wrong_arguments_are_errors_that_name_them() {
    let data = [0f32; 4 * 2 * 8];
    let rows = SliceRows::new(&data, 8).unwrap();
    let params = AttendParams { scale: 1.0, softcap: None };
    let run = |q: &[f32], params, which: Rows<'_>, lens: (usize, usize)| {
        let (mut out, mut lse) = (vec![0.0; lens.0], vec![0.0; lens.1]);
        let state = StateMut { out: &mut out, lse: &mut lse };
        let attend = Attend { isa: Isa::best(), q, rows: &rows, params };
        sparse_decode(&attend, which, &mut AttendScratch::default(), state).unwrap_err()
    };
    let q = [0.0; 16];
    let all = || Rows::Range(0..4);
    assert_eq!(run(&q[..15], params, all(), (16, 2)), KernelError::Queries { len: 15, head_dim: 8 });
    assert_eq!(run(&[], params, all(), (0, 0)), KernelError::Queries { len: 0, head_dim: 8 });
    assert_eq!(run(&q, params, all(), (17, 2)), KernelError::Length { field: "out", len: 17, expected: 16 });
    assert_eq!(run(&q, params, all(), (16, 1)), KernelError::Length { field: "lse", len: 1, expected: 2 });
    assert_eq!(
        run(&q, params, Rows::Range(1..5), (16, 2)),
        KernelError::Range { start: 1, end: 5, num_rows: 4 }
    );
    assert_eq!(run(&q, params, Rows::List(&[0, 4]), (16, 2)), KernelError::Row { row: 4, num_rows: 4 });
    assert_eq!(
        run(&q, params, Rows::List(&[1, 1]), (16, 2)),
        KernelError::Order { at: 1, previous: 1, next: 1 }
    );
    let capped = AttendParams { softcap: Some(0.0), ..params };
    assert_eq!(run(&q, capped, all(), (16, 2)), KernelError::Softcap { softcap: 0.0 });
    let unscaled = AttendParams { scale: f32::INFINITY, ..params };
    assert_eq!(run(&q, unscaled, all(), (16, 2)), KernelError::Scale { scale: f32::INFINITY });
}

/// Rows whose runs are no whole rows.
struct Broken;

impl KvRows for Broken {
    type Elem = f32;

    fn head_dim(&self) -> usize {
        8
    }

    fn num_rows(&self) -> usize {
        4
    }

    fn run(&self, _first: usize) -> &[f32] {
        &[0.0; 17]
    }
}

#[test]
fn rows_that_break_their_contract_are_an_error() {
    for isa in Isa::available() {
        let attend =
            Attend { isa, q: &[0.0; 8], rows: &Broken, params: AttendParams { scale: 1.0, softcap: None } };
        let (mut out, mut lse) = ([0.0; 8], [0.0]);
        let state = StateMut { out: &mut out, lse: &mut lse };
        let error = sparse_decode(&attend, Rows::Range(2..4), &mut AttendScratch::default(), state);
        assert_eq!(error, Err(KernelError::Run { first: 2, len: 17, row_len: 16 }), "{}", isa.name());
    }
}
