//! A profile as tables, as rows and as a page. Every time in it is simulated, except those of the stages, which are
//! measured on the machine that made the profile.

use serde::Serialize;

use super::{AccessLog, SimPlan, Simulated, overlap, steps};
use crate::policy::{EvictionKind, PrefetchKind};
use crate::report::chart::{Axis, Point, Series, XyChart};
use crate::report::page::{Figure, Headline, Page, Section};
use crate::report::table::{Cell, Column, Row, Table};
use crate::report::{Inks, NumberFormat};

/// Value of the report's `schema` field. Later versions add fields and never rename them.
pub const PROFILE_SCHEMA: &str = "floe-profile/1";

/// The factor that headline and timeline show.
pub(super) const SHOWN_FACTOR: f64 = 2.0;

/// Everything that a report is made of.
#[derive(Clone, Copy)]
pub struct Profile<'a> {
    /// The access string.
    pub log: &'a AccessLog,
    /// What was simulated.
    pub plan: &'a SimPlan,
    /// One entry per combination.
    pub cells: &'a [Simulated],
    /// Measured nanoseconds of each stage ([`crate::step::Stage`]) by step, mean over the kv heads; `None` when only a log was given.
    pub stages_ns: Option<&'a [[f64; 9]]>,
}

/// One row of the JSON report. Rates and shares lie in 0..=1; times are simulated.
#[derive(Clone, Debug, Serialize)]
pub struct ProfileRow {
    /// Eviction policy.
    pub policy: &'static str,
    /// Way of prefetching.
    pub prefetch: &'static str,
    /// Slots as a multiple of the units that a step retrieves.
    pub slots_factor: f64,
    /// Share of requested units that were resident.
    pub hit_rate: f64,
    /// The same under Belady's optimum without prefetch.
    pub belady_hit_rate: f64,
    /// Bytes over the link per decoded token, all shards.
    pub bytes_per_token: f64,
    /// Mean share of a step's units that the step before asked for too.
    pub overlap: f64,
    /// Share of the units fetched ahead that were used; null when none were.
    pub prefetch_accuracy: Option<f64>,
    /// Bytes per token fetched ahead for nothing.
    pub wasted_bytes_per_token: f64,
    /// Simulated stall per token, microseconds.
    pub simulated_stall_us: f64,
    /// Simulated link time per token, microseconds.
    pub simulated_link_us: f64,
}

/// The rows of a profile.
#[must_use]
pub fn rows(profile: &Profile<'_>) -> Vec<ProfileRow> {
    let overlap = overlap(profile.log);
    let row = |cell: &Simulated| ProfileRow {
        policy: cell.cell.policy.name(),
        prefetch: cell.cell.prefetch.name(),
        slots_factor: cell.cell.slots_factor,
        hit_rate: cell.hit_rate,
        belady_hit_rate: cell.belady_hit_rate,
        bytes_per_token: cell.bytes_per_token,
        overlap,
        prefetch_accuracy: cell.prefetch_accuracy,
        wasted_bytes_per_token: cell.wasted_bytes_per_token,
        simulated_stall_us: cell.stall_us,
        simulated_link_us: cell.link_busy_us,
    };
    profile.cells.iter().map(row).collect()
}

impl Profile<'_> {
    /// What the numbers mean and rest on, as lines of text.
    #[must_use]
    pub fn notes(&self) -> String {
        let (log, link) = (self.log, &self.plan.link);
        format!(
            "{} shards, {} steps, budget {}, unit {} of {} B; {:.1} % of a step's units were asked for by the step before\n\
             hit = retrieved unit resident when asked for (sinks and window not counted); belady = best possible without \
             prefetch, it sees the future\n\
             all times simulated: link {:.1} GB/s, {:.1} us a batch, {:.0} us of other work a layer, overlap {:.2}",
            log.shards.len(),
            log.accesses.len(),
            log.budget,
            log.unit.name(),
            log.unit_bytes,
            100.0 * overlap(log),
            link.gb_per_s,
            link.batch_latency_us,
            link.layer_us,
            link.overlap,
        )
    }

    /// Belady's hit rate by factor.
    fn optima(&self) -> Vec<(f64, f64)> {
        let mut optima: Vec<(f64, f64)> = Vec::new();
        for cell in self.cells {
            if optima.iter().all(|(factor, _)| *factor != cell.cell.slots_factor) {
                optima.push((cell.cell.slots_factor, cell.belady_hit_rate));
            }
        }
        optima
    }

    fn at(&self, policy: EvictionKind, prefetch: PrefetchKind) -> impl Iterator<Item = &Simulated> {
        self.cells.iter().filter(move |c| c.cell.policy == policy && c.cell.prefetch == prefetch)
    }

    /// Combination of the default policy at the shown factor, or the first one.
    pub(super) fn shown(&self) -> Option<&Simulated> {
        let wanted = |c: &&Simulated| {
            c.cell.policy == EvictionKind::default()
                && c.cell.prefetch == PrefetchKind::default()
                && c.cell.slots_factor == SHOWN_FACTOR
        };
        self.cells.iter().find(wanted).or(self.cells.first())
    }
}

