//! The program of the operator: rounds, fusion, store, log, releases.

#![forbid(unsafe_code)]

pub mod fusion;
pub mod release;
