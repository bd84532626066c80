//! Data and reports that the examples share.

#![forbid(unsafe_code)]

pub mod attacks;
pub mod cluster;
pub mod lab;
pub mod report;
pub mod tokens;
pub mod world;
