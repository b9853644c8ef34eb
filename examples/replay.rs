//! Compares policies with full attention on a recorded trace: `cargo run --release --example replay -- TRACE`

#![allow(clippy::print_stdout, reason = "an example writes its tables")]

use floe::replay::{ReplayPlan, replay, tables};
use floe::trace::Trace;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let trace = Trace::open(std::env::args().nth(1).ok_or("usage: replay TRACE")?)?;
    let policies = vec!["window".parse()?, "quest".parse()?, "floe".parse()?];
    let plan = ReplayPlan::new(policies, vec![128, 256]);
    let runs = replay(&trace, &plan, &|| {})?;
    tables(&[runs]).iter().for_each(|(caption, table)| println!("{caption}\n{table}"));
    Ok(())
}
