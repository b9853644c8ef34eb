//! Tasks and questions, and how an answer is scored.

use std::str::FromStr;

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Task {
    /// One number for each of many names; one name is asked.
    Needle,
    /// Two numbers for each name, in two places; both are asked.
    NeedleMultiValue,
    /// One number for each name; three names are asked, one after the other.
    NeedleMultiQuery,
    /// Chains of names that end in a number; every link of one is asked, each after the right answer to the one before.
    VariableTracking,
    /// A long list of records with a key, a value and a note; the value of one key is asked.
    KvRetrieval,
    /// Marked words, one to four times each; how often one occurs is asked.
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

    /// Whether the task plants facts into a text, so that several such tasks can share a context.
    #[must_use]
    pub const fn plants(self) -> bool {
        !matches!(self, Self::KvRetrieval | Self::Perplexity)
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

/// A question whose answer has one blank or several.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Whose question it is.
    pub task: Task,
    /// Text after the context.
    pub text: String,
    /// Blanks to fill, in order.
    pub blanks: Vec<Blank>,
}

/// A start of a sentence that the model has to complete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blank {
    /// Given to the model as the start (for later blanks: the continuation) of its answer, so that small models answer
    /// to the point.
    pub lead: String,
    /// Right answers; one of them counts, and only once in a question.
    pub wanted: Vec<String>,
}

impl Question {
    /// Share of the blanks that were filled rightly; `answers` in order of the blanks. Whole numbers and words count.
    #[must_use]
    pub fn score(&self, answers: &[String]) -> f64 {
        let mut given: Vec<&str> = Vec::new();
        for (blank, answer) in self.blanks.iter().zip(answers) {
            let words: Vec<&str> = answer.split(|c: char| !c.is_alphanumeric()).collect();
            let fresh =
                |wanted: &&String| words.contains(&wanted.as_str()) && !given.contains(&wanted.as_str());
            given.extend(blank.wanted.iter().find(fresh).map(String::as_str));
        }
        given.len() as f64 / self.blanks.len().max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question(wanted: &[&[&str]]) -> Question {
        let blank = |wanted: &&[&str]| Blank {
            lead: String::new(),
            wanted: wanted.iter().map(|w| (*w).to_owned()).collect(),
        };
        Question { task: Task::Needle, text: String::new(), blanks: wanted.iter().map(blank).collect() }
    }

    fn score(question: &Question, answers: &[&str]) -> f64 {
        question.score(&answers.iter().map(|a| (*a).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn part_of_a_number_is_no_answer() {
        let question = question(&[&["4821"], &["77"]]);
        assert_eq!(score(&question, &[" 4821)", " 7)"]), 0.5);
        assert_eq!(score(&question, &["48210", "778"]), 0.0);
        assert_eq!(score(&question, &["77", "4821"]), 0.0, "each blank has its own answer");
    }

    #[test]
    fn the_same_answer_twice_counts_once() {
        let question = question(&[&["1", "2"], &["1", "2"]]);
        assert_eq!(score(&question, &["2", "1"]), 1.0);
        assert_eq!(score(&question, &["2", "2"]), 0.5);
    }
}
