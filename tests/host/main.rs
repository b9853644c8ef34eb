//! The host engine: random models of every family, and real ones where `scripts/fetch-models.sh` has put them.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod families;
mod real;
mod tiny;
