//! One suite for every implementation of `KeyIndex`.
#![allow(clippy::unwrap_used, reason = "a test helper fails by panicking")]

mod common;

use std::collections::BTreeMap;

use common::{Data, attention, clustered, implementations};
use floe_index::{Batch, Found, IndexError, KeyIndex, Query, Scratch, SearchParams, Tail, TailOut, Unit};
use proptest::prelude::*;

fn tail_of(index: &dyn KeyIndex, query: &Query<'_>, exclude: &[u32], found: &Found) -> (Vec<f32>, Vec<f32>) {
    let mut out = vec![f32::NAN; query.q.len()];
    let mut lse = vec![f32::NAN; query.group];
    let state = TailOut { out: &mut out, lse: &mut lse };
    index.tail(query, exclude, found, &mut Scratch::default(), state).unwrap();
    (out, lse)
}

fn search(index: &dyn KeyIndex, query: &Query<'_>, exclude: &[u32], params: &SearchParams) -> Found {
    let mut found = Found::default();
    index.search(query, exclude, params, &mut Scratch::default(), &mut found).unwrap();
    found
}

#[test]
fn every_size_returns_the_budget_without_excluded_ids_or_repeats() {
    for n in [0usize, 1, 15, 16, 17, 300, 2000] {
        for dim in [64usize, 80, 128] {
            let data = clustered(n, dim, 4, 7);
            let exclude: Vec<u32> = data.ids.iter().copied().filter(|id| id % 7 == 3).collect();
            for mut case in implementations(dim) {
                case.index.build(&data.batch(0..n)).unwrap();
                assert_eq!(case.index.len(), n);
                for (budget, unit) in [
                    (0, Unit::Page),
                    (1, Unit::Token),
                    (16, Unit::Page),
                    (100, Unit::Token),
                    (n + 5, Unit::Page),
                ] {
                    let what = format!("{} n {n} dim {dim} budget {budget}", case.name);
                    let params = SearchParams::exact(budget, unit, Tail::Tree);
                    let found = search(case.index.as_ref(), &data.query(0), &exclude, &params);
                    let mut ids: Vec<u32> = found.tokens.iter().map(|h| h.id).collect();
                    let most = budget.min(n - exclude.len());
                    if case.exact {
                        assert_eq!(ids.len(), most, "{what}");
                        assert!(found.tokens.windows(2).all(|w| w[0].score >= w[1].score), "{what}");
                        assert_eq!(found.tail_tokens() + ids.len() + exclude.len(), n, "{what}");
                    } else {
                        assert!(
                            ids.len() <= most && ids.len() >= most * 3 / 4,
                            "{what}: {} of {most}",
                            ids.len()
                        );
                        assert_eq!(found.tail_tokens(), 0, "{what}");
                    }
                    ids.sort_unstable();
                    ids.dedup();
                    assert_eq!(ids.len(), found.tokens.len(), "{what}");
                    assert!(ids.iter().all(|id| id % 7 != 3), "{what}");
                }
            }
        }
    }
}

#[test]
fn tail_and_selection_together_approach_full_attention() {
    let (n, dim) = (6000, 128);
    let data = clustered(n, dim, 4, 3);
    for mut case in implementations(dim) {
        case.index.build(&data.batch(0..4000)).unwrap();
        for at in (4000..n).step_by(16) {
            case.index.insert(&data.batch(at..(at + 16).min(n))).unwrap();
        }
        assert_eq!(case.index.len(), n);
        let query = data.query(1);
        for tail in [Tail::Tree, Tail::Page] {
            let params = SearchParams { open_fraction: 0.3, ..SearchParams::exact(256, Unit::Token, tail) };
            let found = search(case.index.as_ref(), &query, &[], &params);
            let (out, lse) = tail_of(case.index.as_ref(), &query, &[], &found);
            if !case.summarises {
                assert!(out.iter().all(|&x| x == 0.0) && lse.iter().all(|&x| x == f32::NEG_INFINITY));
                continue;
            }
            let chosen: Vec<u32> = found.tokens.iter().map(|h| h.id).collect();
            let full = attention(&data, &query, |_| true);
            let exact = attention(&data, &query, |id| chosen.contains(&id));
            for (h, &lse) in lse.iter().enumerate() {
                let (a, b) = (f64::from(lse).exp(), exact.lse[h].exp());
                let (mut error, mut alone) = (0.0, 0.0);
                let row = h * dim..(h + 1) * dim;
                for ((&tail, exact), full) in
                    out[row.clone()].iter().zip(&exact.out[row.clone()]).zip(&full.out[row])
                {
                    let merged = (a * f64::from(tail) + b * exact) / (a + b);
                    error += (merged - full).powi(2);
                    alone += (exact - full).powi(2);
                }
                assert!(error < alone, "{} head {h}: error {error} without tail {alone}", case.name);
            }
        }
        let off = search(case.index.as_ref(), &query, &[], &SearchParams::exact(256, Unit::Page, Tail::Off));
        let (out, lse) = tail_of(case.index.as_ref(), &query, &[], &off);
        assert!(out.iter().all(|&x| x == 0.0) && lse.iter().all(|&x| x == f32::NEG_INFINITY));
    }
}

