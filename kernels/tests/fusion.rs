//! Fused bytes are those of exact arithmetic, on any number of threads and in any order of sources.
#![cfg(test)]

use consilium_kernels::fusion::{
    Bits, Doubt, Evidence, Mixing, Robust, Routing, Scope, WEIGHT_UNITY, competent, entropies,
    fuse, fuse_item, item_bits, route, route_causal, route_positions,
};
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

fn fused(weights: &[u32], sources: &[RecordView<'_>], k: usize, fill_permille: u32) -> Records {
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
        fused(&weights, &views, 4, 995),
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
        fused(&weights, &views, 2, 900),
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
        fused(
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
    let fused = fused(&[WEIGHT_UNITY], &[tied.view()], 2, 1000);
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
            expected: 2
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
    assert_eq!(refused(&[], &[], &shape), FusionError::Nothing);
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

#[test]
fn weights_and_trims_that_mean_nothing_are_refused() {
    let [first, second, _] = sources();
    let shape = RecordShape {
        k: 4,
        fill_permille: 995,
    };
    let both = [first.view(), second.view()];
    let refused = |mixing| {
        let mut out = Records::new(4).unwrap();
        let error = fuse(mixing, &both, &shape, &mut out).unwrap_err();
        assert_eq!(out.positions(), 0);
        error
    };
    let half = [32_768; 6];
    assert_eq!(
        refused(Mixing::Positions(&half[..5])),
        FusionError::Weights {
            weights: 5,
            expected: 6
        }
    );
    assert_eq!(
        refused(Mixing::Positions(&[32_768, 32_768, 65_536, 0, 1, 65_536])),
        FusionError::WeightSum { sum: 65_537 }
    );
    let trim = |trim_permille| Mixing::Robust(Robust::TrimmedMean { trim_permille });
    assert_eq!(refused(trim(500)), FusionError::Trim { permille: 500 });
    let mut out = Records::<u8>::new(4).unwrap();
    assert_eq!(
        fuse(Mixing::Robust(Robust::Median), &[], &shape, &mut out),
        Err(FusionError::Nothing)
    );
    assert!(fuse(trim(499), &both, &shape, &mut out).is_ok());
}

#[test]
fn a_lying_minority_does_not_move_the_median() {
    let honest = records(2, &[(vec![(97, 1), (98, 80)], 200, 96)]);
    let liar = records(2, &[(vec![(0, 0), (1, 200)], 255, 255)]);
    let views = [honest.view(), liar.view(), honest.view()];
    for robust in [
        Robust::Median,
        Robust::TrimmedMean { trim_permille: 334 },
        Robust::TrimmedMean { trim_permille: 400 },
    ] {
        let shape = RecordShape {
            k: 2,
            fill_permille: 1000,
        };
        let mut out = Records::new(2).unwrap();
        fuse(Mixing::Robust(robust), &views, &shape, &mut out).unwrap();
        let symbols = out.view().symbols();
        assert_eq!(symbols, [97, 98], "{robust:?}");
        assert_eq!(out.view().codes()[0], 1, "{robust:?}");
    }
}

#[test]
fn causal_weights_know_only_what_came_before() {
    let [first, second, _] = sources();
    let views = [first.view(), second.view()];
    let weights = route_causal(20, &views, &[98, 0]).unwrap();
    // Byte 98: code 30 against a 255th of the tail 40; byte 0 is listed by nobody.
    let (a, b) = ([30_u64, 30 + 255 + 128], [168_u64, 168 + 383]);
    let by_hand = |bytes: u32| {
        let at = bytes as usize - 1;
        route(
            Routing::Softmax { sharpness: 20 },
            &[a[at], b[at]].map(|sixteenths| Bits { sixteenths, bytes }),
        )
    };
    assert_eq!(weights[..2], [32_768, 32_768]);
    assert_eq!(weights[2..4], by_hand(1));
    assert_eq!(weights[4..], by_hand(2));
    assert_eq!(
        route_causal(20, &views, &[98]),
        Err(FusionError::Positions {
            source_index: 0,
            got: 3,
            expected: 2
        })
    );
    assert_eq!(route_causal(20, &[], &[98]), Ok(vec![]));
}

#[test]
fn a_geometric_mean_is_that_of_the_distributions() {
    // Halves and eighths: the products are powers of two that codes say exactly.
    let first = records(2, &[(vec![(97, 16), (98, 16)], 255, 255)]);
    let second = records(2, &[(vec![(97, 48), (98, 16)], 255, 255)]);
    let shape = RecordShape {
        k: 2,
        fill_permille: 1000,
    };
    let mut out = Records::new(2).unwrap();
    let views = [first.view(), second.view()];
    fuse(
        Mixing::Geometric(&[32_768, 32_768]),
        &views,
        &shape,
        &mut out,
    )
    .unwrap();
    // sqrt(1/2 1/8) = 1/4 against sqrt(1/2 1/2) = 1/2: a third and two thirds.
    let expected = [1.0_f64 / 3.0, 2.0 / 3.0].map(consilium_kernels::code::encode);
    assert_eq!(out.view().codes(), expected);
    // All weight on one source is that source.
    out.clear();
    fuse(Mixing::Geometric(&[65_536, 0]), &views, &shape, &mut out).unwrap();
    assert_eq!(out.view().codes(), [16, 16]);
    assert_eq!(
        fuse(Mixing::Geometric(&[1, 2, 3]), &views, &shape, &mut out),
        Err(FusionError::Weights {
            weights: 3,
            expected: 2
        })
    );
}

#[test]
fn confidence_prefers_the_surer_of_equals_and_scope_says_what_is_known() {
    let sure = records(2, &[(vec![(97, 16)], 255, 16), (vec![(97, 0)], 255, 255)]);
    let broad = records(
        2,
        &[
            (vec![(97, 16), (98, 16)], 255, 255),
            (vec![(97, 48), (98, 3)], 255, 255),
        ],
    );
    let views = [sure.view(), broad.view()];
    let evidence = Evidence::of_bytes(&views, b"a", &[]).unwrap();
    let measured: Vec<Vec<u64>> = views.iter().map(|view| entropies(*view)).collect();
    let rows: Vec<u64> = (0..2)
        .flat_map(|p| [measured[0][p], measured[1][p]])
        .collect();
    let confidence = Doubt {
        permille: 2000,
        of: &rows,
    };
    let plain = route_positions(20, Scope::Before, &evidence, None);
    assert_eq!(plain, route_causal(20, &views, b"a").unwrap());
    let factored = route_positions(20, Scope::Before, &evidence, Some(confidence));
    // Nothing is known at the first position: exp(-2 H) alone, H = 5 and 1 bits.
    assert_eq!(plain[..2], [32_768, 32_768]);
    assert!(factored[0] < 100, "{factored:?}");
    // Entropies of .00 and .54 bits: exp(-1.08) is a quarter of the sum.
    assert!((16_500..16_800).contains(&factored[3]), "{factored:?}");
    let item = route_positions(20, Scope::Item, &evidence, None);
    assert_eq!(item[..2], item[2..]);
    assert_eq!(
        item[..2],
        route(Routing::Softmax { sharpness: 20 }, &evidence.totals())
    );
    // Half a bit and one bit per byte.
    let apart = [16, 32].map(|sixteenths| Bits {
        sixteenths,
        bytes: 2,
    });
    assert_eq!(competent(&apart, 499), [0]);
    assert_eq!(competent(&apart, 500), [0, 1]);
}

/// Any codes at all: masses far from one, ties, certain ends.
fn wild() -> impl Strategy<Value = Position> {
    let listed = prop::collection::btree_map(any::<u8>(), any::<u8>(), 1..9);
    (listed, any::<u8>(), any::<u8>())
        .prop_map(|(listed, end, tail)| (listed.into_iter().collect(), end, tail))
}

/// Codes of a distribution, as a producer rounds them, off by one at times: the total lies at either
/// side of what keeps every code.
fn honest() -> impl Strategy<Value = Position> {
    let listed = prop::collection::btree_map(any::<u8>(), 0.0..1.0_f64, 1..9);
    (listed, 0.0..0.02_f64, 0.0..0.02_f64, 1..6_i32, -1..=1_i8).prop_map(
        |(listed, end, tail, power, step)| {
            let sum: f64 = listed.values().map(|mass| mass.powi(4 * power)).sum();
            let rest = 1.0 - end - tail;
            let encode = consilium_kernels::code::encode;
            let listed: Vec<(u8, u8)> = listed
                .iter()
                .map(|(&byte, mass)| (byte, encode(rest * mass.powi(4 * power) / sum)))
                .map(|(byte, code)| (byte, code.saturating_add_signed(step)))
                .collect();
            (listed, encode(end), encode(tail))
        },
    )
}

/// One to nine sources of the same length, long enough to be cut into several tasks at times.
fn any_sources() -> impl Strategy<Value = Vec<Vec<Position>>> {
    (1_usize..10, prop_oneof![Just(3_usize), Just(300)]).prop_flat_map(|(sources, positions)| {
        let pool = prop::collection::vec(prop_oneof![wild(), honest()], 8);
        prop::collection::vec(pool, sources).prop_map(move |pools| {
            pools
                .into_iter()
                .map(|pool| pool.into_iter().cycle().take(positions).collect())
                .collect()
        })
    })
}

/// The same positions as records of tokens: some symbols far beyond the bytes.
fn as_tokens(k: usize, source: &[Position]) -> Records<u32> {
    let source = records(k, source);
    let view = source.view();
    let symbols = view.symbols();
    let spread = symbols.iter().map(|&symbol| u32::from(symbol).pow(2));
    Records::from_columns(
        k,
        spread.collect(),
        view.codes().to_vec(),
        vec![],
        view.tail().to_vec(),
    )
    .unwrap()
}

/// Every mixing over any backend, thread count and order of sources gives the same records.
fn always_the_same<S: Symbol>(
    sources: &[RecordView<'_, S>],
    weights: &[u32],
    by_position: &[u32],
    shape: &RecordShape,
    shuffle: prop::sample::Index,
) -> Result<(), TestCaseError> {
    let run = |backend: Backend, mixing: Mixing<'_>, sources: &[RecordView<'_, S>]| {
        let mut out = Records::new(shape.k).unwrap();
        backend.fuse(mixing, sources, shape, &mut out).unwrap();
        out
    };
    let count = sources.len();
    let mut order: Vec<usize> = (0..count).collect();
    order.rotate_left(shuffle.index(count));
    order.reverse();
    let reordered = |weights: &[u32]| -> Vec<u32> {
        let rows = weights.chunks_exact(count);
        rows.flat_map(|row| order.iter().map(|&i| row[i])).collect()
    };
    let (weights_then, by_position_then) = (reordered(weights), reordered(by_position));
    let sources_then: Vec<_> = order.iter().map(|&i| sources[i]).collect();
    let mut only = vec![0; count];
    only[shuffle.index(count)] = WEIGHT_UNITY;
    let only_then = reordered(&only);
    let robust = [
        Robust::Median,
        Robust::TrimmedMean { trim_permille: 0 },
        Robust::TrimmedMean { trim_permille: 250 },
    ];
    let mixings = [
        (Mixing::Item(weights), Mixing::Item(&weights_then)),
        (Mixing::Item(&only), Mixing::Item(&only_then)),
        (
            Mixing::Positions(by_position),
            Mixing::Positions(&by_position_then),
        ),
        (
            Mixing::Geometric(by_position),
            Mixing::Geometric(&by_position_then),
        ),
    ];
    let robust = robust.map(|rule| (Mixing::Robust(rule), Mixing::Robust(rule)));
    for (mixing, mixing_then) in mixings.into_iter().chain(robust) {
        let expected = run(Backend::Reference, mixing, sources);
        prop_assert_eq!(expected.view().check_mass(), Ok(()));
        for threads in [1, 2, 4] {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            let got = pool.install(|| run(Backend::Cpu, mixing, sources));
            prop_assert_eq!(&got, &expected, "{:?} on {} threads", mixing, threads);
        }
        let got = run(Backend::Cpu, mixing_then, &sources_then);
        prop_assert_eq!(&got, &expected, "{:?} in another order", mixing);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn neither_threads_nor_order_nor_backend_change_a_byte(
        sources in any_sources(),
        bits in prop::collection::vec(0_u64..4000, 9),
        shuffle in any::<prop::sample::Index>(),
        k in 1_usize..12,
        slots in prop_oneof![Just(8_usize), Just(16)],
        fill_permille in prop_oneof![Just(1000_u32), Just(995), 0_u32..1000],
    ) {
        let shape = RecordShape { k, fill_permille };
        let bits = bits[..sources.len()].iter().map(|&sixteenths| Bits { sixteenths, bytes: 90 });
        let weights = route(Routing::Softmax { sharpness: 3 }, &bits.collect::<Vec<_>>());
        let bytes: Vec<Records> = sources.iter().map(|source| records(slots, source)).collect();
        let bytes: Vec<RecordView<'_>> = bytes.iter().map(Records::view).collect();
        let tokens: Vec<_> = sources.iter().map(|source| as_tokens(slots, source)).collect();
        let tokens: Vec<RecordView<'_, u32>> = tokens.iter().map(Records::view).collect();
        let target: Vec<u8> = sources[0][1..].iter().map(|position| position.0[0].0).collect();
        let by_position = route_causal(20, &bytes, &target).unwrap();
        always_the_same(&bytes, &weights, &by_position, &shape, shuffle)?;
        always_the_same(&tokens, &weights, &by_position, &shape, shuffle)?;
        // The slots of the sources and of the result are the same: what can be copied is copied.
        let shape = RecordShape { k: slots, fill_permille };
        always_the_same(&bytes, &weights, &by_position, &shape, shuffle)?;
        always_the_same(&tokens, &weights, &by_position, &shape, shuffle)?;
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
