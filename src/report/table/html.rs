//! HTML table: real header cells with scope, one body per section, figure spaces for the decimal alignment.

use super::super::markup::Markup;
use super::{Align, Line, Row, Table, decimal_padding};

/// As wide as a digit wherever `tabular-nums` holds.
const FIGURE_SPACE: &str = "\u{2007}";

pub(super) fn render(table: &Table) -> String {
    let fractions = table.fraction_lens();
    let mut m = Markup::new();
    m.open("table");
    head(&mut m, table);
    let mut in_body = false;
    for line in &table.lines {
        match line {
            Line::Section(label) => {
                if in_body {
                    m.close();
                }
                m.line().open("tbody").line().open("tr").attr("class", "section").open("th");
                m.attr("colspan", &table.columns.len().to_string()).attr("scope", "rowgroup");
                m.open("span").text(label).close().close().close();
                in_body = true;
            }
            Line::Row(row) => {
                if !in_body {
                    m.line().open("tbody");
                    in_body = true;
                }
                body_row(&mut m, table, row, &fractions);
            }
        }
    }
    m.finish()
}

fn head(m: &mut Markup, table: &Table) {
    m.open("thead");
    let groups = table.groups();
    if !groups.is_empty() {
        m.line().open("tr").attr("class", "groups");
        for (label, count) in groups {
            match label {
                Some(label) => {
                    m.open("th").attr("colspan", &count.to_string()).attr("scope", "colgroup");
                    m.open("span").text(label).close().close()
                }
                None => m.open("td").attr("colspan", &count.to_string()).close(),
            };
        }
        m.close();
    }
    m.line().open("tr");
    for column in &table.columns {
        m.open("th").attr("scope", "col");
        if column.align == Align::Right {
            m.attr("class", "n");
        }
        m.text(&column.label).close();
    }
    m.close().close();
}

fn body_row(m: &mut Markup, table: &Table, row: &Row, fractions: &[usize]) {
    m.line().open("tr");
    if row.emphasis {
        m.attr("class", "emphasis");
    }
    for (i, (cell, column)) in row.cells.iter().zip(&table.columns).enumerate() {
        // The first words of a row name it.
        let names_row = i == 0 && column.align == Align::Left;
        m.open(if names_row { "th" } else { "td" });
        if names_row {
            m.attr("scope", "row");
        }
        if column.align == Align::Right {
            m.attr("class", "n");
        }
        if let Some(ink) = cell.ink {
            m.open("i").attr("class", &format!("swatch {}", ink.class())).close();
        }
        m.text(&cell.shown());
        m.text(&decimal_padding(cell, fractions[i], FIGURE_SPACE));
        m.close();
    }
    m.close();
}

#[cfg(test)]
mod tests {
    use super::super::tests::sample;

    #[test]
    fn html_is_well_formed_and_every_row_spans_the_same_columns() {
        let html = sample().to_html();
        let document = roxmltree::Document::parse(&html).unwrap();
        let rows: Vec<_> = document.descendants().filter(|n| n.has_tag_name("tr")).collect();
        assert_eq!(rows.len(), 6);
        for row in rows {
            let columns: u32 = row
                .children()
                .filter(|n| n.is_element())
                .map(|n| n.attribute("colspan").map_or(1, |c| c.parse().unwrap()))
                .sum();
            assert_eq!(columns, 4);
        }
        assert!(html.contains("answer &lt;&amp;&gt;"));
        assert!(html.contains("<td class=\"n\">0.592</td>"), "{html}");
    }
}
