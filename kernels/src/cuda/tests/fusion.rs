//! Fusion on the device: the bytes of the reference.

use super::{large, present};
use crate::Backend;
use crate::fusion::{Mixing, Robust, WEIGHT_UNITY};
use crate::records::{RecordShape, RecordView, Records, Symbol};
use crate::testing::{Case, Random};

const SHAPES: [(usize, usize, u32); 5] = [
    (1, 1, 0),
    (3, 2, 900),
    (5, 256, 1000),
    (16, 16, 995),
    (40, 64, 1000),
];

fn check<S: Symbol>(mixing: Mixing<'_>, sources: &[Records<S>], shape: &RecordShape) {
    let views: Vec<RecordView<'_, S>> = sources.iter().map(Records::view).collect();
    let [ours, theirs] = [Backend::Cuda, Backend::Reference].map(|backend| {
        let mut out = Records::new(shape.k).unwrap();
        backend.fuse(mixing, &views, shape, &mut out).unwrap();
        out
    });
    assert_eq!(
        ours,
        theirs,
        "{mixing:?} of {} sources, {shape:?}",
        sources.len()
    );
}

/// Checks what `mixing` gives for every shape, of `count` sources of bytes and of tokens.
fn check_shapes(
    count: usize,
    mixing: impl Fn(&mut Random, usize) -> Vec<u32>,
    robust: Option<Robust>,
) {
    let mut case = large(&mut Random(8 + count as u64), 400);
    case.tokens.truncate(5);
    for (slots, k, fill_permille) in SHAPES {
        let shape = RecordShape { k, fill_permille };
        let bytes: Vec<Records> = (0..count).map(|_| case.target(slots)).collect();
        let tokens: Vec<Records<u32>> = (0..count).map(|_| case.token_target(slots)).collect();
        let run = |case: &mut Case, positions: usize, check: &dyn Fn(Mixing<'_>)| {
            let weights = mixing(&mut case.random, positions);
            match robust {
                Some(rule) => check(Mixing::Robust(rule)),
                None if weights.len() == count => check(Mixing::Item(&weights)),
                None => check(Mixing::Positions(&weights)),
            }
        };
        let positions = bytes[0].positions();
        run(&mut case, positions, &|mixing| {
            check(mixing, &bytes, &shape);
        });
        let positions = tokens[0].positions();
        run(&mut case, positions, &|mixing| {
            check(mixing, &tokens, &shape);
        });
    }
}

#[test]
fn fused_bytes_are_those_of_the_reference() {
    if present().is_some() {
        for weights in [vec![65_536], vec![0, 65_536, 0], vec![30_000, 35_535, 1]] {
            check_shapes(weights.len(), |_, _| weights.clone(), None);
        }
    }
}

#[test]
fn fused_bytes_with_weights_per_position_are_those_of_the_reference() {
    if present().is_some() {
        // Weights of zero come and go, so that a source is heard at some positions only.
        check_shapes(
            3,
            |random, positions| {
                let row = |random: &mut Random| {
                    let first = [0, 20_000, WEIGHT_UNITY][random.below(3)];
                    let second = [0, WEIGHT_UNITY - first][random.below(2)];
                    [first, second, WEIGHT_UNITY - first - second]
                };
                (0..positions).flat_map(|_| row(random)).collect()
            },
            None,
        );
    }
}

#[test]
fn robust_bytes_are_those_of_the_reference() {
    if present().is_some() {
        for count in [1, 2, 3, 4, 7] {
            check_shapes(count, |_, _| Vec::new(), Some(Robust::Median));
            let rule = Robust::TrimmedMean { trim_permille: 300 };
            check_shapes(count, |_, _| Vec::new(), Some(rule));
        }
    }
}
