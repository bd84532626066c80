//! Records from a list of the likeliest tokens never claim more than those of the whole softmax, and equal them where
//! everything is listed.
#![cfg(test)]

use consilium_kernels::score::Branch;
use consilium_kernels::{
    Backend, ListedError, ListedRow, RecordShape, Records, ScoreError, TokenKind, Vocab, code,
    listed,
};
use proptest::prelude::*;

const THRESHOLD: f32 = 1e-3;

/// Byte tokens over three letters with duplicates, two ends, an ignored token.
fn vocab(tokens: &[Vec<u8>]) -> Vocab {
    let kinds = tokens.iter().map(|bytes| TokenKind::Bytes(bytes));
    let others = [
        TokenKind::EndOfRecord,
        TokenKind::Ignored,
        TokenKind::EndOfRecord,
    ];
    Vocab::new(kinds.chain(others)).unwrap()
}

/// A model's rows in rank order: reproducible logits by row number.
struct Rows {
    width: usize,
    seed: u64,
    scale: f32,
}

impl Rows {
    fn logits(&self, row: u64) -> Vec<f32> {
        (0..self.width as u64)
            .map(|rank| {
                let bits = mix(mix(self.seed ^ row) ^ rank);
                ((bits >> 40) as f32 / (1 << 24) as f32 - 0.5) * self.scale
            })
            .collect()
    }

    /// What a server lists: log-softmax over the whole head in `f32`, the `top` likeliest, and `observed`.
    fn listed(&self, vocab: &Vocab, row: u64, top: usize, observed: u32) -> ListedRow {
        let logits = self.logits(row);
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f32 = logits.iter().map(|&logit| (logit - largest).exp()).sum();
        let shift = largest + sum.ln();
        let mut order: Vec<u32> = (0..u32::try_from(self.width).unwrap()).collect();
        order.sort_by(|&a, &b| {
            logits[b as usize]
                .total_cmp(&logits[a as usize])
                .then(a.cmp(&b))
        });
        let mut kept: Vec<u32> = order.into_iter().take(top).collect();
        if !kept.contains(&observed) {
            kept.push(observed);
        }
        let pairs: Vec<(u32, f32)> = kept
            .iter()
            .map(|&rank| {
                (
                    vocab.id_of_rank()[rank as usize],
                    logits[rank as usize] - shift,
                )
            })
            .collect();
        ListedRow::new(vocab, &pairs, top).unwrap()
    }
}

