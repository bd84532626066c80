//! The half of a node that has data, models and the processor, and never opens a socket.

pub mod data;
pub mod device;
pub(crate) mod files;
pub mod model;
pub mod tokenizer;
pub mod train;
