//! Which implementations this machine has, and that every one of them gives what the reference gives.
#![cfg(test)]

use consilium_kernels::adapters::Merging;
use consilium_kernels::fusion::{Mixing, Robust};
use consilium_kernels::loss::{ItemLoss, NO_LABEL, Tail, Term};
use consilium_kernels::score::ItemTokens;
use consilium_kernels::{
    Backend, CudaError, Head, RecordShape, RecordView, Records, TokenKind, Vocab, Weights,
};

const WIDTH: usize = 3;
const SHAPE: RecordShape = RecordShape {
    k: 4,
    fill_permille: 995,
};

/// Backends present; those that are not are named.
fn backends() -> Vec<Backend> {
    for (backend, reason) in Backend::absent() {
        println!("NOT TESTED: {backend:?}, {reason}");
    }
    Backend::present()
}

fn vocab() -> Vocab {
    let bytes = [&b"a"[..], b"ab", b"abc", b"b", b"c", b"ca"];
    let tokens = bytes.map(TokenKind::Bytes).into_iter();
    Vocab::new(tokens.chain([TokenKind::EndOfRecord, TokenKind::Ignored])).unwrap()
}

/// Multiples of 1/4 between -2 and 2, whose products are exact.
fn values(seed: usize, count: usize) -> Vec<f32> {
    let value = |index| ((index * 37 + seed * 11 + index * index * 5) % 17) as f32 / 4.0 - 2.0;
    (0..count).map(value).collect()
}

/// `hidden weights^T`
fn logits(weights: &[f32], hidden: &[f32]) -> Vec<f32> {
    let dot = |state: &[f32], weight: &[f32]| state.iter().zip(weight).map(|(a, b)| a * b).sum();
    hidden
        .chunks(WIDTH)
        .flat_map(|state| weights.chunks(WIDTH).map(move |weight| dot(state, weight)))
        .collect()
}

#[test]
fn an_absent_backend_says_why_and_errs() {
    for (backend, reason) in Backend::absent() {
        println!("NOT TESTED: {backend:?}, {reason}");
        let vocab = vocab();
        let refused = backend.token_bits(&vocab, &[0], &[0.0; 16]).unwrap_err();
        assert_eq!(refused.to_string(), reason.to_string());
        assert!(!Backend::present().contains(&backend));
        let weights = values(1, vocab.len() * WIDTH);
        let refused = Head::resident(&vocab, Weights::F32(&weights), WIDTH).unwrap_err();
        assert_eq!(refused.to_string(), reason.to_string());
        if cfg!(not(feature = "cuda")) {
            assert_eq!(reason, CudaError::NotBuilt);
        }
    }
}

#[test]
fn every_backend_present_gives_the_same_bits() {
    let vocab = Vocab::new([
        TokenKind::Bytes(b"a"),
        TokenKind::Bytes(b"ab"),
        TokenKind::EndOfRecord,
    ])
    .unwrap();
    assert!(Backend::present().contains(&Backend::best()));
    for backend in backends() {
        // Both rows are uniform over three tokens.
        let bits = backend.token_bits(&vocab, &[1], &[2.5; 6]).unwrap();
        assert!(
            (bits - 2.0 * 3.0_f64.log2()).abs() < 1e-5,
            "{backend:?}: {bits}"
        );
    }
}

