//! `floe eval`: policies against Full-KV on questions over long texts.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::Args;
use floe::host::eval::{
    EpisodeSpec, EvalPlan, Outcome, Progress, Task, eval_table, num_steps, run_episode, summarise,
};
use floe::host::{FloeBackend, Model};
use floe::report::page::{Page, Section};
use floe::{Config, Policy};
use indicatif::{ProgressBar, ProgressStyle};

use super::generate::DtypeArg;

/// Version of the rows that `--json` writes.
const EVAL_SCHEMA: u32 = 2;

#[derive(Args)]
pub struct EvalArgs {
    /// Model file (GGUF).
    #[arg(long, value_name = "FILE")]
    model: PathBuf,
    /// Text that the prompts are made of, repeatable: a novel, source code. Episodes take them in turn; perplexity is measured on each.
    #[arg(long = "text", value_name = "FILE", required = true)]
    texts: Vec<PathBuf>,
    /// Tasks: needle, needle-multi-value, needle-multi-query, variable-tracking, kv-retrieval, word-count, perplexity
    /// [default: all].
    #[arg(long, value_name = "TASK,TASK", value_delimiter = ',')]
    tasks: Vec<Task>,
    /// Tokens of a context, the question aside.
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_value = "4096")]
    context: Vec<usize>,
    /// Policy as NAME[:key=value[,key=value]]; repeatable [default: floe, quest, window].
    #[arg(long = "policy", value_name = "SPEC")]
    policies: Vec<Policy>,
    /// Tokens attended exactly per kv head and step, sinks and window included.
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_value = "256")]
    budgets: Vec<usize>,
    /// Contexts of each task.
    #[arg(long, value_name = "N", default_value_t = 5)]
    episodes: usize,
    /// Questions about each context.
    #[arg(long, value_name = "N", default_value_t = 10)]
    questions: usize,
    /// Run at most N episodes in all, those that the results file already holds not counted.
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Plant the facts of all tasks into the same contexts, so that one prefill serves them; kv-retrieval and perplexity
    /// keep contexts of their own. Answers get harder, because every task's facts stand in the way of the others'.
    #[arg(long)]
    shared_context: bool,
    /// Keep prefilled contexts in this folder and read them from there; some hundred MB each.
    #[arg(long, value_name = "DIR")]
    kv_cache: Option<PathBuf>,
    /// First layers that stay dense.
    #[arg(long, value_name = "N", default_value_t = 0)]
    dense_layers: usize,
    /// Element type of the stored keys and values.
    #[arg(long, value_enum, default_value_t = DtypeArg::F16)]
    kv_dtype: DtypeArg,
    /// Seed of prompts and of the policies' random parts.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Results, one line a question; a run that finds the file goes on where the last one stopped.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Write the rows as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write a self-contained page.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

/// One context to run.
struct Job {
    tasks: Vec<Task>,
    text: usize,
    context: usize,
    seed: u64,
}

pub fn run(args: EvalArgs) -> anyhow::Result<()> {
    // One pool for candle's products and floe's attention.
    rayon::ThreadPoolBuilder::new().build()?.install(|| run_in_pool(&args))
}

fn run_in_pool(args: &EvalArgs) -> anyhow::Result<()> {
    let texts = args.texts.iter().map(|path| read_text(path)).collect::<anyhow::Result<Vec<_>>>()?;
    let tasks = if args.tasks.is_empty() { Task::ALL.to_vec() } else { args.tasks.clone() };
    let policies = match &args.policies[..] {
        [] => ["floe", "quest", "window"].iter().map(|spec| spec.parse()).collect::<Result<_, _>>()?,
        given => given.to_vec(),
    };
    let mut outcomes = match &args.out {
        Some(path) => read_outcomes(path)?,
        None => Vec::new(),
    };
    let model = Model::open(&args.model)?;
    let budgets = args.budgets.clone();
    let plan = |context| EvalPlan {
        policies: policies.clone(),
        budgets: budgets.clone(),
        context,
        questions: args.questions,
        kv_cache: args.kv_cache.clone(),
    };
    if let Some(folder) = &args.kv_cache {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }

    let mut jobs: Vec<Job> = args
        .context
        .iter()
        .flat_map(|context| contexts(args, &tasks).into_iter().map(move |tasks| (*context, tasks)))
        .flat_map(|(context, tasks)| episodes(args, context, &tasks))
        .filter(|job| !is_done(job, args, (&texts, &plan(job.context)), &outcomes))
        .collect();
    jobs.truncate(args.limit.unwrap_or(usize::MAX));

    let shape = model.config();
    let config = Config::new(shape.num_layers, shape.heads, args.kv_dtype.into());
    let budget = budgets.iter().copied().max().unwrap_or(config.budget);
    let (spans, dense_layers, seed) = (shape.spans.clone(), args.dense_layers, args.seed);
    let mut kv = FloeBackend::open(Config { spans, dense_layers, seed, budget, ..config })?;
    let style =
        ProgressStyle::with_template("{bar:30} {pos}/{len} questions  {elapsed} (left {eta})  {msg}")?;
    let steps: usize = jobs.iter().map(|job| num_steps(&plan(job.context), &job.tasks)).sum();
    let bar = ProgressBar::new(steps as u64).with_style(style);
    let mut out = args.out.as_deref().map(append_to).transpose()?;
    for job in &jobs {
        let (name, text) = &texts[job.text];
        let names: Vec<&str> = job.tasks.iter().map(|task| task.name()).collect();
        let message = format!("{} {} {name}", names.join(" "), job.context);
        bar.set_message(message.clone());
        let spec = EpisodeSpec { tasks: &job.tasks, text_name: name, text, seed: job.seed };
        let done = run_episode(&model, &mut kv, &plan(job.context), spec, &mut |progress| match progress {
            Progress::Prefill(done, of) if done < of => {
                bar.set_message(format!("{message}, prefill {done} of {of} tokens"));
            }
            Progress::Prefill(..) => bar.set_message(message.clone()),
            Progress::Question => bar.inc(1),
        })?;
        if let Some(out) = &mut out {
            // Whole episodes at once: a run that is cut off leaves at most one partial line.
            let lines = done.iter().map(|outcome| Ok(serde_json::to_string(outcome)? + "\n"));
            out.write_all(lines.collect::<serde_json::Result<String>>()?.as_bytes())?;
        }
        outcomes.extend(done);
    }
    bar.finish_and_clear();
    report(args, &model.name, &outcomes)
}

