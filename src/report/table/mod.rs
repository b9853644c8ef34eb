//! One table value, three outputs: terminal text, HTML and CSV.
//!
//! Numbers keep their value beside their format, so CSV carries full precision while text and HTML show what a reader needs.
//! Plain numbers of a column line up on the decimal point in both.

mod csv;
mod html;
mod text;

use super::format::NumberFormat;
use super::ink::Ink;

/// Why a row was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TableError {
    /// A row must have one cell per column.
    #[error("table row {row} has {found} cells, expected {expected}")]
    RowLength {
        /// Index of the refused row, counted from 0 without section rows.
        row: usize,
        /// Number of columns.
        expected: usize,
        /// Number of cells given.
        found: usize,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Align {
    Left,
    Right,
}

/// Head of a column.
#[derive(Clone, Debug)]
pub struct Column {
    label: String,
    group: Option<String>,
    align: Align,
}

impl Column {
    /// A left-aligned column of words.
    pub fn text(label: impl Into<String>) -> Self {
        Self { label: label.into(), group: None, align: Align::Left }
    }

    /// A right-aligned column of numbers.
    pub fn number(label: impl Into<String>) -> Self {
        Self { label: label.into(), group: None, align: Align::Right }
    }

    /// Puts the column under a common head; neighbours with the same group share it.
    pub fn group(mut self, group: impl Into<String>) -> Self {
        self.group = Some(group.into());
        self
    }
}

/// Content of one place in a table.
#[derive(Clone, Debug)]
pub struct Cell {
    kind: CellKind,
    ink: Option<Ink>,
}

#[derive(Clone, Debug)]
enum CellKind {
    Text(String),
    Number { value: f64, format: NumberFormat },
    Missing,
}

impl Cell {
    /// Words.
    pub fn text(text: impl Into<String>) -> Self {
        Self { kind: CellKind::Text(text.into()), ink: None }
    }

    /// A number; `value` is what CSV carries, `format` how it is shown.
    pub fn number(value: f64, format: NumberFormat) -> Self {
        Self { kind: CellKind::Number { value, format }, ink: None }
    }

    /// Not measured: shown as a dash, empty in CSV.
    pub fn missing() -> Self {
        Self { kind: CellKind::Missing, ink: None }
    }

    /// Marks the cell with the colour that the same thing has in the charts (HTML only).
    pub fn ink(mut self, ink: Ink) -> Self {
        self.ink = Some(ink);
        self
    }

    /// Text as shown, before alignment on the decimal point.
    fn shown(&self) -> String {
        match &self.kind {
            CellKind::Text(text) => text.clone(),
            CellKind::Number { value, format } => format.show(*value),
            CellKind::Missing => "–".to_owned(),
        }
    }

    /// Places after the decimal point, the point included, of a number written without unit; none for anything else.
    fn fraction_len(&self) -> Option<usize> {
        let CellKind::Number { format, value } = self.kind else { return None };
        let aligned =
            matches!(format, NumberFormat::Plain | NumberFormat::Decimals(_) | NumberFormat::Significant(_));
        if !aligned || !value.is_finite() {
            return None;
        }
        let shown = format.show(value);
        if shown.contains('e') {
            return None;
        }
        Some(shown.find('.').map_or(0, |point| shown.len() - point))
    }
}

/// One line of cells.
#[derive(Clone, Debug)]
pub struct Row {
    cells: Vec<Cell>,
    emphasis: bool,
}

impl Row {
    /// A row of these cells.
    pub fn new(cells: impl IntoIterator<Item = Cell>) -> Self {
        Self { cells: cells.into_iter().collect(), emphasis: false }
    }

    /// Highlights the row: the report's own policy (HTML only).
    pub fn emphasised(mut self) -> Self {
        self.emphasis = true;
        self
    }
}

#[derive(Clone, Debug)]
enum Line {
    Section(String),
    Row(Row),
}

/// Columns and rows, rows optionally under section lines.
#[derive(Clone, Debug)]
pub struct Table {
    columns: Vec<Column>,
    lines: Vec<Line>,
}

impl Table {
    /// An empty table with these columns.
    pub fn new(columns: impl IntoIterator<Item = Column>) -> Self {
        Self { columns: columns.into_iter().collect(), lines: Vec::new() }
    }

    /// Starts a section: a line over all columns, and an extra first column in CSV.
    pub fn section(&mut self, label: impl Into<String>) {
        self.lines.push(Line::Section(label.into()));
    }

    /// Appends a row.
    ///
    /// # Errors
    /// [`TableError::RowLength`] when the row does not have one cell per column.
    pub fn push(&mut self, row: Row) -> Result<(), TableError> {
        if row.cells.len() != self.columns.len() {
            return Err(TableError::RowLength {
                row: self.rows().count(),
                expected: self.columns.len(),
                found: row.cells.len(),
            });
        }
        self.lines.push(Line::Row(row));
        Ok(())
    }

    /// Appends a row whose cells the caller has counted against the columns.
    pub(crate) fn push_checked(&mut self, row: Row) {
        debug_assert_eq!(row.cells.len(), self.columns.len());
        self.lines.push(Line::Row(row));
    }

    /// Number of rows, section lines not counted.
    pub fn num_rows(&self) -> usize {
        self.rows().count()
    }

    /// Aligned text for a terminal, every line ending in a newline. Control characters are replaced by U+FFFD.
    pub fn to_text(&self) -> String {
        text::render(self)
    }

    /// A `<table>` element for a page that carries this module's style sheet.
    pub fn to_html(&self) -> String {
        html::render(self)
    }

    /// RFC 4180 CSV with a header line; numbers unrounded.
    pub fn to_csv(&self) -> String {
        csv::render(self)
    }

    fn rows(&self) -> impl Iterator<Item = &Row> {
        self.lines.iter().filter_map(|line| match line {
            Line::Row(row) => Some(row),
            Line::Section(_) => None,
        })
    }

    /// Longest decimal fraction of each column, point included.
    fn fraction_lens(&self) -> Vec<usize> {
        let mut longest = vec![0; self.columns.len()];
        for row in self.rows() {
            for (longest, cell) in longest.iter_mut().zip(&row.cells) {
                *longest = (*longest).max(cell.fraction_len().unwrap_or(0));
            }
        }
        longest
    }

    /// Neighbouring columns of one group: `(label, number of columns)`, or nothing when no column has a group.
    fn groups(&self) -> Vec<(Option<&str>, usize)> {
        let mut groups: Vec<(Option<&str>, usize)> = Vec::new();
        for column in &self.columns {
            let label = column.group.as_deref();
            match groups.last_mut() {
                Some((last, count)) if *last == label => *count += 1,
                _ => groups.push((label, 1)),
            }
        }
        if groups.iter().any(|(label, _)| label.is_some()) { groups } else { Vec::new() }
    }
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.to_text())
    }
}

