//! Prefill and decode: a model, a KV backend, and the time they take.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use super::backend::{KvBackend, Phase};
use super::model::Model;
use super::sample::Sampler;
use super::{HostError, HostResult};

/// Prompt tokens of one forward pass: enough for the matrix products to run at their best rate, few enough that the
/// states of a wide model stay small and progress is seen.
pub const PREFILL_TOKENS: usize = 512;

/// Time and tokens of one phase.
#[derive(Clone, Copy, Debug, Default)]
pub struct PhaseTime {
    /// Tokens run.
    pub tokens: usize,
    /// Wall time.
    pub total: Duration,
    /// Part of it inside the KV backend.
    pub attend: Duration,
}

impl PhaseTime {
    /// Tokens a second; 0 before the first token.
    #[must_use]
    pub fn tokens_per_second(&self) -> f64 {
        let seconds = self.total.as_secs_f64();
        if seconds > 0.0 { self.tokens as f64 / seconds } else { 0.0 }
    }

    /// Adds up.
    pub fn add(&mut self, other: &Self) {
        self.tokens += other.tokens;
        self.total += other.total;
        self.attend += other.attend;
    }
}

/// One sequence being run.
pub struct Session<'a> {
    model: &'a Model,
    kv: &'a mut dyn KvBackend,
    /// Time of the prompt.
    pub prefill: PhaseTime,
    /// Time that the KV backend took at the end of the prompt, to build its index.
    pub index: Duration,
    /// Time of the decoded tokens.
    pub decode: PhaseTime,
}

impl<'a> Session<'a> {
    /// A session that continues whatever `kv` holds.
    pub fn new(model: &'a Model, kv: &'a mut dyn KvBackend) -> Self {
        let (prefill, decode) = (PhaseTime::default(), PhaseTime::default());
        Self { model, kv, prefill, index: Duration::ZERO, decode }
    }

    /// Runs prompt tokens; logits after the last. `progress` hears of every part that is done.
    ///
    /// # Errors
    /// [`HostError::Argument`] when there are no tokens or more than the model's context holds; errors of the backend.
    pub fn prefill(&mut self, tokens: &[u32], progress: &mut dyn FnMut(usize)) -> HostResult<Vec<f32>> {
        self.check_room(tokens.len())?;
        let mut logits = Vec::new();
        let parts = tokens.chunks(PREFILL_TOKENS);
        let last = parts.len().saturating_sub(1);
        for (i, part) in parts.enumerate() {
            let started = Instant::now();
            let hidden = self.model.decoder.forward(part, Phase::Prefill, self.kv)?;
            if i == last {
                logits = self.model.decoder.last_logits(&hidden)?;
            }
            let (tokens, attend) = (part.len(), hidden.attend_time);
            self.prefill.add(&PhaseTime { tokens, total: started.elapsed(), attend });
            progress(part.len());
        }
        let started = Instant::now();
        self.kv.prompt_ended()?;
        self.index += started.elapsed();
        if logits.is_empty() {
            Err(HostError::argument("prompt", "\"\"", "at least one token is needed"))
        } else {
            Ok(logits)
        }
    }

    /// Runs one token after the prompt; logits for the next.
    ///
    /// # Errors
    /// [`HostError::Argument`] when the model's context is full; errors of the backend.
    pub fn step(&mut self, token: u32) -> HostResult<Vec<f32>> {
        self.check_room(1)?;
        let started = Instant::now();
        let hidden = self.model.decoder.forward(&[token], Phase::Decode, self.kv)?;
        let logits = self.model.decoder.last_logits(&hidden)?;
        let attend = hidden.attend_time;
        self.decode.add(&PhaseTime { tokens: 1, total: started.elapsed(), attend });
        Ok(logits)
    }

    /// Runs known tokens after the prompt in one pass over the weights; logits after each of the last `keep`. Attention goes
    /// token by token, as in [`Session::step`].
    ///
    /// # Errors
    /// As [`Session::step`].
    pub fn steps(&mut self, tokens: &[u32], keep: usize) -> HostResult<Vec<Vec<f32>>> {
        self.check_room(tokens.len())?;
        let started = Instant::now();
        let hidden = self.model.decoder.forward(tokens, Phase::Decode, self.kv)?;
        let logits = self.model.decoder.logits(&hidden, keep)?.to_vec2()?;
        let (tokens, attend) = (tokens.len(), hidden.attend_time);
        self.decode.add(&PhaseTime { tokens, total: started.elapsed(), attend });
        Ok(logits)
    }

    /// Draws and runs tokens after `logits`, until one ends the answer, `max_tokens` are out, the context is full or `on_token` breaks.
    /// The tokens, the ending one left out.
    ///
    /// # Errors
    /// Errors of the backend and of `on_token`.
    pub fn generate(
        &mut self,
        mut logits: Vec<f32>,
        (sampler, max_tokens): (&mut Sampler, usize),
        on_token: &mut dyn FnMut(u32) -> HostResult<ControlFlow<()>>,
    ) -> HostResult<Vec<u32>> {
        let mut tokens = Vec::new();
        while tokens.len() < max_tokens {
            let token = sampler.sample(&logits);
            if self.model.tokenizer.is_end(token) {
                break;
            }
            tokens.push(token);
            if on_token(token)?.is_break() || tokens.len() == max_tokens || self.room() == 0 {
                break;
            }
            logits = self.step(token)?;
        }
        Ok(tokens)
    }

    /// Forgets the tokens at and after `num_tokens`.
    ///
    /// # Errors
    /// Errors of the backend.
    pub fn truncate(&mut self, num_tokens: usize) -> HostResult<()> {
        self.kv.truncate(num_tokens)
    }

    /// Tokens that the KV backend holds.
    #[must_use]
    pub fn num_tokens(&self) -> usize {
        self.kv.num_tokens()
    }

    /// Tokens that still fit the model's context.
    #[must_use]
    pub fn room(&self) -> usize {
        self.model.config().context.saturating_sub(self.kv.num_tokens())
    }

    fn check_room(&self, tokens: usize) -> HostResult<()> {
        if tokens > self.room() {
            let context = self.model.config().context;
            let reason =
                format!("{} are stored and the model's context is {context} tokens", self.kv.num_tokens());
            return Err(HostError::argument("tokens", tokens, reason));
        }
        Ok(())
    }
}
