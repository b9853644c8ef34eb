//! Slices, and the one that is bundled with the project.

use floe::trace::{
    QueryRange, Rope, Segment, SliceRequest, SynthRequest, Trace, TraceError, TraceMeta, rope_error,
};
use proptest::prelude::*;

use crate::floe;
use crate::raw_file::RawFile;

const BUNDLED: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/qwen2.5-coder-1.5b_persuasion-8k_L20H0.safetensors");

/// The slice of the hand-made trace: 24 tokens, queries at 18..23, segments early 0..20 and late 20..23.
fn slice_of_small(request: &SliceRequest) -> Result<Trace, TraceError> {
    let folder = tempfile::tempdir().expect("scratch folder");
    let path = folder.path().join("slice.safetensors");
    let source = Trace::from_bytes("source.safetensors", RawFile::valid().bytes(0)).expect("valid");
    request.write(&source, &path)?;
    // The map outlives the file's name.
    Ok(Trace::open(&path).expect("a slice is a valid trace"))
}

#[test]
fn slice_renumbers_positions_segments_and_prefill() {
    let request = SliceRequest { num_tokens: 12, num_sinks: 3, queries: QueryRange::Last(4) };
    let slice = slice_of_small(&request).expect("possible");
    let segment = |name: &str, start, end| Segment { name: name.into(), start, end };
    let meta = slice.meta();
    assert_eq!((meta.num_tokens, meta.num_queries), (12, 4));
    // Query 1 of the source, at 19, now sits at 8: positions 3..14 are gone.
    assert_eq!((meta.first_query_pos, meta.index_until, meta.rope_offset), (8, 8, 11));
    assert_eq!(meta.segments, [segment("early", 0, 9), segment("late", 9, 12)]);
    assert_eq!(meta.extra["slice_of"], "tokens 0..3 and 14..23 of source.safetensors");
}

#[test]
fn slice_without_limits_drops_only_what_no_query_sees() {
    let request = SliceRequest { num_tokens: usize::MAX, num_sinks: 16, queries: QueryRange::Last(5) };
    let slice = slice_of_small(&request).expect("possible");
    let meta = slice.meta();
    assert_eq!((meta.num_tokens, meta.first_query_pos, meta.index_until, meta.rope_offset), (23, 18, 18, 0));
}

#[test]
fn impossible_slices_are_refused_by_name() {
    let request = |num_tokens, num_sinks, queries| SliceRequest { num_tokens, num_sinks, queries };
    let cases = [
        (request(12, 3, QueryRange::Last(0)), "queries"),
        (request(12, 3, QueryRange::Last(6)), "queries"),
        (request(12, 3, QueryRange::Positions(17..20)), "queries"),
        (request(12, 3, QueryRange::Positions(20..24)), "queries"),
        (request(12, 3, QueryRange::Positions(20..20)), "queries"),
        (request(7, 3, QueryRange::Last(5)), "tokens"),
        (request(0, 0, QueryRange::Last(5)), "tokens"),
        (request(12, usize::MAX, QueryRange::Last(5)), "tokens"),
    ];
    for (request, name) in cases {
        let error = slice_of_small(&request).expect_err(name);
        assert!(
            matches!(error, TraceError::Request { option, .. } if option == name),
            "{request:?}: {error}"
        );
    }
    slice_of_small(&request(8, 3, QueryRange::Last(5))).expect("exactly enough");
}

#[test]
fn slice_command_reports_bad_requests_in_one_line() {
    for (option, value) in [("--queries", "300"), ("--queries", "0..9"), ("--tokens", "17")] {
        let (code, _, stderr) = floe(&["trace", "slice", BUNDLED, "never-written", option, value]);
        assert_eq!((code, stderr.lines().count()), (Some(2), 1), "{option} {value}: {stderr}");
        assert!(stderr.contains(option.trim_start_matches('-')) && stderr.contains(value), "{stderr}");
    }
    let (code, _, stderr) = floe(&["trace", "slice", BUNDLED, "never-written", "--queries", "many"]);
    assert_eq!(code, Some(2), "{stderr}");
    assert!(!std::path::Path::new("never-written").exists());
}

