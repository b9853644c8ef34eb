use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::str::FromStr;

use super::error::quote;
use super::{Rope, TraceError};

/// The trace format that this version reads and writes (metadata field `floe_trace`).
pub const FORMAT: &str = "1";

/// A named range of positions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Its name, for example "story".
    pub name: String,
    /// First position.
    pub start: usize,
    /// One past the last position.
    pub end: usize,
}

/// What a trace says about itself: the metadata of format 1, typed.
///
/// One trace is one shard: the keys and values of one kv head of one layer, and some queries of its group.
#[derive(Clone, Debug, PartialEq)]
pub struct TraceMeta {
    /// The model that was recorded.
    pub model: String,
    /// Layer of the shard, below `num_layers`.
    pub layer: usize,
    /// kv head of the shard, below `num_kv_heads`.
    pub kv_head: usize,
    /// Layers of the model.
    pub num_layers: usize,
    /// Query heads of a layer: a multiple of `num_kv_heads`.
    pub num_q_heads: usize,
    /// kv heads of a layer.
    pub num_kv_heads: usize,
    /// Dimensions of a head; even when `rope` rotates.
    pub head_dim: usize,
    /// Pairing of dimensions under rotary embedding.
    pub rope: Rope,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Factor on `q . k` before the softmax.
    pub softmax_scale: f64,
    /// Positions with a key and a value.
    pub num_tokens: usize,
    /// Recorded queries, at consecutive positions.
    pub num_queries: usize,
    /// Position of query 0.
    pub first_query_pos: usize,
    /// Prefill length of a replay: decoding starts here.
    pub index_until: usize,
    /// Added to a query's position to get the position that rotated it (optional field, 0 when absent). Not 0 in a
    /// slice that dropped tokens before the queries: such a slice renumbers positions but keeps the recorded phases.
    pub rope_offset: usize,
    /// Named ranges of positions, by start; they may overlap.
    pub segments: Vec<Segment>,
    /// What the text is.
    pub text: String,
    /// Licence of the data.
    pub licence: String,
    /// Every other metadata field, verbatim.
    pub extra: BTreeMap<String, String>,
}

/// Names of the fields that [`TraceMeta`] gives a type; `extra` may not use them.
const FIELDS: [&str; 19] = [
    "floe_trace",
    "model",
    "layer",
    "kv_head",
    "num_layers",
    "num_q_heads",
    "num_kv_heads",
    "head_dim",
    "rope",
    "rope_theta",
    "softmax_scale",
    "num_tokens",
    "num_queries",
    "first_query_pos",
    "index_until",
    "rope_offset",
    "segments",
    "text",
    "licence",
];

impl TraceMeta {
    /// Query heads that share the kv head.
    pub fn group(&self) -> usize {
        self.num_q_heads / self.num_kv_heads
    }

    /// The segment called `name`.
    pub fn segment(&self, name: &str) -> Option<&Segment> {
        self.segments.iter().find(|segment| segment.name == name)
    }

    /// Shape of `k` and of `v`: [num_tokens, head_dim].
    pub fn token_shape(&self) -> [usize; 2] {
        [self.num_tokens, self.head_dim]
    }

    /// Shape of `q` and of `q_pre`: [num_queries, group, head_dim].
    pub fn query_shape(&self) -> [usize; 3] {
        [self.num_queries, self.group(), self.head_dim]
    }

    /// Reads the metadata of the file at `path` and validates it.
    pub(super) fn parse(mut fields: HashMap<String, String>, path: &Path) -> Result<Self, TraceError> {
        let mut parser = Parser { fields: &mut fields, path };
        let version = parser.text("floe_trace")?;
        if version != FORMAT {
            return Err(TraceError::Version { path: path.to_path_buf(), found: shorten(&version) });
        }
        let meta = Self {
            model: parser.text("model")?,
            layer: parser.count("layer")?,
            kv_head: parser.count("kv_head")?,
            num_layers: parser.count("num_layers")?,
            num_q_heads: parser.count("num_q_heads")?,
            num_kv_heads: parser.count("num_kv_heads")?,
            head_dim: parser.count("head_dim")?,
            rope: parser.rope()?,
            rope_theta: parser.number("rope_theta", "a number")?,
            softmax_scale: parser.number("softmax_scale", "a number")?,
            num_tokens: parser.count("num_tokens")?,
            num_queries: parser.count("num_queries")?,
            first_query_pos: parser.count("first_query_pos")?,
            index_until: parser.count("index_until")?,
            rope_offset: if parser.has("rope_offset") { parser.count("rope_offset")? } else { 0 },
            segments: parser.segments()?,
            text: parser.text("text")?,
            licence: parser.text("licence")?,
            extra: fields.into_iter().collect(),
        };
        meta.validate(path)?;
        Ok(meta)
    }

    /// Checks every rule that the fields must keep among themselves; `path` is for the message only.
    ///
    /// # Errors
    /// [`TraceError::Field`] for the first field that breaks a rule.
    pub fn validate(&self, path: &Path) -> Result<(), TraceError> {
        let check = |holds: bool, field: &'static str, value: String, expected: String| {
            if holds {
                return Ok(());
            }
            Err(TraceError::Field { path: path.to_path_buf(), field, value, expected })
        };
        let positive = |field, value: usize| check(value > 0, field, value.to_string(), "at least 1".into());
        let at_most = |field, value: usize, limit: usize, limit_name: &str| {
            check(value <= limit, field, value.to_string(), format!("at most {limit_name} {limit}"))
        };
        let below = |field, value: usize, limit: usize, limit_name: &str| {
            check(value < limit, field, value.to_string(), format!("less than {limit_name} {limit}"))
        };

