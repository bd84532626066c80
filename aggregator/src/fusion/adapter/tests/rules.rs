//! Every merge rule against dense arithmetic in `f64`, any rank of a site, any order and any number of threads.

use consilium_protocol::Digest;
use consilium_protocol::manifest::{Defence, MergeRule, Training};
use faer::{Mat, Scale};

use super::{
    HEAD, HEAD_SHAPE, Q, RANK, SHAPES, Tensor, UP, adapter, adapter_of, dense, distance, merged,
    random, serialize, tensor, training,
};
use crate::fusion::error::{FusionError, TensorProblem};

/// Without an outer step: what the rule gives.
fn plain(merge: MergeRule) -> Training {
    Training {
        inner_rounds: 1,
        merge,
        ..training(1000, 0)
    }
}

const RULES: [MergeRule; 9] = [
    MergeRule::Product,
    MergeRule::Factors,
    MergeRule::Ffa,
    MergeRule::Stack,
    MergeRule::Residual,
    MergeRule::TaskArithmetic {
        scale_permille: 500,
    },
    MergeRule::Ties {
        density_permille: 200,
        scale_permille: 1000,
    },
    MergeRule::Dare {
        density_permille: 500,
        scale_permille: 400,
    },
    MergeRule::Sce {
        select_permille: 100,
    },
];

/// An adapter with the A of `start`: what FFA takes, and others too.
fn frozen(start: &[u8], seed: u64) -> Vec<u8> {
    let mut tensors = Vec::new();
    for (index, (layer, rows, _)) in SHAPES.into_iter().enumerate() {
        let name = format!("{layer}.lora_A.weight");
        tensors.push(Tensor::matrix(name.clone(), &tensor(start, &name)));
        let b = random(seed * 10 + index as u64, rows, RANK, 0.3);
        tensors.push(Tensor::matrix(format!("{layer}.lora_B.weight"), &b));
    }
    let head = random(seed, HEAD_SHAPE[0], HEAD_SHAPE[1], 1.0);
    tensors.push(Tensor::matrix(HEAD.to_owned(), &head));
    serialize(&tensors)
}

fn named(parts: &[(Vec<u8>, u32)]) -> Vec<(&'static str, &[u8], u32)> {
    let names = ["a", "b", "c", "d", "e", "f"].into_iter();
    names
        .zip(parts)
        .map(|(name, (bytes, weight))| (name, bytes.as_slice(), *weight))
        .collect()
}

/// `sum p_m x_m`.
fn mean(parts: &[(Vec<u8>, u32)], of: impl Fn(&[u8]) -> Mat<f64>) -> Mat<f64> {
    let total: u32 = parts.iter().map(|(_, weight)| weight).sum();
    let terms = parts
        .iter()
        .map(|(bytes, weight)| Scale(f64::from(*weight) / f64::from(total)) * of(bytes));
    terms.reduce(|a, b| a + b).unwrap()
}

#[test]
fn stack_and_residual_are_the_weighted_mean_of_the_products_for_any_ranks() {
    let start = adapter(1, 0.0);
    let ranks = [(RANK, 3_u32), (2, 1), (7, 4)];
    let parts: Vec<_> = ranks
        .iter()
        .zip(2..)
        .map(|(&(rank, weight), seed)| (adapter_of(&SHAPES, rank, seed, 0.3), weight))
        .collect();
    for (rule, rank) in [(MergeRule::Stack, 13), (MergeRule::Residual, 20)] {
        let got = merged(&plain(rule), &start, None, &named(&parts)).unwrap();
        for (layer, rows, columns) in SHAPES {
            let exact = mean(&parts, |bytes| dense(bytes, layer));
            let error = distance(&dense(&got.adapter, layer), &exact);
            assert!(error <= 1e-6, "{rule:?} {layer}: {error}");
            let a = tensor(&got.adapter, &format!("{layer}.lora_A.weight"));
            let b = tensor(&got.adapter, &format!("{layer}.lora_B.weight"));
            assert_eq!([a.shape(), b.shape()], [(rank, columns), (rows, rank)]);
        }
        let exact = mean(&parts, |bytes| tensor(bytes, HEAD));
        assert!(distance(&tensor(&got.adapter, HEAD), &exact) < 1e-6);
        let got_ranks: Vec<_> = got.report.members.iter().map(|m| m.rank).collect();
        assert_eq!(got_ranks, [RANK, 2, 7]);
    }
    // From a start that is not zero, too: a release that is trained on.
    let start = adapter(9, 0.4);
    let got = merged(&plain(MergeRule::Stack), &start, None, &named(&parts)).unwrap();
    let exact = mean(&parts, |bytes| dense(bytes, Q));
    assert!(distance(&dense(&got.adapter, Q), &exact) <= 1e-6);
}

