//! Merged adapters: the bits of the CPU, the errors of the reference.

use half::{bf16, f16};

use super::present;
use crate::Backend;
use crate::adapters::Merging;
use crate::element::Element;
use crate::error::AdapterError;
use crate::fusion::Robust;
use crate::testing::{Random, stored};

/// Values that often are zero or equal.
fn adapters<T: Element>(random: &mut Random, count: usize, len: usize) -> Vec<Vec<T>> {
    let mut value = |_| match random.below(5) {
        0 => -0.0,
        1 => 0.5,
        _ => random.signed(),
    };
    (0..count)
        .map(|_| stored(&(0..len).map(&mut value).collect::<Vec<f32>>()))
        .collect()
}

fn check<T: Element>(count: usize) {
    let mut random = Random(count as u64);
    let adapters: Vec<Vec<T>> = adapters(&mut random, count, 601);
    let views: Vec<&[T]> = adapters.iter().map(Vec::as_slice).collect();
    let signed: Vec<f64> = (0..count).map(|_| f64::from(random.signed())).collect();
    let weights: Vec<f64> = signed.iter().map(|weight| weight.abs()).collect();
    let thresholds: Vec<f32> = weights.iter().map(|&weight| weight as f32 * 0.5).collect();
    for merging in [
        Merging::Sum { weights: &signed },
        Merging::Robust(Robust::Median),
        Merging::Robust(Robust::TrimmedMean { trim_permille: 260 }),
        Merging::Ties {
            weights: &weights,
            thresholds: &thresholds,
        },
        Merging::Sce { weights: &weights },
    ] {
        let [ours, theirs] = [Backend::Cuda, Backend::Cpu].map(|backend| {
            let mut out = vec![9.0; 601];
            backend.merge(merging, &views, &mut out).unwrap();
            out
        });
        let same = ours
            .iter()
            .zip(&theirs)
            .position(|(a, b)| a.to_bits() != b.to_bits());
        assert_eq!(same, None, "{merging:?} of {count} adapters");
    }
}

#[test]
fn merged_adapters_are_the_bits_of_the_cpu() {
    if present().is_some() {
        for count in [1, 2, 3, 8, 17] {
            check::<f32>(count);
            check::<bf16>(count);
            check::<f16>(count);
        }
    }
}

#[test]
fn adapters_that_cannot_be_merged_are_named() {
    if present().is_none() {
        return;
    }
    let weights = [1.0, 1.0];
    let merging = Merging::Sum { weights: &weights };
    let mut out = vec![0.0; 700];
    let mut first = vec![1.0_f32; 700];
    let mut second = first.clone();
    (first[650], second[650]) = (f32::MAX, f32::MAX);
    let merge = |views: [&[f32]; 2], out: &mut [f32]| Backend::Cuda.merge(merging, &views, out);
    let refused = merge([&first, &second], &mut out);
    assert_eq!(refused, Err(AdapterError::Overflow { index: 650 }));
    (first[500], second[500], second[400]) = (f32::NAN, f32::NAN, f32::NEG_INFINITY);
    let refused = merge([&first, &second], &mut out);
    assert_eq!(
        refused,
        Err(AdapterError::NotFinite {
            adapter: 1,
            index: 400
        })
    );
    assert_eq!(merge([&[], &[]], &mut []), Ok(()));
}
