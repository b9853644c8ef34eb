//! What the engine on the device needs to know beside [`Config`], and what of a [`Config`] it can do.

use floe_cuda::ops::cache::{CacheShape, RETRIEVED_MAX};
use floe_index::export::young_max;
use floe_index::{Tail, Unit};

use super::places::capacity_words;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::reuse::ReuseKind;
use crate::select::PolicyKind;
use crate::shape::PAGE_TOKENS;

/// Which of two ways a sequence whose rows are all on the device is attended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Prefer {
    /// Exactly, as long as all rows are there.
    Exact,
    /// By selection as soon as that is predicted to be faster.
    #[default]
    Speed,
}

/// Where the state of what is not selected is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TailPlace {
    /// On a stream of its own, while rows are fetched.
    #[default]
    Beside,
    /// Behind the fetch; attention runs beside it and joins its state.
    Joined,
}

/// Where it is chosen which pages of trees a step may select from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Placement {
    /// On the device where the summaries of all pages fit, else on the host ([`super::GpuReport::rule`] says which it is). Where both
    /// fit the device's way was 2.2 to 6.5 times faster: at batch 1 from 32K to 1M tokens, at batch 8, with 2, 4 and 16 cores
    /// (bench/README.md, engine on the device).
    #[default]
    Auto,
    /// On the device, which looks at the summaries of all pages.
    Gpu,
    /// On the host, which searches the tree for the query of an earlier step: the device holds the pages that it lists and scores them
    /// with the query of the step; super-nodes stand for all other pages. Not with key sketches unless `max_doubt=inf`: nothing
    /// could be attended in full.
    Cpu,
}

/// Part of the super-nodes whose pages the host lists, where the policy's `open` says nothing.
const LISTED_PART: f32 = 0.125;
/// Super-nodes that it may list in any case.
const LISTED_LEAST: usize = 16;

/// How a step reaches the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Submit {
    /// Sparse steps are recorded once and replayed from then on. Exact ones are three kernels, which the driver queues faster one
    /// by one: 21.9 us against 23.7 at 4K tokens on an H100, where a sparse step at 128K takes 76 us replayed and 89 launched.
    #[default]
    Auto,
    /// Every step is recorded.
    Recorded,
    /// None is.
    Launches,
}

/// Memory and habits of the engine on the device.
#[derive(Debug, Clone, PartialEq)]
pub struct GpuOptions {
    /// Sequences open at a time, at most.
    pub max_sequences: usize,
    /// Tokens of a sequence, at most, when [`super::GpuEngine::admit`] names no other number.
    pub max_tokens: usize,
    /// Sequences of one step, at most.
    pub max_batch: usize,
    /// Rows of a layer on the device, all kv heads and sequences together: the hot tier. A row is `4 * head_dim` bytes. Nothing of a prompt
    /// or an answer takes more, however long.
    pub rows: usize,
    /// The same of a dense layer (`Config::dense_layers`), which attends all tokens: those that have no row there are read from host memory at
    /// every step. Layers of a span have the rows of their span, which no option names.
    pub dense_rows: usize,
    /// Tokens of a layer that have summaries on the device, all kv heads and sequences together, a multiple of 256: sixteen a page.
    /// Trees take a few pages more than their tokens fill ([`GpuOptions::for_load`] has the number).
    pub page_tokens: usize,
    /// Bytes of page-locked host memory, all layers together, at most.
    pub host_bytes: usize,
    /// What is done while everything fits.
    pub prefer: Prefer,
    /// How tail and attention follow one another.
    pub tail: TailPlace,
    /// How steps are submitted.
    pub submit: Submit,
    /// Tokens of a kv head that are brought into slots behind a sparse step, on streams of their own: the next best beyond those that it
    /// retrieved, for the layer's next step. 0: none. Whole pages where pages are selected.
    pub prefetch: usize,
    /// Where pages of trees are chosen.
    pub placement: Placement,
    /// Threads that build, extend and search trees; 0: half of the cores.
    pub tree_threads: usize,
}