#[test]
fn the_bias_of_averaged_factors_is_that_of_the_formula() {
    let start = adapter(1, 0.1);
    let parts: Vec<_> = [(2, 3_u32), (3, 1), (4, 4)]
        .map(|(seed, weight)| (adapter(seed, 0.3), weight))
        .into();
    let got = merged(&plain(MergeRule::Factors), &start, None, &named(&parts)).unwrap();
    let residual = merged(&plain(MergeRule::Residual), &start, None, &named(&parts)).unwrap();
    let mut squares = [0.0; 2];
    for (index, (layer, _, _)) in SHAPES.into_iter().enumerate() {
        let names = ["lora_A", "lora_B"].map(|factor| format!("{layer}.{factor}.weight"));
        for name in &names {
            let exact = mean(&parts, |bytes| tensor(bytes, name));
            assert!(
                distance(&tensor(&got.adapter, name), &exact) < 1e-6,
                "{name}"
            );
        }
        // -sum over pairs of p_m p_n (B_m - B_n)(A_m - A_n).
        let product = mean(&parts, |bytes| dense(bytes, layer));
        let mut bias = Mat::<f64>::zeros(product.nrows(), product.ncols());
        for (i, (first, p)) in parts.iter().enumerate() {
            for (second, q) in &parts[..i] {
                let [a, b] = names
                    .each_ref()
                    .map(|n| tensor(first, n) - tensor(second, n));
                bias -= Scale(f64::from(p * q) / 64.0) * (b * a);
            }
        }
        let found = dense(&got.adapter, layer) - &product;
        assert!(distance(&found, &bias) < 1e-4, "{layer}");
        let relative = bias.norm_l2() / product.norm_l2();
        for report in [&got.report, &residual.report] {
            let reported = report.truncation.matrices[usize::from(index == 0)]
                .bias
                .unwrap();
            assert!(
                (reported - relative).abs() < 1e-6,
                "{layer}: {reported} {relative}"
            );
        }
        squares[0] += bias.norm_l2().powi(2);
        squares[1] += product.norm_l2().powi(2);
    }
    let all = (squares[0] / squares[1]).sqrt();
    assert!((got.report.bias.unwrap() - all).abs() < 1e-6, "{all}");
    assert!(all > 0.3, "these adapters share nothing: {all}");
}

#[test]
fn ffa_keeps_a_and_steps_on_b() {
    let start = adapter(1, 0.2);
    let t = Training {
        merge: MergeRule::Ffa,
        ..training(700, 700)
    };
    let parts = [(frozen(&start, 2), 1), (frozen(&start, 3), 3)];
    let one = merged(&t, &start, None, &named(&parts)).unwrap();
    let parts2 = [(frozen(&start, 4), 1), (frozen(&start, 5), 3)];
    let two = merged(&t, &one.adapter, Some(&one.momentum), &named(&parts2)).unwrap();
    for (layer, _, _) in SHAPES {
        let [a, b] = ["lora_A", "lora_B"].map(|factor| format!("{layer}.{factor}.weight"));
        assert_eq!(tensor(&two.adapter, &a), tensor(&start, &a));
        let (mut theta, mut velocity) = (tensor(&start, &b), Mat::zeros(0, 0));
        for (round, parts) in [&parts, &parts2].into_iter().enumerate() {
            let gradient = &theta - mean(parts, |bytes| tensor(bytes, &b));
            velocity = if round == 0 {
                gradient.clone()
            } else {
                Scale(0.7) * velocity + &gradient
            };
            theta -= Scale(0.7) * (gradient + Scale(0.7) * &velocity);
        }
        assert!(
            distance(&tensor(&two.adapter, &b), &theta) < 1e-6,
            "{layer}"
        );
        assert_eq!(two.report.bias, None);
    }
    let moved = [(frozen(&start, 2), 1), (adapter(3, 0.3), 1)];
    let error = merged(&t, &start, None, &named(&moved)).unwrap_err();
    let FusionError::Tensor {
        origin,
        tensor,
        problem,
    } = error
    else {
        panic!("{error}");
    };
    let institution = super::id("b");
    assert_eq!(origin, crate::fusion::Origin::Institution(institution));
    assert_eq!(
        (tensor, problem),
        (format!("{UP}.lora_A.weight"), TensorProblem::Moved(0))
    );
}

