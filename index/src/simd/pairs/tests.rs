//! Every instruction set against the scalar definition, bit for bit, and the definition against its own formula in f64.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;

/// Random pairs: every page is asked by some heads, the third by none.
struct Case {
    group: usize,
    pages: Vec<u32>,
    ends: Vec<u32>,
    heads: Vec<u16>,
    logits: Vec<f32>,
    rng: ChaCha8Rng,
}

impl Case {
    fn new(group: usize) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(group as u64);
        let pages = vec![4u32, 1, 3, 9, 0];
        let (mut ends, mut heads) = (Vec::new(), Vec::new());
        for &page in &pages {
            heads.extend((0..group as u16).filter(|_| page != 3 && rng.random::<bool>()));
            ends.push(heads.len() as u32);
        }
        let mut logits: Vec<f32> =
            (0..heads.len() * LANES).map(|_| 8.0 * rng.random::<f32>() - 4.0).collect();
        for x in logits.iter_mut().step_by(7) {
            *x = f32::NEG_INFINITY;
        }
        Self { group, pages, ends, heads, logits, rng }
    }

    fn pairs(&self) -> Pairs<'_> {
        Pairs { pages: &self.pages, ends: &self.ends, heads: &self.heads }
    }

    fn floats(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| 4.0 * self.rng.random::<f32>() - 2.0).collect()
    }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

fn same<T: PartialEq + std::fmt::Debug>(run: impl Fn(Isa) -> T) -> T {
    let wanted = run(Isa::Scalar);
    for isa in Isa::all_available() {
        assert_eq!(run(isa), wanted, "{isa:?}");
    }
    wanted
}

#[test]
fn lanes_above_the_limit_leave_the_exponentials() {
    for group in 1..=9 {
        let mut case = Case::new(group);
        let (logits, reach) = (case.floats(group * LANES), case.floats(LANES));
        let (limit, boost) = (case.floats(group), case.floats(group));
        let (exps, before) = (case.floats(group * LANES), case.floats(group * LANES));
        let rest: Vec<f32> = (0..LANES).map(|lane| (lane % 3) as f32).collect();
        let (any, masks, left, sums) = same(|isa| {
            let (mut exps, mut sums, mut masks) = (exps.clone(), before.clone(), vec![0u16; group]);
            let limits = Limits { limit: &limit, boost: &boost, reach: &reach };
            let part = Part { logits: &logits, rest: &rest };
            let any = above(isa, part, limits, &mut masks, (&mut exps, &mut sums));
            (any, masks, bits(&exps), bits(&sums))
        });
        assert_eq!(any, masks.iter().fold(0, |any, mask| any | mask));
        for (h, mask) in masks.iter().enumerate() {
            for lane in 0..LANES {
                let at = h * LANES + lane;
                let wanted = rest[lane] > 0.0 && logits[at] + boost[h] * reach[lane] > limit[h];
                assert_eq!(mask >> lane & 1 == 1, wanted);
                let kept = if wanted { 0.0 } else { exps[at] };
                assert_eq!(left[at], kept.to_bits());
                assert_eq!(sums[at], (before[at] + kept * rest[lane]).to_bits());
            }
        }
    }
}

