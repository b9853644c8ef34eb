//! Numbers as bytes, little-endian: the form in which caches are saved.

/// Writes numbers one after the other.
#[derive(Default)]
pub(super) struct Writer(Vec<u8>);

impl Writer {
    pub(super) fn word(&mut self, x: u64) {
        self.0.extend_from_slice(&x.to_le_bytes());
    }

    /// Length, then elements.
    pub(super) fn words(&mut self, x: &[u32]) {
        self.word(x.len() as u64);
        x.iter().for_each(|x| self.0.extend_from_slice(&x.to_le_bytes()));
    }

    /// Length, then elements.
    pub(super) fn floats(&mut self, x: &[f32]) {
        self.word(x.len() as u64);
        x.iter().for_each(|x| self.0.extend_from_slice(&x.to_le_bytes()));
    }

    pub(super) fn done(self) -> Vec<u8> {
        self.0
    }
}

/// Reads them back; `None` where the bytes end early.
pub(super) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(super) fn word(&mut self) -> Option<u64> {
        let (head, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u64::from_le_bytes(*head))
    }

    fn quads(&mut self) -> Option<impl Iterator<Item = [u8; 4]> + 'a> {
        let len = usize::try_from(self.word()?).ok()?.checked_mul(4)?;
        let (quads, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(quads.as_chunks().0.iter().copied())
    }

    pub(super) fn words(&mut self) -> Option<Vec<u32>> {
        Some(self.quads()?.map(u32::from_le_bytes).collect())
    }

    pub(super) fn floats(&mut self) -> Option<Vec<f32>> {
        Some(self.quads()?.map(f32::from_le_bytes).collect())
    }

    /// Whether nothing is left.
    pub(super) fn is_done(&self) -> bool {
        self.0.is_empty()
    }
}
