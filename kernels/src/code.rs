//! Codes: log-probabilities in steps of 1/16 bit, `q = round(-16 log2 p)`, 0 to 255.
//!
//! A code stands for `2^(-q/16)`; the floor is `2^-15.94`, about 1.6e-5. Everything but [`encode`]
//! and [`decode`] is integer arithmetic, so that a fused target never depends on a maths library.
//! The constants are checked against big integers by the tests of this module.

/// Smallest probability that a code can say.
pub const FLOOR: u8 = 255;

/// `round(2^(63 - j/16))` for j = 0..16.
pub(crate) const BASE: [u64; 16] = [
    0x8000_0000_0000_0000,
    0x7a92_be8a_9243_6616,
    0x7560_6373_ee92_1c97,
    0x7066_6f76_154a_7089,
    0x6ba2_7e65_6b4e_b57a,
    0x6712_460a_8fc2_4072,
    0x62b3_9508_aa83_6d6f,
    0x5e84_51cf_ac06_1b5f,
    0x5a82_7999_fcef_3242,
    0x56ac_1f75_2150_a563,
    0x52ff_6b54_d8a8_9c75,
    0x4f7a_9930_48d0_88d7,
    0x4c1b_f828_c6dc_54b8,
    0x48e1_e9b9_d588_e19b,
    0x45ca_e0f1_f545_eb73,
    0x42d5_61b3_e624_3d8a,
];

/// `ceil(2^(63 + (2j + 1)/32))` for j = 0..16: where a mantissa rounds up to the next sixteenth.
pub(crate) const HALF_STEPS: [u64; 16] = [
    0x82cd_8698_ac2b_a1d8,
    0x8898_0e80_92da_8528,
    0x8ea4_398b_45cd_53c1,
    0x94f4_efa8_fef7_0962,
    0x9b8d_39b9_d54e_5539,
    0xa270_4303_0c49_6819,
    0xa9a1_5ab4_ea7c_0ef9,
    0xb123_f581_d2ac_2590,
    0xb8fb_af47_62fb_9eea,
    0xc12c_4cca_6670_9457,
    0xc9b9_bd86_6e2f_27a3,
    0xd2a8_1d91_f12a_e45b,
    0xdbfb_b797_daf2_3756,
    0xe5b9_06e7_7c83_48a9,
    0xefe4_b99b_dcda_f5cc,
    0xfa83_b2db_722a_033b,
];

static MASSES: [u32; 256] = masses();

const fn masses() -> [u32; 256] {
    let mut table = [0; 256];
    let mut code = 0;
    while code < 256 {
        let shift = 32 + code / 16;
        let rounded = (BASE[code % 16] >> (shift - 1)).div_ceil(2);
        assert!(rounded <= u32::MAX as u64, "2^31 fits");
        #[expect(clippy::cast_possible_truncation, reason = "checked on the line above")]
        {
            table[code] = rounded as u32;
        }
        code += 1;
    }
    table
}

/// `T[q] = round(2^(31 - q/16))`: the integer mass of a code, where 2^31 is certainty.
#[must_use]
#[inline]
pub fn mass(code: u8) -> u32 {
    MASSES[usize::from(code)]
}

/// Code of a probability; 1 and above give 0, zero, negative values and NaN give [`FLOOR`].
#[must_use]
pub fn encode(probability: f64) -> u8 {
    if probability > 0.0 {
        let sixteenths = (-16.0 * probability.log2()).round().clamp(0.0, 255.0);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "clamped to 0..=255"
        )]
        {
            sixteenths as u8
        }
    } else {
        FLOOR
    }
}

/// Probability of a code, `T[q] / 2^31`: exact in `f64` and the same on every machine.
#[must_use]
pub fn decode(code: u8) -> f64 {
    f64::from(mass(code)) / f64::from(1_u32 << 31)
}

/// Code of `mass / 2^unity_bits` by integer arithmetic, ties to the smaller code.
///
/// Zero gives [`FLOOR`], masses of one and above give 0.
#[must_use]
#[inline]
pub fn encode_mass(mass: u64, unity_bits: u32) -> u8 {
    if mass == 0 {
        return FLOOR;
    }
    let sixteenths = log2_sixteenths(mass);
    let code = (16 * unity_bits).saturating_sub(sixteenths);
    u8::try_from(code).unwrap_or(FLOOR)
}

/// `round(16 log2 value)`, a tie to the larger result; 0 for 0.
///
/// No value but a power of two has a rational logarithm here, so a tie never happens in fact.
#[must_use]
#[inline]
pub fn log2_sixteenths(value: u64) -> u32 {
    if value == 0 {
        return 0;
    }
    let zeros = value.leading_zeros();
    let mantissa = value << zeros;
    // Half steps lie more than 1/64 of an octave apart, so that each such cell holds at most one.
    let below = STEPS_BELOW[usize::try_from(mantissa >> 57).unwrap_or(0) % 64];
    let next = HALF_STEPS.get(usize::from(below));
    let steps = u32::from(below) + u32::from(next.is_some_and(|&step| mantissa >= step));
    16 * (63 - zeros) + steps
}