impl GpuOptions {
    /// Room for `sequences` of `tokens` each, whose summaries are all on the device, and for `hot` of their rows, a fraction in
    /// [0, 1]; the sinks, the newest tokens and `config.hot.slots` of each come on top. Dense layers have room for all of their rows.
    #[must_use]
    pub fn for_load(config: &Config, sequences: usize, tokens: usize, hot: f64) -> Self {
        let heads = config.heads.num_kv_heads();
        let padded = tokens.next_multiple_of(256);
        let least = config.sinks.next_multiple_of(PAGE_TOKENS) + ring(config.window) + config.hot.slots;
        // Every place is a whole number of pages long.
        let rows = ((padded as f64 * hot.clamp(0.0, 1.0)).ceil() as usize).max(least);
        let rows = rows.next_multiple_of(PAGE_TOKENS);
        let pages = pages_each(tokens, matches!(config.policy.kind(), PolicyKind::Floe(_)));
        Self {
            max_sequences: sequences,
            max_tokens: tokens,
            max_batch: sequences,
            rows: sequences * heads * rows,
            dense_rows: match config.dense_layers {
                0 => 0,
                _ if config.policy.is_exact() => 0,
                _ => sequences * heads * padded,
            },
            page_tokens: sequences * heads * pages * PAGE_TOKENS,
            host_bytes: usize::MAX,
            prefer: Prefer::default(),
            tail: TailPlace::default(),
            submit: Submit::default(),
            placement: Placement::default(),
            prefetch: 0,
            tree_threads: 0,
        }
    }
}

impl GpuOptions {
    /// The same with the pages of trees chosen on the host, and room on the device for those alone that it lists.
    ///
    /// # Errors
    /// A configuration whose pages the host cannot choose.
    pub fn chosen_on_host(self, config: &Config) -> Result<Self> {
        let options = Self { placement: Placement::Cpu, ..self };
        let plan = Plan::new(config, &options)?;
        let pages = options.max_sequences * plan.shape.heads * plan.pages_each(options.max_tokens);
        Ok(Self { page_tokens: pages * PAGE_TOKENS, ..options })
    }
}

/// Newest tokens that keep their rows: the window, the page that leaves it, and some that a truncation may uncover.
pub(super) const fn ring(window: usize) -> usize {
    window.next_multiple_of(PAGE_TOKENS) + 4 * PAGE_TOKENS
}

/// Pages of a kv head, a multiple of 16. A tree has full pages, one page for each token that waits for a page, and a few more while
/// the ones turn into the others.
fn pages_each(capacity: usize, tree: bool) -> usize {
    let pages = capacity.div_ceil(PAGE_TOKENS);
    let pages = if tree { pages + young_max(capacity) + 4 * PAGE_TOKENS } else { pages };
    pages.next_multiple_of(PAGE_TOKENS)
}

/// What the device does of a configuration.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Plan {
    pub(super) shape: CacheShape,
    /// Every step is exact.
    pub(super) exact: bool,
    /// Bits of a key's and a value's code. With key bits tokens are selected, else whole pages.
    pub(super) bits: [usize; 2],
    /// Page means stand for what is not selected.
    pub(super) tail: bool,
    pub(super) tail_place: TailPlace,
    /// Pages are those of the host's trees; else runs of 16 tokens.
    pub(super) tree: bool,
    /// Part of the super-nodes whose pages the host lists; `None`: the device sees all pages.
    pub(super) listed: Option<f32>,
    /// Standard deviation in nats beyond which estimated logits are not trusted; `None`: nothing is estimated, or always trusted.
    pub(super) max_doubt: Option<f32>,
    /// Tokens that a step retrieves at most.
    pub(super) retrieved: usize,
    /// Tokens that are brought in for the next step at most.
    pub(super) prefetch: usize,
    /// Slots of a kv head once a sequence does not fit densely.
    pub(super) slots: usize,
}

