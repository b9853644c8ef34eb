//! Ratios within one run, beside what the design asks for.

use floe::report::NumberFormat;
use floe::report::table::{Cell, Column, Row as Line, Table};

use super::Row;
use super::cases::Family;

/// A ratio or amount, with the goal that it is held against.
struct Finding {
    what: String,
    value: f64,
    goal: Option<Goal>,
}

#[derive(Clone, Copy)]
enum Goal {
    AtLeast(f64),
    AtMost(f64),
}

impl Goal {
    fn words(self, value: f64) -> (String, &'static str) {
        let verdict = |met| if met { "met" } else { "missed" };
        match self {
            Self::AtLeast(x) => (format!(">= {x}"), verdict(value >= x)),
            Self::AtMost(x) => (format!("<= {x}"), verdict(value <= x)),
        }
    }
}

/// Rows of one shard.
struct Shard<'a> {
    rows: Vec<&'a Row>,
    n: usize,
}

impl Shard<'_> {
    fn searches(&self, family: Family) -> impl Iterator<Item = &Row> {
        self.rows.iter().copied().filter(move |r| r.family == family && r.op == "search")
    }

    fn op(&self, family: Family, sketch: &str, op: &str) -> Option<&Row> {
        self.rows.iter().copied().find(|r| r.family == family && r.sketch == sketch && r.op == op)
    }
}

