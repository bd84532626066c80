//! Records, a fixed run of tokens per task.

use std::ops::Range;

use rayon::prelude::*;

use crate::backend::NotFinite;
use crate::code;
use crate::cpu::exp::max_finite;
use crate::cpu::row::{Part, Row, Scratch};
use crate::error::ScoreError;
use crate::records::{RecordShape, Records};
use crate::score::{Branch, Missed, ScoreItem};
use crate::trie::Node;
use crate::vocab::Vocab;

/// Rows of one task. Each task but the first exponentiates one row more than these, that of the
/// token before.
const ROWS: usize = 16;

/// Index of the end of the record in a distribution.
const END: usize = 256;

/// Masses of all bytes and the end.
type Dense = [f64; 257];

pub(crate) fn branches(item: &ScoreItem<'_>, threshold: f32) -> Result<Vec<Branch>, NotFinite> {
    let found: Vec<Result<Vec<Branch>, NotFinite>> = runs(item)
        .into_par_iter()
        .map_init(Vec::new, |local, rows| {
            let mut found = Vec::new();
            for row in rows {
                let logits = &item.row(row)[..item.vocab.live()];
                max_finite(logits).map_err(|column| NotFinite { row, column })?;
                interior_stops(item, row, f64::from(threshold), local, &mut found);
            }
            Ok(found)
        })
        .collect();
    found.into_iter().try_fold(Vec::new(), |mut all, run| {
        all.extend(run?);
        Ok(all)
    })
}

fn interior_stops(
    item: &ScoreItem<'_>,
    row: usize,
    threshold: f64,
    local: &mut Vec<f32>,
    found: &mut Vec<Branch>,
) {
    let logits = item.row(row);
    for (taken, node) in item.interior(row) {
        if node.stops().is_empty() {
            continue;
        }
        let (part, total) = Part::of_logits(logits, node.all(), local);
        if part.mass(node.stops()) > threshold * total {
            let first = node.start;
            let likeliest = (first..node.stop).fold(first, |best, rank| {
                if logits[rank as usize] > logits[best as usize] {
                    rank
                } else {
                    best
                }
            });
            found.push(Branch {
                position: index(row),
                taken: index(taken),
                rank: likeliest,
            });
        }
    }
}

pub(crate) fn records(
    item: &ScoreItem<'_>,
    shape: &RecordShape,
    out: &mut Records,
) -> Result<Missed, ScoreError> {
    let scored: Vec<Result<Scored, ScoreError>> = runs(item)
        .into_par_iter()
        .map_init(Scorer::default, |scorer, rows| {
            scorer.run(item, rows, shape)
        })
        .collect();
    let scored = scored.into_iter().collect::<Result<Vec<_>, _>>()?;
    let mut short = Mean::default();
    let mut long = Mean::default();
    for run in scored {
        out.append(run.records.view())?;
        short.add(run.short);
        long.add(run.long);
    }
    Ok(Missed {
        short: short.value(),
        long: long.value(),
    })
}

pub(crate) fn token_bits(item: &ScoreItem<'_>) -> Result<f64, NotFinite> {
    let bits: Vec<Result<f64, NotFinite>> = (0..item.tokens.len() + 1)
        .into_par_iter()
        .with_min_len(ROWS)
        .map_init(Scratch::default, |scratch, index| {
            let vocab = item.vocab;
            let mut row = Row::new(vocab, item.row(index), scratch)
                .map_err(|column| NotFinite { row: index, column })?;
            let observed = item.tokens.get(index).and_then(|&rank| vocab.class(rank));
            let class = observed.unwrap_or_else(|| vocab.ends());
            Ok((row.log_total() - row.log_mass(class)) / std::f64::consts::LN_2)
        })
        .collect();
    bits.into_iter().sum()
}

/// Rows of an item in runs of [`ROWS`].
fn runs(item: &ScoreItem<'_>) -> Vec<Range<usize>> {
    let rows = item.tokens.len() + 1;
    (0..rows)
        .step_by(ROWS)
        .map(|start| start..rows.min(start + ROWS))
        .collect()
}

/// What one task found.
struct Scored {
    records: Records,
    short: Mean,
    long: Mean,
}

#[derive(Clone, Copy, Default)]
struct Mean {
    sum: f64,
    count: u64,
}

impl Mean {
    fn observe(&mut self, value: f64) {
        self.sum += value;
        self.count += 1;
    }

    fn add(&mut self, other: Self) {
        self.sum += other.sum;
        self.count += other.count;
    }

