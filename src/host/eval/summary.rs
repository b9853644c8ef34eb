//! Outcomes summed up: one row per task, context, policy and budget.

use serde::Serialize;

use super::Outcome;
use crate::report::NumberFormat;
use crate::report::table::{Cell, Column, Row, Table};

/// One row of the results.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct EvalRow {
    /// Task, with the text's name for perplexity.
    pub task: String,
    /// Tokens of the context.
    pub context: usize,
    /// Policy as given.
    pub policy: String,
    /// Tokens attended exactly.
    pub budget: usize,
    /// First layers that stayed dense.
    pub dense_layers: usize,
    /// Questions.
    pub n: usize,
    /// Mean score.
    pub accuracy: f64,
    /// 95 % interval of `accuracy` (Wilson).
    pub accuracy_interval: [f64; 2],
    /// Mean score of full attention.
    pub full_accuracy: f64,
    /// Questions that full attention answers in full.
    pub n_full_right: usize,
    /// Mean score on those.
    pub accuracy_where_full_right: f64,
    /// Share of steps whose likeliest token is full attention's.
    pub agreement: f64,
    /// Mean NLL difference a token, nats.
    pub nll_delta: f64,
    /// 95 % half width of `nll_delta`, from the spread between questions.
    pub nll_delta_error: f64,
    /// Mean KL(full || policy) a token, nats.
    pub kl: f64,
    /// 95 % half width of `kl`, from the spread between questions.
    pub kl_error: f64,
}

/// Two-sided 95 % point of the normal distribution.
const Z: f64 = 1.96;

/// Sums outcomes up, in the order in which their groups first appear.
#[must_use]
pub fn summarise(outcomes: &[Outcome]) -> Vec<EvalRow> {
    let name =
        |o: &Outcome| if o.task == "perplexity" { format!("{} {}", o.task, o.text) } else { o.task.clone() };
    type Key<'a> = (String, usize, &'a str, usize, usize);
    let mut groups: Vec<(Key<'_>, Vec<&Outcome>)> = Vec::new();
    for outcome in outcomes {
        let o = outcome;
        let key = (name(o), o.context, o.policy.as_str(), o.budget, o.dense_layers);
        match groups.iter_mut().find(|(known, _)| *known == key) {
            Some((_, of)) => of.push(outcome),
            None => groups.push((key, vec![outcome])),
        }
    }
    groups
        .into_iter()
        .map(|((task, context, policy, budget, dense_layers), of)| {
            let n = of.len();
            let steps = of.iter().map(|o| o.steps).sum::<usize>().max(1) as f64;
            let right: Vec<&&Outcome> = of.iter().filter(|o| o.full_score >= 1.0).collect();
            let accuracy = mean(of.iter().map(|o| o.score));
            // A score of many tokens is a mean itself: its steps are the trials.
            let trials = if task.starts_with("perplexity") { steps } else { n as f64 };
            let per_step = |f: fn(&Outcome) -> f64| of.iter().map(|o| f(o)).sum::<f64>() / steps;
            let error = |f: fn(&Outcome) -> f64| half_width(of.iter().map(|o| f(o) / o.steps.max(1) as f64));
            EvalRow {
                task,
                context,
                policy: policy.to_owned(),
                budget,
                dense_layers,
                n,
                accuracy,
                accuracy_interval: wilson(accuracy, trials),
                full_accuracy: mean(of.iter().map(|o| o.full_score)),
                n_full_right: right.len(),
                accuracy_where_full_right: mean(right.iter().map(|o| o.score)),
                agreement: per_step(|o| o.agreed as f64),
                nll_delta: per_step(|o| o.nll_delta),
                nll_delta_error: error(|o| o.nll_delta),
                kl: per_step(|o| o.kl),
                kl_error: error(|o| o.kl),
            }
        })
        .collect()
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (n, sum) = values.fold((0usize, 0.0), |(n, sum), x| (n + 1, sum + x));
    if n == 0 { f64::NAN } else { sum / n as f64 }
}

