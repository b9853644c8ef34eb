//! Colours by role, not by value: the style sheet gives each role a light and a dark colour.
//!
//! The palettes keep at least 4.5:1 contrast to both page backgrounds, and the colours of a role stay apart for readers with
//! protanopia or deuteranopia (both tested). Colour never carries meaning alone: every series also has its own marker and
//! label, and references are dashed.

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
    &[("#0b57d0", "#6fa5ff"), ("#a33008", "#e8805f"), ("#008055", "#6fe8a8"), ("#7d1784", "#f5b3fb")];
pub(crate) const RIVAL: Palette = &[
    ("#7f7728", "#bbb573"),
    ("#984f64", "#d28c9f"),
    ("#357a93", "#b3e0f2"),
    ("#3d672d", "#73a164"),
    ("#585794", "#aaabe5"),
    ("#663f45", "#e5b7be"),
    ("#4c4300", "#e2d789"),
    ("#29416f", "#7092d0"),
];
pub(crate) const REFERENCE: Palette = &[("#6a6f77", "#9aa1ab"), ("#3c4149", "#ccd1d9")];
pub(crate) const CATEGORY: Palette = &[
    ("#3a579c", "#9ab5f0"),
    ("#844b07", "#d18d50"),
    ("#1c7f91", "#72ddf5"),
    ("#b75575", "#fabece"),
    ("#048151", "#6fb18c"),
    ("#816d0b", "#e1c969"),
    ("#7f67bd", "#a390dd"),
    ("#486343", "#9bca93"),
    ("#834970", "#d994c1"),
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

    /// Number of the marker shape. Shapes wrap at seven, colours at four, eight or nine, so the pair repeats late.
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
        linear(colour).iter().zip([0.2126, 0.7152, 0.0722]).map(|(c, weight)| c * weight).sum()
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

    type Rgb = [f64; 3];

    fn linear(colour: &str) -> Rgb {
        [1, 3, 5].map(|i| {
            let c = f64::from(u8::from_str_radix(&colour[i..i + 2], 16).unwrap()) / 255.0;
            if c <= 0.040_45 { c / 12.92 } else { ((c + 0.055) / 1.055).powf(2.4) }
        })
    }

    fn times(matrix: [Rgb; 3], v: Rgb) -> Rgb {
        matrix.map(|row| row.iter().zip(v).map(|(a, b)| a * b).sum())
    }

    /// Oklab (Ottosson 2020), in which equal distances look about equally different.
    fn oklab(rgb: Rgb) -> Rgb {
        let cones = [
            [0.412_221_470_8, 0.536_332_536_3, 0.051_445_992_9],
            [0.211_903_498_2, 0.680_699_545_1, 0.107_396_956_6],
            [0.088_302_461_9, 0.281_718_837_6, 0.629_978_700_5],
        ];
        let opponent = [
            [0.210_454_255_3, 0.793_617_785_0, -0.004_072_046_8],
            [1.977_998_495_1, -2.428_592_205_0, 0.450_593_709_9],
            [0.025_904_037_1, 0.782_771_766_2, -0.808_675_766_0],
        ];
        times(opponent, times(cones, rgb).map(|c| c.max(0.0).cbrt()))
    }

    /// Identity, protanopia, deuteranopia: Machado, Oliveira and Fernandes 2009, severity 1.
    const EYES: [[Rgb; 3]; 3] = [
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
        [
            [0.152_286, 1.052_583, -0.204_868],
            [0.114_503, 0.786_281, 0.099_216],
            [-0.003_882, -0.048_116, 1.051_998],
        ],
        [
            [0.367_322, 0.860_646, -0.227_968],
            [0.280_085, 0.672_501, 0.047_413],
            [-0.011_820, 0.042_940, 0.968_881],
        ],
    ];

    #[test]
    fn inks_of_a_role_stay_apart_for_colour_blind_readers() {
        let seen = |eye, colour: &str| oklab(times(eye, linear(colour)).map(|c| c.clamp(0.0, 1.0)));
        let apart = |a: &str, b: &str| {
            let distance = |eye| -> f64 {
                seen(eye, a).iter().zip(seen(eye, b)).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt()
            };
            EYES.map(distance).into_iter().fold(f64::INFINITY, f64::min)
        };
        for (stem, palette) in ROLES {
            for (i, a) in palette.iter().enumerate() {
                for (j, b) in palette.iter().enumerate().skip(i + 1) {
                    for (a, b) in [(a.0, b.0), (a.1, b.1)] {
                        assert!(apart(a, b) >= 0.055, "{stem}{i} {a} and {stem}{j} {b}: {}", apart(a, b));
                    }
                }
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