/// The table of ratios; shards in the order of `rows`.
pub fn table(rows: &[Row]) -> anyhow::Result<Table> {
    let mut shards: Vec<((&str, usize), Shard<'_>)> = Vec::new();
    for row in rows {
        let key = (row.data.as_str(), row.n);
        match shards.iter_mut().find(|(k, _)| *k == key) {
            Some((_, shard)) => shard.rows.push(row),
            None => shards.push((key, Shard { rows: vec![row], n: row.n })),
        }
    }
    let mut table = Table::new([
        Column::text("ratio, same run"),
        Column::number("value"),
        Column::text("goal"),
        Column::text(""),
    ]);
    for ((name, n), shard) in &shards {
        table.section(format!("{name}, {} tokens", NumberFormat::Count.show(*n as f64)));
        for finding in against_flat(shard).into_iter().chain(against_hnsw(shard)).chain(amounts(shard)) {
            push(&mut table, &finding)?;
        }
    }
    for name in ["tiled", "synthetic"] {
        let findings = growth(&shards, name);
        if !findings.is_empty() {
            table.section(format!("growth, {name}"));
        }
        for finding in findings {
            push(&mut table, &finding)?;
        }
    }
    Ok(table)
}

fn push(table: &mut Table, finding: &Finding) -> anyhow::Result<()> {
    let (goal, verdict) = finding.goal.map_or_else(Default::default, |g| g.words(finding.value));
    table.push(Line::new([
        Cell::text(&finding.what),
        Cell::number(finding.value, NumberFormat::Significant(3)),
        Cell::text(goal),
        Cell::text(verdict),
    ]))?;
    Ok(())
}

/// Speed and mass of every effort against the scan of the same pages.
fn against_flat(shard: &Shard<'_>) -> Vec<Finding> {
    let mut findings = Vec::new();
    for flat in shard.searches(Family::Flat) {
        for tree in shard.searches(Family::Dci).filter(|t| t.sketch == flat.sketch) {
            let mass = tree.kept_mass.unwrap_or(0.0) / flat.kept_mass.unwrap_or(f64::NAN);
            let goal = (flat.sketch == "off" && mass >= 0.99).then_some(match shard.n {
                131_072 => Some(Goal::AtLeast(4.0)),
                1_048_576 => Some(Goal::AtLeast(12.0)),
                _ => None,
            });
            findings.push(Finding {
                what: format!("{} is faster than {} by (mass x {mass:.3})", tree.index, flat.index),
                value: flat.us / tree.us,
                goal: goal.flatten(),
            });
        }
    }
    findings
}

/// Build and search against the graph: the fastest tree search that keeps at least the graph's mass.
fn against_hnsw(shard: &Shard<'_>) -> Vec<Finding> {
    let mut findings = Vec::new();
    if let (Some(tree), Some(graph)) =
        (shard.op(Family::Dci, "k2v1", "build"), shard.op(Family::Hnsw, "off", "build"))
    {
        let goal = Some(Goal::AtLeast(20.0));
        findings.push(Finding {
            what: format!("{} builds faster than hnsw by", tree.index),
            value: graph.us / tree.us,
            goal,
        });
    }
    for graph in shard.searches(Family::Hnsw) {
        let (Some(mass), keeps) = (graph.kept_mass, |t: &&Row| t.kept_mass >= graph.kept_mass) else {
            continue;
        };
        let trees = || shard.searches(Family::Dci);
        let equal = trees().filter(keeps).min_by(|a, b| a.us.total_cmp(&b.us));
        let finding = match equal {
            Some(tree) => Finding {
                what: format!("{} is faster than {} at no less mass ({mass:.3}) by", tree.index, graph.index),
                value: graph.us / tree.us,
                goal: Some(Goal::AtLeast(3.0)),
            },
            None => {
                let Some(tree) = trees().max_by(|a, b| {
                    a.kept_mass.partial_cmp(&b.kept_mass).unwrap_or(std::cmp::Ordering::Equal)
                }) else {
                    continue;
                };
                let short = mass - tree.kept_mass.unwrap_or(0.0);
                Finding {
                    what: format!(
                        "{} keeps the most mass, {short:.4} less than {}, faster by",
                        tree.index, graph.index
                    ),
                    value: graph.us / tree.us,
                    goal: None,
                }
            }
        };
        findings.push(finding);
    }
    findings
}

/// Absolute times and bytes that have a goal.
fn amounts(shard: &Shard<'_>) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (sketch, most) in [("off", None), ("k1", Some(0.10)), ("k2v1", Some(0.17))] {
        if let Some(build) = shard.op(Family::Dci, sketch, "build") {
            let goal = (shard.n >= 32_768).then_some(Goal::AtMost(4.0));
            findings.push(Finding {
                what: format!("{} build, us a token", build.index),
                value: build.us,
                goal,
            });
            findings.push(Finding {
                what: format!("{} bytes over those of the bf16 KV", build.index),
                value: build.bytes_per_token / (4 * build.dim) as f64,
                goal: most.map(Goal::AtMost),
            });
        }
        if let Some(insert) = shard.op(Family::Dci, sketch, "insert") {
            let goal = (shard.n == 131_072).then_some(Goal::AtMost(80.0));
            let value = insert.us * super::BATCH as f64;
            findings.push(Finding { what: format!("{} insert of 16 tokens, us", insert.index), value, goal });
        }
    }
    findings
}

/// Cost per token of the largest over that of the 32K shard of the same keys.
fn growth(shards: &[((&str, usize), Shard<'_>)], keys: &str) -> Vec<Finding> {
    let same = || shards.iter().filter(|((name, _), _)| *name == keys).map(|(_, s)| s);
    let (Some(small), Some(large)) =
        (same().find(|s| s.n == 32_768), same().max_by_key(|s| s.n).filter(|s| s.n > 32_768))
    else {
        return Vec::new();
    };
    let mut findings = Vec::new();
    for (family, sketch, op) in [
        (Family::Dci, "off", "build"),
        (Family::Dci, "k2v1", "build"),
        (Family::Icecache, "off", "build"),
        (Family::Icecache, "off", "search"),
    ] {
        if let (Some(a), Some(b)) = (small.op(family, sketch, op), large.op(family, sketch, op)) {
            let goal = (family == Family::Dci && large.n == 1_048_576).then_some(Goal::AtMost(1.3));
            let what = format!("{} {op}, {} over {} tokens", a.index, large.n, small.n);
            findings.push(Finding { what, value: b.us / a.us, goal });
        }
    }
    findings
}
