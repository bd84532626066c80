//! Wire types, signing, round rules, log and ledger formats of Consilium.

#![forbid(unsafe_code)]