impl Plan {
    /// Refuses what the device cannot do.
    pub(super) fn new(config: &Config, options: &GpuOptions) -> Result<Self> {
        config.validate()?;
        let heads = config.heads;
        let shape = CacheShape {
            heads: heads.num_kv_heads(),
            group: heads.group(),
            head_dim: heads.head_dim(),
            sinks: config.sinks,
            window: config.window,
            ring: ring(config.window),
        };
        shape.check()?;
        let refuse = |reason: &str| Err(Error::config("policy", config.policy.spec(), reason));
        if *config.policy.reuse() != ReuseKind::Off {
            return refuse("the cuda backend does not reuse earlier steps");
        }
        let tree = matches!(config.policy.kind(), PolicyKind::Floe(_));
        let (exact, bits, tail, max_doubt) = match config.policy.kind() {
            PolicyKind::Full => (true, [0; 2], false, None),
            PolicyKind::PageMean(options) | PolicyKind::Floe(options) => {
                let bits = [options.sketch.k_bits(), options.sketch.v_bits()];
                if bits[0] > 2 {
                    return refuse("the cuda backend keeps at most two bits of a key");
                }
                let wanted = if bits[0] > 0 { Unit::Token } else { Unit::Page };
                // Without a sketch a token of a tree scores as its page does: either unit says the same.
                if options.unit != wanted && !(tree && bits[0] == 0) {
                    return refuse(
                        "the cuda backend picks tokens with a sketch and pages (unit=page) without",
                    );
                }
                let tail = options.tail != Tail::Off;
                let estimates = tail && bits[0] > 0 && options.max_doubt.is_finite();
                (false, bits, tail, estimates.then_some(options.max_doubt))
            }
            _ => return refuse("the cuda backend runs `full`, `pagemean` and `floe`"),
        };
        let fixed = shape.fixed_max();
        let mut retrieved = config.budget.saturating_sub(fixed);
        if bits[0] == 0 && !tree {
            retrieved = retrieved / PAGE_TOKENS * PAGE_TOKENS;
        }
        if !exact && (retrieved == 0 || retrieved > RETRIEVED_MAX) {
            let reason = format!(
                "the cuda backend attends {fixed} fixed tokens and retrieves 16 to {RETRIEVED_MAX} beside"
            );
            return Err(Error::config("budget", config.budget, reason));
        }
        if !exact && config.hot.slots < retrieved {
            let reason = format!("must hold the {retrieved} tokens that a step retrieves");
            return Err(Error::config("hot.slots", config.hot.slots, reason));
        }
        let mut prefetch = if exact { 0 } else { options.prefetch };
        if bits[0] == 0 {
            prefetch = prefetch / PAGE_TOKENS * PAGE_TOKENS;
        }
        if tree && prefetch > 0 {
            let reason = "must be 0 where pages come from trees, which change between steps";
            return Err(Error::config("prefetch", options.prefetch, reason));
        }
        if prefetch > RETRIEVED_MAX || retrieved + prefetch > config.hot.slots.max(retrieved) {
            let reason = format!(
                "must be at most {RETRIEVED_MAX} and fit hot.slots beside {retrieved} retrieved tokens"
            );
            return Err(Error::config("prefetch", options.prefetch, reason));
        }
        for (field, value) in [
            ("max_sequences", options.max_sequences),
            ("max_tokens", options.max_tokens),
            ("max_batch", options.max_batch),
            ("rows", options.rows),
        ] {
            if value == 0 {
                return Err(Error::config(field, 0, "must be at least 1"));
            }
        }
        let tail_place = options.tail;
        if !options.page_tokens.is_multiple_of(256) {
            return Err(Error::config("page_tokens", options.page_tokens, "must be a multiple of 256"));
        }
        let slots = config.hot.slots;
        let plan = Self {
            shape,
            exact,
            bits,
            tail,
            tail_place,
            tree,
            listed: None,
            max_doubt,
            retrieved,
            prefetch,
            slots,
        };
        let all = shape.heads * plan.pages_each(options.max_tokens) * PAGE_TOKENS;
        let on_host = match options.placement {
            Placement::Gpu => false,
            Placement::Cpu => true,
            Placement::Auto => tree && options.page_tokens < all && max_doubt.is_none(),
        };
        if !on_host {
            return Ok(plan);
        }
        let refuse = |reason: &str| {
            Err(Error::config("placement", "cpu", format!("{reason} ({})", config.policy.spec())))
        };
        let PolicyKind::Floe(switches) = config.policy.kind() else {
            return refuse("only `floe` has trees that the host can search");
        };
        if max_doubt.is_some() {
            return refuse("needs `max_doubt=inf` with a key sketch");
        }
        let part = if switches.open < 1.0 { switches.open } else { LISTED_PART };
        Ok(Self { listed: Some(part), ..plan })
    }

