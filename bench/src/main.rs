//! The `floe-bench` command: measurements of floe. Every case verifies its answer before it is timed.

mod attend;
mod index;
mod machine;
mod stats;
mod tiers;

use clap::{Parser, Subcommand};

/// Measures floe; every case verifies its answer before it is timed.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Exact attention of one group of query heads over a long context, against the memory bandwidth.
    Attend(attend::Args),
    /// Build, insertion and search of every index kind over growing numbers of tokens, with kept mass and recall.
    Index(index::Args),
    /// Attention over the warm tier's slabs against the same attention over one flat array.
    Tiers(tiers::Args),
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Attend(args) => attend::run(&args),
        Command::Index(args) => index::run(&args),
        Command::Tiers(args) => tiers::run(&args),
    }
}
