//! The hot tier's memory on the CPU backend: slots in host memory, and the rows of one step wherever they lie.

use floe_cuda::{KvElem, KvRows};
use half::{bf16, f16};

use super::hot::Unit;
use super::warm::{PageSlabs, ShardPages};
use crate::ids::TokenPos;
use crate::shape::{KvDtype, PageShape};

/// In a [`SlotTable`]: the token is in no slot and is read from the warm tier.
pub const WARM: u32 = u32::MAX;

/// Page table of one step and shard in CSR form: unit `i` of the step lies in slot `slots[i]`, and its attended tokens are
/// `places[indptr[i]..indptr[i + 1]]`, row numbers in the memory of the slots. Keeps its memory from step to step.
#[derive(Clone, Debug, Default)]
pub struct SlotTable {
    /// Distinct units of the step, ascending, `[num_units]`.
    pub units: Vec<u32>,
    /// `[num_units + 1]`, first entry 0.
    pub indptr: Vec<u32>,
    /// Slot of each unit, `[num_units]`; [`WARM`] = in none.
    pub slots: Vec<u32>,
    /// Row of each attended token in the memory of the slots, `[num_tokens]`; [`WARM`] = in none.
    pub places: Vec<u32>,
}

impl SlotTable {
    /// Takes the units of ascending `tokens`; slots and places follow with [`Self::place`].
    pub fn resolve(&mut self, unit: Unit, tokens: &[TokenPos]) {
        let per_unit = unit.tokens() as u32;
        self.units.clear();
        self.indptr.clear();
        for (i, token) in tokens.iter().enumerate() {
            if self.units.last() != Some(&(token / per_unit)) {
                self.units.push(token / per_unit);
                self.indptr.push(i as u32);
            }
        }
        self.indptr.push(tokens.len() as u32);
        if self.units.is_empty() {
            self.indptr.clear();
            self.indptr.push(0);
        }
    }

    /// Sets where the units lie, in their order.
    pub fn place(&mut self, unit: Unit, tokens: &[TokenPos], slots: &[u32]) {
        let per_unit = unit.tokens() as u32;
        self.slots.clear();
        self.slots.extend_from_slice(slots);
        self.places.clear();
        for (slot, span) in slots.iter().zip(self.indptr.windows(2)) {
            let tokens = &tokens[span[0] as usize..span[1] as usize];
            let place = |t: &TokenPos| if *slot == WARM { WARM } else { slot * per_unit + t % per_unit };
            self.places.extend(tokens.iter().map(place));
        }
    }
}

/// Memory of one shard's slots, `[num_slots * unit tokens, 2, head_dim]`.
#[derive(Debug)]
pub enum SlotMemory {
    /// bfloat16 rows
    Bf16(Vec<bf16>),
    /// binary16 rows
    F16(Vec<f16>),
    /// binary32 rows
    F32(Vec<f32>),
}

impl SlotMemory {
    /// Zeroed memory for `num_rows` rows.
    #[must_use]
    pub fn new(num_rows: usize, shape: PageShape) -> Self {
        let elems = num_rows * shape.row_elems();
        match shape.dtype() {
            KvDtype::Bf16 => Self::Bf16(vec![bf16::ZERO; elems]),
            KvDtype::F16 => Self::F16(vec![f16::ZERO; elems]),
            KvDtype::F32 => Self::F32(vec![0.0; elems]),
        }
    }

    /// Element type of the rows.
    #[must_use]
    pub fn dtype(&self) -> KvDtype {
        match self {
            Self::Bf16(_) => KvDtype::Bf16,
            Self::F16(_) => KvDtype::F16,
            Self::F32(_) => KvDtype::F32,
        }
    }

    /// Copies unit `number` of `pages`, as far as it is filled, into `slot`.
    pub(crate) fn fill(&mut self, slot: u32, (unit, number): (Unit, u32), pages: &ShardPages) {
        match (self, pages) {
            (Self::Bf16(memory), ShardPages::Bf16(rows)) => fill(memory, slot, (unit, number), rows),
            (Self::F16(memory), ShardPages::F16(rows)) => fill(memory, slot, (unit, number), rows),
            (Self::F32(memory), ShardPages::F32(rows)) => fill(memory, slot, (unit, number), rows),
            _ => unreachable!("slots and pages of a shard are made from one shape"),
        }
    }
}

fn fill<E: KvElem>(memory: &mut [E], slot: u32, (unit, number): (Unit, u32), rows: &PageSlabs<E>) {
    let row_elems = 2 * rows.head_dim();
    let first = number as usize * unit.tokens();
    // A slab holds whole pages, so a unit is one run.
    let filled = unit.tokens().min(rows.num_rows() - first) * row_elems;
    let start = slot as usize * unit.tokens() * row_elems;
    memory[start..start + filled].copy_from_slice(&rows.run(first)[..filled]);
}

/// The attended rows of one step in the order of their positions, each from its slot or from the warm tier.
#[derive(Clone, Copy, Debug)]
pub struct HotRows<'a, E> {
    memory: &'a [E],
    warm: &'a PageSlabs<E>,
    tokens: &'a [TokenPos],
    places: &'a [u32],
}

impl<'a, E: KvElem> HotRows<'a, E> {
    pub(crate) fn new(
        memory: &'a [E],
        warm: &'a PageSlabs<E>,
        tokens: &'a [TokenPos],
        places: &'a [u32],
    ) -> Self {
        debug_assert_eq!(tokens.len(), places.len());
        Self { memory, warm, tokens, places }
    }
}

impl<E: KvElem> KvRows for HotRows<'_, E> {
    type Elem = E;

    fn head_dim(&self) -> usize {
        self.warm.head_dim()
    }

    fn num_rows(&self) -> usize {
        self.tokens.len()
    }

    fn run(&self, first: usize) -> &[E] {
        let row_elems = 2 * self.warm.head_dim();
        match self.places[first] {
            WARM => &self.warm.run(self.tokens[first] as usize)[..row_elems],
            place => &self.memory[place as usize * row_elems..][..row_elems],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_lists_every_token_under_its_unit() {
        let tokens = [3, 5, 17, 40, 41, 47];
        let mut table = SlotTable::default();
        table.resolve(Unit::Page, &tokens);
        assert_eq!((&table.units[..], &table.indptr[..]), (&[0, 1, 2][..], &[0, 2, 3, 6][..]));
        table.place(Unit::Page, &tokens, &[4, WARM, 1]);
        assert_eq!(table.places, [67, 69, WARM, 24, 25, 31]);
        table.resolve(Unit::Row, &tokens);
        table.place(Unit::Row, &tokens, &[0, 1, 2, 3, 4, 5]);
        assert_eq!((&table.units[..], &table.places[..]), (&tokens[..], &[0, 1, 2, 3, 4, 5][..]));
        table.resolve(Unit::Row, &[]);
        table.place(Unit::Row, &[], &[]);
        assert_eq!((table.indptr.as_slice(), table.places.len()), (&[0][..], 0));
    }
}