    /// The same heads where everything is attended.
    pub(super) const fn dense(&self) -> Self {
        Self {
            exact: true,
            bits: [0; 2],
            tail: false,
            tree: false,
            listed: None,
            max_doubt: None,
            retrieved: 0,
            prefetch: 0,
            slots: 0,
            ..*self
        }
    }

    /// Bytes of a page's summaries, codes and scales where rows have elements of so many bytes.
    pub(super) const fn page_bytes(&self, element: usize) -> usize {
        let mut bytes = 2 * self.shape.head_dim * element + 4;
        let mut part = 0;
        while part < 2 {
            if self.bits[part] > 0 {
                bytes += 2 * self.bits[part] * self.shape.head_dim + 32;
            }
            part += 1;
        }
        bytes
    }

    /// Whether tokens are selected, by their sketches; else pages.
    pub(super) const fn by_token(&self) -> bool {
        self.bits[0] > 0
    }

    /// Variance of a logit estimated at this softmax scale over its bound, for `|q|^2` and a mean square residual of 1.
    pub(super) fn doubt_factor(&self, scale: f32) -> Option<f32> {
        let distortion = floe_index::export::code_distortion(self.bits[0]);
        self.max_doubt.map(|bound| scale * scale * distortion / (bound * bound))
    }

    /// Whether a selection lists tokens; else pages.
    pub(super) const fn lists_tokens(&self) -> bool {
        self.by_token() || self.tree
    }

    /// What a step lists at most.
    pub(super) const fn units(&self) -> usize {
        if self.lists_tokens() { self.retrieved } else { self.retrieved / PAGE_TOKENS }
    }

    /// Pages of a kv head of a sequence of at most `capacity` tokens, a multiple of 16.
    pub(super) fn pages_each(&self, capacity: usize) -> usize {
        match self.listed {
            _ if self.exact => 0,
            None => pages_each(capacity, self.tree),
            Some(_) => {
                (self.listed_most(capacity) + 2) * PAGE_TOKENS
                    + young_max(capacity).next_multiple_of(PAGE_TOKENS)
            }
        }
    }

    /// Super-nodes whose pages the host lists, at most, for a sequence of at most `capacity` tokens.
    pub(super) fn listed_most(&self, capacity: usize) -> usize {
        // A super-node has sixteen pages at most, and fourteen where nothing was inserted.
        let all = capacity.div_ceil(14 * PAGE_TOKENS);
        self.listed.map_or(0, |part| ((all as f32 * part) as usize).max(LISTED_LEAST))
    }

    /// Super-nodes of a kv head on the device, a multiple of 16: half as many pages as they have room for is what a split leaves.
    pub(super) fn nodes_each(&self, max_tokens: usize) -> usize {
        if self.listed.is_none() { 0 } else { (max_tokens.div_ceil(128) + 16).next_multiple_of(16) }
    }

    /// Super-nodes of a layer on the device.
    pub(super) fn nodes(&self, options: &GpuOptions) -> usize {
        options.max_sequences * self.shape.heads * self.nodes_each(options.max_tokens)
    }

    /// Words of a layer's tables by token, where `pages` are on the device.
    pub(super) fn token_words(&self, options: &GpuOptions, pages: usize) -> usize {
        let words = options.max_sequences * self.shape.heads * capacity_words(options.max_tokens);
        if self.tree { words } else { pages * PAGE_TOKENS }
    }

