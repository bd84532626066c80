//! Defences by hand, and what is said of who was left out.

use consilium_protocol::manifest::{Defence, MergeRule, Training};

use super::{HEAD, SHAPES, adapter, dense, distance, merged, tensor, training};
use crate::fusion::adapter::defence::{Exclusion, Gram, Votes, defend};

/// The Gram matrix of some vectors.
fn gram(vectors: &[Vec<f64>]) -> Gram {
    let inner = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let rows = vectors.iter();
    let values = rows
        .flat_map(|a| vectors.iter().map(move |b| inner(a, b)))
        .collect();
    Gram::new(vectors.len(), values).unwrap()
}

fn decide(defence: Defence, vectors: &[Vec<f64>]) -> Votes {
    let shares = vec![1.0 / vectors.len() as f64; vectors.len()];
    defend(defence, MergeRule::Product, &gram(vectors), &shares)
}

/// `sum share x scale x vector`.
fn centre(votes: &Votes, vectors: &[Vec<f64>]) -> Vec<f64> {
    let mut sum = vec![0.0; vectors[0].len()];
    for (vote, vector) in votes.votes.iter().zip(vectors) {
        for (sum, value) in sum.iter_mut().zip(vector) {
            *sum += vote.share * vote.scale * value;
        }
    }
    sum
}

/// Five that agree more or less, and one far off.
fn crowd() -> Vec<Vec<f64>> {
    vec![
        vec![1.0, 0.1, 0.0],
        vec![0.9, -0.1, 0.1],
        vec![1.1, 0.0, -0.1],
        vec![1.0, 0.2, 0.1],
        vec![0.8, 0.0, 0.2],
        vec![-100.0, 0.0, 0.0],
    ]
}

#[test]
fn clipping_is_to_the_median_norm() {
    let vectors = vec![vec![3.0, 4.0], vec![1.0, 0.0], vec![0.0, 2.0]];
    let votes = decide(Defence::ClipNorm, &vectors);
    let scales: Vec<f64> = votes.votes.iter().map(|vote| vote.scale).collect();
    assert_eq!(scales, [0.4, 1.0, 1.0]);
}

#[test]
fn the_geometric_median_is_where_unit_vectors_cancel() {
    let vectors = &crowd()[..5];
    let votes = decide(Defence::GeometricMedian { iterations: 100 }, vectors);
    let z = centre(&votes, vectors);
    let mut sum = [0.0; 3];
    for vector in vectors {
        let apart: Vec<f64> = vector.iter().zip(&z).map(|(a, b)| a - b).collect();
        let norm = apart.iter().map(|x| x * x).sum::<f64>().sqrt();
        for (sum, x) in sum.iter_mut().zip(apart) {
            *sum += x / norm;
        }
    }
    let left = sum.iter().map(|x| x * x).sum::<f64>().sqrt();
    assert!(left < 0.01, "{left}");
}

#[test]
fn centred_clipping_is_the_published_step() {
    let vectors = crowd();
    let votes = decide(
        Defence::CentredClipping {
            radius_permille: 500,
            iterations: 2,
        },
        &vectors,
    );
    let norms: Vec<f64> = vectors
        .iter()
        .map(|v| v.iter().map(|x| x * x).sum::<f64>().sqrt())
        .collect();
    let mut sorted = norms;
    sorted.sort_by(f64::total_cmp);
    let radius = 0.5 * sorted[2];
    let mut v = [0.0; 3];
    for _ in 0..2 {
        let before = v;
        for x in &vectors {
            let apart: Vec<f64> = x.iter().zip(&before).map(|(x, v)| x - v).collect();
            let distance = apart.iter().map(|x| x * x).sum::<f64>().sqrt();
            for (v, a) in v.iter_mut().zip(apart) {
                *v += a * (radius / distance).min(1.0) / 6.0;
            }
        }
    }
    let got = centre(&votes, &vectors);
    let off = got
        .iter()
        .zip(&v)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f64::max);
    assert!(off < 1e-12, "{got:?} {v:?}");
}

#[test]
fn multi_krum_drops_who_is_far_and_breaks_ties_by_order() {
    let defence = Defence::MultiKrum {
        byzantine: 1,
        keep: 3,
    };
    let votes = decide(defence, &crowd());
    let kept: Vec<usize> = (0..6)
        .filter(|&i| votes.votes[i].excluded.is_none())
        .collect();
    // Sums of squared distances to the three nearest: .09, .11, .12, .12, .21 and over 30,000, by hand.
    assert_eq!(kept.len(), 3);
    assert!(kept.contains(&0) && kept.contains(&1), "{kept:?}");
    assert_eq!(votes.votes[5].excluded, Some(Exclusion::FarFromOthers));
    let total: f64 = votes.votes.iter().map(|vote| vote.share).sum();
    assert!((total - 1.0).abs() < 1e-12);
}

