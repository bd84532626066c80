//! 16 lanes as an array: loops that the compiler vectorises.

use super::LANES;
use super::body::{EXP2, Lanes};
use crate::element::Element;

#[derive(Clone, Copy)]
pub(super) struct Portable;

type V = [f32; LANES];

#[inline(always)]
fn map2(a: V, b: V, f: impl Fn(f32, f32) -> f32) -> V {
    std::array::from_fn(|lane| f(a[lane], b[lane]))
}

#[inline(always)]
fn fold(mut value: V, f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            value[lane] = f(value[lane], value[lane + width]);
        }
        width /= 2;
    }
    value[0]
}

impl Lanes for Portable {
    type V = V;

    #[inline(always)]
    fn splat(self, value: f32) -> V {
        [value; LANES]
    }

    #[inline(always)]
    fn load<T: Element>(self, from: &[T; LANES]) -> V {
        from.map(T::to_f32)
    }

    /// The compiler's vectors have no such instruction.
    #[inline(always)]
    fn ahead<T: Element>(self, _: &[T; LANES], _: usize) {}

    #[inline(always)]
    fn load_some<T: Element>(self, from: &[T]) -> V {
        let mut value = [f32::MIN; LANES];
        for (value, from) in value.iter_mut().zip(from) {
            *value = from.to_f32();
        }
        value
    }

    #[inline(always)]
    fn store<T: Element>(self, to: &mut [T; LANES], value: V) {
        *to = value.map(T::from_f32);
    }

    #[inline(always)]
    fn store_some<T: Element>(self, to: &mut [T], value: V) {
        for (to, value) in to.iter_mut().zip(value) {
            *to = T::from_f32(value);
        }
    }

    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        map2(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        map2(a, b, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        map2(a, b, |a, b| a * b)
    }

    #[inline(always)]
    fn mul_add(self, a: V, b: V, c: V) -> V {
        std::array::from_fn(|lane| a[lane] * b[lane] + c[lane])
    }

    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        map2(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn from(self, value: V, floor: V) -> V {
        map2(
            value,
            floor,
            |value, floor| if value < floor { 0.0 } else { value },
        )
    }

    #[inline(always)]
    fn above(self, a: V, b: V) -> u32 {
        (0..LANES).fold(0, |bits, lane| bits | u32::from(a[lane] > b[lane]) << lane)
    }

    #[inline(always)]
    fn exp2(self, x: V) -> V {
        x.map(exp2)
    }

    #[inline(always)]
    fn sum(self, value: V) -> f32 {
        fold(value, |a, b| a + b)
    }

    #[inline(always)]
    fn largest(self, value: V) -> f32 {
        fold(value, f32::max)
    }
}

#[inline(always)]
#[expect(
    clippy::cast_possible_wrap,
    reason = "the low bits of the shifted value are a signed integer"
)]
fn exp2(x: f32) -> f32 {
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits of the mantissa.
    const SHIFT: f32 = 12_582_912.0;
    let kept = if x < -126.0 { -126.0 } else { x };
    let shifted = kept + SHIFT;
    let r = kept - (shifted - SHIFT);
    let [c0, c1, c2, c3, c4, c5] = EXP2;
    let p = ((((c5 * r + c4) * r + c3) * r + c2) * r + c1) * r + c0;
    let bits = (shifted.to_bits() as i32).wrapping_add(127) << 23;
    let scaled = p * f32::from_bits(bits.cast_unsigned());
    if x < -126.0 {
        0.0
    } else if x > 127.0 {
        f32::INFINITY
    } else {
        scaled
    }
}
