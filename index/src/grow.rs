//! Growth of long-lived arrays by a thirty-second, so that spare capacity stays a small part of the memory report.

/// Appends `num` copies of `fill`, reserving at most a thirty-second more than needed.
pub(crate) fn grow_by<T: Clone>(items: &mut Vec<T>, num: usize, fill: T) {
    let wanted = items.len() + num;
    if wanted > items.capacity() {
        // The first fill takes exactly what it needs; later growth is amortised.
        let spare = if items.is_empty() { 0 } else { wanted / 32 };
        items.reserve_exact(num + spare);
    }
    items.resize(wanted, fill);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_keeps_spare_capacity_below_a_thirty_second() {
        let mut items: Vec<u8> = Vec::new();
        for _ in 0..1000 {
            grow_by(&mut items, 7, 3);
            assert!(items.capacity() <= items.len() + items.len() / 32 + 7, "{}", items.capacity());
        }
        assert!(items.iter().all(|&x| x == 3));
    }
}
