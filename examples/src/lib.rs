//! Data and reports that the examples share.

#![forbid(unsafe_code)]

pub mod report;
pub mod world;
