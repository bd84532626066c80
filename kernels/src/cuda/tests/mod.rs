//! The device against the reference. Without one these say so and check nothing, or fail where `CONSILIUM_EXPECT_CUDA`
//! is set: `tests/emulator` brings one along.
#![expect(
    clippy::cast_possible_truncation,
    reason = "random numbers below small bounds"
)]

mod adapters;
mod fusion;
mod head;

use half::{bf16, f16};
use proptest::prelude::*;

use crate::Backend;
use crate::code::FLOOR;
use crate::cpu::tests::loss::{Targets, check_close};
use crate::cpu::tests::score::check_position;
use crate::cuda::{Device, ResidentHead, device};
use crate::element::Element;
use crate::error::{LossError, ScoreError};
use crate::loss::{ItemLoss, LossJob, Tail, Term};
use crate::records::{RecordShape, Records};
use crate::reference;
use crate::score::{ItemTokens, RecordsJob, ScoreJob};
use crate::testing::{Case, Random, cases, stored};
use crate::vocab::{TokenKind, Vocab};

fn present() -> Option<&'static Device> {
    match device() {
        Ok(device) => Some(device),
        Err(reason) => {
            let expected = std::env::var_os("CONSILIUM_EXPECT_CUDA").is_some();
            assert!(!expected, "CONSILIUM_EXPECT_CUDA is set, but {reason}");
            println!("NOT TESTED on CUDA: {reason}");
            None
        }
    }
}

/// A vocabulary of many tokens of up to four bytes, none of a common alignment.
fn large(random: &mut Random, tokens: usize) -> Case {
    let bytes: Vec<Vec<u8>> = (0..tokens)
        .map(|_| {
            let length = 1 + random.below(4);
            (0..length)
                .map(|place| (random.below(if place == 0 { 256 } else { 40 })) as u8)
                .collect()
        })
        .collect();
    let kinds = bytes.iter().map(|bytes| TokenKind::Bytes(bytes));
    let rest = [
        TokenKind::EndOfRecord,
        TokenKind::Ignored,
        TokenKind::EndOfRecord,
    ];
    let vocab = Vocab::new(kinds.chain(rest)).unwrap();
    let bound = vocab.byte_tokens() as usize;
    Case {
        tokens: (0..12).map(|_| random.below(bound) as u32).collect(),
        vocab,
        scale: 8.0,
        random: random.clone(),
    }
}

fn check_scores<T: Element>(case: &mut Case, shape: RecordShape, threshold: f32) {
    let vocab = case.vocab.clone();
    let tokens = case.items();
    let tokens: Vec<&[u32]> = tokens.iter().map(Vec::as_slice).collect();
    let score = ScoreJob::new(&vocab, &tokens).unwrap();
    let logits: Vec<T> = stored(&case.rows(score.rows()));
    let exact_branches = Backend::Reference
        .branches_of(&vocab, &tokens, &logits, threshold)
        .unwrap();
    if threshold > 0.0 {
        let found = Backend::Cuda
            .branches_of(&vocab, &tokens, &logits, threshold)
            .unwrap();
        assert_eq!(found, exact_branches);
    }
    let items: Vec<ItemTokens<'_>> = tokens
        .iter()
        .zip(&exact_branches)
        .map(|(tokens, branches)| ItemTokens { tokens, branches })
        .collect();
    let job = RecordsJob::new(score, &items, &shape).unwrap();
    let branch_logits: Vec<T> = stored(&case.rows(job.branch_rows()));
    let mut records = Records::new(shape.k).unwrap();
    let missed = Backend::Cuda
        .records_of(
            &vocab,
            &items,
            &logits,
            &branch_logits,
            &shape,
            &mut records,
        )
        .unwrap();
    let mut position = 0;
    for (index, missed) in missed.iter().enumerate() {
        let item =
            reference::score::Item::with_branches(&job, index, &logits, &branch_logits).unwrap();
        let (exact, exact_missed) = reference::score::distributions(&item);
        for exact in &exact {
            check_position(records.view(), position, exact, &shape);
            position += 1;
        }
        if case.scale < 100.0 {
            assert!((missed.short - exact_missed.short).abs() < 1e-5);
            assert!((missed.long - exact_missed.long).abs() < 1e-5);
        }
    }
    assert_eq!(records.positions(), position);
    let bits = Backend::Cuda
        .token_bits_of(&vocab, &tokens, &logits)
        .unwrap();
    let exact = Backend::Reference
        .token_bits_of(&vocab, &tokens, &logits)
        .unwrap();
    for (bits, exact) in bits.iter().zip(&exact) {
        assert!(
            (bits - exact).abs() <= 2e-6 * exact + 1e-4,
            "{bits} against {exact}"
        );
    }
}

