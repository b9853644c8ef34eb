//! Tasks: seeded prompts over a long text, with answers that can be checked.
//!
//! An [`Episode`] is one long context and several questions about it, so that one prefill serves them all. Facts are
//! planted between sentences of a real text. Shapes follow RULER (Hsieh et al., 2024, arXiv 2404.06654) and
//! lost-in-the-middle (Liu et al., 2023, arXiv 2307.03172).

use std::str::FromStr;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::host::{HostError, HostResult};

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Task {
    /// One number for each of many names; one name is asked.
    Needle,
    /// Three numbers for each name; all three are asked.
    NeedleMultiValue,
    /// One number for each name; three names are asked at once.
    NeedleMultiQuery,
    /// Chains of assignments; the value at the end of one is asked.
    VariableTracking,
    /// A long list of random keys and values; the value of one key is asked.
    KvRetrieval,
    /// Rare words planted a few times each; how often one occurs is asked.
    WordCount,
    /// The text itself goes on.
    Perplexity,
}

impl Task {
    /// All tasks, in order of reports.
    pub const ALL: [Self; 7] = [
        Self::Needle,
        Self::NeedleMultiValue,
        Self::NeedleMultiQuery,
        Self::VariableTracking,
        Self::KvRetrieval,
        Self::WordCount,
        Self::Perplexity,
    ];

    /// Name on the command line and in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Needle => "needle",
            Self::NeedleMultiValue => "needle-multi-value",
            Self::NeedleMultiQuery => "needle-multi-query",
            Self::VariableTracking => "variable-tracking",
            Self::KvRetrieval => "kv-retrieval",
            Self::WordCount => "word-count",
            Self::Perplexity => "perplexity",
        }
    }
}

impl FromStr for Task {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = || Self::ALL.map(Self::name).join(", ");
        Self::ALL
            .into_iter()
            .find(|task| task.name() == name)
            .ok_or_else(|| format!("unknown task; known: {}", known()))
    }
}

/// One long context and its questions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Episode {
    /// The context, facts planted.
    pub context: String,
    /// Questions about it; none for [`Task::Perplexity`].
    pub questions: Vec<Question>,
}

/// A question and the texts that a right answer contains.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Text after the context.
    pub text: String,
    /// Start of the answer, given to the model so that small models answer to the point.
    pub lead: String,
    /// Texts that the answer has to contain.
    pub wanted: Vec<String>,
}

impl Question {
    /// Share of the wanted texts that `answer` contains, whole numbers and words only.
    #[must_use]
    pub fn score(&self, answer: &str) -> f64 {
        let words: Vec<&str> = answer.split(|c: char| !c.is_alphanumeric()).collect();
        let found = self.wanted.iter().filter(|wanted| words.contains(&wanted.as_str())).count();
        found as f64 / self.wanted.len().max(1) as f64
    }
}

/// Names that the novels do not use; two make a key.
const FIRST: [&str; 16] = [
    "amber", "cobalt", "crimson", "ivory", "jade", "lilac", "maroon", "ochre", "pewter", "russet", "saffron",
    "scarlet", "silver", "teal", "umber", "violet",
];
const SECOND: [&str; 16] = [
    "anchor", "badger", "beacon", "canyon", "comet", "falcon", "glacier", "harbor", "lantern", "magnet",
    "otter", "pioneer", "rocket", "summit", "tunnel", "walrus",
];

