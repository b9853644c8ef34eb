//! Renders whole pages as a user sees them and checks them as strict XML.
//!
//! `cargo test --test report` leaves `report-demo.html` and `report-demo.svg` in cargo's temporary folder under `target/`.

use std::error::Error;
use std::path::Path;

use floe::report::chart::{
    Axis, BandPoint, BarChart, Chart, Kind, Layout, Part, Point, Series, Span, Timeline, XyChart,
};
use floe::report::page::{Figure, Headline, Page, Section};
use floe::report::table::{Cell, Column, Row, Table};
use floe::report::{Ink, Inks, NumberFormat};

const BUDGETS: [f64; 6] = [96.0, 128.0, 256.0, 512.0, 1024.0, 2048.0];
/// Bytes of one token row: K and V, 128 values of two bytes.
const ROW_BYTES: f64 = 512.0;

/// Mean error, p95 error and attention mass kept of one policy at each of [`BUDGETS`].
type Measured = (&'static str, &'static str, [(f64, f64, f64); 6]);

/// Replay of layer 20, kv head 0 of Qwen2.5-Coder-1.5B over a 31K-token novel prompt.
#[rustfmt::skip]
const MEASURED: [Measured; 12] = [
    ("story", "window", [(0.612, 1.138, 0.514), (0.612, 1.138, 0.514), (0.612, 1.138, 0.514), (0.612, 1.138, 0.514), (0.612, 1.138, 0.514), (0.612, 1.138, 0.514)]),
    ("story", "quest", [(0.592, 1.115, 0.521), (0.561, 1.066, 0.532), (0.479, 0.942, 0.565), (0.390, 0.804, 0.612), (0.298, 0.642, 0.670), (0.211, 0.463, 0.741)]),
    ("story", "pagemean", [(0.571, 1.111, 0.532), (0.518, 1.041, 0.556), (0.403, 0.853, 0.610), (0.307, 0.663, 0.669), (0.225, 0.499, 0.732), (0.155, 0.360, 0.800)]),
    ("story", "oracle", [(0.464, 0.942, 0.585), (0.374, 0.793, 0.632), (0.263, 0.582, 0.712), (0.190, 0.438, 0.779), (0.131, 0.314, 0.842), (0.084, 0.204, 0.898)]),
    ("story", "floe:tail=off", [(0.568, 1.106, 0.532), (0.512, 1.034, 0.558), (0.407, 0.854, 0.614), (0.308, 0.664, 0.673), (0.221, 0.484, 0.739), (0.149, 0.340, 0.810)]),
    ("story", "floe:tail=page", [(0.315, 0.624, 0.532), (0.289, 0.589, 0.558), (0.243, 0.518, 0.614), (0.194, 0.425, 0.673), (0.146, 0.325, 0.739), (0.101, 0.230, 0.810)]),
    ("answer", "window", [(0.450, 0.983, 0.567), (0.450, 0.983, 0.567), (0.450, 0.983, 0.567), (0.450, 0.983, 0.567), (0.450, 0.983, 0.567), (0.450, 0.983, 0.567)]),
    ("answer", "quest", [(0.392, 0.892, 0.607), (0.343, 0.817, 0.646), (0.233, 0.628, 0.747), (0.166, 0.551, 0.826), (0.122, 0.414, 0.882), (0.088, 0.313, 0.917)]),
    ("answer", "pagemean", [(0.333, 0.804, 0.661), (0.263, 0.699, 0.726), (0.165, 0.518, 0.827), (0.116, 0.404, 0.887), (0.087, 0.311, 0.918), (0.062, 0.223, 0.942)]),
    ("answer", "oracle", [(0.218, 0.625, 0.777), (0.163, 0.521, 0.843), (0.105, 0.390, 0.907), (0.074, 0.287, 0.938), (0.052, 0.203, 0.957), (0.034, 0.133, 0.972)]),
    ("answer", "floe:tail=off", [(0.329, 0.803, 0.667), (0.251, 0.685, 0.751), (0.161, 0.535, 0.847), (0.115, 0.433, 0.901), (0.087, 0.334, 0.927), (0.062, 0.239, 0.948)]),
    ("answer", "floe:tail=page", [(0.210, 0.521, 0.667), (0.156, 0.442, 0.751), (0.099, 0.311, 0.847), (0.069, 0.248, 0.901), (0.052, 0.188, 0.927), (0.037, 0.132, 0.948)]),
];

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

fn ink(inks: &mut Inks, policy: &str) -> Ink {
    match policy {
        "full" | "oracle" => inks.reference(policy),
        p if p.starts_with("floe") => inks.own(policy),
        _ => inks.rival(policy),
    }
}

