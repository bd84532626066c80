//! `consilium-aggregator`: the program of the operator.

use std::process::ExitCode;

fn main() -> ExitCode {
    consilium_aggregator::cli::main(std::env::args_os())
}