/// Builds one episode. `text` is cut to leave room for the facts; both together are about `chars` characters.
///
/// # Errors
/// [`HostError::Argument`] when the text is too short or no question is asked.
pub fn episode(task: Task, text: &str, (chars, questions): (usize, usize), seed: u64) -> HostResult<Episode> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut number = |digits: u32| {
        let low = 10u64.pow(digits - 1);
        (low + rng.next_u64() % (9 * low)).to_string()
    };
    let keys: Vec<String> = {
        let start = number(4).parse::<usize>().unwrap_or(0);
        // Odd steps through 256 pairs: all different.
        (0..256)
            .map(|i| (start + i * 37) % 256)
            .map(|k| format!("{} {}", FIRST[k / 16], SECOND[k % 16]))
            .collect()
    };
    let ask = |text: String, lead: String, wanted: Vec<String>| Question { text, lead, wanted };
    let mut facts: Vec<String> = Vec::new();
    let mut asked: Vec<Question> = Vec::new();
    let num_keys = questions.clamp(1, 200).max(8);
    match task {
        Task::Needle | Task::NeedleMultiValue | Task::NeedleMultiQuery => {
            let each = if task == Task::NeedleMultiValue { 3 } else { 1 };
            let numbers: Vec<Vec<String>> =
                (0..num_keys).map(|_| (0..each).map(|_| number(6)).collect()).collect();
            for (key, numbers) in keys.iter().zip(&numbers) {
                facts.extend(numbers.iter().map(|n| format!("One of the magic numbers for {key} is {n}.")));
            }
            for i in 0..questions {
                let of = |j: usize| (&keys[(i + j) % num_keys], &numbers[(i + j) % num_keys]);
                asked.push(if task == Task::NeedleMultiQuery {
                    let names = format!("{}, {} and {}", of(0).0, of(1).0, of(2).0);
                    let wanted = (0..3).flat_map(|j| of(j).1.clone()).collect();
                    let text = format!("What are the magic numbers for {names} that the text mentions? Answer with the numbers.");
                    ask(text, format!("The magic numbers for {names} are"), wanted)
                } else {
                    let (key, numbers) = of(0);
                    let (be, s) = if each == 1 { ("is", "") } else { ("are", "s") };
                    let text = format!("What {be} the magic number{s} for {key} that the text mentions? Answer with the number{s}.");
                    ask(text, format!("The magic number{s} for {key} {be}"), numbers.clone())
                });
            }
        }
        Task::VariableTracking => {
            for (chain, key) in keys.iter().take(num_keys).enumerate() {
                let name = |step: usize| {
                    format!("{}_{chain}_{step}", key.split(' ').next_back().unwrap_or_default())
                };
                let value = number(5);
                facts.push(format!("Set {} = {value}.", name(0)));
                facts.extend((1..3).map(|step| format!("Set {} = {}.", name(step), name(step - 1))));
                if chain < questions {
                    let text = format!(
                        "What is the number that {} is set to, step by step? Answer with the number.",
                        name(2)
                    );
                    asked.push(ask(text, format!("{} = {} = {} =", name(2), name(1), name(0)), vec![value]));
                }
            }
        }
        Task::KvRetrieval => {
            // Keys of words: small models fail at random digits even with full attention, which would tell nothing.
            let (mut pairs, mut used) = (Vec::new(), 0);
            while used < chars && pairs.len() < 256 * FIRST.len() {
                let i = pairs.len();
                let pair = (format!("{} {}", keys[i % 256], FIRST[(i / 256 + i) % FIRST.len()]), number(4));
                used += pair.0.len() + pair.1.len() + 9;
                pairs.push(pair);
            }
            for i in 0..questions {
                let (key, value) = &pairs[(2 * i + 1) * pairs.len() / (2 * questions)];
                let text = format!("What is the value of the key \"{key}\" in the JSON data?");
                asked.push(ask(text, format!("\"{key}\": \""), vec![value.clone()]));
            }
            let body: Vec<String> = pairs.iter().map(|(k, v)| format!(" \"{k}\": \"{v}\"")).collect();
            let context = format!("JSON data:\n{{{}}}", body.join(",\n"));
            return checked(Episode { context, questions: asked }, questions);
        }
        Task::WordCount => {
            for (i, key) in keys.iter().take(num_keys).enumerate() {
                let times = 1 + (i * 7 + 3) % 5;
                facts.extend((0..times).map(|_| format!("Somebody shouted: {key}!")));
                if i < questions {
                    let text =
                        format!("How many times is \"{key}\" shouted in the text? Answer with a digit.");
                    asked.push(ask(
                        text,
                        format!("The number of times \"{key}\" is shouted is"),
                        vec![times.to_string()],
                    ));
                }
            }
        }
        Task::Perplexity => {
            return Ok(Episode { context: cut(text, chars, seed)?.to_owned(), questions: Vec::new() });
        }
    }
    let fact_chars: usize = facts.iter().map(|fact| fact.len() + 1).sum();
    let text = cut(text, chars.saturating_sub(fact_chars), seed)?;
    shuffle(&mut facts, seed);
    checked(Episode { context: plant(text, &facts), questions: asked }, questions)
}

