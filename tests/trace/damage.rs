//! No bytes, however damaged, make the reader panic, hang or allocate beyond the file's own size.

use floe::trace::{Trace, TraceError};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::raw_file::RawFile;

#[test]
fn file_cut_at_any_length_is_reported_as_truncated() {
    let bytes = RawFile::valid().bytes(0);
    for len in 0..bytes.len() {
        let error = Trace::from_bytes("x", bytes[..len].to_vec()).expect_err("cut short");
        assert!(
            matches!(error, TraceError::Truncated { found_bytes, .. } if found_bytes == len as u64),
            "{len}: {error}"
        );
    }
    Trace::from_bytes("x", bytes).expect("whole");
}

/// Tensor lengths whose sum overflows 64 bits; safetensors 0.8's own framing check adds them up unchecked.
#[test]
fn tensor_lengths_that_overflow_are_an_error() {
    const NUM_TENSORS: u64 = 16;
    const TENSOR_BYTES: u64 = 1 << 60;
    let mut file = RawFile::valid();
    for name in ["k", "v", "q", "q_pre"] {
        file.header.as_object_mut().expect("an object").remove(name);
    }
    for i in 0..NUM_TENSORS {
        let (start, end) = (i * TENSOR_BYTES, (i + 1).saturating_mul(TENSOR_BYTES));
        file.header[format!("t{i}")] =
            json!({"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]});
    }
    let error = Trace::from_bytes("x", file.bytes(0)).expect_err("no file is that long");
    assert!(matches!(error, TraceError::Truncated { expected_bytes: u64::MAX, .. }), "{error}");
}

/// JSON of any shape, nested a few levels, with the words of the format among its keys.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        "[ -~]{0,8}".prop_map(Value::from),
        Just(json!("BF16")),
    ];
    let key = prop_oneof![
        Just("__metadata__".to_string()),
        Just("k".to_string()),
        Just("dtype".to_string()),
        Just("shape".to_string()),
        Just("data_offsets".to_string()),
        "[a-z]{0,4}",
    ];
    leaf.prop_recursive(4, 32, 6, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::hash_map(key.clone(), inner, 0..6).prop_map(Value::from_iter),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn arbitrary_bytes_are_an_error(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(Trace::from_bytes("x", bytes).is_err());
    }

    #[test]
    fn arbitrary_header_bytes_are_an_error(header in prop::collection::vec(any::<u8>(), 0..300), data in 0usize..64) {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header);
        bytes.resize(bytes.len() + data, 0);
        prop_assert!(Trace::from_bytes("x", bytes).is_err());
    }

    #[test]
    fn arbitrary_json_header_is_an_error(header in any_json(), data in 0usize..64) {
        let file = RawFile { header, data: vec![0; data] };
        prop_assert!(Trace::from_bytes("x", file.bytes(0)).is_err());
    }

    #[test]
    fn valid_header_with_one_value_replaced_is_an_error_or_still_consistent(
        path in prop::sample::select(vec!["k", "v", "q", "q_pre"]),
        key in prop::sample::select(vec!["dtype", "shape", "data_offsets"]),
        value in any_json(),
    ) {
        let mut file = RawFile::valid();
        let unchanged = file.header[path][key] == value;
        file.header[path][key] = value;
        prop_assert_eq!(Trace::from_bytes("x", file.bytes(0)).is_ok(), unchanged);
    }

    #[test]
    fn flipped_byte_never_panics(index in 0usize..3000, flip in 1u8..=255) {
        let mut bytes = RawFile::valid().bytes(0);
        let index = index % bytes.len();
        bytes[index] ^= flip;
        if let Ok(trace) = Trace::from_bytes("x", bytes) {
            prop_assert_eq!(trace.k().len(), trace.meta().num_tokens * trace.meta().head_dim);
        }
    }
}
