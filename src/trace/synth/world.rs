//! What a synthetic sequence is made of, advanced token by token.

use std::ops::Range;

use half::bf16;

use super::noise::{Noise, Stream};
use super::{ANSWER_RUN, NEEDLE_TOKENS, NUM_SINKS, SynthRequest, to_bf16};
use crate::trace::{Rotation, TraceMeta};

/// Standard deviations per dimension. Keys' noise is the unit.
const KEY_NOISE: f64 = 1.0;
const QUERY_NOISE: f64 = 0.7;
const BIAS: f64 = 2.0;
const LOCAL: f64 = 1.5;
const TOPIC: f64 = 1.5;
const NEEDLE: f64 = 3.0;
const SINK: f64 = 20.0;

/// Correlation of the local state from token to token: it halves in 17 tokens.
const LOCAL_STAY: f64 = 0.96;
/// Correlation of a topic's centre from one visit to its next.
const TOPIC_STAY: f64 = 0.97;
/// Tokens of a visit to a topic.
const VISIT_TOKENS: Range<usize> = 32..256;
/// One topic per so many tokens, within limits.
const TOKENS_PER_TOPIC: usize = 512;

/// Score that a component gives its target, in nats above ln(num_tokens): the level at which one token outweighs all
/// others together, were these of score 0. The token at the query's own position has the local one in all.
const SINK_NATS: f64 = 0.0;
const LOCAL_NATS: f64 = -0.5;
const TOPIC_NATS: f64 = -4.0;
const NEEDLE_NATS: f64 = 2.5;
/// Share of the bias in queries, relative to keys.
const QUERY_BIAS: f64 = 0.1;
/// A needle's query thinks less of the topic, by so many nats.
const ANSWER_TOPIC_NATS: f64 = -2.0;

/// Start of every needle, rising.
pub(super) fn place_needles(request: &SynthRequest) -> Vec<usize> {
    let mut noise = Noise::new(request.seed, Stream::Needles);
    let room = request.num_tokens - request.num_queries - NUM_SINKS;
    (0..request.num_needles)
        .map(|i| {
            let start = i * room / request.num_needles;
            let end = (i + 1) * room / request.num_needles;
            NUM_SINKS + start + noise.below(end - start - NEEDLE_TOKENS + 1)
        })
        .collect()
}

struct Needle {
    start: usize,
    code: Vec<f64>,
    value: Vec<f64>,
}

struct Topic {
    centre: Vec<f64>,
    value: Vec<f64>,
}

/// How much a query head wants of each component, in nats added to the common level.
struct Head {
    sink: f64,
    local: f64,
    topic: f64,
    needle: f64,
}

/// Ranges of pairs that hold each component; pair `i` owns two dimensions.
struct Parts {
    bias: Range<usize>,
    local: Range<usize>,
    topic: Range<usize>,
    needle: Range<usize>,
    sink: Range<usize>,
}

pub(super) struct World {
    head_dim: usize,
    log_tokens: f64,
    rotation: Rotation,
    /// Dimensions by pair, \[head_dim / 2\]: (first, second).
    pairs: Vec<(usize, usize)>,
    parts: Parts,
    bias: Vec<f64>,
    topics: Vec<Topic>,
    needles: Vec<Needle>,
    heads: Vec<Head>,
    answer_start: usize,
    first_query_pos: usize,

    topic_noise: Noise,
    token_noise: Noise,
    query_noise: Noise,
    current_topic: usize,
    visit_left: usize,
    next_needle: usize,
    local: Vec<f64>,
    /// Scratch, \[head_dim\].
    residual: Vec<f64>,
    key: Vec<f64>,
    value: Vec<f64>,
}

