//! Every operation against its formula in f64, and every gradient against differences of that.

use super::{
    Angles, Branch, Heads, RopeTable, Scratch, Segment, attention, bias, head_norm, norm, swiglu,
};
use crate::testing::Random;

const EPS: f32 = 1e-5;

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| f64::from(value)).collect()
}

/// Largest difference relative to the largest reference value.
fn assert_close(what: &str, got: &[f32], want: &[f64]) {
    assert_eq!(got.len(), want.len(), "{what}");
    let scale = want
        .iter()
        .fold(1e-6_f64, |most, value| most.max(value.abs()));
    let pairs = got.iter().zip(want);
    let differences = pairs.map(|(got, want)| (f64::from(*got) - want).abs());
    let worst = differences.fold(0.0, f64::max) / scale;
    assert!(
        worst < 5e-6,
        "{what}: relative error {worst:e} at scale {scale:e}"
    );
}

/// The gradient of `sum of dy f(x)` by central differences.
fn gradient(x: &[f64], dy: &[f32], f: impl Fn(&[f64]) -> Vec<f64>) -> Vec<f64> {
    const STEP: f64 = 1e-5;
    let value = |x: &[f64]| -> f64 {
        let y = f(x);
        y.iter().zip(dy).map(|(y, &dy)| y * f64::from(dy)).sum()
    };
    let mut x = x.to_vec();
    (0..x.len())
        .map(|i| {
            let at = x[i];
            x[i] = at + STEP;
            let above = value(&x);
            x[i] = at - STEP;
            let below = value(&x);
            x[i] = at;
            (above - below) / (2.0 * STEP)
        })
        .collect()
}

fn norm_by_formula(x: &[f64], weight: &[f64]) -> Vec<f64> {
    let of_row = |x: &[f64]| {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        let r = 1.0 / (mean + f64::from(EPS)).sqrt();
        let values = x.iter().zip(weight);
        values.map(|(x, w)| x * r * w).collect::<Vec<_>>()
    };
    x.chunks_exact(weight.len()).flat_map(of_row).collect()
}

#[test]
fn norms_and_their_gradients_are_those_of_the_formula() {
    for width in [1, 5, 16, 33, 40] {
        let mut random = Random(width as u64);
        let rows = 3;
        let [x, dy, start] = [(); 3].map(|()| random.logits(rows * width, 1.0));
        let [weight, dstart] = [(); 2].map(|()| random.logits(width, 2.0));
        let (mut y, mut inverse) = (vec![0.0; x.len()], vec![0.0; rows]);
        norm::forward(&x, &weight, EPS, &mut y, &mut inverse);
        assert_close("norm", &y, &norm_by_formula(&wide(&x), &wide(&weight)));
        let (mut dx, mut dweight) = (start.clone(), dstart.clone());
        norm::backward(&x, &weight, &inverse, &dy, &mut dx, Some(&mut dweight));
        let of_x = gradient(&wide(&x), &dy, |x| norm_by_formula(x, &wide(&weight)));
        let of_weight = gradient(&wide(&weight), &dy, |w| norm_by_formula(&wide(&x), w));
        let sum = |start: &[f32], terms: Vec<f64>| -> Vec<f64> {
            let pairs = start.iter().zip(terms);
            pairs
                .map(|(&start, term)| f64::from(start) + term)
                .collect()
        };
        assert_close("dx", &dx, &sum(&start, of_x));
        assert_close("dweight", &dweight, &sum(&dstart, of_weight));
    }
}

#[test]
fn gated_activations_and_their_gradients_are_those_of_the_formula() {
    for width in [1, 15, 16, 37] {
        let mut random = Random(width as u64);
        let (gate_up, dout) = (random.logits(6 * width, 4.0), random.logits(3 * width, 1.0));
        let formula = |gate_up: &[f64]| -> Vec<f64> {
            let of_row = |row: &[f64]| {
                let of = |i: usize| row[i] / (1.0 + (-row[i]).exp()) * row[width + i];
                (0..width).map(of).collect::<Vec<_>>()
            };
            gate_up.chunks_exact(2 * width).flat_map(of_row).collect()
        };
        let want = formula(&wide(&gate_up));
        let mut out = vec![0.0; 3 * width];
        swiglu::forward(&gate_up, width, &mut out);
        assert_close("swiglu", &out, &want);
        let (mut dgate_up, mut out) = (gate_up.clone(), dout.clone());
        swiglu::backward(&mut dgate_up, width, &mut out);
        assert_close("the output again", &out, &want);
        assert_close(
            "dgate, dup",
            &dgate_up,
            &gradient(&wide(&gate_up), &dout, formula),
        );
    }
}

