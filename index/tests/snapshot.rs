//! Snapshots: what comes back answers like what went in, and no bytes are dangerous.
#![allow(clippy::unwrap_used, reason = "a test helper fails by panicking")]

mod common;

use common::clustered;
use floe_index::sketch::SketchConfig;
use floe_index::{
    Dci, Flat, Found, Hnsw, HnswConfig, Icecache, IndexError, KeyIndex, Scratch, SearchParams, Tail, Unit,
};
use proptest::prelude::*;

fn dci(n: usize, sketch: SketchConfig) -> Dci {
    let data = clustered(n, 64, 2, 9);
    let mut index = Dci::with_sketch(64, sketch).unwrap();
    index.build(&data.batch(0..n / 2)).unwrap();
    index.insert(&data.batch(n / 2..n)).unwrap();
    index.remove(&data.ids[n / 3..n / 3 + n / 8]).unwrap();
    index
}

#[test]
fn restored_index_answers_and_grows_like_the_original() {
    for sketch in [SketchConfig::OFF, SketchConfig::K2V1] {
        for n in [0, 1, 40, 3000] {
            let mut index = dci(n, sketch);
            let bytes = index.snapshot();
            let mut again = Dci::restore(&bytes).unwrap();
            assert_eq!(again.snapshot(), bytes);
            let more = clustered(n + 600, 64, 2, 10);
            let (mut a, mut b) = (Found::default(), Found::default());
            for round in 0..2 {
                let params =
                    SearchParams { open_fraction: 0.5, ..SearchParams::exact(50, Unit::Token, Tail::Tree) };
                index.search(&more.query(round), &[], &params, &mut Scratch::default(), &mut a).unwrap();
                again.search(&more.query(round), &[], &params, &mut Scratch::default(), &mut b).unwrap();
                assert_eq!(a.tokens, b.tokens);
                assert_eq!(a.tail_tokens(), b.tail_tokens());
                if round == 0 {
                    index.insert(&more.batch(n..n + 600)).unwrap();
                    again.insert(&more.batch(n..n + 600)).unwrap();
                }
            }
            assert_eq!(again.snapshot(), index.snapshot());
        }
    }
}

#[test]
fn flat_snapshot_restores_and_is_no_tree() {
    let data = clustered(333, 80, 1, 4);
    let mut flat = Flat::new(80).unwrap();
    flat.build(&data.batch(0..333)).unwrap();
    let bytes = flat.snapshot();
    assert_eq!(Flat::restore(&bytes).unwrap().snapshot(), bytes);
    assert!(matches!(Dci::restore(&bytes), Err(IndexError::Snapshot { what: "kind of index", .. })));
}

#[test]
fn every_truncation_and_every_flipped_byte_is_refused() {
    let bytes = dci(100, SketchConfig::K1).snapshot();
    for len in 0..bytes.len() {
        assert!(matches!(Dci::restore(&bytes[..len]), Err(IndexError::Snapshot { .. })), "length {len}");
    }
    for at in (0..bytes.len()).step_by(7) {
        let mut wrong = bytes.clone();
        wrong[at] ^= 0x40;
        assert!(matches!(Dci::restore(&wrong), Err(IndexError::Snapshot { .. })), "byte {at}");
    }
}

/// Bytes whose checksum holds although they were tampered with.
fn signed(mut bytes: Vec<u8>) -> Vec<u8> {
    let body = bytes.len().saturating_sub(4);
    bytes.truncate(body);
    let sum = crc32fast::hash(&bytes);
    bytes.extend(sum.to_le_bytes());
    bytes
}

/// A restored forgery must still answer without a panic.
fn probe(bytes: &[u8]) {
    let data = clustered(20, 64, 1, 1);
    let dci = Dci::restore(bytes).map(|index| Box::new(index) as Box<dyn KeyIndex>);
    let icecache = Icecache::restore(bytes).map(|index| Box::new(index) as Box<dyn KeyIndex>);
    let hnsw = Hnsw::restore(bytes).map(|index| Box::new(index) as Box<dyn KeyIndex>);
    for mut index in [dci, icecache, hnsw].into_iter().flatten().filter(|index| index.dim() == 64) {
        let mut found = Found::default();
        let params = SearchParams::exact(30, Unit::Token, Tail::Tree);
        index.search(&data.query(0), &[3], &params, &mut Scratch::default(), &mut found).unwrap();
        let _ = index.remove(&data.ids);
        let _ = index.insert(&data.batch(0..20));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = Dci::restore(&bytes);
        for kind in [b'd', b'i', b'h'] {
            let mut framed = [b"floeidx", &[kind][..], &2u32.to_le_bytes()].concat();
            framed.extend(&bytes);
            framed.extend([0; 4]);
            probe(&signed(framed));
        }
    }

    #[test]
    fn tampered_snapshots_with_a_valid_checksum_never_panic(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let data = clustered(60, 64, 1, 3);
        let mut icecache = Icecache::new(64, 1).unwrap();
        icecache.build(&data.batch(0..60)).unwrap();
        let mut hnsw = Hnsw::new(64, HnswConfig::default()).unwrap();
        hnsw.build(&data.batch(0..60)).unwrap();
        for mut bytes in [dci(60, SketchConfig::K1).snapshot(), icecache.snapshot(), hnsw.snapshot()] {
            for (at, value) in &edits {
                // Most of the bytes are keys; what can lead astray lies before and after them.
                let at = at.index(bytes.len());
                bytes[at] = *value;
            }
            probe(&signed(bytes));
        }
    }
}
