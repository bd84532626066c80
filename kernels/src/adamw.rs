//! One step of AdamW (Loshchilov and Hutter 2019, algorithm 2), in place, and the norm that gradients are clipped by.

use crate::cpu::multiversion::multiversion;

/// What a step multiplies by, the same for all values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Factors {
    /// Of the gradient, so that its norm is not too long.
    pub clip: f32,
    /// Decay of the mean of the gradient.
    pub beta1: f32,
    /// Decay of the mean of its square.
    pub beta2: f32,
    /// The rate over `1 - beta1^t`.
    pub rate: f32,
    /// `1 / sqrt(1 - beta2^t)`
    pub unbias: f32,
    /// Added to the root of the mean square.
    pub eps: f32,
    /// Of the weights: one less the rate times their decay.
    pub keep: f32,
}

/// Gradients and means below count as zero: where tokens do not occur, both decay into numbers whose
/// arithmetic takes a hundred times as long, while the root of the mean square is beside an `eps` of 1e-8.
const SMALLEST: f32 = 1e-17;

/// The same for mean squares.
const SMALLEST_SQUARE: f32 = 1e-35;

/// `value`, or zero where it is closer to that than `floor`.
#[inline(always)]
fn from(value: f32, floor: f32) -> f32 {
    if value.abs() < floor { 0.0 } else { value }
}

multiversion! {
    /// Changes weights and means by one step: with `g = clip gradient`, `m = beta1 m + (1 - beta1) g`,
    /// `s = beta2 s + (1 - beta2) g^2` and `w = keep w - rate m / (unbias sqrt(s) + eps)`.
    pub fn update(
        factors: Factors,
        weights: &mut [f32],
        gradient: &[f32],
        mean: &mut [f32],
        square: &mut [f32],
    ) {
        let values = weights.iter_mut().zip(gradient).zip(mean).zip(square);
        for (((weight, &gradient), mean), square) in values {
            let g = from(gradient * factors.clip, SMALLEST);
            *mean = factors.beta1 * from(*mean, SMALLEST) + (1.0 - factors.beta1) * g;
            *square = factors.beta2 * from(*square, SMALLEST_SQUARE) + (1.0 - factors.beta2) * g * g;
            let root = square.sqrt() * factors.unbias + factors.eps;
            *weight = *weight * factors.keep - factors.rate * *mean / root;
        }
    }
}

multiversion! {
    /// `sum of x^2`: sums of 16 values in f32, the rest in f64, always in the same order.
    pub fn sum_of_squares(values: &[f32]) -> f64 {
        let mut total = 0f64;
        for chunk in values.chunks(1024) {
            let mut sums = [0f32; 16];
            let (lanes, rest) = chunk.as_chunks::<16>();
            for lane in lanes {
                for (sum, value) in sums.iter_mut().zip(lane) {
                    *sum = value.mul_add(*value, *sum);
                }
            }
            let rest: f32 = rest.iter().map(|value| value * value).sum();
            total += f64::from(sums.iter().sum::<f32>() + rest);
        }
        total
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    const FACTORS: Factors = Factors {
        clip: 0.5,
        beta1: 0.9,
        beta2: 0.98,
        rate: 1e-2,
        unbias: 3.0,
        eps: 1e-8,
        keep: 0.999,
    };

    #[test]
    fn steps_are_those_of_the_formula() {
        let mut random = Random(1);
        let [mut weights, mut mean, gradient] = [(); 3].map(|()| random.logits(1003, 1.0));
        let mut square: Vec<f32> = mean.iter().map(|mean| mean * mean).collect();
        let expected = |i: usize| {
            let factors = FACTORS;
            let of = |value: f32| f64::from(value);
            let (one, two) = (of(factors.beta1), of(factors.beta2));
            let g = of(gradient[i]) * of(factors.clip);
            let m = one * of(mean[i]) + (1.0 - one) * g;
            let s = two * of(square[i]) + (1.0 - two) * g * g;
            let root = s.sqrt() * of(factors.unbias) + of(factors.eps);
            let w = of(weights[i]) * of(factors.keep) - of(factors.rate) * m / root;
            [w, m, s]
        };
        let expected: Vec<[f64; 3]> = (0..1003).map(expected).collect();
        update(FACTORS, &mut weights, &gradient, &mut mean, &mut square);
        for (i, expected) in expected.iter().enumerate() {
            for (got, want) in [weights[i], mean[i], square[i]].into_iter().zip(expected) {
                assert!((f64::from(got) - want).abs() < 1e-6, "{i}: {got} {want}");
            }
        }
    }

    #[test]
    fn what_decays_ends_at_zero() {
        let [mut weight, mut mean, mut square] = [[1.0_f32], [1e-18], [1e-36]];
        update(FACTORS, &mut weight, &[0.0], &mut mean, &mut square);
        assert_eq!((weight, mean, square), ([0.999], [0.0], [0.0]));
    }

    #[test]
    fn squares_of_any_number_are_summed() {
        let mut random = Random(2);
        for len in [0, 1, 15, 16, 17, 1023, 1024, 1025, 5000] {
            let values = random.logits(len, 3.0);
            let want: f64 = values.iter().map(|&value| f64::from(value).powi(2)).sum();
            let got = sum_of_squares(&values);
            assert!((got - want).abs() <= 1e-6 * want, "{len}: {got} {want}");
        }
    }
}
