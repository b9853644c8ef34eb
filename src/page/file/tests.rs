use std::sync::Arc;

use super::*;
use crate::page::LentSlab;

const PAGE: usize = 64;

fn write(path: &std::path::Path, epoch: u64) {
    let mut writer = PageFileWriter::create(&FsStorage, path, epoch).unwrap();
    for slab in 0..3u32 {
        let bytes: Vec<u8> = (0..2 * PAGE).map(|i| (i as u32 * 7 + slab) as u8).collect();
        writer.slab(SlabName { shard: 1, slab, rows: 17 }, PAGE, &bytes).unwrap();
    }
    writer.blob("index/0".into(), b"words").unwrap();
    writer.finish(serde_json::json!({ "kind": "test" })).unwrap();
}

#[test]
fn a_file_reads_back_and_opening_it_checks_no_page() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.kv");
    write(&path, 7);
    let file = PageFile::open(&FsStorage, &path).unwrap();
    assert_eq!((file.manifest().epoch, file.manifest().slabs.len()), (7, 3));
    assert_eq!(file.blob("index/0").unwrap(), b"words");
    assert!(file.blob("index/1").unwrap_err().to_string().contains("index/1"));
    let slab: Arc<_> = file.slab(&file.manifest().slabs[2]);
    slab.verify(0b11).unwrap();
    assert_eq!(slab.bytes()[1], 9);
    file.verify().unwrap();
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn a_file_cut_at_any_byte_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.kv");
    write(&path, 1);
    let whole = std::fs::read(&path).unwrap();
    let cut = folder.path().join("cut.kv");
    for end in 0..whole.len() {
        std::fs::write(&cut, &whole[..end]).unwrap();
        assert!(PageFile::open(&FsStorage, &cut).is_err(), "{end}");
    }
}

#[test]
fn no_flipped_bit_is_handed_out() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.kv");
    write(&path, 1);
    let whole = std::fs::read(&path).unwrap();
    let original = PageFile::open(&FsStorage, &path).unwrap();
    let flipped = folder.path().join("flipped.kv");
    for at in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        std::fs::write(&flipped, &bytes).unwrap();
        // Refused, or the flip lies in padding and everything handed out is as written.
        let Ok(file) = PageFile::open(&FsStorage, &flipped) else { continue };
        if file.verify().is_ok() {
            assert_eq!(file.manifest(), original.manifest(), "{at}");
            for entry in &file.manifest().slabs {
                assert_eq!(file.slab(entry).bytes(), original.slab(entry).bytes(), "{at}");
            }
        }
    }
}

#[test]
fn a_draft_that_is_not_finished_leaves_the_old_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.kv");
    write(&path, 1);
    let mut writer = PageFileWriter::create(&FsStorage, &path, 2).unwrap();
    writer.blob("x".into(), b"y").unwrap();
    drop(writer);
    assert_eq!(PageFile::open(&FsStorage, &path).unwrap().manifest().epoch, 1);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn a_full_disk_is_an_error_of_the_machine() {
    // Linux has a device that is always full.
    if let Ok(mut full) = std::fs::File::options().write(true).open("/dev/full") {
        struct Full(std::fs::File);
        impl std::io::Write for Full {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                self.0.write(bytes)
            }
            fn flush(&mut self) -> std::io::Result<()> {
                self.0.flush()
            }
        }
        impl Draft for Full {
            fn publish(self: Box<Self>) -> std::io::Result<()> {
                unreachable!("nothing was written")
            }
        }
        struct FullStorage(std::fs::File);
        impl Storage for FullStorage {
            fn draft(&self, _path: &std::path::Path) -> std::io::Result<Box<dyn Draft>> {
                Ok(Box::new(Full(self.0.try_clone()?)))
            }
            fn open(&self, _path: &std::path::Path) -> std::io::Result<Arc<dyn FileBytes>> {
                Err(std::io::ErrorKind::NotFound.into())
            }
        }
        use std::io::Write;
        assert!(full.write_all(b"x").is_err());
        let result = PageFileWriter::create(&FullStorage(full), std::path::Path::new("a.kv"), 0);
        let error = result.err().unwrap();
        assert!(error.is_environment() && error.to_string().contains("a.kv"), "{error}");
    }
}