impl World {
    pub(super) fn new(request: &SynthRequest, meta: &TraceMeta) -> Self {
        let d = request.head_dim;
        let half = d / 2;
        let parts = Parts {
            bias: 0..half / 4,
            local: half / 4..half * 5 / 8,
            topic: half * 5 / 8..half * 7 / 8,
            needle: half * 7 / 8..half - 1,
            sink: half - 1..half,
        };
        let mut geometry = Noise::new(request.seed, Stream::Geometry);
        let num_topics = (request.num_tokens / TOKENS_PER_TOPIC).clamp(8, 128);
        let bias = geometry.normals(2 * parts.bias.len(), BIAS);
        let topics = (0..num_topics)
            .map(|_| Topic {
                centre: geometry.normals(2 * parts.topic.len(), TOPIC),
                value: geometry.normals(d, 1.0),
            })
            .collect();
        let mut query_noise = Noise::new(request.seed, Stream::Queries);
        let heads = (0..request.group)
            .map(|_| Head {
                sink: query_noise.symmetric(),
                local: query_noise.symmetric(),
                topic: query_noise.symmetric(),
                needle: 0.5 * query_noise.symmetric(),
            })
            .collect();
        let needles = place_needles(request)
            .into_iter()
            .map(|start| Needle {
                start,
                code: geometry.normals(2 * parts.needle.len(), NEEDLE),
                value: geometry.normals(d, NEEDLE),
            })
            .collect();
        let local = geometry.normals(2 * parts.local.len(), LOCAL);
        Self {
            head_dim: d,
            log_tokens: libm::log(request.num_tokens as f64),
            rotation: Rotation::new(meta.rope, d, meta.rope_theta),
            pairs: (0..half).map(|i| meta.rope.pair(i, d)).collect(),
            parts,
            bias,
            topics,
            needles,
            heads,
            answer_start: meta.segment("answer").map_or(meta.num_tokens, |segment| segment.start),
            first_query_pos: meta.first_query_pos,
            topic_noise: Noise::new(request.seed, Stream::Topics),
            token_noise: Noise::new(request.seed, Stream::Tokens),
            query_noise,
            current_topic: 0,
            visit_left: 0,
            next_needle: 0,
            local,
            residual: vec![0.0; d],
            key: vec![0.0; d],
            value: vec![0.0; d],
        }
    }

    /// Advances to `position` (called for every position in turn) and appends its key and value, \[head_dim\] each.
    pub(super) fn step(&mut self, position: usize, k: &mut Vec<bf16>, v: &mut Vec<bf16>) {
        self.advance_topic();
        let spread = LOCAL * (1.0 - LOCAL_STAY * LOCAL_STAY).sqrt();
        for x in &mut self.local {
            *x = LOCAL_STAY * *x + spread * self.token_noise.normal();
        }
        self.residual.fill_with(|| self.token_noise.normal());
        let topic = &self.topics[self.current_topic];

        self.key.iter_mut().zip(&self.residual).for_each(|(key, residual)| *key = KEY_NOISE * residual);
        for (value, (centre, residual)) in self.value.iter_mut().zip(topic.value.iter().zip(&self.residual)) {
            *value = centre + 0.4 * residual + 0.5 * self.token_noise.normal();
        }
        add(&mut self.key, &self.pairs[self.parts.bias.clone()], &self.bias, 1.0);
        if position < NUM_SINKS {
            add(&mut self.key, &self.pairs[self.parts.sink.clone()], &[SINK, 0.0], 1.0);
            self.value.iter_mut().for_each(|value| *value *= 0.05);
        } else {
            add(&mut self.key, &self.pairs[self.parts.local.clone()], &self.local, 1.0);
            add(&mut self.key, &self.pairs[self.parts.topic.clone()], &topic.centre, 1.0);
        }
        if let Some(needle) = self.needles.get(self.next_needle)
            && position >= needle.start
        {
            add(&mut self.key, &self.pairs[self.parts.needle.clone()], &needle.code, 1.0);
            self.value.iter_mut().zip(&needle.value).for_each(|(value, code)| *value += code);
            if position + 1 == needle.start + NEEDLE_TOKENS {
                self.next_needle += 1;
            }
        }
        self.rotation.rotate(&mut self.key, position as f64);
        k.extend(to_bf16(&self.key));
        v.extend(to_bf16(&self.value));
    }

