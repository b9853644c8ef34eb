//! The `floe-bench` command: measurements of floe. Every case verifies its answer before it is timed.

mod attend;
mod index;
#[cfg(feature = "cuda")]
mod kernel;
mod machine;
mod reuse;
mod stats;
#[cfg(feature = "cuda")]
mod step;
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
    /// Device kernels against the copy bandwidth of the device and the link to the host.
    #[cfg(feature = "cuda")]
    Kernel(kernel::Args),
    /// Build, insertion and search of every index kind over growing numbers of tokens, with kept mass and recall.
    Index(index::Args),
    /// The engine on the device: attention time of a token against full attention, over contexts and batches.
    #[cfg(feature = "cuda")]
    Step(step::Args),
    /// A decode step with reuse against one without, on recorded queries.
    Reuse(reuse::Args),
    /// Attention over the warm tier's slabs against the same attention over one flat array.
    Tiers(tiers::Args),
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Attend(args) => attend::run(&args),
        #[cfg(feature = "cuda")]
        Command::Kernel(args) => kernel::run(&args),
        Command::Index(args) => index::run(&args),
        #[cfg(feature = "cuda")]
        Command::Step(args) => step::run(&args),
        Command::Reuse(args) => reuse::run(&args),
        Command::Tiers(args) => tiers::run(&args),
    }
}
