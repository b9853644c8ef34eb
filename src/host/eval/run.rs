//! One episode: one prefill, then every policy and question.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::build::episode;
use super::judge::{Prompt, judge, refer};
use super::task::Task;
use crate::host::{FloeBackend, HostError, HostResult, KvBackend, Model, Session};
use crate::select::Policy;

/// What to evaluate.
#[derive(Clone, Debug)]
pub struct EvalPlan {
    /// Policies beside full attention.
    pub policies: Vec<Policy>,
    /// Budgets of each.
    pub budgets: Vec<usize>,
    /// Tokens of a context, the questions aside.
    pub context: usize,
    /// Questions of each task about a context.
    pub questions: usize,
    /// Folder where prefilled contexts are kept and looked for; `None` = every episode is prefilled.
    pub kv_cache: Option<PathBuf>,
}

/// Tokens after each context that perplexity is measured on.
pub const PERPLEXITY_TOKENS: usize = 192;

/// Tokens that questions and answers need at most.
const QUESTION_TOKENS: usize = 160;

/// One context and what is asked about it.
#[derive(Clone, Copy, Debug)]
pub struct EpisodeSpec<'a> {
    /// Tasks that share the context; see [`Task::plants`].
    pub tasks: &'a [Task],
    /// Name of the text, for the results.
    pub text_name: &'a str,
    /// The text.
    pub text: &'a str,
    /// Seed.
    pub seed: u64,
}

/// What [`run_episode`] tells while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Prompt tokens are done: how many, of how many.
    Prefill(usize, usize),
    /// A question is done.
    Question,
}

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
    /// First layers that stayed dense.
    pub dense_layers: usize,
    /// Share of the blanks that were filled rightly; for perplexity, of tokens that were the likeliest.
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