    #[expect(clippy::cast_possible_truncation, reason = "a share, reported as f32")]
    fn value(self) -> f32 {
        if self.count == 0 {
            0.0
        } else {
            (self.sum / self.count as f64) as f32
        }
    }
}

/// Buffers of one thread.
struct Scorer {
    row: Scratch,
    branch: Scratch,
    /// Previous token: share of its node that runs on, by byte.
    running: [f64; 256],
    /// Previous token: share of its node that stops.
    stopped: f64,
    mass: Dense,
    candidates: Vec<(f64, u8)>,
}

impl Default for Scorer {
    fn default() -> Self {
        Self {
            row: Scratch::default(),
            branch: Scratch::default(),
            running: [0.0; 256],
            stopped: 1.0,
            mass: [0.0; 257],
            candidates: Vec::with_capacity(256),
        }
    }
}

impl Scorer {
    fn run(
        &mut self,
        item: &ScoreItem<'_>,
        rows: Range<usize>,
        shape: &RecordShape,
    ) -> Result<Scored, ScoreError> {
        let mut scored = Scored {
            records: Records::new(shape.k)?,
            short: Mean::default(),
            long: Mean::default(),
        };
        let vocab = item.vocab;
        let mut scratch = std::mem::take(&mut self.row);
        self.running = [0.0; 256];
        self.stopped = 1.0;
        if let Some(before) = rows.start.checked_sub(1) {
            let mut row = self.row_at(item, before, &mut scratch)?;
            self.boundary(vocab, &mut row, item.bytes(before));
        }
        for index in rows {
            let mut row = self.row_at(item, index, &mut scratch)?;
            root(&row, &mut self.mass);
            self.couple();
            let bytes = item.bytes(index);
            if let (Some(&first), true) = (bytes.first(), index > 0) {
                let kept_and_dropped = self.mass[usize::from(first)];
                scored
                    .long
                    .observe(share(self.running[usize::from(first)], kept_and_dropped));
            }
            self.encode(shape, &mut scored.records);

            let mut branch = item.first_branch(index);
            for (taken, node) in item.interior(index) {
                let expanded = item.branches.get(branch).is_some_and(|branch| {
                    branch.position as usize == index && branch.taken as usize == taken
                });
                let mut stopped_root = None;
                if expanded {
                    let row = Row::new(vocab, item.branch_row(branch), &mut self.branch).map_err(
                        |column| ScoreError::BranchNotFinite {
                            row: branch,
                            column,
                        },
                    )?;
                    let mut dense = [0.0; 257];
                    root(&row, &mut dense);
                    stopped_root = Some(dense);
                    branch += 1;
                }
                let observed = usize::from(bytes[taken]);
                let short = interior(
                    vocab,
                    &mut row,
                    node,
                    stopped_root.as_ref(),
                    observed,
                    &mut self.mass,
                );
                scored.short.observe(short);
                self.encode(shape, &mut scored.records);
            }
            self.boundary(vocab, &mut row, bytes);
        }
        self.row = scratch;
        Ok(scored)
    }

