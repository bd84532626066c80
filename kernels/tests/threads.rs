//! Scoring and losses give the same bits on any number of threads.
#![cfg(test)]

use consilium_kernels::loss::trie_loss;
use consilium_kernels::score::{branches, records, token_bits};
use consilium_kernels::{RecordShape, Records, TokenKind, Vocab};

#[test]
fn scores_and_gradients_do_not_depend_on_the_number_of_threads() {
    let pairs: Vec<[u8; 2]> = (0..200_u8).map(|i| [i % 20, i / 20]).collect();
    let kinds = pairs.iter().map(|pair| TokenKind::Bytes(pair));
    let singles: Vec<[u8; 1]> = (0..20).map(|byte| [byte]).collect();
    let kinds = kinds.chain(singles.iter().map(|byte| TokenKind::Bytes(byte)));
    let vocab = Vocab::new(kinds.chain([TokenKind::EndOfRecord])).unwrap();
    let mut state = 1_u64;
    let mut random = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        state >> 40
    };
    let tokens: Vec<u32> = (0..150).map(|_| (random() % 220) as u32).collect();
    let logits: Vec<f32> = (0..151 * vocab.len())
        .map(|_| random() as f32 / (1 << 21) as f32)
        .collect();

    let run = || {
        let found = branches(&vocab, &tokens, &logits, 1e-3).unwrap();
        assert!(!found.is_empty());
        let after: Vec<f32> = logits
            .iter()
            .rev()
            .copied()
            .cycle()
            .take(found.len() * vocab.len())
            .collect();
        let shape = RecordShape {
            k: 16,
            fill_permille: 995,
        };
        let mut out = Records::new(16).unwrap();
        let missed = records(&vocab, &tokens, &logits, &found, &after, &shape, &mut out).unwrap();
        let mut grad = vec![0.0; logits.len()];
        let loss = trie_loss(&vocab, &tokens, out.view(), &logits, 0.9, &mut grad).unwrap();
        let bits = token_bits(&vocab, &tokens, &logits).unwrap();
        let grad: Vec<u32> = grad.iter().map(|value| value.to_bits()).collect();
        (found, out, missed, loss.to_bits(), grad, bits.to_bits())
    };
    let on = |threads| {
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap()
            .install(run)
    };
    let single = on(1);
    for threads in [2, 4] {
        assert!(
            on(threads) == single,
            "{threads} threads give other bits than one"
        );
    }
}
