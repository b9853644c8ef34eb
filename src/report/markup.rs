//! One escaping writer for SVG, HTML and XML.
//!
//! All text and attribute values pass through [`escape`], so a trace or policy name can never become markup.
//! The output is well-formed XML as well as HTML5: only void elements are self-closed.

/// Largest coordinate that is written as given: far outside every layout, and harmless to every renderer.
const COORDINATE_MAX: f64 = 1e6;

/// `text` with the five reserved characters as entities, and control characters, which XML 1.0 forbids, as U+FFFD.
pub(crate) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\n' => out.push('\n'),
            '\u{fffe}' | '\u{ffff}' => out.push('\u{fffd}'),
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// A coordinate or length in user units: at most two decimals, no trailing zeros, no `-0`, never NaN or infinite.
pub(crate) fn coordinate(value: f64) -> String {
    let value = if value.is_nan() { 0.0 } else { value.clamp(-COORDINATE_MAX, COORDINATE_MAX) };
    let text = format!("{value:.2}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0".to_owned() } else { text.to_owned() }
}

/// Streaming writer of nested elements. Every [`open`](Self::open) needs its [`close`](Self::close) or
/// [`empty`](Self::empty); [`finish`](Self::finish) closes what is left.
#[derive(Default)]
pub(crate) struct Markup {
    out: String,
    open: Vec<&'static str>,
    in_tag: bool,
}

impl Markup {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Starts an element; attributes may follow.
    pub(crate) fn open(&mut self, tag: &'static str) -> &mut Self {
        self.end_tag();
        self.out.push('<');
        self.out.push_str(tag);
        self.open.push(tag);
        self.in_tag = true;
        self
    }

    /// An attribute of the element just opened.
    pub(crate) fn attr(&mut self, name: &'static str, value: &str) -> &mut Self {
        debug_assert!(self.in_tag, "attribute {name} after content");
        self.out.push(' ');
        self.out.push_str(name);
        self.out.push_str("=\"");
        self.out.push_str(&escape(value));
        self.out.push('"');
        self
    }

    /// A numeric attribute, see [`coordinate`].
    pub(crate) fn num(&mut self, name: &'static str, value: f64) -> &mut Self {
        self.attr(name, &coordinate(value))
    }

    /// Escaped text content.
    pub(crate) fn text(&mut self, text: &str) -> &mut Self {
        self.end_tag();
        self.out.push_str(&escape(text));
        self
    }

    /// Markup that this module's writers made (or a constant of the crate).
    pub(crate) fn raw(&mut self, markup: &str) -> &mut Self {
        self.end_tag();
        self.out.push_str(markup);
        self
    }

    /// Closes the innermost element with an end tag.
    pub(crate) fn close(&mut self) -> &mut Self {
        self.end_tag();
        if let Some(tag) = self.open.pop() {
            self.out.push_str("</");
            self.out.push_str(tag);
            self.out.push('>');
        }
        self
    }

    /// Closes the element just opened as `<tag .../>`: SVG shapes and void HTML elements only.
    pub(crate) fn empty(&mut self) -> &mut Self {
        debug_assert!(self.in_tag, "an element with content cannot be empty");
        self.out.push_str("/>");
        self.in_tag = false;
        self.open.pop();
        self
    }

    /// An element that holds only text.
    pub(crate) fn leaf(&mut self, tag: &'static str, text: &str) -> &mut Self {
        self.open(tag).text(text).close()
    }

    /// A line break in the output, for readers of the source.
    pub(crate) fn line(&mut self) -> &mut Self {
        self.raw("\n")
    }

    pub(crate) fn finish(mut self) -> String {
        while !self.open.is_empty() {
            self.close();
        }
        self.out
    }

    fn end_tag(&mut self) {
        if self.in_tag {
            self.out.push('>');
            self.in_tag = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserved_and_control_characters_never_reach_the_output() {
        let mut m = Markup::new();
        m.open("a").attr("b", "\"<&'>\u{1b}").text("x<y & \u{0}\n").close();
        assert_eq!(m.finish(), "<a b=\"&quot;&lt;&amp;&#39;&gt;\u{fffd}\">x&lt;y &amp; \u{fffd}\n</a>");
    }

    #[test]
    fn coordinates_are_short_finite_and_unsigned_at_zero() {
        let cases = [
            (1.0, "1"),
            (1.504, "1.5"),
            (-0.001, "0"),
            (f64::NAN, "0"),
            (f64::INFINITY, "1000000"),
            (100.0, "100"),
            (-12.345, "-12.35"),
        ];
        for (value, text) in cases {
            assert_eq!(coordinate(value), text, "{value}");
        }
    }

    #[test]
    fn finish_closes_open_elements() {
        let mut m = Markup::new();
        m.open("g").open("rect").num("x", 2.0).empty();
        assert_eq!(m.finish(), "<g><rect x=\"2\"/></g>");
    }
}