#[test]
fn whole_tail_of_exact_tokens_is_full_attention() {
    let data = clustered(500, 96, 3, 8);
    let mut index = floe_index::FlatTokens::new(96).unwrap();
    index.build(&data.batch(0..500)).unwrap();
    let query = data.query(2);
    let found = search(&index, &query, &[], &SearchParams::exact(0, Unit::Token, Tail::Tree));
    let (out, lse) = tail_of(&index, &query, &[], &found);
    let full = attention(&data, &query, |_| true);
    for (a, b) in out.iter().zip(&full.out) {
        assert!((f64::from(*a) - b).abs() < 1e-5, "{a} {b}");
    }
    for (a, b) in lse.iter().zip(&full.lse) {
        assert!((f64::from(*a) - b).abs() < 1e-5, "{a} {b}");
    }
}

#[test]
fn removal_of_the_last_tokens_restores_the_length_and_the_ids() {
    let (n, dim) = (700, 64);
    let data = clustered(n, dim, 2, 5);
    for mut case in implementations(dim) {
        let index = &mut case.index;
        index.build(&data.batch(0..500)).unwrap();
        index.insert(&data.batch(500..700)).unwrap();
        let gone: Vec<u32> = data.ids[450..].to_vec();
        assert_eq!(index.remove(&gone).unwrap(), 250);
        assert_eq!(index.remove(&gone).unwrap(), 0);
        assert_eq!(index.len(), 450);
        index.insert(&data.batch(450..700)).unwrap();
        let params = SearchParams::exact(n, Unit::Page, Tail::Tree);
        let found = search(index.as_ref(), &data.query(0), &[], &params);
        assert!(found.tokens.len() == n || !case.exact, "{}", case.name);
        index.remove(&data.ids).unwrap();
        assert!(index.is_empty());
        assert!(search(index.as_ref(), &data.query(0), &[], &params).tokens.is_empty(), "{}", case.name);
        index.insert(&data.batch(0..n)).unwrap();
        assert_eq!(index.len(), n);
        assert!(!search(index.as_ref(), &data.query(0), &[], &params).tokens.is_empty(), "{}", case.name);
    }
}

