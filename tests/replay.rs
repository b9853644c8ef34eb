//! `floe replay` from outside: tables, JSON, page, and what it refuses.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::process::Command;

fn floe(args: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_floe")).args(args).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn the_bundled_replay_prints_a_table_and_writes_json_and_a_page() {
    let folder = tempfile::tempdir().unwrap();
    let (json, html) = (folder.path().join("r.json"), folder.path().join("r.html"));
    let policies = ["full", "window", "quest", "pagemean", "oracle", "floe:tail=off", "floe:tail=page"];
    let mut args = vec!["replay", "--budgets", "96,256", "--queries", "60"];
    for policy in policies {
        args.extend(["--policy", policy]);
    }
    args.extend(["--json", json.to_str().unwrap(), "--html", html.to_str().unwrap()]);
    let (code, stdout, stderr) = floe(&args);
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    assert!(policies.iter().all(|p| stdout.contains(p)), "{stdout}");

    let document: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&json).unwrap()).unwrap();
    assert_eq!(document["schema"], "floe-replay/1");
    let rows = document["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 7 * 2 * 3);
    assert_eq!(rows.iter().filter(|r| r["policy"] == "oracle" && r["segment"] == "story").count(), 2);
    let error = |policy: &str, budget: u64, segment: &str| {
        let row =
            rows.iter().find(|r| r["policy"] == policy && r["budget"] == budget && r["segment"] == segment);
        row.unwrap()["mean_error"].as_f64().unwrap()
    };
    for segment in ["story", "question", "answer"] {
        assert!(error("full", 96, segment) < 1e-6);
        for budget in [96, 256] {
            // The tail is what floe is about; without it clusters are as good as the published pages.
            assert!(error("floe:tail=page", budget, segment) < error("quest", budget, segment));
            assert!(error("floe:tail=page", budget, segment) < error("pagemean", budget, segment));
            assert!(error("oracle", budget, segment) < error("window", budget, segment));
        }
    }
    let page = std::fs::read_to_string(&html).unwrap();
    assert!(page.starts_with("<!DOCTYPE html>") && page.contains("<svg") && !page.contains("http://cdn"));
    let xml = page.trim_start_matches("<!DOCTYPE html>\n");
    roxmltree::Document::parse(xml).unwrap();
}

#[test]
fn the_same_seed_gives_the_same_rows() {
    let folder = tempfile::tempdir().unwrap();
    let rows = |name: &str, threads: &str| {
        let path = folder.path().join(name);
        let args =
            ["replay", "--policy", "floe", "--budgets", "128", "--queries", "20", "--threads", threads];
        let (code, _, stderr) = floe(&[&args[..], &["--json", path.to_str().unwrap()]].concat());
        assert_eq!((code, stderr.as_str()), (Some(0), ""));
        std::fs::read(path).unwrap()
    };
    assert_eq!(rows("a", "1"), rows("b", "4"));
}

#[test]
fn bad_arguments_are_one_sentence_and_exit_code_2() {
    for (args, words) in [
        (vec!["--policy", "flow"], "flow"),
        (vec!["--policy", "floe:tail=perhaps"], "perhaps"),
        (vec!["--budgets", "79"], "budget"),
        (vec!["--budgets", "many"], "many"),
        (vec!["--segments", "epilogue"], "epilogue"),
        (vec!["no-such-file.safetensors"], "no-such-file"),
        (vec!["Cargo.toml"], "Cargo.toml"),
    ] {
        let (code, stdout, stderr) = floe(&[&["replay"], &args[..]].concat());
        assert_eq!(code, Some(2), "{args:?}: {stderr}");
        assert!(stderr.contains(words) && stderr.starts_with("error: "), "{args:?}: {stderr}");
        assert_eq!(stdout, "");
    }
}

#[test]
fn a_report_that_cannot_be_written_is_exit_code_1() {
    let args = [
        "replay",
        "--policy",
        "window",
        "--budgets",
        "96",
        "--queries",
        "2",
        "--json",
        "/nowhere/at/all.json",
    ];
    let (code, _, stderr) = floe(&args);
    assert_eq!(code, Some(1), "{stderr}");
    assert!(stderr.contains("/nowhere/at/all.json"), "{stderr}");
}
