//! Compiles `kernels/*.cu` under the feature `cuda`, one fat binary per file (sm_80, sm_90a, and PTX for newer cards), to be
//! embedded. Fails when nvcc is missing and when a kernel spills more registers than `kernels/spills.txt` grants. A file is
//! compiled again only when it, a header or the compiler has changed. `FLOE_CUDA_TARGETS=sm_90a` compiles for that target alone, for
//! quick builds: the result runs on no other device.

#![allow(clippy::print_stdout, reason = "a build script speaks to cargo on its standard output")]

use std::collections::BTreeMap;
use std::collections::hash_map::DefaultHasher;
use std::fmt::Write as _;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs, thread};

/// Machine code for Ampere and Hopper, and PTX that the driver compiles for anything newer.
const TARGETS: [&str; 3] =
    ["arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_80,code=compute_80"];

/// What the compiler says of one kernel for one target.
#[derive(Default)]
struct Resources {
    registers: u32,
    spills: u32,
}

type Report = BTreeMap<(String, String), Resources>;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    for variable in ["FLOE_NVCC", "CUDA_HOME", "PATH", "FLOE_CUDA_TARGETS"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    println!("cargo:rerun-if-changed=kernels");
    if let Err(error) = build() {
        println!("cargo::error={error}");
        std::process::exit(1);
    }
}

fn build() -> Result<(), String> {
    let nvcc = find_nvcc()?;
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set: run by cargo only")?);
    let sources = files("cu")?;
    let mut common = DefaultHasher::new();
    let targets = targets()?;
    let timeline = env::var_os("CARGO_FEATURE_TIMELINE").is_some();
    (&nvcc, &targets, FLAGS, timeline).hash(&mut common);
    for header in files("cuh")? {
        read(&header)?.hash(&mut common);
    }
    let jobs: Vec<_> = sources
        .iter()
        .map(|source| {
            let (nvcc, source, out, hash) = (nvcc.clone(), source.clone(), out.clone(), common.clone());
            let targets = targets.clone();
            thread::spawn(move || compile((&nvcc, &targets, timeline), &source, &out, hash))
        })
        .collect();
    let mut report = Report::new();
    let mut table = String::from(
        "/// Fat binaries by the stem of their source.\npub(crate) static MODULES: &[(&str, &Image)] = &[\n",
    );
    for (source, job) in sources.iter().zip(jobs) {
        report.extend(job.join().map_err(|_| "a compiler thread panicked")??);
        let stem = stem(source);
        let _ = writeln!(
            table,
            "    (\"{stem}\", &Aligned(*include_bytes!(concat!(env!(\"OUT_DIR\"), \"/{stem}.fatbin\")))),"
        );
    }
    table.push_str("];\n");
    fs::write(out.join("modules.rs"), table).map_err(|e| format!("modules.rs: {e}"))?;
    judge(&report, &out)
}

/// All targets, or those named in the environment.
fn targets() -> Result<Vec<&'static str>, String> {
    let Some(named) = env::var_os("FLOE_CUDA_TARGETS") else { return Ok(TARGETS.to_vec()) };
    let named = named.to_string_lossy().into_owned();
    let known = |name: &str| TARGETS.into_iter().find(|target| target.ends_with(&format!("code={name}")));
    named
        .split(',')
        .map(|name| {
            known(name).ok_or_else(|| {
                format!("FLOE_CUDA_TARGETS names {name}, expected sm_80, sm_90a or compute_80")
            })
        })
        .collect()
}

/// Files of `kernels` with this extension, sorted.
fn files(extension: &str) -> Result<Vec<PathBuf>, String> {
    let mut files: Vec<PathBuf> = fs::read_dir("kernels")
        .map_err(|e| format!("kernels: {e}"))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == extension))
        .collect();
    files.sort();
    Ok(files)
}

fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))
}

/// nvcc: as named, else of the CUDA installation, else on the path, else as `scripts/cuda-toolchain.sh` puts it.
fn find_nvcc() -> Result<PathBuf, String> {
    if let Some(named) = env::var_os("FLOE_NVCC") {
        let path = PathBuf::from(named);
        return if path.is_file() {
            Ok(path)
        } else {
            Err(format!("FLOE_NVCC names {}, which is no file", path.display()))
        };
    }
    let home = env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin"));
    let path: Vec<PathBuf> = env::var_os("PATH").map(|p| env::split_paths(&p).collect()).unwrap_or_default();
    let fetched = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.cuda-toolchain/nvidia/cu13/bin");
    home.into_iter().chain(path).chain([fetched]).map(|folder| folder.join("nvcc")).find(|nvcc| nvcc.is_file()).ok_or_else(|| {
        "the feature `cuda` needs nvcc, which is neither in FLOE_NVCC, CUDA_HOME nor PATH: run scripts/cuda-toolchain.sh to get it"
            .to_owned()
    })
}

