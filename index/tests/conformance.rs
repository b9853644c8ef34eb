//! One suite for every implementation of `KeyIndex`.
#![allow(clippy::unwrap_used, reason = "a test helper fails by panicking")]

mod common;

use common::{Data, attention, clustered, implementations, with_tail};
use floe_index::{Batch, Found, IndexError, KeyIndex, Query, Scratch, SearchParams, Tail, TailOut, Unit};

fn tail_of(index: &dyn KeyIndex, query: &Query<'_>, exclude: &[u32], found: &Found) -> (Vec<f32>, Vec<f32>) {
    let mut out = vec![f32::NAN; query.q.len()];
    let mut lse = vec![f32::NAN; query.group];
    let state = TailOut { out: &mut out, lse: &mut lse };
    index.tail(query, exclude, found, &mut Scratch::default(), state).unwrap();
    (out, lse)
}

#[test]
fn every_size_returns_the_budget_without_excluded_ids_or_repeats() {
    for n in [0usize, 1, 15, 16, 17, 300, 5000] {
        for dim in [64usize, 80, 128] {
            let data = clustered(n, dim, 4, 7);
            for (at, mut index) in implementations(dim).into_iter().enumerate() {
                let has_tail = at < with_tail(dim).len();
                index.build(&data.batch(0..n)).unwrap();
                assert_eq!(index.len(), n);
                for budget in [0usize, 1, 16, 100, n + 5] {
                    let exclude: Vec<u32> = data.ids.iter().copied().filter(|id| id % 7 == 3).collect();
                    let mut found = Found::default();
                    let params = SearchParams::exact(budget, Unit::Page, Tail::Tree);
                    let query = data.query(0);
                    index.search(&query, &exclude, &params, &mut Scratch::default(), &mut found).unwrap();
                    let mut ids: Vec<u32> = found.tokens.iter().map(|h| h.id).collect();
                    assert_eq!(ids.len(), budget.min(n - exclude.len()), "n {n} dim {dim} budget {budget}");
                    assert!(found.tokens.windows(2).all(|w| w[0].score >= w[1].score));
                    ids.sort_unstable();
                    ids.dedup();
                    assert_eq!(ids.len(), found.tokens.len());
                    assert!(ids.iter().all(|id| id % 7 != 3));
                    let rest = if has_tail { n - ids.len() - exclude.len() } else { 0 };
                    assert_eq!(found.tail_tokens(), rest);
                }
            }
        }
    }
}

#[test]
fn tail_and_selection_together_approach_full_attention() {
    let (n, dim) = (6000, 128);
    let data = clustered(n, dim, 4, 3);
    for mut index in with_tail(dim) {
        index.build(&data.batch(0..4000)).unwrap();
        for at in (4000..n).step_by(16) {
            index.insert(&data.batch(at..(at + 16).min(n))).unwrap();
        }
        assert_eq!(index.len(), n);
        let query = data.query(1);
        let mut found = Found::default();
        let params = SearchParams::exact(256, Unit::Page, Tail::Tree);
        index.search(&query, &[], &params, &mut Scratch::default(), &mut found).unwrap();
        let (out, lse) = tail_of(index.as_ref(), &query, &[], &found);
        let chosen: Vec<u32> = found.tokens.iter().map(|h| h.id).collect();
        let full = attention(&data, &query, |_| true);
        let exact = attention(&data, &query, |id| chosen.contains(&id));
        for (h, &lse) in lse.iter().enumerate() {
            let (a, b) = (f64::from(lse).exp(), exact.lse[h].exp());
            let mut error = 0.0;
            let mut norm = 0.0;
            let mut alone = 0.0;
            for d in 0..dim {
                let i = h * dim + d;
                let merged = (a * f64::from(out[i]) + b * exact.out[i]) / (a + b);
                error += (merged - full.out[i]).powi(2);
                alone += (exact.out[i] - full.out[i]).powi(2);
                norm += full.out[i].powi(2);
            }
            assert!(
                error < alone,
                "head {h}: error {} without tail {}",
                (error / norm).sqrt(),
                (alone / norm).sqrt()
            );
            // Jensen: a mean key never overestimates the mass of its tokens, up to the rounding of its codes.
            assert!((a + b).ln() < full.lse[h] + 0.05, "head {h}");
        }
    }
}