#[test]
fn biases_are_added_to_every_row() {
    let mut random = Random(1);
    let (b, start) = (random.logits(37, 1.0), random.logits(4 * 37, 1.0));
    let mut y = start.clone();
    bias::add(&b, &mut y);
    let want: Vec<f32> = (0..start.len()).map(|i| start[i] + b[i % 37]).collect();
    assert_eq!(y, want);
    let mut sum = vec![7.0; 37];
    bias::gradient(&start, &mut sum);
    let want: Vec<f64> = (0..37)
        .map(|i| (0..4).map(|row| f64::from(start[row * 37 + i])).sum())
        .collect();
    assert_close("dbias", &sum, &want);
}

/// Heads whose last two values are not turned, in items shorter and longer than the window and than one register.
const LENGTHS: [usize; 4] = [5, 1, 18, 2];
const TURNED: usize = 4;

fn shapes() -> [Heads; 3] {
    let heads = |queries, keys, dim, window| Heads {
        queries,
        keys,
        dim,
        window,
    };
    [
        heads(4, 2, 6, usize::MAX),
        heads(3, 3, 4, 7),
        heads(2, 1, 18, 1),
    ]
}

fn segments() -> Vec<Segment> {
    let mut start = 0;
    let of = |len| {
        start += len;
        Segment {
            start: start - len,
            len,
        }
    };
    LENGTHS.into_iter().map(of).collect()
}

/// Items of more than ten tokens have angles of their own.
fn table() -> RopeTable {
    let angles = |frequencies: [f64; TURNED / 2]| Angles::new(&frequencies, 1.25, 32);
    RopeTable::by_length(angles([1.0, 0.1]), Some(angles([0.5, 0.01])), 10)
}

fn turned(head: &[f64], position: usize, table: &RopeTable, len: usize) -> Vec<f64> {
    let (cosines, sines) = table.angles(len).at(position);
    let half = TURNED / 2;
    let mut out = head.to_vec();
    for pair in 0..half {
        let (c, s) = (f64::from(cosines[pair]), f64::from(sines[pair]));
        out[pair] = head[pair] * c - head[pair + half] * s;
        out[pair + half] = head[pair + half] * c + head[pair] * s;
    }
    out
}

/// A head of a row.
fn head(heads: Heads, rows: &[f64], row: usize, head: usize) -> &[f64] {
    &rows[row * heads.row() + head * heads.dim..][..heads.dim]
}

/// What a row sees: pairs of a key, turned, and a value.
fn attend(query: &[f64], seen: &[(Vec<f64>, &[f64])]) -> Vec<f64> {
    let scale = 1.0 / (query.len() as f64).sqrt();
    let dot = |key: &[f64]| query.iter().zip(key).map(|(q, k)| q * k).sum::<f64>();
    let exps: Vec<f64> = seen
        .iter()
        .map(|(key, _)| (dot(key) * scale).exp())
        .collect();
    let sum: f64 = exps.iter().sum();
    let of = |i: usize| {
        let values = exps.iter().zip(seen);
        values.map(|(e, (_, value))| e / sum * value[i]).sum()
    };
    (0..query.len()).map(of).collect()
}

fn attention_by_formula(heads: Heads, qkv: &[f64]) -> Vec<f64> {
    let table = table();
    let mut out = Vec::new();
    for Segment { start, len } in segments() {
        for i in 0..len {
            for query in 0..heads.queries {
                let key = heads.queries + query / (heads.queries / heads.keys);
                let q = turned(head(heads, qkv, start + i, query), i, &table, len);
                let first = (i + 1).saturating_sub(heads.window);
                let seen: Vec<_> = (first..=i)
                    .map(|j| {
                        let k = turned(head(heads, qkv, start + j, key), j, &table, len);
                        (k, head(heads, qkv, start + j, key + heads.keys))
                    })
                    .collect();
                out.extend(attend(&q, &seen));
            }
        }
    }
    out
}

