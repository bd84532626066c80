//! Losses against the reference, at every level and for every storage type.

use half::{bf16, f16};
use proptest::prelude::*;

use crate::Backend;
use crate::code::FLOOR;
use crate::cpu::{self, Level};
use crate::element::{Dtype, Element};
use crate::error::LossError;
use crate::loss::{ItemLoss, LossJob, NO_LABEL, Tail, Term};
use crate::records::Records;
use crate::reference;
use crate::testing::{Case, Random, cases, stored};
use crate::vocab::{TokenKind, Vocab};

/// Relative to the sum of the weights: gradients are sums of a few `f32` shares.
const GRADIENT_TOLERANCE: f64 = 4e-6;

/// What rounding to a storage type moves a gradient by, at most.
fn rounding<T: Element>() -> (f64, f64) {
    match T::DTYPE {
        Dtype::F32 => (f64::from(f32::EPSILON), 0.0),
        Dtype::Bf16 => (1.0 / 128.0, 0.0),
        Dtype::F16 => (1.0 / 1024.0, 6.2e-8),
    }
}

pub(crate) fn check_close<T: Element>(fast: (f64, &[T]), exact: (f64, &[T]), weight: f64) {
    let (fast_loss, exact_loss) = (fast.0, exact.0);
    assert!(
        (fast_loss - exact_loss).abs() <= 2e-6 * exact_loss.abs() + 1e-5,
        "loss {fast_loss} against {exact_loss}"
    );
    let (relative, absolute) = rounding::<T>();
    for (index, (fast, exact)) in fast.1.iter().zip(exact.1).enumerate() {
        let (fast, exact) = (f64::from(fast.to_f32()), f64::from(exact.to_f32()));
        let allowed = GRADIENT_TOLERANCE * weight + relative * exact.abs() + absolute;
        assert!(
            (fast - exact).abs() <= allowed,
            "gradient {index}: {fast} against {exact}"
        );
    }
}

fn check_rows_sum_to_zero(case: &Case, grad: &[f32]) {
    for (row, grad) in grad.chunks(case.vocab.len()).enumerate() {
        let sum: f64 = grad.iter().map(|&value| f64::from(value)).sum();
        assert!(sum.abs() < 4e-5, "gradient of row {row} sums to {sum:e}");
        let ignored = &grad[case.vocab.live()..];
        assert!(
            ignored.iter().all(|&value| value == 0.0),
            "ignored tokens have a gradient"
        );
    }
}

/// Targets of one item for terms of every kind.
pub(crate) struct Targets {
    pub(crate) tokens: Vec<u32>,
    bytes: Records,
    labels: Vec<u32>,
    listed: Records<u32>,
    /// Of another model, with more slots.
    other: Records<u32>,
}

impl Targets {
    pub(crate) fn of(case: &mut Case, tokens: Vec<u32>, k: usize) -> Self {
        let labels = (0..=tokens.len()).map(|_| match case.random.below(4) {
            0 => NO_LABEL,
            _ => u32::try_from(case.random.below(case.vocab.live())).unwrap(),
        });
        let labels = labels.collect();
        let mut item = Case {
            tokens: tokens.clone(),
            ..case.clone()
        };
        Self {
            bytes: item.target(k),
            listed: item.token_target(k),
            other: item.token_target(3 * k),
            labels,
            tokens,
        }
    }

    /// A choice of terms by the bits of `kinds`; their weights sum to at most 2.
    pub(crate) fn terms(&self, kinds: usize) -> Vec<Term<'_>> {
        let target = self.listed.view();
        let all = [
            Term::Trie {
                target: self.bytes.view(),
                weight: 0.7,
            },
            Term::Labels {
                labels: &self.labels,
                weight: 0.25,
            },
            Term::Tokens {
                target,
                weight: 0.3,
                tail: Tail::Ghost,
            },
            Term::Tokens {
                target,
                weight: -0.25,
                tail: Tail::Dropped,
            },
            Term::Sorted {
                target: self.other.view(),
                weight: 0.3,
            },
            Term::Standardised {
                target,
                weight: -0.2,
                temperature: 0.7,
            },
        ];
        let chosen = all
            .into_iter()
            .enumerate()
            .filter(|(index, _)| kinds >> index & 1 == 1);
        chosen.map(|(_, term)| term).collect()
    }
}

