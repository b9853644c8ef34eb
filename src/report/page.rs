//! Self-contained HTML pages: no network, no script, no external font; light and dark, phone to wide, screen and paper.
//!
//! The page is also well-formed XML, so tests and tools can parse it strictly.

use super::chart::{self, Chart, Layout};
use super::ink;
use super::markup::Markup;
use super::table::Table;

/// Longer tables of chart data stay out of the page: they belong into the CSV or JSON.
const DATA_ROWS_MAX: usize = 200;
/// Shorter pages need no table of contents.
const CONTENTS_SECTIONS_MIN: usize = 3;

/// A number that the page is about, shown large at its top.
#[derive(Clone, Debug)]
pub struct Headline {
    /// The number as text, unit included.
    pub value: String,
    /// What it is.
    pub label: String,
    /// What to compare it with.
    pub note: String,
}

/// A captioned chart.
pub struct Figure {
    title: String,
    caption: String,
    chart: Box<dyn Chart>,
}

impl Figure {
    /// A figure; its title should say what the chart shows, in one line.
    pub fn new(title: impl Into<String>, chart: impl Chart + 'static) -> Self {
        Self { title: title.into(), caption: String::new(), chart: Box::new(chart) }
    }

    /// How to read it; `code` between backticks.
    pub fn caption(mut self, caption: impl Into<String>) -> Self {
        self.caption = caption.into();
        self
    }
}

enum Block {
    Prose(String),
    Table { caption: String, table: Table },
    Figures(Vec<Figure>),
}

/// A headed part of a page.
pub struct Section {
    heading: String,
    blocks: Vec<Block>,
}

impl Section {
    /// An empty section.
    pub fn new(heading: impl Into<String>) -> Self {
        Self { heading: heading.into(), blocks: Vec::new() }
    }

    /// A paragraph; `code` between backticks.
    pub fn prose(mut self, text: impl Into<String>) -> Self {
        self.blocks.push(Block::Prose(text.into()));
        self
    }

    /// A table with a caption above it.
    pub fn table(mut self, caption: impl Into<String>, table: Table) -> Self {
        self.blocks.push(Block::Table { caption: caption.into(), table });
        self
    }

    /// A figure over the full width.
    pub fn figure(self, figure: Figure) -> Self {
        self.figures([figure])
    }

    /// Figures side by side in pairs, one below the other on a phone.
    pub fn figures(mut self, figures: impl IntoIterator<Item = Figure>) -> Self {
        self.blocks.push(Block::Figures(figures.into_iter().collect()));
        self
    }
}

/// A report page.
pub struct Page {
    title: String,
    lead: String,
    facts: Vec<(String, String)>,
    headlines: Vec<Headline>,
    sections: Vec<Section>,
}

impl Page {
    /// A page with only its title.
    pub fn new(title: impl Into<String>) -> Self {
        let (lead, facts, headlines, sections) = Default::default();
        Self { title: title.into(), lead, facts, headlines, sections }
    }

    /// One or two sentences under the title; `code` between backticks.
    pub fn lead(mut self, lead: impl Into<String>) -> Self {
        self.lead = lead.into();
        self
    }

    /// A fact of the run: command, date, machine, commit, sizes. `code` between backticks.
    pub fn fact(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.facts.push((name.into(), value.into()));
        self
    }

    /// A large number at the top.
    pub fn headline(mut self, headline: Headline) -> Self {
        self.headlines.push(headline);
        self
    }

    /// Appends a section.
    pub fn section(mut self, section: Section) -> Self {
        self.sections.push(section);
        self
    }

    /// The whole HTML document.
    pub fn to_html(&self) -> String {
        let mut m = Markup::new();
        m.raw("<!DOCTYPE html>\n");
        m.open("html").attr("lang", "en").attr("xmlns", "http://www.w3.org/1999/xhtml");
        self.head(&mut m);
        m.line().open("body").line().open("main");
        self.header(&mut m);
        let mut counts = Counts::default();
        for (i, section) in self.sections.iter().enumerate() {
            m.line().open("section").attr("aria-labelledby", &section_id(i));
            m.open("h2").attr("id", &section_id(i)).text(&section.heading).close();
            for block in &section.blocks {
                draw_block(&mut m, block, &mut counts);
            }
            m.close();
        }
        m.line();
        m.finish() + "\n"
    }

