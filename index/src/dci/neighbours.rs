//! The super-nodes nearest to each super-node: exactly while they are few, by Dynamic Continuous Indexing when they are many.
//!
//! DCI (Li and Malik 2016, prioritised 2017) keeps every point in several lists, each sorted by the projection on one random
//! direction. A query walks all lists outwards from its own projections, always the one whose next point is closest in
//! projection; a point that was met in every list is a candidate, and only candidates are compared exactly. Projections never
//! lengthen a distance, so a near point is near in every list.
//!
//! Eight-bit block products compare a point with sixteen centres in about 20 ns, a visit costs about 10, and a candidate
//! must be met in every list: up to thousands of centres the exact scan is both faster and right. DCI keeps the build linear
//! beyond that.

use rayon::prelude::*;

use super::codebook::{Codebook, Codes};
use crate::blocks::LANES;
use crate::simd::Isa;
use crate::simd::vectorise::{Kernel, distance_sq, dot, vectorised};

/// Up to this many points all pairs are compared; this many cost 10 us a point.
const EXACT_MAX: usize = 8192;
/// Sorted lists.
const LISTS: usize = 6;
/// Points visited over all lists, for each neighbour asked for.
const VISITS: usize = 1500;

/// Points `[n, dim]` that are asked for their neighbours among themselves.
pub(super) struct Neighbours<'a> {
    isa: Isa,
    points: &'a [f32],
    dim: usize,
}

impl<'a> Neighbours<'a> {
    pub fn new(isa: Isa, points: &'a [f32], dim: usize) -> Self {
        Self { isa, points, dim }
    }

    /// The `k` nearest others of every point, nearest first.
    pub fn nearest_to_all(&self, k: usize) -> Vec<Vec<u32>> {
        if self.points.len() / self.dim <= EXACT_MAX { self.exact(k) } else { self.continuous(k) }
    }

    fn exact(&self, k: usize) -> Vec<Vec<u32>> {
        let num = self.points.len() / self.dim;
        let mut book = Codebook::new(num.div_ceil(LANES), self.dim);
        for (i, row) in self.points.chunks_exact(self.dim).enumerate() {
            book.set(i, row);
        }
        let tasks = self.points.par_chunks(LANES * self.dim).enumerate();
        let lists = tasks.flat_map_iter(|(task, rows)| {
            let codes = Codes::of(rows, self.dim);
            let mut near: Vec<Vec<(f32, u32)>> =
                vec![Vec::with_capacity(book.num_blocks() * LANES); codes.len()];
            let mut dots = Vec::new();
            for block in 0..book.num_blocks() {
                book.visit(self.isa, block, &codes, &mut dots, |i, close| {
                    near[i].extend((block * LANES..num).zip(close).map(|(entry, &c)| (-c, entry as u32)));
                });
            }
            near.into_iter().enumerate().map(move |(i, near)| best(near, (task * LANES + i) as u32, k))
        });
        lists.collect()
    }

    fn continuous(&self, k: usize) -> Vec<Vec<u32>> {
        let index = Continuous::new(self);
        let num = self.points.len() / self.dim;
        let tasks = (0..num as u32).into_par_iter();
        tasks.map_init(|| Walk::new(num), |walk, point| best(index.query(point, k, walk), point, k)).collect()
    }

    fn row(&self, i: u32) -> &'a [f32] {
        &self.points[i as usize * self.dim..][..self.dim]
    }
}

/// The first `k` by distance without `own`.
fn best(mut near: Vec<(f32, u32)>, own: u32, k: usize) -> Vec<u32> {
    near.retain(|x| x.1 != own);
    let by_distance = |a: &(f32, u32), b: &(f32, u32)| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1));
    if near.len() > k {
        near.select_nth_unstable_by(k, by_distance);
        near.truncate(k);
    }
    near.sort_unstable_by(by_distance);
    near.into_iter().map(|x| x.1).collect()
}

/// The sorted lists.
struct Continuous<'a> {
    of: &'a Neighbours<'a>,
    /// `[lists]` points by rising projection.
    lists: Vec<Vec<(f32, u32)>>,
    /// `[lists][points]` place of a point in each list.
    places: Vec<Vec<u32>>,
}

/// What one query remembers about the points it met.
struct Walk {
    /// Number of the present query.
    query: u32,
    /// `[points]` query that met the point last, and in how many lists.
    met: Vec<(u32, u8)>,
}

impl Walk {
    fn new(num: usize) -> Self {
        Self { query: 0, met: vec![(0, 0); num] }
    }
}

struct Projections<'a>(&'a Neighbours<'a>, &'a [f32]);

impl Kernel for Projections<'_> {
    type Output = Vec<(f32, u32)>;

    #[inline(always)]
    fn run(self) -> Vec<(f32, u32)> {
        let rows = self.0.points.chunks_exact(self.0.dim).enumerate();
        rows.map(|(i, row)| (dot(row, self.1), i as u32)).collect()
    }
}

struct Distance<'a>(&'a [f32], &'a [f32]);

impl Kernel for Distance<'_> {
    type Output = f32;

    #[inline(always)]
    fn run(self) -> f32 {
        distance_sq(self.0, self.1)
    }
}

