//! The program at an institution: models, training, scoring, egress gate, session.

#![forbid(unsafe_code)]

pub mod agent;
mod args;
pub mod cli;
pub mod config;
pub mod error;
pub mod hub;
mod process;
mod reply;
pub mod scorer;
pub mod spool;
mod status;
mod supervise;
mod training;
mod width;
pub mod worker;