fn stem(source: &Path) -> String {
    source.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

/// Flags beside the targets. Images are compressed: they are most of the binary.
const FLAGS: [&str; 7] =
    ["-std=c++17", "-O3", "-lineinfo", "--fatbin", "--compress-mode=size", "-Xptxas", "-v"];

/// Compiles one file, unless it was compiled from the same text before, and returns its kernels' resources. `hash` is that of
/// everything but the file.
fn compile(
    (nvcc, targets, timeline): (&Path, &[&str], bool),
    source: &Path,
    out: &Path,
    mut hash: DefaultHasher,
) -> Result<Report, String> {
    read(source)?.hash(&mut hash);
    let stamp = format!("{:016x}\n", hash.finish());
    let (image, log) =
        (out.join(format!("{}.fatbin", stem(source))), out.join(format!("{}.log", stem(source))));
    if image.is_file()
        && let Ok(known) = fs::read_to_string(&log)
        && let Some(text) = known.strip_prefix(&stamp)
    {
        return Ok(parse(text));
    }
    let mut command = Command::new(nvcc);
    command.args(FLAGS).arg("-o").arg(&image);
    for target in targets {
        command.args(["-gencode", target]);
    }
    if timeline {
        command.arg("-DFLOE_TIMELINE");
    }
    let output = command.arg(source).output().map_err(|e| format!("{} does not run: {e}", nvcc.display()))?;
    let text = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(format!("{}: {}", source.display(), text.replace('\n', " | ")));
    }
    fs::write(&log, format!("{stamp}{text}")).map_err(|e| format!("{}: {e}", log.display()))?;
    Ok(parse(&text))
}

/// Reads the assembler's resource report.
fn parse(text: &str) -> Report {
    let mut report = Report::new();
    let mut current: Option<(String, String)> = None;
    for line in text.lines() {
        if let Some(rest) = line.split_once("Compiling entry function '").map(|x| x.1) {
            let mut parts = rest.split('\'');
            if let (Some(kernel), Some(target)) = (parts.next(), parts.nth(1)) {
                current = Some((kernel.to_owned(), target.to_owned()));
            }
        }
        let Some(key) = &current else { continue };
        let entry = report.entry(key.clone()).or_default();
        let words: Vec<&str> = line.split_whitespace().collect();
        for (i, word) in words.iter().enumerate() {
            let number = || i.checked_sub(1).and_then(|i| words[i].parse::<u32>().ok());
            match *word {
                "registers," | "registers" => entry.registers = number().unwrap_or(entry.registers),
                // "N bytes spill stores, M bytes spill loads"
                "spill" if i >= 2 => entry.spills += words[i - 2].parse::<u32>().unwrap_or(0),
                _ => {}
            }
        }
    }
    report
}

/// Writes the report and refuses spills over the budget.
fn judge(report: &Report, out: &Path) -> Result<(), String> {
    let budget = read(Path::new("kernels/spills.txt"))?;
    let granted = |kernel: &str, target: &str| {
        budget
            .lines()
            .filter_map(|line| {
                let words: Vec<&str> = line.split_whitespace().collect();
                (words.first() == Some(&kernel) && words.get(1) == Some(&target))
                    .then(|| words.get(2)?.parse().ok())
                    .flatten()
            })
            .next()
            .unwrap_or(0)
    };
    let (mut text, mut over) = (String::new(), String::new());
    for ((kernel, target), used) in report {
        let _ = writeln!(text, "{kernel} {target} registers {} spills {}", used.registers, used.spills);
        if used.spills > granted(kernel, target) {
            let _ = write!(
                over,
                " {kernel} {target} spills {} bytes, granted {};",
                used.spills,
                granted(kernel, target)
            );
        }
    }
    let path = out.join("resources.txt");
    fs::write(&path, text).map_err(|e| format!("{}: {e}", path.display()))?;
    if report.is_empty() {
        return Err("the compiler reported no kernel".to_owned());
    }
    if !over.is_empty() {
        return Err(format!("registers spill over the budget of kernels/spills.txt:{over}"));
    }
    let registers = report.values().map(|used| used.registers).max().unwrap_or(0);
    let spills: u32 = report.values().map(|used| used.spills).sum();
    println!(
        "cargo::warning={} kernel images, at most {registers} registers, {spills} spilled bytes: {}",
        report.len(),
        path.display()
    );
    Ok(())
}
