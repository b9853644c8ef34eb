//! The style guide, executed: sizes, banned words and calls, SAFETY notes, the import rule between stages.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};

/// Lines a source file may have; beyond the aim of 300, room for a table or a test module.
const LINES_MAX: usize = 600;

/// Folders whose code may be `unsafe`.
const UNSAFE_IN: [&str; 10] = [
    "cuda/",
    "index/src/simd/",
    "python/src/tensor/",
    "src/engine/crew.rs",
    "src/page/slab.rs",
    "src/trace/map.rs",
    "tests/allocations.rs",
    "src/gpu/host_io.rs",
    "tests/gpu/world.rs",
    "bench/src/step/world.rs",
];

/// Stage folders of `src/`; they share the plain types and `page`, not one another.
const STAGES: [&str; 5] = ["attend", "page", "reuse", "select", "transfer"];

fn sources() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    let mut folders: Vec<PathBuf> =
        ["src", "index", "cuda", "bench", "python/src", "tests"].iter().map(|f| root.join(f)).collect();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
                files.push((name, std::fs::read_to_string(&path).unwrap()));
            }
        }
    }
    assert!(files.len() > 50, "only {} files found", files.len());
    files
}

/// Fails with one line per finding.
fn expect_none(what: &str, findings: Vec<String>) {
    assert!(findings.is_empty(), "{what}:\n{}", findings.join("\n"));
}

#[test]
fn files_stay_readable_in_one_sitting() {
    let long = sources().into_iter().filter_map(|(name, text)| {
        let lines = text.lines().count();
        (lines > LINES_MAX).then(|| format!("{name}: {lines} lines, at most {LINES_MAX}"))
    });
    expect_none("too long", long.collect());
}

#[test]
fn no_open_ends_in_the_code() {
    let banned = [["TO", "DO"], ["FIX", "ME"], ["XX", "X"]].map(|word| word.concat());
    let mut findings = Vec::new();
    for (name, text) in sources() {
        for (i, line) in text.lines().enumerate() {
            if banned.iter().any(|word| line.contains(word.as_str())) {
                findings.push(format!("{name}:{}: {}", i + 1, line.trim()));
            }
        }
    }
    expect_none("open points belong into issues", findings);
}

#[test]
fn unsafe_code_stays_in_its_places_and_says_why_it_is_sound() {
    let keyword = ["unsafe", " {"].concat();
    let mut findings = Vec::new();
    for (name, text) in sources() {
        let lines: Vec<&str> = text.lines().collect();
        for (i, line) in lines.iter().enumerate() {
            let code = line.split("//").next().unwrap();
            if !code.contains(&keyword) {
                continue;
            }
            if !UNSAFE_IN.iter().any(|place| name.starts_with(place)) {
                findings.push(format!("{name}:{}: unsafe outside its places", i + 1));
            }
            if !lines[i.saturating_sub(6)..=i].iter().any(|l| l.contains("SAFETY")) {
                findings.push(format!("{name}:{}: no SAFETY comment", i + 1));
            }
        }
    }
    expect_none("unsafe", findings);
}

#[test]
fn stage_folders_do_not_import_one_another() {
    let mut findings = Vec::new();
    for (name, text) in sources() {
        let Some(stage) = STAGES.iter().find(|stage| name.starts_with(&format!("src/{stage}/"))) else {
            continue;
        };
        for (i, line) in text.lines().enumerate() {
            let other = STAGES.iter().filter(|s| *s != stage && **s != "page");
            if let Some(other) = other.into_iter().find(|s| line.contains(&format!("crate::{s}::"))) {
                findings.push(format!("{name}:{}: {stage} imports {other}", i + 1));
            }
        }
    }
    expect_none("stages are joined in decode.rs, prefill.rs and engine.rs only", findings);
}

#[test]
fn commands_of_the_readme_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let readme = std::fs::read_to_string(root.join("README.md")).unwrap();
    let ci = std::fs::read_to_string(root.join(".ci/run")).unwrap();
    assert!(readme.contains("\ncargo test --workspace\n") && ci.contains("step cargo test --workspace\n"));
    let mut checked = 0;
    for line in readme.lines().filter_map(|l| l.strip_prefix("cargo run --release -- ")) {
        let words = line.split('#').next().unwrap().split_whitespace();
        let command: Vec<&str> = words
            .take_while(|w| w.chars().all(|c| c.is_ascii_lowercase() || c == '-') && !w.starts_with("--"))
            .collect();
        let status = std::process::Command::new(env!("CARGO_BIN_EXE_floe"))
            .args(&command)
            .arg("--help")
            .output()
            .unwrap()
            .status;
        assert!(status.success(), "README: `{line}`");
        checked += 1;
    }
    assert!(checked >= 5);
}
