//! The best entries whose tokens fill a budget.

/// Bits of a key below its place: tokens of an entry, 1 to 16.
const TOKEN_BITS: u32 = 5;

/// Entries that room is made for at once at most: a budget of everything need not be filled.
const OFFERS_MAX: usize = 1 << 16;

/// An entry offered for selection, as one integer that sorts best first: score descending, then place ascending, then its
/// number of tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Ranked(u64);

impl Ranked {
    /// `place` must lie below 2^27; the limit on tokens leaves room for that many entries.
    pub fn new(score: f32, place: usize, tokens: usize) -> Self {
        let bits = score.to_bits();
        // Order of f32 as integers: flip all bits of negative numbers, the sign of others; inverted so that best is least.
        let rising = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
        let low = ((place as u32) << TOKEN_BITS) | tokens as u32;
        Self((u64::from(!rising) << 32) | u64::from(low))
    }

    pub fn score(self) -> f32 {
        let rising = !((self.0 >> 32) as u32);
        f32::from_bits(if rising >> 31 == 1 { rising & !(1 << 31) } else { !rising })
    }

    pub fn place(self) -> usize {
        (self.0 as u32 >> TOKEN_BITS) as usize
    }

    fn tokens(self) -> usize {
        (self.0 as usize) & ((1 << TOKEN_BITS) - 1)
    }
}

/// Keeps a buffer of entries above a rising threshold. Offers must come with increasing place, so that an entry equal to the
/// threshold can be dropped: it loses every tie.
#[derive(Debug, Default)]
pub(crate) struct TopK {
    items: Vec<Ranked>,
    /// Tokens of the items.
    tokens: usize,
    budget: usize,
    limit: usize,
    /// Scores at or below this cannot be selected.
    pub threshold: f32,
}

impl TopK {
    /// Starts a selection of at most `budget` tokens.
    pub fn start(&mut self, budget: usize) {
        self.items.clear();
        self.tokens = 0;
        self.budget = budget;
        self.limit = (budget / 4).max(32);
        // Offers of single tokens are cut at twice the budget.
        let most = self.limit.max(budget.saturating_mul(2).min(OFFERS_MAX)) + 1;
        self.items.reserve(most.saturating_sub(self.items.len()));
        self.threshold = if budget == 0 { f32::INFINITY } else { f32::NEG_INFINITY };
    }

    /// Raises the threshold: `scores` are those of single tokens, each of which will be offered if it is above it, and the best
    /// `budget` of them leave no room for any below. `scores` are reordered.
    pub fn expect(&mut self, scores: &mut [f32]) {
        if (1..scores.len()).contains(&self.budget) {
            let (_, last, _) = scores.select_nth_unstable_by(self.budget - 1, |a, b| b.total_cmp(a));
            // The last one itself may be selected.
            self.threshold = self.threshold.max(last.next_down());
        }
    }

    /// Offers an entry whose score is above the threshold.
    pub fn offer(&mut self, item: Ranked) {
        self.items.push(item);
        self.tokens += item.tokens();
        if self.items.len() >= self.limit {
            if self.tokens == self.items.len() {
                self.cut_singles();
            } else {
                self.cut();
                // Entries of one token each need a buffer of the whole budget.
                self.limit = self.limit.max(2 * self.items.len());
            }
        }
    }

    /// `cut` for entries of one token each, which need no order yet.
    fn cut_singles(&mut self) {
        if self.items.len() > self.budget {
            // An empty budget is never offered anything.
            let (_, last, _) = self.items.select_nth_unstable(self.budget - 1);
            self.threshold = last.score();
            self.items.truncate(self.budget);
            self.tokens = self.budget;
        }
        self.limit = self.limit.max(2 * self.budget);
    }

    /// Sorts and drops what lies behind a full budget.
    fn cut(&mut self) {
        self.items.sort_unstable();
        let mut tokens = 0;
        let full = self.items.iter().position(|item| {
            tokens += item.tokens();
            tokens >= self.budget
        });
        if let Some(last) = full {
            self.items.truncate(last + 1);
            self.threshold = self.items[last].score();
        }
        self.tokens = tokens;
    }

    /// The selection, best first: the shortest prefix that fills the budget.
    pub fn finish(&mut self) -> &[Ranked] {
        if self.tokens == self.items.len() {
            // Fewer to sort.
            self.cut_singles();
        }
        self.cut();
        &self.items
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_keeps_score_and_place_and_orders_like_both() {
        let scores = [f32::NEG_INFINITY, -1e30, -2.5, -0.0, 0.0, 1e-30, 3.0, f32::INFINITY];
        for (i, &a) in scores.iter().enumerate() {
            let key = Ranked::new(a, (1 << 27) - 1, 16);
            assert_eq!((key.score().to_bits(), key.place(), key.tokens()), (a.to_bits(), (1 << 27) - 1, 16));
            for &b in &scores[..i] {
                assert!(key < Ranked::new(b, 0, 1), "{a} {b}");
            }
        }
        assert!(Ranked::new(1.0, 3, 16) < Ranked::new(1.0, 4, 1));
    }

    #[test]
    fn selection_equals_a_full_sort_with_ties_by_place() {
        for (budget, most) in [0usize, 1, 7, 100, 5000].into_iter().flat_map(|b| [(b, 16), (b, 1)]) {
            let mut state = 1u32;
            let items: Vec<Ranked> = (0..3000)
                .map(|place| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    Ranked::new((state >> 26) as f32 - 20.0, place, 1 + (state as usize >> 8) % most)
                })
                .collect();
            let mut top = TopK::default();
            top.start(budget);
            for &item in &items {
                if item.score() > top.threshold {
                    top.offer(item);
                }
            }
            let mut all = items.clone();
            all.sort();
            let mut tokens = 0;
            let cut = all.iter().take_while(|i| (tokens < budget, tokens += i.tokens()).0).count();
            assert_eq!(top.finish(), &all[..cut], "budget {budget}");
        }
    }
}
