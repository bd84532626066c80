//! The rules of a round as a pure state machine: driven by logged events, replayed from them, auditable by anybody.
//!
//! ```text
//! Opening -> Contribute -> Fusing -> Distil{0} -> Merging{0} -> ... -> Evaluate -> Judging -> Released
//!                any open phase -> Rejected
//! ```
//!
//! The shell logs an event first and applies it with [`Round::step`] then; after every step and at every
//! [`Round::next_deadline`] it asks [`Round::due`] and logs what comes back, at the instant it asked with. A member
//! counts as here once its `Joined` entry follows `Opened`, so the shell logs one for each node that was connected
//! before the round opened.

mod effect;
mod machine;
mod parts;

pub use effect::{Admission, Effect, RoundError, RoundPhase, RoundTask, Work};
pub use machine::Round;
pub use parts::{part_seed, parts};
