//! The tree's storage: tokens, the nodes that own them, and the pages they lie in.
//!
//! A node owns children sorted by their place on one random line; its pages are runs of that order. A key row lives in the lane
//! of its page, so that the children of a node are read in few pieces.

use half::bf16;

use crate::blocks::LANES;
use crate::grow::grow_by;
use crate::index::KeyId;
use crate::simd::Isa;

/// The node above everything, which is no token.
pub(crate) const ROOT: u32 = 0;
/// No node, no token.
pub(crate) const NONE: u32 = u32::MAX;
/// A page with fewer tokens borrows from or joins its neighbour.
const FILL_MIN: u32 = 8;

/// A child of a node.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Child {
    /// Place on the random line.
    pub along: f32,
    pub token: u32,
}

/// A token of level 1 or above as the owner of its children.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Node {
    /// Squared radius of the sphere that the children's places were computed for.
    pub radius_sq: f64,
    /// Level of the children.
    pub level: usize,
    /// Sorted by place, then token.
    pub children: Vec<Child>,
}

/// One random direction in the lifted space.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Line {
    /// `[dim]`
    pub direction: Vec<f32>,
    /// Share of the lift.
    pub lift: f32,
}

/// See the module documentation. Arrays by token are indexed by slot, which is not the id.
#[derive(Clone, Debug)]
pub(crate) struct Store {
    pub isa: Isa,
    pub dim: usize,
    pub line: Line,
    /// Squared radius of the sphere that all keys are lifted to: the largest squared length so far.
    pub radius_sq: f64,
    pub ids: Vec<KeyId>,
    /// Whether the token can be found; a removed token with children stays as a signpost.
    pub live: Vec<bool>,
    pub norm_sq: Vec<f64>,
    /// Place of the unlifted key on the line.
    pub along: Vec<f32>,
    pub level: Vec<u8>,
    /// Node that owns the token.
    pub parent: Vec<u32>,
    /// Product of the keys of token and parent.
    pub parent_dot: Vec<f32>,
    /// The token's own node, `NONE` at level 0.
    pub node: Vec<u32>,
    /// Page times 16 plus lane.
    pub place: Vec<u32>,
    pub free: Vec<u32>,
    pub nodes: Vec<Node>,
    /// Token of each node; `NONE` for the root and free nodes.
    pub owner: Vec<u32>,
    pub free_nodes: Vec<u32>,
    /// `[pages, 16, dim]`
    pub keys: Vec<bf16>,
    /// `[pages, 16]` token or `NONE`.
    pub lanes: Vec<u32>,
    /// `[pages]` tokens.
    pub fill: Vec<u32>,
    pub free_pages: Vec<u32>,
}

impl Store {
    pub fn new(isa: Isa, line: Line) -> Self {
        Self {
            isa,
            dim: line.direction.len(),
            line,
            radius_sq: 0.0,
            ids: Vec::new(),
            live: Vec::new(),
            norm_sq: Vec::new(),
            along: Vec::new(),
            level: Vec::new(),
            parent: Vec::new(),
            parent_dot: Vec::new(),
            node: Vec::new(),
            place: Vec::new(),
            free: Vec::new(),
            nodes: vec![Node::default()],
            owner: vec![NONE],
            free_nodes: Vec::new(),
            keys: Vec::new(),
            lanes: Vec::new(),
            fill: Vec::new(),
            free_pages: Vec::new(),
        }
    }

    /// Tokens and signposts.
    pub fn num_slots(&self) -> usize {
        self.ids.len() - self.free.len()
    }

    /// Pages in use.
    pub fn num_pages(&self) -> usize {
        self.fill.len() - self.free_pages.len()
    }

    /// Last coordinate of a lifted key.
    pub fn lift(&self, token: u32) -> f32 {
        (self.radius_sq - self.norm_sq[token as usize]).max(0.0).sqrt() as f32
    }

    /// Key row of a token, bf16 `[dim]`.
    pub fn row(&self, token: u32) -> &[bf16] {
        let place = self.place[token as usize] as usize;
        &self.keys[place * self.dim..(place + 1) * self.dim]
    }

    /// Place on the line of a token as a child of a node of that radius.
    fn along(&self, token: u32, radius_sq: f64) -> f32 {
        let lift = (radius_sq - self.norm_sq[token as usize]).max(0.0).sqrt() as f32;
        self.along[token as usize] + lift * self.line.lift
    }

