//! Merged adapters are those of the formulas, for any number of adapters, chunks and threads.
#![cfg(test)]

use consilium_kernels::adapters::product::{Factors, gram, stack};
use consilium_kernels::adapters::{Magnitudes, Merging, Squares, merge, spreads};
use consilium_kernels::fusion::Robust;
use consilium_kernels::{AdapterError, Backend, Element};
use half::{bf16, f16};
use proptest::prelude::*;

/// Values of one to nine adapters, with zeros of both signs, ties, and magnitudes far apart.
fn adapters() -> impl Strategy<Value = Vec<Vec<f32>>> {
    let value = prop_oneof![
        4 => (-1000_i16..1000).prop_map(|value| f32::from(value) / 64.0),
        1 => prop::sample::select(&[0.0, -0.0, 1.0, -1.0, 1e30, -1e30, 1e-42][..]),
        2 => -1.0_f32..1.0,
    ];
    // Long enough for several tasks at times: a short pattern comes again with other neighbours.
    let length = prop_oneof![0_usize..70, Just(70_001)];
    (1_usize..10, length).prop_flat_map(move |(count, length)| {
        let pattern = prop::collection::vec(value.clone(), 97);
        prop::collection::vec(pattern, count).prop_map(move |patterns| {
            let repeat = |(index, pattern): (usize, Vec<f32>)| {
                let step = 1 + index;
                (0..length).map(|at| pattern[(at * step) % 97]).collect()
            };
            patterns.into_iter().enumerate().map(repeat).collect()
        })
    })
}

fn views<T>(adapters: &[Vec<T>]) -> Vec<&[T]> {
    adapters.iter().map(Vec::as_slice).collect()
}

fn merged<T: Element>(backend: Backend, merging: Merging<'_>, adapters: &[Vec<T>]) -> Vec<f32> {
    let mut out = vec![f32::NAN; adapters[0].len()];
    backend.merge(merging, &views(adapters), &mut out).unwrap();
    out
}

/// Equal but for the rounding of the last step.
fn same(fast: &[f32], exact: &[f32]) -> Result<(), TestCaseError> {
    for (index, (&fast, &exact)) in fast.iter().zip(exact).enumerate() {
        let close = (f64::from(fast) - f64::from(exact)).abs() <= f64::from(exact.abs()) * 2e-7;
        prop_assert!(close, "value {index}: {fast} for {exact}");
    }
    Ok(())
}

/// The k largest magnitudes' smallest, by sorting.
fn threshold_by_sorting(values: &[f32], density_permille: u32) -> f32 {
    let mut magnitudes: Vec<f32> = values.iter().map(|value| value.abs()).collect();
    magnitudes.sort_by(|a, b| b.total_cmp(a));
    magnitudes[(values.len() * density_permille as usize).div_ceil(1000) - 1]
}

