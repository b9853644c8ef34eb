//! Round trips, and every way in which a file can break a rule of format 1: as the library reports it and as the
//! command does.

use floe::trace::{Segment, Tensor, Trace, TraceData, TraceError, TraceMeta, TraceWriter, write_trace};
use half::bf16;
use proptest::prelude::*;
use serde_json::json;

use crate::floe;
use crate::raw_file::{RawFile, ramp, small_meta};

/// A broken file: what is wrong, the file, whether the error is the right one, words that the message must have.
type Case = (&'static str, Vec<u8>, fn(&TraceError) -> bool, &'static [&'static str]);

fn field_case(name: &'static str, value: &str, words: &'static [&'static str]) -> Case {
    (name, RawFile::with_field(name, value).bytes(0), |e| matches!(e, TraceError::Field { .. }), words)
}

fn with_tensor(name: &str, key: &str, value: serde_json::Value) -> Vec<u8> {
    let mut file = RawFile::valid();
    file.header[name][key] = value;
    file.bytes(0)
}

fn with_element(index: usize, value: bf16) -> Vec<u8> {
    let mut file = RawFile::valid();
    file.data[2 * index..2 * index + 2].copy_from_slice(&value.to_le_bytes());
    file.bytes(0)
}

fn field_cases() -> Vec<Case> {
    vec![
        field_case("layer", "one", &["layer", "\"one\"", "integer"]),
        field_case("layer", "-1", &["layer", "\"-1\"", "integer"]),
        field_case("layer", "2", &["layer", "2", "num_layers"]),
        field_case("kv_head", "3", &["kv_head", "3", "num_kv_heads"]),
        field_case("num_layers", "0", &["num_layers", "0"]),
        field_case("num_kv_heads", "0", &["num_kv_heads", "0"]),
        field_case("num_q_heads", "7", &["num_q_heads", "7", "multiple"]),
        field_case("num_q_heads", "99999999999999999999999", &["num_q_heads", "integer"]),
        field_case("head_dim", "15", &["head_dim", "15", "even"]),
        field_case("rope", "sideways", &["rope", "\"sideways\"", "neox-half"]),
        field_case("rope_theta", "big", &["rope_theta", "\"big\"", "number"]),
        field_case("rope_theta", "NaN", &["rope_theta", "NaN"]),
        field_case("rope_theta", "0", &["rope_theta", "0"]),
        field_case("softmax_scale", "inf", &["softmax_scale", "inf"]),
        field_case("softmax_scale", "-0.1", &["softmax_scale", "-0.1"]),
        field_case("num_tokens", "0", &["num_tokens", "0"]),
        field_case("num_queries", "0", &["num_queries", "0"]),
        field_case("first_query_pos", "20", &["first_query_pos", "20", "24"]),
        field_case("first_query_pos", "18446744073709551615", &["first_query_pos"]),
        field_case("index_until", "25", &["index_until", "25", "num_tokens 24"]),
        field_case("rope_offset", "x", &["rope_offset", "\"x\""]),
        field_case("segments", "[1, 2]", &["segments", "JSON object"]),
        field_case("segments", "{\"a\": [0, 25]}", &["segments", "\"a\" [0, 25)", "24"]),
        field_case("segments", "{\"a\": [3, 3]}", &["segments", "\"a\" [3, 3)"]),
        field_case("segments", "{\"a\": [5, 3]}", &["segments", "\"a\" [5, 3)"]),
    ]
}

fn tensor_cases() -> Vec<Case> {
    let mut no_v = RawFile::valid();
    no_v.header.as_object_mut().expect("an object").remove("v");
    no_v.header["q"]["data_offsets"] = json!([768, 1088]);
    no_v.header["q_pre"]["data_offsets"] = json!([1088, 1408]);
    no_v.data.truncate(1408);
    let mut stranger = RawFile::valid();
    stranger.header["bias"] = json!({"dtype": "BF16", "shape": [1], "data_offsets": [2176, 2178]});
    stranger.data.extend([0, 0]);
    let mut group = RawFile::valid();
    group.header["__metadata__"]["num_q_heads"] = json!("9");
    vec![
        (
            "no tensor v",
            no_v.bytes(0),
            |e| matches!(e, TraceError::MissingTensor { tensor: "v", .. }),
            &["tensor v"],
        ),
        (
            "a fifth tensor",
            stranger.bytes(0),
            |e| matches!(e, TraceError::UnknownTensor { .. }),
            &["\"bias\""],
        ),
        (
            "another dtype",
            with_tensor("k", "dtype", json!("F16")),
            |e| matches!(e, TraceError::Dtype { tensor: "k", .. }),
            &["tensor k", "F16", "BF16"],
        ),
        (
            "another shape",
            with_tensor("v", "shape", json!([16, 24])),
            |e| matches!(e, TraceError::Shape { tensor: "v", .. }),
            &["tensor v", "[16, 24]", "[24, 16]"],
        ),
        (
            "another rank",
            with_tensor("q", "shape", json!([10, 16])),
            |e| matches!(e, TraceError::Shape { tensor: "q", .. }),
            &["tensor q", "[10, 16]", "[5, 2, 16]"],
        ),
        (
            "a group that q does not have",
            group.bytes(0),
            |e| matches!(e, TraceError::Shape { tensor: "q", .. }),
            &["tensor q", "[5, 3, 16]"],
        ),
        (
            "more tokens announced than there are",
            RawFile::with_field("num_tokens", "25").bytes(0),
            |e| matches!(e, TraceError::Shape { tensor: "k", .. }),
            &["tensor k", "[25, 16]"],
        ),
        (
            "NaN in k",
            with_element(37, bf16::NAN),
            |e| matches!(e, TraceError::NotFinite { tensor: "k", index, .. } if *index == [2, 5]),
            &["tensor k", "NaN", "[2, 5]"],
        ),
        (
            "minus infinity in q_pre",
            with_element(928 + 32 + 16 + 3, bf16::NEG_INFINITY),
            |e| matches!(e, TraceError::NotFinite { tensor: "q_pre", index, .. } if *index == [1, 1, 3]),
            &["tensor q_pre", "-inf", "[1, 1, 3]"],
        ),
    ]
}

fn framing_cases() -> Vec<Case> {
    let mut long = RawFile::valid();
    long.data.push(0);
    let mut absurd = u64::MAX.to_le_bytes().to_vec();
    absurd.extend(b"{}");
    let mut beyond = 1000u64.to_le_bytes().to_vec();
    beyond.extend(b"{}");
    let valid = RawFile::valid().bytes(0);
    // Lengths whose sum overflows 64 bits.
    let mut huge = RawFile::valid();
    huge.header["k"] = json!({"dtype": "BF16", "shape": [1u64 << 59], "data_offsets": [0, 1u64 << 60]});
    vec![
        (
            "an empty file",
            Vec::new(),
            |e| matches!(e, TraceError::Truncated { .. }),
            &["truncated", "0 present"],
        ),
        (
            "seven bytes",
            vec![0; 7],
            |e| matches!(e, TraceError::Truncated { .. }),
            &["truncated", "7 present"],
        ),
        (
            "a header longer than the file",
            beyond,
            |e| matches!(e, TraceError::Truncated { .. }),
            &["1008", "10"],
        ),
        (
            "an absurd header length",
            absurd,
            |e| matches!(e, TraceError::HeaderLength { .. }),
            &["18446744073709551615"],
        ),
        (
            "the last byte missing",
            valid[..valid.len() - 1].to_vec(),
            |e| matches!(e, TraceError::Truncated { .. }),
            &["truncated"],
        ),
        (
            "a byte too many",
            long.bytes(0),
            |e| matches!(e, TraceError::TrailingBytes { .. }),
            &["1 bytes follow"],
        ),
        ("no JSON", [&[2, 0, 0, 0, 0, 0, 0, 0], &b"}{"[..]].concat(), is_header, &["header"]),
        (
            "lines in the header",
            [&[3, 0, 0, 0, 0, 0, 0, 0], &b"{\n}"[..]].concat(),
            is_missing_version,
            &["floe_trace"],
        ),
        ("offsets with a gap", with_tensor("v", "data_offsets", json!([770, 1538])), is_header, &["header"]),
        ("a size beyond memory", huge.bytes(0), is_header, &["header"]),
        (
            "another version",
            RawFile::with_field("floe_trace", "2").bytes(0),
            |e| matches!(e, TraceError::Version { .. }),
            &["floe_trace", "\"2\"", "\"1\""],
        ),
        (
            "no version",
            RawFile::without_field("floe_trace").bytes(0),
            is_missing_version,
            &["floe_trace", "missing"],
        ),
    ]
}

fn is_header(error: &TraceError) -> bool {
    matches!(error, TraceError::Header { .. })
}

fn is_missing_version(error: &TraceError) -> bool {
    matches!(error, TraceError::MissingField { field: "floe_trace", .. })
}

#[test]
fn hand_made_file_is_read_as_it_was_made() {
    // Header lengths of either parity: elements in place, and copied from an odd address.
    for padding in [0, 1] {
        let trace =
            Trace::from_bytes("folder/x.safetensors", RawFile::valid().bytes(padding)).expect("valid");
        let meta = trace.meta();
        assert_eq!((meta.layer, meta.kv_head, meta.group(), meta.head_dim), (1, 2, 2, 16));
        assert_eq!((meta.num_tokens, meta.num_queries, trace.query_position(4)), (24, 5, 22));
        assert_eq!(meta.segments, [segment("early", 0, 20), segment("late", 20, 23)]);
        assert_eq!(meta.segment("late"), Some(&segment("late", 20, 23)));
        assert_eq!(meta.segment("later"), None);
        assert_eq!(trace.name(), "x.safetensors");
        assert_eq!(trace.k(), ramp(0, 384));
        assert_eq!(trace.v(), ramp(384, 384));
        assert_eq!(trace.q(), ramp(768, 160));
        assert_eq!(trace.q_pre(), ramp(928, 160));
        assert_eq!(trace.query(3), ramp(768 + 96, 32));
        assert_eq!(trace.query_pre(3), ramp(928 + 96, 32));
    }
}

#[test]
fn every_broken_rule_is_a_typed_error_and_exit_code_2() {
    let folder = tempfile::tempdir().expect("scratch folder");
    let cases = [field_cases(), tensor_cases(), framing_cases()].concat();
    for (number, (what, bytes, is_right, words)) in cases.into_iter().enumerate() {
        let path = folder.path().join(format!("case-{number}.safetensors"));
        std::fs::write(&path, bytes).expect("scratch file");
        let error = Trace::open(&path).expect_err(what);
        assert!(is_right(&error), "{what}: {error:?}");
        assert!(!error.is_environment(), "{what}");
        let (code, _, stderr) = floe(&["trace", "info", path.to_str().expect("UTF-8 path")]);
        assert_eq!(code, Some(2), "{what}: {stderr}");
        assert_eq!(stderr.lines().count(), 1, "{what}: {stderr}");
        assert!(
            stderr.starts_with("error: ") && stderr.contains(&format!("case-{number}")),
            "{what}: {stderr}"
        );
        for word in words {
            assert!(stderr.contains(word), "{what}: {stderr:?} lacks {word:?}");
        }
    }
}

#[test]
fn every_missing_field_is_named() {
    let metadata = RawFile::valid().header["__metadata__"].clone();
    let names: Vec<String> = metadata.as_object().expect("an object").keys().cloned().collect();
    assert_eq!(names.len(), 18);
    for name in names {
        let error = Trace::from_bytes("x", RawFile::without_field(&name).bytes(0)).expect_err(&name);
        assert!(
            matches!(&error, TraceError::MissingField { field, .. } if *field == name),
            "{name}: {error}"
        );
    }
}

#[test]
fn missing_file_and_folder_exit_with_code_2() {
    for path in ["no/such/file", "."] {
        let (code, _, stderr) = floe(&["trace", "info", path]);
        assert_eq!((code, stderr.lines().count()), (Some(2), 1), "{stderr}");
    }
}

#[test]
fn info_prints_an_aligned_table_and_the_facts_once() {
    let folder = tempfile::tempdir().expect("scratch folder");
    let paths = ["a.safetensors", "longer.safetensors"].map(|name| folder.path().join(name));
    for path in &paths {
        std::fs::write(path, RawFile::valid().bytes(0)).expect("scratch file");
    }
    let [first, second] = paths.each_ref().map(|path| path.to_str().expect("UTF-8 path"));
    let (code, stdout, _) = floe(&["trace", "info", first, second]);
    let lines: Vec<&str> = stdout.lines().collect();
    assert_eq!(code, Some(0), "{stdout}");
    let column =
        |name: &str| lines.iter().find(|line| line.starts_with(name)).and_then(|line| line.find(" 1/2"));
    assert!(column("a.safetensors").is_some(), "{stdout}");
    assert_eq!(column("a.safetensors"), column("longer.safetensors"), "{stdout}");
    assert_eq!(lines.iter().filter(|line| line.starts_with("licence   CC0")).count(), 1, "{stdout}");
    assert!(lines.contains(&"segments  early 0..20, late 20..23"), "{stdout}");
    // The ramp is no rotation of itself, and the command says so.
    assert!(stdout.contains("q is not RoPE(q_pre)"), "{stdout}");
}

#[test]
fn unfinished_or_refused_trace_leaves_no_file() {
    let folder = tempfile::tempdir().expect("scratch folder");
    let path = folder.path().join("x.safetensors");
    let entries = || std::fs::read_dir(folder.path()).expect("readable").count();

    let mut writer = TraceWriter::create(&path, small_meta()).expect("valid metadata");
    writer.append(Tensor::K, &ramp(0, 384)).expect("fits");
    let error = writer.append(Tensor::K, &ramp(0, 1)).expect_err("one too many");
    assert!(
        matches!(error, TraceError::ElementCount { tensor: "k", written: 385, expected: 384, .. }),
        "{error:?}"
    );
    let error = writer.append(Tensor::V, &[bf16::ONE, bf16::INFINITY]).expect_err("infinite");
    assert!(matches!(error, TraceError::NotFinite { tensor: "v", .. }), "{error:?}");
    assert_eq!(entries(), 1, "the partial file");
    assert!(!path.exists());
    let error = writer.finish().expect_err("v is missing");
    assert!(matches!(error, TraceError::ElementCount { tensor: "v", written: 0, .. }), "{error:?}");
    assert_eq!(entries(), 0);

    let meta = TraceMeta { index_until: 25, ..small_meta() };
    let error = TraceWriter::create(&path, meta).expect_err("index_until beyond num_tokens");
    assert!(matches!(error, TraceError::Field { field: "index_until", .. }), "{error:?}");
    assert_eq!(entries(), 0);
}

#[test]
fn writer_in_a_missing_folder_is_an_input_error() {
    let error = TraceWriter::create("no/such/folder/x.safetensors", small_meta()).expect_err("no folder");
    assert!(matches!(error, TraceError::Io { .. }) && !error.is_environment(), "{error:?}");
}

#[test]
fn extra_field_may_not_shadow_a_typed_one() {
    let mut meta = small_meta();
    meta.extra.insert("layer".into(), "7".into());
    let error = meta.validate("x".as_ref()).expect_err("shadowed");
    assert!(matches!(error, TraceError::Field { field: "extra", .. }), "{error:?}");
}

fn segment(name: &str, start: usize, end: usize) -> Segment {
    Segment { name: name.into(), start, end }
}

prop_compose! {
    fn any_meta()(
        (group, kv_heads, half_dim) in (1usize..5, 1usize..4, 1usize..9),
        (tokens, queries_seed, first_seed, index_seed) in (1usize..40, 0usize..40, 0usize..40, 0usize..41),
        (theta, scale, offset) in (1e-3f64..1e9, 1e-3f64..10.0, 0usize..1_000_000),
        (text, name) in (any::<String>(), any::<String>()),
        rope in prop_oneof![Just("neox-half"), Just("interleaved"), Just("none")],
    ) -> TraceMeta {
        let num_queries = 1 + queries_seed % tokens;
        TraceMeta {
            num_q_heads: group * kv_heads,
            num_kv_heads: kv_heads,
            kv_head: kv_heads - 1,
            head_dim: 2 * half_dim,
            num_tokens: tokens,
            num_queries,
            first_query_pos: first_seed % (tokens - num_queries + 1),
            index_until: index_seed % (tokens + 1),
            rope_theta: theta,
            softmax_scale: scale,
            rope_offset: offset,
            rope: floe::trace::Rope::from_name(rope).expect("a known name"),
            segments: vec![segment(&name, 0, tokens)],
            text,
            ..small_meta()
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn written_trace_reads_back_the_same(meta in any_meta(), seed in 0usize..30_000) {
        let folder = tempfile::tempdir().expect("scratch folder");
        let path = folder.path().join("x.safetensors");
        let len = |tensor: Tensor| tensor.shape(&meta).iter().product::<usize>();
        let (k, v) = (ramp(seed, len(Tensor::K)), ramp(seed + 1, len(Tensor::V)));
        let (q, q_pre) = (ramp(seed + 2, len(Tensor::Q)), ramp(seed + 3, len(Tensor::QPre)));
        write_trace(&path, meta.clone(), TraceData { k: &k, v: &v, q: &q, q_pre: &q_pre }).expect("valid");
        let trace = Trace::open(&path).expect("valid");
        prop_assert_eq!(trace.meta(), &meta);
        prop_assert_eq!((trace.k(), trace.v()), (&k[..], &v[..]));
        prop_assert_eq!((trace.q(), trace.q_pre()), (&q[..], &q_pre[..]));

        // Piece by piece, tensors interleaved: the same bytes.
        let pieces = folder.path().join("pieces.safetensors");
        let mut writer = TraceWriter::create(&pieces, meta).expect("valid");
        for i in 0..k.len().max(q.len()).div_ceil(7) {
            for (tensor, all) in Tensor::ALL.into_iter().zip([&k, &v, &q, &q_pre]) {
                let piece = all.chunks(7).nth(i).unwrap_or_default();
                writer.append(tensor, piece).expect("fits");
            }
        }
        writer.finish().expect("complete");
        prop_assert_eq!(std::fs::read(&pieces).expect("readable"), std::fs::read(&path).expect("readable"));
    }
}
