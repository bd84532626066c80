//! Private mixing of distributions (`PMixED`, arXiv 2403.15638): each source's prediction is drawn towards a public model's until
//! their Renyi divergence is small, and one symbol is drawn from the mean.
//!
//! The paper bounds the divergence at order alpha. That bounds nothing between two sources; at order 2 alpha, which is what is
//! bounded here, it does (Mironov, arXiv 1702.07476): at most `(alpha - 1/2) / (alpha - 1) + 1` times the bound. The
//! mean over N sources of which one is another has then at most `ln((N - 1 + exp((alpha - 1) divergence)) / N) / (alpha - 1)`,
//! because `exp((alpha - 1) D)` is convex in both distributions. What is protected is all that one source knows.

/// Order at which privacy is counted, the paper's.
pub const ALPHA: i32 = 3;
/// Halvings of the interval in which the weight of a source lies, the paper's.
const HALVINGS: u32 = 20;

/// How far a bound at order 2 alpha to a common distribution carries two others apart at order alpha.
fn factor() -> f64 {
    let alpha = f64::from(ALPHA);
    (alpha - 0.5) / (alpha - 1.0) + 1.0
}

/// Epsilon of one draw at order [`ALPHA`] from the mean of `sources`, each within `radius` of the public distribution.
#[must_use]
pub fn epsilon(radius: f64, sources: usize) -> f64 {
    let (order, n) = (f64::from(ALPHA) - 1.0, sources as f64);
    ((n - 1.0 + (order * factor() * radius).exp()) / n).ln() / order
}

/// The radius that gives [`epsilon`].
#[must_use]
pub fn radius(epsilon: f64, sources: usize) -> f64 {
    let (order, n) = (f64::from(ALPHA) - 1.0, sources as f64);
    (n * (order * epsilon).exp() + 1.0 - n).ln() / (order * factor())
}

/// Epsilon for this delta of `draws` draws of `epsilon` each at order [`ALPHA`] (arXiv 1702.07476, proposition 3).
#[must_use]
pub fn total(epsilon: f64, draws: usize, delta: f64) -> f64 {
    epsilon * draws as f64 + (1.0 / delta).ln() / (f64::from(ALPHA) - 1.0)
}

/// The largest weight of `source` in a mixture with `public` that stays within `radius` of this, in both directions.
///
/// Both are distributions over the same symbols, `public` above zero everywhere.
#[must_use]
pub fn weight(source: &[f64], public: &[f64], radius: f64) -> f64 {
    if divergence(source, public, 1.0) <= radius {
        return 1.0;
    }
    let (mut inside, mut outside) = (0.0, 1.0);
    for _ in 0..HALVINGS {
        let middle = f64::midpoint(inside, outside);
        if divergence(source, public, middle) <= radius {
            inside = middle;
        } else {
            outside = middle;
        }
    }
    inside
}

/// The larger of the Renyi divergences of order 2 alpha between `public` and a mixture of it with `source`.
fn divergence(source: &[f64], public: &[f64], weight: f64) -> f64 {
    let (mut there, mut back) = (0.0, 0.0);
    for (&source, &public) in source.iter().zip(public) {
        let ratio = 1.0 - weight + weight * source / public;
        there += public * ratio.powi(2 * ALPHA);
        back += public * ratio.powi(1 - 2 * ALPHA);
    }
    there.max(back).ln() / f64::from(2 * ALPHA - 1)
}

/// The mean of the sources, each as close to `public` as `radius` asks.
#[must_use]
pub fn mixed(sources: &[Vec<f64>], public: &[f64], radius: f64) -> Vec<f64> {
    let mut mean = vec![0.0; public.len()];
    let share = 1.0 / sources.len().max(1) as f64;
    for source in sources {
        let weight = weight(source, public, radius);
        for ((mean, &source), &public) in mean.iter_mut().zip(source).zip(public) {
            *mean += share * (weight * source + (1.0 - weight) * public);
        }
    }
    mean
}

/// The symbol at `point`, uniform from 0 to 1; the last one where rounding leaves a rest.
#[must_use]
pub fn drawn(distribution: &[f64], point: f64) -> usize {
    let mut rest = point * distribution.iter().sum::<f64>();
    let hit = distribution.iter().position(|&mass| {
        rest -= mass;
        rest < 0.0
    });
    hit.unwrap_or_else(|| distribution.len().saturating_sub(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PUBLIC: [f64; 4] = [0.4, 0.3, 0.2, 0.1];
    const SURE: [f64; 4] = [0.001, 0.001, 0.001, 0.997];

    #[test]
    fn the_weight_is_the_largest_that_stays_within_the_radius() {
        for radius in [0.01, 0.1, 0.7, 1.5] {
            let weight = weight(&SURE, &PUBLIC, radius);
            assert!(weight > 0.0 && weight < 1.0, "{weight}");
            assert!(divergence(&SURE, &PUBLIC, weight) <= radius);
            assert!(divergence(&SURE, &PUBLIC, weight + 1e-5) > radius);
        }
        assert!(weight(&SURE, &PUBLIC, 0.7) > weight(&SURE, &PUBLIC, 0.1));
        let whole = [weight(&PUBLIC, &PUBLIC, 1e-9), weight(&SURE, &PUBLIC, 9.0)];
        assert!(whole.iter().all(|weight| (weight - 1.0).abs() < 1e-12));
    }

    #[test]
    fn both_directions_count() {
        // What the public model expects and the source denies is far only on the way back.
        let denies: [f64; 4] = [0.666_666, 0.333_333, 1e-6 / 2.0, 1e-6 / 2.0];
        let there: f64 = denies
            .iter()
            .zip(&PUBLIC)
            .map(|(q, p)| q.powi(6) / p.powi(5))
            .sum();
        let there = there.ln() / 5.0;
        assert!(there < 0.6 && divergence(&denies, &PUBLIC, 1.0) > 5.0);
        assert!(weight(&denies, &PUBLIC, 0.6) < 1.0);
    }

    #[test]
    fn epsilon_bounds_what_another_source_changes() {
        for (target, sources) in [(1.0, 4), (8.0 / 1024.0, 4), (0.3, 80), (0.5, 1)] {
            assert!((epsilon(radius(target, sources), sources) - target).abs() < 1e-9);
        }
        // One source of two knows the opposite.
        let (opposite, target) = ([0.997, 0.001, 0.001, 0.001], 0.5);
        let radius = radius(target, 2);
        let mix = |other: &[f64]| mixed(&[SURE.to_vec(), other.to_vec()], &PUBLIC, radius);
        let (p, q) = (mix(&opposite), mix(&SURE));
        for (p, q) in [(&p, &q), (&q, &p)] {
            let moment: f64 = p.iter().zip(q).map(|(p, q)| p.powi(3) / q.powi(2)).sum();
            assert!(moment.ln() / 2.0 <= target);
            assert!((p.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        }
        assert!((total(0.5, 100, 1e-5) - 50.0 - 5.756_462_7).abs() < 1e-6);
    }

    #[test]
    fn draws_follow_the_masses() {
        let mut counts = [0; 4];
        for step in 0..1000 {
            counts[drawn(&PUBLIC, (f64::from(step) + 0.5) / 1000.0)] += 1;
        }
        assert_eq!(counts, [400, 300, 200, 100]);
        assert_eq!((drawn(&PUBLIC, 0.0), drawn(&PUBLIC, 1.0)), (0, 3));
    }
}
