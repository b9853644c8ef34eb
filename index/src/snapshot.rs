//! Bytes of an index: header, little-endian arrays, checksum. Lengths are checked against what is there before anything is
//! allocated, and every link is checked before it is followed, so that no bytes can make a restore panic or ask for more
//! memory than a small multiple of their own length.
//!
//! ```text
//! "floeidx" kind | version u32 | body | crc32 u32 of all before it
//! ```

use crate::error::IndexError;

/// Layout of the body; older ones are refused by name.
const VERSION: u32 = 3;
const MAGIC: [u8; 7] = *b"floeidx";

/// Which implementation wrote the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    Flat = b'f',
    Dci = b'd',
    Tokens = b't',
    Hnsw = b'h',
    Icecache = b'i',
}

/// Collects a snapshot.
#[derive(Debug)]
pub(crate) struct Writer(Vec<u8>);

impl Writer {
    pub fn new(kind: Kind) -> Self {
        let mut bytes = MAGIC.to_vec();
        bytes.push(kind as u8);
        bytes.extend(VERSION.to_le_bytes());
        Self(bytes)
    }

    pub fn u32(&mut self, x: u32) {
        self.0.extend(x.to_le_bytes());
    }

    /// A length; more than 2^32 of anything is refused at insertion.
    pub fn len(&mut self, len: usize) {
        self.u32(len as u32);
    }

    pub fn bytes(&mut self, x: &[u8]) {
        self.0.extend_from_slice(x);
    }

    pub fn signed(&mut self, x: &[i8]) {
        self.0.extend(x.iter().map(|&x| x as u8));
    }

    pub fn u16s(&mut self, x: &[u16]) {
        self.0.extend(x.iter().flat_map(|x| x.to_le_bytes()));
    }

    pub fn u32s(&mut self, x: &[u32]) {
        self.0.extend(x.iter().flat_map(|x| x.to_le_bytes()));
    }

    pub fn f32s(&mut self, x: &[f32]) {
        self.0.extend(x.iter().flat_map(|x| x.to_le_bytes()));
    }

    pub fn f64s(&mut self, x: &[f64]) {
        self.0.extend(x.iter().flat_map(|x| x.to_le_bytes()));
    }

    /// For parts that write themselves.
    pub fn buffer(&mut self) -> &mut Vec<u8> {
        &mut self.0
    }

    pub fn finish(mut self) -> Vec<u8> {
        let sum = crc32fast::hash(&self.0);
        self.u32(sum);
        self.0
    }
}

/// Walks a snapshot whose checksum holds.
#[derive(Debug)]
pub(crate) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    /// Checks header and checksum.
    pub fn new(bytes: &'a [u8], kind: Kind) -> Result<Self, IndexError> {
        let damaged = |what, offset| IndexError::Snapshot { what, offset };
        let Some((body, sum)) = bytes.split_last_chunk::<4>() else {
            return Err(damaged("too short", bytes.len()));
        };
        if !body.starts_with(&MAGIC) {
            return Err(damaged("magic", 0));
        }
        if crc32fast::hash(body) != u32::from_le_bytes(*sum) {
            return Err(damaged("checksum", body.len()));
        }
        let mut reader = Self { bytes: body, at: MAGIC.len() };
        if reader.take(1)? != [kind as u8] {
            return Err(damaged("kind of index", MAGIC.len()));
        }
        if reader.u32()? != VERSION {
            return Err(damaged("version", MAGIC.len() + 1));
        }
        Ok(reader)
    }

    /// An error at the present place.
    pub fn damaged(&self, what: &'static str) -> IndexError {
        IndexError::Snapshot { what, offset: self.at }
    }

    /// Refuses unless `ok`.
    pub fn check(&self, ok: bool, what: &'static str) -> Result<(), IndexError> {
        if ok { Ok(()) } else { Err(self.damaged(what)) }
    }

    /// The next `len` bytes.
    pub fn take(&mut self, len: usize) -> Result<&'a [u8], IndexError> {
        let Some(slice) = self.at.checked_add(len).and_then(|end| self.bytes.get(self.at..end)) else {
            return Err(self.damaged("shorter than its lengths say"));
        };
        self.at += len;
        Ok(slice)
    }

    fn words<const N: usize>(
        &mut self,
        len: usize,
    ) -> Result<impl Iterator<Item = [u8; N]> + 'a, IndexError> {
        let bytes = len.checked_mul(N).ok_or_else(|| self.damaged("length"))?;
        Ok(self.take(bytes)?.as_chunks::<N>().0.iter().copied())
    }

    pub fn u32(&mut self) -> Result<u32, IndexError> {
        Ok(self.words::<4>(1)?.map(u32::from_le_bytes).sum())
    }

    pub fn len(&mut self) -> Result<usize, IndexError> {
        Ok(self.u32()? as usize)
    }

    pub fn signed(&mut self, len: usize) -> Result<Vec<i8>, IndexError> {
        Ok(self.take(len)?.iter().map(|&x| x as i8).collect())
    }

    pub fn u16s(&mut self, len: usize) -> Result<Vec<u16>, IndexError> {
        Ok(self.words::<2>(len)?.map(u16::from_le_bytes).collect())
    }

    pub fn u32s(&mut self, len: usize) -> Result<Vec<u32>, IndexError> {
        Ok(self.words::<4>(len)?.map(u32::from_le_bytes).collect())
    }

    /// Finite numbers.
    pub fn f32s(&mut self, len: usize) -> Result<Vec<f32>, IndexError> {
        let numbers: Vec<f32> = self.words::<4>(len)?.map(f32::from_le_bytes).collect();
        self.check(numbers.iter().all(|x| x.is_finite()), "a number is not finite")?;
        Ok(numbers)
    }

    /// Finite numbers.
    pub fn f64s(&mut self, len: usize) -> Result<Vec<f64>, IndexError> {
        let numbers: Vec<f64> = self.words::<8>(len)?.map(f64::from_le_bytes).collect();
        self.check(numbers.iter().all(|x| x.is_finite()), "a number is not finite")?;
        Ok(numbers)
    }

    /// All bytes must have been read.
    pub fn finish(&self) -> Result<(), IndexError> {
        self.check(self.at == self.bytes.len(), "longer than its lengths say")
    }
}
