//! The two policies without an index: everything, and sinks with window.

use std::ops::Range;

use super::{SelectCost, SelectRequest, SelectScratch, Selector};
use crate::error::Result;
use crate::ids::TokenPos;
use crate::page::ShardPages;
use crate::query::GroupQuery;
use crate::selection::Selection;

/// Full attention. The plan takes the exact path for it, so `select` is asked only for completeness.
pub(super) struct Full;

/// Sinks and window; the rest is dropped.
pub(super) struct Window;

impl Selector for Full {
    fn publish(&mut self, _pages: &ShardPages, _tokens: Range<TokenPos>) -> Result<()> {
        Ok(())
    }

    fn truncate(&mut self, _num_tokens: TokenPos) -> Result<()> {
        Ok(())
    }

    fn select(
        &self,
        _request: &SelectRequest<'_>,
        _scratch: &mut SelectScratch,
        selection: &mut Selection,
    ) -> Result<SelectCost> {
        let candidates = selection.candidates();
        selection.retrieved.extend(candidates);
        Ok(SelectCost::default())
    }

    fn tail(
        &self,
        _query: &GroupQuery<'_>,
        _selection: &Selection,
        _scratch: &mut SelectScratch,
        _out: floe_cuda::StateMut<'_>,
    ) -> Result<SelectCost> {
        Ok(SelectCost::default())
    }

    fn reads_rows(&self) -> bool {
        false
    }

    fn fork(&self) -> Result<Box<dyn Selector>> {
        Ok(Box::new(Self))
    }

    fn snapshot(&self) -> Option<Vec<u8>> {
        None
    }

    fn restored(&self, _bytes: &[u8], _published: TokenPos) -> Result<Box<dyn Selector>> {
        self.fork()
    }

    fn size_bytes(&self) -> usize {
        0
    }
}

impl Selector for Window {
    fn publish(&mut self, _pages: &ShardPages, _tokens: Range<TokenPos>) -> Result<()> {
        Ok(())
    }

    fn truncate(&mut self, _num_tokens: TokenPos) -> Result<()> {
        Ok(())
    }

    fn select(
        &self,
        _request: &SelectRequest<'_>,
        _scratch: &mut SelectScratch,
        _selection: &mut Selection,
    ) -> Result<SelectCost> {
        Ok(SelectCost::default())
    }

    fn tail(
        &self,
        _query: &GroupQuery<'_>,
        _selection: &Selection,
        _scratch: &mut SelectScratch,
        _out: floe_cuda::StateMut<'_>,
    ) -> Result<SelectCost> {
        Ok(SelectCost::default())
    }

    fn reads_rows(&self) -> bool {
        false
    }

    fn fork(&self) -> Result<Box<dyn Selector>> {
        Ok(Box::new(Self))
    }

    fn snapshot(&self) -> Option<Vec<u8>> {
        None
    }

    fn restored(&self, _bytes: &[u8], _published: TokenPos) -> Result<Box<dyn Selector>> {
        self.fork()
    }

    fn size_bytes(&self) -> usize {
        0
    }
}
