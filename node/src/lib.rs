//! The program at an institution: models, training, scoring, egress gate, session.

#![forbid(unsafe_code)]

pub mod agent;
pub mod config;
pub mod spool;
pub mod worker;