/// Gaussian directions of length one, the same on every run.
fn directions(dim: usize) -> Vec<Vec<f32>> {
    let mut state = 0x0dc1u64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    let mut row = || {
        let mut row: Vec<f32> = (0..dim).map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0).collect();
        let length = dot(&row, &row).sqrt().max(f32::MIN_POSITIVE);
        row.iter_mut().for_each(|x| *x /= length);
        row
    };
    (0..LISTS).map(|_| row()).collect()
}

impl<'a> Continuous<'a> {
    fn new(of: &'a Neighbours<'a>) -> Self {
        let lists: Vec<Vec<(f32, u32)>> = directions(of.dim)
            .par_iter()
            .map(|direction| {
                let mut list = vectorised(of.isa, Projections(of, direction));
                list.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
                list
            })
            .collect();
        let places = lists.iter().map(|list| {
            let mut places = vec![0; list.len()];
            for (place, &(_, point)) in list.iter().enumerate() {
                places[point as usize] = place as u32;
            }
            places
        });
        Self { places: places.collect(), of, lists }
    }

    /// Candidates of a point with their squared distances.
    fn query(&self, point: u32, k: usize, walk: &mut Walk) -> Vec<(f32, u32)> {
        walk.query += 1;
        let mut found = Vec::new();
        // Next places below and above in each list; a place beyond either end is never closest.
        let mut cursors: Vec<[usize; 2]> =
            self.places.iter().map(|p| [p[point as usize] as usize; 2]).collect();
        let at: Vec<f32> = self.lists.iter().zip(&cursors).map(|(list, c)| list[c[0]].0).collect();
        cursors.iter_mut().for_each(|c| c[1] += 1);
        let below = |list: usize, cursors: &[[usize; 2]]| cursors[list][0].checked_sub(1);
        for _ in 0..k * VISITS {
            let mut closest = (f32::INFINITY, 0, false);
            for list in 0..LISTS {
                if let Some(place) = below(list, &cursors) {
                    let gap = at[list] - self.lists[list][place].0;
                    if gap < closest.0 {
                        closest = (gap, list, false);
                    }
                }
                if let Some(&(projection, _)) = self.lists[list].get(cursors[list][1]) {
                    let gap = projection - at[list];
                    if gap < closest.0 {
                        closest = (gap, list, true);
                    }
                }
            }
            let (gap, list, up) = closest;
            if gap == f32::INFINITY {
                break;
            }
            let place = if up { cursors[list][1] } else { cursors[list][0] - 1 };
            cursors[list][usize::from(up)] = if up { place + 1 } else { place };
            let (_, other) = self.lists[list][place];
            let met = &mut walk.met[other as usize];
            *met = if met.0 == walk.query { (met.0, met.1 + 1) } else { (walk.query, 1) };
            if usize::from(met.1) == LISTS {
                let distance = vectorised(self.of.isa, Distance(self.of.row(point), self.of.row(other)));
                found.push((distance, other));
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Points around centres around centres.
    fn points(num: usize, dim: usize) -> Vec<f32> {
        let mut state = 7u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        let centres: Vec<f32> = (0..40 * dim).map(|_| next()).collect();
        (0..num * dim).map(|i| centres[(i / dim) % 40 * dim + i % dim] + 0.5 * next()).collect()
    }

    #[test]
    fn exact_neighbours_are_those_of_a_plain_scan() {
        let (num, dim) = (100, 24);
        let points = points(num, dim);
        let near = Neighbours::new(Isa::detect(), &points, dim).exact(3);
        let mut agree = 0;
        for (i, near) in near.iter().enumerate() {
            let row = |i: usize| &points[i * dim..(i + 1) * dim];
            let all = (0..num).map(|j| (distance_sq(row(i), row(j)), j as u32)).collect();
            let wanted = best(all, i as u32, 3);
            assert_eq!(near.len(), 3);
            agree += wanted.iter().filter(|j| near.contains(j)).count();
        }
        // Eight-bit codes may swap neighbours at almost equal distances.
        assert!(agree >= 290, "{agree} of 300");
    }

    #[test]
    fn continuous_index_finds_most_of_the_nearest() {
        let (num, dim) = (3000, 64);
        let points = points(num, dim);
        let index = Neighbours::new(Isa::detect(), &points, dim);
        let (exact, continuous) = (index.exact(7), index.continuous(7));
        let shared: usize =
            exact.iter().zip(&continuous).map(|(a, b)| a.iter().filter(|i| b.contains(i)).count()).sum();
        assert!(shared * 10 >= num * 7 * 7, "{shared} of {}", num * 7);
    }

    #[test]
    fn equal_points_and_few_points_are_served() {
        let same = vec![1.0f32; 50 * 8];
        let index = Neighbours::new(Isa::detect(), &same, 8);
        assert!(index.exact(7).iter().chain(&index.continuous(7)).all(|near| near.len() == 7));
        let two = vec![1.0f32; 2 * 8];
        let index = Neighbours::new(Isa::detect(), &two, 8);
        assert_eq!((index.exact(7), index.continuous(7)), (vec![vec![1], vec![0]], vec![vec![1], vec![0]]));
    }
}
