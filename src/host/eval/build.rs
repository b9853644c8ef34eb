//! Seeded episodes: facts between the sentences of a real text, and questions about them.
//!
//! Shapes follow RULER (Hsieh et al., 2024, arXiv 2404.06654) and lost-in-the-middle (Liu et al., 2023, arXiv
//! 2307.03172). A fact is a pair in brackets, `(badger 4821)`, and a question gives its first half: of the forms tried on a
//! model of 135M parameters at 8K tokens with full attention this was answered best (6 of 6; whole sentences around the
//! pair 1 to 3 of 6, JSON 0 of 6).

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use super::task::{Blank, Episode, Question, Task};
use crate::host::{HostError, HostResult};

/// Names of facts.
const NAMES: [&str; 96] = [
    "anchor", "badger", "balloon", "banana", "barrel", "basket", "beacon", "beaver", "biscuit", "blanket",
    "bucket", "butter", "cactus", "camera", "candle", "canyon", "carpet", "carrot", "castle", "cherry",
    "circus", "comet", "copper", "cotton", "cradle", "diamond", "dolphin", "dragon", "eagle", "elephant",
    "engine", "falcon", "feather", "ferry", "garlic", "giant", "ginger", "glacier", "goblin", "guitar",
    "hammer", "helmet", "hermit", "island", "jacket", "jungle", "kettle", "kitten", "ladder", "lantern",
    "lemon", "lizard", "magnet", "marble", "melon", "meteor", "mirror", "monkey", "mustard", "needle",
    "olive", "onion", "orange", "otter", "panda", "parrot", "pepper", "pillow", "pirate", "planet",
    "pumpkin", "puppet", "rabbit", "radio", "robot", "rocket", "saddle", "salmon", "scarf", "shark",
    "shovel", "spider", "sponge", "tiger", "tunnel", "turtle", "umbrella", "violin", "volcano", "wagon",
    "walrus", "whale", "window", "wizard", "zebra", "zipper",
];

/// Records of a [`Task::KvRetrieval`] context; their notes fill it.
const RECORDS: usize = 64;

/// Names asked at once by [`Task::NeedleMultiQuery`].
const AT_ONCE: usize = 3;

/// Names and numbers that no two facts share.
struct Source {
    rng: ChaCha8Rng,
    names: Vec<&'static str>,
    numbers: Vec<u64>,
}

impl Source {
    fn new(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut names = NAMES.to_vec();
        shuffle(&mut names, &mut rng);
        Self { rng, names, numbers: Vec::new() }
    }

    fn name(&mut self, questions: usize) -> HostResult<&'static str> {
        let reason = || HostError::argument("questions", questions, "too many names for one context");
        self.names.pop().ok_or_else(reason)
    }

    /// Four digits.
    fn number(&mut self) -> String {
        loop {
            let number = 1000 + self.rng.next_u64() % 9000;
            if !self.numbers.contains(&number) {
                self.numbers.push(number);
                return number.to_string();
            }
        }
    }
}

