//! How long candle's threads wait for their next product before they sleep.
//!
//! candle's own default is 25,000 rounds, about half a millisecond, on the very cores that attention needs between two products.
//! Qwen2.5-Coder-0.5B with 15K tokens on 4 cores: with 25,000 rounds `full` took 11.0 ms of attention a token, `floe` 9.1, and a second gave
//! 12 tokens; with 2,000 rounds 8.9, 6.5 and 14.7. Fewer (100, 1) changed little.

use std::io::{self, Write};
/// Read by candle once, when it starts its threads.
const VARIABLE: &str = "CANDLE_BARRIER_POOL_SPIN_LIMIT";
const ROUNDS: &str = "2000";

/// Starts this process anew with a shorter wait, unless the user has chosen one. Nothing has been read or written yet.
/// A process may not change its own environment once threads run, so it replaces itself; where it cannot, it says so and goes on.
pub fn shorten() {
    if std::env::var_os(VARIABLE).is_none() {
        let error = restart();
        let _ = writeln!(io::stderr(), "note: decoding is slower without {VARIABLE}={ROUNDS}: {error}");
    }
}

/// Returns only where it fails.
#[cfg(unix)]
fn restart() -> io::Error {
    use std::os::unix::process::CommandExt;

    match std::env::current_exe() {
        Ok(program) => {
            let arguments = std::env::args_os().skip(1);
            std::process::Command::new(program).args(arguments).env(VARIABLE, ROUNDS).exec()
        }
        Err(error) => error,
    }
}

#[cfg(not(unix))]
fn restart() -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, "a process cannot replace itself here")
}
