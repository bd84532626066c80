//! Records from the formulas of [`crate::score`], whole vocabulary at every byte.

use crate::backend::NotFinite;
use crate::code;
use crate::element::Element;
use crate::error::ScoreError;
use crate::records::{RecordShape, Records};
use crate::reference::{below, log_mass, wide};
use crate::score::{Branch, Missed, RecordsJob, ScoreJob, branch_error};
use crate::vocab::Vocab;

/// Next-symbol distribution; index 256 is the end of the record.
pub(crate) type Distribution = Vec<f64>;

/// One item with its logits as `f64`, the tokens that carry mass only.
pub(crate) struct Item<'a> {
    vocab: &'a Vocab,
    tokens: &'a [u32],
    rows: Vec<Vec<f64>>,
    branches: &'a [Branch],
    branch_rows: Vec<Vec<f64>>,
}

impl<'a> Item<'a> {
    fn new<T: Element>(job: &ScoreJob<'a>, item: usize, logits: &[T]) -> Result<Self, NotFinite> {
        let rows = job.rows_of(item);
        Ok(Self {
            vocab: job.vocab,
            tokens: job.tokens[item],
            rows: rows
                .map(|row| wide(job.vocab, logits, row))
                .collect::<Result<_, _>>()?,
            branches: &[],
            branch_rows: Vec::new(),
        })
    }

    pub(crate) fn with_branches<T: Element>(
        job: &RecordsJob<'a>,
        item: usize,
        logits: &[T],
        branch_logits: &[T],
    ) -> Result<Self, ScoreError> {
        let rows = job
            .branch_rows_of(item)
            .map(|row| wide(job.score.vocab, branch_logits, row));
        Ok(Self {
            branches: job.branches[item],
            branch_rows: rows.collect::<Result<_, _>>().map_err(branch_error)?,
            ..Self::new(&job.score, item, logits)?
        })
    }

    fn bytes(&self, index: usize) -> &'a [u8] {
        self.tokens
            .get(index)
            .map_or(&[], |&rank| self.vocab.token_bytes(rank))
    }
}

pub(crate) fn branches<T: Element>(
    job: &ScoreJob<'_>,
    logits: &[T],
    threshold: f32,
) -> Result<Vec<Vec<Branch>>, NotFinite> {
    let items = 0..job.tokens.len();
    items
        .map(|item| Ok(branches_of(&Item::new(job, item, logits)?, threshold)))
        .collect()
}

fn branches_of(item: &Item<'_>, threshold: f32) -> Vec<Branch> {
    let mut found = Vec::new();
    for (index, row) in item.rows.iter().enumerate() {
        let bytes = item.bytes(index);
        for taken in 1..bytes.len() {
            let prefix = &bytes[..taken];
            let stop = spelled(item.vocab, row, prefix);
            let all = log_mass(row, |rank| below(item.vocab, prefix).contains(&rank));
            if (stop - all).exp() > f64::from(threshold) {
                let likeliest = (0..item.vocab.byte_tokens())
                    .filter(|&rank| item.vocab.token_bytes(rank) == prefix)
                    .max_by(|&a, &b| row[a as usize].total_cmp(&row[b as usize]).then(b.cmp(&a)));
                let place = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
                if let Some(rank) = likeliest {
                    found.push(Branch {
                        position: place(index),
                        taken: place(taken),
                        rank,
                    });
                }
            }
        }
    }
    found
}

pub(crate) fn records<T: Element>(
    job: &RecordsJob<'_>,
    logits: &[T],
    branch_logits: &[T],
    out: &mut Records,
) -> Result<Vec<Missed>, ScoreError> {
    let items = (0..job.score.tokens.len())
        .map(|item| Item::with_branches(job, item, logits, branch_logits));
    let items = items.collect::<Result<Vec<_>, _>>()?;
    let missed = items.iter().map(|item| {
        let (distributions, missed) = distributions(item);
        for distribution in distributions {
            encode(&distribution, &job.shape, out);
        }
        missed
    });
    Ok(missed.collect())
}

fn encode(distribution: &[f64], shape: &RecordShape, out: &mut Records) {
    let mut order: Vec<u8> = (0..=255).collect();
    order.sort_by(|&a, &b| {
        distribution[usize::from(b)]
            .total_cmp(&distribution[usize::from(a)])
            .then(a.cmp(&b))
    });
    let mut filled = distribution[256];
    let mut kept = Vec::new();
    for byte in order {
        let mass = distribution[usize::from(byte)];
        let full = filled >= f64::from(shape.fill_permille) / 1000.0 || mass <= 0.0;
        if kept.len() == shape.k || (full && !kept.is_empty()) {
            break;
        }
        filled += mass;
        kept.push((byte, code::encode(mass)));
    }
    kept.sort_unstable();
    let is_listed = |byte: u8| kept.iter().any(|&(listed, _)| listed == byte);
    let tail: f64 = (0..=255_u8)
        .filter(|&byte| !is_listed(byte))
        .map(|byte| distribution[usize::from(byte)])
        .sum();
    out.push(&kept, code::encode(distribution[256]), code::encode(tail));
}

