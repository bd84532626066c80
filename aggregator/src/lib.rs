//! The program of the operator: rounds, fusion, store, log, releases.

#![forbid(unsafe_code)]

pub mod app;
pub mod cli;
pub mod config;
pub mod decoys;
pub mod fusion;
pub mod log;
pub mod release;
pub mod rounds;
pub mod server;
pub mod store;