    /// Appends query `j` at the current position, before and after rotation, [group, head_dim] each.
    pub(super) fn query(&mut self, j: usize, q_pre: &mut Vec<bf16>, q: &mut Vec<bf16>) {
        let position = self.first_query_pos + j;
        let other_topic = self.query_noise.below(self.topics.len());
        let needle = (position >= self.answer_start && !self.needles.is_empty())
            .then(|| &self.needles[(position - self.answer_start) / ANSWER_RUN % self.needles.len()]);
        let level = self.log_tokens;
        for head in &self.heads {
            let x = &mut self.key;
            x.fill_with(|| QUERY_NOISE * self.query_noise.normal());
            // Weight of a component's vector such that its product with that vector, scaled, is so many nats.
            let scale = (self.head_dim as f64).sqrt();
            let weight = |nats: f64, target: &[f64]| nats * scale / target.iter().map(|t| t * t).sum::<f64>();
            add(x, &self.pairs[self.parts.bias.clone()], &self.bias, QUERY_BIAS);
            let sink = [SINK, 0.0];
            add(x, &self.pairs[self.parts.sink.clone()], &sink, weight(level + SINK_NATS + head.sink, &sink));
            let answer_nats = if needle.is_some() { ANSWER_TOPIC_NATS } else { 0.0 };
            // Short contexts would give a topic a negative score: then it has none.
            let topic_nats = (level + TOPIC_NATS + head.topic + answer_nats).max(0.0);
            // The surroundings are of the same topic, and score with it.
            let local_nats = level + LOCAL_NATS + head.local - topic_nats;
            add(x, &self.pairs[self.parts.local.clone()], &self.local, weight(local_nats, &self.local));
            for (topic, share) in [(self.current_topic, 1.0), (other_topic, 0.8)] {
                let centre = &self.topics[topic].centre;
                add(x, &self.pairs[self.parts.topic.clone()], centre, share * weight(topic_nats, centre));
            }
            if let Some(needle) = needle {
                let nats = level + NEEDLE_NATS + head.needle;
                add(x, &self.pairs[self.parts.needle.clone()], &needle.code, weight(nats, &needle.code));
            }
            let start = q_pre.len();
            q_pre.extend(to_bf16(x));
            // Rotating the rounded query keeps q = RoPE(q_pre) to one rounding.
            x.iter_mut().zip(&q_pre[start..]).for_each(|(x, pre)| *x = pre.to_f64());
            self.rotation.rotate(x, position as f64);
            q.extend(to_bf16(x));
        }
    }

    /// At the end of a visit, moves to another topic, whose centre has drifted since its last visit.
    fn advance_topic(&mut self) {
        if self.visit_left > 0 {
            self.visit_left -= 1;
            return;
        }
        let noise = &mut self.topic_noise;
        self.visit_left = VISIT_TOKENS.start + noise.below(VISIT_TOKENS.len());
        // The smaller of two uniform draws: some topics come back often, some hardly ever.
        self.current_topic = noise.below(self.topics.len()).min(noise.below(self.topics.len()));
        let spread = TOPIC * (1.0 - TOPIC_STAY * TOPIC_STAY).sqrt();
        for x in &mut self.topics[self.current_topic].centre {
            *x = TOPIC_STAY * *x + spread * noise.normal();
        }
    }
}

/// Adds `weight` times `component` (two numbers a pair, in order) to the dimensions of `pairs` in `x` \[head_dim\].
fn add(x: &mut [f64], pairs: &[(usize, usize)], component: &[f64], weight: f64) {
    for (&(a, b), part) in pairs.iter().zip(component.as_chunks::<2>().0) {
        x[a] += weight * part[0];
        x[b] += weight * part[1];
    }
}