fn half_width(values: impl Iterator<Item = f64> + Clone) -> f64 {
    let n = values.clone().count() as f64;
    let centre = mean(values.clone());
    let variance = values.map(|x| (x - centre).powi(2)).sum::<f64>() / (n - 1.0);
    if n < 2.0 { f64::NAN } else { Z * (variance / n).sqrt() }
}

/// Score interval for a proportion (Wilson, 1927).
fn wilson(p: f64, n: f64) -> [f64; 2] {
    let z2 = Z * Z;
    let centre = (p + z2 / (2.0 * n)) / (1.0 + z2 / n);
    let half = Z / (1.0 + z2 / n) * (p * (1.0 - p) / n + z2 / (4.0 * n * n)).sqrt();
    [(centre - half).max(0.0), (centre + half).min(1.0)]
}

/// The rows as a table.
#[must_use]
pub fn eval_table(rows: &[EvalRow]) -> Table {
    let mut table = Table::new([
        Column::text("task"),
        Column::number("context"),
        Column::text("policy"),
        Column::number("budget"),
        Column::number("dense"),
        Column::number("n"),
        Column::number("accuracy"),
        Column::text("95 %"),
        Column::number("full"),
        Column::number("where full right"),
        Column::number("agreement"),
        Column::number("NLL delta"),
        Column::number("KL"),
        Column::number("+-"),
    ]);
    let three = NumberFormat::Decimals(3);
    for row in rows {
        let [low, high] = row.accuracy_interval;
        let cells = [
            Cell::text(&row.task),
            Cell::number(row.context as f64, NumberFormat::Plain),
            Cell::text(&row.policy),
            Cell::number(row.budget as f64, NumberFormat::Plain),
            Cell::number(row.dense_layers as f64, NumberFormat::Plain),
            Cell::number(row.n as f64, NumberFormat::Plain),
            Cell::number(row.accuracy, three),
            Cell::text(format!("{low:.2}-{high:.2}")),
            Cell::number(row.full_accuracy, three),
            number(row.accuracy_where_full_right),
            Cell::number(row.agreement, three),
            Cell::number(row.nll_delta, three),
            Cell::number(row.kl, three),
            number(row.kl_error),
        ];
        let line = Row::new(cells);
        table.push_checked(if row.policy.starts_with("floe") { line.emphasised() } else { line });
    }
    table
}

fn number(value: f64) -> Cell {
    if value.is_nan() { Cell::missing() } else { Cell::number(value, NumberFormat::Decimals(3)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(question: usize, score: f64, full_score: f64) -> Outcome {
        Outcome {
            task: "needle".into(),
            text: "t".into(),
            context: 100,
            episode: 0,
            question,
            policy: "floe".into(),
            budget: 96,
            dense_layers: 0,
            score,
            full_score,
            steps: 10,
            agreed: 9,
            nll_delta: 1.0,
            nll_full: 2.0,
            kl: 0.5,
        }
    }

    #[test]
    fn questions_that_full_attention_fails_are_told_apart() {
        let rows = summarise(&[outcome(0, 1.0, 1.0), outcome(1, 0.0, 0.0), outcome(2, 0.0, 1.0)]);
        assert_eq!(rows.len(), 1);
        let row = &rows[0];
        assert_eq!((row.n, row.n_full_right), (3, 2));
        assert!((row.accuracy - 1.0 / 3.0).abs() < 1e-12 && (row.full_accuracy - 2.0 / 3.0).abs() < 1e-12);
        assert_eq!(row.accuracy_where_full_right, 0.5);
        assert_eq!((row.agreement, row.nll_delta, row.kl), (0.9, 0.1, 0.05));
        assert!(row.accuracy_interval[0] < row.accuracy && row.accuracy < row.accuracy_interval[1]);
        assert!(eval_table(&rows).to_text().contains("needle"));
    }

    #[test]
    fn wilson_interval_of_half_of_ten() {
        let [low, high] = wilson(0.5, 10.0);
        assert!((low - 0.2366).abs() < 1e-3 && (high - 0.7634).abs() < 1e-3, "{low} {high}");
    }
}
