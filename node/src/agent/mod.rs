//! The half of a node that has the network, the keys, the egress gate and the ledger, and neither data nor models.

mod content;
pub mod gate;
pub mod ledger;
pub mod retry;
#[cfg(test)]
mod testing;
