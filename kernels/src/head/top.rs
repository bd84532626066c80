//! The largest logits of hidden states, and what a loss on these alone gives back.

use std::ops::Range;

use rayon::prelude::*;

use super::Head;
use crate::backend::NotFinite;
use crate::cpu::{Level, largest_columns, log_mass};
use crate::error::LossError;
use crate::loss::{check_length, graph};

/// The K largest logits of each row, in descending order, the lower rank on a tie.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TopLogits {
    /// Logits of a row: K, or all tokens of a smaller vocabulary.
    pub k: usize,
    /// Their ranks, `[P, k]`.
    pub ranks: Vec<u32>,
    /// The logits, `[P, k]`.
    pub logits: Vec<f32>,
    /// `ln sum exp` of all logits of each row, `[P]`: what a logit is to be lessened by for its
    /// log-probability.
    pub log_mass: Vec<f64>,
}

/// An item of [`Head::graph`].
#[derive(Clone, Debug)]
pub struct GraphItem<'a> {
    /// Its rows among the hidden states.
    pub rows: Range<usize>,
    /// A teacher's largest logits at its own positions of the item, `[T, k]`, each row in descending
    /// order.
    pub teacher: &'a [f32],
    /// Factor of loss and gradient.
    pub weight: f32,
}

impl Head<'_> {
    /// The `k` largest logits of hidden states `[P, d]`, on the host.
    ///
    /// # Errors
    /// Where a length does not fit, or a logit is not finite.
    pub fn top(&self, hidden: &[f32], k: usize) -> Result<TopLogits, LossError> {
        let whole = hidden.len() / self.width * self.width;
        check_length("hidden states", hidden.len(), whole)?;
        let (tokens, live, level) = (self.vocab.len(), self.vocab.live(), self.level);
        let mut top = TopLogits {
            k: k.min(live),
            ..TopLogits::default()
        };
        self.chunks(hidden, |rows, _, logits| {
            let found: Vec<Result<_, NotFinite>> = logits
                .par_chunks_exact(tokens)
                .zip(rows)
                .map(|(logits, row)| of_row(level, &logits[..live], k, row))
                .collect();
            for row in found {
                let (ranks, logits, mass) = row?;
                top.ranks.extend(ranks);
                top.logits.extend(logits);
                top.log_mass.push(mass);
            }
            Ok::<(), LossError>(())
        })?;
        Ok(top)
    }

    /// The sum of [`graph`] over items, of the `k` largest logits of each of their rows; adds its
    /// gradient to that of the hidden states `[P, d]`, and of the weights `[V, d]` where these are
    /// trained. Rows of items may be shared: several teachers of one item are several items.
    ///
    /// # Errors
    /// As [`graph`] and [`Self::top`], or where rows are not among the hidden states.
    pub fn graph(
        &self,
        hidden: &[f32],
        k: usize,
        items: &[GraphItem<'_>],
        grad_hidden: &mut [f32],
        mut grad_weight: Option<&mut [f32]>,
    ) -> Result<f64, LossError> {
        if items.is_empty() {
            return Ok(0.0);
        }
        let (top, width) = (self.top(hidden, k)?, self.width);
        check_length("gradient of hidden states", grad_hidden.len(), hidden.len())?;
        if let Some(grad) = &grad_weight {
            check_length("gradient of weights", grad.len(), self.weights.len())?;
        }
        let rows = hidden.len() / width;
        let mut total = 0.0;
        for item in items {
            check_length("rows of an item", item.rows.end.max(rows), rows)?;
            let slots = item.rows.start * top.k..item.rows.end * top.k;
            let teacher = narrowed(item.teacher, k, top.k)?;
            let (loss, slopes) = graph(&top.logits[slots.clone()], &teacher, top.k)?;
            total += f64::from(item.weight) * loss;
            for ((&slope, &rank), slot) in slopes.iter().zip(&top.ranks[slots.clone()]).zip(slots) {
                let (rank, row) = (rank as usize, slot / top.k.max(1));
                let (slope, values) = (item.weight * slope, row * width..(row + 1) * width);
                self.add_row(rank, slope, &mut grad_hidden[values.clone()]);
                if let Some(grad) = &mut grad_weight {
                    let grad = &mut grad[rank * width..(rank + 1) * width];
                    for (grad, hidden) in grad.iter_mut().zip(&hidden[values]) {
                        *grad += slope * hidden;
                    }
                }
            }
        }
        Ok(total)
    }
}

/// Ranks and logits of one row, and the logarithm of its mass.
type TopRow = (Vec<u32>, Vec<f32>, f64);

fn of_row(level: Level, logits: &[f32], k: usize, row: usize) -> Result<TopRow, NotFinite> {
    let mass = log_mass(level, logits).map_err(|column| NotFinite { row, column })?;
    let ranks = largest_columns(level, logits, k);
    let values = ranks.iter().map(|&rank| logits[rank as usize]).collect();
    Ok((ranks, values, mass))
}