/// Captioned tables: hit rates by slots, then cost by slots.
#[must_use]
pub fn tables(profile: &Profile<'_>) -> Vec<(String, Table)> {
    let mut inks = inks(profile);
    vec![
        (
            "Hit rate, percent, by slots as a multiple of the retrieved units".into(),
            hit_table(profile, &mut inks),
        ),
        (
            format!("Traffic and simulated stall per token at {SHOWN_FACTOR}x slots"),
            cost_table(profile, &mut inks),
        ),
    ]
}

fn hit_table(profile: &Profile<'_>, inks: &mut Inks) -> Table {
    let optima = profile.optima();
    let factors = optima.iter().map(|(f, _)| Column::number(format!("{f}x")).group("hit rate, by slots"));
    let columns = [Column::text("policy"), Column::text("prefetch")].into_iter().chain(factors);
    let mut table = Table::new(columns);
    let percent = |x: f64| Cell::number(x, NumberFormat::Percent(1));
    let best = optima.iter().map(|(_, rate)| percent(*rate));
    let head = [Cell::text("belady").ink(inks.reference("belady")), Cell::text("none")];
    table.push_checked(Row::new(head.into_iter().chain(best)));
    for (policy, prefetch) in combinations(profile) {
        let rates = profile.at(policy, prefetch).map(|c| percent(c.hit_rate));
        let head = [Cell::text(policy.name()).ink(ink(inks, policy)), Cell::text(prefetch.name())];
        let row = Row::new(head.into_iter().chain(rates));
        let own = policy == EvictionKind::default() && prefetch == PrefetchKind::default();
        table.push_checked(if own { row.emphasised() } else { row });
    }
    table
}

fn cost_table(profile: &Profile<'_>, inks: &mut Inks) -> Table {
    let mut table = Table::new([
        Column::text("policy"),
        Column::text("prefetch"),
        Column::number("hit rate"),
        Column::number("to belady"),
        Column::number("bytes"),
        Column::number("wasted"),
        Column::number("accuracy"),
        Column::number("stall").group("simulated"),
        Column::number("link busy").group("simulated"),
    ]);
    let shown = profile.shown().map_or(SHOWN_FACTOR, |c| c.cell.slots_factor);
    for (policy, prefetch) in combinations(profile) {
        for cell in profile.at(policy, prefetch).filter(|c| c.cell.slots_factor == shown) {
            let percent = |x: f64| Cell::number(x, NumberFormat::Percent(1));
            table.push_checked(Row::new([
                Cell::text(policy.name()).ink(ink(inks, policy)),
                Cell::text(prefetch.name()),
                percent(cell.hit_rate),
                percent(cell.hit_rate - cell.belady_hit_rate),
                Cell::number(cell.bytes_per_token, NumberFormat::Bytes),
                Cell::number(cell.wasted_bytes_per_token, NumberFormat::Bytes),
                cell.prefetch_accuracy.map_or_else(Cell::missing, percent),
                Cell::number(cell.stall_us, NumberFormat::Micros),
                Cell::number(cell.link_busy_us, NumberFormat::Micros),
            ]));
        }
    }
    table
}

