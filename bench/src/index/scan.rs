//! The exact scan of every key: the truth for mass and recall, and the time to beat.

use floe_cuda::{Attend, AttendParams, AttendScratch, Isa, SliceRows, score_rows};
use floe_index::Query;

use super::data::Data;

/// Scores of the last query.
#[derive(Default)]
pub struct Scan {
    scratch: AttendScratch,
    /// `[group, n]` logits, or shares after `softmax`.
    scores: Vec<f32>,
    /// `[n]` shares summed over the group.
    mass: Vec<f32>,
    order: Vec<u32>,
}

impl Scan {
    /// Logits of all built tokens, and the `budget` best by mass summed over the group.
    pub fn search(&mut self, data: &Data, query: &Query<'_>, budget: usize) -> anyhow::Result<&[u32]> {
        let n = data.num_built;
        let rows = SliceRows::new(&data.rows, data.dim)?;
        let params = AttendParams { scale: query.scale, softcap: None };
        let attend = Attend { isa: Isa::best(), q: query.q, rows: &rows, params };
        self.scores.resize(query.group * n, 0.0);
        score_rows(&attend, 0..n, &mut self.scratch, &mut self.scores)?;
        self.mass.clear();
        self.mass.resize(n, 0.0);
        for head in self.scores.chunks_exact_mut(n) {
            let max = head.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            head.iter_mut().for_each(|x| *x = (*x - max).exp());
            let total: f64 = head.iter().map(|&x| f64::from(x)).sum();
            let inverse = (1.0 / total) as f32;
            for (x, mass) in head.iter_mut().zip(&mut self.mass) {
                *x *= inverse;
                *mass += *x;
            }
        }
        self.order.clear();
        self.order.extend(0..n as u32);
        if budget < n {
            let mass = &self.mass;
            let better = |a: &u32, b: &u32| mass[*b as usize].total_cmp(&mass[*a as usize]).then(a.cmp(b));
            self.order.select_nth_unstable_by(budget, better);
            self.order.truncate(budget);
        }
        self.order.sort_unstable();
        Ok(&self.order)
    }

    /// Mass that tokens hold, mean over the heads, after `search`.
    pub fn kept(&self, places: impl Iterator<Item = usize> + Clone, group: usize) -> f64 {
        let n = self.mass.len();
        let heads = self.scores.chunks_exact(n);
        let kept = heads.map(|head| places.clone().map(|p| f64::from(head[p])).sum::<f64>());
        kept.sum::<f64>() / group as f64
    }

    /// Part of the best tokens that are among `places`, after `search`.
    pub fn recall(&self, places: impl Iterator<Item = usize>) -> f64 {
        let hits = places.filter(|&p| self.order.binary_search(&(p as u32)).is_ok()).count();
        hits as f64 / self.order.len().max(1) as f64
    }
}
