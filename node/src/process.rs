//! When a process that does jobs is to end: on a signal, or with the process that started it.

use std::os::unix::process::parent_id;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};

/// Watches for the end.
#[derive(Debug, Clone)]
pub(crate) struct Ending {
    signal: Arc<AtomicBool>,
    /// The process that started this one, if its end matters.
    parent: Option<u32>,
}

impl Ending {
    /// Takes over SIGTERM and SIGINT.
    ///
    /// # Errors
    /// The system refuses a handler.
    pub(crate) fn watch(with_parent: bool) -> std::io::Result<Self> {
        let signal = Arc::new(AtomicBool::new(false));
        for number in [SIGTERM, SIGINT] {
            // Only sets the flag. An asynchronous runtime would want a socket pair for it.
            signal_hook::flag::register(number, Arc::clone(&signal))?;
        }
        Ok(Self {
            signal,
            parent: with_parent.then(parent_id),
        })
    }

    /// Whether it has come.
    pub(crate) fn is_due(&self) -> bool {
        self.signal.load(Ordering::Relaxed)
            || self.parent.is_some_and(|parent| parent_id() != parent)
    }
}
