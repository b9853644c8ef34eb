//! When to make an anchor, when to measure, and when to give up.

use super::CalibratedOptions;

/// Labels of every gate before the books are read.
const LABELS_MIN: usize = 64;

/// Labels after which a group without a single open rung rests at once.
const PATIENCE: usize = 96;

/// Steps over which the first verdict is made, and those after a rest: short, so that trying again costs 1.6 % of steps at most.
const TRIAL: u32 = 128;
const RETRIAL: u32 = 32;

/// Steps of the first rest; each later one is twice as long, up to the last.
const REST: u32 = 2048;
const REST_MAX: u32 = 1 << 17;

/// A shard that saves less than one part in so many rests.
const WORTHWHILE: u64 = 32;

/// Steps that an anchor is worth waiting for after a refusal, before the next is made.
const GAP: usize = 4;

/// Counters of one shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pace {
    since_anchor: u32,
    refused: bool,
    /// Steps to rest.
    rest: u32,
    next_rest: u32,
    /// Steps of the trial under way, what they read, and what they would have read.
    steps: u32,
    trial: u32,
    read: u64,
    full: u64,
}

impl Pace {
    pub(super) fn new() -> Self {
        let (since_anchor, refused, rest, next_rest) = (0, false, 0, REST);
        Self { since_anchor, refused, rest, next_rest, steps: 0, trial: TRIAL, read: 0, full: 0 }
    }

    /// Counts a step; whether it is one of rest.
    pub(super) fn rests(&mut self) -> bool {
        let resting = self.rest > 0;
        self.rest = self.rest.saturating_sub(1);
        resting
    }

    pub(super) fn is_resting(&self) -> bool {
        self.rest > 0
    }

    /// Whether the step should make an anchor, whatever it could reuse.
    pub(super) fn anchor_is_due(&self, options: &CalibratedOptions) -> bool {
        let since = self.since_anchor as usize;
        since + 1 >= options.refresh || (self.refused && since + 1 >= GAP.min(options.refresh))
    }

    /// Books a step: what it read of what it would have read without reuse.
    pub(super) fn book(&mut self, event: Event, (read, full): (u64, u64)) {
        match event {
            Event::Anchored => (self.since_anchor, self.refused) = (0, false),
            Event::Reused => self.since_anchor += 1,
            Event::Refused => (self.since_anchor, self.refused) = (self.since_anchor + 1, true),
        }
        (self.read, self.full) = (self.read + read, self.full + full);
    }

    /// Decides whether to go on. `labels`: those of the gate that has fewest; `possible`: whether some rung admits all heads.
    pub(super) fn judge(&mut self, labels: usize, possible: bool) {
        if labels < LABELS_MIN {
            (self.steps, self.read, self.full) = (0, 0, 0);
            return;
        }
        self.steps += 1;
        let hopeless = labels >= PATIENCE && !possible && self.steps >= RETRIAL;
        if !hopeless && self.steps < self.trial {
            return;
        }
        if hopeless || self.read > self.full - self.full / WORTHWHILE {
            self.rest = self.next_rest;
            self.next_rest = (self.next_rest * 2).min(REST_MAX);
            self.trial = RETRIAL;
        } else {
            (self.next_rest, self.trial) = (REST, TRIAL);
        }
        (self.steps, self.read, self.full) = (0, 0, 0);
    }

    pub(super) fn words(&self) -> [u64; 8] {
        let Self { since_anchor, refused, rest, next_rest, steps, trial, read, full } = *self;
        let counts = [since_anchor, u32::from(refused), rest, next_rest, steps, trial].map(u64::from);
        let [a, b, c, d, e, f] = counts;
        [a, b, c, d, e, f, read, full]
    }

    pub(super) fn from_words(words: [u64; 8]) -> Option<Self> {
        let [since_anchor, refused, rest, next_rest, steps, trial, read, full] = words;
        let small = |x: u64| u32::try_from(x).ok();
        Some(Self {
            since_anchor: small(since_anchor)?,
            refused: refused != 0,
            rest: small(rest)?,
            next_rest: small(next_rest)?,
            steps: small(steps)?,
            trial: small(trial)?,
            read,
            full,
        })
    }
}

/// How a step ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// It read everything and left an anchor.
    Anchored,
    /// It gave out a reused part.
    Reused,
    /// It could not, or was not allowed to.
    Refused,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(pace: &mut Pace, steps: usize, read: u64, possible: bool) -> usize {
        let mut rested = 0;
        for _ in 0..steps {
            if pace.rests() {
                rested += 1;
                continue;
            }
            pace.book(Event::Refused, (read, 100));
            pace.judge(200, possible);
        }
        rested
    }

    #[test]
    fn what_saves_goes_on_and_what_does_not_rests_ever_longer() {
        assert_eq!(run(&mut Pace::new(), 10_000, 60, true), 0);
        let mut pace = Pace::new();
        let rested = run(&mut pace, 100_000, 100, true);
        assert!(rested > 98_000, "{rested}");
        let rested = run(&mut Pace::new(), 10_000, 100, false);
        assert!(rested > 9_800, "{rested}");
    }

    #[test]
    fn words_round_trip() {
        let mut pace = Pace::new();
        run(&mut pace, 77, 98, true);
        assert_eq!(Pace::from_words(pace.words()), Some(pace));
    }
}