/// Half steps at or below the start of each of 64 cells of a mantissa's range, 2^63 to 2^64.
const STEPS_BELOW: [u8; 64] = {
    let mut table = [0; 64];
    let mut cell = 0;
    while cell < 64 {
        let start = (1 << 63) + ((cell as u64) << 57);
        while (table[cell] as usize) < HALF_STEPS.len() && HALF_STEPS[table[cell] as usize] <= start
        {
            table[cell] += 1;
        }
        cell += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    #![expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "limbs are meant to be cut, codes are clamped"
    )]

    use super::*;

    /// Little-endian limbs, just enough to compare powers exactly.
    #[derive(Clone, PartialEq, Eq)]
    struct Big(Vec<u32>);

    impl Big {
        fn from(value: u64) -> Self {
            Self(vec![value as u32, (value >> 32) as u32]).trimmed()
        }

        fn two_to(exponent: usize) -> Self {
            let mut limbs = vec![0; exponent / 32 + 1];
            limbs[exponent / 32] = 1 << (exponent % 32);
            Self(limbs)
        }

        fn trimmed(mut self) -> Self {
            while self.0.last() == Some(&0) {
                self.0.pop();
            }
            self
        }

        fn times(&self, other: &Self) -> Self {
            let mut limbs = vec![0_u32; self.0.len() + other.0.len()];
            for (i, &a) in self.0.iter().enumerate() {
                let mut carry = 0_u64;
                for (j, &b) in other.0.iter().enumerate() {
                    let sum = u64::from(a) * u64::from(b) + u64::from(limbs[i + j]) + carry;
                    limbs[i + j] = sum as u32;
                    carry = sum >> 32;
                }
                limbs[i + other.0.len()] = carry as u32;
            }
            Self(limbs).trimmed()
        }

        fn power(&self, exponent: u32) -> Self {
            (0..exponent).fold(Self::from(1), |product, _| product.times(self))
        }

        fn at_most(&self, other: &Self) -> bool {
            (self.0.len(), self.0.iter().rev().collect::<Vec<_>>())
                <= (other.0.len(), other.0.iter().rev().collect::<Vec<_>>())
        }
    }

    #[test]
    fn masses_are_the_rounded_powers_of_two() {
        for code in 0..=255_u8 {
            // T - 1/2 <= 2^(31 - q/16) <= T + 1/2, raised to the 16th power after doubling.
            let exact = Big::two_to(16 * 32 - usize::from(code));
            let doubled = 2 * u64::from(mass(code));
            assert!(
                Big::from(doubled - 1).power(16).at_most(&exact),
                "code {code} too large"
            );
            assert!(
                exact.at_most(&Big::from(doubled + 1).power(16)),
                "code {code} too small"
            );
        }
    }

    #[test]
    fn half_steps_are_the_first_integers_that_round_up() {
        for (j, &step) in HALF_STEPS.iter().enumerate() {
            let exact = Big::two_to(32 * 63 + 2 * j + 1);
            assert!(
                exact.at_most(&Big::from(step).power(32)),
                "step {j} too small"
            );
            assert!(
                !exact.at_most(&Big::from(step - 1).power(32)),
                "step {j} too large"
            );
        }
    }

    #[test]
    fn a_mass_encodes_to_the_code_it_came_from() {
        for code in 0..=255_u8 {
            assert_eq!(encode_mass(u64::from(mass(code)), 31), code);
            assert_eq!(encode_mass(u64::from(mass(code)) << 17, 48), code);
            assert_eq!(encode(decode(code)), code);
        }
    }

    #[test]
    fn integer_and_float_codes_agree_away_from_ties() {
        let mut value = 1_u64;
        while value < 1 << 47 {
            let exact = -16.0 * (value as f64 / (1_u64 << 48) as f64).log2();
            if (exact.fract() - 0.5).abs() > 1e-9 {
                let expected = exact.round().clamp(0.0, 255.0) as u8;
                assert_eq!(encode_mass(value, 48), expected, "value {value}");
            }
            value += value / 7 + 1;
        }
    }

    #[test]
    fn the_edges_saturate() {
        assert_eq!(encode(1.0), 0);
        assert_eq!(encode(2.0), 0);
        assert_eq!(encode(0.0), FLOOR);
        assert_eq!(encode(-1.0), FLOOR);
        assert_eq!(encode(f64::NAN), FLOOR);
        assert_eq!(encode(f64::MIN_POSITIVE), FLOOR);
        assert_eq!(encode_mass(0, 48), FLOOR);
        assert_eq!(encode_mass(1, 48), FLOOR);
        assert_eq!(encode_mass(u64::MAX, 48), 0);
        assert_eq!(log2_sixteenths(256), 128);
        assert_eq!(log2_sixteenths(3), 25);
    }
}