    fn head(&self, m: &mut Markup) {
        m.line().open("head").line().open("meta").attr("charset", "utf-8").empty();
        m.open("meta")
            .attr("name", "viewport")
            .attr("content", "width=device-width, initial-scale=1")
            .empty();
        m.open("meta").attr("name", "color-scheme").attr("content", "light dark").empty();
        m.line().leaf("title", &self.title);
        m.line().open("style").raw("\n").raw(include_str!("chart/chart.css")).raw(&ink::style());
        m.raw(include_str!("page.css")).close().line().close();
    }

    fn header(&self, m: &mut Markup) {
        m.line().open("header").leaf("h1", &self.title);
        if !self.lead.is_empty() {
            m.open("p").attr("class", "lead");
            inline_code(m, &self.lead);
            m.close();
        }
        if !self.facts.is_empty() {
            m.line().open("dl").attr("class", "facts");
            for (name, value) in &self.facts {
                m.open("div").leaf("dt", name).open("dd");
                inline_code(m, value);
                m.close().close();
            }
            m.close();
        }
        if !self.headlines.is_empty() {
            m.line().open("ul").attr("class", "headlines");
            for headline in &self.headlines {
                m.open("li").open("strong").text(&headline.value).close();
                m.open("span").attr("class", "what").text(&headline.label).close();
                m.open("span").attr("class", "versus").text(&headline.note).close().close();
            }
            m.close();
        }
        m.close();
        if self.sections.len() >= CONTENTS_SECTIONS_MIN {
            m.line().open("nav").attr("aria-label", "Contents").open("ol");
            for (i, section) in self.sections.iter().enumerate() {
                m.open("li").open("a").attr("href", &format!("#{}", section_id(i)));
                m.text(&section.heading).close().close();
            }
            m.close().close();
        }
    }
}

#[derive(Default)]
struct Counts {
    tables: usize,
    figures: usize,
}

fn section_id(index: usize) -> String {
    format!("section-{}", index + 1)
}

fn draw_block(m: &mut Markup, block: &Block, counts: &mut Counts) {
    match block {
        Block::Prose(text) => {
            m.line().open("p");
            inline_code(m, text);
            m.close();
        }
        Block::Table { caption, table } => {
            counts.tables += 1;
            m.line().open("figure").attr("class", "table").open("figcaption");
            m.open("b").text(&format!("Table {}. ", counts.tables)).close();
            inline_code(m, caption);
            m.close();
            scroll(m, caption, table);
            m.close();
        }
        Block::Figures(figures) => {
            let (class, layouts): (_, &[Layout]) = match figures.len() {
                0 | 1 => ("figures", &[Layout::Wide, Layout::Half, Layout::Narrow]),
                _ => ("figures pair", &[Layout::Half, Layout::Narrow]),
            };
            m.line().open("div").attr("class", class);
            for figure in figures {
                counts.figures += 1;
                draw_figure(m, figure, layouts, counts.figures);
            }
            m.close();
        }
    }
}

fn draw_figure(m: &mut Markup, figure: &Figure, layouts: &[Layout], number: usize) {
    m.line().open("figure").open("h3").text(&figure.title).close();
    // The style sheet shows the one that fits the screen; text in charts keeps its size that way.
    for &layout in layouts {
        m.line().raw(&chart::inline(figure.chart.as_ref(), &figure.title, layout));
    }
    m.line();
    m.open("figcaption").open("b").text(&format!("Figure {number}. ")).close();
    inline_code(m, &figure.caption);
    m.close();
    let data = figure.chart.data();
    if (1..=DATA_ROWS_MAX).contains(&data.num_rows()) {
        m.open("details").leaf("summary", "Numbers");
        scroll(m, &figure.title, &data);
        m.close();
    }
    m.close();
}

/// A table that scrolls inside the page when it is wider than the screen; focusable so that keys can scroll it.
fn scroll(m: &mut Markup, name: &str, table: &Table) {
    m.open("div")
        .attr("class", "scroll")
        .attr("tabindex", "0")
        .attr("role", "region")
        .attr("aria-label", name);
    m.raw(&table.to_html()).close();
}

/// Text with `code` between backticks; an unpaired backtick stays as it is.
fn inline_code(m: &mut Markup, text: &str) {
    let mut rest = text;
    while let Some((before, code, after)) = rest
        .split_once('`')
        .and_then(|(before, tail)| tail.split_once('`').map(|(code, after)| (before, code, after)))
    {
        m.text(before).leaf("code", code);
        rest = after;
    }
    m.text(rest);
}
