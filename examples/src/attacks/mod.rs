//! What a dishonest institution may hand over, for the arena's table of attacks against rules.

pub mod adapters;
pub mod records;
pub mod table;

#[cfg(test)]
mod tests;
