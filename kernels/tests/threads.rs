//! Scoring and losses give the same bits on any number of threads.
#![cfg(test)]

use consilium_kernels::loss::{ItemLoss, Tail, Term, loss_in_place};
use consilium_kernels::score::{branches, records, token_bits};
use consilium_kernels::{Head, RecordShape, Records, TokenKind, Vocab, Weights};

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

    let width = 24;
    let weights: Vec<f32> = logits
        .iter()
        .take(vocab.len() * width)
        .map(|logit| logit / 8.0)
        .collect();
    let head = Head::new(&vocab, Weights::F32(&weights), width).unwrap();
    let hidden: Vec<f32> = logits
        .iter()
        .rev()
        .take(151 * width)
        .map(|logit| logit / 8.0)
        .collect();
    let symbols: Vec<u32> = (0..151).flat_map(|row| [row, row + 30]).collect();
    let listed = Records::from_columns(2, symbols, vec![20; 302], vec![], vec![30; 151]).unwrap();

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
        let bits = token_bits(&vocab, &tokens, &logits).unwrap();
        let trie = Term::Trie {
            target: out.view(),
            weight: 0.9,
        };
        let listed = Term::Tokens {
            target: listed.view(),
            weight: 0.1,
            tail: Tail::Ghost,
        };
        let mut losses = Vec::new();
        let mut grads = Vec::new();
        for terms in [&[trie, listed][..], &[listed]] {
            let items = [ItemLoss {
                tokens: &tokens,
                terms,
            }];
            let mut grad = logits.clone();
            losses.push(loss_in_place(&vocab, &items, &mut grad).unwrap().to_bits());
            let mut grad_hidden = vec![0.0; hidden.len()];
            losses.push(
                head.loss(&hidden, &items, &mut grad_hidden, None)
                    .unwrap()
                    .to_bits(),
            );
            grads.extend(grad.into_iter().chain(grad_hidden).map(f32::to_bits));
        }
        (found, out, missed, losses, grads, bits.to_bits())
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