fn mix(state: u64) -> u64 {
    let mut z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Masses of all bytes (listed ones only), the end and the tail.
fn masses(records: &Records, position: usize) -> (Vec<Option<f64>>, f64, f64) {
    let view = records.view();
    let slots = position * view.k()..(position + 1) * view.k();
    let mut bytes = vec![None; 256];
    for (&symbol, &code) in view.symbols()[slots.clone()]
        .iter()
        .zip(&view.codes()[slots])
    {
        bytes[usize::from(symbol)].get_or_insert_with(|| code::decode(code));
    }
    let of = |codes: &[u8]| code::decode(codes[position]);
    (bytes, of(view.end()), of(view.tail()))
}

struct Case {
    vocab: Vocab,
    tokens: Vec<u32>,
    rows: Rows,
}

impl Case {
    fn new(tokens: &[Vec<u8>], target: &[usize], seed: u64, scale: f32) -> Self {
        let vocab = vocab(tokens);
        let ranks = vocab.rank_of_id();
        Self {
            tokens: target.iter().map(|&id| ranks[id % tokens.len()]).collect(),
            rows: Rows {
                width: vocab.len(),
                seed,
                scale,
            },
            vocab,
        }
    }

    fn observed(&self, row: usize) -> u32 {
        let end = self.vocab.end_ranks().start;
        self.tokens.get(row).copied().unwrap_or(end)
    }

    fn listed(&self, top: usize) -> Vec<ListedRow> {
        (0..=self.tokens.len())
            .map(|row| {
                self.rows
                    .listed(&self.vocab, row as u64, top, self.observed(row))
            })
            .collect()
    }

    /// Rows after a branch: any row will do, as long as both paths take the same.
    fn branch_row(branch: &Branch) -> u64 {
        1_000 + u64::from(branch.position) * 64 + u64::from(branch.taken)
    }

    fn listed_records(&self, top: usize, shape: &RecordShape) -> (Records, Vec<Branch>, f32, f64) {
        let rows = self.listed(top);
        let branches = listed::branches(&self.vocab, &self.tokens, &rows, THRESHOLD).unwrap();
        let end = self.vocab.end_ranks().start;
        let after: Vec<ListedRow> = branches
            .iter()
            .map(|branch| {
                self.rows
                    .listed(&self.vocab, Self::branch_row(branch), top, end)
            })
            .collect();
        let mut out = Records::new(shape.k).unwrap();
        let missed = listed::records(
            &self.vocab,
            &self.tokens,
            &rows,
            &branches,
            &after,
            shape,
            &mut out,
        )
        .unwrap();
        let bits = listed::token_bits(&self.vocab, &self.tokens, &rows).unwrap();
        (out, branches, missed.short.max(missed.long), bits)
    }

    /// Records of the whole softmax with these branches and those that it finds itself.
    fn exact_records(&self, more: &[Branch], shape: &RecordShape) -> (Records, Vec<Branch>, f64) {
        let reference = Backend::Reference;
        let logits: Vec<f32> = (0..=self.tokens.len())
            .flat_map(|row| self.rows.logits(row as u64))
            .collect();
        let found = reference
            .branches(&self.vocab, &self.tokens, &logits, THRESHOLD)
            .unwrap();
        let mut branches = found.clone();
        for branch in more {
            let place = |b: &Branch| (b.position, b.taken);
            if !branches.iter().any(|other| place(other) == place(branch)) {
                branches.push(*branch);
            }
        }
        branches.sort_by_key(|branch| (branch.position, branch.taken));
        let after: Vec<f32> = branches
            .iter()
            .flat_map(|branch| self.rows.logits(Self::branch_row(branch)))
            .collect();
        let mut out = Records::new(shape.k).unwrap();
        reference
            .records(
                &self.vocab,
                &self.tokens,
                &logits,
                &branches,
                &after,
                shape,
                &mut out,
            )
            .unwrap();
        let bits = reference
            .token_bits(&self.vocab, &self.tokens, &logits)
            .unwrap();
        (out, found, bits)
    }
}

fn tokens() -> impl Strategy<Value = Vec<Vec<u8>>> {
    prop::collection::vec(prop::collection::vec(b'a'..b'd', 1..5), 4..40)
}

proptest! {
    #[test]
    fn everything_listed_gives_the_records_of_the_softmax(
        tokens in tokens(),
        target in prop::collection::vec(0_usize..40, 1..8),
        seed: u64,
        scale in 1.0_f32..30.0,
        k in 1_usize..6,
    ) {
        let case = Case::new(&tokens, &target, seed, scale);
        let shape = RecordShape { k, fill_permille: 995 };
        let (got, branches, _, bits) = case.listed_records(case.vocab.len(), &shape);
        let (want, found, true_bits) = case.exact_records(&[], &shape);
        // A stop whose share is the threshold to the last bit may fall on either side.
        prop_assume!(branches == found);
        prop_assert!((bits - true_bits).abs() < 1e-3 * true_bits.max(1.0), "{} {}", bits, true_bits);
        for position in 0..got.positions() {
            let (bytes, end, tail) = masses(&got, position);
            let (true_bytes, true_end, true_tail) = masses(&want, position);
            let step = |got: f64, want: f64| (got / want).log2().abs() <= 1.01 / 16.0;
            prop_assert!(step(end, true_end) && step(tail, true_tail), "end or tail at {}", position);
            for (got, want) in bytes.iter().zip(&true_bytes) {
                match (got, want) {
                    (Some(got), Some(want)) => prop_assert!(step(*got, *want), "{} {}", got, want),
                    (None, None) => {}
                    // Two masses that are equal but for rounding may change places at the border of what is kept.
                    (one, other) => {
                        let mass = one.or(*other).unwrap();
                        let least = bytes.iter().flatten().copied().fold(1.0, f64::min);
                        prop_assert!(mass < 6e-3 || step(mass, least), "{:?} {:?}", one, other);
                    }
                }
            }
        }
    }

    #[test]
    fn a_shorter_list_claims_no_more_than_the_softmax_and_accounts_for_all_mass(
        tokens in tokens(),
        target in prop::collection::vec(0_usize..40, 1..8),
        seed: u64,
        scale in 1.0_f32..30.0,
        top in 1_usize..12,
    ) {
        let case = Case::new(&tokens, &target, seed, scale);
        let shape = RecordShape { k: 8, fill_permille: 1000 };
        let (got, branches, missed, bits) = case.listed_records(top, &shape);
        let (want, _, true_bits) = case.exact_records(&branches, &shape);
        prop_assert!((0.0..=1.0).contains(&missed));
        prop_assert!(bits >= true_bits - 1e-3 * true_bits.max(1.0));
        prop_assert!(got.view().check_mass().is_ok());
        for position in 0..got.positions() {
            let (bytes, end, _) = masses(&got, position);
            let (true_bytes, true_end, _) = masses(&want, position);
            // One step for rounding; a symbol of no mass has the floor, 1.6e-5.
            let most = |want: f64| want * 2_f64.powf(1.01 / 16.0) + 2e-5;
            prop_assert!(end <= most(true_end), "end {} of {} at {}", end, true_end, position);
            for (symbol, (got, want)) in bytes.iter().zip(&true_bytes).enumerate() {
                if let Some(got) = got {
                    let want = want.unwrap_or(0.0);
                    prop_assert!(*got <= most(want), "{} {} of {} at {}", symbol, got, want, position);
                }
            }
        }
    }
}

#[test]
fn what_is_not_listed_is_in_the_tail() {
    let tokens = [b"a".to_vec(), b"ab".to_vec(), b"c".to_vec()];
    let vocab = vocab(&tokens);
    // Ids: a 0, ab 1, c 2, end 3, ignored 4, end 5.
    let row = |pairs: &[(u32, f32)]| {
        let pairs: Vec<(u32, f32)> = pairs.iter().map(|&(id, p)| (id, p.ln())).collect();
        ListedRow::new(&vocab, &pairs, 2).unwrap()
    };
    let rows = [
        row(&[(1, 0.5), (4, 0.2)]),
        row(&[(3, 0.25), (2, 0.25), (5, 0.01)]),
    ];
    let observed = [vocab.rank_of_id()[1]];
    let shape = RecordShape {
        k: 4,
        fill_permille: 1000,
    };
    let mut out = Records::new(4).unwrap();
    let missed = listed::records(&vocab, &observed, &rows, &[], &[], &shape, &mut out).unwrap();
    let near = |got: f64, want: f64| (got / want).log2().abs() < 1.0 / 30.0;
    // First byte: 0.5 of the 0.8 that is not the ignored token's; 0.3 are unseen.
    let (bytes, _, tail) = masses(&out, 0);
    assert!(near(bytes[usize::from(b'a')].unwrap(), 0.5 / 0.8) && near(tail, 0.3 / 0.8));
    // Below `a` the unlisted token `a` may hold up to 0.2, the smallest probability of the list.
    let (bytes, _, tail) = masses(&out, 1);
    assert!(near(bytes[usize::from(b'b')].unwrap(), 0.5 / 0.7) && near(tail, 0.2 / 0.7));
    assert!((f64::from(missed.short) - 0.2 / 0.7).abs() < 1e-6);
    let (bytes, end, tail) = masses(&out, 2);
    assert!(near(bytes[usize::from(b'c')].unwrap(), 0.25) && near(end, 0.26) && near(tail, 0.49));
}

#[test]
fn lists_that_are_no_top_of_a_softmax_are_refused() {
    let vocab = vocab(&[b"a".to_vec(), b"b".to_vec()]);
    let refused = |pairs: &[(u32, f32)], top| ListedRow::new(&vocab, pairs, top).unwrap_err();
    assert_eq!(
        refused(&[(0, -0.5), (0, -2.0)], 2),
        ListedError::Twice { id: 0 }
    );
    assert!(matches!(
        refused(&[(0, f32::NAN)], 1),
        ListedError::Value { id: 0, .. }
    ));
    assert!(matches!(
        refused(&[(1, 0.5)], 1),
        ListedError::Value { id: 1, .. }
    ));
    assert!(matches!(
        refused(&[(0, -0.1), (1, -0.1)], 2),
        ListedError::Sum { .. }
    ));
    assert_eq!(
        refused(&[(0, -1.0)], 2),
        ListedError::Few { got: 1, top: 2 }
    );
    let row = ListedRow::new(&vocab, &[(0, -0.5)], 1).unwrap();
    let unlisted = listed::token_bits(&vocab, &[vocab.rank_of_id()[1]], &[row.clone(), row]);
    assert_eq!(unlisted, Err(ScoreError::NotListed { row: 0 }));
}