    /// A slot for a token that has no place yet.
    pub fn add_token(&mut self, id: KeyId, level: usize, key: &[f32]) -> u32 {
        let norm_sq: f64 = key.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        let along: f64 =
            key.iter().zip(&self.line.direction).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
        self.radius_sq = self.radius_sq.max(norm_sq);
        let slot = self.free.pop().unwrap_or_else(|| {
            let slot = self.ids.len() as u32;
            grow_by(&mut self.ids, 1, 0);
            grow_by(&mut self.live, 1, false);
            grow_by(&mut self.norm_sq, 1, 0.0);
            grow_by(&mut self.along, 1, 0.0);
            grow_by(&mut self.level, 1, 0);
            grow_by(&mut self.parent, 1, NONE);
            grow_by(&mut self.parent_dot, 1, 0.0);
            grow_by(&mut self.node, 1, NONE);
            grow_by(&mut self.place, 1, NONE);
            slot
        });
        let at = slot as usize;
        self.ids[at] = id;
        self.live[at] = true;
        self.norm_sq[at] = norm_sq;
        self.along[at] = along as f32;
        self.level[at] = level as u8;
        self.parent[at] = NONE;
        self.place[at] = NONE;
        self.node[at] = if level == 0 { NONE } else { self.add_node(slot, level - 1) };
        slot
    }

    fn add_node(&mut self, owner: u32, level: usize) -> u32 {
        let node = Node { radius_sq: self.radius_sq, level, children: Vec::new() };
        match self.free_nodes.pop() {
            Some(at) => {
                self.nodes[at as usize] = node;
                self.owner[at as usize] = owner;
                at
            }
            None => {
                self.nodes.push(node);
                self.owner.push(owner);
                self.nodes.len() as u32 - 1
            }
        }
    }

    /// Forgets a token without place and children.
    pub fn drop_token(&mut self, token: u32) {
        let node = std::mem::replace(&mut self.node[token as usize], NONE);
        if node != NONE {
            self.nodes[node as usize] = Node::default();
            self.owner[node as usize] = NONE;
            self.free_nodes.push(node);
        }
        self.ids[token as usize] = 0;
        self.live[token as usize] = false;
        self.free.push(token);
    }

    fn add_page(&mut self) -> u32 {
        self.free_pages.pop().unwrap_or_else(|| {
            let page = self.fill.len() as u32;
            grow_by(&mut self.fill, 1, 0);
            grow_by(&mut self.lanes, LANES, NONE);
            grow_by(&mut self.keys, LANES * self.dim, bf16::ZERO);
            page
        })
    }

    /// Puts a token into a free lane of a page with its key.
    fn put(&mut self, token: u32, page: u32, key: &[bf16]) {
        let base = page as usize * LANES;
        let lane = self.lanes[base..base + LANES].iter().position(|&t| t == NONE);
        let place = base + lane.expect("callers split a full page first");
        self.lanes[place] = token;
        self.place[token as usize] = place as u32;
        self.keys[place * self.dim..(place + 1) * self.dim].copy_from_slice(key);
        self.fill[page as usize] += 1;
    }

    /// Takes a token out of its page; returns the page and the key.
    fn take(&mut self, token: u32) -> (u32, Vec<bf16>) {
        let key = self.row(token).to_vec();
        let place = std::mem::replace(&mut self.place[token as usize], NONE) as usize;
        self.lanes[place] = NONE;
        let page = place / LANES;
        self.fill[page] -= 1;
        if self.fill[page] == 0 {
            self.free_pages.push(page as u32);
        }
        (page as u32, key)
    }

    fn page_of(&self, token: u32) -> u32 {
        self.place[token as usize] / LANES as u32
    }

    /// Gives a node all its children at once: sorted, in pages of nearly equal size. Keys by token.
    pub fn load(&mut self, node: u32, tokens: &[u32], key_of: impl Fn(u32) -> Vec<bf16>) {
        let radius_sq = self.radius_sq;
        let mut children: Vec<Child> =
            tokens.iter().map(|&token| Child { along: self.along(token, radius_sq), token }).collect();
        children.sort_unstable_by(|a, b| a.along.total_cmp(&b.along).then(a.token.cmp(&b.token)));
        let (n, runs) = (children.len(), children.len().div_ceil(LANES));
        for run in 0..runs {
            let page = self.add_page();
            for child in &children[run * n / runs..(run + 1) * n / runs] {
                self.parent[child.token as usize] = node;
                self.put(child.token, page, &key_of(child.token));
            }
        }
        self.nodes[node as usize].children = children;
        self.nodes[node as usize].radius_sq = radius_sq;
    }

