//! Consortium certificate authority, node certificates and signing keys.

use std::process::ExitCode;

fn main() -> ExitCode {
    consilium_certs::cli::main(std::env::args_os())
}
