//! Rotary position embedding (Su et al. 2021), the half-split pairing of Hugging Face models.

#![expect(
    clippy::cast_possible_truncation,
    reason = "computed in f64, kept in f32"
)]

/// Cosines and sines of every position up to a length. Where frequencies depend on a text's length, `long` has those
/// of texts longer than `limit`.
#[derive(Debug)]
pub struct RopeTable {
    short: Angles,
    long: Option<Angles>,
    limit: usize,
}

/// Cosines and sines of every position, for texts of one kind.
#[derive(Debug)]
pub struct Angles {
    half: usize,
    cosines: Vec<f32>,
    sines: Vec<f32>,
}

impl RopeTable {
    /// One table for texts of any length.
    #[must_use]
    pub fn new(angles: Angles) -> Self {
        Self {
            short: angles,
            long: None,
            limit: usize::MAX,
        }
    }

    /// A table that has other angles for texts longer than `limit`; `long` may be left out where no text is.
    #[must_use]
    pub fn by_length(short: Angles, long: Option<Angles>, limit: usize) -> Self {
        Self { short, long, limit }
    }

    /// Positions covered.
    #[must_use]
    pub fn positions(&self) -> usize {
        self.short.cosines.len() / self.short.half
    }

    /// Angles in a text of `len` tokens.
    #[must_use]
    pub fn angles(&self, len: usize) -> &Angles {
        match &self.long {
            Some(long) if len > self.limit => long,
            _ => &self.short,
        }
    }
}

impl Angles {
    /// `factor cos(p f)` and `factor sin(p f)` of every position `p` and frequency `f`, one for each pair of turned values.
    #[must_use]
    pub fn new(frequencies: &[f64], factor: f64, positions: usize) -> Self {
        let mut cosines = Vec::with_capacity(positions * frequencies.len());
        let mut sines = Vec::with_capacity(positions * frequencies.len());
        for position in 0..positions {
            for &frequency in frequencies {
                // Hugging Face computes the angle in f32; the same rounding keeps logits equal.
                let angle = position as f32 * frequency as f32;
                cosines.push(angle.cos() * factor as f32);
                sines.push(angle.sin() * factor as f32);
            }
        }
        Self {
            half: frequencies.len(),
            cosines,
            sines,
        }
    }

    /// Cosines and sines of a position, one for each pair of turned values.
    #[must_use]
    pub fn at(&self, position: usize) -> (&[f32], &[f32]) {
        let pairs = position * self.half..(position + 1) * self.half;
        (&self.cosines[pairs.clone()], &self.sines[pairs])
    }

    /// `out = scale * R(position) head`; values past the turned ones are only scaled.
    #[inline(always)]
    pub fn rotate(&self, head: &[f32], position: usize, scale: f32, out: &mut [f32]) {
        self.turn(head, position, scale, 1.0, out);
    }

    /// `out = scale * R(position)^T head`: the gradient of [`rotate`](Self::rotate).
    #[inline(always)]
    pub(super) fn rotate_back(&self, head: &[f32], position: usize, scale: f32, out: &mut [f32]) {
        self.turn(head, position, scale, -1.0, out);
    }

    #[inline(always)]
    fn turn(&self, head: &[f32], position: usize, scale: f32, sign: f32, out: &mut [f32]) {
        let cosines = &self.cosines[position * self.half..][..self.half];
        let sines = &self.sines[position * self.half..][..self.half];
        let (head, rest) = head.split_at(2 * self.half);
        let (out, out_rest) = out.split_at_mut(2 * self.half);
        let (first, second) = head.split_at(self.half);
        let (out_first, out_second) = out.split_at_mut(self.half);
        let angles = cosines.iter().zip(sines);
        let pairs = first.iter().zip(second).zip(out_first).zip(out_second);
        for ((((&a, &b), out_a), out_b), (&c, &s)) in pairs.zip(angles) {
            let (c, s) = (c * scale, s * (sign * scale));
            *out_a = a * c - b * s;
            *out_b = b * c + a * s;
        }
        for (out, &value) in out_rest.iter_mut().zip(rest) {
            *out = value * scale;
        }
    }
}