    /// Projects and packs the children anew where the sphere has grown since.
    fn renew(&mut self, node: u32) {
        if self.nodes[node as usize].radius_sq == self.radius_sq {
            return;
        }
        let tokens: Vec<u32> = self.nodes[node as usize].children.iter().map(|c| c.token).collect();
        let keys: Vec<(u32, Vec<bf16>)> = tokens.iter().map(|&t| (t, self.take(t).1)).collect();
        let mut by_token = keys;
        by_token.sort_unstable_by_key(|k| k.0);
        self.load(node, &tokens, |t| {
            let at = by_token.binary_search_by_key(&t, |k| k.0);
            by_token[at.expect("every child was taken")].1.clone()
        });
    }

    /// Inserts a token without place under a node.
    pub fn attach(&mut self, node: u32, token: u32, key: &[bf16]) {
        self.renew(node);
        self.parent[token as usize] = node;
        let child = Child { along: self.along(token, self.nodes[node as usize].radius_sq), token };
        let children = &self.nodes[node as usize].children;
        let at =
            children.partition_point(|c| c.along.total_cmp(&child.along).then(c.token.cmp(&token)).is_lt());
        // The page of the nearest child on the line; the left one where two are equally good.
        let page = match at.checked_sub(1).or((!children.is_empty()).then_some(0)) {
            None => self.add_page(),
            Some(neighbour) => {
                let mut page = self.page_of(children[neighbour].token);
                if self.fill[page as usize] as usize == LANES {
                    page = self.split(node, neighbour, at);
                }
                page
            }
        };
        self.put(token, page, key);
        self.nodes[node as usize].children.insert(at, child);
    }

    /// Moves the upper half of the full page of child `neighbour` into a new page; returns the one that position `at` falls into.
    fn split(&mut self, node: u32, neighbour: usize, at: usize) -> u32 {
        let children = &self.nodes[node as usize].children;
        let page = self.page_of(children[neighbour].token);
        let (first, last) = self.run(node, neighbour);
        debug_assert_eq!(last - first, LANES);
        let middle = first + LANES / 2;
        let upper: Vec<u32> = children[middle..last].iter().map(|c| c.token).collect();
        let other = self.add_page();
        for token in upper {
            let (_, key) = self.take(token);
            self.put(token, other, &key);
        }
        if at > middle { other } else { page }
    }

    /// Children of a node that share the page of child `at`: a run of the order.
    fn run(&self, node: u32, at: usize) -> (usize, usize) {
        let children = &self.nodes[node as usize].children;
        let page = self.page_of(children[at].token);
        let same = |c: &Child| self.page_of(c.token) == page;
        let before = children[..at].iter().rev().take_while(|c| same(c)).count();
        let after = children[at..].iter().take_while(|c| same(c)).count();
        (at - before, at + after)
    }

    /// Takes a token from its node and its page; returns its key.
    pub fn detach(&mut self, token: u32) -> Vec<bf16> {
        let node = std::mem::replace(&mut self.parent[token as usize], NONE);
        let children = &self.nodes[node as usize].children;
        let at = children.iter().position(|c| c.token == token);
        let at = at.expect("a token is a child of its parent");
        let (first, last) = self.run(node, at);
        let (page, key) = self.take(token);
        self.nodes[node as usize].children.remove(at);
        let last = last - 1;
        if self.fill[page as usize] < FILL_MIN && last > first {
            self.rebalance(node, first, last);
        }
        key
    }

    /// Fills the page of children `first..last` from a neighbour, or joins the two.
    fn rebalance(&mut self, node: u32, first: usize, last: usize) {
        let children = &self.nodes[node as usize].children;
        let page = self.page_of(children[first].token);
        let (mut span, edge) = if first > 0 {
            (self.run(node, first - 1), first - 1)
        } else if last < children.len() {
            (self.run(node, last), last)
        } else {
            return;
        };
        let other = self.page_of(children[edge].token);
        if self.fill[page as usize] + self.fill[other as usize] > LANES as u32 {
            span = (edge, edge + 1);
        }
        let moved: Vec<u32> = children[span.0..span.1].iter().map(|c| c.token).collect();
        for token in moved {
            let (_, key) = self.take(token);
            self.put(token, page, &key);
        }
    }

    /// Bytes of everything but the key rows.
    pub fn tree_bytes(&self) -> usize {
        let nodes: usize = self.nodes.iter().map(|n| size_of::<Node>() + n.children.capacity() * 8).sum();
        self.live.capacity()
            + self.level.capacity()
            + self.norm_sq.capacity() * 8
            + (self.along.capacity() + self.parent.capacity() + self.parent_dot.capacity()) * 4
            + (self.node.capacity() + self.place.capacity() + self.free.capacity()) * 4
            + (self.owner.capacity() + self.lanes.capacity() + self.fill.capacity()) * 4
            + nodes
    }
}
