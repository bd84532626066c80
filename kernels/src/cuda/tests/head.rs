//! A head with a copy on the device against the same head on the host.

use std::sync::Arc;

use half::{bf16, f16};

use super::{large, present};
use crate::cpu::tests::head::Stored;
use crate::cuda::{Device, ResidentHead};
use crate::error::{LossError, ScoreError};
use crate::head::DEVICE_WEIGHTS;
use crate::loss::{ItemLoss, Term};
use crate::records::{RecordShape, Records};
use crate::score::ItemTokens;
use crate::testing::{Case, Random, stored};
use crate::{Dtype, Head};

const WIDTH: usize = 21;

/// Rounding of a gradient of logits to the head's type.
fn step(dtype: Dtype) -> f32 {
    match dtype {
        Dtype::F32 => 0.0,
        Dtype::Bf16 => 1.0 / 512.0,
        Dtype::F16 => 1.0 / 4096.0,
    }
}

/// The head on the host, and with a copy on the device that takes five rows at a time.
fn heads<'a, T: Stored>(
    device: &'static Device,
    case: &'a Case,
    weights: &'a [T],
) -> [Head<'a>; 2] {
    let host = Head::new(&case.vocab, T::weights(weights), WIDTH).unwrap();
    let resident = ResidentHead::upload(device, &case.vocab, weights, WIDTH).unwrap();
    let mut on_device = host.clone();
    on_device.resident = Some(Arc::new(resident.with_chunk(5)));
    [host, on_device]
}

