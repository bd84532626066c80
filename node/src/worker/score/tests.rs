use std::ops::Range;

use consilium_kernels::score::{branches, records};
use consilium_kernels::{RecordShape, RecordView, Records};
use consilium_protocol::shard::{Shard, Symbols};

use super::*;
use crate::worker::data::Item;
use crate::worker::error::WorkError;
use crate::worker::model::{BranchToken, Packed};
use crate::worker::source::LoadedModel;
use crate::worker::testing::{LINES, log_softmax, model, reference};

const SHAPE: RecordShape = RecordShape {
    k: 16,
    fill_permille: 995,
};

fn ids(source: &LoadedModel, item: &Item) -> Vec<u32> {
    let end = source.tokenizer.end_of_record();
    [&[end], item.context.as_slice(), &item.target].concat()
}

/// Logits of every row of one sequence in a pass of its own.
fn full_forward(source: &LoadedModel, ids: &[u32]) -> Vec<f32> {
    let mut packed = Packed::default();
    packed.push(ids.iter().copied());
    let rows: Vec<u32> = (0..u32::try_from(ids.len()).unwrap()).collect();
    let pass = source.model.score(&packed, &rows).unwrap();
    source.model.logits(&pass.hidden).unwrap()
}

fn view(shard: &Shard, item: usize) -> RecordView<'_> {
    let Symbols::Bytes(symbols) = &shard.symbols else {
        panic!("bytes")
    };
    let k = usize::from(shard.header.symbols);
    let all = RecordView::new(k, symbols, &shard.codes, &shard.end, &shard.tail).unwrap();
    all.slice(shard.item(item).unwrap()).unwrap()
}

/// Masses of all bytes, the end and the tail at one position.
fn masses(view: RecordView<'_>, position: usize) -> Vec<f64> {
    let mut masses = vec![0.0; 258];
    let k = view.k();
    let slots = position * k..(position + 1) * k;
    let pairs = view.symbols()[slots.clone()]
        .iter()
        .zip(&view.codes()[slots]);
    for (&symbol, &code) in pairs {
        masses[usize::from(symbol)] =
            consilium_kernels::code::decode(code).max(masses[usize::from(symbol)]);
    }
    masses[256] = consilium_kernels::code::decode(view.end()[position]);
    masses[257] = consilium_kernels::code::decode(view.tail()[position]);
    masses
}

#[test]
fn a_shard_equals_separate_forwards_of_every_item_and_every_stop() {
    let (source, reference) = (model(3), reference());
    let width = source.vocab.len();
    let scored = score_shard(&source, &reference, 0..8, &SHAPE, &mut ()).unwrap();
    let (mut stops, mut bits) = (0, 0.0);
    for (index, item) in reference.items().iter().enumerate() {
        let tokens = source.whole_item(&item.context, &item.target).unwrap();
        let (ids, ranks) = (ids(&source, &tokens), source.ranks(&tokens.target));
        let first = tokens.context.len() * width;
        let logits = full_forward(&source, &ids)[first..].to_vec();
        let found = branches(&source.vocab, &ranks, &logits, 1e-3).unwrap();
        let mut branch_logits = Vec::new();
        for stop in &found {
            let mut ids = ids[..1 + tokens.context.len() + stop.position as usize].to_vec();
            ids.push(source.vocab.id_of_rank()[stop.rank as usize]);
            let all = full_forward(&source, &ids);
            branch_logits.extend_from_slice(&all[all.len() - width..]);
        }
        let mut out = Records::new(SHAPE.k).unwrap();
        records(
            &source.vocab,
            &ranks,
            &logits,
            &found,
            &branch_logits,
            &SHAPE,
            &mut out,
        )
        .unwrap();
        let got = view(&scored.shard, index);
        assert_eq!(got.positions(), item.target.len() + 1);
        for position in 0..got.positions() {
            // Rounding may move a code by one step of 1/16 bit, 4.4 % of its mass.
            for (got, want) in masses(got, position)
                .iter()
                .zip(masses(out.view(), position))
            {
                assert!(
                    (got - want).abs() <= 0.045 * want + 1e-4,
                    "{got} against {want}"
                );
            }
        }
        stops += found.len();
        let live = source.vocab.end_ranks().end as usize;
        let labels = ranks
            .iter()
            .copied()
            .chain([source.vocab.end_ranks().start]);
        for (row, label) in logits.chunks(width).zip(labels) {
            bits -= log_softmax(row, live)[label as usize] / std::f64::consts::LN_2;
        }
    }
    assert!(stops > 20, "{stops} stops test too little");
    assert_eq!(scored.stats.branches, stops);
    let positions: usize = LINES.len() + scored_bytes(&reference);
    assert_eq!(scored.stats.positions, positions);
    assert!(
        (scored.stats.bits / bits - 1.0).abs() < 1e-5,
        "{} against {bits}",
        scored.stats.bits
    );
}

fn scored_bytes(reference: &consilium_protocol::reference::ReferenceSet) -> usize {
    reference.items().iter().map(|item| item.target.len()).sum()
}

#[test]
fn branches_in_one_pass_give_the_logits_of_separate_forwards() {
    let source = model(4);
    let width = source.vocab.len();
    let items: Vec<Item> = LINES
        .map(|line| source.whole_item("", line).unwrap())
        .to_vec();
    let batch = source.batch(&items);
    let pass = source.model.score(&batch.packed, &batch.rows).unwrap();
    let mut tokens = Vec::new();
    let mut expected = Vec::new();
    for (index, item) in (0_u32..).zip(&items) {
        let ids = ids(&source, item);
        for prefix in [1, 2, ids.len() - 1, ids.len()] {
            let token = (index * 37 + u32::try_from(prefix).unwrap()) % 300;
            tokens.push(BranchToken {
                item: index,
                prefix: u32::try_from(prefix).unwrap(),
                token,
            });
            let all = full_forward(&source, &[&ids[..prefix], &[token]].concat());
            expected.extend_from_slice(&all[all.len() - width..]);
        }
    }
    let hidden = source.model.branch_hidden(&pass.kv, &tokens).unwrap();
    let got = source.model.logits(&hidden).unwrap();
    assert_eq!(got.len(), expected.len());
    let scale = expected.iter().fold(0.0_f32, |most, v| most.max(v.abs()));
    for (got, want) in got.iter().zip(&expected) {
        assert!(
            (got - want).abs() <= 1e-4 * scale.max(1.0),
            "{got} against {want}"
        );
    }
}

#[test]
fn the_same_shard_is_the_same_bytes_and_a_shorter_one_agrees() {
    let (source, reference) = (model(5), reference());
    let bytes = |items| {
        let scored = score_shard(&source, &reference, items, &SHAPE, &mut ()).unwrap();
        scored.shard.to_bytes().unwrap()
    };
    assert_eq!(bytes(2..7), bytes(2..7));
    let (long, short) = (
        Shard::parse(&bytes(0..8)).unwrap(),
        Shard::parse(&bytes(5..6)).unwrap(),
    );
    assert_eq!(short.header.items(), 5..6);
    let differs = view(&long, 5)
        .codes()
        .iter()
        .zip(view(&short, 0).codes())
        .filter(|(a, b)| a != b)
        .count();
    assert!(differs <= 4, "{differs} codes differ between batches");
}

#[test]
fn items_outside_of_the_set_are_refused() {
    let (source, reference) = (model(5), reference());
    for items in [0..9, 8..9, 3..3, Range { start: 5, end: 2 }] {
        let result = score_shard(&source, &reference, items, &SHAPE, &mut ());
        assert!(matches!(result, Err(WorkError::Items { .. })), "{result:?}");
    }
}