fn check_losses<T: Element>(case: &mut Case, k: usize, kinds: [usize; 3]) {
    let vocab = case.vocab.clone();
    let targets: Vec<Targets> = case
        .items()
        .into_iter()
        .map(|tokens| Targets::of(case, tokens, k))
        .collect();
    let terms: Vec<Vec<Term<'_>>> = targets
        .iter()
        .zip(kinds)
        .map(|(targets, kinds)| targets.terms(kinds))
        .collect();
    let items: Vec<ItemLoss<'_>> = targets
        .iter()
        .zip(&terms)
        .map(|(targets, terms)| ItemLoss {
            tokens: &targets.tokens,
            terms,
        })
        .collect();
    let job = LossJob::new(&vocab, &items).unwrap();
    let logits: Vec<T> = stored(&case.rows(job.rows()));
    let mut exact = logits.clone();
    let exact_loss = Backend::Reference
        .loss_in_place(&vocab, &items, &mut exact)
        .unwrap();
    for level in Level::present() {
        let mut fast = logits.clone();
        let losses = cpu::loss::rows(level, &job, 0..job.rows(), &mut fast).unwrap();
        check_close((losses.iter().sum(), &fast), (exact_loss, &exact), 2.0);
        if T::DTYPE == Dtype::F32 {
            let fast: Vec<f32> = fast.iter().map(|value| value.to_f32()).collect();
            check_rows_sum_to_zero(case, &fast);
        }
        let cut = case.random.below(job.rows());
        let mut parts = logits.clone();
        let (head, tail) = parts.split_at_mut(cut * vocab.len());
        let mut in_parts = cpu::loss::rows(level, &job, 0..cut, head).unwrap();
        in_parts.extend(cpu::loss::rows(level, &job, cut..job.rows(), tail).unwrap());
        let bits = |losses: &[f64]| losses.iter().map(|loss| loss.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&in_parts), bits(&losses), "{level:?}: parts at {cut}");
        let same = parts
            .iter()
            .zip(&fast)
            .all(|(a, b)| a.to_f32().to_bits() == b.to_f32().to_bits());
        assert!(same, "{level:?}: parts at {cut} have another gradient");
    }
}

proptest! {
    #[test]
    fn losses_agree_with_the_reference(
        mut case in cases(),
        k in 1_usize..6,
        kinds in prop::array::uniform3(0_usize..64),
    ) {
        check_losses::<f32>(&mut case, k, kinds);
        check_losses::<bf16>(&mut case, k, kinds);
        check_losses::<f16>(&mut case, k, kinds);
    }

    #[test]
    fn one_hot_targets_give_the_cross_entropy(mut case in cases()) {
        let logits = case.logits();
        let mut labels = case.tokens.clone();
        labels.push(case.vocab.end_ranks().start);
        let bytes = case.one_hot();
        let listed = case.one_hot_tokens();
        let tokens = case.tokens.clone();
        for backend in [Backend::Cpu, Backend::Reference] {
            let run = |term: Term<'_>| {
                let mut grad = logits.clone();
                let item = ItemLoss { tokens: &tokens, terms: &[term] };
                let loss = backend.loss_in_place(&case.vocab, &[item], &mut grad).unwrap();
                (loss, grad)
            };
            let plain = run(Term::Labels { labels: &labels, weight: 1.0 });
            for other in [
                Term::Trie { target: bytes.view(), weight: 1.0 },
                Term::Tokens { target: listed.view(), weight: 1.0, tail: Tail::Ghost },
                Term::Tokens { target: listed.view(), weight: 1.0, tail: Tail::Dropped },
            ] {
                let other = run(other);
                check_close((other.0, &other.1), (plain.0, &plain.1), 1.0);
            }
        }
    }

    #[test]
    fn the_reference_gradient_is_the_derivative(
        mut case in cases(),
        k in 1_usize..6,
        kinds in 1_usize..16,
    ) {
        case.scale = case.scale.min(3.0);
        case.tokens.truncate(4);
        let tokens = case.tokens.clone();
        let targets = Targets::of(&mut case, tokens, k);
        let terms = targets.terms(kinds);
        let items = [ItemLoss { tokens: &targets.tokens, terms: &terms }];
        let job = LossJob::new(&case.vocab, &items).unwrap();
        for index in 0..job.rows() {
            let (item, place) = job.place(index);
            let logits = case.random.logits(case.vocab.live(), case.scale);
            let mut row: Vec<f64> = logits.into_iter().map(f64::from).collect();
            let (_, grad) = reference::loss::row_loss(&case.vocab, item, place, &row);
            for rank in 0..row.len() {
                let step = 1e-5;
                let at = row[rank];
                row[rank] = at + step;
                let (above, _) = reference::loss::row_loss(&case.vocab, item, place, &row);
                row[rank] = at - step;
                let (under, _) = reference::loss::row_loss(&case.vocab, item, place, &row);
                row[rank] = at;
                let slope = (above - under) / (2.0 * step);
                prop_assert!((slope - grad[rank]).abs() < 1e-8, "{} against {}", slope, grad[rank]);
            }
        }
    }
}

