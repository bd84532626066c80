//! The few primitives that loops over lanes share.
//!
//! They are inlined into the bodies of `multiversion!`: only what is inlined there is compiled for wide vectors.

/// Lanes that an accumulator keeps: one AVX-512 register, two AVX2 registers.
pub(super) const LANES: usize = 16;

/// `e^x` to about 1e-7 relative, clamped to the finite range, in a form that vectorises.
///
/// Argument reduction and polynomial of Cephes `expf`.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer in the low bits.
    let x = x.clamp(-87.0, 88.0);
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(2.121_944_4e-4, n.mul_add(-0.693_359_4, x));
    let mut y = 1.987_569_1e-4f32;
    y = y.mul_add(r, 1.398_199_9e-3);
    y = y.mul_add(r, 8.333_452e-3);
    y = y.mul_add(r, 4.166_579_6e-2);
    y = y.mul_add(r, 1.666_666_5e-1);
    y = y.mul_add(r, 5e-1);
    y = y.mul_add(r * r, r + 1.0);
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000));
    y * scale
}

/// `a . b` in sixteen running sums.
#[inline(always)]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0f32; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest = a_chunks
        .remainder()
        .iter()
        .zip(b_chunks.remainder())
        .map(|(x, y)| x * y)
        .sum();
    for (x, y) in a_chunks.zip(b_chunks) {
        for lane in 0..LANES {
            sums[lane] = x[lane].mul_add(y[lane], sums[lane]);
        }
    }
    folded(sums, rest)
}

/// `sum of a_i b_i c_i`
#[inline(always)]
pub(super) fn dot3(a: &[f32], b: &[f32], c: &[f32]) -> f32 {
    let mut sums = [0f32; LANES];
    let whole = a.len() / LANES * LANES;
    for start in (0..whole).step_by(LANES) {
        let (x, y, z) = (
            &a[start..][..LANES],
            &b[start..][..LANES],
            &c[start..][..LANES],
        );
        for lane in 0..LANES {
            sums[lane] = (x[lane] * y[lane]).mul_add(z[lane], sums[lane]);
        }
    }
    let rest = (whole..a.len()).map(|i| a[i] * b[i] * c[i]).sum();
    folded(sums, rest)
}

#[inline(always)]
fn folded(mut sums: [f32; LANES], rest: f32) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
        width /= 2;
    }
    rest + sums[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_agrees_with_the_library_over_its_range() {
        for step in -8_700..=8_800 {
            let x = step as f32 / 100.0;
            let (got, want) = (f64::from(exp(x)), f64::from(x).exp());
            assert!(
                (got / want - 1.0).abs() < 3e-7,
                "exp({x}) = {got}, expected {want}"
            );
        }
    }
}