/// Bits of the observed class of each row.
pub(crate) fn token_bits<T: Element>(
    job: &ScoreJob<'_>,
    logits: &[T],
) -> Result<Vec<f64>, NotFinite> {
    let bits = (0..job.rows()).map(|index| {
        let row = wide(job.vocab, logits, index)?;
        let total = log_mass(&row, |_| true);
        Ok((total - spelled(job.vocab, &row, job.bytes(index))) / std::f64::consts::LN_2)
    });
    bits.collect()
}

/// One distribution per position of the item.
#[expect(
    clippy::cast_possible_truncation,
    reason = "shares are reported as f32"
)]
pub(crate) fn distributions(item: &Item<'_>) -> (Vec<Distribution>, Missed) {
    let vocab = item.vocab;
    let mut out = Vec::new();
    let mut short = Vec::new();
    let mut long = Vec::new();
    let mut previous: Option<(&Vec<f64>, &[u8])> = None;
    for (index, row) in item.rows.iter().enumerate() {
        let bytes = item.bytes(index);
        let mut boundary = root(vocab, row);
        if let Some((row, prefix)) = &previous {
            let all = log_mass(row, |rank| below(vocab, prefix).contains(&rank));
            let stopped = (spelled(vocab, row, prefix) - all).exp();
            let running = running(vocab, row, prefix, all);
            for (mass, running) in boundary.iter_mut().zip(&running) {
                *mass = stopped * *mass + running;
            }
            if let Some(&observed) = bytes.first() {
                let observed = usize::from(observed);
                long.push(share(running[observed], boundary[observed]));
            }
        }
        out.push(boundary);

        for taken in 1..bytes.len() {
            let prefix = &bytes[..taken];
            let observed = usize::from(bytes[taken]);
            let all = log_mass(row, |rank| below(vocab, prefix).contains(&rank));
            let stop = spelled(vocab, row, prefix);
            let stopped = (stop - all).exp();
            let branch = item.branches.iter().position(|branch| {
                (branch.position as usize, branch.taken as usize) == (index, taken)
            });
            if let Some(branch) = branch {
                let after = root(vocab, &item.branch_rows[branch]);
                let running = running(vocab, row, prefix, all);
                let dropped = stopped * after[observed];
                short.push(share(dropped, dropped + running[observed]));
                out.push(
                    running
                        .iter()
                        .zip(&after)
                        .map(|(run, root)| run + stopped * root)
                        .collect(),
                );
            } else {
                short.push(stopped);
                let longer = log_mass(row, |rank| {
                    below(vocab, prefix).contains(&rank)
                        && token_bytes(vocab, rank).len() > prefix.len()
                });
                out.push(running(vocab, row, prefix, longer));
            }
        }
        previous = Some((row, bytes));
    }
    let mean = |shares: &[f64]| {
        if shares.is_empty() {
            0.0
        } else {
            (shares.iter().sum::<f64>() / shares.len() as f64) as f32
        }
    };
    let missed = Missed {
        short: mean(&short),
        long: mean(&long),
    };
    (out, missed)
}

fn root(vocab: &Vocab, row: &[f64]) -> Distribution {
    let total = log_mass(row, |_| true);
    let mut out = running(vocab, row, &[], total);
    out[256] = (spelled(vocab, row, &[]) - total).exp();
    out
}

/// Masses of the tokens that continue a prefix, by their next byte, relative to `total`.
fn running(vocab: &Vocab, row: &[f64], prefix: &[u8], total: f64) -> Distribution {
    let mut out = vec![0.0; 257];
    for (rank, logit) in row.iter().enumerate() {
        let bytes = token_bytes(vocab, rank);
        if bytes.starts_with(prefix) && bytes.len() > prefix.len() {
            out[usize::from(bytes[prefix.len()])] += (logit - total).exp();
        }
    }
    out
}

/// Log-mass of the tokens that spell exactly these bytes; of the end tokens for none.
fn spelled(vocab: &Vocab, row: &[f64], bytes: &[u8]) -> f64 {
    log_mass(row, |rank| token_bytes(vocab, rank) == bytes)
}

fn token_bytes(vocab: &Vocab, rank: usize) -> &[u8] {
    u32::try_from(rank).map_or(&[], |rank| vocab.token_bytes(rank))
}

fn share(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole } else { 0.0 }
}
