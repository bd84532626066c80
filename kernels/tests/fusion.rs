//! Fused bytes are those of exact arithmetic, on any number of threads and in any order of sources.
#![cfg(test)]

use consilium_kernels::fusion::{Bits, Routing, WEIGHT_UNITY, fuse_item, item_bits, route};
use consilium_kernels::{Backend, FusionError, RecordShape, RecordView, Records, Symbol};
use proptest::prelude::*;

type Position = (Vec<(u8, u8)>, u8, u8);

fn records(k: usize, positions: &[Position]) -> Records {
    let column = |slot: fn(&(u8, u8)) -> u8, unused: fn(&(u8, u8)) -> u8| -> Vec<u8> {
        positions
            .iter()
            .flat_map(|(listed, _, _)| {
                let rest = std::iter::repeat_n(unused(listed.last().unwrap()), k - listed.len());
                listed.iter().map(slot).chain(rest).collect::<Vec<_>>()
            })
            .collect()
    };
    Records::from_columns(
        k,
        column(|slot| slot.0, |last| last.0),
        column(|slot| slot.1, |_| 255),
        positions.iter().map(|position| position.1).collect(),
        positions.iter().map(|position| position.2).collect(),
    )
    .unwrap()
}

/// Three sources of three positions: mixed supports, a missing tail, ties, and a certain end.
fn sources() -> [Records; 3] {
    [
        records(
            3,
            &[
                (vec![(97, 8), (98, 30), (122, 60)], 120, 90),
                (vec![(32, 3)], 70, 255),
                (vec![(10, 16), (11, 16)], 255, 255),
            ],
        ),
        records(
            2,
            &[
                (vec![(97, 20), (99, 14)], 200, 40),
                (vec![(32, 16), (46, 16)], 255, 255),
                (vec![(10, 16), (11, 16)], 255, 255),
            ],
        ),
        records(
            4,
            &[
                (vec![(0, 64), (98, 2), (255, 80)], 100, 64),
                (vec![(101, 5)], 40, 60),
                (vec![(9, 255)], 0, 255),
            ],
        ),
    ]
}