/// Logits far enough apart that a small step changes no order, in random order.
fn apart(random: &mut Random, count: usize, step: f32) -> Vec<f64> {
    let mut row: Vec<f64> = (0_u16..)
        .take(count)
        .map(|place| f64::from(step * (f32::from(place) + 0.3 * random.signed())))
        .collect();
    for place in (1..count).rev() {
        row.swap(place, random.below(place + 1));
    }
    row
}

/// Terms of every kind on one row of a vocabulary of bytes, whose target is of another vocabulary.
#[test]
fn the_reference_gradient_of_sorted_terms_is_the_derivative() {
    let bytes: Vec<[u8; 1]> = (0..30).map(|byte| [byte]).collect();
    let kinds = bytes.iter().map(|byte| TokenKind::Bytes(byte));
    let vocab = Vocab::new(kinds.chain([TokenKind::EndOfRecord])).unwrap();
    let mut random = Random(11);
    for (round, step) in [0.02, 0.3, 1.5].into_iter().cycle().take(60).enumerate() {
        let row = apart(&mut random, vocab.live(), step);
        let mut target = Records::<u32>::new(40).unwrap();
        let listed = 1 + u32::try_from(round * 7 % 40).unwrap();
        let code = |random: &mut Random| u8::try_from(random.below(180)).unwrap();
        let listed: Vec<(u32, u8)> = (0..listed)
            .map(|index| (500_000 + index, code(&mut random)))
            .collect();
        target.push(&listed, FLOOR, code(&mut random));
        let target = target.view();
        let terms = [
            Term::Sorted {
                target,
                weight: 0.8,
            },
            Term::Standardised {
                target,
                weight: 0.5,
                temperature: 1.3,
            },
            Term::Labels {
                labels: &[3],
                weight: 0.4,
            },
        ];
        for terms in [&terms[..1], &terms[1..2], &terms] {
            let items = [ItemLoss { tokens: &[], terms }];
            let job = LossJob::new(&vocab, &items).unwrap();
            let (item, place) = job.place(0);
            let loss = |row: &[f64]| reference::loss::row_loss(&vocab, item, place, row);
            let (_, grad) = loss(&row);
            for rank in 0..row.len() {
                let moved = |by: f64| {
                    let mut row = row.clone();
                    row[rank] += by;
                    loss(&row).0
                };
                let slope = (moved(1e-6) - moved(-1e-6)) / 2e-6;
                let off = (slope - grad[rank]).abs();
                assert!(off < 1e-6, "{round}: {slope} against {}", grad[rank]);
            }
        }
    }
}

