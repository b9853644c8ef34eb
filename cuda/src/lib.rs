//! Attention kernels of floe.
//!
//! Every kernel has one scalar twin in [`twin`]: short, obvious, with f64 accumulation. The versions in [`cpu`] do the same
//! work with the vector instructions that the machine has; [`Isa`] says which ones and is passed as a value, so that
//! tests and measurements can ask for each. Both check the sizes of everything they are given and answer a wrong one
//! with a [`KernelError`].
//!
//! | kernel | does |
//! |---|---|
//! | [`cpu::sparse_decode`] | attention of one group of query heads over some rows of one shard |
//! | [`cpu::dense_decode`] | the same over a long range, split over threads, same bits for any number of threads |
//! | [`cpu::score_rows`] | scores of a range of rows, for policies that need all of them |
//! | [`cpu::match_scan`], [`cpu::distances`] | nearest earlier query of a ring, for decode reuse |
//! | [`cpu::quant::attend`] | attention over int8, int4 or 2-bit keys and values, for comparison |
//! | [`merge_states`] | log-sum-exp merge of two partial results |
//! | [`append_kv`], [`gather_rows`] | write new rows, copy chosen rows |
//!
//! With the feature `cuda` there are also `device` (the driver, streams, memory) and `ops` (launchers of the kernels in
//! `kernels/*.cu`, which nvcc compiles at build time); their twins are in [`twin::device`]. A machine without a driver gets a
//! typed error from `device::Device::open`.
//!
//! | device kernel | does |
//! |---|---|
//! | `dense_decode`, `sparse_decode` | attention of many groups over contiguous rows, pages (with row masks), or single rows |
//! | `whole_decode` | over all rows of some groups, on the device or in place in host memory |
//! | `fetch_attend` | the same over pages of which some still lie in host memory, stored into their slots on the way |
//! | `fetch_pages`, `fetch_rows` | gather from host-mapped memory |
//! | `ops::sweep` | scores of all pages from their mean keys, or at once of pages and of tokens from 1, 2 or 4 bits a coordinate; the best of them under a budget, by a cluster of blocks; the state of what was not selected, by mean values and value codes, on the tensor cores; attention that runs beside it and joins its state |
//! | `merge_states`, `append_kv`, `match_scan` | join partial states, write new rows, nearest earlier query |
//!
//! Words: a *row* is one token's key followed by its value; a *group* is the query heads that share a kv head; a
//! *state* is `(out, lse)`, lse natural, empty = `(0, -inf)`.
//!
//! Do not use this crate to decide which rows to attend: it knows nothing of pages, indexes or tiers.

mod elem;
mod error;
mod isa;
mod rows;
mod state;

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod device;
#[cfg(feature = "cuda")]
pub mod ops;
pub mod twin;

pub use cpu::{AttendScratch, SplitScratch, dense_decode, score_rows, sparse_decode};
pub use elem::KvElem;
pub use error::KernelError;
pub use isa::{Avx2, Avx512, Isa};
pub use rows::{KvRows, Rows, SliceRows, append_kv, gather_rows};
pub use state::{StateMut, StateRef, merge_states};

/// How scores become weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttendParams {
    /// Factor on `q.k`; usually `1 / sqrt(head_dim)`. Any finite number.
    pub scale: f32,
    /// `Some(cap)`: a scaled score `s` becomes `cap * tanh(s / cap)` (Gemma 2). Finite and above zero.
    pub softcap: Option<f32>,
}

/// One group of query heads against one shard: what every attention kernel reads.
#[derive(Debug)]
pub struct Attend<'a, R> {
    /// Instructions to use.
    pub isa: Isa,
    /// Queries, f32 [group, head_dim], post-RoPE. The group is `q.len() / head_dim`, at least 1.
    pub q: &'a [f32],
    /// Keys and values of the shard.
    pub rows: &'a R,
    /// Scale and softcap.
    pub params: AttendParams,
}

impl<R> Clone for Attend<'_, R> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<R> Copy for Attend<'_, R> {}
