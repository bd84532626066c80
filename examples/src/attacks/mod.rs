//! What a dishonest institution may hand over, for the arena's table of attacks against rules.

pub mod records;
