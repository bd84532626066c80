//! A head in fewer bits gives, bit for bit, the losses and gradients of the f32 head of its decoded weights.

#![cfg(test)]

use consilium_kernels::loss::{ItemLoss, Tail, Term};
use consilium_kernels::quant::{Format, Packed};
use consilium_kernels::{Head, Records, TokenKind, Vocab, Weights};

const TOKENS: usize = 1300;
const WIDTH: usize = 72;
const ROWS: usize = 5;

/// Evenly spread values in -1..1.
fn values(len: usize, seed: usize) -> Vec<f32> {
    let spread = |i: usize| (i * 7919 + seed * 104_729) % 2003;
    (0..len).map(|i| spread(i) as f32 / 1001.5 - 1.0).collect()
}

fn loss(vocab: &Vocab, weights: Weights<'_>, term: Term<'_>) -> (u64, Vec<f32>) {
    let hidden = values(ROWS * WIDTH, 3);
    let mut grad = vec![0.0; hidden.len()];
    let items = [ItemLoss {
        tokens: &[],
        terms: &[term],
    }];
    let head = Head::best(vocab, weights, WIDTH).unwrap();
    let loss = head.loss(&hidden, &items, &mut grad, None).unwrap();
    (loss.to_bits(), grad)
}

#[test]
fn a_packed_head_equals_the_f32_head_of_its_decoded_weights() {
    let spellings: Vec<String> = (1..TOKENS).map(|id| format!("t{id}")).collect();
    let tokens = spellings
        .iter()
        .map(|text| TokenKind::Bytes(text.as_bytes()));
    let vocab = Vocab::new(std::iter::once(TokenKind::EndOfRecord).chain(tokens)).unwrap();
    let weights = values(TOKENS * WIDTH, 1);
    let labels = [7, 600, 1299, 511, 512];
    let listed: Vec<u32> = (0..5).flat_map(|row| [row, 512 + row, 1200]).collect();
    let target = Records::from_columns(3, listed, vec![40; 15], vec![], vec![60; 5]).unwrap();
    let terms = [
        Term::Labels {
            labels: &labels,
            weight: 0.5,
        },
        Term::Tokens {
            target: target.view(),
            weight: 0.5,
            tail: Tail::Ghost,
        },
    ];
    for format in [Format::F32, Format::Bf16, Format::Int8, Format::Nf4] {
        let packed = Packed::new(format, &weights, WIDTH);
        let mut decoded = vec![0.0; weights.len()];
        packed.matrix().decode(&mut decoded);
        for term in terms {
            let got = loss(&vocab, Weights::Packed(packed.matrix()), term);
            let want = loss(&vocab, Weights::F32(&decoded), term);
            assert_eq!(got, want, "{format:?}");
        }
    }
    let plain = loss(&vocab, Weights::F32(&weights), terms[0]);
    let four_bits = Packed::new(Format::Nf4, &weights, WIDTH);
    let four_bits = loss(&vocab, Weights::Packed(four_bits.matrix()), terms[0]);
    assert_ne!(plain, four_bits);
}