/// Terms of every kind by the bits of `kinds`.
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
    let rows = LossJob::new(&vocab, &items).unwrap().rows();
    let logits: Vec<T> = stored(&case.rows(rows));
    let run = |backend: Backend| {
        let mut grad = logits.clone();
        let loss = backend.loss_in_place(&vocab, &items, &mut grad).unwrap();
        (loss, grad)
    };
    let (fast, exact) = (run(Backend::Cuda), run(Backend::Reference));
    check_close((fast.0, &fast.1), (exact.0, &exact.1), 2.0);
    let again = run(Backend::Cuda);
    assert_eq!(
        fast.0.to_bits(),
        again.0.to_bits(),
        "the loss depends on scheduling"
    );
    let same = fast
        .1
        .iter()
        .zip(&again.1)
        .all(|(a, b)| a.to_f32().to_bits() == b.to_f32().to_bits());
    assert!(same, "the gradient depends on scheduling");
}

proptest! {
    #[test]
    fn scores_agree_with_the_reference(
        mut case in cases(),
        k in 1_usize..8,
        fill_permille in prop::sample::select(&[0, 900, 995, 1000][..]),
        threshold in prop::sample::select(&[0.0, 1e-3, 0.3, 2.0][..]),
    ) {
        if present().is_some() {
            let shape = RecordShape { k, fill_permille };
            check_scores::<f32>(&mut case, shape, threshold);
            check_scores::<bf16>(&mut case, shape, threshold);
            check_scores::<f16>(&mut case, shape, threshold);
        }
    }

    #[test]
    fn losses_agree_with_the_reference(
        mut case in cases(),
        k in 1_usize..6,
        kinds in prop::array::uniform3(0_usize..64),
    ) {
        if present().is_some() {
            check_losses::<f32>(&mut case, k, kinds);
            check_losses::<bf16>(&mut case, k, kinds);
            check_losses::<f16>(&mut case, k, kinds);
        }
    }
}

