//! The `floe-bench` command.

fn main() {}
