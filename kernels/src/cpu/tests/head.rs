//! A head against the same operations on explicit logits, with scratch so small that batches come in
//! several chunks and blocks.

use half::{bf16, f16};
use proptest::prelude::*;

use crate::cpu::tests::loss::Targets;
use crate::element::Element;
use crate::loss::{ItemLoss, LossJob, loss_in_place};
use crate::matmul::{View, ViewMut, Write, ab, abt, atb};
use crate::score::{ItemTokens, branches_of, records_of, token_bits_of};
use crate::testing::{Case, cases, stored};
use crate::{Head, HeadError, LossError, RecordShape, Records, Weights};

/// Largest difference of two gradients.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let differences = a
        .iter()
        .zip(b)
        .map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs());
    differences.fold(
        0.0,
        |most, difference| if difference <= most { most } else { difference },
    )
}

/// Weights and hidden states that give logits of the case's scale.
fn states(case: &mut Case, rows: usize, width: usize) -> (Vec<f32>, Vec<f32>) {
    let weights = case.random.logits(case.vocab.len() * width, 1.0);
    let scale = case.scale.min(30.0);
    (weights, case.random.logits(rows * width, scale))
}

fn small<'a, T: Stored>(case: &'a Case, weights: &'a [T], width: usize) -> Head<'a> {
    let weights = T::weights(weights);
    let mut head = Head::new(&case.vocab, weights, width).unwrap();
    head.scratch = 3 * case.vocab.len() * size_of::<f32>();
    head.block = 7;
    head
}

trait Stored: Element {
    fn weights(values: &[Self]) -> Weights<'_>;
}

impl Stored for f32 {
    fn weights(values: &[Self]) -> Weights<'_> {
        Weights::F32(values)
    }
}

impl Stored for bf16 {
    fn weights(values: &[Self]) -> Weights<'_> {
        Weights::Bf16(values)
    }
}

impl Stored for f16 {
    fn weights(values: &[Self]) -> Weights<'_> {
        Weights::F16(values)
    }
}

fn check_loss<T: Stored>(case: &mut Case, width: usize, kinds: [usize; 3]) {
    let vocab = case.vocab.clone();
    let targets: Vec<Targets> = case
        .items()
        .into_iter()
        .map(|tokens| Targets::of(case, tokens, 4))
        .collect();
    let terms: Vec<Vec<_>> = targets
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
    let (weights, hidden) = states(case, rows, width);
    let weights: Vec<T> = stored(&weights);
    let wide: Vec<f32> = weights.iter().map(|weight| weight.to_f32()).collect();
    let wide = View::new(&wide, vocab.len(), width);
    let mut logits = vec![0.0; rows * vocab.len()];
    abt(
        ViewMut::new(&mut logits, rows, vocab.len()),
        Write::Replace,
        View::new(&hidden, rows, width),
        wide,
        1.0,
    );
    let exact_loss = loss_in_place(&vocab, &items, &mut logits).unwrap();
    let grad = View::new(&logits, rows, vocab.len());
    let mut exact = vec![0.0; hidden.len()];
    ab(
        ViewMut::new(&mut exact, rows, width),
        Write::Replace,
        grad,
        wide,
        1.0,
    );
    let mut exact_weight = vec![1.0; vocab.len() * width];
    atb(
        ViewMut::new(&mut exact_weight, vocab.len(), width),
        Write::Add,
        grad,
        View::new(&hidden, rows, width),
        1.0,
    );

    let head = small(case, &weights, width);
    let mut grad = vec![9.0; hidden.len()];
    let frozen = head.loss(&hidden, &items, &mut grad, None).unwrap();
    assert!(
        (frozen - exact_loss).abs() <= 1e-5 * exact_loss.abs() + 1e-3,
        "{frozen} for {exact_loss}"
    );
    if kinds.iter().any(|kinds| kinds >> 4 > 0) {
        // A sorted term's loss follows its logits, but not its gradient: the last bit of a product
        // may turn a sign.
        return;
    }
    assert!(
        distance(&grad, &exact) < 1e-4,
        "frozen: {grad:?} for {exact:?}"
    );
    let mut grad_weight = vec![1.0; exact_weight.len()];
    let trained = head
        .loss(&hidden, &items, &mut grad, Some(&mut grad_weight))
        .unwrap();
    assert!(
        (trained - exact_loss).abs() <= 1e-5 * exact_loss.abs() + 1e-3,
        "{trained} for {exact_loss}"
    );
    assert!(
        distance(&grad, &exact) < 1e-4,
        "trained: {grad:?} for {exact:?}"
    );
    let scale = f64::from(case.scale.min(30.0)).max(1.0);
    assert!(distance(&grad_weight, &exact_weight) < 1e-4 * scale);
}

