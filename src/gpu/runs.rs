//! Runs of consecutive units in device memory, first fit.

/// Free and taken runs of `0..len`.
#[derive(Debug, Clone)]
pub(super) struct Runs {
    /// Free runs (start, length), ascending, none touching the next.
    free: Vec<(usize, usize)>,
}

impl Runs {
    pub(super) fn new(len: usize) -> Self {
        Self { free: if len == 0 { Vec::new() } else { vec![(0, len)] } }
    }

    /// Start of a run of `len` units that begins at a multiple of `align`.
    pub(super) fn take(&mut self, len: usize, align: usize) -> Option<usize> {
        if len == 0 {
            return Some(0);
        }
        for i in 0..self.free.len() {
            let (start, size) = self.free[i];
            let at = start.next_multiple_of(align);
            if at + len > start + size {
                continue;
            }
            let after = (at + len, start + size - at - len);
            let before = (start, at - start);
            self.free.splice(i..=i, [before, after].into_iter().filter(|run| run.1 > 0));
            return Some(at);
        }
        None
    }

    /// Gives a taken run back.
    pub(super) fn give(&mut self, start: usize, len: usize) {
        if len == 0 {
            return;
        }
        let i = self.free.partition_point(|run| run.0 < start);
        self.free.insert(i, (start, len));
        if i + 1 < self.free.len() && self.free[i].0 + self.free[i].1 == self.free[i + 1].0 {
            self.free[i].1 += self.free.remove(i + 1).1;
        }
        if i > 0 && self.free[i - 1].0 + self.free[i - 1].1 == self.free[i].0 {
            self.free[i - 1].1 += self.free.remove(i).1;
        }
    }

    /// Units that are free.
    pub(super) fn free(&self) -> usize {
        self.free.iter().map(|run| run.1).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_disjoint_and_come_back_whole() {
        let mut runs = Runs::new(1000);
        assert_eq!(Runs::new(0).take(0, 16), Some(0));
        let mut taken = Vec::new();
        for len in [10, 300, 16, 1, 200] {
            let at = runs.take(len, 16).unwrap();
            assert!(at.is_multiple_of(16));
            assert!(taken.iter().all(|&(a, n)| at + len <= a || a + n <= at), "{at} {len} in {taken:?}");
            taken.push((at, len));
        }
        assert_eq!(runs.free(), 1000 - 527);
        assert_eq!(runs.take(600, 1), None);
        for (at, len) in [taken[3], taken[0], taken[4], taken[2], taken[1]] {
            runs.give(at, len);
        }
        assert_eq!(runs.take(1000, 16), Some(0));
    }
}
