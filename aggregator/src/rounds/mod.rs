//! Rounds: what the operator asks for, the driver that owns log and state, and the work between phases.

pub mod board;
pub mod driver;
mod opening;
pub mod request;
pub mod state;
mod view;
pub mod work;

pub use board::Board;
pub use driver::Driver;
pub use state::{Admitted, Setup, State, StateError};
pub use work::{Bench, RecordsReport, SoFar};
