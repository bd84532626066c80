//! How work tells its caller where it is, and learns whether to go on.

use super::error::WorkError;

/// Watches a piece of work. Sees counts and means, never text.
pub trait Monitor {
    /// `done` of `total` units are done; `value` is the latest mean loss in nats or bits per byte, if there is one.
    ///
    /// # Errors
    /// [`WorkError::Stopped`] to end the work here.
    fn advance(&mut self, done: u64, total: u64, value: Option<f64>) -> Result<(), WorkError>;
}

/// Nobody watches.
impl Monitor for () {
    fn advance(&mut self, _: u64, _: u64, _: Option<f64>) -> Result<(), WorkError> {
        Ok(())
    }
}
