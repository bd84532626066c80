//! What is not logits, tokens or records of the right size is refused by name, and extreme logits
//! are not.
#![cfg(test)]

use consilium_kernels::loss::{ItemLoss, NO_LABEL, Term, loss_in_place};
use consilium_kernels::score::{Branch, branches, records, token_bits};
use consilium_kernels::{
    LossError, RecordError, RecordShape, RecordView, Records, ScoreError, TokenKind, Vocab,
};

const SHAPE: RecordShape = RecordShape {
    k: 2,
    fill_permille: 995,
};

/// Ranks: a 0, ab 1, b 2, end 3, ignored 4.
fn vocab() -> Vocab {
    Vocab::new([
        TokenKind::Bytes(b"a"),
        TokenKind::Bytes(b"ab"),
        TokenKind::Bytes(b"b"),
        TokenKind::EndOfRecord,
        TokenKind::Ignored,
    ])
    .unwrap()
}

fn target() -> Records {
    Records::from_columns(
        2,
        vec![97, 98, 98, 98, 97, 97],
        vec![16, 16, 0, 255, 255, 255],
        vec![255, 255, 0],
        vec![255; 3],
    )
    .unwrap()
}

/// Loss of one term, and the gradient.
fn loss(
    vocab: &Vocab,
    tokens: &[u32],
    term: Term<'_>,
    logits: &[f32],
) -> Result<(f64, Vec<f32>), LossError> {
    let mut grad = logits.to_vec();
    let terms = &[term];
    let loss = loss_in_place(vocab, &[ItemLoss { tokens, terms }], &mut grad)?;
    Ok((loss, grad))
}

fn trie(target: RecordView<'_>, weight: f32) -> Term<'_> {
    Term::Trie { target, weight }
}

fn labels(labels: &[u32]) -> Term<'_> {
    let weight = 1.0;
    Term::Labels { labels, weight }
}

#[test]
fn a_logit_that_is_not_finite_is_named() {
    let vocab = vocab();
    let target = target();
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for (row, column) in [(0, 0), (0, 3), (1, 2)] {
            let mut logits = vec![0.5; 10];
            logits[row * 5 + column] = bad;
            let expected = ScoreError::NotFinite { row, column };
            let mut out = Records::new(2).unwrap();
            assert_eq!(branches(&vocab, &[1], &logits, 1e-3).unwrap_err(), expected);
            assert_eq!(
                records(&vocab, &[1], &logits, &[], &[], &SHAPE, &mut out).unwrap_err(),
                expected
            );
            assert_eq!(token_bits(&vocab, &[1], &logits).unwrap_err(), expected);
            assert_eq!(out.positions(), 0);
            let expected = LossError::NotFinite { row, column };
            for term in [trie(target.view(), 1.0), labels(&[1, 3])] {
                assert_eq!(loss(&vocab, &[1], term, &logits).unwrap_err(), expected);
            }
        }
        let mut logits = vec![0.5; 10];
        let branch = Branch {
            position: 0,
            taken: 1,
            rank: 0,
        };
        let after = [0.0, 0.0, bad, 0.0, 0.0];
        let mut out = Records::new(2).unwrap();
        assert_eq!(
            records(&vocab, &[1], &logits, &[branch], &after, &SHAPE, &mut out).unwrap_err(),
            ScoreError::BranchNotFinite { row: 0, column: 2 }
        );
        // The logits of ignored tokens are not read: some models mask them with minus infinity.
        logits[4] = bad;
        assert!(records(&vocab, &[1], &logits, &[], &[], &SHAPE, &mut out).is_ok());
    }
}

#[test]
fn a_late_row_that_is_not_finite_is_found_first_to_last() {
    let vocab = vocab();
    let tokens = [1; 100];
    let mut logits = vec![0.5; 505];
    logits[70 * 5 + 1] = f32::NAN;
    logits[33 * 5 + 2] = f32::NAN;
    let mut out = Records::new(2).unwrap();
    assert_eq!(
        records(&vocab, &tokens, &logits, &[], &[], &SHAPE, &mut out).unwrap_err(),
        ScoreError::NotFinite { row: 33, column: 2 }
    );
}