/// All inks in one fixed order, so that colours do not depend on which chart comes first.
fn all_inks() -> Inks {
    let mut inks = Inks::new();
    for policy in ["floe:tail=page", "floe:tail=off", "oracle", "full", "window", "quest", "pagemean"] {
        ink(&mut inks, policy);
    }
    inks
}

fn measured(segment: &str) -> impl Iterator<Item = &'static Measured> {
    let segment = segment.to_owned();
    MEASURED.iter().filter(move |m| m.0 == segment)
}

fn budget_axis() -> Outcome<Axis> {
    Ok(Axis::log2("Budget").unit("tokens per kv head").format(NumberFormat::Count).ticks_at(BUDGETS)?)
}

fn error_chart(segment: &str) -> Outcome<XyChart> {
    let mut inks = all_inks();
    let y = Axis::log10("Mean relative error of the attention output").format(NumberFormat::Significant(3));
    let mut chart = XyChart::new(budget_axis()?, y);
    chart.push(Series::line("full", ink(&mut inks, "full"), BUDGETS.map(|b| Point::new(b, 0.0))));
    for (_, policy, values) in measured(segment) {
        let points = BUDGETS.iter().zip(values).map(|(&b, v)| {
            Point::new(b, v.0).tip(format!("p95: {}", NumberFormat::Significant(3).show(v.1)))
        });
        let mut series = Series::line(*policy, ink(&mut inks, policy), points);
        if *policy == "floe:tail=page" {
            let band = BUDGETS.iter().zip(values).map(|(&x, v)| BandPoint { x, low: v.0, high: v.1 });
            series = series.band("mean to p95", band);
        }
        chart.push(series);
    }
    Ok(chart)
}

fn mass_chart(segment: &str) -> Outcome<XyChart> {
    let mut inks = all_inks();
    let y = Axis::linear("Attention mass kept").format(NumberFormat::Percent(1));
    let mut chart = XyChart::new(budget_axis()?, y);
    chart.push(Series::line("full", ink(&mut inks, "full"), BUDGETS.map(|b| Point::new(b, 1.0))));
    for (_, policy, values) in measured(segment).filter(|m| m.1 != "floe:tail=off") {
        let points = BUDGETS.iter().zip(values).map(|(&b, v)| Point::new(b, v.2));
        let label = if *policy == "floe:tail=page" { "floe" } else { policy };
        chart.push(Series::line(label, ink(&mut inks, policy), points));
    }
    Ok(chart)
}

fn pareto_chart(segment: &str) -> Outcome<XyChart> {
    let mut inks = all_inks();
    let x = Axis::log10("Bytes read per step").format(NumberFormat::Bytes);
    let y = Axis::log10("Mean relative error").format(NumberFormat::Significant(3));
    let mut chart = XyChart::new(x, y).with_legend();
    for (_, policy, values) in measured(segment).filter(|m| m.1 != "window") {
        let points = BUDGETS
            .iter()
            .zip(values)
            .map(|(&b, v)| Point::new(b * ROW_BYTES, v.0).label(NumberFormat::Count.show(b)));
        chart.push(Series::line(*policy, ink(&mut inks, policy), points));
    }
    chart.note("Point labels: budget in tokens. 512 B per token row; summaries not counted.");
    Ok(chart)
}

/// A long curve, as error by position gives it; illustration, not a measurement.
fn position_chart() -> Outcome<XyChart> {
    let mut inks = all_inks();
    let x = Axis::linear("Position").unit("tokens").format(NumberFormat::Count);
    let y = Axis::linear("Mean relative error").format(NumberFormat::Significant(3)).include(0.0)?;
    let mut chart = XyChart::new(x, y);
    for (policy, level, swing) in
        [("quest", 0.48, 0.13), ("oracle", 0.26, 0.06), ("floe:tail=page", 0.24, 0.05)]
    {
        let points = (0..400).map(|i| {
            let t = f64::from(i);
            Point::new(
                28_690.0 + 5.0 * t,
                level + swing * ((t / 19.0).sin() * 0.6 + (t / 3.1 + level * 40.0).sin() * 0.4),
            )
        });
        chart.push(Series::line(policy, ink(&mut inks, policy), points));
    }
    Ok(chart)
}

const STAGES: [&str; 9] =
    ["match", "plan", "select", "page table", "fetch", "prefetch", "attend", "merge", "commit"];