    /// Pages of a layer's trees that are built beside steps at a time: sixteen tokens become sixteen pages of their own and one or two
    /// of sixteen, which leave as many pages of one token.
    pub(super) const fn built_beside(&self) -> usize {
        if self.tree && self.listed.is_none() { self.shape.heads * 4 * PAGE_TOKENS } else { 0 }
    }

    /// Where pages of trees are chosen, in words.
    pub(super) fn placement(&self) -> String {
        match self.listed {
            _ if !self.tree => String::new(),
            None => "; pages are chosen on the device, whose memory holds the summaries of all".to_owned(),
            Some(part) => {
                format!("; the host lists the pages of {part} of the super-nodes, by an earlier query")
            }
        }
    }

    /// Units that are brought in for the next step at most.
    pub(super) const fn prefetch_units(&self) -> usize {
        if self.by_token() { self.prefetch } else { self.prefetch / PAGE_TOKENS }
    }

    /// Rows of a kv head with slots at least.
    pub(super) const fn slot_rows(&self) -> usize {
        (self.shape.sinks + self.shape.ring + self.slots).next_multiple_of(PAGE_TOKENS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::HotConfig;
    use crate::shape::{HeadShape, KvDtype};

    fn config(policy: &str) -> Config {
        let heads = HeadShape::new(8, 2, 128).unwrap();
        let hot = HotConfig { slots: 512, ..HotConfig::default() };
        Config { hot, budget: 256, policy: policy.parse().unwrap(), ..Config::new(1, heads, KvDtype::Bf16) }
    }

    #[test]
    fn pages_are_chosen_on_the_device_where_their_summaries_fit() {
        let listed = |policy: &str, change: fn(GpuOptions) -> GpuOptions| {
            let config = config(policy);
            Plan::new(&config, &change(GpuOptions::for_load(&config, 2, 100_000, 0.0)))
                .map(|plan| plan.listed)
        };
        let half =
            |options: GpuOptions| GpuOptions { page_tokens: options.page_tokens / 512 * 256, ..options };
        let cpu = |options| GpuOptions { placement: Placement::Cpu, ..options };
        assert_eq!(listed("floe:sketch=off", |options| options).unwrap(), None);
        // Room for one of two sequences is room for a sequence.
        assert_eq!(listed("floe:sketch=off", half).unwrap(), None);
        let tenth =
            |options: GpuOptions| GpuOptions { page_tokens: options.page_tokens / 5120 * 256, ..options };
        assert_eq!(listed("floe:sketch=off", tenth).unwrap(), Some(LISTED_PART));
        assert_eq!(listed("floe:sketch=off,open=0.25", cpu).unwrap(), Some(0.25));
        assert_eq!(listed("floe:max_doubt=inf", cpu).unwrap(), Some(LISTED_PART));
        // What is in doubt could not be attended in full, runs of tokens have no tree.
        assert_eq!(listed("floe", tenth).unwrap(), None);
        for policy in ["floe", "pagemean:unit=page,tail=page"] {
            let error = listed(policy, cpu).unwrap_err().to_string();
            assert!(error.contains("placement"), "{error}");
        }
    }

    #[test]
    fn lists_take_a_part_of_the_room_that_all_pages_take() {
        let config = config("floe:sketch=off");
        let all = GpuOptions::for_load(&config, 1, 1_000_000, 0.0);
        let listed = all.clone().chosen_on_host(&config).unwrap();
        assert!(listed.page_tokens * 6 < all.page_tokens, "{} of {}", listed.page_tokens, all.page_tokens);
        let plan = Plan::new(&config, &listed).unwrap();
        let (pages, young) = (plan.pages_each(1_000_000), young_max(1_000_000));
        assert!(pages >= plan.listed_most(1_000_000) * PAGE_TOKENS + young);
        // Every super-node has its place, however full.
        assert!(plan.nodes_each(1_000_000) >= 1_000_000 / 16 / 8);
        assert!(plan.placement().contains("host"));
    }
}
