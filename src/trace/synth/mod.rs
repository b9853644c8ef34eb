//! Synthetic traces of any length, with planted needles.
//!
//! They are for scale and correctness (a needle has a known position), not for judging accuracy: real traces do that.
//! Before rotary embedding the pairs of a head's dimensions are divided, from the fastest-turning to the slowest, into
//!
//! | part of the pairs | keys hold | queries hold | attention that results |
//! |---|---|---|---|
//! | first quarter | a constant | a little of it | with rope, a kernel around the query's position |
//! | to 5/8 | a state that drifts token by token | the state at their position | local, halving every few tokens |
//! | to 7/8 | centre of the current topic, which drifts from visit to visit | centre of one or two topics | scattered visits of the same topic |
//! | to the last but one | a needle's code, in its span | in the answer: one needle's code | the needle |
//! | last | a large value in the first [`NUM_SINKS`] tokens | a constant | sinks |
//!
//! plus noise everywhere. Values follow the topic and, in part, the key's own noise; needles' values stand out and
//! sinks' values are small. Component strengths are set in nats of score against ln(num_tokens), so that the shares of
//! sinks, surroundings, topics and the diffuse rest stay comparable from thousands to millions of tokens.
//!
//! With rope, `rope_theta` is (2 num_tokens)^1.6: topics' and needles' pairs then turn at most half a radian over the
//! whole context. That is more than published models use at these lengths; it keeps a needle's score independent of
//! its distance.

mod noise;
mod world;

use std::collections::BTreeMap;
use std::path::Path;

use half::bf16;

use super::{Rope, Segment, Tensor, TraceError, TraceMeta, TraceWriter};
use world::World;

/// Tokens at the start that act as attention sinks.
pub const NUM_SINKS: usize = 4;

/// Tokens that a planted needle spans.
pub const NEEDLE_TOKENS: usize = 4;

/// Consecutive answer queries that look for the same needle.
pub const ANSWER_RUN: usize = 8;

/// Tokens made at a time: bounds the memory at some megabytes whatever the length.
const BATCH_TOKENS: usize = 4096;

/// Most needles: their positions must fit the header.
const NEEDLES_MAX: usize = 10_000;

/// What to synthesise.
///
/// The queries sit at the last `num_queries` positions. The first half of them is the segment "story"; the second half
/// is "answer", whose query `i` looks for needle `(i / ANSWER_RUN) % num_needles`. Without needles all is story.
/// The metadata field `needles` lists the needles' positions as JSON, [[start, end), ...] by needle.
///
/// The same request gives the same bytes: random numbers and transcendental functions are computed by portable code,
/// everything else is exactly rounded IEEE arithmetic in a fixed order.
#[derive(Clone, Debug, PartialEq)]
pub struct SynthRequest {
    /// Positions.
    pub num_tokens: usize,
    /// Queries.
    pub num_queries: usize,
    /// Dimensions of a head: a multiple of 16 from 64 to 512.
    pub head_dim: usize,
    /// Query heads, 1 to 64; each weighs the components a little differently.
    pub group: usize,
    /// Planted needles, at most 10,000, one in each of so many equal parts of the tokens before the queries.
    pub num_needles: usize,
    /// Rotary embedding.
    pub rope: Rope,
    /// Seed of everything random.
    pub seed: u64,
}

