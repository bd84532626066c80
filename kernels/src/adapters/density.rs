//! The magnitude above which a given share of the values lies, exactly, in two passes.
//!
//! Magnitudes of floats have the order of their bits. The first pass counts the upper 13 of their 31
//! bits, the second the lower 18 of those values whose upper bits are the ones sought.

use crate::cpu::multiversion::multiversion;
use crate::element::Element;
use crate::error::AdapterError;

/// Bits that the second pass counts.
const FINE: u32 = 18;
const BUCKETS: usize = 1 << (31 - FINE);
/// Values whose counts fit 32 bits for sure.
const BLOCK: usize = 1 << 20;
/// Counts that neighbours go to, so that an equal neighbour does not wait.
const WAYS: usize = 4;

/// First pass over the values of one adapter or tensor.
#[derive(Clone, Debug)]
pub struct Magnitudes {
    counts: Vec<u64>,
    ways: Vec<u32>,
    values: u64,
}

/// Second pass, over the same values.
#[derive(Clone, Debug)]
pub struct Narrowed {
    bucket: u32,
    /// Rank of the threshold within the bucket, from 1 for its largest.
    rank: u64,
    counts: Vec<u64>,
    /// Values in the bucket, by the first pass.
    values: u64,
}

impl Default for Magnitudes {
    fn default() -> Self {
        Self {
            counts: vec![0; BUCKETS],
            ways: vec![0; WAYS * BUCKETS],
            values: 0,
        }
    }
}

impl Magnitudes {
    /// Counts a chunk.
    ///
    /// # Errors
    /// A value that is not finite; its adapter is 0, its index that within the chunk.
    pub fn observe<T: Element>(&mut self, chunk: &[T]) -> Result<(), AdapterError> {
        for (index, block) in chunk.chunks(BLOCK).enumerate() {
            count_coarse(block, &mut self.ways);
            for way in self.ways.chunks_exact_mut(BUCKETS) {
                for (sum, count) in self.counts.iter_mut().zip(way) {
                    *sum += u64::from(std::mem::take(count));
                }
            }
            if self.counts[bucket(f32::INFINITY) as usize..]
                .iter()
                .any(|&count| count > 0)
            {
                return Err(not_finite(block, index * BLOCK));
            }
        }
        self.values += chunk.len() as u64;
        Ok(())
    }

    /// Ends the first pass: the threshold sought is the smallest magnitude of the
    /// `values * density_permille / 1000` largest, rounded up.
    ///
    /// # Errors
    /// Where the density is 0 or above 1000, or no value was seen.
    pub fn narrow(self, density_permille: u32) -> Result<Narrowed, AdapterError> {
        if !(1..=1000).contains(&density_permille) {
            return Err(AdapterError::Density {
                permille: density_permille,
            });
        }
        if self.values == 0 {
            return Err(AdapterError::Nothing);
        }
        let kept = (u128::from(self.values) * u128::from(density_permille)).div_ceil(1000);
        let mut rank = u64::try_from(kept).unwrap_or(u64::MAX);
        let mut bucket = BUCKETS - 1;
        while self.counts[bucket] < rank {
            rank -= self.counts[bucket];
            bucket -= 1;
        }
        Ok(Narrowed {
            bucket: u32::try_from(bucket).unwrap_or(u32::MAX),
            rank,
            values: self.counts[bucket],
            counts: vec![0; 1 << FINE],
        })
    }
}

impl Narrowed {
    /// Counts a chunk, in any order and of any size.
    pub fn observe<T: Element>(&mut self, chunk: &[T]) {
        count_fine(chunk, self.bucket, &mut self.counts);
    }

    /// The threshold: values at least as large in magnitude are those to keep, equal ones included.
    ///
    /// # Errors
    /// Where the second pass saw other values than the first.
    pub fn finish(self) -> Result<f32, AdapterError> {
        if self.counts.iter().sum::<u64>() != self.values {
            return Err(AdapterError::Changed);
        }
        let mut rank = self.rank;
        let mut fine = self.counts.len() - 1;
        while self.counts[fine] < rank {
            rank -= self.counts[fine];
            fine -= 1;
        }
        let fine = u32::try_from(fine).unwrap_or(u32::MAX);
        Ok(f32::from_bits(self.bucket << FINE | fine))
    }
}

#[inline(always)]
fn magnitude(value: f32) -> u32 {
    value.to_bits() & 0x7fff_ffff
}

#[inline(always)]
fn bucket(value: f32) -> u32 {
    magnitude(value) >> FINE
}

fn count_coarse<T: Element>(block: &[T], ways: &mut [u32]) {
    let (first, rest) = ways.split_at_mut(BUCKETS);
    let (second, rest) = rest.split_at_mut(BUCKETS);
    let (third, fourth) = rest.split_at_mut(BUCKETS);
    let add = |way: &mut [u32], value: T| {
        way[bucket(value.to_f32()) as usize % BUCKETS] += 1;
    };
    let (quads, rest) = block.as_chunks::<WAYS>();
    for &[a, b, c, d] in quads {
        add(first, a);
        add(second, b);
        add(third, c);
        add(fourth, d);
    }
    for &value in rest {
        add(first, value);
    }
}

multiversion! {
    fn count_fine<T: Element>(chunk: &[T], sought: u32, counts: &mut [u64]) {
        let mask = counts.len() - 1;
        let mut add = |value: T| {
            let value = value.to_f32();
            if bucket(value) == sought {
                counts[magnitude(value) as usize & mask] += 1;
            }
        };
        let (groups, rest) = chunk.as_chunks::<32>();
        for group in groups {
            // Most groups hold none, which whole vectors find out.
            let mut found = false;
            for value in group {
                found |= bucket(value.to_f32()) == sought;
            }
            if found {
                group.iter().for_each(|&value| add(value));
            }
        }
        rest.iter().for_each(|&value| add(value));
    }
}

fn not_finite<T: Element>(block: &[T], start: usize) -> AdapterError {
    let index = block.iter().position(|value| !value.to_f32().is_finite());
    AdapterError::NotFinite {
        adapter: 0,
        index: start + index.unwrap_or(0),
    }
}