#[test]
fn sizes_and_ranks_that_do_not_fit_are_named() {
    let vocab = vocab();
    let target = target();
    let logits = vec![0.5; 10];
    let length = |what, got, expected| ScoreError::Length {
        what,
        got,
        expected,
    };
    let mut out = Records::new(2).unwrap();
    let mut score = |tokens: &[u32], logits: &[f32], branches: &[Branch], after: &[f32]| {
        records(&vocab, tokens, logits, branches, after, &SHAPE, &mut out).unwrap_err()
    };
    assert_eq!(score(&[1], &logits[1..], &[], &[]), length("logits", 9, 10));
    assert_eq!(
        score(&[1], &logits, &[], &[0.0]),
        length("branch logits", 1, 0)
    );
    for rank in [3, 4, 5, u32::MAX] {
        assert_eq!(
            score(&[rank], &logits, &[], &[]),
            ScoreError::NotAByteToken { position: 0, rank }
        );
    }
    let good = Branch {
        position: 0,
        taken: 1,
        rank: 0,
    };
    for bad in [
        Branch { taken: 0, ..good },
        Branch { taken: 2, ..good },
        Branch { rank: 2, ..good },
        Branch {
            position: 1,
            ..good
        },
        Branch {
            rank: u32::MAX,
            ..good
        },
    ] {
        assert_eq!(
            score(&[1], &logits, &[bad], &logits[..5]),
            ScoreError::Branch { index: 0 }
        );
    }
    assert_eq!(
        score(&[1], &logits, &[good, good], &logits),
        ScoreError::Branch { index: 1 }
    );
    let wider = RecordShape { k: 3, ..SHAPE };
    let mut out = Records::new(2).unwrap();
    assert!(matches!(
        records(&vocab, &[1], &logits, &[], &[], &wider, &mut out),
        Err(ScoreError::Record(RecordError::Slots { .. }))
    ));

    let length = |what, got, expected| LossError::Length {
        what,
        got,
        expected,
    };
    let refused = |tokens: &[u32], logits: &[f32], weight| {
        loss(&vocab, tokens, trie(target.view(), weight), logits).unwrap_err()
    };
    assert_eq!(
        refused(&[1, 2], &logits, 1.0),
        length("target positions", 3, 4)
    );
    assert_eq!(refused(&[1], &logits[1..], 1.0), length("logits", 9, 10));
    assert_eq!(
        refused(&[3], &logits, 1.0),
        LossError::Label {
            position: 0,
            rank: 3
        }
    );
    assert_eq!(refused(&[1], &logits, f32::NAN), LossError::Weight);
    assert_eq!(
        loss(&vocab, &[], labels(&[1, 4]), &logits).unwrap_err(),
        LossError::Label {
            position: 1,
            rank: 4
        }
    );
}

#[test]
fn an_impossible_observation_still_teaches() {
    let vocab = vocab();
    let mut logits = [-1e4, 1e4, 1e4, -1e4, 0.0].repeat(2);
    logits[5..].copy_from_slice(&[1e4, 1e4, 1e4, -1e4, 0.0]);
    // The text "a" and its end, both thought impossible.
    let target =
        Records::from_columns(1, vec![97, 97], vec![0, 255], vec![255, 0], vec![255; 2]).unwrap();
    let (loss, grad) = loss(&vocab, &[0], trie(target.view(), 1.0), &logits).unwrap();
    assert!((loss - 40_000.0).abs() < 5.0, "{loss}");
    assert!((grad[0] + 1.0).abs() < 1e-5, "{grad:?}");
    assert!((grad[8] + 1.0).abs() < 1e-5, "{grad:?}");

    let mut out = Records::new(2).unwrap();
    let found = branches(&vocab, &[1], &logits, 1e-3).unwrap();
    assert!(found.is_empty());
    records(&vocab, &[1], &logits, &found, &[], &SHAPE, &mut out).unwrap();
    assert_eq!(out.view().check_mass(), Ok(()));
}

#[test]
fn a_root_without_target_is_skipped_and_a_row_without_label_has_no_gradient() {
    let vocab = vocab();
    let logits = [0.3, -0.2, 0.1, 0.7, 9.0].repeat(2);
    // Position 0 lists only a byte that no token starts with, and nothing else has mass.
    let target =
        Records::from_columns(1, vec![200, 97], vec![0, 255], vec![255, 0], vec![255; 2]).unwrap();
    let (skipped, grad) = loss(&vocab, &[2], trie(target.view(), 1.0), &logits).unwrap();
    let (end_only, expected) = loss(&vocab, &[], labels(&[NO_LABEL, 3]), &logits).unwrap();
    assert!((skipped - end_only).abs() < 1e-9);
    assert_eq!(grad, expected);
    assert!(expected[..5].iter().all(|&value| value == 0.0));
}
