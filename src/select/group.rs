//! Scores of a GQA group: one number per candidate, shared by the query heads.

/// Turns `scores` `[group, n]` (logits) into one score per candidate: the maximum over the heads of the log-softmax over
/// the candidates. Every head has a say in proportion to how sharply it asks, whatever its logit scale. In the log
/// domain, because bounds far apart would all underflow to the same zero share. `[n]` into `out`.
pub(super) fn max_of_log_softmax(scores: &[f32], group: usize, out: &mut Vec<f32>) {
    let n = scores.len() / group;
    out.clear();
    out.resize(n, f32::NEG_INFINITY);
    if n == 0 {
        return;
    }
    for head in scores.chunks_exact(n) {
        let max = head.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let lse = max + head.iter().map(|x| f64::from((x - max).exp())).sum::<f64>().ln() as f32;
        out.iter_mut().zip(head).for_each(|(o, x)| *o = o.max(x - lse));
    }
}

/// Replaces logits by `exp(x - max)` and returns their sum (at least 1, since the maximum gives 1).
pub(super) fn softmax_in_place(logits: &mut [f32]) -> f32 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut total = 0.0f64;
    for x in logits.iter_mut() {
        *x = (*x - max).exp();
        total += f64::from(*x);
    }
    total as f32
}

/// Fills `order` with the indices of the `k` largest scores, largest first, ties by index.
pub(super) fn top_k(scores: &[f32], k: usize, order: &mut Vec<u32>) {
    order.clear();
    order.extend(0..scores.len() as u32);
    let larger = |a: &u32, b: &u32| scores[*b as usize].total_cmp(&scores[*a as usize]).then(a.cmp(b));
    if k < order.len() {
        if k > 0 {
            order.select_nth_unstable_by(k - 1, larger);
        }
        order.truncate(k);
    }
    order.sort_unstable_by(larger);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn top_k_is_sorted_and_breaks_ties_by_index() {
        let scores = [1.0, 3.0, 3.0, 0.0, 2.0];
        let mut order = Vec::new();
        top_k(&scores, 3, &mut order);
        assert_eq!(order, [1, 2, 4]);
        top_k(&scores, 0, &mut order);
        assert!(order.is_empty());
        top_k(&scores, 9, &mut order);
        assert_eq!(order, [1, 2, 4, 0, 3]);
    }

    #[test]
    fn a_sharp_head_outvotes_a_flat_one() {
        let scores = [10.0, 0.0, 0.0, 0.0, 0.1, 0.2];
        let mut out = Vec::new();
        max_of_log_softmax(&scores, 2, &mut out);
        assert!(out[0] > -0.01 && out[2] > out[1] && out[2] < -0.9, "{out:?}");
    }

    #[test]
    fn candidates_far_below_the_best_keep_their_order() {
        let mut out = Vec::new();
        max_of_log_softmax(&[0.0, -500.0, -400.0], 1, &mut out);
        assert!(out[2] > out[1], "{out:?}");
    }
}
