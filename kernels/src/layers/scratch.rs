//! Buffers that survive a step: activations are taken from here and given back by the backward pass.
//!
//! Memory that is new to the process costs a page fault for every 4 KiB, more than most operations do with it.

use std::sync::{Arc, Mutex, PoisonError};

/// Buffers kept at most; beyond it the smallest one is freed.
const KEPT: usize = 96;

/// A pool of f32 buffers, shared by the blocks of one model.
#[derive(Debug, Clone, Default)]
pub struct Scratch(Arc<Mutex<Vec<Vec<f32>>>>);

impl Scratch {
    /// A buffer of `len` values with arbitrary finite contents.
    pub fn take(&self, len: usize) -> Vec<f32> {
        let mut pool = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let fit = pool
            .iter()
            .enumerate()
            .filter(|(_, buffer)| buffer.capacity() >= len)
            .min_by_key(|(_, buffer)| buffer.capacity())
            .map(|(index, buffer)| (index, buffer.capacity()));
        let mut buffer = match fit {
            Some((index, capacity)) if capacity <= len * 2 + 1024 => pool.swap_remove(index),
            _ => Vec::with_capacity(len + len / 8),
        };
        drop(pool);
        buffer.resize(len, 0.0);
        buffer
    }

    /// Returns a buffer to the pool.
    pub fn give(&self, buffer: Vec<f32>) {
        let mut pool = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        pool.push(buffer);
        if pool.len() > KEPT
            && let Some(smallest) = pool
                .iter()
                .enumerate()
                .min_by_key(|(_, b)| b.capacity())
                .map(|(index, _)| index)
        {
            pool.swap_remove(smallest);
        }
    }
}
