//! Terminal text: two spaces between columns, a rule under the head, sections set off by a blank line.

use unicode_width::UnicodeWidthStr;

use super::{Align, Line, Table, decimal_padding};

const GAP: &str = "  ";

pub(super) fn render(table: &Table) -> String {
    let fractions = table.fraction_lens();
    let cell_text = |cell: &super::Cell, column: usize| {
        clean(&cell.shown()) + &decimal_padding(cell, fractions[column], " ")
    };
    let mut widths: Vec<usize> = table.columns.iter().map(|c| clean(&c.label).width()).collect();
    for row in table.rows() {
        for (i, cell) in row.cells.iter().enumerate() {
            widths[i] = widths[i].max(cell_text(cell, i).width());
        }
    }
    let groups = table.groups();
    widen_for_groups(&mut widths, &groups);

    let mut out = String::new();
    if !groups.is_empty() {
        let mut line = String::new();
        let mut rule = String::new();
        let mut first = 0;
        for (label, count) in &groups {
            let width = span_width(&widths[first..first + count]);
            let label = clean(label.unwrap_or(""));
            push_cell(&mut line, &centred(&label, width), width, Align::Left);
            let mark = if label.is_empty() { " " } else { "─" };
            push_cell(&mut rule, &mark.repeat(width), width, Align::Left);
            first += count;
        }
        push_line(&mut out, &line);
        push_line(&mut out, &rule);
    }
    let mut head = String::new();
    for (column, width) in table.columns.iter().zip(&widths) {
        push_cell(&mut head, &clean(&column.label), *width, column.align);
    }
    push_line(&mut out, &head);
    let total = span_width(&widths);
    push_line(&mut out, &"─".repeat(total));

    for (i, line) in table.lines.iter().enumerate() {
        match line {
            Line::Section(label) => {
                if i > 0 {
                    out.push('\n');
                }
                push_line(&mut out, &clean(label));
            }
            Line::Row(row) => {
                let mut text = String::new();
                for (i, cell) in row.cells.iter().enumerate() {
                    push_cell(&mut text, &cell_text(cell, i), widths[i], table.columns[i].align);
                }
                push_line(&mut out, &text);
            }
        }
    }
    out
}

/// A group label wider than its columns widens all of them alike.
fn widen_for_groups(widths: &mut [usize], groups: &[(Option<&str>, usize)]) {
    let mut first = 0;
    for (label, count) in groups {
        let needed = label.map_or(0, |l| clean(l).width());
        let missing = needed.saturating_sub(span_width(&widths[first..first + count]));
        for (i, width) in widths[first..first + count].iter_mut().enumerate() {
            *width += (missing + i) / count;
        }
        first += count;
    }
}

fn span_width(widths: &[usize]) -> usize {
    widths.iter().sum::<usize>() + GAP.len() * widths.len().saturating_sub(1)
}

fn centred(text: &str, width: usize) -> String {
    " ".repeat(width.saturating_sub(text.width()) / 2) + text
}

fn push_cell(line: &mut String, text: &str, width: usize, align: Align) {
    if !line.is_empty() {
        line.push_str(GAP);
    }
    let padding = " ".repeat(width.saturating_sub(text.width()));
    match align {
        Align::Left => line.extend([text, &padding]),
        Align::Right => line.extend([&padding, text]),
    }
}

fn push_line(out: &mut String, line: &str) {
    out.push_str(line.trim_end());
    out.push('\n');
}

/// A name from a file must not move the cursor or start an escape sequence.
fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::sample;
    use super::super::{Cell, Column, Row, Table};

    #[test]
    fn columns_line_up_on_the_decimal_point() {
        let expected = [
            "           mean error, by budget",
            "           ─────────────────────",
            "policy            96        2048     read",
            "─────────────────────────────────────────",
            "story",
            "quest, 16      0.592      0.0211  8.19 kB",
            "",
            "answer <&>",
            "floe           0.315         nan        –",
            "",
        ]
        .join("\n");
        assert_eq!(sample().to_text(), expected);
    }

    #[test]
    fn escape_sequences_are_defused_and_wide_characters_counted() {
        let mut table = Table::new([Column::text("name"), Column::number("n")]);
        table.push(Row::new([Cell::text("\u{1b}[2J"), Cell::text("1")])).unwrap();
        table.push(Row::new([Cell::text("日本"), Cell::text("2")])).unwrap();
        let text = table.to_text();
        assert!(!text.contains('\u{1b}'));
        assert!(text.contains("日本  2\n"), "{text}");
    }

    #[test]
    fn a_table_without_rows_still_shows_its_head() {
        assert_eq!(Table::new([Column::text("policy")]).to_text(), "policy\n──────\n");
    }
}