#[test]
fn task_arithmetic_adds_scaled_updates() {
    let start = adapter(1, 0.2);
    let parts = [(adapter(2, 0.3), 1), (adapter(3, 0.3), 3)];
    let rule = MergeRule::TaskArithmetic {
        scale_permille: 600,
    };
    let wide = Training {
        rank: u32::try_from(3 * RANK).unwrap(),
        ..plain(rule)
    };
    // A start of rank 12 with zeros beyond rank 4 holds the sum without truncation.
    let padded = adapter_of(&SHAPES, 3 * RANK, 1, 0.0);
    let got = merged(&wide, &padded, None, &named(&parts)).unwrap();
    for (layer, _, _) in SHAPES {
        let exact = Scale(1.2) * mean(&parts, |bytes| dense(bytes, layer));
        assert!(
            distance(&dense(&got.adapter, layer), &exact) < 1e-5,
            "{layer}"
        );
    }
    let got = merged(&plain(rule), &start, None, &named(&parts)).unwrap();
    let before = tensor(&start, HEAD);
    let exact = &before + Scale(1.2) * (mean(&parts, |bytes| tensor(bytes, HEAD)) - &before);
    assert!(distance(&tensor(&got.adapter, HEAD), &exact) < 1e-6);
}

/// Entries of some updates that become one by `rule`.
fn entrywise(parts: &[Mat<f64>], rule: impl Fn(&[f64]) -> f64) -> Mat<f64> {
    let (rows, columns) = parts[0].shape();
    Mat::from_fn(rows, columns, |i, j| {
        rule(&parts.iter().map(|part| part[(i, j)]).collect::<Vec<_>>())
    })
}

/// The value that the largest `share` of the magnitudes reach.
fn threshold(values: impl Iterator<Item = f64>, share: f64) -> f64 {
    let mut sorted: Vec<f64> = values.map(f64::abs).collect();
    sorted.sort_by(|a, b| b.total_cmp(a));
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a count"
    )]
    let count = (sorted.len() as f64 * share).ceil() as usize;
    sorted[count - 1]
}

fn entries(m: &Mat<f64>) -> impl Iterator<Item = f64> {
    (0..m.nrows()).flat_map(move |i| (0..m.ncols()).map(move |j| m[(i, j)]))
}

/// The mean of the values that have the sign of the weighted sum.
fn elected(values: &[f64], weights: &[f64]) -> f64 {
    let sum: f64 = values.iter().zip(weights).map(|(v, w)| v * w).sum();
    let agree = || values.iter().zip(weights).filter(|(v, _)| **v * sum > 0.0);
    let total: f64 = agree().map(|(_, w)| w).sum();
    let of_sign: f64 = agree().map(|(v, w)| v * w).sum();
    if total > 0.0 { of_sign / total } else { 0.0 }
}

fn ties(updates: &[Mat<f64>], weights: &[f64]) -> Mat<f64> {
    let cut: Vec<_> = updates
        .iter()
        .map(|update| {
            let least = threshold(entries(update), 0.2);
            let keep = |i: usize, j: usize| update[(i, j)].abs() >= least * (1.0 - 1e-6);
            Mat::from_fn(update.nrows(), update.ncols(), |i, j| {
                if keep(i, j) { update[(i, j)] } else { 0.0 }
            })
        })
        .collect();
    entrywise(&cut, |values| elected(values, weights))
}