#[test]
fn logits_weights_and_best_scores_have_the_same_bits_on_every_set() {
    for group in 1..=9 {
        let mut case = Case::new(group);
        let num_pages = case.pages.len();
        let page_logits = case.floats(3 * group * LANES);
        let homes: Vec<u32> = (0..num_pages as u32).map(|i| i % 3 * (group * LANES) as u32 + i).collect();
        let (of_page, by, spread) = (case.floats(num_pages), case.floats(group), case.floats(group));
        let left = vec![0xFFFF, 0x00F1, 0, 0x8000, 0x7FFE];
        let scales: Vec<Scales> = (0..10)
            .map(|_| std::array::from_fn(|_| half::f16::from_f32(case.rng.random()).to_bits()))
            .collect();
        let (shift, norm) = (case.floats(group), case.floats(group));
        let case = case;
        let raw: Vec<f32> = case.logits.iter().map(|x| x.max(-4.0)).collect();
        let lift_by = Lift {
            pairs: case.pairs(),
            page_logits: &page_logits,
            homes: &homes,
            of_page: &of_page,
            by: &by,
            left: &left,
            scales: &scales,
            spread: &spread,
            shift: &shift,
        };
        let lifted = same(|isa| {
            let (mut logits, mut weights) = (raw.clone(), vec![0.0; raw.len()]);
            let (mut tops, mut mass) = (vec![f32::NEG_INFINITY; group * LANES], vec![0.5; group * LANES]);
            lift(isa, &lift_by, (&mut logits, &mut weights), (&mut tops, &mut mass));
            (bits(&logits), bits(&tops), bits(&weights), bits(&mass))
        });
        // The weights are those that `weigh` gives for the same logits.
        let logits: Vec<f32> = lifted.0.iter().map(|x| f32::from_bits(*x)).collect();
        let again = same(|isa| {
            let mut weights = vec![0.0; logits.len()];
            weigh(isa, &case.heads, &logits, &shift, &mut weights);
            bits(&weights)
        });
        assert_eq!(lifted.2, again);
        for (i, (page, range)) in case.pairs().iter().enumerate() {
            for pair in range {
                let h = usize::from(case.heads[pair]);
                for lane in 0..LANES {
                    let got = f32::from_bits(lifted.0[pair * LANES + lane]);
                    let scale = half::f16::from_bits(scales[page as usize][lane]).to_f32();
                    let base = page_logits[homes[i] as usize + h * LANES] - by[h] * of_page[i];
                    let wanted = raw[pair * LANES + lane] + base + spread[h] * scale * scale;
                    let counts = left[i] >> lane & 1 == 1;
                    assert!(if counts { (got - wanted).abs() < 1e-5 } else { got == f32::NEG_INFINITY });
                }
            }
        }
        let added = same(|isa| {
            let mut added = vec![0.0; case.heads.len()];
            let weights: Vec<f32> = again.iter().map(|x| f32::from_bits(*x)).collect();
            sums(isa, &weights, &mut added);
            bits(&added)
        });
        let (mut exact, mut most) = (vec![0.5f64; group * LANES], vec![f32::NEG_INFINITY; group * LANES]);
        for (pair, &head) in case.heads.iter().enumerate() {
            let (head, mut sum) = (usize::from(head), 0.0);
            for lane in 0..LANES {
                let logit = logits[pair * LANES + lane];
                let weight = f64::from((logit - shift[head]).min(RISE_MAX)).exp();
                let got = f64::from(f32::from_bits(again[pair * LANES + lane]));
                assert!((got - weight).abs() <= 1e-6 * weight.max(1e-30));
                exact[head * LANES + lane] += weight;
                most[head * LANES + lane] = most[head * LANES + lane].max(logit);
                sum += weight;
            }
            assert!((f64::from(f32::from_bits(added[pair])) - sum).abs() <= 1e-5 * sum);
        }
        for (at, exact) in exact.iter().enumerate() {
            assert!((f64::from(f32::from_bits(lifted.3[at])) - exact).abs() <= 1e-5 * exact);
            assert_eq!(f32::from_bits(lifted.1[at]), most[at]);
        }
        let (top, tops) = same(|isa| {
            let (mut top, mut tops) = (vec![0.0; num_pages * LANES], vec![0.0; num_pages]);
            best(isa, &case.pairs(), &case.logits, &norm, (&mut top, &mut tops));
            (bits(&top), bits(&tops))
        });
        for (i, (_, range)) in case.pairs().iter().enumerate() {
            let score = |pair: usize, lane: usize| {
                case.logits[pair * LANES + lane] - norm[usize::from(case.heads[pair])]
            };
            let of_lane =
                |lane: usize| range.clone().map(|pair| score(pair, lane)).fold(f32::NEG_INFINITY, f32::max);
            for lane in 0..LANES {
                assert_eq!(f32::from_bits(top[i * LANES + lane]), of_lane(lane));
            }
            assert_eq!(f32::from_bits(tops[i]), (0..LANES).map(of_lane).fold(f32::NEG_INFINITY, f32::max));
        }
        assert_eq!(case.group, group);
    }
}
