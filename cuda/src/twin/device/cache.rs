//! Twin of the device kernels of `ops::cache`: the same tables in host memory, one token at a time.

use std::collections::HashMap;

use super::HostRotation;
use crate::KvElem;
use crate::ops::cache::{BatchEntry, CacheShape, SequencePlace};

/// Slots that are looked at in one step, the threads that look at them, and ages that are told apart, as in `cache_resolve.cu`.
const SLOTS_AT_ONCE: usize = 8192;
const THREADS: usize = 512;
const AGE_MAX: u32 = 1023;
const NONE: u32 = u32::MAX;

/// A token in host memory: sequence, kv head, position.
pub type WarmRow = (usize, usize, usize);

/// Rows, slots and host memory of one layer.
#[derive(Debug, Clone)]
pub struct HostCache<E> {
    /// Heads and fixed parts.
    pub shape: CacheShape,
    /// All sequences.
    pub places: Vec<SequencePlace>,
    /// [rows, 2, head_dim].
    pub kv: Vec<E>,
    /// Every row that was stored, key then value.
    pub warm: HashMap<WarmRow, Vec<E>>,
    /// Row of a token, `[16 pages]`; `u32::MAX` = none.
    pub row_of_token: Vec<u32>,
    /// Token of a row, `[rows]`.
    pub token_of_row: Vec<u32>,
    /// Tick of the last step that attended a row, `[rows]`.
    pub used: Vec<u32>,
    /// [sequences, heads] first slot to look at.
    pub hand: Vec<u32>,
}

/// What `resolve` answers: the rows of each item, and what has to be fetched into which row.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resolved {
    /// Rows to attend, by item, in order.
    pub lists: Vec<Vec<u32>>,
    /// Rows of host memory and where they go, in no order.
    pub fetch: Vec<(WarmRow, u32)>,
}

impl<E: KvElem> HostCache<E> {
    /// Empty tables for `rows` rows and `pages` pages.
    pub fn new(shape: CacheShape, places: Vec<SequencePlace>, rows: usize, pages: usize) -> Self {
        let hand = vec![0; places.len() * shape.heads];
        Self {
            kv: vec![E::from_f32(0.0); rows * shape.row_len()],
            warm: HashMap::new(),
            row_of_token: vec![NONE; pages * 16],
            token_of_row: vec![NONE; rows],
            used: vec![0; rows],
            hand,
            shape,
            places,
        }
    }

    /// Row of a token that is in its place.
    pub fn row_of(&self, sequence: usize, head: usize, token: usize) -> usize {
        let (place, shape) = (&self.places[sequence], &self.shape);
        let within = if place.slots == SequencePlace::DENSE || token < shape.sinks {
            token
        } else {
            shape.sinks + token % shape.ring
        };
        place.rows as usize + head * place.rows_each as usize + within
    }

    /// Pages that a step with so many tokens selects from.
    pub fn published(&self, tokens: usize) -> usize {
        tokens.saturating_sub(self.shape.window + 1) / 16
    }

    /// Stores tokens from `first` on: `k` and `v` [run, heads, head_dim].
    pub fn ingest(&mut self, sequence: usize, first: usize, k: &[E], v: &[E]) {
        let (heads, d) = (self.shape.heads, self.shape.head_dim);
        for (i, (k, v)) in k.chunks(d).zip(v.chunks(d)).enumerate() {
            let (token, head) = (first + i / heads, i % heads);
            self.warm.insert((sequence, head, token), [k, v].concat());
            self.place(sequence, head, token);
        }
    }

    /// Copies a row from host memory to its place, if it has one.
    pub fn place(&mut self, sequence: usize, head: usize, token: usize) {
        let place = &self.places[sequence];
        if place.slots == SequencePlace::DENSE && token >= place.rows_each as usize {
            return;
        }
        let (at, len) = (self.row_of(sequence, head, token), self.shape.row_len());
        if let Some(row) = self.warm.get(&(sequence, head, token)) {
            self.kv[at * len..(at + 1) * len].copy_from_slice(row);
        }
    }