/// Builds one episode that asks `questions` questions of each task. `text` is cut to leave room for the facts; both
/// together are about `chars` characters.
///
/// # Errors
/// [`HostError::Argument`] when the text is too short, no question is asked or too many are, or tasks cannot share a
/// context.
pub fn episode(
    tasks: &[Task],
    text: &str,
    (chars, questions): (usize, usize),
    seed: u64,
) -> HostResult<Episode> {
    if let Some(alone) = tasks.iter().find(|task| tasks.len() > 1 && !task.plants()) {
        let reason = "kv-retrieval and perplexity have contexts of their own";
        return Err(HostError::argument("tasks", alone.name(), reason));
    }
    if tasks == [Task::Perplexity] {
        return Ok(Episode { context: cut(text, chars, seed)?.to_owned(), questions: Vec::new() });
    }
    if questions == 0 {
        return Err(HostError::argument("questions", questions, "at least one"));
    }
    let mut source = Source::new(seed);
    if tasks == [Task::KvRetrieval] {
        return records(text, (chars, questions), &mut source, seed);
    }
    let (mut facts, mut asked) = (Vec::new(), Vec::new());
    // Multi-query asks for the facts of the plain needle.
    let needles = [Task::Needle, Task::NeedleMultiQuery];
    if tasks.iter().any(|task| needles.contains(task)) {
        let pairs = (0..questions.max(2 * AT_ONCE))
            .map(|_| Ok((source.name(questions)?, source.number())))
            .collect::<HostResult<Vec<_>>>()?;
        facts.extend(pairs.iter().map(|(name, number)| pair(name, number)));
        for &task in tasks.iter().filter(|task| needles.contains(task)) {
            let at_once = if task == Task::Needle { 1 } else { AT_ONCE };
            asked.extend((0..questions).map(|i| {
                let of = (0..at_once).map(|j| &pairs[(i + j) % pairs.len()]);
                let blanks = of.map(|(name, number)| blank(name, &[number])).collect();
                question(task, blanks)
            }));
        }
    }
    for &task in tasks {
        match task {
            Task::NeedleMultiValue => {
                for _ in 0..questions {
                    let (name, numbers) = (source.name(questions)?, [source.number(), source.number()]);
                    facts.extend(numbers.iter().map(|number| pair(name, number)));
                    asked.push(question(task, numbers.iter().map(|_| blank(name, &numbers)).collect()));
                }
            }
            Task::VariableTracking => {
                for _ in 0..questions {
                    let (first, second, number) =
                        (source.name(questions)?, source.name(questions)?, source.number());
                    facts.extend([pair(first, second), pair(second, &number)]);
                    asked.push(question(task, vec![blank(first, &[second]), blank(second, &[&number])]));
                }
            }
            Task::WordCount => {
                let words = (0..questions.max(AT_ONCE))
                    .map(|i| Ok((source.name(questions)?, 1 + (3 * i + 1) % 4)))
                    .collect::<HostResult<Vec<_>>>()?;
                for (word, times) in &words {
                    facts.extend((0..*times).map(|_| format!("({word}!)")));
                }
                asked.extend((0..questions).map(|i| count(&words, i)));
            }
            Task::Needle | Task::NeedleMultiQuery | Task::KvRetrieval | Task::Perplexity => {}
        }
    }
    let fact_chars: usize = facts.iter().map(|fact| fact.len() + 1).sum();
    let text = cut(text, chars.saturating_sub(fact_chars), seed)?;
    shuffle(&mut facts, &mut source.rng);
    Ok(Episode { context: plant(text, &facts), questions: asked })
}

fn pair(name: &str, value: &str) -> String {
    format!("({name} {value})")
}

fn blank(name: &str, wanted: &[impl AsRef<str>]) -> Blank {
    let wanted = wanted.iter().map(|wanted| wanted.as_ref().to_owned()).collect();
    Blank { lead: format!("({name}"), wanted }
}

fn question(task: Task, mut blanks: Vec<Blank>) -> Question {
    // Later blanks go on in the answer.
    blanks.iter_mut().skip(1).for_each(|blank| blank.lead.insert(0, ' '));
    Question { task, text: "Complete the pair from the text.".into(), blanks }
}

/// How often word `asked` occurs, after two true examples.
fn count(words: &[(&str, usize)], asked: usize) -> Question {
    let line = |(word, times): &(&str, usize)| format!("({word}!) {times} times, ");
    let examples = (1..AT_ONCE).map(|i| line(&words[(asked + i) % words.len()])).collect::<String>();
    let (word, times) = words[asked];
    let lead = format!("{examples}({word}!)");
    Question {
        task: Task::WordCount,
        text: "How many times does the text have each marked word?".into(),
        blanks: vec![Blank { lead, wanted: vec![times.to_string()] }],
    }
}

