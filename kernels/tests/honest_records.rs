//! Records are the true next-byte distribution where one extra forward per stop can make them so.
#![cfg(test)]

use std::collections::BTreeMap;

use consilium_kernels::{RecordShape, Records, TokenKind, Vocab, code, score};

/// A model over the tokens a, b, c, ab and end, which looks at the last two tokens.
///
/// It never writes a then b, which its tokenizer would have written ab: that, with tokens of at
/// most two bytes, is the case in which no other tokenisation of the text has mass.
struct Model {
    vocab: Vocab,
    seed: u64,
}

const END: &[u8] = b"";
const TOKENS: [&[u8]; 5] = [b"a", b"b", b"c", b"ab", END];

impl Model {
    fn new(seed: u64) -> Self {
        let kinds = TOKENS.map(|token| match token {
            END => TokenKind::EndOfRecord,
            bytes => TokenKind::Bytes(bytes),
        });
        Self {
            vocab: Vocab::new(kinds).unwrap(),
            seed,
        }
    }

    fn rank(&self, token: &[u8]) -> u32 {
        (0..5)
            .find(|&rank| self.vocab.token_bytes(rank) == token)
            .unwrap()
    }

    /// Logits after a history of tokens, in rank order.
    fn logits(&self, history: &[&[u8]]) -> Vec<f32> {
        let recent = history
            .iter()
            .rev()
            .take(2)
            .fold(self.seed, |state, token| {
                let token = TOKENS.iter().position(|other| other == token).unwrap() as u64;
                mix(state ^ (token + 1))
            });
        (0..5_u32)
            .map(|rank| {
                if history.last() == Some(&&b"a"[..]) && self.vocab.token_bytes(rank) == b"b" {
                    return -1e4;
                }
                (mix(recent ^ u64::from(rank)) >> 40) as f32 / (1 << 22) as f32 - 2.0
            })
            .collect()
    }

    fn probabilities(&self, history: &[&[u8]]) -> BTreeMap<&'static [u8], f64> {
        let logits = self.logits(history);
        let total: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
        TOKENS
            .map(|token| {
                (
                    token,
                    f64::from(logits[self.rank(token) as usize]).exp() / total,
                )
            })
            .into()
    }

    /// Joint mass of every way to write `text`, split by the byte that follows (none: the end),
    /// whatever the tokens.
    fn continue_by(
        &self,
        text: &[u8],
        history: &mut Vec<&'static [u8]>,
        mass: f64,
        out: &mut BTreeMap<Option<u8>, f64>,
    ) {
        for (token, share) in self.probabilities(history) {
            let mass = mass * share;
            if mass == 0.0 {
                continue;
            }
            if token == END {
                if text.is_empty() {
                    *out.entry(None).or_default() += mass;
                }
            } else if token.len() > text.len() {
                if token.starts_with(text) {
                    *out.entry(Some(token[text.len()])).or_default() += mass;
                }
            } else if let Some(rest) = text.strip_prefix(token) {
                history.push(token);
                self.continue_by(rest, history, mass, out);
                history.pop();
            }
        }
    }
}

fn mix(state: u64) -> u64 {
    let z = (state.wrapping_add(0x9e37_79b9_7f4a_7c15)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 29)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 32)
}

const ITEMS: [&[&[u8]]; 7] = [
    &[],
    &[b"ab"],
    &[b"a"],
    &[b"ab", b"c", b"a", b"c", b"ab", b"ab"],
    &[b"a", b"a", b"ab", b"b", b"c"],
    &[b"b", b"a", b"ab", b"a", b"c", b"a"],
    &[b"c", b"ab", b"a"],
];

fn score(model: &Model, item: &[&[u8]], threshold: f32) -> (Records, score::Missed) {
    let vocab = &model.vocab;
    let tokens: Vec<u32> = item.iter().map(|token| model.rank(token)).collect();
    let logits: Vec<f32> = (0..=item.len())
        .flat_map(|i| model.logits(&item[..i]))
        .collect();
    let branches = score::branches(vocab, &tokens, &logits, threshold).unwrap();
    let mut branch_logits = Vec::new();
    for branch in &branches {
        let mut history = item[..branch.position as usize].to_vec();
        history.push(vocab.token_bytes(branch.rank));
        branch_logits.extend(model.logits(&history));
    }
    let shape = RecordShape {
        k: 3,
        fill_permille: 1000,
    };
    let mut records = Records::new(3).unwrap();
    let missed = score::records(
        vocab,
        &tokens,
        &logits,
        &branches,
        &branch_logits,
        &shape,
        &mut records,
    )
    .unwrap();
    (records, missed)
}

#[test]
fn with_a_forward_for_every_stop_records_are_exact() {
    for seed in 0..50 {
        let model = Model::new(seed);
        for item in ITEMS {
            let text = item.concat();
            let (records, missed) = score(&model, item, 0.0);
            assert!(missed.short.abs() + missed.long.abs() < 1e-9, "{missed:?}");
            let view = records.view();
            for position in 0..=text.len() {
                let mut joint = BTreeMap::new();
                model.continue_by(&text[..position], &mut Vec::new(), 1.0, &mut joint);
                let total: f64 = joint.values().sum();
                let exact = |symbol| joint.get(&symbol).copied().unwrap_or(0.0) / total;
                let at = view.slice(position..position + 1).unwrap();
                assert_close(at.end()[0], exact(None));
                for byte in *b"abc" {
                    let slot = at.symbols().iter().position(|&symbol| symbol == byte);
                    assert_close(
                        slot.map_or(code::FLOOR, |slot| at.codes()[slot]),
                        exact(Some(byte)),
                    );
                }
            }
        }
    }
}

#[test]
fn without_forwards_the_mass_that_stopped_is_reported() {
    let model = Model::new(3);
    let (plain, missed) = score(&model, &[b"ab"], 2.0);
    let probabilities = model.probabilities(&[]);
    let (a, ab) = (probabilities[&b"a"[..]], probabilities[&b"ab"[..]]);
    assert!((f64::from(missed.short) - a / (a + ab)).abs() < 1e-6);
    // All that is left after a is ab, so b looks certain: what makes plain records dishonest.
    let inside = plain.view().slice(1..2).unwrap();
    assert_eq!((inside.symbols()[0], inside.codes()[0]), (b'b', 0));
}

#[test]
fn what_runs_past_a_boundary_is_reported() {
    // After a the model may be inside ab: the text a, b (which this model never writes) drops that
    // case after b.
    let model = Model::new(9);
    let (_, missed) = score(&model, &[b"a", b"b"], 0.0);
    assert!(missed.long > 0.999, "{missed:?}");
}

fn assert_close(code: u8, exact: f64) {
    let sixteenths = (-16.0 * exact.log2()).clamp(0.0, 255.0);
    assert!(
        (f64::from(code) - sixteenths).abs() < 0.501,
        "code {code} for {exact:e}"
    );
}
