//! 4-bit NormalFloat and its scales.

use crate::cpu::multiversion::multiversion;

/// Values that share a scale.
pub(super) const BLOCK: usize = 64;

/// Scales that share a step.
const SCALES: usize = 256;

/// The levels of appendix E of QLoRA: quantiles of a normal distribution, scaled to -1..=1, zero among
/// them.
#[expect(clippy::excessive_precision, reason = "as published")]
pub(super) const LEVELS: [f32; 16] = [
    -1.0,
    -0.696_192_800_998_687_7,
    -0.525_073_051_452_636_7,
    -0.394_917_488_098_144_53,
    -0.284_441_381_692_886_35,
    -0.184_773_430_228_233_34,
    -0.091_050_036_251_544_95,
    0.0,
    0.079_580_299_556_255_34,
    0.160_930_201_411_247_25,
    0.246_112_301_945_686_34,
    0.337_915_241_718_292_24,
    0.440_709_829_330_444_34,
    0.562_617_003_917_694_1,
    0.722_956_836_223_602_3,
    1.0,
];

/// The two levels of each byte, the upper half of its bits first.
const PAIRS: [[f32; 2]; 256] = {
    let mut pairs = [[0.0; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        pairs[byte] = [LEVELS[byte >> 4], LEVELS[byte & 15]];
        byte += 1;
    }
    pairs
};

/// Appends a block of at most [`BLOCK`] values, two a byte, and returns its scale.
pub(super) fn write(block: &[f32], codes: &mut Vec<u8>) -> f32 {
    let scale = block.iter().fold(0f32, |best, value| best.max(value.abs()));
    let code = |value: &f32| nearest(if scale > 0.0 { value / scale } else { 0.0 });
    for pair in block.chunks(2) {
        codes.push(code(&pair[0]) << 4 | pair.get(1).map_or(0, code));
    }
    scale
}

/// Index of the nearest level; of two that are equally near, the smaller.
fn nearest(value: f32) -> u8 {
    let middle = |pair: &[f32]| f32::midpoint(pair[0], pair[1]);
    let above = LEVELS.windows(2).filter(|pair| value > middle(pair));
    u8::try_from(above.count()).expect("15 pairs")
}

/// Scales in 8 bits: what they differ from their mean, in steps of a 127th of the largest difference
/// of [`SCALES`] neighbours. (The paper has 8-bit floats in place of the even steps.)
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Scales {
    mean: f32,
    steps: Vec<f32>,
    codes: Vec<i8>,
}

impl Scales {
    pub(super) fn new(scales: &[f32]) -> Self {
        let sum: f64 = scales.iter().map(|&scale| f64::from(scale)).sum();
        #[expect(clippy::cast_possible_truncation, reason = "a mean of f32 values")]
        let mean = (sum / scales.len().max(1) as f64) as f32;
        let mut steps = Vec::with_capacity(scales.len().div_ceil(SCALES));
        let mut codes = Vec::with_capacity(scales.len());
        for block in scales.chunks(SCALES) {
            let furthest = block
                .iter()
                .fold(0f32, |best, scale| best.max((scale - mean).abs()));
            let step = furthest / 127.0;
            steps.push(step);
            codes.extend(block.iter().map(|scale| {
                let steps = if step > 0.0 {
                    (scale - mean) / step
                } else {
                    0.0
                };
                #[expect(clippy::cast_possible_truncation, reason = "in -127..=127")]
                let code = steps.round_ties_even() as i8;
                code
            }));
        }
        Self { mean, steps, codes }
    }

    pub(super) fn bytes(&self) -> usize {
        Self::bytes_of(self.codes.len())
    }

    /// Bytes of as many scales.
    pub(super) fn bytes_of(scales: usize) -> usize {
        size_of::<f32>() * (1 + scales.div_ceil(SCALES)) + scales
    }

    pub(super) fn at(&self, block: usize) -> f32 {
        let difference = self.steps[block / SCALES] * f32::from(self.codes[block]);
        (self.mean + difference).max(0.0)
    }
}

/// Decodes row `row` of a matrix.
pub(super) fn read(codes: &[u8], scales: &Scales, row: usize, out: &mut [f32]) {
    let first = row * out.len().div_ceil(BLOCK);
    let blocks = codes.chunks(BLOCK / 2).zip(out.chunks_mut(BLOCK));
    for (block, (codes, out)) in (first..).zip(blocks) {
        read_block(codes, scales.at(block), out);
    }
}

multiversion! {
    fn read_block(codes: &[u8], scale: f32, out: &mut [f32]) {
        let (pairs, rest) = out.as_chunks_mut::<2>();
        for (pair, &byte) in pairs.iter_mut().zip(codes) {
            let [first, second] = PAIRS[usize::from(byte)];
            *pair = [first * scale, second * scale];
        }
        if let (Some(last), Some(&byte)) = (rest.first_mut(), codes.last()) {
            *last = PAIRS[usize::from(byte)][0] * scale;
        }
    }
}
