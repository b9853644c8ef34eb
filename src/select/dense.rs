//! The two policies without an index: everything, and sinks with window.

use std::ops::Range;

use super::{SelectCost, SelectRequest, SelectScratch, Selector};
use crate::error::Result;
use crate::ids::TokenPos;
use crate::page::ShardPages;
use crate::selection::Selection;

/// What is attended beside sinks and window; nothing has to be remembered for either.
#[derive(Clone, Copy, Debug)]
pub(super) enum Dense {
    /// Everything. The plan takes the exact path for it, so `select` is asked only for completeness.
    Full,
    /// Nothing.
    Window,
}

impl Selector for Dense {
    fn publish(&mut self, _pages: &ShardPages, _tokens: Range<TokenPos>) -> Result<()> {
        Ok(())
    }

    fn truncate(&mut self, num_tokens: TokenPos) -> Result<TokenPos> {
        Ok(num_tokens)
    }

    fn select(
        &self,
        _request: &SelectRequest<'_>,
        _scratch: &mut SelectScratch,
        selection: &mut Selection,
    ) -> Result<SelectCost> {
        if let Self::Full = self {
            let candidates = selection.candidates();
            selection.retrieved.extend(candidates);
        }
        Ok(SelectCost::default())
    }

    fn fork(&self) -> Result<Box<dyn Selector>> {
        Ok(Box::new(*self))
    }

    fn size_bytes(&self) -> usize {
        0
    }
}