    /// Mean key and mean value of a page, rounded to `E`.
    pub fn means(&self, sequence: usize, head: usize, page: usize) -> Vec<f32> {
        let mut sums = vec![0.0f64; self.shape.row_len()];
        for row in (page * 16..page * 16 + 16).filter_map(|token| self.warm.get(&(sequence, head, token))) {
            sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(x.to_f32()));
        }
        sums.iter().map(|sum| E::from_f32((sum / 16.0) as f32).to_f32()).collect()
    }

    /// Mean square of the coordinates of a page's key residuals.
    pub fn spread(&self, sequence: usize, head: usize, page: usize) -> f64 {
        let d = self.shape.head_dim;
        let means = self.means(sequence, head, page);
        let rows = (page * 16..page * 16 + 16).filter_map(|token| self.warm.get(&(sequence, head, token)));
        let residuals = rows.flat_map(|row| row[..d].iter().zip(&means).map(|(x, mean)| x.to_f32() - mean));
        residuals.map(|x| f64::from(x).powi(2)).sum::<f64>() / (16 * d) as f64
    }

    /// Rotated residual of a token's key (`value`: value) to its page's mean.
    pub fn rotated(
        &self,
        (sequence, head, token): WarmRow,
        value: bool,
        rotation: &HostRotation<'_>,
    ) -> Vec<f64> {
        let d = self.shape.head_dim;
        let means = self.means(sequence, head, token / 16);
        let half = if value { d..2 * d } else { 0..d };
        let Some(row) = self.warm.get(&(sequence, head, token)) else { return vec![0.0; d] };
        let residual: Vec<f64> = row[half.clone()]
            .iter()
            .zip(&means[half])
            .map(|(x, mean)| f64::from(x.to_f32() - mean))
            .collect();
        rotation.rotate(&residual)
    }

    /// Rows for what each item attends. `found` are tokens (`16 page + place`) by item.
    pub fn resolve(&mut self, batch: &[BatchEntry], found: &[Vec<u32>]) -> Resolved {
        let mut answer = Resolved::default();
        for (item, found) in found.iter().enumerate() {
            let (entry, head) = (batch[item / self.shape.heads], item % self.shape.heads);
            if entry.tokens == 0 || entry.exact == 1 {
                answer.lists.push(Vec::new());
                continue;
            }
            let (sequence, tokens) = (entry.sequence as usize, entry.tokens as usize);
            let place = self.places[sequence];
            let sinks = self.shape.sinks.min(tokens);
            let newest = (self.published(tokens).min(place.pages_each as usize) * 16).max(sinks);
            let fixed = (0..sinks).chain(newest..tokens);
            let mut list: Vec<u32> = fixed.map(|token| self.row_of(sequence, head, token) as u32).collect();
            let first_token = (place.pages as usize + head * place.pages_each as usize) * 16;
            if place.slots == SequencePlace::DENSE {
                let base = place.rows as usize + head * place.rows_each as usize;
                list.extend(found.iter().map(|token| (base + *token as usize - first_token) as u32));
            } else {
                self.resolve_slots((sequence, head), entry.tick, found, (&mut list, &mut answer.fetch));
            }
            answer.lists.push(list);
        }
        answer
    }

    fn resolve_slots(
        &mut self,
        (sequence, head): (usize, usize),
        tick: u32,
        found: &[u32],
        (list, fetch): (&mut Vec<u32>, &mut Vec<(WarmRow, u32)>),
    ) {
        let place = self.places[sequence];
        let first_token = (place.pages as usize + head * place.pages_each as usize) * 16;
        let start = list.len();
        for token in found {
            let row = self.row_of_token[*token as usize];
            if row != NONE {
                self.used[row as usize] = tick;
            }
            list.push(row);
        }
        let missing: Vec<usize> = (start..list.len()).filter(|i| list[*i] == NONE).collect();
        let tokens: Vec<u32> = missing.iter().map(|entry| found[entry - start]).collect();
        for (entry, (token, row)) in missing.iter().zip(self.give_slots((sequence, head), (tick, 0), &tokens))
        {
            list[*entry] = row;
            fetch.push(((sequence, head, token as usize - first_token), row));
        }
    }

    /// Slots for tokens that a later step may want, by item; those that were used before the last step.
    pub fn resolve_ahead(&mut self, batch: &[BatchEntry], found: &[Vec<u32>]) -> Vec<(WarmRow, u32)> {
        let mut fetch = Vec::new();
        for (item, found) in found.iter().enumerate() {
            let (entry, head) = (batch[item / self.shape.heads], item % self.shape.heads);
            let sequence = entry.sequence as usize;
            let place = self.places[sequence];
            if entry.tokens == 0 || place.slots == SequencePlace::DENSE {
                continue;
            }
            let mut missing = Vec::new();
            for token in found {
                match self.row_of_token[*token as usize] {
                    NONE => missing.push(*token),
                    row => self.used[row as usize] = self.used[row as usize].max(entry.tick - 1),
                }
            }
            let first_token = (place.pages as usize + head * place.pages_each as usize) * 16;
            let given = self.give_slots((sequence, head), (entry.tick, 1), &missing);
            fetch.extend(
                given.into_iter().map(|(token, row)| ((sequence, head, token as usize - first_token), row)),
            );
        }
        fetch
    }

    /// Slots for `missing` tokens in the order of those, as many as were used longer than `ahead` steps ago.
    fn give_slots(
        &mut self,
        (sequence, head): (usize, usize),
        (tick, ahead): (u32, u32),
        missing: &[u32],
    ) -> Vec<(u32, u32)> {
        if missing.is_empty() {
            return Vec::new();
        }
        let place = self.places[sequence];
        let first_slot =
            place.rows as usize + head * place.rows_each as usize + self.shape.sinks + self.shape.ring;
        // The window of slots from the hand on; oldest ages first, equal ages by the thread that looks at them, those above the
        // last whole age mixed.
        let slots = place.slots as usize;
        let window = slots.min(SLOTS_AT_ONCE);
        let hand = &mut self.hand[sequence * self.shape.heads + head];
        let at = |i: usize| first_slot + (*hand as usize + i) % slots;
        let age = |i: usize| tick.wrapping_sub(self.used[at(i)]).min(AGE_MAX);
        let mut by_age: Vec<usize> = (0..window).filter(|i| age(*i) > ahead).collect();
        let looked_at = |i: &usize| (i % THREADS, *i);
        by_age.sort_by_key(|i| (std::cmp::Reverse(age(*i)), looked_at(i)));
        let limit = by_age.get(missing.len() - 1).map_or(0, |i| age(*i));
        let (mut chosen, same): (Vec<usize>, Vec<usize>) =
            by_age.into_iter().filter(|i| age(*i) >= limit).partition(|i| age(*i) > limit);
        chosen.sort_unstable_by_key(looked_at);
        chosen.extend(same);
        let chosen: Vec<usize> = chosen.iter().take(missing.len()).map(|i| at(*i)).collect();
        *hand = ((*hand as usize + window) % slots) as u32;
        let mut given = Vec::new();
        for (&token, row) in missing.iter().zip(chosen) {
            let old = self.token_of_row[row];
            if old != NONE && self.row_of_token[old as usize] == row as u32 {
                self.row_of_token[old as usize] = NONE;
            }
            self.token_of_row[row] = token;
            self.row_of_token[token as usize] = row as u32;
            self.used[row] = tick - ahead;
            given.push((token, row as u32));
        }
        given
    }
}

