//! The host engine: random models of every family, and real ones where `scripts/fetch-models.sh` has put them.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "tests fail by panicking and say what they skip"
)]

mod families;
#[cfg(feature = "gpu-tests")]
mod gpu;
mod real;
mod tiny;
