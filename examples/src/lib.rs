//! Sample configurations shared by the examples.

#![forbid(unsafe_code)]