fn threshold<T: Element>(chunks: &[&[T]], density_permille: u32) -> Result<f32, AdapterError> {
    let mut coarse = Magnitudes::default();
    for chunk in chunks {
        coarse.observe(chunk)?;
    }
    let mut fine = coarse.narrow(density_permille)?;
    for chunk in chunks {
        fine.observe(chunk);
    }
    fine.finish()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn every_rule_follows_its_formula(
        adapters in adapters(),
        weights in prop::collection::vec(0.0_f64..2.0, 9),
        thresholds in prop::collection::vec(0.0_f32..10.0, 9),
        trim_permille in 0_u32..500,
        cut in any::<prop::sample::Index>(),
    ) {
        let count = adapters.len();
        let (weights, thresholds) = (&weights[..count], &thresholds[..count]);
        for merging in [
            Merging::Sum { weights },
            Merging::Robust(Robust::Median),
            Merging::Robust(Robust::TrimmedMean { trim_permille }),
            Merging::Ties { weights, thresholds },
            Merging::Sce { weights },
        ] {
            let fast = merged(Backend::Cpu, merging, &adapters);
            same(&fast, &merged(Backend::Reference, merging, &adapters))?;
            for threads in [1, 3] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let again = pool.install(|| merged(Backend::Cpu, merging, &adapters));
                prop_assert_eq!(&again, &fast, "{:?} on {} threads", merging, threads);
            }
            let at = cut.index(adapters[0].len() + 1);
            let part = |range: std::ops::Range<usize>| -> Vec<Vec<f32>> {
                adapters.iter().map(|values| values[range.clone()].to_vec()).collect()
            };
            let mut chunks = merged(Backend::Cpu, merging, &part(0..at));
            chunks.extend(merged(Backend::Cpu, merging, &part(at..adapters[0].len())));
            prop_assert_eq!(&chunks, &fast, "{:?} in chunks", merging);
            if let Merging::Robust(_) = merging {
                let reversed: Vec<_> = adapters.iter().rev().cloned().collect();
                let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
                prop_assert_eq!(bits(merged(Backend::Cpu, merging, &reversed)), bits(fast));
            }
        }
    }

    #[test]
    fn halves_merge_as_the_values_that_they_are(adapters in adapters()) {
        let small = |value: &f32| if value.abs() > 1e4 { 1.0 } else { *value };
        let halves: Vec<Vec<f16>> = adapters
            .iter()
            .map(|values| values.iter().map(|value| f16::from_f32(small(value))).collect())
            .collect();
        let brains: Vec<Vec<bf16>> = adapters
            .iter()
            .map(|values| values.iter().map(|value| bf16::from_f32(small(value))).collect())
            .collect();
        let merging = Merging::Robust(Robust::Median);
        let from_halves: Vec<Vec<f32>> = halves.iter().map(|v| v.iter().map(|h| h.to_f32()).collect()).collect();
        let from_brains: Vec<Vec<f32>> = brains.iter().map(|v| v.iter().map(|h| h.to_f32()).collect()).collect();
        prop_assert_eq!(merged(Backend::Cpu, merging, &halves), merged(Backend::Cpu, merging, &from_halves));
        prop_assert_eq!(merged(Backend::Cpu, merging, &brains), merged(Backend::Cpu, merging, &from_brains));
    }

    #[test]
    fn thresholds_are_exact_in_any_chunks(
        adapters in adapters(),
        density in 1_u32..=1000,
        cut in any::<prop::sample::Index>(),
    ) {
        let values = &adapters[0];
        prop_assume!(!values.is_empty());
        let (first, second) = values.split_at(cut.index(values.len()));
        let exact = threshold_by_sorting(values, density).to_bits();
        prop_assert_eq!(threshold(&[first, second], density).unwrap().to_bits(), exact);
        prop_assert_eq!(threshold(&[second, first], density).unwrap().to_bits(), exact);
    }

    #[test]
    fn inner_products_are_those_of_the_products(
        ranks in prop::collection::vec(1_usize..5, 1..5),
        rows in 1_usize..700,
        columns in 1_usize..40,
        seed in any::<u64>(),
    ) {
        let mut state = seed;
        let mut value = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        let owned: Vec<(Vec<f32>, Vec<f32>)> = ranks
            .iter()
            .map(|rank| {
                let b = (0..rows * rank).map(|_| value()).collect();
                (b, (0..rank * columns).map(|_| value()).collect())
            })
            .collect();
        let factors: Vec<Factors<'_, f32>> = owned
            .iter()
            .zip(&ranks)
            .enumerate()
            .map(|(i, ((b, a), &rank))| Factors { b, a, rank, scale: 0.5 + i as f64 })
            .collect();
        let product = |factor: &Factors<'_, f32>, weight: f64| -> Vec<f64> {
            let at = |row: usize, column: usize| (0..factor.rank).map(|r| {
                f64::from(factor.b[row * factor.rank + r]) * f64::from(factor.a[r * columns + column])
            }).sum::<f64>() * factor.scale * weight;
            (0..rows * columns).map(|i| at(i / columns, i % columns)).collect()
        };
        let dense: Vec<Vec<f64>> = factors.iter().map(|factor| product(factor, 1.0)).collect();
        let norm = |values: &[f64]| values.iter().map(|value| value * value).sum::<f64>().sqrt();
        let got = gram(&factors, rows, columns).unwrap();
        for (i, first) in dense.iter().enumerate() {
            for (j, second) in dense.iter().enumerate() {
                let exact: f64 = first.iter().zip(second).map(|(a, b)| a * b).sum();
                let off = (got[i * dense.len() + j] - exact).abs();
                prop_assert!(off <= 1e-12 * (1.0 + norm(first) * norm(second)), "{off}");
            }
        }
        let weights: Vec<f64> = (0..factors.len()).map(|i| 1.0 / (i + 1) as f64).collect();
        let (b, a) = stack(&factors, &weights, rows, columns).unwrap();
        let rank = ranks.iter().sum();
        let stacked = product(&Factors { b: &b, a: &a, rank, scale: 1.0 }, 1.0);
        for (index, got) in stacked.iter().enumerate() {
            let exact: f64 = dense.iter().zip(&weights).map(|(d, w)| d[index] * w).sum();
            prop_assert!((got - exact).abs() <= 1e-5 * (1.0 + exact.abs()), "{got} for {exact}");
        }
    }
}

#[test]
fn ties_by_hand() {
    let adapters = [
        vec![5.0, -1.0, 0.0, 2.0],
        vec![-3.0, -3.0, 0.0, -2.0],
        vec![1.0, 9.0, 4.0, 0.5],
    ];
    let weights = [1.0, 1.0, 2.0];
    let merging = Merging::Ties {
        weights: &weights,
        thresholds: &[2.0, 3.0, 1.0],
    };
    // 5 - 3 + 2: plus, the mean of 5 and twice 1; -3 against 18; only 4; 2 against -2 is below 3.
    assert_eq!(
        merged(Backend::Cpu, merging, &adapters),
        [7.0 / 3.0, 9.0, 4.0, 2.0]
    );
    let even = [vec![2.0_f32], vec![-2.0]];
    let merging = Merging::Sce {
        weights: &[0.5, 0.5],
    };
    assert_eq!(merged(Backend::Cpu, merging, &even), [0.0]);
}

