//! RFC 4180 CSV: full-precision numbers, groups folded into the column names, sections as a first column.

use super::{Cell, CellKind, Line, Table};

pub(super) fn render(table: &Table) -> String {
    let sections = table.lines.iter().any(|line| matches!(line, Line::Section(_)));
    let mut out = String::new();
    let head = table.columns.iter().map(|column| match &column.group {
        Some(group) => format!("{group} {}", column.label),
        None => column.label.clone(),
    });
    let first = sections.then(|| "section".to_owned());
    push_record(&mut out, first.into_iter().chain(head));
    let mut section = "";
    for line in &table.lines {
        match line {
            Line::Section(label) => section = label,
            Line::Row(row) => {
                let first = sections.then(|| section.to_owned());
                push_record(&mut out, first.into_iter().chain(row.cells.iter().map(value)));
            }
        }
    }
    out
}

fn value(cell: &Cell) -> String {
    match &cell.kind {
        CellKind::Text(text) => text.clone(),
        CellKind::Number { value, .. } => value.to_string(),
        CellKind::Missing => String::new(),
    }
}

fn push_record(out: &mut String, fields: impl Iterator<Item = String>) {
    for (i, field) in fields.enumerate() {
        if i > 0 {
            out.push(',');
        }
        if field.contains(['"', ',', '\n', '\r']) {
            out.push('"');
            out.push_str(&field.replace('"', "\"\""));
            out.push('"');
        } else {
            out.push_str(&field);
        }
    }
    out.push_str("\r\n");
}

#[cfg(test)]
mod tests {
    use super::super::tests::sample;

    #[test]
    fn csv_keeps_full_precision_and_quotes_what_needs_it() {
        assert_eq!(
            sample().to_csv(),
            "section,policy,\"mean error, by budget 96\",\"mean error, by budget 2048\",read\r\n\
             story,\"quest, 16\",0.59213,0.02114,8192\r\n\
             answer <&>,floe,0.315,NaN,\r\n"
        );
    }
}
