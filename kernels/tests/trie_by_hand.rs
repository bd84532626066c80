//! The trie loss of a small item, class by class as one would write it down.
#![cfg(test)]

use consilium_kernels::loss::{ItemLoss, Term, loss_in_place};
use consilium_kernels::{Backend, Records, TokenKind, Vocab};

const A: usize = 0;
const AB: usize = 1;
const B: usize = 2;
const C: usize = 3;
const END: usize = 4;

/// Rows that predict a, c and the end.
const LOGITS: [f32; 15] = [
    0.3, -0.4, 0.9, 0.1, -1.0, 0.6, 0.2, -0.3, 1.1, 0.4, -0.7, 0.5, 0.8, -0.2, 0.3,
];

fn softmax(row: usize) -> [f64; 5] {
    let exp = [A, AB, B, C, END].map(|rank| f64::from(LOGITS[row * 5 + rank]).exp());
    exp.map(|value| value / exp.iter().sum::<f64>())
}

/// Cross-entropy of unnormalised targets against masses, within a node.
fn node(classes: &[(f64, f64)]) -> f64 {
    let targets: f64 = classes.iter().map(|class| class.0).sum();
    let total: f64 = classes.iter().map(|class| class.1).sum();
    classes
        .iter()
        .filter(|class| class.0 > 0.0)
        .map(|(target, mass)| -target / targets * (mass / total).ln())
        .sum()
}

#[test]
fn every_node_asks_for_what_the_formula_says() {
    let vocab = Vocab::new([
        TokenKind::Bytes(b"a"),
        TokenKind::Bytes(b"ab"),
        TokenKind::Bytes(b"b"),
        TokenKind::Bytes(b"c"),
        TokenKind::EndOfRecord,
    ])
    .unwrap();
    // Codes are 16 times the bits; 255 is none.
    let target = Records::from_columns(
        2,
        b"abbcaa".to_vec(),
        vec![8, 32, 16, 24, 32, 255],
        vec![255, 48, 8],
        vec![64, 80, 72],
    )
    .unwrap();
    let p = |bits: f64| (-bits).exp2();

    let first = softmax(0);
    let begins = node(&[
        (p(0.5), first[A] + first[AB]),
        (p(2.0), first[B]),
        (p(4.0), first[C]), // not listed: the ghost
        (0.0, first[END]),
    ]);
    // After a the model could have gone on to ab; c and the end mean that it stopped; the tail is
    // dropped.
    let stops = node(&[(p(1.0), first[AB]), (p(1.5) + p(3.0), first[A])]);
    let second = softmax(1);
    // The root fix: b after a belongs to the token ab, so it is no target here; a is the ghost.
    let follows = node(&[
        (0.0, second[B]),
        (p(1.5), second[C]),
        (p(3.0), second[END]),
        (p(5.0), second[A] + second[AB]),
    ]);
    let third = softmax(2);
    let ends = node(&[
        (p(2.0), third[A] + third[AB]),
        (p(0.5), third[END]),
        (p(4.5), third[B] + third[C]),
    ]);
    let expected = begins + stops + follows + ends;

    let tokens = [0, 3];
    let terms = [Term::Trie {
        target: target.view(),
        weight: 2.0,
    }];
    let item = ItemLoss {
        tokens: &tokens,
        terms: &terms,
    };
    let mut grad = LOGITS;
    let loss = loss_in_place(&vocab, &[item], &mut grad).unwrap();
    assert!(
        (loss - 2.0 * expected).abs() < 1e-4,
        "{loss} against {}",
        2.0 * expected
    );
    let removed = f64::from(grad[5 + B]);
    assert!(
        (removed - 2.0 * second[B]).abs() < 1e-6,
        "{removed} against {}",
        2.0 * second[B]
    );

    let exact = Backend::Reference
        .loss_in_place(&vocab, &[item], &mut LOGITS.clone())
        .unwrap();
    // Decoding rounds the mass of a code to 2^-31.
    assert!(
        (exact - 2.0 * expected).abs() < 1e-6,
        "{exact} against {}",
        2.0 * expected
    );
}
