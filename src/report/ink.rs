//! Colours by role, not by value: the style sheet gives each role a light and a dark colour.
//!
//! The palettes keep at least 4.5:1 contrast to both page backgrounds (tested) and never carry meaning alone: every series
//! also has its own marker, its own label, and references are dashed.

/// What a series, span or bar part is to the reader. The number picks the colour within the role and wraps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ink {
    /// The policies that the report is about: strong colours and heavy lines.
    Own(u8),
    /// What they are compared with: muted colours and thin lines.
    Rival(u8),
    /// Bounds and optima (`full`, `oracle`, Belady): grey and dashed.
    Reference(u8),
    /// Parts of a whole (stages, kinds of spans): equal weight.
    Category(u8),
}

/// Light and dark colour of each member of a role, in the order of their numbers.
pub(crate) type Palette = &'static [(&'static str, &'static str)];

pub(crate) const OWN: Palette =
    &[("#0b57d0", "#7ab0ff"), ("#c23b0e", "#ff9466"), ("#00756a", "#3fd0bd"), ("#9c2a93", "#ee93e4")];
pub(crate) const RIVAL: Palette = &[
    ("#8a6412", "#cfae62"),
    ("#4a7550", "#93c19a"),
    ("#7d5a9a", "#c0a1da"),
    ("#4a7190", "#92b8d6"),
    ("#96564a", "#dba091"),
    ("#6b6f2a", "#bcbf78"),
    ("#a04a72", "#dd97b8"),
    ("#3d7478", "#88bfc2"),
];
pub(crate) const REFERENCE: Palette = &[("#6a6f77", "#9aa1ab"), ("#3c4149", "#ccd1d9")];
pub(crate) const CATEGORY: Palette = &[
    ("#2f6db5", "#7fb2ec"),
    ("#b4560f", "#f0a061"),
    ("#2d7d60", "#69c7a4"),
    ("#8c5aa8", "#c79fe0"),
    ("#8a6d00", "#d9bb4a"),
    ("#b2446a", "#f08fb0"),
    ("#3a7c92", "#76c4dc"),
    ("#8a5a44", "#d3a48d"),
    ("#66732b", "#b3c270"),
    ("#6a6f77", "#9aa1ab"),
];
/// Page background, light and dark.
#[cfg(test)]
pub(crate) const PAPER: (&str, &str) = ("#ffffff", "#14171c");

/// All roles with the stem of their CSS variables.
pub(crate) const ROLES: [(&str, Palette); 4] =
    [("own", OWN), ("rival", RIVAL), ("ref", REFERENCE), ("cat", CATEGORY)];

impl Ink {
    fn role(self) -> (&'static str, Palette, u8) {
        let (role, number) = match self {
            Self::Own(n) => (0, n),
            Self::Rival(n) => (1, n),
            Self::Reference(n) => (2, n),
            Self::Category(n) => (3, n),
        };
        (ROLES[role].0, ROLES[role].1, number)
    }

    /// CSS classes that set `--ink` and the weight of lines.
    pub(crate) fn class(self) -> String {
        let (stem, palette, number) = self.role();
        format!("{stem} {stem}{}", usize::from(number) % palette.len())
    }

    /// Number of the marker shape. Shapes wrap at seven, colours at four or eight, so the pair repeats late.
    pub(crate) fn shape(self) -> u8 {
        let (_, _, number) = self.role();
        number % 7
    }

    /// Order of drawing: what matters most is drawn last, on top.
    pub(crate) fn layer(self) -> u8 {
        match self {
            Self::Reference(_) => 0,
            Self::Rival(_) => 1,
            Self::Category(_) => 2,
            Self::Own(_) => 3,
        }
    }
}

/// Hands out inks by name, so that a policy keeps its colour in every chart and table of a page.
#[derive(Clone, Debug, Default)]
pub struct Inks {
    named: Vec<(String, Ink)>,
}

impl Inks {
    /// No name known yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The ink of `name`; a name not seen before gets the next [`Ink::Own`].
    pub fn own(&mut self, name: &str) -> Ink {
        self.get(name, Ink::Own)
    }

    /// The ink of `name`; a name not seen before gets the next [`Ink::Rival`].
    pub fn rival(&mut self, name: &str) -> Ink {
        self.get(name, Ink::Rival)
    }

    /// The ink of `name`; a name not seen before gets the next [`Ink::Reference`].
    pub fn reference(&mut self, name: &str) -> Ink {
        self.get(name, Ink::Reference)
    }

    /// The ink of `name`; a name not seen before gets the next [`Ink::Category`].
    pub fn category(&mut self, name: &str) -> Ink {
        self.get(name, Ink::Category)
    }

    fn get(&mut self, name: &str, role: fn(u8) -> Ink) -> Ink {
        if let Some((_, ink)) = self.named.iter().find(|(known, _)| known == name) {
            return *ink;
        }
        let layer = role(0).layer();
        let used = self.named.iter().filter(|(_, ink)| ink.layer() == layer).count();
        let ink = role((used % 256) as u8);
        self.named.push((name.to_owned(), ink));
        ink
    }
}

/// Style rules that define every ink for light and dark.
pub(crate) fn style() -> String {
    let mut light = String::new();
    let mut dark = String::new();
    let mut classes = String::new();
    for (stem, palette) in ROLES {
        for (i, (on_light, on_dark)) in palette.iter().enumerate() {
            light.push_str(&format!("--{stem}{i}:{on_light};"));
            dark.push_str(&format!("--{stem}{i}:{on_dark};"));
            classes.push_str(&format!(".{stem}{i}{{--ink:var(--{stem}{i})}}\n"));
        }
    }
    format!(":root{{{light}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n{classes}")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// WCAG 2.2 relative luminance of `#rrggbb`.
    fn luminance(colour: &str) -> f64 {
        let channel = |i: usize| {
            let c = f64::from(u8::from_str_radix(&colour[i..i + 2], 16).unwrap()) / 255.0;
            if c <= 0.040_45 { c / 12.92 } else { ((c + 0.055) / 1.055).powf(2.4) }
        };
        0.2126 * channel(1) + 0.7152 * channel(3) + 0.0722 * channel(5)
    }

    fn contrast(a: &str, b: &str) -> f64 {
        let (a, b) = (luminance(a), luminance(b));
        (a.max(b) + 0.05) / (a.min(b) + 0.05)
    }

    #[test]
    fn every_ink_is_readable_as_text_on_light_and_dark_paper() {
        for (stem, palette) in ROLES {
            for (i, (light, dark)) in palette.iter().enumerate() {
                assert!(contrast(light, PAPER.0) >= 4.5, "{stem}{i} light {}", contrast(light, PAPER.0));
                assert!(contrast(dark, PAPER.1) >= 4.5, "{stem}{i} dark {}", contrast(dark, PAPER.1));
            }
        }
    }

    #[test]
    fn the_tested_paper_is_the_paper_of_the_style_sheet() {
        let sheet = include_str!("chart/chart.css");
        assert!(sheet.contains(&format!("--paper: {}", PAPER.0)));
        assert!(sheet.contains(&format!("--paper: {}", PAPER.1)));
    }

    #[test]
    fn a_name_keeps_its_ink_and_roles_count_apart() {
        let mut inks = Inks::new();
        assert_eq!(inks.rival("quest"), Ink::Rival(0));
        assert_eq!(inks.own("floe"), Ink::Own(0));
        assert_eq!(inks.rival("window"), Ink::Rival(1));
        assert_eq!(inks.rival("quest"), Ink::Rival(0));
        assert_eq!(inks.reference("quest"), Ink::Rival(0), "the first role wins");
    }
}