    fn row_at<'a>(
        &self,
        item: &ScoreItem<'a>,
        row: usize,
        scratch: &'a mut Scratch,
    ) -> Result<Row<'a>, ScoreError> {
        Row::new(item.vocab, item.row(row), scratch)
            .map_err(|column| ScoreError::NotFinite { row, column })
    }

    /// Takes down, for the byte after a token, how its node splits into stopping and running on.
    fn boundary(&mut self, vocab: &Vocab, row: &mut Row<'_>, bytes: &[u8]) {
        self.running = [0.0; 256];
        self.stopped = 1.0;
        let Some(node) = vocab.trie().find(bytes).filter(|node| node.has_children()) else {
            return;
        };
        if bytes.is_empty() {
            return;
        }
        let (part, total) = row.part(node.all());
        self.stopped = part.mass(node.stops()) / total;
        for child in vocab.trie().children(node) {
            self.running[usize::from(child.byte)] = part.mass(child.all()) / total;
        }
    }

    /// Turns the root in `mass` into the coupled boundary.
    fn couple(&mut self) {
        for (mass, running) in self.mass.iter_mut().zip(&self.running) {
            *mass = *mass * self.stopped + running;
        }
        self.mass[END] *= self.stopped;
    }

    /// Lists the symbols of `mass`, a distribution, as one position.
    fn encode(&mut self, shape: &RecordShape, records: &mut Records) {
        let end = self.mass[END];
        let fill = f64::from(shape.fill_permille) / 1000.0;
        // Symbols below this hold less than the rest that the fill leaves, all of them together.
        let cutoff = ((1.0 - fill) / 256.0).max(f64::MIN_POSITIVE);
        self.candidates.clear();
        for (byte, &mass) in (0..=u8::MAX).zip(&self.mass[..END]) {
            if mass >= cutoff {
                self.candidates.push((mass, byte));
            }
        }
        if self.candidates.is_empty() {
            let likeliest = (0..=u8::MAX).zip(&self.mass[..END]).fold(
                (self.mass[0], 0),
                |best, (byte, &mass)| {
                    if mass > best.0 { (mass, byte) } else { best }
                },
            );
            self.candidates.push(likeliest);
        }
        self.candidates
            .sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        let mut filled = end;
        let mut kept = 0;
        for &(mass, byte) in self.candidates.iter().take(shape.k) {
            if kept > 0 && filled >= fill {
                break;
            }
            filled += mass;
            kept += 1;
            self.mass[usize::from(byte)] = 0.0;
        }
        let tail: f64 = self.mass[..END].iter().sum();
        self.candidates.truncate(kept);
        self.candidates.sort_unstable_by_key(|&(_, byte)| byte);
        let mut listed = [(0, 0); 256];
        for (slot, &(mass, byte)) in listed.iter_mut().zip(&self.candidates) {
            *slot = (byte, code::encode(mass));
        }
        records.push(&listed[..kept], code::encode(end), code::encode(tail));
    }
}

/// Next-byte distribution at the root.
fn root(row: &Row<'_>, mass: &mut Dense) {
    for (mass, first) in mass.iter_mut().zip(&row.first) {
        *mass = first / row.total;
    }
    mass[END] = row.end / row.total;
}

/// Next-byte distribution inside a token; returns the share missed as [`Missed::short`] defines it.
fn interior(
    vocab: &Vocab,
    row: &mut Row<'_>,
    node: &Node,
    stopped_root: Option<&Dense>,
    observed: usize,
    mass: &mut Dense,
) -> f64 {
    *mass = [0.0; 257];
    let (part, total) = row.part(node.all());
    let stopped = part.mass(node.stops()) / total;
    if let Some(root) = stopped_root {
        for child in vocab.trie().children(node) {
            mass[usize::from(child.byte)] = part.mass(child.all()) / total;
        }
        let kept = mass[observed];
        let dropped = stopped * root[observed];
        for (mass, root) in mass.iter_mut().zip(root) {
            *mass += stopped * root;
        }
        return share(dropped, dropped + kept);
    }
    let (part, longer) = row.part(node.longer());
    for child in vocab.trie().children(node) {
        mass[usize::from(child.byte)] = part.mass(child.all()) / longer;
    }
    stopped
}

fn share(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole } else { 0.0 }
}