#[test]
fn two_of_five_that_are_alike_share_a_vote_unless_everybody_is_alike() {
    let shares = |vectors: &[Vec<f64>]| -> Vec<f64> {
        let votes = decide(Defence::ClipNorm, vectors);
        votes.votes.iter().map(|vote| vote.share).collect()
    };
    let near = |got: &[f64], expected: [f64; 5]| {
        let off = got.iter().zip(expected).map(|(a, b)| (a - b).abs());
        assert!(off.fold(0.0, f64::max) < 1e-12, "{got:?}");
    };
    let axis = |at: usize| {
        (0..5)
            .map(|i| f64::from(u8::from(i == at)))
            .collect::<Vec<_>>()
    };
    let mut apart: Vec<Vec<f64>> = (0..5).map(axis).collect();
    near(&shares(&apart), [0.2; 5]);
    // A hundred times as long and with a cosine of .96.
    apart[4] = vec![100.0, 30.0, 0.0, 0.0, 0.0];
    near(&shares(&apart), [0.125, 0.25, 0.25, 0.25, 0.125]);
    // Three are more than one liar and its twin.
    apart[3] = vec![1.0, 0.0, 0.3, 0.0, 0.0];
    near(&shares(&apart), [0.2; 5]);
    // One direction for all, as where all have the same kind of text.
    let crowd: Vec<Vec<f64>> = crowd()[..5].to_vec();
    near(&shares(&crowd), [0.2; 5]);
    // Of four, none may lie.
    let four = decide(Defence::ClipNorm, &apart[1..]);
    assert!(
        four.votes
            .iter()
            .all(|vote| (vote.share - 0.25).abs() < 1e-12)
    );
}

#[test]
fn free_riders_and_copies_are_named_and_do_not_count() {
    let mut vectors = crowd();
    vectors[5] = vec![1e-5, 0.0, 0.0];
    vectors.push(vectors[1].clone());
    let suspects = gram(&vectors).suspects();
    assert_eq!(suspects[5], Some(Exclusion::NoUpdate));
    assert_eq!(suspects[6], Some(Exclusion::CopyOf(1)));
    assert!(suspects[..5].iter().all(Option::is_none));
    let votes = decide(Defence::GeometricMedian { iterations: 8 }, &vectors);
    assert!(votes.votes[5].share == 0.0 && votes.votes[6].share == 0.0);
    // Seven members: f is 1, and two are gone already.
    assert_eq!(decide(Defence::Standard, &vectors).trimmed, 0);
    assert_eq!(decide(Defence::Standard, &crowd()).trimmed, 1);
}

#[test]
fn the_report_says_who_weighed_what() {
    let t = Training {
        defence: Defence::Standard,
        ..training(1000, 0)
    };
    let start = adapter(1, 0.2);
    let parts = [adapter(2, 0.3), adapter(3, 0.3), adapter(4, 3.0)];
    let all = [
        ("a", parts[0].as_slice(), 1),
        ("b", &parts[1], 1),
        ("c", &parts[2], 2),
        ("d", &start, 1),
        ("e", &parts[0], 1),
    ];
    let got = merged(&t, &start, None, &all).unwrap();
    let report = &got.report;
    let says = |i: usize| report.members[i].excluded.as_deref().unwrap_or("");
    assert!(says(3).contains("no update"), "{report:?}");
    assert!(says(4).contains("the same update as a"), "{report:?}");
    assert_eq!(report.members[4].flag, report.members[4].excluded);
    assert!((report.members[2].part - 1.0 / 3.0).abs() < 1e-12);
    assert!(report.members[2].scale < 0.5);
    // Norms by dense arithmetic, products with their scale alpha / rank = 2.
    for (member, bytes) in report.members.iter().zip(&parts) {
        let of = |layer: &str| 2.0 * (dense(bytes, layer) - dense(&start, layer));
        let squares: f64 = SHAPES
            .iter()
            .map(|&(layer, _, _)| of(layer).squared_norm_l2())
            .sum();
        let head = (tensor(bytes, HEAD) - tensor(&start, HEAD)).squared_norm_l2();
        let norm = (squares + head).sqrt();
        assert!(
            (member.norm / norm - 1.0).abs() < 1e-6,
            "{} {norm}",
            member.norm
        );
    }
    assert!((report.cosines[4] - 1.0).abs() < 1e-9 && report.cosines[1].abs() < 0.9);
    // The same shares and scales in the whole module.
    let before = tensor(&start, HEAD);
    let mut exact = before.clone();
    for (member, bytes) in report.members.iter().zip(&parts) {
        exact += faer::Scale(member.share * member.scale) * (tensor(bytes, HEAD) - &before);
    }
    assert!(distance(&tensor(&got.adapter, HEAD), &exact) < 1e-6);
}