/// A self-contained page: hit rate against slots, a timeline of steps, stages, tables.
#[must_use]
pub fn html(profile: &Profile<'_>, command: &str) -> String {
    let mut inks = inks(profile);
    let mut page = Page::new("Hot tier: hit rate, traffic, simulated stalls")
        .lead(
            "Which units each step asks for, served from a limited number of slots: every eviction policy and way of \
             prefetching beside Belady's optimum, which sees the future.",
        )
        .fact("command", format!("`{command}`"))
        .fact("version", env!("CARGO_PKG_VERSION"));
    for (name, text) in ["sequence", "hit", "times"].into_iter().zip(profile.notes().lines()) {
        page = page.fact(name, text);
    }
    if let Some(cell) = profile.shown() {
        let points = 100.0 * (cell.belady_hit_rate - cell.hit_rate);
        page = page.headline(Headline {
            value: NumberFormat::Percent(1).show(cell.hit_rate),
            label: format!("hit rate of {} at {}x slots", cell.cell.policy, cell.cell.slots_factor),
            note: format!("{points:.1} points below the optimum"),
        });
        page = page.headline(Headline {
            value: NumberFormat::Bytes.show(cell.bytes_per_token),
            label: "over the link per token".into(),
            note: format!("{} shards", profile.log.shards.len()),
        });
        page = page.headline(Headline {
            value: NumberFormat::Micros.show(cell.stall_us),
            label: "simulated stall per token".into(),
            note: format!("link of {:.1} GB/s", profile.plan.link.gb_per_s),
        });
    }
    page = page.section(by_slots(profile, &mut inks)).section(steps::by_step(profile, &mut inks));
    if let Some(cell) = profile.shown() {
        page = page.section(steps::on_the_clock(profile, cell));
    }
    if let Some(stages) = profile.stages_ns {
        page = page.section(steps::by_stage(profile.log, stages));
    }
    let mut section = Section::new("All combinations");
    for (caption, table) in tables(profile) {
        section = section.table(caption, table);
    }
    page.section(section).to_html()
}

fn by_slots(profile: &Profile<'_>, inks: &mut Inks) -> Section {
    let Some(&prefetch) = profile.plan.prefetches.first() else { return Section::new("By number of slots") };
    let axis = || Axis::log2("slots").unit("x retrieved").format(NumberFormat::Plain);
    let percent = NumberFormat::Percent(0);
    let mut rate = XyChart::new(axis(), Axis::linear("hit rate").format(percent)).with_legend();
    let optimum = profile.optima().into_iter().map(|(f, rate)| Point::new(f, rate));
    rate.push(Series::line("belady", inks.reference("belady"), optimum));
    let mut bytes =
        XyChart::new(axis(), Axis::linear("bytes per token").format(NumberFormat::Bytes)).with_legend();
    for policy in profile.plan.policies.iter().copied() {
        let of = |f: fn(&Simulated) -> f64| -> Vec<Point> {
            let cells = profile.at(policy, prefetch);
            cells.map(|c| Point::new(c.cell.slots_factor, f(c))).collect()
        };
        rate.push(Series::line(policy.name(), ink(inks, policy), of(|c| c.hit_rate)));
        bytes.push(Series::line(policy.name(), ink(inks, policy), of(|c| c.bytes_per_token)));
    }
    Section::new(format!("By number of slots, prefetch {}", prefetch.name())).figures([
        Figure::new("Hit rate against slots", rate)
            .caption("No demand cache can lie above the curve of the optimum."),
        Figure::new("Bytes over the link per token", bytes).caption("All shards of the profile together."),
    ])
}

fn combinations(profile: &Profile<'_>) -> Vec<(EvictionKind, PrefetchKind)> {
    let of = |policy: &EvictionKind| {
        let policy = *policy;
        profile.plan.prefetches.iter().map(move |prefetch| (policy, *prefetch)).collect::<Vec<_>>()
    };
    profile.plan.policies.iter().flat_map(of).collect()
}

pub(super) fn ink(inks: &mut Inks, policy: EvictionKind) -> crate::report::Ink {
    if policy == EvictionKind::default() { inks.own(policy.name()) } else { inks.rival(policy.name()) }
}

fn inks(profile: &Profile<'_>) -> Inks {
    let mut inks = Inks::new();
    inks.reference("belady");
    for policy in &profile.plan.policies {
        ink(&mut inks, *policy);
    }
    inks
}