fn fuse(weights: &[u32], sources: &[RecordView<'_>], k: usize, fill_permille: u32) -> Records {
    let mut out = Records::new(k).unwrap();
    fuse_item(
        weights,
        sources,
        &RecordShape { k, fill_permille },
        &mut out,
    )
    .unwrap();
    out
}

#[test]
fn fused_records_are_the_committed_vectors() {
    // Computed apart from this crate, with arbitrary-precision integers and logarithms.
    let sources = sources();
    let views = sources.each_ref().map(Records::view);
    let weights = [40_000, 20_000, 5_536];
    assert_eq!(
        fuse(&weights, &views, 4, 995),
        records(
            4,
            &[
                (vec![(97, 15), (98, 34), (99, 44), (122, 73)], 126, 61),
                (vec![(32, 7), (46, 43), (101, 63)], 71, 118),
                (vec![(10, 18), (11, 18)], 57, 253),
            ]
        )
    );
    assert_eq!(
        fuse(&weights, &views, 2, 900),
        records(
            2,
            &[
                (vec![(97, 15), (98, 34)], 126, 31),
                (vec![(32, 7), (46, 43)], 71, 61),
                (vec![(10, 18), (11, 18)], 57, 253),
            ]
        )
    );
}

#[test]
fn one_source_alone_keeps_its_codes() {
    let [first, ..] = sources();
    let whole = records(3, &[(vec![(97, 8), (98, 38), (122, 60)], 120, 90)]);
    assert_eq!(whole.view().check_mass(), Ok(()));
    assert_eq!(
        fuse(
            &[WEIGHT_UNITY, 0],
            &[whole.view(), first.view().slice(0..1).unwrap()],
            3,
            1000
        ),
        whole
    );
}

#[test]
fn on_a_tie_the_smaller_symbol_is_kept() {
    let tied = records(3, &[(vec![(5, 25), (7, 25), (200, 25)], 255, 255)]);
    let fused = fuse(&[WEIGHT_UNITY], &[tied.view()], 2, 1000);
    assert_eq!(fused.view().symbols(), [5, 7]);
}

#[test]
fn tokens_fuse_like_bytes() {
    let wide = |symbols: &[u32]| {
        Records::from_columns(2, symbols.to_vec(), vec![9, 25], vec![], vec![120]).unwrap()
    };
    let (first, second) = (wide(&[3, 90_000]), wide(&[4, 90_000]));
    let mut out = Records::new(2).unwrap();
    let shape = RecordShape {
        k: 2,
        fill_permille: 1000,
    };
    fuse_item(
        &[40_000, 25_536],
        &[first.view(), second.view()],
        &shape,
        &mut out,
    )
    .unwrap();
    assert_eq!(out.view().symbols(), [3, 90_000]);
    assert!(out.view().end().is_empty());
    const { assert!(!<u32 as Symbol>::HAS_END) };
}

#[test]
fn weights_are_the_committed_vectors() {
    // Exact exponentials and largest remainders, computed apart from this crate.
    let bits = |pairs: &[(u64, u32)]| -> Vec<Bits> {
        pairs
            .iter()
            .map(|&(sixteenths, bytes)| Bits { sixteenths, bytes })
            .collect()
    };
    let softmax = Routing::Softmax { sharpness: 20 };
    let far = bits(&[(1600, 100), (1700, 100), (2500, 100)]);
    let near = bits(&[(1600, 100), (1601, 100), (1620, 100), (1650, 100)]);
    assert_eq!(route(softmax, &far), [50_940, 14_595, 1]);
    assert_eq!(route(softmax, &near), [19_849, 19_603, 15_459, 10_625]);
    assert_eq!(
        route(softmax, &bits(&[(900, 37), (905, 37)])),
        [35_529, 30_007]
    );
    assert_eq!(route(softmax, &bits(&[(90_000, 1), (5, 1)])), [0, 65_536]);
    assert_eq!(route(Routing::MinCe, &far), [65_536, 0, 0]);
    assert_eq!(
        route(Routing::MinCe, &bits(&[(9, 1), (4, 1), (8, 2)])),
        [0, 65_536, 0]
    );
    assert_eq!(route(Routing::Uniform, &far), [21_846, 21_845, 21_845]);
    assert_eq!(route(Routing::Uniform, &[]), [0_u32; 0]);
}

#[test]
fn bits_leave_out_unlabelled_bytes_and_count_the_end() {
    let [first, ..] = sources();
    let view = first.view();
    // Listed byte 98 has code 30; unlisted byte 0 shares the tail 255 with 255 others; the end has
    // code 255.
    let all = item_bits(view, &[98, 0], &[]).unwrap();
    assert_eq!(
        all,
        Bits {
            sixteenths: 30 + 255 + 128 + 255,
            bytes: 3
        }
    );
    let span = item_bits(view, &[98, 0], std::slice::from_ref(&(1..2))).unwrap();
    assert_eq!(
        span,
        Bits {
            sixteenths: 30 + 255,
            bytes: 2
        }
    );
    assert_eq!(
        item_bits(view, &[98], &[]),
        Err(FusionError::Positions {
            source_index: 0,
            got: 3,
            expected: 2
        })
    );
}

#[test]
fn what_cannot_be_fused_is_refused() {
    let [first, second, _] = sources();
    let shape = RecordShape {
        k: 4,
        fill_permille: 995,
    };
    let refused = |weights: &[u32], sources: &[RecordView<'_>], shape: &RecordShape| {
        let mut out = Records::new(4).unwrap();
        let error = fuse_item(weights, sources, shape, &mut out).unwrap_err();
        assert_eq!(out.positions(), 0);
        error
    };
    let both = [first.view(), second.view()];
    assert_eq!(
        refused(&[65_536], &both, &shape),
        FusionError::Weights {
            weights: 1,
            sources: 2
        }
    );
    assert_eq!(
        refused(&[1, 2], &both, &shape),
        FusionError::WeightSum { sum: 3 }
    );
    assert_eq!(
        refused(&[u32::MAX, u32::MAX], &both, &shape),
        FusionError::WeightSum { sum: 8_589_934_590 }
    );
    assert_eq!(refused(&[], &[], &shape), FusionError::WeightSum { sum: 0 });
    let short = [first.view(), second.view().slice(0..2).unwrap()];
    assert_eq!(
        refused(&[65_536, 0], &short, &shape),
        FusionError::Positions {
            source_index: 1,
            got: 2,
            expected: 3
        }
    );
    let other = RecordShape { k: 3, ..shape };
    assert!(matches!(
        refused(&[65_536, 0], &both, &other),
        FusionError::Record(_)
    ));
}

fn position() -> impl Strategy<Value = Position> {
    let listed = prop::collection::btree_map(any::<u8>(), any::<u8>(), 1..9);
    (listed, any::<u8>(), any::<u8>())
        .prop_map(|(listed, end, tail)| (listed.into_iter().collect(), end, tail))
}

/// One to five sources of the same length, long enough to be cut into several tasks at times.
fn any_sources() -> impl Strategy<Value = Vec<Vec<Position>>> {
    (1_usize..6, prop_oneof![Just(3_usize), Just(300)]).prop_flat_map(|(sources, positions)| {
        let pool = prop::collection::vec(position(), 8);
        prop::collection::vec(pool, sources).prop_map(move |pools| {
            pools
                .into_iter()
                .map(|pool| pool.into_iter().cycle().take(positions).collect())
                .collect()
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn neither_threads_nor_order_nor_backend_change_a_byte(
        sources in any_sources(),
        bits in prop::collection::vec(0_u64..4000, 5),
        shuffle in any::<prop::sample::Index>(),
        k in 1_usize..12,
        fill_permille in 0_u32..=1000,
    ) {
        let sources: Vec<Records> = sources.iter().map(|source| records(8, source)).collect();
        let views: Vec<RecordView<'_>> = sources.iter().map(Records::view).collect();
        let bits: Vec<Bits> = bits[..views.len()].iter().map(|&sixteenths| Bits { sixteenths, bytes: 90 }).collect();
        let weights = route(Routing::Softmax { sharpness: 3 }, &bits);
        prop_assert_eq!(weights.iter().sum::<u32>(), WEIGHT_UNITY);
        let expected = fuse(&weights, &views, k, fill_permille);
        prop_assert_eq!(expected.view().check_mass(), Ok(()));

        for threads in [1, 2, 4] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            prop_assert_eq!(&pool.install(|| fuse(&weights, &views, k, fill_permille)), &expected);
        }

        let mut order: Vec<usize> = (0..views.len()).collect();
        order.rotate_left(shuffle.index(views.len()));
        order.reverse();
        let weights_then: Vec<u32> = order.iter().map(|&i| weights[i]).collect();
        let views_then: Vec<RecordView<'_>> = order.iter().map(|&i| views[i]).collect();
        prop_assert_eq!(&fuse(&weights_then, &views_then, k, fill_permille), &expected);

        let mut exact = Records::new(k).unwrap();
        let shape = RecordShape { k, fill_permille };
        Backend::Reference.fuse_item(&weights, &views, &shape, &mut exact).unwrap();
        prop_assert_eq!(exact, expected);
    }

    #[test]
    fn weights_sum_to_unity_and_follow_their_source(
        bits in prop::collection::btree_set(0_u64..100_000, 1..9),
        sharpness in 0_u32..200,
    ) {
        let bits: Vec<Bits> = bits.into_iter().map(|sixteenths| Bits { sixteenths, bytes: 1000 }).collect();
        let reversed: Vec<Bits> = bits.iter().rev().copied().collect();
        for routing in [Routing::Softmax { sharpness }, Routing::MinCe, Routing::Uniform] {
            let weights = route(routing, &bits);
            prop_assert_eq!(weights.iter().sum::<u32>(), WEIGHT_UNITY);
            prop_assert!(weights.is_sorted_by(|a, b| a >= b), "{:?}", weights);
            if sharpness > 0 && routing != Routing::Uniform {
                let mut there = route(routing, &reversed);
                there.reverse();
                prop_assert_eq!(there, weights);
            }
        }
    }
}