#[test]
fn bad_input_is_refused_by_name_and_changes_nothing() {
    let dim = 64;
    let data = clustered(100, dim, 2, 1);
    for mut case in implementations(dim) {
        let index = &mut case.index;
        index.build(&data.batch(0..50)).unwrap();
        let before = index.snapshot();
        let Data { ids, keys, values, .. } = &data;
        let span = 50 * dim..60 * dim;
        for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut bad = keys[span.clone()].to_vec();
            bad[3 * dim + 5] = wrong;
            let in_keys = Batch { ids: &ids[50..60], keys: &bad, values: &values[span.clone()] };
            let in_values = Batch { ids: &ids[50..60], keys: &keys[span.clone()], values: &bad };
            for batch in [in_keys, in_values] {
                match index.insert(&batch) {
                    Err(IndexError::NonFinite { row: 3, id: Some(id), position: 5, .. }) => {
                        assert_eq!(id, ids[53]);
                    }
                    other => panic!("{other:?}"),
                }
            }
        }
        let short = Batch { ids: &ids[50..60], keys: &keys[..dim], values: &values[span.clone()] };
        assert!(matches!(index.insert(&short), Err(IndexError::Shape { .. })));
        let twice = Batch { ids: &[900, 7, 900], keys: &keys[..3 * dim], values: &values[..3 * dim] };
        assert_eq!(index.insert(&twice), Err(IndexError::DuplicateId { id: 900 }));
        assert_eq!(index.insert(&data.batch(40..60)), Err(IndexError::DuplicateId { id: ids[40] }));
        assert_eq!(index.build(&data.batch(60..70)), Err(IndexError::NotEmpty { len: 50 }));
        assert_eq!(index.len(), 50);
        assert_eq!(index.snapshot(), before);
        let params = SearchParams::exact(8, Unit::Page, Tail::Off);
        let ask = |q: &Query<'_>, exclude: &[u32], params: &SearchParams| {
            index.search(q, exclude, params, &mut Scratch::default(), &mut Found::default())
        };
        let good = data.query(0);
        let short = Query { q: &good.q[..dim - 1], ..good };
        assert!(matches!(ask(&short, &[], &params), Err(IndexError::Shape { .. })));
        assert!(matches!(
            ask(&Query { group: 0, q: &[], ..good }, &[], &params),
            Err(IndexError::Config { field: "group", .. })
        ));
        let scale = Query { scale: f32::NAN, ..good };
        assert!(matches!(ask(&scale, &[], &params), Err(IndexError::Config { field: "scale", .. })));
        assert_eq!(ask(&good, &[4, 4], &params), Err(IndexError::UnsortedExclude { position: 1 }));
        for open_fraction in [0.0, -1.0, 1.5, f32::NAN] {
            let params = SearchParams { open_fraction, ..params };
            assert!(matches!(
                ask(&good, &[], &params),
                Err(IndexError::Config { field: "open_fraction", .. })
            ));
        }
        for value in [-1.0, f32::INFINITY, f32::NAN] {
            let (open, detail) =
                (SearchParams { open_mass: value, ..params }, SearchParams { detail: value, ..params });
            for (params, name) in [(open, "open_mass"), (detail, "detail")] {
                let refused = ask(&good, &[], &params);
                assert!(matches!(refused, Err(IndexError::Config { field, .. }) if field == name));
            }
        }
        let found = search(index.as_ref(), &good, &[], &params);
        index.remove(&ids[..1]).unwrap();
        let (mut out, mut lse) = (vec![0.0; 2 * dim], vec![0.0; 2]);
        let state = TailOut { out: &mut out, lse: &mut lse };
        let stale = index.tail(&good, &[], &found, &mut Scratch::default(), state);
        assert_eq!(stale, Err(IndexError::StaleFound), "{}", case.name);
    }
    assert!(floe_index::Dci::new(0).is_err() && floe_index::Dci::new(1025).is_err());
}

#[test]
fn odd_keys_equal_zero_and_one_huge_outlier_are_served() {
    for dim in [64usize, 80, 96, 256, 576] {
        for kind in 0..4 {
            let mut data = clustered(400, dim, 2, 2);
            match kind {
                0 => data.keys.fill(0.25),
                1 => data.keys.fill(0.0),
                2 => data.keys[7 * dim] = 1e30,
                _ => data.values[7 * dim] = -1e30,
            }
            for mut case in implementations(dim) {
                case.index.build(&data.batch(0..300)).unwrap();
                case.index.insert(&data.batch(300..400)).unwrap();
                let query = data.query(0);
                let params = SearchParams::exact(64, Unit::Token, Tail::Tree);
                let found = search(case.index.as_ref(), &query, &[], &params);
                assert!(found.tokens.len() == 64 || !case.exact, "{} dim {dim} kind {kind}", case.name);
                let (out, lse) = tail_of(case.index.as_ref(), &query, &[], &found);
                assert!(out.iter().all(|x| x.is_finite()), "{} dim {dim} kind {kind}", case.name);
                assert!(lse.iter().all(|x| !x.is_nan()), "{} dim {dim} kind {kind}", case.name);
            }
        }
    }
}

#[test]
fn the_largest_product_is_found_first() {
    let (n, dim) = (3000, 64);
    let mut data = clustered(n, dim, 1, 6);
    // One key straight along the query must be in the first page; the published search may miss it, for it never looks at the
    // fifth of a parent's children that projects farthest from the query.
    let along: Vec<f32> = data.query(0).q.iter().map(|x| 3.0 * x).collect();
    data.keys[1234 * dim..1235 * dim].copy_from_slice(&along);
    for mut case in implementations(dim).into_iter().filter(|case| case.name != "icecache") {
        case.index.build(&data.batch(0..n)).unwrap();
        let params = SearchParams::exact(16, Unit::Token, Tail::Off);
        let found = search(case.index.as_ref(), &data.query(0), &[], &params);
        let wanted = data.ids[1234];
        assert!(found.tokens.iter().any(|h| h.id == wanted), "{}", case.name);
    }
}