proptest! {
    #[test]
    fn losses_are_those_of_explicit_logits(
        mut case in cases(),
        width in 1_usize..20,
        kinds in prop_oneof![
            3 => prop::array::uniform3(0_usize..16),
            1 => prop::array::uniform3(0_usize..64),
        ],
        without_trie in any::<bool>(),
    ) {
        let kinds = if without_trie { kinds.map(|kinds| kinds & !1) } else { kinds };
        check_loss::<f32>(&mut case, width, kinds);
        check_loss::<bf16>(&mut case, width, kinds);
        check_loss::<f16>(&mut case, width, kinds);
    }

    #[test]
    fn scores_are_those_of_explicit_logits(mut case in cases(), width in 1_usize..20) {
        let vocab = case.vocab.clone();
        let tokens = case.items();
        let tokens: Vec<&[u32]> = tokens.iter().map(Vec::as_slice).collect();
        let rows = tokens.iter().map(|tokens| tokens.len() + 1).sum();
        // Small integers: products are exact, so that logits are the same whatever their chunk.
        let whole = |values: Vec<f32>| values.iter().map(|value| (value * 4.0).round()).collect::<Vec<f32>>();
        let (weights, hidden) = states(&mut case, rows, width);
        let (weights, hidden) = (whole(weights), whole(hidden));
        let logits_of = |hidden: &[f32]| {
            let rows = hidden.len() / width;
            let mut logits = vec![0.0; rows * vocab.len()];
            let (hidden, weights) = (View::new(hidden, rows, width), View::new(&weights, vocab.len(), width));
            abt(ViewMut::new(&mut logits, rows, vocab.len()), Write::Replace, hidden, weights, 1.0);
            logits
        };
        let logits = logits_of(&hidden);
        let head = small(&case, &weights, width);
        let found = head.branches(&hidden, &tokens, 1e-3).unwrap();
        prop_assert_eq!(&found, &branches_of(&vocab, &tokens, &logits, 1e-3).unwrap());
        let bits = head.token_bits(&hidden, &tokens).unwrap();
        prop_assert_eq!(bits, token_bits_of(&vocab, &tokens, &logits).unwrap());
        let items: Vec<ItemTokens<'_>> = tokens.iter().zip(&found).map(|(tokens, branches)| ItemTokens { tokens, branches }).collect();
        let count = found.iter().map(Vec::len).sum::<usize>();
        let after = whole(case.clone().random.logits(count * width, 2.0));
        let shape = RecordShape { k: 4, fill_permille: 995 };
        let mut records = [Records::new(4).unwrap(), Records::new(4).unwrap()];
        let missed = head.records(&hidden, &after, &items, &shape, &mut records[0]).unwrap();
        let exact = records_of(&vocab, &items, &logits, &logits_of(&after), &shape, &mut records[1]).unwrap();
        prop_assert_eq!(missed, exact);
        prop_assert_eq!(&records[0], &records[1]);
    }
}

#[test]
fn what_does_not_fit_a_head_is_named() {
    let vocab =
        crate::Vocab::new([crate::TokenKind::Bytes(b"a"), crate::TokenKind::EndOfRecord]).unwrap();
    let weights = [0.5_f32; 4];
    let wrong = |len, width| Head::new(&vocab, Weights::F32(&weights[..len]), width).unwrap_err();
    assert_eq!(
        wrong(3, 2),
        HeadError::Weights {
            got: 3,
            tokens: 2,
            width: 2
        }
    );
    assert_eq!(
        wrong(0, 0),
        HeadError::Weights {
            got: 0,
            tokens: 2,
            width: 0
        }
    );
    let head = Head::new(&vocab, Weights::F32(&weights), 2).unwrap();
    let labels = [0, 1];
    let terms = [crate::loss::Term::Labels {
        labels: &labels,
        weight: 1.0,
    }];
    let items = [ItemLoss {
        tokens: &[],
        terms: &terms,
    }];
    let mut grad = [0.0; 4];
    let length = |what, got, expected| LossError::Length {
        what,
        got,
        expected,
    };
    assert_eq!(
        head.loss(&[0.0; 2], &items, &mut grad, None),
        Err(length("hidden states", 2, 4))
    );
    assert_eq!(
        head.loss(&[0.0; 4], &items, &mut grad[1..], None),
        Err(length("gradient of hidden states", 3, 4))
    );
    assert_eq!(
        head.loss(&[0.0; 4], &items, &mut grad, Some(&mut [0.0])),
        Err(length("gradient of weights", 1, 4))
    );
    let hidden = [0.0, 0.0, f32::NAN, 0.0];
    assert_eq!(
        head.loss(&hidden, &items, &mut grad, None),
        Err(LossError::NotFinite { row: 1, column: 0 })
    );
    assert_eq!(head.loss(&[], &[], &mut [], None), Ok(0.0));
}
