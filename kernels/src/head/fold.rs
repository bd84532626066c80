//! Losses of a frozen head whose logits do not fit the scratch, in one pass over its weights.

use std::ops::Range;

use rayon::prelude::*;

use super::loss::ROWS;
use super::{Head, product};
use crate::backend::NotFinite;
use crate::cpu::Level;
use crate::cpu::fold::{Folding, add};
use crate::loss::LossJob;
use crate::matmul::{View, ViewMut, Write, ab};
use crate::trie::{Node, Trie};
use crate::vocab::Vocab;

/// Logits of some rows that are kept until coefficients are known.
struct PutOff {
    tokens: Range<usize>,
    rows: Vec<usize>,
    logits: Vec<f32>,
}

/// Sums of exponentials times their weights, a row each, since they were last folded.
struct Sums {
    values: Vec<f32>,
    is_empty: bool,
}

impl Head<'_> {
    /// [`Self::loss`] of some rows; `None` where too many blocks would have to be put off or a row's
    /// ranges are not nested.
    pub(crate) fn loss_in_folds(
        &self,
        job: &LossJob<'_>,
        rows: Range<usize>,
        hidden: &[f32],
        grads: &mut [f32],
    ) -> Result<Option<Vec<f64>>, NotFinite> {
        let level = self.level;
        let folding: Option<Vec<Folding>> =
            rows.clone().map(|row| Folding::new(job, row)).collect();
        let Some(mut folding) = folding else {
            return Ok(None);
        };
        grads.fill(0.0);
        let Some(mut put_off) = self.fold_blocks(&mut folding, hidden, grads) else {
            return Ok(None);
        };
        let losses: Vec<Result<f64, NotFinite>> = folding
            .par_iter_mut()
            .zip(grads.par_chunks_exact_mut(self.width))
            .zip(rows)
            .with_min_len(ROWS)
            .map(|((folding, grad), row)| {
                let loss = folding.finish(level, grad);
                loss.map_err(|column| NotFinite { row, column })
            })
            .collect();
        let losses = losses.into_iter().collect::<Result<Vec<f64>, _>>()?;
        self.add_put_off(&mut folding, &mut put_off, grads);
        Ok(Some(losses))
    }

    /// Adds to `grads` what is known when the last block has passed, and returns what is not.
    fn fold_blocks(
        &self,
        folding: &mut [Folding],
        hidden: &[f32],
        grads: &mut [f32],
    ) -> Option<Vec<PutOff>> {
        let level = self.level;
        let (count, width) = (folding.len(), self.width);
        let hidden = View::new(hidden, count, width);
        let mut sums = Sums {
            values: vec![0.0; count * width],
            is_empty: true,
        };
        let mut by_column = vec![0.0; count * self.block];
        let mut scratch = by_column.clone();
        let mut left = (self.scratch / size_of::<f32>()).saturating_sub(2 * scratch.len());
        let mut put_off = Vec::new();
        let mut fits = true;
        self.blocks(cuts(self.vocab, self.block), |first, weights| {
            if !fits {
                return;
            }
            let columns = weights.rows();
            let logits = &mut scratch[..count * columns];
            product(weights, hidden, &mut by_column, logits, columns);
            let passed: Vec<bool> = logits
                .par_chunks_exact_mut(columns)
                .zip(&mut *folding)
                .with_min_len(ROWS)
                .map(|(logits, row)| row.pass(level, first, logits))
                .collect();
            let rows: Vec<usize> = (0..count).filter(|&row| !passed[row]).collect();
            fits = rows.len() * columns <= left;
            if !rows.is_empty() && fits {
                left -= rows.len() * columns;
                let mut kept = Vec::with_capacity(rows.len() * columns);
                for &row in &rows {
                    let logits = &mut logits[row * columns..][..columns];
                    kept.extend_from_slice(logits);
                    logits.fill(0.0);
                }
                put_off.push(PutOff {
                    tokens: first..first + columns,
                    rows,
                    logits: kept,
                });
            }
            if folding.iter().any(Folding::is_full) {
                fold(level, folding, &mut sums, grads);
            }
            let write = if sums.is_empty {
                Write::Replace
            } else {
                Write::Add
            };
            let out = ViewMut::new(&mut sums.values, count, width);
            ab(out, write, View::new(logits, count, columns), weights, 1.0);
            sums.is_empty = false;
            folding.iter_mut().for_each(Folding::added);
        });
        fold(level, folding, &mut sums, grads);
        fits.then_some(put_off)
    }

    /// Adds the gradient of what was put off.
    fn add_put_off(&self, folding: &mut [Folding], put_off: &mut [PutOff], grads: &mut [f32]) {
        let level = self.level;
        let mut sums = Vec::new();
        let ranges: Vec<Range<usize>> = put_off.iter().map(|block| block.tokens.clone()).collect();
        let mut put_off = put_off.iter_mut();
        self.blocks(ranges, |first, weights| {
            let Some(block) = put_off.next() else {
                return;
            };
            let (count, columns) = (block.rows.len(), weights.rows());
            for (&row, logits) in block
                .rows
                .iter()
                .zip(block.logits.chunks_exact_mut(columns))
            {
                folding[row].write(level, first, logits);
            }
            sums.resize(count * self.width, 0.0);
            let out = ViewMut::new(&mut sums, count, self.width);
            let logits = View::new(&block.logits, count, columns);
            ab(out, Write::Replace, logits, weights, 1.0);
            for (&row, sum) in block.rows.iter().zip(sums.chunks_exact(self.width)) {
                add(&mut grads[row * self.width..][..self.width], 1.0, sum);
            }
        });
    }
}

fn fold(level: Level, folding: &mut [Folding], sums: &mut Sums, grads: &mut [f32]) {
    let width = grads.len() / folding.len().max(1);
    folding
        .par_iter_mut()
        .zip(sums.values.par_chunks_exact(width))
        .zip(grads.par_chunks_exact_mut(width))
        .with_min_len(ROWS)
        .for_each(|((row, sum), grad)| row.fold(level, sum, grad));
    sums.is_empty = true;
}

/// Blocks of at most `most` live tokens that begin and end where large trie nodes do.
fn cuts(vocab: &Vocab, most: usize) -> Vec<Range<usize>> {
    let mut borders = vec![0];
    cut(vocab.trie(), vocab.trie().root(), most, &mut borders);
    borders.extend([vocab.ends().start, vocab.live()]);
    borders.dedup();
    let between = borders.windows(2).flat_map(|pair| {
        let (start, end) = (pair[0], pair[1]);
        let size = (end - start).div_ceil((end - start).div_ceil(most));
        (start..end)
            .step_by(size)
            .map(move |first| first..end.min(first + size))
    });
    between.collect()
}

/// Adds where the children of a node begin that are large, and where small ones together would be.
fn cut(trie: &Trie, node: &Node, most: usize, borders: &mut Vec<usize>) {
    for child in trie.children(node) {
        let child_ranks = child.start as usize..child.end as usize;
        let last = borders[borders.len() - 1];
        if child_ranks.len() > most {
            borders.push(child_ranks.start);
            cut(trie, child, most, borders);
            borders.push(child_ranks.end);
        } else if child_ranks.end - last > most {
            borders.push(child_ranks.start);
        }
    }
}