/// Runs one episode. What `kv` held is forgotten; `progress` hears of the prefill and of each finished question.
///
/// # Errors
/// [`HostError::Argument`] when the text is too short or the context too long for the model; errors of the backend, and
/// of kept contexts that cannot be read or written.
pub fn run_episode(
    model: &Model,
    kv: &mut FloeBackend,
    plan: &EvalPlan,
    spec: EpisodeSpec<'_>,
    progress: &mut dyn FnMut(Progress),
) -> HostResult<Vec<Outcome>> {
    let (context, prompts) = prompts(model, plan, spec)?;
    let full: Policy = "full".parse().map_err(|_| HostError::Backend("policy `full` is gone".into()))?;
    let budget = plan.budgets.iter().copied().max().unwrap_or(256);
    kv.set_policy(full, budget)?;
    read_context(model, kv, (plan, &context), progress)?;

    let mut references = Vec::with_capacity(prompts.len());
    for (_, prompt) in &prompts {
        let mut session = Session::new(model, kv);
        references.push(refer(&mut session, model, prompt)?);
        session.truncate(context.len())?;
        progress(Progress::Question);
    }
    let mut outcomes = Vec::new();
    for policy in &plan.policies {
        for &budget in &plan.budgets {
            kv.set_policy(policy.clone(), budget)?;
            kv.publish()?;
            for (number, ((task, prompt), reference)) in prompts.iter().zip(&references).enumerate() {
                let mut session = Session::new(model, kv);
                let (score, distance) = judge(&mut session, model, prompt, reference)?;
                session.truncate(context.len())?;
                progress(Progress::Question);
                outcomes.push(Outcome {
                    task: task.name().to_owned(),
                    text: spec.text_name.to_owned(),
                    context: plan.context,
                    episode: spec.seed,
                    question: number,
                    policy: policy.spec().to_owned(),
                    budget,
                    dense_layers: kv.config().dense_layers,
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

/// Questions that [`run_episode`] tells of.
#[must_use]
pub fn num_steps(plan: &EvalPlan, tasks: &[Task]) -> usize {
    let of = |task: &Task| if *task == Task::Perplexity { 1 } else { plan.questions };
    tasks.iter().map(of).sum::<usize>() * (1 + plan.policies.len() * plan.budgets.len())
}

/// Fills `kv` with the context: from a kept one where there is one, else by prefill.
fn read_context(
    model: &Model,
    kv: &mut FloeBackend,
    (plan, context): (&EvalPlan, &[u32]),
    progress: &mut dyn FnMut(Progress),
) -> HostResult<()> {
    let kept = plan.kv_cache.as_ref().map(|folder| {
        let mut hash = crc32fast::Hasher::new();
        hash.update(model.name.as_bytes());
        context.iter().for_each(|token| hash.update(&token.to_le_bytes()));
        let name = format!("{:08x}-{}-{}.floe", hash.finalize(), context.len(), kv.config().kv_dtype);
        folder.join(name)
    });
    if let Some(path) = kept.as_ref().filter(|path| path.exists()) {
        kv.load(path)?;
        if kv.num_tokens() != context.len() {
            let reason = format!("holds {} tokens, the context has {}", kv.num_tokens(), context.len());
            return Err(HostError::argument("kv_cache", path.display(), reason));
        }
        return Ok(());
    }
    kv.truncate(0)?;
    let mut done = 0;
    Session::new(model, kv).prefill(context, &mut |tokens| {
        done += tokens;
        progress(Progress::Prefill(done, context.len()));
    })?;
    match kept {
        Some(path) => kv.save(&path).map(drop),
        None => Ok(()),
    }
}

/// Tokens of a context, and what is asked about it.
type Prompts = (Vec<u32>, Vec<(Task, Prompt)>);

/// The context and the questions of an episode as tokens, the context at most `plan.context` long.
fn prompts(model: &Model, plan: &EvalPlan, spec: EpisodeSpec<'_>) -> HostResult<Prompts> {
    let EpisodeSpec { tasks, text, seed, .. } = spec;
    let room = model.config().context;
    let more = QUESTION_TOKENS.max(PERPLEXITY_TOKENS + 1);
    if plan.context + more > room {
        let reason = format!("with {more} tokens for a question it must fit the model's {room}");
        return Err(HostError::argument("context", plan.context, reason));
    }
    if tasks == [Task::Perplexity] {
        let needed = plan.context + PERPLEXITY_TOKENS + 1;
        let chars = (8 * needed).min(text.len());
        let mut tokens = model.tokenizer.encode(&episode(tasks, text, (chars, 0), seed)?.context)?;
        if tokens.len() < needed {
            let reason = format!("{needed} tokens are needed");
            return Err(HostError::argument("text", format!("{} tokens", tokens.len()), reason));
        }
        let rest = tokens[plan.context + 1..needed].to_vec();
        let go_on = Prompt::GoOn { first: tokens[plan.context], rest };
        tokens.truncate(plan.context);
        return Ok((tokens, vec![(Task::Perplexity, go_on)]));
    }
    // Characters a token differ from text to text: shrink until the context fits.
    let mut chars = 4 * plan.context;
    loop {
        let made = episode(tasks, text, (chars.min(text.len()), plan.questions), seed)?;
        let (before, after) = model.chat_around(&made.context)?;
        let context = model.tokenizer.encode(&before)?;
        if context.len() > plan.context {
            chars = chars * plan.context / context.len() - 16;
            continue;
        }
        let encode = |text: &str| model.tokenizer.encode_more(text);
        let prompts = made.questions.into_iter().map(|question| {
            let mut leads = question.blanks.iter().map(|blank| blank.lead.as_str());
            let first = leads.next().unwrap_or_default();
            let tokens = encode(&format!("{}{after}{first}", question.text))?;
            let leads = leads.map(encode).collect::<HostResult<_>>()?;
            Ok((question.task, Prompt::Ask { tokens, leads, question }))
        });
        return Ok((context, prompts.collect::<HostResult<_>>()?));
    }
}
