//! Command line: one file per command. Commands return `anyhow::Result`; only this file decides on exit codes and
//! writes to stderr.

#[cfg(feature = "candle")]
mod eval;
#[cfg(feature = "candle")]
mod generate;
mod kv;
mod profile;
#[cfg(feature = "candle")]
mod record;
mod replay;
#[cfg(feature = "candle")]
mod spin;
mod trace;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use floe::page::file::FileError;
use floe::profile::{LogError, ProfileError};
use floe::replay::ReplayError;
use floe::trace::TraceError;

/// Why `--backend cuda` is refused.
#[cfg(not(feature = "cuda"))]
const NO_CUDA: &str = "needs a build with the feature cuda";

/// Exit code for input or a request that cannot be served as it is; clap's own for a wrong command line.
const EXIT_INPUT: u8 = 2;

/// Exit code for a failure of the machine: disk full, read error.
const EXIT_ENVIRONMENT: u8 = 1;

/// Long-context sparse KV retrieval: replay, measure, inspect.
#[derive(Parser)]
#[command(name = "floe", version, about, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Answer a prompt with a GGUF model whose attention runs through floe.
    #[cfg(feature = "candle")]
    Generate(generate::GenerateArgs),
    /// Record traces of a GGUF model reading a text.
    #[cfg(feature = "candle")]
    Record(record::RecordArgs),
    /// Judge policies by answers and logits against Full-KV, on a GGUF model.
    #[cfg(feature = "candle")]
    Eval(eval::EvalArgs),
    /// Compare policies with full attention on recorded traces.
    Replay(replay::ReplayArgs),
    /// How often would a hot tier of a given size hold what a step needs?
    Profile(profile::ProfileArgs),
    /// Look at saved sequences.
    #[command(subcommand)]
    Kv(kv::KvCommand),
    /// Inspect, cut and synthesise trace files.
    #[command(subcommand)]
    Trace(trace::TraceCommand),
}

/// Runs the command line of this process.
pub fn run() -> ExitCode {
    let cli = Cli::parse();
    #[cfg(feature = "candle")]
    if matches!(cli.command, Command::Generate(_) | Command::Record(_) | Command::Eval(_)) {
        spin::shorten();
    }
    let result = match cli.command {
        #[cfg(feature = "candle")]
        Command::Generate(args) => generate::run(args),
        #[cfg(feature = "candle")]
        Command::Record(args) => record::run(args),
        #[cfg(feature = "candle")]
        Command::Eval(args) => eval::run(args),
        Command::Replay(args) => replay::run(args),
        Command::Profile(args) => profile::run(args),
        Command::Kv(command) => kv::run(command),
        Command::Trace(command) => trace::run(command),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read the output has seen enough, as in `floe trace info * | head`.
        Err(error) if is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            // File names may hold anything; the message stays one line.
            let message = format!("{error:#}").replace(char::is_control, " ");
            // With stderr gone as well, the exit code is all that is left to say it.
            let _ = writeln!(io::stderr(), "error: {message}");
            ExitCode::from(exit_code(&error))
        }
    }
}

/// [`EXIT_INPUT`] for errors that the library blames on its caller, [`EXIT_ENVIRONMENT`] for everything else.
fn exit_code(error: &anyhow::Error) -> u8 {
    let is_input = error.chain().any(|cause| {
        let trace_error = cause.downcast_ref::<TraceError>();
        trace_error.is_some_and(|error| !error.is_environment())
            || cause.downcast_ref::<ProfileError>().is_some_and(|error| !error.is_environment())
            || cause.downcast_ref::<LogError>().is_some_and(|error| !error.is_environment())
            || cause.downcast_ref::<FileError>().is_some_and(|error| !error.is_environment())
            || cause.downcast_ref::<ReplayError>().is_some_and(|error| !error.is_environment())
            || is_host_input(cause)
    });
    if is_input { EXIT_INPUT } else { EXIT_ENVIRONMENT }
}

#[cfg(feature = "candle")]
fn is_host_input(cause: &(dyn std::error::Error + 'static)) -> bool {
    cause.downcast_ref::<floe::host::HostError>().is_some_and(|error| !error.is_environment())
}

#[cfg(not(feature = "candle"))]
fn is_host_input(_cause: &(dyn std::error::Error + 'static)) -> bool {
    false
}

fn is_closed_pipe(error: &anyhow::Error) -> bool {
    // A closed stdout, not a trace file that happens to be a pipe: those errors come wrapped in a TraceError.
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}
