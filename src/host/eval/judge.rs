//! One question under one policy: what it answers, and how far its logits are from full attention's.

use super::task::Question;
use crate::host::{HostResult, Model, Session, largest};

/// A question as tokens, or a text that goes on.
pub(super) enum Prompt {
    /// Tokens up to the end of the first lead, and the tokens of the later leads.
    Ask { tokens: Vec<u32>, leads: Vec<Vec<u32>>, question: Question },
    /// The first token after the context, and those after it.
    GoOn { first: u32, rest: Vec<u32> },
}

/// Full attention's run over one prompt.
pub(super) struct Reference {
    /// Tokens after the prompt: answers and, between them, the later leads.
    steps: Vec<Step>,
    /// Score of the answer.
    pub(super) score: f64,
}

/// One token of a run.
struct Step {
    token: u32,
    /// Number of the blank that it belongs to.
    blank: usize,
    /// Log-probabilities before it, `[vocab]`; none before tokens of a lead, which no model chose.
    log_probs: Option<Vec<f32>>,
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

/// Tokens that fill a blank at most: a word or four digits, and the bracket after them.
const BLANK_TOKENS: usize = 12;

/// What was said in a blank: each token with the logits before it.
type Said = Vec<(u32, Vec<f32>)>;

/// Greedy tokens from `logits` on, until the blank is filled, with the token that ends it; that one is not run.
fn fill(session: &mut Session<'_>, model: &Model, mut logits: Vec<f32>) -> HostResult<Said> {
    let mut said = Said::new();
    loop {
        let token = largest(&logits);
        said.push((token, logits));
        // A bracket or a line ends an answer: small models ramble on.
        let ended =
            model.tokenizer.is_end(token) || model.tokenizer.decode(&[token])?.contains(['\n', ')', ',']);
        if ended || said.len() >= BLANK_TOKENS || session.room() == 0 {
            return Ok(said);
        }
        logits = session.step(token)?;
    }
}

/// Fills the blanks from the one that `logits` stand before; `leads` are those of the blanks after it.
fn fill_all(
    session: &mut Session<'_>,
    model: &Model,
    logits: Vec<f32>,
    leads: &[Vec<u32>],
) -> HostResult<Vec<Said>> {
    let mut blanks = vec![fill(session, model, logits)?];
    for lead in leads {
        let last = blanks.last().and_then(|said| said.last()).map(|(token, _)| *token);
        let fed: Vec<u32> = last.into_iter().chain(lead.iter().copied()).collect();
        let logits = session.steps(&fed, 1)?.pop().unwrap_or_default();
        blanks.push(fill(session, model, logits)?);
    }
    Ok(blanks)
}

/// Full attention's own answers, or its logits along the text that goes on.
pub(super) fn refer(session: &mut Session<'_>, model: &Model, prompt: &Prompt) -> HostResult<Reference> {
    match prompt {
        Prompt::Ask { tokens, leads, question } => {
            let logits = session.steps(tokens, 1)?.pop().unwrap_or_default();
            let blanks = fill_all(session, model, logits, leads)?;
            let answers = blanks.iter().map(|said| text(model, said.iter().map(|(token, _)| *token)));
            let score = question.score(&answers.collect::<HostResult<Vec<_>>>()?);
            let mut steps = Vec::new();
            for (blank, said) in blanks.into_iter().enumerate() {
                if let Some(lead) = blank.checked_sub(1).and_then(|before| leads.get(before)) {
                    steps.extend(lead.iter().map(|token| Step { token: *token, blank, log_probs: None }));
                }
                steps.extend(said.into_iter().map(|(token, logits)| Step {
                    token,
                    blank,
                    log_probs: Some(log_softmax(&logits)),
                }));
            }
            Ok(Reference { steps, score })
        }
        Prompt::GoOn { first, rest } => {
            let all = feed(session, &[*first], rest)?;
            let score = hits(rest, &all);
            let steps = rest.iter().zip(&all).map(|(token, logits)| Step {
                token: *token,
                blank: 0,
                log_probs: Some(log_softmax(logits)),
            });
            Ok(Reference { steps: steps.collect(), score })
        }
    }
}

/// A policy's score and its distance along the reference's tokens.
pub(super) fn judge(
    session: &mut Session<'_>,
    model: &Model,
    prompt: &Prompt,
    reference: &Reference,
) -> HostResult<(f64, Distance)> {
    let start = session.num_tokens();
    let first = match prompt {
        Prompt::Ask { tokens, .. } => tokens.as_slice(),
        Prompt::GoOn { first, .. } => std::slice::from_ref(first),
    };
    let tokens: Vec<u32> = reference.steps.iter().map(|step| step.token).collect();
    let all = feed(session, first, &tokens)?;
    let mut distance = Distance::default();
    let mut parted = None;
    for (at, (logits, step)) in all.iter().zip(&reference.steps).enumerate() {
        let Some(full) = &step.log_probs else { continue };
        let own = log_softmax(logits);
        let (p, full_p) = (f64::from(own[step.token as usize]), f64::from(full[step.token as usize]));
        let agrees = largest(logits) == largest(full);
        if !agrees && parted.is_none() {
            parted = Some(at);
        }
        distance.steps += 1;
        distance.agreed += usize::from(agrees);
        distance.nll_delta += full_p - p;
        distance.nll_full -= full_p;
        distance.kl += full.iter().zip(&own).map(|(f, o)| f64::from(f.exp()) * f64::from(f - o)).sum::<f64>();
    }
    let Prompt::Ask { leads, question, .. } = prompt else { return Ok((hits(&tokens, &all), distance)) };
    let Some(at) = parted else { return Ok((reference.score, distance)) };
    // From where it parts from full attention, the policy goes its own way.
    session.truncate(start + first.len() + at)?;
    let blank = reference.steps[at].blank;
    let rest = fill_all(session, model, all[at].clone(), leads.get(blank..).unwrap_or_default())?;
    let mut answers = vec![Vec::new(); blank + 1];
    for step in reference.steps[..at].iter().filter(|step| step.log_probs.is_some()) {
        answers[step.blank].push(step.token);
    }
    for (i, said) in rest.iter().enumerate() {
        answers.resize(answers.len().max(blank + i + 1), Vec::new());
        answers[blank + i].extend(said.iter().map(|(token, _)| *token));
    }
    let answers = answers.into_iter().map(|tokens| text(model, tokens.into_iter()));
    Ok((question.score(&answers.collect::<HostResult<Vec<_>>>()?), distance))
}

fn text(model: &Model, tokens: impl Iterator<Item = u32>) -> HostResult<String> {
    model.tokenizer.decode(&tokens.collect::<Vec<_>>())
}

/// Decodes the prompt and all but the last of `tokens` under the policy; the logits before each of `tokens`.
fn feed(session: &mut Session<'_>, prompt: &[u32], tokens: &[u32]) -> HostResult<Vec<Vec<f32>>> {
    let fed = [prompt, &tokens[..tokens.len().saturating_sub(1)]].concat();
    session.steps(&fed, tokens.len().max(1))
}

/// Share of the tokens that were the likeliest.
fn hits(tokens: &[u32], all: &[Vec<f32>]) -> f64 {
    let hit = tokens.iter().zip(all).filter(|(token, logits)| largest(logits) == **token).count();
    hit as f64 / tokens.len().max(1) as f64
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