impl SynthRequest {
    /// Writes the trace to `path`, calling `progress` with the number of tokens done from time to time.
    ///
    /// # Errors
    /// [`TraceError::Request`] for a size out of range, and those of [`TraceWriter`].
    pub fn write(&self, path: impl AsRef<Path>, progress: &mut dyn FnMut(usize)) -> Result<(), TraceError> {
        self.validate()?;
        let meta = self.meta();
        let first_query_pos = meta.first_query_pos;
        let mut world = World::new(self, &meta);
        let mut writer = TraceWriter::create(path, meta)?;
        let mut k = Vec::with_capacity(BATCH_TOKENS * self.head_dim);
        let mut v = Vec::with_capacity(BATCH_TOKENS * self.head_dim);
        let mut q = Vec::new();
        let mut q_pre = Vec::new();
        for start in (0..self.num_tokens).step_by(BATCH_TOKENS) {
            let end = self.num_tokens.min(start + BATCH_TOKENS);
            for position in start..end {
                world.step(position, &mut k, &mut v);
                if position >= first_query_pos {
                    world.query(position - first_query_pos, &mut q_pre, &mut q);
                }
            }
            let batch =
                [(Tensor::K, &mut k), (Tensor::V, &mut v), (Tensor::Q, &mut q), (Tensor::QPre, &mut q_pre)];
            for (tensor, elements) in batch {
                writer.append(tensor, elements)?;
                elements.clear();
            }
            progress(end);
        }
        writer.finish()
    }

    fn validate(&self) -> Result<(), TraceError> {
        let check = |holds: bool, option: &'static str, value: usize, expected: String| {
            if holds { Ok(()) } else { Err(TraceError::request(option, value, expected)) }
        };
        let d = self.head_dim;
        let expected = "a multiple of 16 from 64 to 512".to_string();
        check((64..=512).contains(&d) && d.is_multiple_of(16), "head-dim", d, expected)?;
        check((1..=64).contains(&self.group), "group", self.group, "1 to 64".into())?;
        let needles = self.num_needles;
        check(needles <= NEEDLES_MAX, "needles", needles, format!("at most {NEEDLES_MAX}"))?;
        check(self.num_queries > 0, "queries", self.num_queries, "at least 1".into())?;
        let least = (NUM_SINKS + NEEDLE_TOKENS * needles).saturating_add(self.num_queries);
        let expected = format!("at least {least} ({NUM_SINKS} sinks, {needles} needles, the queries)");
        check(self.num_tokens >= least, "tokens", self.num_tokens, expected)
    }

    fn meta(&self) -> TraceMeta {
        let first_query_pos = self.num_tokens - self.num_queries;
        let num_answers = if self.num_needles == 0 { 0 } else { self.num_queries.div_ceil(2) };
        let answer_start = self.num_tokens - num_answers;
        let mut segments = vec![
            Segment { name: "story".into(), start: first_query_pos, end: answer_start },
            Segment { name: "answer".into(), start: answer_start, end: self.num_tokens },
        ];
        segments.retain(|segment| segment.start < segment.end);
        let needles: Vec<[usize; 2]> =
            world::place_needles(self).iter().map(|&start| [start, start + NEEDLE_TOKENS]).collect();
        let extra = BTreeMap::from([
            ("needles".to_string(), serde_json::json!(needles).to_string()),
            ("answer_run".to_string(), ANSWER_RUN.to_string()),
            ("seed".to_string(), self.seed.to_string()),
        ]);
        TraceMeta {
            model: "synthetic".into(),
            layer: 0,
            kv_head: 0,
            num_layers: 1,
            num_q_heads: self.group,
            num_kv_heads: 1,
            head_dim: self.head_dim,
            rope: self.rope,
            rope_theta: libm::round(libm::pow(2.0 * self.num_tokens as f64, 1.6)),
            softmax_scale: 1.0 / (self.head_dim as f64).sqrt(),
            num_tokens: self.num_tokens,
            num_queries: self.num_queries,
            first_query_pos,
            index_until: first_query_pos,
            rope_offset: 0,
            segments,
            text: format!("none: synthesised with seed {}, {} needles", self.seed, self.num_needles),
            licence: "none needed: generated data".into(),
            extra,
        }
    }
}

/// To the element type of a trace, rounding to nearest even.
fn to_bf16(values: &[f64]) -> impl Iterator<Item = bf16> + '_ {
    values.iter().map(|&value| bf16::from_f64(value))
}