fn stage_chart() -> Outcome<BarChart> {
    let mut inks = Inks::new();
    let parts = STAGES.map(|stage| Part { label: stage.to_owned(), ink: inks.category(stage) });
    let axis = Axis::linear("Time per step").unit("µs").format(NumberFormat::Decimals(1));
    let mut chart = BarChart::new(axis, parts)?;
    chart.push("full", &[0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 221.0, 0.0, 0.0])?;
    chart.push("quest", &[0.0, 1.2, 31.0, 2.1, 24.0, 3.0, 15.7, 2.2, 0.4])?;
    chart.push("floe:tail=page", &[1.1, 1.3, 18.0, 2.1, 19.0, 3.0, 15.7, 3.1, 0.9])?;
    Ok(chart)
}

fn timeline_chart() -> Outcome<Timeline> {
    let mut inks = Inks::new();
    let kinds =
        ["select", "fetch", "attend"].map(|kind| Kind { label: kind.to_owned(), ink: inks.category(kind) });
    let mut timeline =
        Timeline::new(Axis::linear("Time").unit("µs").format(NumberFormat::Decimals(1)), kinds)?;
    let span = |start: f64, length: f64, kind, label: &str| Span {
        start,
        end: start + length,
        kind,
        label: label.to_owned(),
    };
    let lanes = ["search workers", "link", "compute"];
    for (lane, name) in lanes.into_iter().enumerate() {
        let spans = (0..4).map(|layer| {
            let t = f64::from(layer) * 24.0 + [0.0, 14.0, 28.0][lane];
            span(t, [14.0, 13.0, 15.7][lane] - f64::from(layer % 2), lane, &format!("layer {layer}"))
        });
        timeline.lane(name, spans)?;
    }
    Ok(timeline)
}

fn error_table() -> Outcome<Table> {
    let mut inks = all_inks();
    let heads =
        |group: &'static str| BUDGETS.map(|b| Column::number(NumberFormat::Count.show(b)).group(group));
    let columns = [Column::text("policy")]
        .into_iter()
        .chain(heads("mean error, by budget"))
        .chain(heads("mass kept, by budget"));
    let mut table = Table::new(columns);
    for segment in ["story", "answer"] {
        table.section(format!("{segment}, 219 steps"));
        for (_, policy, values) in measured(segment) {
            let errors = values.iter().map(|v| Cell::number(v.0, NumberFormat::Decimals(3)));
            let masses = values.iter().map(|v| Cell::number(v.2, NumberFormat::Decimals(3)));
            let name = Cell::text(*policy).ink(ink(&mut inks, policy));
            let row = Row::new([name].into_iter().chain(errors).chain(masses));
            table.push(if *policy == "floe:tail=page" { row.emphasised() } else { row })?;
        }
    }
    Ok(table)
}

fn demo_page() -> Outcome<Page> {
    let headline = |value: &str, label: &str, note: &str| Headline {
        value: value.into(),
        label: label.into(),
        note: note.into(),
    };
    let mut page = Page::new("Replay: sparse attention against full attention")
        .lead("How far the output of each policy is from full attention on the keys, queries and values of a real model, at equal numbers of attended tokens.")
        .fact("Command", "`floe replay qwen2.5-coder-1.5b_persuasion-31k_L20H0.safetensors --html report.html`")
        .fact("Date", "2026-11-22")
        .fact("Commit", "`0123abc`")
        .fact("Machine", "AMD EPYC, 4 cores, AVX-512")
        .fact("Trace", "30,738 tokens, 438 queries, group of 6, d = 128")
        .headline(headline("0.243", "mean error at 256 tokens", "story segment; oracle 0.263, quest 0.479"))
        .headline(headline("0.8 %", "of the context attended", "256 of 30,738 tokens per kv head"))
        .headline(headline("131 kB", "read per step and kv head", "full attention reads 15.7 MB"));
    page = page.section(
        Section::new("Error and kept mass by budget")
            .prose("Every policy attends the same number of tokens: 16 sinks, the last 64 and what it retrieves. `floe:tail=page` adds one summary per page for everything else, so its error falls below the `oracle`, which drops the tail.")
            .table("Mean relative error and attention mass kept.", error_table()?)
            .figure(Figure::new("The page tail beats exact top-k below 512 tokens", error_chart("story")?).caption("Story segment. Relative error of each query head's output, averaged over heads and steps."))
            .figures([
                Figure::new("Mass kept, story", mass_chart("story")?).caption("Share of the softmax mass on attended tokens."),
                Figure::new("Mass kept, answer", mass_chart("answer")?).caption("The answer segment asks for planted facts: the mass is concentrated."),
            ]),
    );
    page = page.section(
        Section::new("What accuracy costs")
            .prose("Down and to the left is better.")
            .figure(
                Figure::new("Error against bytes read", pareto_chart("answer")?).caption("Answer segment."),
            )
            .figure(
                Figure::new("Error by position", position_chart()?)
                    .caption("Illustration of a long curve; not a measurement."),
            ),
    );
    Ok(page.section(
        Section::new("Where a step's time goes")
            .prose("Illustration of the profile charts; not a measurement.")
            .figures([
                Figure::new("Stages of a step", stage_chart()?).caption("Stacked in the order of the step."),
                Figure::new("Overlap of four layers", timeline_chart()?)
                    .caption("The link works while the previous layer computes."),
            ]),
    ))
}

