//! Reads the recorded traces in the folder `FLOE_TRACES`, where there is one.

use floe::trace::{QueryRange, SliceRequest, Trace};

#[test]
fn recorded_trace_keeps_its_elements_through_a_slice() {
    let Ok(traces) = std::env::var("FLOE_TRACES") else {
        eprintln!("FLOE_TRACES is not set: recorded traces are not tested");
        return;
    };
    let folder = tempfile::tempdir().expect("scratch folder");
    let paths = std::fs::read_dir(&traces)
        .expect("FLOE_TRACES names a folder")
        .map(|entry| entry.expect("entry").path());
    for path in paths.filter(|path| path.extension().is_some_and(|e| e == "safetensors")) {
        let source = Trace::open(path).expect("a recorded trace is valid");
        let meta = source.meta();
        let (num_tokens, num_queries) = (meta.num_tokens / 4, 256);
        let path = folder.path().join(source.name());
        let request = SliceRequest { num_tokens, num_sinks: 16, queries: QueryRange::Last(num_queries) };
        request.write(&source, &path).expect("a quarter can be cut");
        let slice = Trace::open(&path).expect("a slice is a valid trace");
        let d = meta.head_dim;
        let end = source.query_position(meta.num_queries - 1) + 1;
        assert_eq!(slice.k()[..16 * d], source.k()[..16 * d]);
        assert_eq!(slice.v()[16 * d..], source.v()[(end - num_tokens + 16) * d..end * d]);
        assert_eq!(slice.query(0), source.query(meta.num_queries - num_queries));
        assert_eq!(slice.query_position(num_queries - 1), num_tokens - 1);
        assert_eq!(slice.meta().rope_offset + num_tokens, end);
    }
}