fn checked(episode: Episode, questions: usize) -> HostResult<Episode> {
    if questions == 0 || episode.questions.len() < questions {
        let reason = format!("this task asks 1 to {} questions of a context", episode.questions.len());
        return Err(HostError::argument("questions", questions, reason));
    }
    Ok(episode)
}

/// Some `chars` characters of the text, another part for each seed.
fn cut(text: &str, chars: usize, seed: u64) -> HostResult<&str> {
    if text.len() < chars {
        return Err(HostError::argument(
            "text",
            format!("{} bytes", text.len()),
            format!("at least {chars} are needed"),
        ));
    }
    let start = (seed as usize).wrapping_mul(48_271) % (text.len() - chars + 1);
    let before = &text[..text.floor_char_boundary(start)];
    // Where a paragraph starts, or at least a sentence.
    let start = before.rfind("\n\n").or_else(|| before.rfind(". ")).map_or(0, |at| at + 2);
    let end = (start + chars).min(text.len());
    Ok(&text[start..text.floor_char_boundary(end)])
}

/// Puts the facts between sentences, evenly spread.
fn plant(text: &str, facts: &[String]) -> String {
    let mut out = String::with_capacity(text.len() + facts.len() * 64);
    let mut from = 0;
    for (i, fact) in facts.iter().enumerate() {
        let near = text.floor_char_boundary((2 * i + 1) * text.len() / (2 * facts.len()));
        let at = text[near..].find(". ").map_or(near, |at| near + at + 2).max(from);
        out.push_str(&text[from..at]);
        out.push_str(fact);
        out.push(' ');
        from = at;
    }
    out.push_str(&text[from..]);
    out
}

/// Fisher-Yates.
fn shuffle(facts: &mut [String], seed: u64) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed ^ 0x5eed);
    for i in (1..facts.len()).rev() {
        facts.swap(i, (rng.next_u64() % (i as u64 + 1)) as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text() -> String {
        (0..4000).map(|i| format!("Sentence number {i} says nothing. ")).collect()
    }

    #[test]
    fn every_answer_is_in_its_context_and_the_seed_repeats() {
        for task in Task::ALL {
            let build = |seed| episode(task, &text(), (20_000, 10), seed).unwrap();
            let made = build(3);
            assert!(made == build(3), "{task:?}");
            assert!(made != build(4), "{task:?}: the seed changes nothing");
            assert!((18_000..23_000).contains(&made.context.len()), "{task:?}: {}", made.context.len());
            if task != Task::Perplexity {
                assert_eq!(made.questions.len(), 10);
            }
            for question in &made.questions {
                assert_eq!(question.score(&question.wanted.join(" and ")), 1.0);
                assert_eq!(question.score("no idea"), 0.0);
                if task != Task::WordCount {
                    assert!(
                        question.wanted.iter().all(|w| made.context.contains(w.as_str())),
                        "{question:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn counts_are_true() {
        let made = episode(Task::WordCount, &text(), (20_000, 8), 5).unwrap();
        for question in &made.questions {
            let key = question.text.split('"').nth(1).unwrap();
            assert_eq!(made.context.matches(&format!("{key}!")).count().to_string(), question.wanted[0]);
        }
    }

    #[test]
    fn part_of_a_number_is_no_answer() {
        let question =
            Question { text: String::new(), lead: String::new(), wanted: vec!["4821".into(), "77".into()] };
        assert_eq!(question.score("It is 4821."), 0.5);
        assert_eq!(question.score("48210, 7, 778"), 0.0);
    }
}