/// Strict parse; every numeric attribute is finite, ids are unique and every picture has a name and a description.
fn check_markup(markup: &str) -> Outcome {
    let options = roxmltree::ParsingOptions { allow_dtd: true, ..Default::default() };
    let document = roxmltree::Document::parse_with_options(markup, options)?;
    let mut ids = Vec::new();
    for node in document.descendants().filter(|n| n.is_element()) {
        for attribute in node.attributes() {
            let value = attribute.value();
            if matches!(
                attribute.name(),
                "x" | "y" | "cx" | "cy" | "r" | "width" | "height" | "d" | "viewBox" | "points"
            ) {
                let numbers = value
                    .split(|c: char| c.is_ascii_whitespace() || "MLZ%".contains(c))
                    .filter(|s| !s.is_empty());
                for number in numbers {
                    let number: f64 = number.parse().map_err(|e| format!("{value:?}: {e}"))?;
                    assert!(number.is_finite() && number.abs() < 1e5, "{}={value:?}", attribute.name());
                }
            }
            if matches!(attribute.name(), "width" | "height") {
                assert!(!value.starts_with('-'), "negative size {value}");
            }
            if attribute.name() == "id" {
                assert!(!ids.contains(&value.to_owned()), "id {value} twice");
                ids.push(value.to_owned());
            }
        }
        if node.tag_name().name() == "svg" {
            assert!(node.attribute("aria-label").is_some_and(|l| !l.is_empty()));
            assert!(node.children().any(|c| c.tag_name().name() == "desc"));
        }
    }
    for external in ["http://", "https://", "url(", "@import", "<script", "src="] {
        let uses = markup.matches(external).count();
        let namespaces = markup.matches("xmlns=\"http://").count();
        let allowed = if external == "http://" { namespaces } else { 0 };
        assert_eq!(uses, allowed, "{external} in a self-contained document");
    }
    Ok(())
}

#[test]
fn demo_page_is_well_formed_self_contained_and_the_same_every_time() -> Outcome {
    let html = demo_page()?.to_html();
    check_markup(&html)?;
    assert_eq!(html, demo_page()?.to_html(), "two renderings differ");
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    std::fs::write(folder.join("report-demo.html"), &html)?;
    let svg = error_chart("story")?.to_svg("Error against budget", Layout::Wide);
    check_markup(&svg)?;
    std::fs::write(folder.join("report-demo.svg"), svg)?;
    std::fs::write(folder.join("report-demo.txt"), error_table()?.to_text())?;
    Ok(())
}

fn all_layouts(chart: &dyn Chart) -> Outcome<String> {
    let mut all = String::new();
    for layout in [Layout::Wide, Layout::Half, Layout::Narrow] {
        let svg = chart.to_svg("Chart", layout);
        check_markup(&svg)?;
        all.push_str(&svg);
    }
    Ok(all)
}

#[test]
fn points_that_cannot_be_drawn_are_counted_in_a_note() -> Outcome {
    let mut chart = XyChart::new(Axis::log2("Budget"), Axis::log10("Error"));
    let points = [(96.0, 0.0), (128.0, -1.0), (256.0, 0.1), (512.0, f64::NAN), (f64::INFINITY, 0.2)];
    chart.push(Series::line("odd", Ink::Own(0), points.map(|(x, y)| Point::new(x, y))));
    chart.push(Series::line("absent", Ink::Rival(0), []));
    let svg = all_layouts(&chart)?;
    assert!(svg.contains("odd: 2 of 5 points not drawn (zero or negative on a logarithmic"), "{svg}");
    assert!(svg.contains("odd: 2 of 5 points not drawn (not a finite number)."));
    assert!(svg.contains("absent: no data."));
    Ok(())
}