/// A context of records, each a pair and a piece of the text.
fn records(
    text: &str,
    (chars, questions): (usize, usize),
    source: &mut Source,
    seed: u64,
) -> HostResult<Episode> {
    if questions > RECORDS {
        let reason = format!("a context has {RECORDS} records");
        return Err(HostError::argument("questions", questions, reason));
    }
    let pairs = (0..RECORDS)
        .map(|_| Ok((source.name(questions)?, source.number())))
        .collect::<HostResult<Vec<_>>>()?;
    let fact_chars: usize = pairs.iter().map(|(name, number)| name.len() + number.len() + 5).sum();
    let text = cut(text, chars.saturating_sub(fact_chars), seed)?;
    let mut context = String::from("Records:\n");
    let piece = |i: usize| {
        let edge = |i: usize| {
            let near = text.floor_char_boundary(i * text.len() / RECORDS);
            text[near..].find(' ').map_or(near, |at| near + at)
        };
        let end = if i + 1 == RECORDS { text.len() } else { edge(i + 1) };
        text[if i == 0 { 0 } else { edge(i) }..end].split_whitespace().collect::<Vec<_>>().join(" ")
    };
    for (i, (name, number)) in pairs.iter().enumerate() {
        context.push_str(&format!("{} {}\n", pair(name, number), piece(i)));
    }
    let asked = (0..questions).map(|i| {
        let (name, number) = &pairs[(2 * i + 1) * RECORDS / (2 * questions)];
        Question {
            text: "Complete the record.".into(),
            ..question(Task::KvRetrieval, vec![blank(name, &[number])])
        }
    });
    Ok(Episode { questions: asked.collect(), context })
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
fn shuffle<T>(items: &mut [T], rng: &mut ChaCha8Rng) {
    for i in (1..items.len()).rev() {
        items.swap(i, (rng.next_u64() % (i as u64 + 1)) as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text() -> String {
        (0..4000).map(|i| format!("Sentence number {i} says nothing. ")).collect()
    }

    const PLANTED: [Task; 5] = [
        Task::Needle,
        Task::NeedleMultiValue,
        Task::NeedleMultiQuery,
        Task::VariableTracking,
        Task::WordCount,
    ];

    #[test]
    fn every_answer_is_in_its_context_and_the_seed_repeats() {
        let alone = Task::ALL.map(|task| vec![task]);
        for tasks in alone.iter().map(Vec::as_slice).chain([&PLANTED[..]]) {
            let build = |seed| episode(tasks, &text(), (20_000, 10), seed).unwrap();
            let made = build(3);
            assert!(made == build(3), "{tasks:?}");
            assert!(made != build(4), "{tasks:?}: the seed changes nothing");
            assert!((18_000..23_000).contains(&made.context.len()), "{tasks:?}: {}", made.context.len());
            let asked = if tasks == [Task::Perplexity] { 0 } else { 10 * tasks.len() };
            assert_eq!(made.questions.len(), asked);
            for question in &made.questions {
                // Blank by blank another of the wanted answers, as a model with several values would give them.
                let right: Vec<String> = (question.blanks.iter().enumerate())
                    .map(|(i, blank)| blank.wanted[i % blank.wanted.len()].clone())
                    .collect();
                assert_eq!(question.score(&right), 1.0, "{question:?}");
                assert_eq!(question.score(&["no idea".to_owned()]), 0.0);
                if question.task == Task::WordCount {
                    continue;
                }
                for (blank, right) in question.blanks.iter().zip(&right) {
                    let fact = format!("{} {right})", blank.lead.trim());
                    assert_eq!(made.context.matches(&fact).count(), 1, "{fact}");
                }
            }
        }
    }

    #[test]
    fn counts_are_true() {
        let made = episode(&[Task::WordCount], &text(), (20_000, 8), 5).unwrap();
        for question in &made.questions {
            let blank = &question.blanks[0];
            let (examples, asked) = blank.lead.rsplit_once(", ").unwrap();
            assert_eq!(made.context.matches(asked).count().to_string(), blank.wanted[0]);
            for example in examples.split(", ") {
                let (word, times) = example.split_once(' ').unwrap();
                assert_eq!(format!("{} times", made.context.matches(word).count()), times);
            }
        }
    }

    #[test]
    fn what_cannot_be_asked_is_refused() {
        let refused = |tasks: &[Task], questions| {
            episode(tasks, &text(), (20_000, questions), 0).unwrap_err().to_string()
        };
        assert!(refused(&[Task::Needle, Task::KvRetrieval], 4).contains("contexts of their own"));
        assert!(refused(&[Task::Needle], 0).contains("`questions` = 0"));
        assert!(refused(&[Task::Needle], 97).contains("`questions` = 97"));
        assert!(refused(&[Task::KvRetrieval], 65).contains("64 records"));
        assert!(episode(&[Task::Needle], "short", (20_000, 4), 0).is_err());
    }
}
