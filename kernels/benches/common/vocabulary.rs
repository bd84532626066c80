//! A made-up vocabulary shaped like that of a byte-level BPE, and text spelled with it.
#![allow(dead_code, reason = "each benchmark uses a part of this")]
#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "random numbers below small bounds"
)]

use std::collections::HashSet;
use std::io::Write;
use std::path::PathBuf;

use consilium_kernels::{Records, TokenKind, Vocab};

/// SplitMix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In 0..bound.
    pub(crate) fn below(&mut self, bound: usize) -> u32 {
        (self.next() % bound as u64) as u32
    }

    /// In 0..1.
    pub(crate) fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// In 0..bound, the first ones most often: the logarithm is uniform.
    pub(crate) fn early(&mut self, bound: usize) -> usize {
        ((bound as f64).powf(self.unit()) as usize).min(bound) - 1
    }

    /// Bell-shaped noise of standard deviation about 2.5.
    pub(crate) fn logits(&mut self, count: usize) -> Vec<f32> {
        (0..count)
            .map(|_| {
                let bits = self.next();
                let sum: u64 = (0..4).map(|part| bits >> (16 * part) & 0xffff).sum();
                (sum as f32 / 65536.0 - 2.0) * 4.3
            })
            .collect()
    }
}

const LETTERS: &[u8] = b"etaoinshrdlucmfwypvbgkqjxz";

/// A vocabulary of `len` tokens, the last of which ends a record, and the byte strings of the others
/// in the order in which merges made them: all bytes, then longer ones, half of them after a space.
pub(crate) fn vocabulary(len: usize) -> (Vocab, Vec<Vec<u8>>) {
    let mut random = Random(7);
    let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
    let mut known: HashSet<Vec<u8>> = tokens.iter().cloned().collect();
    let mut starts: [Vec<usize>; 2] = [
        vec![usize::from(b' ')],
        LETTERS.iter().map(|&letter| letter.into()).collect(),
    ];
    while tokens.len() < len - 1 {
        let kind = random.next() as usize % 2;
        let mut token = if random.next().is_multiple_of(32) {
            // Scripts of several bytes per letter.
            vec![
                0xe4 + (random.next() % 6) as u8,
                0x80 + (random.next() % 64) as u8,
            ]
        } else {
            tokens[starts[kind][random.early(starts[kind].len())]].clone()
        };
        token.push(if token[0] > 0x7f {
            0x80 + (random.next() % 64) as u8
        } else {
            LETTERS[random.early(26)]
        });
        if token.len() <= 12 && known.insert(token.clone()) {
            starts[kind].push(tokens.len());
            tokens.push(token);
        }
    }
    let kinds = tokens.iter().map(|token| TokenKind::Bytes(token));
    let vocab = Vocab::new(kinds.chain([TokenKind::EndOfRecord])).expect("bytes and an end");
    (vocab, tokens)
}

/// Ranks of a text in which tokens follow Zipf's law, one in ten a single letter.
pub(crate) fn text(vocab: &Vocab, tokens: &[Vec<u8>], len: usize) -> Vec<u32> {
    let mut random = Random(11);
    (0..len)
        .map(|_| {
            let id = match random.next() % 10 {
                0 => LETTERS[random.early(26)].into(),
                _ => 256 + random.early(tokens.len() - 256),
            };
            vocab.rank_of_id()[id]
        })
        .collect()
}

/// Writes the tokens in rank order as hex lines, then the text as ranks, for a twin.
pub(crate) fn write_for_twin(name: &str, vocab: &Vocab, text: &[u32]) -> PathBuf {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    let file = std::fs::File::create(&path).expect("the target folder is writable");
    let mut file = std::io::BufWriter::new(file);
    for rank in 0..vocab.byte_tokens() {
        let hex: String = vocab
            .token_bytes(rank)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        writeln!(file, "{hex}").expect("the target folder is writable");
    }
    let ranks: Vec<String> = text.iter().map(u32::to_string).collect();
    writeln!(file, "text {}", ranks.join(" ")).expect("the target folder is writable");
    path
}

/// The observed byte and letters, `k` in all.
pub(crate) fn byte_target(vocab: &Vocab, tokens: &[u32], k: usize) -> Records {
    let text: Vec<u8> = tokens
        .iter()
        .flat_map(|&rank| vocab.token_bytes(rank))
        .copied()
        .collect();
    let mut random = Random(6);
    let (mut symbols, mut codes) = (Vec::new(), Vec::new());
    for position in 0..=text.len() {
        let observed = text.get(position).copied().unwrap_or(b' ');
        let mut listed = vec![observed, b' ', b'e'];
        while listed.len() < k {
            listed.push(b'a' + (random.next() % 26) as u8);
            listed.sort_unstable();
            listed.dedup();
        }
        listed.truncate(k);
        codes.extend(
            listed
                .iter()
                .map(|&byte| if byte == observed { 16 } else { 90 }),
        );
        symbols.extend(listed);
    }
    let positions = text.len() + 1;
    Records::from_columns(
        k,
        symbols,
        codes,
        vec![150; positions],
        vec![100; positions],
    )
    .expect("ascending bytes")
}