/// The decimal padding that lines `cell` up with the longest fraction of its column, in `blank` characters.
fn decimal_padding(cell: &Cell, longest: usize, blank: &str) -> String {
    match cell.fraction_len() {
        Some(len) => blank.repeat(longest.saturating_sub(len)),
        None => String::new(),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A small table with every feature.
    pub(crate) fn sample() -> Table {
        let mut table = Table::new([
            Column::text("policy"),
            Column::number("96").group("mean error, by budget"),
            Column::number("2048").group("mean error, by budget"),
            Column::number("read"),
        ]);
        let error = NumberFormat::Significant(3);
        table.section("story");
        table
            .push(Row::new([
                Cell::text("quest, 16"),
                Cell::number(0.592_13, error),
                Cell::number(0.021_14, error),
                Cell::number(8192.0, NumberFormat::Bytes),
            ]))
            .unwrap();
        table.section("answer <&>");
        table
            .push(
                Row::new([
                    Cell::text("floe"),
                    Cell::number(0.315, error),
                    Cell::number(f64::NAN, error),
                    Cell::missing(),
                ])
                .emphasised(),
            )
            .unwrap();
        table
    }

    #[test]
    fn a_row_of_the_wrong_length_is_refused_with_its_index() {
        let mut table = sample();
        let error = table.push(Row::new([Cell::missing()])).unwrap_err();
        assert_eq!(error, TableError::RowLength { row: 2, expected: 4, found: 1 });
        assert_eq!(error.to_string(), "table row 2 has 1 cells, expected 4");
        assert_eq!(table.num_rows(), 2);
    }
}