/// The reference is too slow for vocabularies of several slices, so this holds the device to the CPU.
fn check_large<T: Element>(case: &mut Case) -> (usize, usize) {
    let vocab = case.vocab.clone();
    let tokens: Vec<&[u32]> = vec![&case.tokens, &case.tokens[..0], &case.tokens[3..]];
    let rows: usize = tokens.iter().map(|tokens| tokens.len() + 1).sum();
    let logits: Vec<T> = stored(&case.random.clone().logits(rows * vocab.len(), case.scale));
    let shape = RecordShape {
        k: 16,
        fill_permille: 995,
    };
    let branches = Backend::Cpu
        .branches_of(&vocab, &tokens, &logits, 1e-3)
        .unwrap();
    assert_eq!(
        Backend::Cuda
            .branches_of(&vocab, &tokens, &logits, 1e-3)
            .unwrap(),
        branches
    );
    let items: Vec<ItemTokens<'_>> = tokens
        .iter()
        .zip(&branches)
        .map(|(tokens, branches)| ItemTokens { tokens, branches })
        .collect();
    let count: usize = branches.iter().map(Vec::len).sum();
    let branch_logits: Vec<T> = stored(&case.random.logits(count * vocab.len(), case.scale));
    let [ours, theirs] = [Backend::Cuda, Backend::Cpu].map(|backend| {
        let mut out = Records::new(shape.k).unwrap();
        backend
            .records_of(&vocab, &items, &logits, &branch_logits, &shape, &mut out)
            .unwrap();
        out
    });
    assert_eq!(ours.view().symbols(), theirs.view().symbols());
    let codes = |records: &Records| {
        [
            records.view().codes(),
            records.view().end(),
            records.view().tail(),
        ]
        .concat()
    };
    let pairs = || codes(&ours).into_iter().zip(codes(&theirs));
    assert!(
        pairs().all(|(a, b)| a.abs_diff(b) <= 1),
        "codes more than one step apart"
    );
    let mut start = 0;
    let targets: Vec<[Term<'_>; 1]> = tokens
        .iter()
        .map(|tokens| {
            let bytes: usize = tokens
                .iter()
                .map(|&rank| vocab.token_bytes(rank).len())
                .sum();
            let target = ours.view().slice(start..start + bytes + 1).unwrap();
            start += bytes + 1;
            [Term::Trie {
                target,
                weight: 0.5,
            }]
        })
        .collect();
    let items: Vec<ItemLoss<'_>> = tokens
        .iter()
        .zip(&targets)
        .map(|(tokens, terms)| ItemLoss { tokens, terms })
        .collect();
    let [fast, exact] = [Backend::Cuda, Backend::Cpu].map(|backend| {
        let mut grad = logits.clone();
        let loss = backend.loss_in_place(&vocab, &items, &mut grad).unwrap();
        (loss, grad)
    });
    check_close((fast.0, &fast.1), (exact.0, &exact.1), 1.0);
    (pairs().filter(|(a, b)| a != b).count(), pairs().count())
}

#[test]
fn rows_of_several_slices_agree_with_the_cpu() {
    if present().is_none() {
        return;
    }
    let mut random = Random(3);
    let (mut different, mut all) = (0, 0);
    // Rows start at every place between 16-byte boundaries that their width allows.
    for tokens in [2_000, 16_383, 33_331, 40_002] {
        let mut case = large(&mut random, tokens);
        for (d, n) in [
            check_large::<f32>(&mut case),
            check_large::<bf16>(&mut case),
            check_large::<f16>(&mut case),
        ] {
            different += d;
            all += n;
        }
    }
    println!("{different} of {all} codes differ by one step between CPU and CUDA");
    assert!(different * 1000 <= all, "{different} of {all} codes differ");
}

#[test]
fn the_first_logit_that_is_not_finite_is_named() {
    if present().is_none() {
        return;
    }
    let mut case = large(&mut Random(4), 20_001);
    let (width, tokens) = (case.vocab.len(), case.tokens.clone());
    for (bad, row, column) in [
        (f32::NAN, 3, 17),
        (f32::INFINITY, 0, 0),
        (f32::NEG_INFINITY, 12, 20_002),
    ] {
        let mut logits = case.logits();
        logits[row * width + column] = bad;
        logits[12 * width + 20_002] = bad;
        // Ignored columns are not read.
        logits[5 * width + width - 1] = f32::NAN;
        let refused = Backend::Cuda
            .token_bits(&case.vocab, &tokens, &logits)
            .unwrap_err();
        assert_eq!(refused, ScoreError::NotFinite { row, column });
        let item = ItemLoss {
            tokens: &tokens,
            terms: &[],
        };
        let refused = Backend::Cuda
            .loss_in_place(&case.vocab, &[item], &mut logits)
            .unwrap_err();
        assert_eq!(refused, LossError::NotFinite { row, column });
    }
}

/// A head against losses on logits that were multiplied out here.
fn check_head<T: Element>(device: &'static Device, tokens: usize, width: usize, chunk: usize) {
    let mut case = large(&mut Random(tokens as u64), tokens);
    let vocab = case.vocab.clone();
    let target = case.target(6);
    let terms = [Term::Trie {
        target: target.view(),
        weight: 0.5,
    }];
    let items = [ItemLoss {
        tokens: &case.tokens,
        terms: &terms,
    }];
    let rows = case.tokens.len() + 1;
    let weights: Vec<T> = stored(&case.random.clone().logits(vocab.len() * width, 0.3));
    let states: Vec<T> = stored(&case.random.clone().logits(rows * width, 2.0));
    let dot = |a: &[T], b: &[T]| -> f64 {
        a.iter()
            .zip(b)
            .map(|(a, b)| f64::from(a.to_f32()) * f64::from(b.to_f32()))
            .sum()
    };
    let mut logits: Vec<f32> = states
        .chunks(width)
        .flat_map(|state| {
            weights
                .chunks(width)
                .map(move |weight| dot(state, weight) as f32)
        })
        .collect();
    let exact = Backend::Reference
        .loss_in_place(&vocab, &items, &mut logits)
        .unwrap();
    let head = ResidentHead::new(device, &vocab, &weights, width)
        .unwrap()
        .with_chunk(chunk);
    let mut hidden = head.hidden(&states).unwrap();
    let mut weight_gradient = head.weight_gradient().unwrap();
    let loss = head
        .loss(&items, &mut hidden, Some(&mut weight_gradient))
        .unwrap();
    assert!(
        (loss - exact).abs() <= 1e-5 * exact.abs(),
        "{loss} against {exact}"
    );
    let mut gradient = vec![0.0; rows * width];
    head.gradient(&hidden, &mut gradient).unwrap();
    // The gradient of the logits is rounded to the weights' type before the product.
    let step = match T::DTYPE {
        crate::Dtype::F32 => 1e-5,
        crate::Dtype::Bf16 => 1.0 / 256.0,
        crate::Dtype::F16 => 1.0 / 2048.0,
    };
    for (row, gradient) in gradient.chunks(width).enumerate() {
        let logits = &logits[row * vocab.len()..(row + 1) * vocab.len()];
        for (column, &value) in gradient.iter().enumerate() {
            let terms = || {
                logits
                    .iter()
                    .zip(weights.chunks(width))
                    .map(|(g, w)| f64::from(*g) * f64::from(w[column].to_f32()))
            };
            let (sum, size): (f64, f64) = (terms().sum(), terms().map(f64::abs).sum());
            assert!(
                (f64::from(value) - sum).abs() <= step * size + 1e-6,
                "{value} against {sum} at {row}, {column}"
            );
        }
    }
    let mut of_weights = vec![0.0; vocab.len() * width];
    head.download_weights(&weight_gradient, &mut of_weights)
        .unwrap();
    for rank in (0..vocab.len()).step_by(37) {
        for column in 0..width {
            let terms = || {
                (0..rows).map(|row| {
                    f64::from(logits[row * vocab.len() + rank])
                        * f64::from(states[row * width + column].to_f32())
                })
            };
            let (sum, size): (f64, f64) = (terms().sum(), terms().map(f64::abs).sum());
            let value = f64::from(of_weights[rank * width + column]);
            assert!(
                (value - sum).abs() <= step * size + 1e-6,
                "{value} against {sum} at {rank}, {column}"
            );
        }
    }
}

#[test]
fn a_resident_head_agrees_with_losses_on_its_logits() {
    if let Some(device) = present() {
        check_head::<bf16>(device, 300, 40, 5);
        check_head::<f16>(device, 517, 33, 13);
        check_head::<f32>(device, 129, 21, 4);
    }
}

/// Terms of single columns on rows of several slices, against the CPU.
fn check_listed<T: Element>(case: &mut Case, k: usize, change: impl Fn(&mut [f32])) {
    let vocab = case.vocab.clone();
    let mut logits = case.rows(2);
    logits.chunks_exact_mut(vocab.len()).for_each(change);
    let logits: Vec<T> = stored(&logits);
    let bound = vocab.len() / k;
    let mut listed = Records::<u32>::new(k).unwrap();
    for _ in 0..2 {
        let ids = (0..k).map(|slot| (slot * bound + case.random.below(bound)) as u32);
        let codes: Vec<(u32, u8)> = ids.map(|id| (id, (id % 200) as u8)).collect();
        listed.push(&codes, FLOOR, 40);
    }
    let target = listed.view();
    let terms = [
        Term::Tokens {
            target,
            weight: 0.5,
            tail: Tail::Ghost,
        },
        Term::Sorted {
            target,
            weight: 0.5,
        },
        Term::Standardised {
            target,
            weight: 0.25,
            temperature: 1.0,
        },
    ];
    let item = ItemLoss {
        tokens: &[],
        terms: &terms,
    };
    let [fast, exact] = [Backend::Cuda, Backend::Cpu].map(|backend| {
        let mut grad = logits.clone();
        let loss = backend.loss_in_place(&vocab, &[item], &mut grad).unwrap();
        (loss, grad)
    });
    check_close((fast.0, &fast.1), (exact.0, &exact.1), 1.25);
}

#[test]
fn single_columns_of_long_rows_agree_with_the_cpu() {
    if present().is_none() {
        return;
    }
    let mut case = large(&mut Random(6), 18_001);
    check_listed::<f32>(&mut case, 32, |_| {});
    check_listed::<bf16>(&mut case, 32, |_| {});
    // As many as records hold, where every column is larger than those before it.
    check_listed::<f16>(&mut case, 4096, |row| row.sort_unstable_by(f32::total_cmp));
    // Masked columns, as low as what is left of those that are taken out.
    check_listed::<f32>(&mut case, 500, |row| row[40..].fill(f32::MIN));
}