/// The first `k` of every `from` values.
fn narrowed(values: &[f32], from: usize, k: usize) -> Result<Vec<f32>, LossError> {
    let rows = values.len().checked_div(from).unwrap_or(0);
    check_length("teacher's logits", values.len(), rows * from)?;
    let rows = values.chunks_exact(from.max(1));
    Ok(rows.flat_map(|row| &row[..k]).copied().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::head::Weights;
    use crate::testing::Random;
    use crate::vocab::{TokenKind, Vocab};

    const WIDTH: usize = 5;
    const ROWS: usize = 6;

    fn vocab() -> Vocab {
        let letters = b"abcdefghijklmnop".chunks_exact(1).map(TokenKind::Bytes);
        Vocab::new(letters.chain([TokenKind::EndOfRecord, TokenKind::Ignored])).unwrap()
    }

    #[test]
    fn the_largest_are_those_of_whole_rows_and_no_ignored_token_is_among_them() {
        let (vocab, mut random) = (vocab(), Random(3));
        let weights = random.logits(vocab.len() * WIDTH, 1.0);
        let hidden = random.logits(ROWS * WIDTH, 1.0);
        let head = Head::new(&vocab, Weights::F32(&weights), WIDTH).unwrap();
        for k in [1, 4, 17, 40] {
            let top = head.top(&hidden, k).unwrap();
            assert_eq!(top.k, k.min(17));
            for (row, hidden) in hidden.chunks_exact(WIDTH).enumerate() {
                let mut logits: Vec<f32> = weights[..17 * WIDTH]
                    .chunks_exact(WIDTH)
                    .map(|weights| weights.iter().zip(hidden).map(|(a, b)| a * b).sum())
                    .collect();
                let mass: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
                logits.sort_unstable_by(|a, b| b.total_cmp(a));
                let found = &top.logits[row * top.k..(row + 1) * top.k];
                for (got, expected) in found.iter().zip(&logits) {
                    assert!((got - expected).abs() < 1e-5, "{k}: {got} for {expected}");
                }
                assert!((top.log_mass[row] - mass.ln()).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn the_gradient_of_the_graph_reaches_hidden_states_and_weights() {
        let (vocab, mut random) = (vocab(), Random(4));
        let weights = random.logits(vocab.len() * WIDTH, 1.0);
        let hidden = random.logits(ROWS * WIDTH, 1.0);
        let k = 4;
        let teachers: Vec<Vec<f32>> = (0..3)
            .map(|_| {
                let mut rows = Vec::new();
                for _ in 0..3 {
                    let mut row = random.logits(k, 2.0);
                    row.sort_unstable_by(|a, b| b.total_cmp(a));
                    rows.extend(row);
                }
                rows
            })
            .collect();
        let items: Vec<GraphItem<'_>> = [(0..2, 0.5), (2..6, 1.0), (2..6, 0.25)]
            .into_iter()
            .zip(&teachers)
            .map(|((rows, weight), teacher)| GraphItem {
                rows,
                teacher,
                weight,
            })
            .collect();
        let loss = |hidden: &[f32], weights: &[f32]| {
            let head = Head::new(&vocab, Weights::F32(weights), WIDTH).unwrap();
            let mut unused = vec![0.0; hidden.len()];
            head.graph(hidden, k, &items, &mut unused, None).unwrap()
        };
        let head = Head::new(&vocab, Weights::F32(&weights), WIDTH).unwrap();
        let mut by_hidden = vec![0.0; hidden.len()];
        let mut by_weight = vec![0.0; weights.len()];
        head.graph(&hidden, k, &items, &mut by_hidden, Some(&mut by_weight))
            .unwrap();
        let step = 2e-4_f32;
        let check = |what: &str, at: usize, got: f32, by_step: f64| {
            let slope = by_step / f64::from(2.0 * step);
            let got = f64::from(got);
            assert!(
                (slope - got).abs() < 1e-2 * (1.0 + got.abs()),
                "{what} {at}: {got}, by differences {slope}"
            );
        };
        for at in 0..hidden.len() {
            let moved = |by: f32| {
                let mut hidden = hidden.clone();
                hidden[at] += by;
                loss(&hidden, &weights)
            };
            check("hidden", at, by_hidden[at], moved(step) - moved(-step));
        }
        for at in 0..weights.len() {
            let moved = |by: f32| {
                let mut weights = weights.clone();
                weights[at] += by;
                loss(&hidden, &weights)
            };
            check("weight", at, by_weight[at], moved(step) - moved(-step));
        }
        assert!(by_weight.iter().any(|slope| slope.abs() > 1e-3));
    }
}
