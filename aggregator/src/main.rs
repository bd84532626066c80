//! The program of the operator: rounds, fusion, store, log, releases.

fn main() {}