        positive("num_layers", self.num_layers)?;
        positive("num_kv_heads", self.num_kv_heads)?;
        positive("num_q_heads", self.num_q_heads)?;
        positive("head_dim", self.head_dim)?;
        positive("num_tokens", self.num_tokens)?;
        positive("num_queries", self.num_queries)?;
        below("layer", self.layer, self.num_layers, "num_layers")?;
        below("kv_head", self.kv_head, self.num_kv_heads, "num_kv_heads")?;
        check(
            self.num_q_heads.is_multiple_of(self.num_kv_heads),
            "num_q_heads",
            self.num_q_heads.to_string(),
            format!("a multiple of num_kv_heads {}", self.num_kv_heads),
        )?;
        if self.rope != Rope::None {
            let expected = format!("an even number under rope {}", self.rope.name());
            check(self.head_dim.is_multiple_of(2), "head_dim", self.head_dim.to_string(), expected)?;
        }
        let is_positive = |value: f64| value.is_finite() && value > 0.0;
        let expected = || "a positive finite number".to_string();
        check(is_positive(self.rope_theta), "rope_theta", self.rope_theta.to_string(), expected())?;
        check(is_positive(self.softmax_scale), "softmax_scale", self.softmax_scale.to_string(), expected())?;

        let latest_first = self.num_tokens.checked_sub(self.num_queries);
        check(
            latest_first.is_some_and(|latest| self.first_query_pos <= latest),
            "first_query_pos",
            self.first_query_pos.to_string(),
            format!(
                "a position such that its {} queries end within {} tokens",
                self.num_queries, self.num_tokens
            ),
        )?;
        at_most("index_until", self.index_until, self.num_tokens, "num_tokens")?;
        for segment in &self.segments {
            check(
                segment.start < segment.end && segment.end <= self.num_tokens,
                "segments",
                format!("{} [{}, {})", quote(&segment.name), segment.start, segment.end),
                format!("a non-empty range within {} tokens", self.num_tokens),
            )?;
        }
        for name in self.extra.keys() {
            let value = format!("also given as the extra field {name}");
            check(
                !FIELDS.contains(&name.as_str()),
                "extra",
                value,
                "names that format 1 leaves free".into(),
            )?;
        }
        Ok(())
    }

    /// The metadata as format 1 stores it.
    pub(super) fn to_fields(&self) -> BTreeMap<String, String> {
        let segments: serde_json::Map<String, serde_json::Value> =
            self.segments.iter().map(|s| (s.name.clone(), serde_json::json!([s.start, s.end]))).collect();
        let mut fields = self.extra.clone();
        let typed = [
            ("floe_trace", FORMAT.to_string()),
            ("model", self.model.clone()),
            ("layer", self.layer.to_string()),
            ("kv_head", self.kv_head.to_string()),
            ("num_layers", self.num_layers.to_string()),
            ("num_q_heads", self.num_q_heads.to_string()),
            ("num_kv_heads", self.num_kv_heads.to_string()),
            ("head_dim", self.head_dim.to_string()),
            ("rope", self.rope.name().to_string()),
            // Debug prints the shortest text that reads back to the same number, as Display does, but keeps the ".0".
            ("rope_theta", format!("{:?}", self.rope_theta)),
            ("softmax_scale", format!("{:?}", self.softmax_scale)),
            ("num_tokens", self.num_tokens.to_string()),
            ("num_queries", self.num_queries.to_string()),
            ("first_query_pos", self.first_query_pos.to_string()),
            ("index_until", self.index_until.to_string()),
            ("rope_offset", self.rope_offset.to_string()),
            ("segments", serde_json::Value::Object(segments).to_string()),
            ("text", self.text.clone()),
            ("licence", self.licence.clone()),
        ];
        fields.extend(typed.into_iter().map(|(name, value)| (name.to_string(), value)));
        fields
    }
}

/// Takes typed fields out of the metadata map, so that what is left over is `extra`.
struct Parser<'a> {
    fields: &'a mut HashMap<String, String>,
    path: &'a Path,
}

impl Parser<'_> {
    fn has(&self, field: &str) -> bool {
        self.fields.contains_key(field)
    }

    fn text(&mut self, field: &'static str) -> Result<String, TraceError> {
        let missing = || TraceError::MissingField { path: self.path.to_path_buf(), field };
        self.fields.remove(field).ok_or_else(missing)
    }

    fn number<T: FromStr>(&mut self, field: &'static str, expected: &str) -> Result<T, TraceError> {
        let text = self.text(field)?;
        text.parse().map_err(|_| self.refuse(field, &text, expected))
    }

    fn count(&mut self, field: &'static str) -> Result<usize, TraceError> {
        self.number(field, "a non-negative integer")
    }

    fn rope(&mut self) -> Result<Rope, TraceError> {
        let text = self.text("rope")?;
        let expected = "neox-half, interleaved or none";
        Rope::from_name(&text).ok_or_else(|| self.refuse("rope", &text, expected))
    }

    fn segments(&mut self) -> Result<Vec<Segment>, TraceError> {
        let text = self.text("segments")?;
        let ranges: BTreeMap<String, (usize, usize)> = serde_json::from_str(&text)
            .map_err(|_| self.refuse("segments", &text, "a JSON object of name: [start, end]"))?;
        let mut segments: Vec<Segment> =
            ranges.into_iter().map(|(name, (start, end))| Segment { name, start, end }).collect();
        segments.sort_by_key(|segment| (segment.start, segment.end));
        Ok(segments)
    }

    fn refuse(&self, field: &'static str, value: &str, expected: &str) -> TraceError {
        TraceError::Field {
            path: self.path.to_path_buf(),
            field,
            value: quote(value),
            expected: expected.to_string(),
        }
    }
}

fn shorten(text: &str) -> String {
    text.chars().take(16).collect()
}