/// Every method of a head against the reference on explicit logits.
fn check_head(name: &str, head: &Head<'_>, weights: &[f32]) {
    let vocab = head.vocab();
    let tokens: [&[u32]; 2] = [&[2, 0, 5], &[1]];
    let hidden = values(2, 6 * WIDTH);
    let rows = logits(weights, &hidden);
    let exact = Backend::Reference;
    let branches = head.branches(&hidden, &tokens, 1e-3).unwrap();
    let expected = exact.branches_of(vocab, &tokens, &rows, 1e-3).unwrap();
    assert_eq!(branches, expected, "{name}");
    let bits = head.token_bits(&hidden, &tokens).unwrap();
    let expected = exact.token_bits_of(vocab, &tokens, &rows).unwrap();
    for (bits, expected) in bits.iter().zip(&expected) {
        assert!(
            (bits - expected).abs() < 1e-4,
            "{name}: {bits} for {expected}"
        );
    }
    let pairs = tokens.iter().zip(&branches);
    let items: Vec<ItemTokens<'_>> = pairs
        .map(|(tokens, branches)| ItemTokens { tokens, branches })
        .collect();
    let after = values(3, branches.iter().map(Vec::len).sum::<usize>() * WIDTH);
    let mut records = [(); 2].map(|()| Records::new(SHAPE.k).unwrap());
    let missed = head
        .records(&hidden, &after, &items, &SHAPE, &mut records[0])
        .unwrap();
    let of_branches = logits(weights, &after);
    let expected = exact
        .records_of(vocab, &items, &rows, &of_branches, &SHAPE, &mut records[1])
        .unwrap();
    assert_eq!(records[0], records[1], "{name}");
    for (missed, expected) in missed.iter().zip(&expected) {
        assert!((missed.short - expected.short).abs() < 1e-5, "{name}");
        assert!((missed.long - expected.long).abs() < 1e-5, "{name}");
    }

    let target = records[0].view();
    let bytes = [0..7, 7..10].map(|positions| target.slice(positions).unwrap());
    let listed = listed();
    let [first, second] = [0..4, 4..6].map(|rows| listed.view().slice(rows).unwrap());
    for choice in CHOICES {
        let terms = [
            choose(choice, bytes[0], first, &[6, 0, NO_LABEL, 3]),
            choose(choice, bytes[1], second, &[1, 6]),
        ];
        let pairs = tokens.iter().zip(&terms);
        let items: Vec<ItemLoss<'_>> = pairs
            .map(|(tokens, terms)| ItemLoss { tokens, terms })
            .collect();
        check_head_loss(&format!("{name}, {choice:?}"), head, weights, &items);
    }
}

/// Kinds of terms that are tried together, as [`choose`] counts them.
const CHOICES: [&[usize]; 7] = [
    &[0],
    &[1],
    &[2],
    &[3],
    &[4],
    &[1, 2, 3, 4],
    &[0, 1, 2, 3, 4],
];

/// Trie, labels, tokens, sorted, standardised.
fn choose<'a>(
    choice: &[usize],
    bytes: RecordView<'a>,
    listed: RecordView<'a, u32>,
    labels: &'a [u32],
) -> Vec<Term<'a>> {
    let term = |&kind: &usize| match kind {
        0 => Term::Trie {
            target: bytes,
            weight: 0.5,
        },
        1 => Term::Labels {
            labels,
            weight: 0.25,
        },
        2 => Term::Tokens {
            target: listed,
            weight: 0.5,
            tail: Tail::Ghost,
        },
        3 => Term::Sorted {
            target: listed,
            weight: 0.75,
        },
        _ => Term::Standardised {
            target: listed,
            weight: 0.3,
            temperature: 1.5,
        },
    };
    choice.iter().map(term).collect()
}

/// Six positions of three tokens, the end of a record, the ignored token and all kinds of tails among them.
fn listed() -> Records<u32> {
    let symbols = (0..6).flat_map(|position| [position, position + 1, 7]);
    let codes = [20, 61, 43].repeat(6);
    let tails = vec![30, 255, 0, 60, 90, 16];
    Records::from_columns(3, symbols.collect(), codes, vec![], tails).unwrap()
}

/// The loss of a head and its gradients against the reference on explicit logits.
fn check_head_loss(name: &str, head: &Head<'_>, weights: &[f32], items: &[ItemLoss<'_>]) {
    let vocab = head.vocab();
    let hidden = values(2, 6 * WIDTH);
    let mut grad = logits(weights, &hidden);
    let expected = Backend::Reference
        .loss_in_place(vocab, items, &mut grad)
        .unwrap();
    let mut grad_hidden = vec![9.0; hidden.len()];
    let mut grad_weight = vec![1.0; weights.len()];
    let loss = head.loss(&hidden, items, &mut grad_hidden, Some(&mut grad_weight));
    let loss = loss.unwrap();
    assert!(
        (loss - expected).abs() < 1e-4,
        "{name}: {loss} for {expected}"
    );
    let columns = vocab.len();
    for (index, ours) in grad_hidden.iter().enumerate() {
        let (row, at) = (index / WIDTH, index % WIDTH);
        let sum: f32 = (0..columns)
            .map(|token| grad[row * columns + token] * weights[token * WIDTH + at])
            .sum();
        assert!((ours - sum).abs() < 1e-4, "{name}: {ours} for {sum}");
    }
    for (index, ours) in grad_weight.iter().enumerate() {
        let (token, at) = (index / WIDTH, index % WIDTH);
        let sum: f32 = (0..6)
            .map(|row| grad[row * columns + token] * hidden[row * WIDTH + at])
            .sum();
        assert!((ours - 1.0 - sum).abs() < 1e-4, "{name}: {ours} for {sum}");
    }
}