#[test]
fn removal_of_the_last_tokens_restores_the_length_and_the_ids() {
    let (n, dim) = (700, 64);
    let data = clustered(n, dim, 2, 5);
    for mut index in implementations(dim) {
        index.build(&data.batch(0..500)).unwrap();
        index.insert(&data.batch(500..700)).unwrap();
        let gone: Vec<u32> = data.ids[450..].to_vec();
        assert_eq!(index.remove(&gone).unwrap(), 250);
        assert_eq!(index.remove(&gone).unwrap(), 0);
        assert_eq!(index.len(), 450);
        index.insert(&data.batch(450..700)).unwrap();
        let mut found = Found::default();
        let params = SearchParams::exact(n, Unit::Page, Tail::Tree);
        index.search(&data.query(0), &[], &params, &mut Scratch::default(), &mut found).unwrap();
        assert_eq!(found.tokens.len(), n);
        index.remove(&data.ids).unwrap();
        assert!(index.is_empty());
        index.insert(&data.batch(0..n)).unwrap();
        assert_eq!(index.len(), n);
    }
}

#[test]
fn bad_input_is_refused_by_name_and_changes_nothing() {
    let dim = 64;
    let data = clustered(100, dim, 2, 1);
    for mut index in implementations(dim) {
        index.build(&data.batch(0..50)).unwrap();
        let Data { ids, keys, values, .. } = &data;
        let mut bad = keys[50 * dim..60 * dim].to_vec();
        bad[3 * dim + 5] = f32::NAN;
        let batch = Batch { ids: &ids[50..60], keys: &bad, values: &values[50 * dim..60 * dim] };
        match index.insert(&batch) {
            Err(IndexError::NonFinite { row: 3, id: Some(id), position: 5, .. }) => assert_eq!(id, ids[53]),
            other => panic!("{other:?}"),
        }
        let twice = data.batch(40..60);
        assert_eq!(index.insert(&twice), Err(IndexError::DuplicateId { id: ids[40] }));
        assert_eq!(index.build(&data.batch(60..70)), Err(IndexError::NotEmpty { len: 50 }));
        assert_eq!(index.len(), 50);
        let mut found = Found::default();
        let query = Query { q: &keys[..dim - 1], group: 1, scale: 1.0, attended_lse: &[] };
        let params = SearchParams::exact(8, Unit::Page, Tail::Off);
        let search = |q: &Query<'_>, ex: &[u32], p: &SearchParams, f: &mut Found| {
            index.search(q, ex, p, &mut Scratch::default(), f)
        };
        assert!(matches!(search(&query, &[], &params, &mut found), Err(IndexError::Shape { .. })));
        let query = data.query(0);
        assert_eq!(
            search(&query, &[4, 4], &params, &mut found),
            Err(IndexError::UnsortedExclude { position: 1 })
        );
        let none = SearchParams { open_fraction: 0.0, ..params };
        assert!(matches!(search(&query, &[], &none, &mut found), Err(IndexError::Config { .. })));
    }
}

#[test]
fn odd_keys_equal_zero_and_one_huge_outlier_are_served() {
    for dim in [64usize, 96, 256, 576] {
        for kind in 0..3 {
            let mut data = clustered(400, dim, 2, 2);
            match kind {
                0 => data.keys.fill(0.25),
                1 => data.keys.fill(0.0),
                _ => data.keys[7 * dim] = 1e30,
            }
            for mut index in implementations(dim) {
                index.build(&data.batch(0..400)).unwrap();
                let mut found = Found::default();
                let params = SearchParams::exact(64, Unit::Page, Tail::Tree);
                let query = data.query(0);
                index.search(&query, &[], &params, &mut Scratch::default(), &mut found).unwrap();
                assert_eq!(found.tokens.len(), 64);
                let (out, lse) = tail_of(index.as_ref(), &query, &[], &found);
                assert!(out.iter().all(|x| x.is_finite()), "dim {dim} kind {kind}");
                assert!(lse.iter().all(|x| !x.is_nan()), "dim {dim} kind {kind}");
            }
        }
    }
}
