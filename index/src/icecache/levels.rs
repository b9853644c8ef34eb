//! Which level each token enters: round-robin counts, no chance.

/// Tokens of the level below per token of level 1.
const RATIO_FIRST: usize = 100;
/// The same for all higher levels.
const RATIO_UPPER: usize = 5;

/// Counts by level, and where the next token goes.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Levels {
    /// Tokens of each level, those removed and kept as signposts included.
    pub counts: Vec<usize>,
    pub next: usize,
}

impl Levels {
    /// Level of the next token. A level gets its next token once the one below it has filled what it has; a new level opens over a
    /// top that is full for one.
    pub fn assign(&mut self) -> usize {
        let level = self.next;
        if level == self.counts.len() {
            self.counts.push(0);
        }
        self.counts[level] += 1;
        let ratio = if level == 0 { RATIO_FIRST } else { RATIO_UPPER };
        let is_due = match self.counts.get(level + 1) {
            None => self.counts[level] == ratio,
            Some(&above) => self.counts[level] >= above * ratio,
        };
        self.next = if is_due { level + 1 } else { 0 };
        level
    }

    /// The highest level.
    pub fn top(&self) -> usize {
        self.counts.len().saturating_sub(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_by_level_are_those_of_the_published_code() {
        for (n, wanted) in [
            (12_000, vec![11_851, 119, 24, 5, 1]),
            (131_072, vec![129_450, 1295, 260, 53, 11, 3]),
            (99, vec![99]),
            (101, vec![100, 1]),
        ] {
            let mut levels = Levels::default();
            for _ in 0..n {
                levels.assign();
            }
            assert_eq!(levels.counts, wanted, "{n} tokens");
        }
    }
}