#[test]
fn every_backend_present_gives_the_losses_of_the_reference() {
    let vocab = vocab();
    let symbols = (0..7).flat_map(|position| [b'a' + position % 3, b'd']);
    let codes = [12, 70].repeat(7);
    let bytes = Records::from_columns(2, symbols.collect(), codes, vec![50; 7], vec![40; 7]);
    let bytes = bytes.unwrap();
    let listed = listed();
    let target = listed.view().slice(1..5).unwrap();
    // Rows of exact quarters, one of them far from the others.
    let mut rows = logits(&values(1, vocab.len() * WIDTH), &values(2, 4 * WIDTH));
    rows[vocab.len() + 2] = 400.0;
    for choice in CHOICES {
        let terms = choose(choice, bytes.view(), target, &[2, NO_LABEL, 5, 6]);
        let item = ItemLoss {
            tokens: &[2, 0, 5],
            terms: &terms,
        };
        let run = |backend: Backend| {
            let mut grad = rows.clone();
            let loss = backend.loss_in_place(&vocab, &[item], &mut grad);
            (loss.unwrap(), grad)
        };
        let exact = run(Backend::Reference);
        for backend in backends() {
            let (loss, grad) = run(backend);
            let off = (loss - exact.0).abs();
            assert!(
                off < 1e-5 + 1e-6 * exact.0.abs(),
                "{backend:?}, {choice:?}: {loss}"
            );
            for (at, (ours, exact)) in grad.iter().zip(&exact.1).enumerate() {
                assert!(
                    (ours - exact).abs() < 4e-6,
                    "{backend:?}, {choice:?}, {at}: {ours} for {exact}"
                );
            }
        }
    }
}

#[test]
fn a_head_gives_what_the_reference_gives_wherever_it_is() {
    let vocab = vocab();
    let weights = values(1, vocab.len() * WIDTH);
    let host = Head::new(&vocab, Weights::F32(&weights), WIDTH).unwrap();
    check_head("host", &host, &weights);
    if backends().contains(&Backend::Cuda) {
        let head = Head::resident(&vocab, Weights::F32(&weights), WIDTH).unwrap();
        check_head("device", &head, &weights);
    }
}

#[test]
fn every_backend_present_fuses_to_the_same_bytes() {
    // Shares of 1/2, 1/8 and 1/16 for three symbols, 1/16 for the end and 1/4 for the tail.
    let source = |seed: u8| {
        let mut codes = [16, 48, 64];
        codes.rotate_left(usize::from(seed));
        let symbols = (0..5).flat_map(|position| [10 * seed + position, 40, 90]);
        Records::from_columns(
            3,
            symbols.collect(),
            codes.repeat(5),
            vec![64; 5],
            vec![32; 5],
        )
    };
    let sources = [0, 1, 2].map(|seed| source(seed).unwrap());
    let views: Vec<_> = sources.iter().map(Records::view).collect();
    let item = [30_000, 0, 35_536];
    let positions: Vec<u32> = (0..5)
        .flat_map(|position| [65_536 - 13_000 * position, 13_000 * position, 0])
        .collect();
    for mixing in [
        Mixing::Item(&item),
        Mixing::Positions(&positions),
        Mixing::Geometric(&positions),
        Mixing::Robust(Robust::Median),
        Mixing::Robust(Robust::TrimmedMean { trim_permille: 334 }),
    ] {
        let fused = |backend: Backend| {
            let mut out = Records::new(SHAPE.k).unwrap();
            backend.fuse(mixing, &views, &SHAPE, &mut out).unwrap();
            out
        };
        for backend in backends() {
            assert_eq!(fused(backend), fused(Backend::Reference), "{backend:?}");
        }
    }
}

#[test]
fn every_backend_present_merges_alike() {
    let adapters = [values(1, 300), values(2, 300), values(3, 300)];
    let views: Vec<&[f32]> = adapters.iter().map(Vec::as_slice).collect();
    let weights = [0.5, 0.25, 0.25];
    for merging in [
        Merging::Sum { weights: &weights },
        Merging::Robust(Robust::Median),
        Merging::Ties {
            weights: &weights,
            thresholds: &[0.5; 3],
        },
        Merging::Sce { weights: &weights },
    ] {
        let merged = |backend: Backend| {
            let mut out = vec![9.0; 300];
            backend.merge(merging, &views, &mut out).unwrap();
            out
        };
        let exact = merged(Backend::Reference);
        for backend in backends() {
            for (ours, exact) in merged(backend).iter().zip(&exact) {
                assert!((ours - exact).abs() < 1e-6, "{backend:?}, {merging:?}");
            }
        }
    }
}
