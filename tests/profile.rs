//! `floe profile` from outside: tables, JSON, page, access logs, and what it refuses.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::process::Command;

fn floe(args: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_floe")).args(args).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

fn rows(path: &std::path::Path) -> serde_json::Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn the_bundled_profile_agrees_with_itself_from_its_log() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let (json, again, html, log) = (path("a.json"), path("b.json"), path("p.html"), path("a.log"));
    let text = |p: &std::path::Path| p.to_str().unwrap().to_owned();
    let (code, stdout, stderr) = floe(&[
        "profile",
        "--steps",
        "60",
        "--json",
        &text(&json),
        "--html",
        &text(&html),
        "--access-log",
        &text(&log),
    ]);
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    for word in ["belady", "lru", "clock", "lfu", "mass", "lrfu", "simulated", "8x"] {
        assert!(stdout.contains(word), "{word}\n{stdout}");
    }
    let document = rows(&json);
    assert_eq!(document["schema"], "floe-profile/1");
    let all = document["rows"].as_array().unwrap();
    assert_eq!(all.len(), 5 * 4 * 5);
    for row in all {
        let of = |field: &str| row[field].as_f64().unwrap();
        assert!(of("hit_rate") > 0.0 && of("overlap") > 0.0 && of("bytes_per_token") > 0.0);
        // One shard: nothing to guess from, so no prefetch can beat the optimum.
        assert!(of("hit_rate") <= of("belady_hit_rate") + 1e-12);
    }
    let (code, _, stderr) = floe(&["profile", "--from-log", &text(&log), "--json", &text(&again)]);
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    assert_eq!(rows(&again), document);
    let page = std::fs::read_to_string(&html).unwrap();
    assert!(page.contains("<svg") && page.contains("simulated"));
    roxmltree::Document::parse(page.trim_start_matches("<!DOCTYPE html>\n")).unwrap();
}

#[test]
fn bad_requests_name_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("bad.log");
    std::fs::write(&log, "floe-access-log 1\nunit row 512\nbudget x\n").unwrap();
    let log = log.to_str().unwrap();
    for (args, words) in [
        (vec!["profile", "--policies", "fifo"], vec!["fifo", "lru, clock, lfu, mass"]),
        (vec!["profile", "--prefetch", "psychic"], vec!["psychic", "predicted"]),
        (vec!["profile", "--overlap", "2", "--steps", "2"], vec!["overlap", "2"]),
        (vec!["profile", "--slots=-1", "--steps", "2"], vec!["slots_factor", "-1"]),
        (vec!["profile", "--from-log", log], vec!["bad.log", "line 3", "budget"]),
        (vec!["profile", "--budget", "10"], vec!["budget", "10"]),
    ] {
        let (code, _, stderr) = floe(&args);
        assert_eq!(code, Some(2), "{args:?}: {stderr}");
        assert!(words.iter().all(|w| stderr.contains(w)), "{args:?}: {stderr}");
    }
}