#[test]
fn attention_and_its_gradient_are_those_of_the_formula() {
    let rows: usize = LENGTHS.iter().sum();
    for heads in shapes() {
        let mut random = Random(heads.dim as u64);
        let (qkv, dout) = (
            random.logits(rows * heads.row(), 2.0),
            random.logits(rows * heads.out(), 1.0),
        );
        let mut out = vec![f32::NAN; dout.len()];
        attention::forward(heads, &segments(), &table(), &qkv, &mut out);
        assert_close("attention", &out, &attention_by_formula(heads, &wide(&qkv)));
        let mut dqkv = vec![f32::NAN; qkv.len()];
        attention::backward(heads, &segments(), &table(), &qkv, &dout, &mut dqkv);
        let want = gradient(&wide(&qkv), &dout, |qkv| attention_by_formula(heads, qkv));
        assert_close("dqkv", &dqkv, &want);
    }
}

#[test]
fn a_branch_sees_its_prefix_and_itself() {
    let rows: usize = LENGTHS.iter().sum();
    let segments = segments();
    let places = [(0, 0), (0, 5), (2, 3), (2, 16), (2, 18), (3, 1)];
    let branches = places.map(|(item, prefix)| Branch {
        segment: segments[item],
        prefix,
    });
    for heads in shapes() {
        let mut random = Random(heads.dim as u64);
        let cache = random.logits(rows * heads.row(), 2.0);
        let qkv = random.logits(branches.len() * heads.row(), 2.0);
        let mut out = vec![f32::NAN; branches.len() * heads.out()];
        attention::branches(heads, &branches, &table(), &cache, &qkv, &mut out);
        let (cache, qkv, table) = (wide(&cache), wide(&qkv), table());
        let mut want = Vec::new();
        for (b, &Branch { segment, prefix }) in branches.iter().enumerate() {
            for query in 0..heads.queries {
                let key = heads.queries + query / (heads.queries / heads.keys);
                let own = |part: usize| head(heads, &qkv, b, part);
                let turn = |head: &[f64], j: usize| turned(head, j, &table, segment.len);
                let first = (prefix + 1).saturating_sub(heads.window);
                let mut seen: Vec<_> = (first..prefix)
                    .map(|j| {
                        let cached = |part: usize| head(heads, &cache, segment.start + j, part);
                        (turn(cached(key), j), cached(key + heads.keys))
                    })
                    .collect();
                seen.push((turn(own(key), prefix), own(key + heads.keys)));
                want.extend(attend(&turn(own(query), prefix), &seen));
            }
        }
        assert_close("branches", &out, &want);
    }
}

#[test]
fn queries_and_keys_are_normalised_head_by_head() {
    let rows = 3;
    for heads in shapes() {
        let (dim, scratch) = (heads.dim, Scratch::default());
        let mut random = Random(dim as u64);
        let [qkv, dqkv] = [(); 2].map(|()| random.logits(rows * heads.row(), 2.0));
        let weights = random.logits(2 * dim, 2.0);
        let formula = |qkv: &[f64], weights: &[f64]| -> Vec<f64> {
            let heads_of = qkv.chunks_exact(dim).enumerate();
            let parts = heads_of.map(|(head, values)| match head % (heads.row() / dim) {
                head if head < heads.queries => norm_by_formula(values, &weights[..dim]),
                head if head < heads.queries + heads.keys => {
                    norm_by_formula(values, &weights[dim..])
                }
                _ => values.to_vec(),
            });
            parts.flatten().collect()
        };
        let mut out = qkv.clone();
        let raw = head_norm::forward(heads, &weights, EPS, &scratch, &mut out);
        assert_close("head norm", &out, &formula(&wide(&qkv), &wide(&weights)));
        let (mut dx, mut dweights) = (dqkv.clone(), vec![0.0; 2 * dim]);
        head_norm::backward(
            heads,
            &weights,
            &raw,
            &scratch,
            &mut dx,
            Some(&mut dweights),
        );
        raw.release(&scratch);
        let of_x = gradient(&wide(&qkv), &dqkv, |qkv| formula(qkv, &wide(&weights)));
        let of_weights = gradient(&wide(&weights), &dqkv, |w| formula(&wide(&qkv), w));
        assert_close("dqkv", &dx, &of_x);
        assert_close("dweights", &dweights, &of_weights);
    }
}
