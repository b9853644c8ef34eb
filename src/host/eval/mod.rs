//! Evaluation against Full-KV: the same model, prompts and questions under each policy.
//!
//! Of every episode the context is prefilled once, exactly; then each policy decodes each question (the question's own
//! tokens included) and its answer, and is truncated back. Full attention goes first: its answers and logits are the
//! reference. Accuracy is that of the policy's own greedy answer; agreement, NLL and KL are measured along the
//! reference's tokens.

mod judge;
mod summary;
mod task;

pub use judge::Distance;
pub use summary::{EvalRow, eval_table, summarise};
pub use task::{Episode, Question, Task, episode};

use serde::{Deserialize, Serialize};

use super::{FloeBackend, HostError, HostResult, KvBackend, Model, Session};
use crate::select::Policy;
use judge::{judge, refer};

/// What to evaluate.
#[derive(Clone, Debug)]
pub struct EvalPlan {
    /// Policies beside full attention.
    pub policies: Vec<Policy>,
    /// Budgets of each.
    pub budgets: Vec<usize>,
    /// Tokens of a context, the questions aside.
    pub context: usize,
    /// Questions of an episode; for perplexity, continuations of [`CONTINUATION_TOKENS`] a sixteenth each.
    pub questions: usize,
}

/// Tokens of the text that perplexity is measured on, after each context.
pub const CONTINUATION_TOKENS: usize = 160;

/// One question under one policy: a line of the results file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Task.
    pub task: String,
    /// Name of the text.
    pub text: String,
    /// Tokens of the context.
    pub context: usize,
    /// Seed of the episode.
    pub episode: u64,
    /// Number of the question.
    pub question: usize,
    /// Policy as given.
    pub policy: String,
    /// Tokens attended exactly.
    pub budget: usize,
    /// Share of the wanted texts in the answer; for perplexity, of tokens that were the likeliest.
    pub score: f64,
    /// The same of full attention.
    pub full_score: f64,
    /// Steps compared.
    pub steps: usize,
    /// Steps whose likeliest token is full attention's.
    pub agreed: usize,
    /// Sum of NLL differences, nats.
    pub nll_delta: f64,
    /// Sum of full attention's NLL, nats.
    pub nll_full: f64,
    /// Sum of KL(full || policy), nats.
    pub kl: f64,
}

/// A question as tokens.
struct Prompt {
    tokens: Vec<u32>,
    question: Option<Question>,
    forced: Vec<u32>,
}

/// Marks where the context ends inside a rendered chat; any text that no context contains.
const MARK: &str = "\u{1}context ends\u{1}";

/// Runs one episode. `kv` is emptied first; `progress` hears of each finished question.
///
/// # Errors
/// [`HostError::Argument`] when the text is too short or the context too long for the model; errors of the backend.
pub fn run_episode(
    model: &Model,
    kv: &mut FloeBackend,
    plan: &EvalPlan,
    (task, text_name, text, seed): (Task, &str, &str, u64),
    progress: &mut dyn FnMut(),
) -> HostResult<Vec<Outcome>> {
    let (context, prompts) = prompts(model, plan, (task, text, seed))?;
    let full: Policy = "full".parse().map_err(|_| HostError::Backend("policy `full` is gone".into()))?;
    let (_, budget) = (full.spec(), plan.budgets.iter().copied().max().unwrap_or(256));
    kv.truncate(0)?;
    kv.set_policy(full, budget)?;
    Session::new(model, kv).prefill(&context, &mut |_| {})?;

    let mut references = Vec::with_capacity(prompts.len());
    for prompt in &prompts {
        let mut session = Session::new(model, kv);
        let of = (&prompt.tokens[..], prompt.question.as_ref(), &prompt.forced[..]);
        references.push(refer(&mut session, model, of)?);
        session.truncate(context.len())?;
        progress();
    }
    let mut outcomes = Vec::new();
    for policy in &plan.policies {
        for &budget in &plan.budgets {
            kv.set_policy(policy.clone(), budget)?;
            kv.publish()?;
            for (number, (prompt, reference)) in prompts.iter().zip(&references).enumerate() {
                let mut session = Session::new(model, kv);
                let of = (&prompt.tokens[..], prompt.question.as_ref());
                let (score, distance) = judge(&mut session, model, of, reference)?;
                session.truncate(context.len())?;
                progress();
                outcomes.push(Outcome {
                    task: task.name().to_owned(),
                    text: text_name.to_owned(),
                    context: plan.context,
                    episode: seed,
                    question: number,
                    policy: policy.spec().to_owned(),
                    budget,
                    score,
                    full_score: reference.score,
                    steps: distance.steps,
                    agreed: distance.agreed,
                    nll_delta: distance.nll_delta,
                    nll_full: distance.nll_full,
                    kl: distance.kl,
                });
            }
        }
    }
    Ok(outcomes)
}

/// Times that [`run_episode`] calls `progress`.
#[must_use]
pub fn num_steps(plan: &EvalPlan, task: Task) -> usize {
    let questions = if task == Task::Perplexity { 1 } else { plan.questions };
    questions * (1 + plan.policies.len() * plan.budgets.len())
}

/// The context and the questions of an episode as tokens, the context at most `plan.context` long.
fn prompts(
    model: &Model,
    plan: &EvalPlan,
    (task, text, seed): (Task, &str, u64),
) -> HostResult<(Vec<u32>, Vec<Prompt>)> {
    let room = model.config().context;
    if plan.context + CONTINUATION_TOKENS > room {
        let reason =
            format!("with {CONTINUATION_TOKENS} tokens for a question it must fit the model's {room}");
        return Err(HostError::argument("context", plan.context, reason));
    }
    let encode = |text: &str| model.tokenizer.encode_more(text);
    if task == Task::Perplexity {
        let chars = 8 * (plan.context + CONTINUATION_TOKENS);
        let chars = chars.min(text.len());
        let tokens = model.tokenizer.encode(&episode(task, text, (chars, 0), seed)?.context)?;
        let (context, rest) = tokens.split_at_checked(plan.context).unwrap_or((&tokens, &[]));
        if rest.len() <= CONTINUATION_TOKENS {
            let reason = format!("{} tokens are needed", plan.context + CONTINUATION_TOKENS + 1);
            return Err(HostError::argument("text", format!("{} tokens", tokens.len()), reason));
        }
        let forced = rest[1..=CONTINUATION_TOKENS].to_vec();
        return Ok((context.to_vec(), vec![Prompt { tokens: rest[..1].to_vec(), question: None, forced }]));
    }
    // Characters a token differ from text to text: shrink until the context fits.
    let mut chars = 4 * plan.context;
    loop {
        let made = episode(task, text, (chars.min(text.len()), plan.questions), seed)?;
        let rendered = match &model.chat {
            Some(chat) => {
                let content = format!("{}\n\n{MARK}", made.context);
                chat.render(&[super::Message { role: "user", content }])?
            }
            None => format!("{}\n\n{MARK}\n", made.context),
        };
        let (before, after) = rendered
            .split_once(MARK)
            .ok_or_else(|| HostError::Backend("the chat template drops the user's message".into()))?;
        let context = model.tokenizer.encode(before)?;
        if context.len() > plan.context {
            chars = chars * plan.context / context.len() - 16;
            continue;
        }
        let prompts = made.questions.into_iter().map(|question| {
            let tokens = encode(&format!("{}{after}{}", question.text, question.lead))?;
            Ok(Prompt { tokens, question: Some(question), forced: Vec::new() })
        });
        return Ok((context, prompts.collect::<HostResult<_>>()?));
    }
}
