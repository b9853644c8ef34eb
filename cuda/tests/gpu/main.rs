//! Device kernels against their twins. Fails without a device.
//!
//! Outputs are poisoned with NaN and lie between guard bands; everything runs twice and must give the same bits.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(dead_code, reason = "each module uses a part of the helpers")]

mod cache;
mod decode;
mod doubt;
mod exact;
mod fetch;
mod real;
mod rig;
mod states;
#[path = "../support/mod.rs"]
mod support;
mod sweep;
mod trees;
