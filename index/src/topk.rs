//! The best entries whose tokens fill a budget.

/// An entry offered for selection.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Ranked {
    pub score: f32,
    /// Place in the scan; the tie break.
    pub place: u32,
    /// Tokens that it would bring.
    pub tokens: u32,
}

/// Keeps a buffer of entries above a rising threshold. Offers must come with increasing `place`, so that an entry equal to
/// the threshold can be dropped: it loses every tie.
#[derive(Debug, Default)]
pub(crate) struct TopK {
    items: Vec<Ranked>,
    budget: usize,
    limit: usize,
    /// Scores at or below this cannot be selected.
    pub threshold: f32,
}

impl TopK {
    /// Starts a selection of at most `budget` tokens.
    pub fn start(&mut self, budget: usize) {
        self.items.clear();
        self.budget = budget;
        self.limit = (budget / 4).max(32);
        self.threshold = if budget == 0 { f32::INFINITY } else { f32::NEG_INFINITY };
    }

    /// Offers an entry.
    pub fn offer(&mut self, item: Ranked) {
        if item.score > self.threshold {
            self.items.push(item);
            if self.items.len() >= self.limit {
                self.cut();
                // Entries of one token each need a buffer of the whole budget.
                self.limit = self.limit.max(2 * self.items.len());
            }
        }
    }

    /// Sorts and drops what lies behind a full budget.
    fn cut(&mut self) {
        self.items.sort_unstable_by(|a, b| b.score.total_cmp(&a.score).then(a.place.cmp(&b.place)));
        let mut tokens = 0usize;
        let full = self.items.iter().position(|item| {
            tokens += item.tokens as usize;
            tokens >= self.budget
        });
        if let Some(last) = full {
            self.items.truncate(last + 1);
            self.threshold = self.items[last].score;
        }
    }

    /// The selection, best first: the shortest prefix that fills the budget.
    pub fn finish(&mut self) -> &[Ranked] {
        self.cut();
        &self.items
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selection_equals_a_full_sort_with_ties_by_place() {
        for budget in [0usize, 1, 7, 100, 5000] {
            let mut state = 1u32;
            let items: Vec<Ranked> = (0..3000)
                .map(|place| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    Ranked { score: (state >> 26) as f32, place, tokens: 1 + (state >> 8) % 16 }
                })
                .collect();
            let mut top = TopK::default();
            top.start(budget);
            items.iter().for_each(|&i| top.offer(i));
            let mut all = items.clone();
            all.sort_by(|a, b| b.score.total_cmp(&a.score).then(a.place.cmp(&b.place)));
            let mut tokens = 0;
            let cut = all.iter().take_while(|i| (tokens < budget, tokens += i.tokens as usize).0).count();
            assert_eq!(top.finish(), &all[..cut], "budget {budget}");
        }
    }
}
