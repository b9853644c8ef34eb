//! Evaluation against Full-KV: the same model, prompts and questions under each policy.
//!
//! Of every episode the context is prefilled once, exactly; then each policy decodes each question (the question's own
//! tokens included) and its answer, and is truncated back. Full attention goes first: its answers and logits are the
//! reference. Accuracy is that of the policy's own greedy answer; agreement, NLL and KL are measured along the
//! reference's tokens.

mod build;
mod judge;
mod run;
mod summary;
mod task;

pub use build::episode;
pub use judge::Distance;
pub use run::{EpisodeSpec, EvalPlan, Outcome, PERPLEXITY_TOKENS, Progress, num_steps, run_episode};
pub use summary::{EvalRow, eval_table, summarise};
pub use task::{Blank, Episode, Question, Task};
