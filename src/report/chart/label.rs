//! Text in charts: estimated widths, wrapping, and places where labels do not overlap.

use unicode_width::UnicodeWidthChar;

use crate::report::ink::Ink;

/// Size of all text in charts, in user units.
pub(crate) const FONT_SIZE: f64 = 13.0;
/// Height of a line of text.
pub(crate) const LINE_HEIGHT: f64 = 17.0;

/// Estimated width of `text` at [`FONT_SIZE`] in a sans-serif face. The fonts of readers differ by about 10 %; the estimate
/// follows wide ones (DejaVu, Verdana) so that text that fits here fits everywhere.
pub(crate) fn text_width(text: &str) -> f64 {
    let em: f64 = text
        .chars()
        .map(|c| match c {
            'i' | 'j' | 'l' | '.' | ',' | ':' | ';' | '\'' | '|' | '!' | ' ' | 'I' => 0.33,
            'f' | 't' | 'r' | '(' | ')' | '[' | ']' | '-' | '/' => 0.41,
            'm' | 'w' | 'M' | 'W' | '@' | '%' | '=' | '+' => 0.88,
            c if c.is_ascii_uppercase() => 0.7,
            c if c.is_ascii() => 0.61,
            c => c.width().unwrap_or(0) as f64 * 0.61,
        })
        .sum();
    em * FONT_SIZE
}

/// Estimated width of the name of a series: own names are set in bold, which is wider.
pub(crate) fn name_width(ink: Ink, name: &str) -> f64 {
    text_width(name) * if matches!(ink, Ink::Own(_)) { 1.1 } else { 1.0 }
}

/// `text` cut to `width` with an ellipsis, or whole when it fits.
pub(crate) fn shorten(text: &str, width: f64) -> String {
    if text_width(text) <= width {
        return text.to_owned();
    }
    let mut kept = String::new();
    for c in text.chars() {
        kept.push(c);
        if text_width(&kept) + FONT_SIZE > width {
            kept.pop();
            break;
        }
    }
    kept.push('…');
    kept
}

/// Lines of at most `width`, broken between words; a longer word stands alone.
pub(crate) fn wrap(text: &str, width: f64) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if text_width(line) + text_width(word) + FONT_SIZE * 0.33 <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

/// Moves `wanted` centres apart until neighbours are at least `spacing` away and all lie in `[low, high]`, keeping their
/// order and moving them little: labels that collide form a block centred on the mean of its wishes (pool adjacent
/// violators). When they cannot all fit, the spacing shrinks evenly.
pub(crate) fn spread(wanted: &[f64], spacing: f64, range: (f64, f64)) -> Vec<f64> {
    let (low, high) = range;
    if wanted.is_empty() {
        return Vec::new();
    }
    let gaps = (wanted.len() - 1) as f64;
    let spacing = if gaps > 0.0 { spacing.min((high - low) / gaps) } else { spacing };
    let mut order: Vec<usize> = (0..wanted.len()).collect();
    order.sort_by(|&a, &b| wanted[a].total_cmp(&wanted[b]));

    // Each block: index of its first label in `order`, number of labels, centre of the first one.
    let mut blocks: Vec<(usize, usize, f64)> = Vec::new();
    let settle = |first: usize, count: usize| {
        let ideal: f64 =
            (0..count).map(|i| wanted[order[first + i]] - i as f64 * spacing).sum::<f64>() / count as f64;
        ideal.min(high - (count - 1) as f64 * spacing).max(low)
    };
    for first in 0..order.len() {
        let mut block = (first, 1, settle(first, 1));
        while let Some(&(previous, count, at)) = blocks.last() {
            if at + count as f64 * spacing <= block.2 + 1e-9 {
                break;
            }
            blocks.pop();
            block = (previous, count + block.1, settle(previous, count + block.1));
        }
        blocks.push(block);
    }
    let mut placed = vec![0.0; wanted.len()];
    for (first, count, at) in blocks {
        for i in 0..count {
            placed[order[first + i]] = at + i as f64 * spacing;
        }
    }
    placed
}

