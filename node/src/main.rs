//! The program at an institution: models, training, scoring, egress gate, session.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    consilium_node::cli::main(std::env::args_os())
}
