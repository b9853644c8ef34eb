//! A storage that fails on purpose, seeded: writes that fail, drafts that are lost, published files that are torn, bits
//! that rot.

use std::collections::HashMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::page::file::{Draft, FileBytes, Storage};

/// Faults per 1024 operations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// A write fails: the disk is full or broken.
    pub write: u32,
    /// Publishing fails; the name keeps its old contents.
    pub publish: u32,
    /// Publishing succeeds, but the end of the file never reached the disk.
    pub tear: u32,
    /// Publishing succeeds, but one bit differs.
    pub rot: u32,
    /// A published file cannot be opened.
    pub open: u32,
}

/// Files in memory, with faults.
#[derive(Clone)]
pub struct SimStore(Arc<Mutex<World>>);

struct World {
    rng: ChaCha8Rng,
    faults: Faults,
    /// 64-bit words keep the contents aligned as a map would be.
    files: HashMap<PathBuf, Arc<Contents>>,
}

struct Contents {
    words: Vec<[u64; 8]>,
    len: usize,
}

impl FileBytes for Contents {
    fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.len]
    }
}

impl World {
    fn strikes(&mut self, per_1024: u32) -> bool {
        self.rng.next_u32() % 1024 < per_1024
    }
}

impl SimStore {
    /// An empty store; the same seed and operations give the same faults.
    #[must_use]
    pub fn new(seed: u64, faults: Faults) -> Self {
        let rng = ChaCha8Rng::seed_from_u64(seed);
        Self(Arc::new(Mutex::new(World { rng, faults, files: HashMap::new() })))
    }

    /// Changes the faults from here on.
    pub fn set_faults(&self, faults: Faults) {
        self.0.lock().faults = faults;
    }

    /// Forgets a file.
    pub fn remove(&self, path: &Path) {
        self.0.lock().files.remove(path);
    }
}

struct SimDraft {
    store: SimStore,
    path: PathBuf,
    bytes: Vec<u8>,
}

impl Write for SimDraft {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut world = self.store.0.lock();
        let per_1024 = world.faults.write;
        if world.strikes(per_1024) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Draft for SimDraft {
    fn publish(mut self: Box<Self>) -> io::Result<()> {
        let mut world = self.store.0.lock();
        let Faults { publish, tear, rot, .. } = world.faults;
        if world.strikes(publish) {
            return Err(io::ErrorKind::Other.into());
        }
        let mut bytes = std::mem::take(&mut self.bytes);
        if world.strikes(tear) {
            let keep = world.rng.next_u32() as usize % (bytes.len() + 1);
            bytes.truncate(keep);
        }
        if world.strikes(rot) && !bytes.is_empty() {
            let at = world.rng.next_u32() as usize % bytes.len();
            bytes[at] ^= 1 << (world.rng.next_u32() % 8);
        }
        let mut words = vec![[0u64; 8]; bytes.len().div_ceil(64)];
        bytemuck::cast_slice_mut::<_, u8>(&mut words)[..bytes.len()].copy_from_slice(&bytes);
        world.files.insert(self.path.clone(), Arc::new(Contents { words, len: bytes.len() }));
        Ok(())
    }
}

impl Storage for SimStore {
    fn draft(&self, path: &Path) -> io::Result<Box<dyn Draft>> {
        Ok(Box::new(SimDraft { store: self.clone(), path: path.to_path_buf(), bytes: Vec::new() }))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn FileBytes>> {
        let mut world = self.0.lock();
        let per_1024 = world.faults.open;
        if world.strikes(per_1024) {
            return Err(io::ErrorKind::Other.into());
        }
        let file = world.files.get(path).cloned();
        file.map(|file| file as Arc<dyn FileBytes>).ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}
