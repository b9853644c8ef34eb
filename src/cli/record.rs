//! `floe record`: traces of a GGUF model reading a text.

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::Args;
use floe::host::{Model, RecordPlan, Recorder};

use super::generate::prefill_bar;

#[derive(Args)]
pub struct RecordArgs {
    /// Model file (GGUF).
    #[arg(long, value_name = "FILE")]
    model: PathBuf,
    /// Text to read.
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Folder of the traces; made when absent.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Layers to record [default: all].
    #[arg(long, value_name = "N,N", value_delimiter = ',')]
    layers: Vec<usize>,
    /// kv heads to record [default: all].
    #[arg(long, value_name = "N,N", value_delimiter = ',')]
    heads: Vec<usize>,
    /// Tokens of the text to read.
    #[arg(long, value_name = "N", default_value_t = 8192)]
    tokens: usize,
    /// Queries to record, at the last positions.
    #[arg(long, value_name = "N", default_value_t = 256)]
    queries: usize,
    /// Licence of the text, for the metadata.
    #[arg(long, value_name = "TEXT", default_value = "unknown")]
    licence: String,
}

pub fn run(args: RecordArgs) -> anyhow::Result<()> {
    // One pool for candle's products and floe's attention.
    rayon::ThreadPoolBuilder::new().build()?.install(|| run_in_pool(args))
}

fn run_in_pool(args: RecordArgs) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(&args.text)
        .with_context(|| format!("cannot read {}", args.text.display()))?;
    let model = Model::open(&args.model)?;
    let mut tokens = model.tokenizer.encode(&text)?;
    if tokens.len() < args.tokens {
        bail!("{} has {} tokens, --tokens asks for {}", args.text.display(), tokens.len(), args.tokens);
    }
    tokens.truncate(args.tokens);
    std::fs::create_dir_all(&args.out).with_context(|| format!("cannot make {}", args.out.display()))?;
    let name = args.text.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let plan = RecordPlan {
        layers: args.layers,
        heads: args.heads,
        num_tokens: tokens.len(),
        num_queries: args.queries,
        text: name,
        licence: args.licence,
    };
    let recorder = Recorder::create(&model, &plan, &args.out)?;
    let bar = prefill_bar(tokens.len())?;
    let paths = recorder.run(&model, &tokens, &mut |done| bar.inc(done as u64))?;
    bar.finish_and_clear();
    let mut stdout = io::stdout().lock();
    for path in paths {
        writeln!(stdout, "{}", path.display())?;
    }
    Ok(())
}
