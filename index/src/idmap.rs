//! Where each token lies: a map from ids to places in chunks of 256, dense because ids are positions.

use std::collections::HashMap;

use crate::index::KeyId;

const CHUNK: usize = 256;
const EMPTY: u32 = u32::MAX;
const YOUNG: u32 = 1 << 31;

/// Home of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Page slot times 16 plus lane.
    Slot(usize),
    /// Entry among the young tokens.
    Young(usize),
}

/// Map from id to place; 4 bytes an id when ids are dense. Never iterated, so its hash order cannot reach a result.
#[derive(Clone, Debug, Default)]
pub(crate) struct IdMap {
    chunks: HashMap<u32, Box<[u32; CHUNK]>>,
    len: usize,
}

impl IdMap {
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn get(&self, id: KeyId) -> Option<Place> {
        let word = self.chunks.get(&(id / CHUNK as u32))?[id as usize % CHUNK];
        match word {
            EMPTY => None,
            w if w & YOUNG != 0 => Some(Place::Young((w & !YOUNG) as usize)),
            w => Some(Place::Slot(w as usize)),
        }
    }

    /// Sets or moves an id.
    pub fn set(&mut self, id: KeyId, place: Place) {
        let word = match place {
            Place::Slot(slot) => slot as u32,
            Place::Young(entry) => entry as u32 | YOUNG,
        };
        let chunk = self.chunks.entry(id / CHUNK as u32).or_insert_with(|| Box::new([EMPTY; CHUNK]));
        let cell = &mut chunk[id as usize % CHUNK];
        self.len += usize::from(*cell == EMPTY);
        *cell = word;
    }

    /// Forgets an id. Empty chunks stay: positions come back after a speculative rollback.
    pub fn remove(&mut self, id: KeyId) {
        if let Some(chunk) = self.chunks.get_mut(&(id / CHUNK as u32)) {
            let cell = &mut chunk[id as usize % CHUNK];
            self.len -= usize::from(*cell != EMPTY);
            *cell = EMPTY;
        }
    }

    pub fn size_bytes(&self) -> usize {
        // Table entry: key, pointer and one control byte, at 7/8 load.
        self.chunks.capacity() * 17 + self.chunks.len() * CHUNK * 4
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_found_where_they_were_put_until_removed() {
        let mut map = IdMap::default();
        for id in [0, 5, 255, 256, u32::MAX] {
            map.set(id, Place::Slot(id as usize % 1000));
        }
        map.set(5, Place::Young(9));
        assert_eq!(map.len(), 5);
        assert_eq!(map.get(5), Some(Place::Young(9)));
        assert_eq!(map.get(u32::MAX), Some(Place::Slot(u32::MAX as usize % 1000)));
        assert_eq!(map.get(6), None);
        map.remove(256);
        map.remove(300);
        assert_eq!((map.get(256), map.len()), (None, 4));
    }
}
