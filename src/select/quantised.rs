//! Full attention over quantised keys and values: what one would use instead of choosing tokens. Nothing is retrieved;
//! sinks and window are exact as in every policy, and all tokens between them are attended at low precision. The budget
//! has no effect.

use std::ops::Range;

use floe_cuda::cpu::quant::{QuantKind, QuantKv, attend};
use floe_cuda::{Attend, AttendParams, Isa, KvElem};

use super::{SelectCost, SelectRequest, SelectScratch, Selector};
use crate::error::Result;
use crate::ids::TokenPos;
use crate::page::ShardPages;
use crate::query::GroupQuery;
use crate::selection::Selection;

#[derive(Clone)]
pub(super) struct Quantised<E> {
    isa: Isa,
    rows: QuantKv<E>,
}

impl<E: KvElem> Quantised<E> {
    pub(super) fn new(kind: QuantKind, head_dim: usize) -> Result<Self> {
        Ok(Self { isa: Isa::best(), rows: QuantKv::new(kind, head_dim)? })
    }
}

impl<E: KvElem> Selector for Quantised<E> {
    fn publish(&mut self, pages: &ShardPages, tokens: Range<TokenPos>) -> Result<()> {
        let dim = pages.shape().head_dim();
        let (mut key, mut value) = (vec![0.0f32; dim], vec![0.0f32; dim]);
        // The rows are stored as `E` already, so narrowing again changes nothing.
        let narrow = |row: &[f32]| row.iter().map(|x| E::from_f32(*x)).collect::<Vec<E>>();
        for pos in tokens {
            pages.widen_row(pos, &mut key, &mut value);
            self.rows.append(&narrow(&key), &narrow(&value))?;
        }
        Ok(())
    }

    fn truncate(&mut self, num_tokens: TokenPos) -> Result<TokenPos> {
        Ok(self.rows.truncate((num_tokens as usize).min(self.rows.num_rows()))? as TokenPos)
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
        query: &GroupQuery<'_>,
        selection: &Selection,
        scratch: &mut SelectScratch,
        out: floe_cuda::StateMut<'_>,
    ) -> Result<SelectCost> {
        let between = selection.candidates();
        let params = AttendParams { scale: query.scale, softcap: None };
        let request = Attend { isa: self.isa, q: query.q, rows: &self.rows, params };
        attend(&request, between.start as usize..between.end as usize, &mut scratch.quant, out)?;
        Ok(SelectCost { bytes_read: self.rows.size_bytes() * between.len() / self.rows.num_rows().max(1) })
    }

    fn fork(&self) -> Result<Box<dyn Selector>> {
        Ok(Box::new(self.clone()))
    }

    fn size_bytes(&self) -> usize {
        self.rows.size_bytes()
    }
}
