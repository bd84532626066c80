//! The table of angles that a model's settings ask for.

use consilium_kernels::layers::{Angles, RopeTable};

use super::config::{Rope, RopeScaling};

/// Angles of positions `0..positions` for heads of `head_dim` values.
pub(crate) fn table(rope: &Rope, head_dim: usize, positions: usize) -> RopeTable {
    let rotated = rope.rotated(head_dim);
    let frequency = |pair: usize| rope.theta.powf(-2.0 * pair as f64 / rotated as f64);
    let plain = (0..rotated / 2).map(frequency);
    let angles = |frequencies: Vec<f64>, factor| Angles::new(&frequencies, factor, positions);
    let divided = |divisors: &[f64]| {
        let pairs = plain.clone().zip(divisors);
        pairs
            .map(|(frequency, divisor)| frequency / divisor)
            .collect()
    };
    match &rope.scaling {
        Some(RopeScaling::Long {
            short,
            long,
            original,
            attention,
        }) => RopeTable::by_length(
            angles(divided(short), *attention),
            (positions > *original).then(|| angles(divided(long), *attention)),
            *original,
        ),
        scaling => {
            let frequencies = plain.map(|frequency| scaled(frequency, scaling.as_ref()));
            RopeTable::new(angles(frequencies.collect(), 1.0))
        }
    }
}

fn scaled(frequency: f64, scaling: Option<&RopeScaling>) -> f64 {
    match scaling {
        None | Some(RopeScaling::Long { .. }) => frequency,
        Some(RopeScaling::Linear { factor }) => frequency / factor,
        Some(RopeScaling::Llama3 {
            factor,
            low,
            high,
            original,
        }) => {
            let wavelength = std::f64::consts::TAU / frequency;
            if wavelength < original / high {
                frequency
            } else if wavelength > original / low {
                frequency / factor
            } else {
                let smooth = (original / wavelength - low) / (high - low);
                (1.0 - smooth) * frequency / factor + smooth * frequency
            }
        }
    }
}