#[test]
fn sce_weighs_by_squares_where_adapters_differ() {
    let adapters = [vec![3.0_f32, 1.0, 1.0, 0.0], vec![-1.0, 1.0, 1.0, 0.0]];
    let views = views(&adapters);
    let mut spread = vec![0.0; 4];
    spreads(&views, &mut spread).unwrap();
    assert_eq!(spread, [8.0, 0.0, 0.0, 0.0]);
    let limit = threshold(&[spread.as_slice()], 250).unwrap();
    let mut squares = Squares::new(2, limit);
    squares.observe(&views).unwrap();
    assert_eq!(squares.finish(), [0.9, 0.1]);
    assert_eq!(Squares::new(2, 0.0).finish(), [0.5, 0.5]);
}

#[test]
fn what_cannot_be_merged_is_refused() {
    let mut out = [0.0; 3];
    let good = [1.0_f32, 2.0, 3.0];
    let median = Merging::Robust(Robust::Median);
    for backend in [Backend::Reference, Backend::Cpu] {
        let mut refused = |merging: Merging<'_>, adapters: &[&[f32]]| {
            backend.merge(merging, adapters, &mut out).unwrap_err()
        };
        assert_eq!(refused(median, &[]), AdapterError::Nothing);
        assert_eq!(
            refused(median, &[&good, &good[..2]]),
            AdapterError::Length {
                adapter: 1,
                got: 2,
                expected: 3
            }
        );
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert_eq!(
                refused(median, &[&good, &[0.0, bad, bad]]),
                AdapterError::NotFinite {
                    adapter: 1,
                    index: 1
                }
            );
        }
        let sum = |weights| Merging::Sum { weights };
        assert!(matches!(
            refused(sum(&[1.0, 2.0]), &[&good]),
            AdapterError::Count { .. }
        ));
        assert_eq!(
            refused(sum(&[f64::NAN]), &[&good]),
            AdapterError::Weight { adapter: 0 }
        );
        assert_eq!(
            refused(sum(&[1e39]), &[&good]),
            AdapterError::Overflow { index: 0 }
        );
        let negative = Merging::Sce {
            weights: &[1.0, -1.0],
        };
        assert_eq!(
            refused(negative, &[&good, &good]),
            AdapterError::Weight { adapter: 1 }
        );
        let ties = Merging::Ties {
            weights: &[1.0],
            thresholds: &[f32::NAN],
        };
        assert_eq!(
            refused(ties, &[&good]),
            AdapterError::Threshold { adapter: 0 }
        );
        let trim = Merging::Robust(Robust::TrimmedMean { trim_permille: 500 });
        assert_eq!(
            refused(trim, &[&good]),
            AdapterError::Trim { permille: 500 }
        );
    }
    let mut out = vec![0.0; 200_000];
    let mut long = vec![1.0_f32; 200_000];
    long[150_000] = f32::NAN;
    long[190_000] = f32::NAN;
    assert_eq!(
        merge(median, &[&vec![1.0; 200_000], &long], &mut out),
        Err(AdapterError::NotFinite {
            adapter: 1,
            index: 150_000
        })
    );
}

#[test]
fn passes_refuse_what_they_cannot_count() {
    let mut coarse = Magnitudes::default();
    assert_eq!(
        coarse.observe(&[1.0, f32::NAN]),
        Err(AdapterError::NotFinite {
            adapter: 0,
            index: 1
        })
    );
    for permille in [0, 1001] {
        assert_eq!(
            threshold(&[&[1.0_f32][..]], permille),
            Err(AdapterError::Density { permille })
        );
    }
    assert_eq!(threshold::<f32>(&[], 500), Err(AdapterError::Nothing));
    let mut coarse = Magnitudes::default();
    coarse.observe(&[1.0_f32, 2.0]).unwrap();
    let mut fine = coarse.narrow(500).unwrap();
    fine.observe(&[1.0_f32]);
    assert_eq!(fine.finish(), Err(AdapterError::Changed));
    let short = Factors {
        b: &[1.0_f32][..],
        a: &[1.0, 2.0],
        rank: 1,
        scale: 1.0,
    };
    assert_eq!(
        gram(&[short], 2, 2),
        Err(AdapterError::Length {
            adapter: 0,
            got: 1,
            expected: 2
        })
    );
    assert_eq!(
        gram(
            &[Factors {
                b: &[1.0, f32::NAN][..],
                ..short
            }],
            2,
            2
        ),
        Err(AdapterError::NotFinite {
            adapter: 0,
            index: 1
        })
    );
    assert!(matches!(
        stack(&[short], &[], 1, 2),
        Err(AdapterError::Count { .. })
    ));
}
