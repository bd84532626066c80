//! What the examples make and measure models with: one trainer, one set of questions, one way of using the cores.

pub mod clock;
pub mod folder;
pub mod measure;
pub mod models;
pub mod mollifier;
pub mod parallel;
pub mod rejection;
pub mod traffic;
pub mod trainer;
