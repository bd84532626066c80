//! A head against the same operations on explicit logits, with scratch so small that batches come in
//! several chunks and blocks.

use half::{bf16, f16};
use proptest::prelude::*;

use crate::cpu::Level;
use crate::cpu::tests::loss::Targets;
use crate::element::Element;
use crate::loss::{ItemLoss, LossJob, Term, loss_in_place};
use crate::matmul::{View, ViewMut, Write, ab, abt, atb};
use crate::score::{ItemTokens, branches_of, records_of, token_bits_of};
use crate::testing::{Case, Random, cases, stored};
use crate::{Head, HeadError, LossError, RecordShape, Records, TokenKind, Vocab, Weights};

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

/// A head with room for so many rows of logits.
fn small<'a, T: Stored>(case: &'a Case, weights: &'a [T], width: usize, rows: usize) -> Head<'a> {
    let weights = T::weights(weights);
    let mut head = Head::new(&case.vocab, weights, width).unwrap();
    head.scratch = rows * case.vocab.len() * size_of::<f32>();
    head.block = 7;
    head
}

pub(crate) trait Stored: Element {
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

    let scale = f64::from(case.scale.min(30.0)).max(1.0);
    // A sorted term's loss follows its logits, but not its gradient: the last bit of a product may
    // turn a sign.
    let sorts = kinds.iter().any(|kinds| kinds >> 4 > 0);
    let check = |way: &str, loss: f64, grad: &[f32]| {
        assert!(
            (loss - exact_loss).abs() <= 1e-5 * exact_loss.abs() + 1e-3,
            "{way}: {loss} for {exact_loss}"
        );
        if sorts {
            return;
        }
        assert!(
            distance(grad, &exact) < 1e-4,
            "{way}: {grad:?} for {exact:?}"
        );
    };
    let job = LossJob::new(&vocab, &items).unwrap();
    for level in Level::present() {
        for room in [3, rows + 1, 4 * rows + 40] {
            let mut head = small(case, &weights, width, room);
            head.level = level;
            let way = |name| format!("{name}, {level:?}, room for {room} of {rows}");
            let mut grad = vec![9.0; hidden.len()];
            let loss = head.loss(&hidden, &items, &mut grad, None).unwrap();
            check(&way("frozen"), loss, &grad);
            grad.fill(9.0);
            let folded = match sorts {
                true => None,
                false => head
                    .loss_in_folds(&job, 0..rows, &hidden, &mut grad)
                    .unwrap(),
            };
            if let Some(losses) = folded {
                check(&way("folded"), losses.iter().sum(), &grad);
            }
            let mut grad_weight = vec![1.0; exact_weight.len()];
            let loss = head
                .loss(&hidden, &items, &mut grad, Some(&mut grad_weight))
                .unwrap();
            check(&way("trained"), loss, &grad);
            assert!(sorts || distance(&grad_weight, &exact_weight) < 1e-4 * scale);
        }
    }
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
        let head = small(&case, &weights, width, 3);
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
    let vocab = Vocab::new([TokenKind::Bytes(b"a"), TokenKind::EndOfRecord]).unwrap();
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
    let terms = [Term::Labels {
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

/// A head, hidden states and a trie loss large enough that products use threads.
fn large(
    work: impl FnOnce(&mut Head<'_>, &[f32], &[ItemLoss<'_>]),
    change: impl FnOnce(&mut [f32]),
) {
    let bytes: Vec<[u8; 3]> = (0..2000_u16)
        .map(|i| [(i / 500) as u8, (i / 20 % 25) as u8, (i % 20) as u8])
        .collect();
    let kinds = bytes.iter().map(|token| TokenKind::Bytes(token));
    let vocab = Vocab::new(kinds.chain([TokenKind::EndOfRecord])).unwrap();
    let mut random = Random(4);
    let tokens = (0..129)
        .map(|_| u32::try_from(random.below(2000)).unwrap())
        .collect();
    let mut case = Case {
        vocab: vocab.clone(),
        tokens,
        scale: 1.0,
        random,
    };
    let target = case.one_hot();
    let labels: Vec<u32> = case.tokens.iter().copied().chain([2000]).collect();
    let terms = [
        Term::Trie {
            target: target.view(),
            weight: 0.9,
        },
        Term::Labels {
            labels: &labels,
            weight: 0.1,
        },
    ];
    let item = ItemLoss {
        tokens: &case.tokens,
        terms: &terms,
    };
    let mut weights = case.random.logits(vocab.len() * 128, 0.2);
    change(&mut weights);
    let hidden = case.random.logits(130 * 128, 2.0);
    let mut head = Head::new(&vocab, Weights::F32(&weights), 128).unwrap();
    head.block = 256;
    head.scratch = 5 * 130 * head.block * size_of::<f32>();
    work(&mut head, &hidden, &[item]);
}

#[test]
fn every_way_gives_the_same_bits_on_any_number_of_threads() {
    let work = |head: &mut Head<'_>, hidden: &[f32], items: &[ItemLoss<'_>]| {
        let job = LossJob::new(head.vocab(), items).unwrap();
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            pool.build().unwrap().install(|| {
                let mut grads = [vec![0.0; hidden.len()], vec![0.0; hidden.len()]];
                let folded = head.loss_in_folds(&job, 0..130, hidden, &mut grads[0]);
                let folded = folded.unwrap().expect("few blocks are put off");
                let mut weight = vec![0.0; head.vocab().len() * 128];
                let loss = head.loss(hidden, items, &mut grads[1], Some(&mut weight));
                let values = grads.concat().into_iter().chain(weight).map(f32::to_bits);
                let losses = folded.into_iter().chain([loss.unwrap()]).map(f64::to_bits);
                (values.collect::<Vec<_>>(), losses.collect::<Vec<_>>())
            })
        };
        let single = run(1);
        for threads in [2, 3] {
            assert!(
                run(threads) == single,
                "{threads} threads give other bits than one"
            );
        }
    };
    large(work, |_| {});
}

#[test]
fn every_way_names_the_first_column_that_is_not_finite() {
    let work = |head: &mut Head<'_>, hidden: &[f32], items: &[ItemLoss<'_>]| {
        let mut grad = vec![0.0; hidden.len()];
        let mut weight = vec![0.0; head.vocab().len() * 128];
        let expected = Err(LossError::NotFinite {
            row: 0,
            column: 1234,
        });
        assert_eq!(head.loss(hidden, items, &mut grad, None), expected);
        let trained = head.loss(hidden, items, &mut grad, Some(&mut weight));
        assert_eq!(trained, expected);
    };
    large(work, |weights| {
        weights[1234 * 128] = f32::INFINITY;
        weights[1800 * 128] = f32::NAN;
    });
}
