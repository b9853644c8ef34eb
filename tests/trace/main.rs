//! Trace files from outside: through the library's public interface and through the command.

mod damage;
mod format;
mod raw_file;
mod recorded;
mod slice;
mod synth;

use std::process::Command;

/// Exit code, stdout and stderr of `floe` with these arguments.
fn floe(args: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_floe")).args(args).output().expect("the command starts");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    (output.status.code(), text(output.stdout), text(output.stderr))
}
