//! One question under one policy: what it answers, and how far its logits are from full attention's.

use super::task::Question;
use crate::host::{HostResult, Model, Session, largest};

/// Logits of full attention along one run of tokens.
pub(super) struct Reference {
    /// Tokens fed, one after the other, after the question.
    pub(super) tokens: Vec<u32>,
    /// Log-probabilities before each of `tokens`, `[tokens, vocab]`.
    log_probs: Vec<Vec<f32>>,
    /// Score of the answer.
    pub(super) score: f64,
}

/// Distance from the reference over one run, sums over its steps.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Distance {
    /// Steps compared.
    pub steps: usize,
    /// Steps whose likeliest token is the reference's.
    pub agreed: usize,
    /// `-ln p(token) + ln p_full(token)`.
    pub nll_delta: f64,
    /// `-ln p_full(token)`.
    pub nll_full: f64,
    /// `KL(full || policy)`.
    pub kl: f64,
}

/// Tokens of an answer at most: three six-digit numbers of one token a digit, with words between.
const ANSWER_TOKENS: usize = 40;

/// Decodes the prompt and all but the last of `tokens` under the policy; the logits before each of `tokens`.
fn feed(session: &mut Session<'_>, prompt: &[u32], tokens: &[u32]) -> HostResult<Vec<Vec<f32>>> {
    let fed = [prompt, &tokens[..tokens.len().saturating_sub(1)]].concat();
    session.steps(&fed, tokens.len().max(1))
}

/// Greedy tokens from `logits` on, until the answer ends, with the end token.
fn answer(
    session: &mut Session<'_>,
    model: &Model,
    mut logits: Vec<f32>,
) -> HostResult<(Vec<u32>, Vec<Vec<f32>>)> {
    let (mut tokens, mut all) = (Vec::new(), Vec::new());
    loop {
        let token = largest(&logits);
        tokens.push(token);
        all.push(logits);
        // A line is an answer: small models ramble on.
        let ended = model.tokenizer.is_end(token) || model.tokenizer.decode(&[token])?.contains('\n');
        if ended || tokens.len() >= ANSWER_TOKENS || session.room() == 0 {
            return Ok((tokens, all));
        }
        logits = session.step(token)?;
    }
}

/// Full attention's own answer, or its logits along `forced` tokens.
pub(super) fn refer(
    session: &mut Session<'_>,
    model: &Model,
    (prompt, question, forced): (&[u32], Option<&Question>, &[u32]),
) -> HostResult<Reference> {
    let (tokens, all) = match question {
        Some(_) => {
            let first = session.steps(prompt, 1)?.pop().unwrap_or_default();
            answer(session, model, first)?
        }
        None => (forced.to_vec(), feed(session, prompt, forced)?),
    };
    let log_probs: Vec<Vec<f32>> = all.iter().map(|logits| log_softmax(logits)).collect();
    let score = match question {
        Some(question) => question.score(&model.tokenizer.decode(&tokens)?),
        None => hits(&tokens, &all) as f64 / tokens.len().max(1) as f64,
    };
    Ok(Reference { tokens, log_probs, score })
}

/// A policy's score and its distance along the reference's tokens.
pub(super) fn judge(
    session: &mut Session<'_>,
    model: &Model,
    (prompt, question): (&[u32], Option<&Question>),
    reference: &Reference,
) -> HostResult<(f64, Distance)> {
    let start = session.num_tokens();
    let all = feed(session, prompt, &reference.tokens)?;
    let mut distance = Distance::default();
    let mut parted = None;
    for (step, ((logits, full), token)) in
        all.iter().zip(&reference.log_probs).zip(&reference.tokens).enumerate()
    {
        let own = log_softmax(logits);
        let (p, full_p) = (f64::from(own[*token as usize]), f64::from(full[*token as usize]));
        let agrees = largest(logits) == largest(full);
        if !agrees && parted.is_none() {
            parted = Some(step);
        }
        distance.steps += 1;
        distance.agreed += usize::from(agrees);
        distance.nll_delta += full_p - p;
        distance.nll_full -= full_p;
        distance.kl += full.iter().zip(&own).map(|(f, o)| f64::from(f.exp()) * f64::from(f - o)).sum::<f64>();
    }
    let Some(question) = question else {
        return Ok((hits(&reference.tokens, &all) as f64 / reference.tokens.len().max(1) as f64, distance));
    };
    let Some(step) = parted else { return Ok((reference.score, distance)) };
    // From where it parts from full attention, the policy goes its own way.
    session.truncate(start + prompt.len() + step)?;
    let (rest, _) = answer(session, model, all[step].clone())?;
    let tokens = [&reference.tokens[..step], &rest[..]].concat();
    Ok((question.score(&model.tokenizer.decode(&tokens)?), distance))
}

/// Tokens that were the likeliest.
fn hits(tokens: &[u32], all: &[Vec<f32>]) -> usize {
    tokens.iter().zip(all).filter(|(token, logits)| largest(logits) == **token).count()
}

fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let ln_sum = logits.iter().map(|x| f64::from(x - max).exp()).sum::<f64>().ln() as f32;
    logits.iter().map(|x| x - max - ln_sum).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_softmax_is_a_distribution_and_keeps_the_order() {
        let p = log_softmax(&[1000.0, 1001.0, 990.0]);
        let total: f32 = p.iter().map(|x| x.exp()).sum();
        assert!((total - 1.0).abs() < 1e-6 && p[1] > p[0] && p[0] > p[2]);
    }
}