fn sce(updates: &[Mat<f64>]) -> Mat<f64> {
    let spread = entrywise(updates, |values| {
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        values.iter().map(|v| (v - mean).powi(2)).sum()
    });
    let least = threshold(entries(&spread), 0.1) * (1.0 - 1e-6);
    let squares: Vec<f64> = updates
        .iter()
        .map(|update| {
            let chosen = entries(update)
                .zip(entries(&spread))
                .filter(|(_, s)| *s >= least);
            chosen.map(|(v, _)| v * v).sum()
        })
        .collect();
    entrywise(updates, |values| {
        let sum: f64 = values.iter().sum();
        let agree = || values.iter().zip(&squares).filter(|(v, _)| **v * sum > 0.0);
        let total: f64 = agree().map(|(_, w)| w).sum();
        if total > 0.0 {
            agree().map(|(v, w)| v * w).sum::<f64>() / total
        } else {
            0.0
        }
    })
}

fn trimmed(updates: &[Mat<f64>]) -> Mat<f64> {
    entrywise(updates, |values| {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        sorted[1..sorted.len() - 1].iter().sum::<f64>() / (sorted.len() - 2) as f64
    })
}

#[test]
fn rules_on_entries_are_close_to_the_best_low_rank_form_of_the_dense_result() {
    let start = adapter(1, 0.1);
    let parts: Vec<_> = (2..7)
        .map(|seed| (adapter(seed, 0.3), 1 + u32::try_from(seed % 2).unwrap()))
        .collect();
    let weights: Vec<f64> = parts.iter().map(|(_, weight)| f64::from(*weight)).collect();
    type Dense<'a> = Box<dyn Fn(&[Mat<f64>]) -> Mat<f64> + 'a>;
    let cases: [(Training, Dense<'_>); 3] = [
        (plain(RULES[6]), Box::new(|updates| ties(updates, &weights))),
        (plain(RULES[8]), Box::new(sce)),
        (
            Training {
                defence: Defence::TrimmedMean { byzantine: 1 },
                ..plain(MergeRule::Product)
            },
            Box::new(trimmed),
        ),
    ];
    for (t, rule) in cases {
        let got = merged(&t, &start, None, &named(&parts)).unwrap();
        let scales: Vec<f64> = got.report.members.iter().map(|m| m.scale).collect();
        let updates = |of: &dyn Fn(&[u8]) -> Mat<f64>| -> Vec<Mat<f64>> {
            let before = of(&start);
            let updates = parts.iter().zip(&scales);
            updates
                .map(|((bytes, _), scale)| Scale(*scale) * (of(bytes) - &before))
                .collect()
        };
        for (index, (layer, _, _)) in SHAPES.into_iter().enumerate() {
            let exact = rule(&updates(&|bytes| dense(bytes, layer))) + dense(&start, layer);
            let svd = exact.thin_svd().unwrap();
            let s = svd.S().column_vector();
            let least: f64 =
                (RANK..s.nrows()).map(|i| s[i] * s[i]).sum::<f64>().sqrt() / exact.norm_l2();
            let error = distance(&dense(&got.adapter, layer), &exact);
            assert!(
                error < 1.05 * least,
                "{t:?} {layer}: {error}, at best {least}"
            );
            let reported = got.report.truncation.matrices[usize::from(index == 0)].product;
            assert!(
                (reported / error - 1.0).abs() < 0.1,
                "{t:?} {layer}: {reported} {error}"
            );
        }
        let exact = rule(&updates(&|bytes| tensor(bytes, HEAD))) + tensor(&start, HEAD);
        let error = distance(&tensor(&got.adapter, HEAD), &exact);
        assert!(error < 1e-6, "{t:?} head: {error}");
    }
}

#[test]
fn dare_keeps_the_mean_and_follows_the_seed() {
    let start = adapter(1, 0.0);
    let part = adapter(2, 0.3);
    let rule = MergeRule::Dare {
        density_permille: 500,
        scale_permille: 1000,
    };
    let got = merged(&plain(rule), &start, None, &[("a", &part, 1)]).unwrap();
    let (before, full) = (tensor(&start, HEAD), tensor(&part, HEAD));
    let update = tensor(&got.adapter, HEAD) - &before;
    let doubled = Scale(2.0) * (full - &before);
    let mut kept = 0;
    for (got, twice) in entries(&update).zip(entries(&doubled)) {
        assert!(
            got.abs() < 1e-6 || (got - twice).abs() < 1e-6,
            "{got} {twice}"
        );
        kept += usize::from(got.abs() >= 1e-6);
    }
    assert!((250..350).contains(&kept), "{kept} of 600");
    let all = MergeRule::Dare {
        density_permille: 1000,
        scale_permille: 1000,
    };
    let got = merged(&plain(all), &start, None, &[("a", &part, 1)]).unwrap();
    assert!(distance(&dense(&got.adapter, Q), &dense(&part, Q)) < 1e-5);
}

#[test]
fn no_rule_or_defence_depends_on_order_or_threads() {
    let start = adapter(1, 0.2);
    let parts: Vec<_> = (2..8)
        .map(|seed| (frozen(&start, seed), 1 + u32::try_from(seed % 3).unwrap()))
        .collect();
    let defences = [
        Defence::None,
        Defence::Standard,
        Defence::ClipNorm,
        Defence::CentredClipping {
            radius_permille: 500,
            iterations: 3,
        },
        Defence::GeometricMedian { iterations: 5 },
        Defence::MultiKrum {
            byzantine: 1,
            keep: 3,
        },
    ];
    let mut seen = std::collections::BTreeSet::new();
    for rule in RULES {
        for defence in defences {
            let t = Training {
                defence,
                ..plain(rule)
            };
            let mut order = named(&parts);
            let expected = merged(&t, &start, None, &order).unwrap();
            seen.insert(Digest::of(&expected.adapter));
            for threads in [1, 3] {
                order.rotate_left(1);
                order.swap(0, 3);
                let pool = rayon::ThreadPoolBuilder::new()
                    .num_threads(threads)
                    .build()
                    .unwrap();
                let got = pool.install(|| merged(&t, &start, None, &order)).unwrap();
                assert_eq!(got, expected, "{rule:?} {defence:?}, {threads} threads");
            }
        }
    }
    // Every pair is a merge of its own, but: with one A, means of factors are FFA; SCE has weights of its own, so that the
    // geometric median changes nothing.
    assert_eq!(
        seen.len(),
        RULES.len() * defences.len() - defences.len() - 2
    );
}

#[test]
fn another_rank_or_target_is_merged_or_refused_by_name() {
    let start = adapter(1, 0.2);
    let low = adapter_of(&SHAPES, 2, 3, 0.3);
    let high = adapter_of(&SHAPES, 4 * RANK + 1, 3, 0.3);
    let other = adapter_of(&SHAPES[..1], RANK, 3, 0.3);
    for rule in RULES {
        let with = |bytes: &[u8]| {
            let own = frozen(&start, 2);
            merged(
                &plain(rule),
                &start,
                None,
                &[("a", &own, 1), ("b", bytes, 1)],
            )
        };
        let named = |error: FusionError| match error {
            FusionError::Tensor {
                origin,
                tensor,
                problem,
            } => {
                assert_eq!(origin, crate::fusion::Origin::Institution(super::id("b")));
                (tensor, problem)
            }
            other => panic!("{rule:?}: {other}"),
        };
        let up = format!("{UP}.lora_A.weight");
        if rule.takes_any_rank() {
            with(&low).unwrap();
            let problem = TensorProblem::Rank {
                got: 4 * RANK + 1,
                most: 4 * RANK,
            };
            assert_eq!(named(with(&high).unwrap_err()), (up.clone(), problem));
        } else {
            let problem = TensorProblem::Shape {
                got: vec![2, 20],
                expected: vec![RANK, 20],
            };
            assert_eq!(named(with(&low).unwrap_err()), (up.clone(), problem));
        }
        assert_eq!(
            named(with(&other).unwrap_err()),
            (up.clone(), TensorProblem::Missing)
        );
        let bomb = {
            let mut bytes = frozen(&start, 3);
            let at = bytes.len() - 4;
            bytes[at..].copy_from_slice(&f32::NAN.to_le_bytes());
            bytes
        };
        let (_, problem) = named(with(&bomb).unwrap_err());
        assert!(
            matches!(problem, TensorProblem::NotFinite(_)),
            "{rule:?}: {problem}"
        );
    }
}