fn index(value: usize) -> u32 {
    u32::try_from(value).expect("a target has fewer than 2^32 bytes")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::backend::Backend;
    use crate::records::RecordView;
    use crate::reference;
    use crate::testing::cases;

    /// A code is right if it is that of a mass within this many sixteenths of a bit, or of one too
    /// small to say.
    const CODE_TOLERANCE: f64 = 1e-3;

    fn check_code(code: u8, exact: f64, what: &str) {
        let sixteenths = (-16.0 * exact.log2()).clamp(0.0, 255.0);
        let error = (f64::from(code) - sixteenths).abs();
        assert!(
            error <= 0.5 + CODE_TOLERANCE,
            "{what} has code {code}, mass {exact:e}"
        );
    }

    fn check_position(view: RecordView<'_>, position: usize, exact: &[f64], shape: &RecordShape) {
        let listed: Vec<(u8, u8)> = view.listed(position).collect();
        let mut tail: f64 = exact[..END].iter().sum();
        let mut filled = exact[END];
        let mut least = f64::INFINITY;
        for &(symbol, code) in &listed {
            let mass = exact[usize::from(symbol)];
            check_code(code, mass, "symbol");
            filled += mass;
            tail -= mass;
            least = least.min(mass);
        }
        check_code(view.end()[position], exact[END], "end");
        if tail > 1e-9 {
            check_code(view.tail()[position], tail, "tail");
        }
        for (symbol, &mass) in (0..=u8::MAX).zip(exact) {
            let is_listed = listed.iter().any(|&(listed, _)| listed == symbol);
            assert!(
                is_listed || mass <= least + 1e-6,
                "{symbol} of mass {mass} is not listed"
            );
        }
        let fill = f64::from(shape.fill_permille) / 1000.0;
        assert!(
            listed.len() == shape.k || filled >= fill - 1e-6,
            "filled to {filled} only"
        );
        assert!(
            listed.len() == 1 || filled - least < fill + 1e-6,
            "filled to {filled} without {least}"
        );
    }

    proptest! {
        #[test]
        fn records_agree_with_the_reference(
            mut case in cases(),
            k in 1_usize..8,
            fill_permille in prop::sample::select(&[0, 900, 995, 1000][..]),
            threshold in prop::sample::select(&[0.0, 1e-3, 0.3, 2.0][..]),
        ) {
            let logits = case.logits();
            let branches = Backend::Cpu
                .branches(&case.vocab, &case.tokens, &logits, threshold)
                .unwrap();
            if threshold > 0.0 {
                let exact = Backend::Reference
                    .branches(&case.vocab, &case.tokens, &logits, threshold)
                    .unwrap();
                prop_assert_eq!(&branches, &exact);
            }
            let branch_logits = case.rows(branches.len());
            let shape = RecordShape { k, fill_permille };
            let mut records = Records::new(k).unwrap();
            let missed = Backend::Cpu
                .records(&case.vocab, &case.tokens, &logits, &branches, &branch_logits, &shape, &mut records)
                .unwrap();

            let item = ScoreItem::new(&case.vocab, &case.tokens, &logits).unwrap();
            let item = item.with_branches(&branches, &branch_logits).unwrap();
            let (exact, exact_missed) = reference::score::distributions(&item).unwrap();
            prop_assert_eq!(records.positions(), case.bytes().len() + 1);
            prop_assert_eq!(records.positions(), exact.len());
            for (position, exact) in exact.iter().enumerate() {
                let sum: f64 = exact.iter().sum();
                prop_assert!((sum - 1.0).abs() < 1e-9, "mass of position {} is {}", position, sum);
                check_position(records.view(), position, exact, &shape);
            }
            prop_assert_eq!(records.view().check_mass(), Ok(()));
            // Beyond this scale the observed byte may have no mass that f32 can say, and nothing to
            // share.
            if case.scale < 100.0 {
                prop_assert!((missed.short - exact_missed.short).abs() < 1e-5);
                prop_assert!((missed.long - exact_missed.long).abs() < 1e-5);
            }
            prop_assert!((0.0..=1.0).contains(&missed.short) && (0.0..=1.0).contains(&missed.long));
        }

        #[test]
        fn token_bits_are_the_cross_entropy(mut case in cases()) {
            let logits = case.logits();
            let mut labels = case.tokens.clone();
            labels.push(case.vocab.end_ranks().start);
            let mut grad = vec![0.0; logits.len()];
            let nats = Backend::Reference
                .cross_entropy(&case.vocab, &labels, &logits, 1.0, &mut grad)
                .unwrap();
            for backend in [Backend::Cpu, Backend::Reference] {
                let bits = backend.token_bits(&case.vocab, &case.tokens, &logits).unwrap();
                let exact = nats / std::f64::consts::LN_2;
                prop_assert!((bits - exact).abs() <= 1e-6 * exact + 1e-4, "{} against {}", bits, exact);
            }
        }
    }

    #[test]
    fn the_reference_lists_what_the_fast_path_lists() {
        let mut random = crate::testing::Random(5);
        let vocab = Vocab::new(
            (0..=255_u8)
                .map(|byte| [byte, b'x'])
                .collect::<Vec<_>>()
                .iter()
                .flat_map(|pair| {
                    [
                        crate::TokenKind::Bytes(&pair[..1]),
                        crate::TokenKind::Bytes(pair),
                    ]
                })
                .chain([crate::TokenKind::EndOfRecord]),
        )
        .unwrap();
        let tokens: Vec<u32> = (0..40).map(|_| index(random.below(512))).collect();
        let logits = random.logits(41 * vocab.len(), 6.0);
        let shape = RecordShape {
            k: 16,
            fill_permille: 995,
        };
        let [fast, exact] = [Backend::Cpu, Backend::Reference].map(|backend| {
            let mut out = Records::new(16).unwrap();
            backend
                .records(&vocab, &tokens, &logits, &[], &[], &shape, &mut out)
                .unwrap();
            out
        });
        assert_eq!(fast.view().symbols(), exact.view().symbols());
    }
}
