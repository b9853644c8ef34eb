//! Which indexes are built and how each is searched.

use floe_index::sketch::SketchConfig;
use floe_index::{Dci, Flat, Hnsw, HnswConfig, Icecache, KeyIndex, SearchParams, Tail, Unit};

/// Widest candidate list of the graph; narrower ones are fractions of it.
const EF_MAX: usize = 1024;

/// Family of an index: what the plots colour and the ratios compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Exact scan of every key.
    Scan,
    /// The tree.
    Dci,
    /// All page means of the tree's own pages.
    Flat,
    /// All means of consecutive pages.
    PageMean,
    /// Graph.
    Hnsw,
    /// Published tree.
    Icecache,
}

/// One built index.
pub struct Built {
    /// `family[:sketch=...]`.
    pub name: String,
    pub family: Family,
    pub sketch: &'static str,
    pub index: Box<dyn KeyIndex>,
}

/// One way to search a built index.
pub struct Case {
    /// The index's name with its effort.
    pub name: String,
    /// Which of the built indexes; `None` for the scan.
    pub built: Option<usize>,
    pub family: Family,
    pub sketch: &'static str,
    /// Part of the super-nodes that may be opened, where that means something.
    pub open: f32,
    pub params: SearchParams,
}

/// Sketches measured.
pub const SKETCHES: [(&str, SketchConfig); 3] =
    [("off", SketchConfig::OFF), ("k1", SketchConfig::K1), ("k2v1", SketchConfig::K2V1)];

/// An empty tree.
pub fn tree(dim: usize, sketch: SketchConfig) -> anyhow::Result<Dci> {
    Ok(Dci::with_sketch(dim, sketch)?)
}

/// The indexes besides the tree, empty; the graph only when `with_graph`.
pub fn rivals(dim: usize, num_tokens: usize, hnsw_max: usize) -> anyhow::Result<Vec<Built>> {
    let off = "off";
    let mut rivals = vec![
        Built {
            name: "pagemean".into(),
            family: Family::PageMean,
            sketch: off,
            index: Box::new(Flat::new(dim)?),
        },
        Built {
            name: "icecache".into(),
            family: Family::Icecache,
            sketch: off,
            index: Box::new(Icecache::new(dim, 0)?),
        },
    ];
    if num_tokens <= hnsw_max {
        let config = HnswConfig { ef_search: EF_MAX, ..HnswConfig::default() };
        let index = Box::new(Hnsw::new(dim, config)?);
        rivals.push(Built { name: "hnsw".into(), family: Family::Hnsw, sketch: off, index });
    }
    Ok(rivals)
}

/// Every search of the built indexes, the scan first.
pub fn searches(built: &[Built], budget: usize) -> Vec<Case> {
    let page = SearchParams::exact(budget, Unit::Page, Tail::Tree);
    let scan = Case {
        name: "scan".into(),
        built: None,
        family: Family::Scan,
        sketch: "off",
        open: 1.0,
        params: page,
    };
    let mut cases = vec![scan];
    for (at, index) in built.iter().enumerate() {
        let (family, sketch) = (index.family, index.sketch);
        let unit = if sketch == "off" { Unit::Page } else { Unit::Token };
        let mut push = |name: String, open: f32, params: SearchParams| {
            let params = SearchParams { open_fraction: open, ..params };
            cases.push(Case { name, built: Some(at), family, sketch, open, params });
        };
        match family {
            Family::Dci => {
                for open in [1.0, 0.5, 0.25, 0.1, 0.05, 0.02] {
                    push(format!("{},open={open}", index.name), open, SearchParams { unit, ..page });
                }
            }
            Family::Flat | Family::PageMean | Family::Scan => {
                push(index.name.clone(), 1.0, SearchParams { unit, ..page });
            }
            Family::Icecache => push(index.name.clone(), 1.0, SearchParams { tail: Tail::Off, ..page }),
            Family::Hnsw => {
                for ef in [32, 64, 128, 256, 512, EF_MAX] {
                    // Lists narrower than the budget may find fewer tokens than asked for: the heads' lists overlap.
                    let node_budget = if ef < budget { ef } else { usize::MAX };
                    let params = SearchParams { tail: Tail::Off, node_budget, ..page };
                    push(format!("hnsw:ef={ef}"), ef as f32 / EF_MAX as f32, params);
                }
            }
        }
    }
    cases
}