#[test]
fn slice_of_a_slice_still_satisfies_the_rotation() {
    let folder = tempfile::tempdir().expect("scratch folder");
    let path = |name: &str| folder.path().join(name);
    let request = SynthRequest {
        num_tokens: 3000,
        num_queries: 64,
        head_dim: 64,
        group: 2,
        num_needles: 4,
        rope: Rope::Interleaved,
        seed: 1,
    };
    request.write(path("0"), &mut |_| ()).expect("possible");
    for (from, to, tokens, queries) in [("0", "1", 1000, 32), ("1", "2", 500, 8)] {
        let source = Trace::open(path(from)).expect("valid");
        let request = SliceRequest { num_tokens: tokens, num_sinks: 16, queries: QueryRange::Last(queries) };
        request.write(&source, path(to)).expect("possible");
    }
    let slice = Trace::open(path("2")).expect("valid");
    assert_eq!(slice.meta().rope_offset, 2500);
    assert!(rope_error(&slice, 8) < 1.0 / 128.0, "{}", rope_error(&slice, 8));
    assert_eq!(
        slice.meta().extra["slice_of"],
        "tokens 0..16 and 516..1000 of 1, itself tokens 0..16 and 2016..3000 of 0"
    );
}

#[test]
fn bundled_trace_is_what_its_note_says() {
    let trace = Trace::open(BUNDLED).expect("valid");
    let TraceMeta { num_tokens, num_queries, first_query_pos, index_until, .. } = *trace.meta();
    assert_eq!((num_tokens, num_queries, first_query_pos, index_until), (8192, 256, 7936, 7936));
    assert!(trace.size_bytes() < 5_000_000);
    assert!(rope_error(&trace, 256) < 1.0 / 128.0);
    let decoded = |name: &str| {
        let segment = trace.meta().segment(name).expect("present");
        segment.end - segment.start.max(index_until)
    };
    assert_eq!(["story", "question", "answer"].map(decoded), [74, 66, 116]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Against the obvious model: the list of kept positions, looked up one by one.
    #[test]
    fn slice_keeps_the_rows_and_labels_of_the_kept_positions(
        num_tokens in 1usize..30, num_sinks in 0usize..10, first in 18usize..23, count in 1usize..6,
    ) {
        let last = 23.min(first + count);
        let request = SliceRequest { num_tokens, num_sinks, queries: QueryRange::Positions(first..last) };
        let Ok(slice) = slice_of_small(&request) else {
            prop_assert!(num_tokens < num_sinks + (last - first), "refused {:?}", request);
            return Ok(());
        };
        let source = Trace::from_bytes("source", RawFile::valid().bytes(0)).expect("valid");
        let num_kept = num_tokens.min(last);
        let kept: Vec<usize> = if num_kept == last {
            (0..last).collect()
        } else {
            (0..num_sinks).chain(last - (num_kept - num_sinks)..last).collect()
        };
        let meta = slice.meta();
        prop_assert_eq!(meta.num_tokens, kept.len());
        for (new, &old) in kept.iter().enumerate() {
            prop_assert_eq!(&slice.k()[new * 16..][..16], &source.k()[old * 16..][..16]);
            prop_assert_eq!(&slice.v()[new * 16..][..16], &source.v()[old * 16..][..16]);
            for segment in &source.meta().segments {
                let before = (segment.start..segment.end).contains(&old);
                let after = meta.segment(&segment.name).is_some_and(|s| (s.start..s.end).contains(&new));
                prop_assert_eq!(before, after, "{} at {}", segment.name, old);
            }
        }
        prop_assert_eq!(meta.num_queries, last - first);
        for j in 0..meta.num_queries {
            let old = first + j;
            prop_assert_eq!(kept[slice.query_position(j)], old);
            prop_assert_eq!(slice.query(j), source.query(old - 18));
            prop_assert_eq!(slice.query_pre(j), source.query_pre(old - 18));
            prop_assert_eq!(slice.query_position(j) + meta.rope_offset, old);
        }
        prop_assert_eq!(meta.index_until, meta.first_query_pos);
    }
}