/// Levels of a rotated residual at `bits` (1 or 2) and their scale, as `floe_index::sketch` encodes: signs with the mean magnitude,
/// or the best of six uniform steps.
pub fn encode(x: &[f64], bits: usize) -> (Vec<i32>, f64) {
    let n = x.len() as f64;
    let levels = |step: f64| -> Vec<i32> {
        x.iter().map(|x| 2 * ((x / step + 2.0).clamp(0.0, 3.0) as i32) - 3).collect()
    };
    let stored = |scale: f64| half::f16::from_f64(scale).to_f64();
    if bits == 1 {
        let scale = stored(x.iter().map(|x| x.abs()).sum::<f64>() / n);
        return (x.iter().map(|x| if *x >= 0.0 { 1 } else { -1 }).collect(), scale);
    }
    let rms = (x.iter().map(|x| x * x).sum::<f64>() / n).sqrt();
    let mut best = (-1.0, 0.0);
    for step in [0.70, 0.85, 1.0, 1.15, 1.35, 1.6] {
        let levels = levels(step * rms);
        let along: f64 = x.iter().zip(&levels).map(|(x, level)| x * f64::from(*level)).sum();
        let square: f64 = levels.iter().map(|level| f64::from(level * level)).sum();
        if along * along / square > best.0 {
            best = (along * along / square, along / square);
        }
    }
    let scale = stored(best.1);
    (levels(2.0 * scale), scale)
}
