//! The engine on the device against the engine on the CPU and against full attention. Fails without a device.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod doubt;
mod layers;
mod lifetime;
mod many;
mod prefill;
mod rows;
mod trace;
mod trees;
mod world;