#[test]
fn degenerate_series_give_finite_pictures() -> Outcome {
    let cases: [&[(f64, f64)]; 7] = [
        &[],
        &[(1.0, 1.0)],
        &[(1.0, 1.0), (1.0, 1.0)],
        &[(1.0, 0.3), (2.0, 0.3), (4.0, 0.3)],
        &[(0.0, 0.0), (0.0, 0.0)],
        &[(1e-300, 1e300), (1e300, 1e-300)],
        &[(1.0, 1.0), (1.0 + f64::EPSILON, 1.0 + f64::EPSILON)],
    ];
    for points in cases {
        for axis in [Axis::linear, Axis::log2, Axis::log10] {
            let mut chart = XyChart::new(axis("x"), axis("y"));
            chart.push(Series::line(
                "a",
                Ink::Own(0),
                points.iter().map(|&(x, y)| Point::new(x, y).label("p")),
            ));
            chart.push(Series::scatter("b", Ink::Category(0), points.iter().map(|&(x, y)| Point::new(x, y))));
            all_layouts(&chart)?;
        }
    }
    let svg = all_layouts(&XyChart::new(Axis::linear("x"), Axis::log10("y")))?;
    assert!(svg.contains("Nothing to draw."));
    all_layouts(&BarChart::new(Axis::linear("time"), [])?)?;
    all_layouts(&Timeline::new(Axis::linear("time"), [])?)?;
    Ok(())
}

#[test]
fn names_of_any_content_are_text_and_never_markup() -> Outcome {
    let name = "</text><script>alert(1)</script>&amp;\"'\u{1b}[2J";
    let mut chart = XyChart::new(Axis::linear(name).unit(name), Axis::linear(name));
    chart.push(Series::line(
        name,
        Ink::Own(0),
        [Point::new(1.0, 2.0).label(name).tip(name), Point::new(2.0, 3.0)],
    ));
    chart.note(name);
    all_layouts(&chart)?;
    let mut table = Table::new([Column::text(name).group(name)]);
    table.section(name);
    table.push(Row::new([Cell::text(name)]))?;
    let page = Page::new(name).lead(name).fact(name, name).section(
        Section::new(name)
            .prose(format!("`{name}` and ` alone"))
            .table(name, table)
            .figure(Figure::new(name, chart).caption(name)),
    );
    let html = page.to_html();
    check_markup(&html)?;
    assert!(!html.contains("<script"));
    Ok(())
}

#[test]
fn labels_at_line_ends_never_overlap() -> Outcome {
    let svg = error_chart("story")?.to_svg("Errors", Layout::Wide);
    let document = roxmltree::Document::parse(&svg)?;
    let names = document.descendants().filter(|n| n.attribute("class") == Some("name"));
    let mut heights: Vec<f64> = names.filter_map(|n| n.attribute("y")?.parse().ok()).collect();
    assert_eq!(heights.len(), 6, "one name per drawn line");
    heights.sort_by(f64::total_cmp);
    for pair in heights.windows(2) {
        assert!(pair[1] - pair[0] >= 16.9, "names {} and {} overlap", pair[0], pair[1]);
    }
    Ok(())
}

#[test]
fn bars_and_spans_refuse_what_they_cannot_show_and_say_what_it_was() -> Outcome {
    let part = Part { label: "search".into(), ink: Ink::Category(0) };
    let mut bars = BarChart::new(Axis::linear("time"), [part])?;
    let message = |error: Result<(), floe::report::chart::ChartError>| error.map_err(|e| e.to_string());
    assert_eq!(
        message(bars.push("floe", &[-1.0])),
        Err("bar \"floe\", part \"search\" cannot show the value -1".to_owned())
    );
    assert_eq!(message(bars.push("floe", &[])), Err("bar \"floe\" has 0 values, expected 1".to_owned()));
    assert!(bars.push("floe", &[f64::NAN]).is_err());
    assert!(BarChart::new(Axis::log10("time"), []).is_err());
    let mut timeline =
        Timeline::new(Axis::linear("time"), [Kind { label: "busy".into(), ink: Ink::Category(0) }])?;
    let span = |start, end, kind| Span { start, end, kind, label: String::new() };
    assert_eq!(
        message(timeline.lane("gpu", [span(0.0, 1.0, 1)])),
        Err("lane \"gpu\", span 0 has kind 1, but the timeline has 1 kinds".to_owned())
    );
    assert!(timeline.lane("gpu", [span(2.0, 1.0, 0)]).is_err());
    assert!(timeline.lane("gpu", [span(0.0, f64::INFINITY, 0)]).is_err());
    timeline.lane("gpu", [span(0.0, 0.0, 0)])?;
    all_layouts(&timeline)?;
    Ok(())
}
