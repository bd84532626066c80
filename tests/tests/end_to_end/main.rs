//! Whole rounds with real processes on real sockets. One binary, so that tests that wait share the cores with those that work.

#![cfg(test)]

mod adapters;
mod config_files;
mod pairwise;
mod restart;
mod round_trip;
mod stragglers;
mod tokens;
mod walkthrough;