#[test]
fn sorted_terms_see_neither_which_token_nor_the_scale_of_logits() {
    let bytes: Vec<[u8; 1]> = (0..20).map(|byte| [byte]).collect();
    let kinds = bytes.iter().map(|byte| TokenKind::Bytes(byte));
    let vocab = Vocab::new(kinds.chain([TokenKind::EndOfRecord])).unwrap();
    let mut target = Records::<u32>::new(4).unwrap();
    target.push(&[(7, 90), (8, 20), (70_000, 40)], FLOOR, 60);
    let sorted = [Term::Sorted {
        target: target.view(),
        weight: 1.0,
    }];
    let standardised = [Term::Standardised {
        target: target.view(),
        weight: 1.0,
        temperature: 1.0,
    }];
    let row = apart(&mut Random(3), vocab.live(), 0.4);
    for backend in [Backend::Cpu, Backend::Reference] {
        let loss = |terms: &[Term<'_>], change: &dyn Fn(f64) -> f64, turn: usize| {
            #[expect(clippy::cast_possible_truncation, reason = "logits are f32")]
            let mut logits: Vec<f32> = row.iter().map(|&value| change(value) as f32).collect();
            logits.rotate_left(turn);
            let item = ItemLoss { tokens: &[], terms };
            backend.loss_in_place(&vocab, &[item], &mut logits).unwrap()
        };
        for terms in [&sorted, &standardised] {
            let plain = loss(terms, &|value| value, 0);
            assert!(plain > 0.05, "{plain}");
            assert!((plain - loss(terms, &|value| value, 6)).abs() < 1e-6);
            assert!((plain - loss(terms, &|value| value + 9.0, 0)).abs() < 1e-5);
        }
        let plain = loss(&standardised, &|value| value, 0);
        let steeper = loss(&standardised, &|value| 64.0 * value, 0);
        assert!((plain - steeper).abs() < 2e-3, "{plain}, {steeper}");
        // A student with the target's own log-probabilities has nothing to learn.
        let mut same = vec![-40.0_f32; vocab.live()];
        for (rank, code) in [(3, 40.0), (9, 90.0), (11, 20.0)] {
            same[rank] = -code * std::f32::consts::LN_2 / 16.0 + 5.0;
        }
        let item = ItemLoss {
            tokens: &[],
            terms: &standardised,
        };
        let none = backend.loss_in_place(&vocab, &[item], &mut same).unwrap();
        assert!(none < 1e-6, "{none}");
    }
}

#[test]
fn a_share_on_the_edge_has_the_slope_of_the_reference() {
    // Equal logits and equal codes: every difference is zero, up to what `f32` makes of it.
    let bytes: Vec<[u8; 1]> = (0..7).map(|byte| [byte]).collect();
    let kinds = bytes.iter().map(|byte| TokenKind::Bytes(byte));
    let vocab = Vocab::new(kinds.chain([TokenKind::EndOfRecord])).unwrap();
    let mut target = Records::<u32>::new(8).unwrap();
    let listed: Vec<(u32, u8)> = (0..8).map(|id| (id, 48)).collect();
    target.push(&listed, FLOOR, FLOOR);
    let terms = [
        Term::Sorted {
            target: target.view(),
            weight: 1.0,
        },
        Term::Standardised {
            target: target.view(),
            weight: 1.0,
            temperature: 1.0,
        },
    ];
    let items = [ItemLoss {
        tokens: &[],
        terms: &terms,
    }];
    let job = LossJob::new(&vocab, &items).unwrap();
    for level in Level::present() {
        let mut row = vec![0.7_f32; 8];
        let loss = cpu::loss::rows(level, &job, 0..1, &mut row).unwrap()[0];
        assert!(loss < 1e-12, "{level:?}: {loss}");
        assert!(
            row.iter().all(|value| value.abs() < 1e-12),
            "{level:?}: {row:?}"
        );
    }
}

#[test]
fn rows_past_a_sorted_target_have_no_loss_and_bad_ones_are_refused() {
    let vocab = Vocab::new([TokenKind::Bytes(b"a"), TokenKind::EndOfRecord]).unwrap();
    let mut target = Records::<u32>::new(1).unwrap();
    target.push(&[(9, 30)], FLOOR, 3);
    let run = |labels: &[u32], temperature| {
        let terms = [
            Term::Labels {
                labels,
                weight: 0.0,
            },
            Term::Sorted {
                target: target.view(),
                weight: 1.0,
            },
            Term::Standardised {
                target: target.view(),
                weight: 1.0,
                temperature,
            },
        ];
        let item = ItemLoss {
            tokens: &[],
            terms: &terms,
        };
        let mut grad = vec![1.0_f32, 0.0, 1.0, 0.0];
        grad.truncate(2 * labels.len());
        let loss = Backend::Cpu.loss_in_place(&vocab, &[item], &mut grad);
        loss.map(|loss| (loss, grad))
    };
    let (loss, grad) = run(&[0, 0], 1.0).unwrap();
    assert!(loss > 0.1 && grad[0] > 0.0, "{loss} {grad:?}");
    assert!(grad[2..].iter().all(|&value| value == 0.0), "{grad:?}");
    let length = LossError::Length {
        what: "target positions",
        got: 1,
        expected: 0,
    };
    assert_eq!(run(&[], 1.0).unwrap_err(), length);
    for temperature in [0.0, -1.0, f32::INFINITY] {
        let refused = LossError::Temperature { temperature };
        assert_eq!(run(&[0], temperature).unwrap_err(), refused);
    }
}
