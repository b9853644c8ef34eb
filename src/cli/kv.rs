//! `floe kv`: look at saved sequences and page files.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use floe::SavedSequence;
use floe::page::file::{FsStorage, PageFile};
use floe::report::NumberFormat;
use floe::report::table::{Cell, Column, Row, Table};

#[derive(Subcommand)]
pub enum KvCommand {
    /// Print what a page file holds and check it.
    Info(InfoArgs),
}

#[derive(Args)]
pub struct InfoArgs {
    /// Saved sequences or cold files.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Compare every page and blob with its checksum, not only the frame.
    #[arg(long)]
    verify: bool,
}

pub fn run(command: KvCommand) -> anyhow::Result<()> {
    match command {
        KvCommand::Info(args) => args.files.iter().try_for_each(|file| info(file, args.verify)),
    }
}

fn info(path: &Path, verify: bool) -> anyhow::Result<()> {
    let file = PageFile::open(&FsStorage, path)?;
    let manifest = file.manifest();
    let slab_bytes: u64 = manifest.slabs.iter().map(|s| s.crc.len() as u64 * u64::from(s.page_bytes)).sum();
    let blob_bytes: u64 = manifest.blobs.iter().map(|b| b.bytes).sum();
    let pages: usize = manifest.slabs.iter().map(|s| s.crc.len()).sum();
    let mut table = Table::new([Column::text("field"), Column::text("value")]);
    let mut fact = |name: &str, value: String| table.push(Row::new([Cell::text(name), Cell::text(value)]));
    let bytes = |n: u64| NumberFormat::Bytes.show(n as f64);
    fact("file", path.display().to_string())?;
    fact("size", bytes(file.size_bytes()))?;
    match SavedSequence::read(&file, path) {
        Ok(saved) => {
            let heads = (saved.num_layers, saved.num_q_heads, saved.num_kv_heads);
            fact(
                "holds",
                format!("a sequence of {} layers, {} query and {} kv heads", heads.0, heads.1, heads.2),
            )?;
            fact("rows", format!("{} of {} elements", saved.kv_dtype, saved.head_dim))?;
            let (least, most) = (saved.num_tokens.iter().min(), saved.num_tokens.iter().max());
            fact(
                "tokens",
                match (least, most) {
                    (Some(a), Some(b)) if a != b => format!("{a} to {b}"),
                    (Some(a), _) => a.to_string(),
                    (None, _) => "none".into(),
                },
            )?;
            fact("policy", format!("{}, {} sinks, window {}", saved.policy, saved.sinks, saved.window))?;
        }
        Err(_) => fact("holds", format!("cold pages, epoch {}", manifest.epoch))?,
    }
    fact("pages", format!("{pages} in {} slabs, {}", manifest.slabs.len(), bytes(slab_bytes)))?;
    fact("indexes", format!("{}, {}", manifest.blobs.len(), bytes(blob_bytes)))?;
    if verify {
        file.verify()?;
    }
    fact("checksums", if verify { "frame, pages and indexes agree" } else { "frame agrees" }.to_owned())?;
    Ok(writeln!(io::stdout(), "{table}")?)
}