/// The tasks of each kind of context.
fn contexts(args: &EvalArgs, tasks: &[Task]) -> Vec<Vec<Task>> {
    if !args.shared_context {
        return tasks.iter().map(|task| vec![*task]).collect();
    }
    let (shared, own): (Vec<Task>, Vec<Task>) = tasks.iter().partition(|task| task.plants());
    let shared = if shared.is_empty() { None } else { Some(shared) };
    shared.into_iter().chain(own.into_iter().map(|task| vec![task])).collect()
}

fn episodes(args: &EvalArgs, context: usize, tasks: &[Task]) -> Vec<Job> {
    let texts = args.texts.len();
    let job = |episode: usize, text: usize| Job {
        tasks: tasks.to_vec(),
        text,
        context,
        seed: args.seed + episode as u64,
    };
    if tasks == [Task::Perplexity] {
        (0..args.episodes).flat_map(|e| (0..texts).map(move |t| (e, t))).map(|(e, t)| job(e, t)).collect()
    } else {
        (0..args.episodes).map(|e| job(e, e % texts)).collect()
    }
}

/// Whether the results hold every task, policy and budget of the job.
fn is_done(
    job: &Job,
    args: &EvalArgs,
    (texts, plan): (&[(String, String)], &EvalPlan),
    outcomes: &[Outcome],
) -> bool {
    let text = &texts[job.text].0;
    let of_job = |o: &&Outcome| {
        (&o.text, o.context, o.episode, o.dense_layers) == (text, job.context, job.seed, args.dense_layers)
    };
    job.tasks.iter().all(|task| {
        let questions = if *task == Task::Perplexity { 1 } else { plan.questions };
        plan.policies.iter().all(|policy| {
            plan.budgets.iter().all(|&budget| {
                let of_run = outcomes.iter().filter(of_job).filter(|o| {
                    (o.task.as_str(), o.policy.as_str(), o.budget) == (task.name(), policy.spec(), budget)
                });
                of_run.count() >= questions
            })
        })
    })
}

fn report(args: &EvalArgs, model: &str, outcomes: &[Outcome]) -> anyhow::Result<()> {
    let rows = summarise(outcomes);
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{}", eval_table(&rows))?;
    writeln!(
        stdout,
        "accuracy, full = share of wanted answers under the policy and under Full-KV; agreement, NLL delta, KL along \
         Full-KV's tokens"
    )?;
    if let Some(path) = &args.json {
        let document = serde_json::json!({ "schema": EVAL_SCHEMA, "model": model, "rows": rows });
        write_file(path, &serde_json::to_string_pretty(&document)?)?;
    }
    if let Some(path) = &args.html {
        let command = std::env::args().skip(1).collect::<Vec<_>>().join(" ");
        let page = Page::new("Answers under a KV budget")
            .lead("The same model, prompts and questions under each policy and under full attention.")
            .fact("model", model)
            .fact("command", format!("`floe {command}`"))
            .section(
                Section::new("Results")
                    .table("One row per task, context, policy and budget", eval_table(&rows)),
            );
        write_file(path, &page.to_html())?;
    }
    Ok(())
}

/// A text under its file's name.
fn read_text(path: &Path) -> anyhow::Result<(String, String)> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let name = path.file_stem().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    Ok((name, text))
}

fn read_outcomes(path: &Path) -> anyhow::Result<Vec<Outcome>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    let mut outcomes = Vec::new();
    for (number, line) in BufReader::new(file).lines().enumerate() {
        let line = line.with_context(|| format!("cannot read {}", path.display()))?;
        match serde_json::from_str(&line) {
            Ok(outcome) => outcomes.push(outcome),
            Err(error) => bail!("{} line {}: {error}", path.display(), number + 1),
        }
    }
    Ok(outcomes)
}

fn append_to(path: &Path) -> anyhow::Result<File> {
    let opened = OpenOptions::new().create(true).append(true).open(path);
    opened.with_context(|| format!("cannot write {}", path.display()))
}

fn write_file(path: &Path, text: &str) -> anyhow::Result<()> {
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}
