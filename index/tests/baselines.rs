//! What is particular to the baselines: the graph's accuracy, the published tree's effort, and that both repeat.
#![allow(clippy::unwrap_used, reason = "a test helper fails by panicking")]

mod common;

use common::{Data, clustered};
use floe_index::{
    Found, Hit, Hnsw, HnswConfig, Icecache, IndexError, KeyIndex, Scratch, SearchParams, Tail, Unit,
};

fn search(index: &dyn KeyIndex, data: &Data, at: usize, params: &SearchParams) -> Found {
    let mut found = Found::default();
    index.search(&data.query(at), &[], params, &mut Scratch::default(), &mut found).unwrap();
    found
}

/// Part of the exact best tokens, by the largest share over the heads, that `found` holds.
fn recall(data: &Data, at: usize, found: &[Hit]) -> f64 {
    let query = data.query(at);
    let mut best = vec![f64::NEG_INFINITY; data.ids.len()];
    for q in query.q.chunks_exact(data.dim) {
        let logits: Vec<f64> = data
            .keys
            .chunks_exact(data.dim)
            .map(|k| {
                let dot: f64 = q.iter().zip(k).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                dot * f64::from(query.scale)
            })
            .collect();
        let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let norm = max + logits.iter().map(|l| (l - max).exp()).sum::<f64>().ln();
        best.iter_mut().zip(&logits).for_each(|(b, l)| *b = b.max(l - norm));
    }
    let mut order: Vec<usize> = (0..best.len()).collect();
    order.sort_by(|&a, &b| best[b].total_cmp(&best[a]));
    let top: Vec<u32> = order[..found.len()].iter().map(|&i| data.ids[i]).collect();
    found.iter().filter(|hit| top.contains(&hit.id)).count() as f64 / found.len() as f64
}

fn built(mut index: impl KeyIndex, data: &Data) -> impl KeyIndex {
    let n = data.ids.len();
    index.build(&data.batch(0..n - 200)).unwrap();
    for at in (n - 200..n).step_by(16) {
        index.insert(&data.batch(at..(at + 16).min(n))).unwrap();
    }
    index
}

#[test]
fn graph_finds_nearly_all_of_the_exact_best_tokens() {
    let data = clustered(4000, 128, 4, 21);
    let index = built(Hnsw::new(128, HnswConfig::default()).unwrap(), &data);
    let params = SearchParams::exact(64, Unit::Token, Tail::Off);
    let mean =
        (0..16).map(|at| recall(&data, at, &search(&index, &data, at, &params).tokens)).sum::<f64>() / 16.0;
    assert!(mean > 0.9, "recall {mean}");
    let narrow = SearchParams { node_budget: 16, ..params };
    let (wide, narrow) = (search(&index, &data, 0, &params), search(&index, &data, 0, &narrow));
    assert!(narrow.nodes_scored < wide.nodes_scored);
}

#[test]
fn graph_and_published_tree_give_the_same_answers_on_every_build() {
    let data = clustered(3000, 64, 2, 5);
    let params = SearchParams::exact(100, Unit::Token, Tail::Off);
    let graphs = [0, 1].map(|_| built(Hnsw::new(64, HnswConfig::default()).unwrap(), &data));
    let trees = [0, 1].map(|_| built(Icecache::new(64, 7).unwrap(), &data));
    let restored = Hnsw::restore(&graphs[0].snapshot()).unwrap();
    for at in 0..16 {
        let [a, b] = graphs.each_ref().map(|index| search(index, &data, at, &params).tokens);
        assert_eq!(a, b);
        assert_eq!(a, search(&restored, &data, at, &params).tokens);
        let [a, b] = trees.each_ref().map(|index| search(index, &data, at, &params).tokens);
        assert_eq!(a, b);
    }
}

#[test]
fn published_tree_looks_at_less_when_told_to() {
    let data = clustered(20_000, 64, 2, 6);
    let index = built(Icecache::new(64, 7).unwrap(), &data);
    let full = SearchParams::exact(128, Unit::Page, Tail::Off);
    let whole = search(&index, &data, 0, &full);
    let narrow = search(&index, &data, 0, &SearchParams { open_fraction: 0.3, ..full });
    let capped = search(&index, &data, 0, &SearchParams { node_budget: 700, ..full });
    assert!(narrow.nodes_scored < whole.nodes_scored);
    assert!(capped.nodes_scored <= 2 * 700, "{}", capped.nodes_scored);
    assert!(whole.nodes_scored < 2 * 20_000 / 2, "{} of 20,000 by each of two heads", whole.nodes_scored);
    assert!(index.memory().tree_bytes < 60 * 20_000, "{:?}", index.memory());
}

#[test]
fn constants_out_of_range_are_refused_by_name() {
    let base = HnswConfig::default();
    for (config, name) in [
        (HnswConfig { m: 1, ..base }, "m"),
        (HnswConfig { ef_construction: 0, ..base }, "ef_construction"),
        (HnswConfig { ef_search: 1 << 20, ..base }, "ef_search"),
    ] {
        match Hnsw::new(64, config) {
            Err(IndexError::Config { field, .. }) => assert_eq!(field, name),
            other => panic!("{other:?}"),
        }
    }
    assert!(Icecache::new(0, 0).is_err());
}