fn check<T: Stored>(device: &'static Device, seed: u64, tokens: usize) {
    let mut case = large(&mut Random(seed), tokens);
    let weights: Vec<T> = stored(&case.random.logits(case.vocab.len() * WIDTH, 0.3));
    let parts = [&case.tokens[..], &[], &case.tokens[3..]].map(<[u32]>::to_vec);
    let tokens: Vec<&[u32]> = parts.iter().map(Vec::as_slice).collect();
    let rows: usize = tokens.iter().map(|tokens| tokens.len() + 1).sum();
    // Hidden states of single precision, which no narrower head can hold.
    let hidden = case.random.logits(rows * WIDTH, 4.0);
    let targets: Vec<Records> = parts
        .iter()
        .map(|tokens| {
            let tokens = tokens.clone();
            Case {
                tokens,
                ..case.clone()
            }
            .target(6)
        })
        .collect();
    let [host, on_device] = heads(device, &case, &weights);

    let found = host.branches(&hidden, &tokens, 1e-3).unwrap();
    assert!(found.iter().any(|branches| !branches.is_empty()));
    assert_eq!(on_device.branches(&hidden, &tokens, 1e-3).unwrap(), found);

    let bits = [&host, &on_device].map(|head| head.token_bits(&hidden, &tokens).unwrap());
    for (ours, exact) in bits[1].iter().zip(&bits[0]) {
        assert!((ours - exact).abs() <= 2e-5 * exact, "{ours} for {exact}");
    }

    let items: Vec<ItemTokens<'_>> = tokens
        .iter()
        .zip(&found)
        .map(|(tokens, branches)| ItemTokens { tokens, branches })
        .collect();
    let count: usize = found.iter().map(Vec::len).sum();
    let after = Random(seed).logits(count * WIDTH, 4.0);
    let shape = RecordShape {
        k: 16,
        fill_permille: 995,
    };
    let [exact, ours] = [&host, &on_device].map(|head| {
        let mut out = Records::new(shape.k).unwrap();
        let missed = head
            .records(&hidden, &after, &items, &shape, &mut out)
            .unwrap();
        (out, missed)
    });
    assert_eq!(ours.0.view().symbols(), exact.0.view().symbols());
    let codes = |records: &Records| {
        let view = records.view();
        [view.codes(), view.end(), view.tail()].concat()
    };
    let pairs = || codes(&ours.0).into_iter().zip(codes(&exact.0));
    assert!(pairs().all(|(a, b)| a.abs_diff(b) <= 1));
    let different = pairs().filter(|(a, b)| a != b).count();
    assert!(
        different * 200 <= pairs().count(),
        "{different} of {} codes",
        pairs().count()
    );
    for (ours, exact) in ours.1.iter().zip(&exact.1) {
        assert!((ours.short - exact.short).abs() < 1e-4 && (ours.long - exact.long).abs() < 1e-4);
    }

    let terms: Vec<[Term<'_>; 1]> = targets
        .iter()
        .map(|target| {
            [Term::Trie {
                target: target.view(),
                weight: 0.5,
            }]
        })
        .collect();
    let items: Vec<ItemLoss<'_>> = tokens
        .iter()
        .zip(&terms)
        .map(|(tokens, terms)| ItemLoss { tokens, terms })
        .collect();
    check_losses([&host, &on_device], &items, &hidden, step(T::DTYPE));
}

fn check_losses(heads: [&Head<'_>; 2], items: &[ItemLoss<'_>], hidden: &[f32], step: f32) {
    let [exact, ours] = heads.map(|head| {
        let mut frozen = vec![7.0; hidden.len()];
        let mut grad = frozen.clone();
        let mut of_weights = vec![1.0; head.vocab().len() * WIDTH];
        let loss = head.loss(hidden, items, &mut frozen, None).unwrap();
        let again = head
            .loss(hidden, items, &mut grad, Some(&mut of_weights))
            .unwrap();
        assert!((loss - again).abs() <= 1e-5 * loss.abs());
        (loss, [frozen, grad, of_weights])
    });
    assert!(
        (ours.0 - exact.0).abs() <= 2e-5 * exact.0.abs(),
        "{} for {}",
        ours.0,
        exact.0
    );
    // A row's gradient of logits has a sum of magnitudes below 5; weights are below 0.3, hidden states below 4.
    for (bound, (ours, exact)) in [1.5, 1.5, 20.0]
        .into_iter()
        .zip(ours.1.iter().zip(&exact.1))
    {
        for (ours, exact) in ours.iter().zip(exact) {
            assert!(
                (ours - exact).abs() <= bound * step + 2e-5,
                "{ours} for {exact}"
            );
        }
    }
}

#[test]
fn a_head_on_the_device_agrees_with_the_host() {
    if let Some(device) = present() {
        check::<f32>(device, 11, 701);
        check::<bf16>(device, 12, 700);
        check::<f16>(device, 13, 699);
    }
}

#[test]
fn a_head_computes_on_the_host_what_kernels_refuse() {
    let Some(device) = present() else { return };
    let mut case = large(&mut Random(14), 90);
    let hidden = case.random.logits(13 * WIDTH, 4.0);
    let weights = case.random.logits(case.vocab.len() * WIDTH, 0.3);
    // Beyond the range of f16, but not of its products in f32.
    let weights: Vec<f16> = stored(&weights);
    let [host, on_device] = heads(device, &case, &weights);
    let huge: Vec<f32> = hidden.iter().map(|state| state * 1e5).collect();
    let bits = |head: &Head<'_>| head.token_bits(&huge, &[&case.tokens]).unwrap();
    assert_eq!(bits(&on_device), bits(&host));
}

#[test]
fn a_head_on_the_device_names_what_is_not_finite() {
    let Some(device) = present() else { return };
    let mut case = large(&mut Random(15), 90);
    let weights = case.random.logits(case.vocab.len() * WIDTH, 0.3);
    let mut hidden = case.random.logits(13 * WIDTH, 4.0);
    hidden[7 * WIDTH + 3] = f32::NAN;
    let [_, head] = heads(device, &case, &weights);
    let tokens: [&[u32]; 1] = [&case.tokens];
    let at = ScoreError::NotFinite { row: 7, column: 0 };
    assert_eq!(head.token_bits(&hidden, &tokens).unwrap_err(), at);
    assert_eq!(head.branches(&hidden, &tokens, 0.1).unwrap_err(), at);
    let items = [ItemLoss {
        tokens: &case.tokens,
        terms: &[],
    }];
    let mut grad = vec![0.0; hidden.len()];
    assert_eq!(
        head.loss(&hidden, &items, &mut grad, None).unwrap_err(),
        LossError::NotFinite { row: 7, column: 0 }
    );
}

#[test]
fn only_a_large_head_goes_to_the_device() {
    let case = large(&mut Random(16), 2_050);
    for (width, is_large) in [(1, false), (DEVICE_WEIGHTS / case.vocab.len() + 1, true)] {
        let weights = vec![bf16::ONE; case.vocab.len() * width];
        let head = Head::best(&case.vocab, bf16::weights(&weights), width).unwrap();
        assert_eq!(head.resident.is_some(), is_large && present().is_some());
    }
}