/// An axis-parallel box in user units.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rect {
    pub(crate) left: f64,
    pub(crate) top: f64,
    pub(crate) right: f64,
    pub(crate) bottom: f64,
}

impl Rect {
    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        self.left < other.right
            && other.left < self.right
            && self.top < other.bottom
            && other.top < self.bottom
    }

    /// Whether the straight line between two points passes through the box: Liang and Barsky's clipping.
    pub(crate) fn is_crossed(&self, from: (f64, f64), to: (f64, f64)) -> bool {
        let (dx, dy) = (to.0 - from.0, to.1 - from.1);
        let edges = [
            (-dx, from.0 - self.left),
            (dx, self.right - from.0),
            (-dy, from.1 - self.top),
            (dy, self.bottom - from.1),
        ];
        let (mut enter, mut leave) = (0.0f64, 1.0f64);
        for (towards, room) in edges {
            if towards == 0.0 && room < 0.0 {
                return false;
            }
            if towards < 0.0 {
                enter = enter.max(room / towards);
            } else if towards > 0.0 {
                leave = leave.min(room / towards);
            }
        }
        enter <= leave
    }

    /// The box with a margin all around.
    pub(crate) fn grown(&self, margin: f64) -> Self {
        Self {
            left: self.left - margin,
            top: self.top - margin,
            right: self.right + margin,
            bottom: self.bottom + margin,
        }
    }

    pub(crate) fn inside(&self, outer: &Self) -> bool {
        self.left >= outer.left
            && self.right <= outer.right
            && self.top >= outer.top
            && self.bottom <= outer.bottom
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_labels_keep_order_distance_and_range() {
        let cases: [(&[f64], f64); 5] = [
            (&[10.0, 11.0, 12.0, 50.0], 15.0),
            (&[95.0, 96.0, 97.0], 15.0),
            (&[0.0, 0.0, 0.0, 0.0], 15.0),
            (&[50.0], 15.0),
            (&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 99.0], 15.0),
        ];
        for (wanted, spacing) in cases {
            let placed = spread(wanted, spacing, (0.0, 100.0));
            let fitting = spacing.min(100.0 / (wanted.len().max(2) - 1) as f64);
            for pair in placed.windows(2) {
                assert!(pair[1] - pair[0] >= fitting - 1e-6, "{wanted:?} -> {placed:?}");
            }
            assert!(placed.iter().all(|p| (-1e-9..=100.0 + 1e-9).contains(p)), "{wanted:?} -> {placed:?}");
        }
        assert_eq!(spread(&[10.0, 50.0], 15.0, (0.0, 100.0)), [10.0, 50.0], "free labels stay");
        assert_eq!(spread(&[50.0, 10.0], 15.0, (0.0, 100.0)), [50.0, 10.0], "any input order");
    }

    #[test]
    fn a_box_is_crossed_only_by_lines_through_it() {
        let square = Rect { left: 0.0, top: 0.0, right: 2.0, bottom: 2.0 };
        for (from, to, crossed) in [
            ((-1.0, 1.0), (3.0, 1.0), true),
            ((1.0, 1.0), (1.0, 1.0), true),
            ((-1.0, 2.0), (1.0, 4.0), false),
            ((3.0, -1.0), (3.0, 3.0), false),
            ((-1.0, 0.5), (0.5, -1.0), false),
            ((-1.0, 1.5), (1.5, -1.0), true),
        ] {
            assert_eq!(square.is_crossed(from, to), crossed, "{from:?} {to:?}");
        }
    }

    #[test]
    fn wrapped_lines_hold_all_words() {
        let text = "mean relative error of the attention output";
        let lines = wrap(text, 120.0);
        assert!(lines.len() > 1);
        assert_eq!(lines.join(" "), text);
        assert!(wrap("", 50.0).is_empty());
    }

    #[test]
    fn shortened_text_fits() {
        let text = "floe:tail=tree,sketch=k2v1,unit=token";
        assert_eq!(shorten(text, 1000.0), text);
        let short = shorten(text, 100.0);
        assert!(text_width(&short) <= 105.0 && short.ends_with('…'));
    }
}