#[test]
fn a_restored_index_answers_and_grows_as_the_saved_one() {
    let data = clustered(3000, 64, 2, 12);
    for mut case in implementations(64) {
        case.index.build(&data.batch(0..2000)).unwrap();
        case.index.insert(&data.batch(2000..2600)).unwrap();
        case.index.remove(&data.ids[10..30]).unwrap();
        case.index.remove(&data.ids[2500..2600]).unwrap();
        case.index.insert(&data.batch(2500..2600)).unwrap();
        // Whole pages of consecutive tokens go, and stay empty in the snapshot.
        case.index.remove(&data.ids[1000..1100]).unwrap();
        let mut again = (case.restore)(&case.index.snapshot()).unwrap();
        assert_eq!((again.len(), again.dim()), (2480, 64), "{}", case.name);
        for round in 0..3 {
            let params = SearchParams::exact(40, Unit::Page, Tail::Tree);
            let found = search(again.as_ref(), &data.query(round), &[], &params);
            let wanted = search(case.index.as_ref(), &data.query(round), &[], &params);
            assert_eq!(found.tokens, wanted.tokens, "{} round {round}", case.name);
            for index in [&mut case.index, &mut again] {
                index.insert(&data.batch(2600 + 100 * round..2700 + 100 * round)).unwrap();
                index.remove(&data.ids[300 * round + 40..300 * round + 90]).unwrap();
            }
        }
        assert!(case.index.snapshot() == again.snapshot(), "{}", case.name);
        for wrong in [&[][..], b"floeidx", &case.index.snapshot()[1..]] {
            assert!(matches!((case.restore)(wrong), Err(IndexError::Snapshot { .. })), "{}", case.name);
        }
    }
}

/// A call on the index.
#[derive(Clone, Debug)]
enum Call {
    Insert(Vec<u32>),
    Remove(Vec<u32>),
    Search(usize, Vec<u32>),
}

fn calls() -> impl Strategy<Value = Vec<Call>> {
    let ids =
        || prop::collection::btree_set(0u32..400, 0..40).prop_map(|s| s.into_iter().collect::<Vec<_>>());
    let call = prop_oneof![
        3 => ids().prop_map(Call::Insert),
        1 => ids().prop_map(Call::Remove),
        2 => (0usize..60, ids()).prop_map(|(budget, exclude)| Call::Search(budget, exclude)),
    ];
    prop::collection::vec(call, 1..30)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_sequence_of_calls_agrees_with_a_map(calls in calls()) {
        let dim = 64;
        let data = clustered(400, dim, 2, 11);
        for mut case in implementations(dim) {
            let mut model: BTreeMap<u32, ()> = BTreeMap::new();
            for (i, call) in calls.iter().enumerate() {
                if i % 8 == 7 {
                    // Whoever goes on from a snapshot goes on as the original would.
                    let again = (case.restore)(&case.index.snapshot()).unwrap();
                    let params = SearchParams::exact(30, Unit::Token, Tail::Tree);
                    let wanted = search(case.index.as_ref(), &data.query(0), &[], &params);
                    let found = search(again.as_ref(), &data.query(0), &[], &params);
                    prop_assert_eq!(found.tokens, wanted.tokens, "{}", case.name);
                    case.index = again;
                }
                match call {
                    Call::Insert(ids) => {
                        let ids: Vec<u32> = ids.iter().copied().filter(|id| !model.contains_key(id)).collect();
                        let rows = |from: &[f32]| -> Vec<f32> {
                            ids.iter().flat_map(|&id| from[id as usize * dim..][..dim].to_vec()).collect()
                        };
                        let (keys, values) = (rows(&data.keys), rows(&data.values));
                        case.index.insert(&Batch { ids: &ids, keys: &keys, values: &values }).unwrap();
                        model.extend(ids.iter().map(|&id| (id, ())));
                    }
                    Call::Remove(ids) => {
                        let held = ids.iter().filter(|id| model.remove(id).is_some()).count();
                        prop_assert_eq!(case.index.remove(ids).unwrap(), held);
                    }
                    Call::Search(budget, exclude) => {
                        let params = SearchParams::exact(*budget, Unit::Token, Tail::Tree);
                        let found = search(case.index.as_ref(), &data.query(0), exclude, &params);
                        let left = model.keys().filter(|id| exclude.binary_search(id).is_err()).count();
                        prop_assert!(found.tokens.len() <= left.min(*budget));
                        if case.exact {
                            prop_assert_eq!(found.tokens.len(), left.min(*budget));
                            prop_assert_eq!(found.tail_tokens() + found.tokens.len(), left);
                        }
                        for hit in &found.tokens {
                            prop_assert!(model.contains_key(&hit.id), "{} returned {}", case.name, hit.id);
                            prop_assert!(exclude.binary_search(&hit.id).is_err());
                        }
                    }
                }
                prop_assert_eq!(case.index.len(), model.len());
            }
        }
    }
}
