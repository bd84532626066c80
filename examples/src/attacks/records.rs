//! Attacks on records of bytes: one shard of the attacker's own model, and what it knows of the honest, make one that harms.
//!
//! Every attack works on whole distributions of 257 symbols and is written back in the shard's own number of slots, so that
//! it passes admission: masses sum to one, symbols ascend. Most work at every position. An attacker that wants to win the
//! routing behaves where routing looks; [`Aim::Unlabeled`] keeps its records honest at all labelled bytes.

use anyhow::{Context, Result, ensure};
use consilium_kernels::code;
use consilium_protocol::reference::Item;
use consilium_protocol::shard::{Shard, Symbols};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Symbols of a position: bytes, and the end of the record.
pub const SYMBOLS: usize = 257;
/// Mass that an attacker gives what it pushes: less than one, so that codes can say the rest.
const PUSH: f64 = 0.99;
/// Smallest probability in a negated or heated distribution: the floor of codes.
const FLOOR: f64 = 1.6e-5;

/// A distribution over bytes and the end of the record.
pub type Distribution = [f64; SYMBOLS];

/// An attack. Each says where it comes from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Attack {
    /// Logits negated: the likeliest becomes the least likely. The sign flip of distributed learning (Blanchard et al., arXiv
    /// 1703.02757, among others), of logits.
    SignFlip,
    /// Knows nothing: the uniform distribution.
    Uniform,
    /// FDLA (arXiv 2401.03685): the confidences of the listed symbols in another order, here the reverse one, so that the
    /// profile stays what it was.
    Permutation,
    /// LMA (arXiv 2402.12265): all mass on the symbol that is least likely under the mean of the honest.
    LeastLikely,
    /// CPA (arXiv 2402.12265): all mass on the symbol least similar to the honest mean's first choice. Similarity is the
    /// covariance of their probabilities, here over the positions of the shard.
    LeastSimilar,
    /// PCFDLA (arXiv 2407.18039): as FDLA, with the peak held at a value that does not stand out. The wrong peak gets this
    /// mass and all else keeps its proportions.
    PeakControlled {
        /// Mass of the peak, 0 to 1; 0.5 is a usual confidence.
        peak: f64,
    },
    /// All colluders push the honest mean's second choice: the strongest of the toy calibration, and the code of arXiv
    /// 2402.12265 has it as its adversarial sign flip. Of one attacker or of many, the same shard.
    RunnerUp,
    /// Logits times a factor: 100 makes every first choice certain, 0.01 makes all equal.
    Temperature {
        /// What logits are multiplied with.
        factor: f64,
    },
    /// Fills all slots with symbols that nobody else lists, drawn at random: the targets' slots are taken by them. After
    /// the top-k attack on `FedMD` (`FedTGD`, ICDCS 2024).
    TopKSet {
        /// Seed of the choice.
        seed: u64,
    },
    /// Pushes one byte everywhere: the token of a backdoor.
    ConstantByte {
        /// The byte.
        byte: u8,
    },
    /// Gives the observed text a high probability, and so wins the routing, whatever its model thinks. What decoys are for.
    ReadsText,
}

impl Attack {
    /// Every attack, with the parameters of the arena.
    pub const ALL: [Self; 12] = [
        Self::SignFlip,
        Self::Uniform,
        Self::Permutation,
        Self::LeastLikely,
        Self::LeastSimilar,
        Self::PeakControlled { peak: 0.5 },
        Self::RunnerUp,
        Self::Temperature { factor: 100.0 },
        Self::Temperature { factor: 0.01 },
        Self::TopKSet { seed: 1 },
        Self::ConstantByte { byte: b'~' },
        Self::ReadsText,
    ];

    /// Its name in a table.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::SignFlip => "sign flip",
            Self::Uniform => "uniform",
            Self::Permutation => "permutation (FDLA)",
            Self::LeastLikely => "least likely (LMA)",
            Self::LeastSimilar => "least similar (CPA)",
            Self::PeakControlled { .. } => "peak-controlled",
            Self::RunnerUp => "runner-up collusion",
            Self::Temperature { factor } if *factor > 1.0 => "temperature, sharp",
            Self::Temperature { .. } => "temperature, flat",
            Self::TopKSet { .. } => "top-k set",
            Self::ConstantByte { .. } => "constant byte",
            Self::ReadsText => "reads the text",
        }
    }
}

/// Where an attacker departs from its own model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Aim {
    /// Everywhere.
    All,
    /// Only in spans that are declared to be no label, where routing does not look.
    Unlabeled,
}

/// The shard that an attacker hands over.
///
/// `own` is that of its own model, `honest` are those that it has come to know (what it can guess of them, at worst all), `items`
/// the reference items that the shards cover. Without honest shards the attacker takes its own for them.
///
/// # Errors
/// Shards of tokens, or of other items than `items`.
pub fn attacked(
    attack: Attack,
    aim: Aim,
    own: &Shard,
    honest: &[&Shard],
    items: &[Item],
) -> Result<Shard> {
    ensure!(
        own.offsets.len() == items.len() + 1,
        "the shard has {} items, the reference set {}",
        own.offsets.len().saturating_sub(1),
        items.len()
    );
    let known: Vec<&Shard> = if honest.is_empty() {
        vec![own]
    } else {
        honest.to_vec()
    };
    let means = means(&known, own.positions())?;
    let covariance = matches!(attack, Attack::LeastSimilar).then(|| Covariance::of(&means));
    let mut out = own.clone();
    for (index, item) in items.iter().enumerate() {
        let positions = own.item(index).context("an item without positions")?;
        let target = item.target.as_bytes();
        ensure!(
            positions.len() == target.len() + 1,
            "item {index} has {} positions, its target {} bytes",
            positions.len(),
            target.len()
        );
        for (place, position) in positions.enumerate() {
            let is_unlabeled = item.unlabeled.iter().any(|span| span.contains(&place));
            if aim == Aim::Unlabeled && !is_unlabeled {
                continue;
            }
            let observed = target
                .get(place)
                .map_or(SYMBOLS - 1, |byte| usize::from(*byte));
            let view = Position {
                own: &distribution(own, position)?,
                mean: &means[position],
                listed: &listed(&known, position)?,
                observed,
                slots: own.header.symbols.into(),
                position,
            };
            write(
                &mut out,
                position,
                &view.turned(attack, covariance.as_ref()),
            )?;
        }
    }
    Ok(out)
}

/// What an attacker looks at in one position.
struct Position<'a> {
    own: &'a Distribution,
    mean: &'a Distribution,
    /// Whether any honest source lists the symbol.
    listed: &'a [bool; SYMBOLS],
    observed: usize,
    slots: usize,
    position: usize,
}

impl Position<'_> {
    fn turned(&self, attack: Attack, covariance: Option<&Covariance>) -> Distribution {
        match attack {
            Attack::SignFlip => heated(self.own, -1.0),
            Attack::Uniform => [1.0 / SYMBOLS as f64; SYMBOLS],
            Attack::Permutation => {
                let order = self.order();
                let mut out = *self.own;
                for (from, to) in order.iter().zip(order.iter().rev()) {
                    out[*to] = self.own[*from];
                }
                out
            }
            Attack::LeastLikely => pushed(extreme(self.mean, |a, b| a < b)),
            Attack::LeastSimilar => {
                let first = extreme(self.mean, |a, b| a > b);
                pushed(covariance.map_or(first, |known| known.least_with(first)))
            }
            Attack::PeakControlled { peak } => {
                let order = self.order();
                let wrong = *order.last().unwrap_or(&0);
                let rest = 1.0 - self.own[wrong];
                let mut out = self.own.map(|mass| mass * (1.0 - peak) / rest.max(FLOOR));
                out[wrong] = peak;
                out
            }
            Attack::RunnerUp => {
                let first = extreme(self.mean, |a, b| a > b);
                let mut others = *self.mean;
                others[first] = -1.0;
                pushed(extreme(&others, |a, b| a > b))
            }
            Attack::Temperature { factor } => heated(self.own, factor),
            Attack::TopKSet { seed } => self.foreign(seed),
            Attack::ConstantByte { byte } => pushed(byte.into()),
            Attack::ReadsText => pushed(self.observed),
        }
    }

    /// The likeliest symbols of its own, as many as there are slots, in descending order.
    fn order(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..SYMBOLS).collect();
        order.sort_by(|&a, &b| self.own[b].total_cmp(&self.own[a]));
        order.truncate(self.slots.max(2));
        order
    }

    /// Equal masses on as many bytes that nobody lists as there are slots.
    fn foreign(&self, seed: u64) -> Distribution {
        let mut bytes: Vec<usize> = (0..SYMBOLS - 1)
            .filter(|&byte| !self.listed[byte])
            .collect();
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        random.set_stream(self.position as u64);
        let _ = random.next_u64();
        bytes.shuffle(&mut random);
        bytes.truncate(self.slots);
        let mut out = [(1.0 - PUSH) / SYMBOLS as f64; SYMBOLS];
        let share = PUSH / bytes.len().max(1) as f64;
        for byte in bytes {
            out[byte] += share;
        }
        out
    }
}

/// Almost all mass on one symbol.
fn pushed(symbol: usize) -> Distribution {
    let mut out = [(1.0 - PUSH) / (SYMBOLS - 1) as f64; SYMBOLS];
    out[symbol] = PUSH;
    out
}

/// Logits times a factor.
fn heated(masses: &Distribution, factor: f64) -> Distribution {
    let logits = masses.map(|mass| mass.max(FLOOR).ln() * factor);
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let powers = logits.map(|logit| (logit - largest).exp());
    let sum: f64 = powers.iter().sum();
    powers.map(|power| power / sum)
}

/// The first symbol that no other beats.
fn extreme(masses: &Distribution, beats: impl Fn(f64, f64) -> bool) -> usize {
    let mut best = 0;
    for (symbol, &mass) in masses.iter().enumerate() {
        if beats(mass, masses[best]) {
            best = symbol;
        }
    }
    best
}

/// Covariance of the probabilities of any two symbols, over the positions of a shard.
struct Covariance {
    products: Vec<f64>,
    means: Distribution,
}

impl Covariance {
    fn of(masses: &[Distribution]) -> Self {
        let count = masses.len().max(1) as f64;
        let mut products = vec![0.0; SYMBOLS * SYMBOLS];
        let mut means = [0.0; SYMBOLS];
        for masses in masses {
            for (a, row) in products.chunks_exact_mut(SYMBOLS).enumerate() {
                means[a] += masses[a] / count;
                // What is small changes no least element.
                if masses[a] < 1e-4 {
                    continue;
                }
                for (product, mass) in row.iter_mut().zip(masses) {
                    *product += masses[a] * mass / count;
                }
            }
        }
        Self { products, means }
    }

    fn least_with(&self, symbol: usize) -> usize {
        let row = &self.products[symbol * SYMBOLS..(symbol + 1) * SYMBOLS];
        let mut covariances = [0.0; SYMBOLS];
        for (other, (covariance, product)) in covariances.iter_mut().zip(row).enumerate() {
            *covariance = product - self.means[symbol] * self.means[other];
        }
        covariances[symbol] = f64::INFINITY;
        extreme(&covariances, |a, b| a < b)
    }
}

/// The mean of the shards' distributions at every position.
fn means(shards: &[&Shard], positions: usize) -> Result<Vec<Distribution>> {
    (0..positions)
        .map(|position| {
            let mut mean = [0.0; SYMBOLS];
            for shard in shards {
                let masses = distribution(shard, position)?;
                for (mean, mass) in mean.iter_mut().zip(masses) {
                    *mean += mass / shards.len() as f64;
                }
            }
            Ok(mean)
        })
        .collect()
}

fn listed(shards: &[&Shard], position: usize) -> Result<[bool; SYMBOLS]> {
    let mut listed = [false; SYMBOLS];
    for shard in shards {
        for (byte, _) in slots(shard, position)? {
            listed[usize::from(byte)] = true;
        }
    }
    Ok(listed)
}

/// Used slots of a position.
fn slots(shard: &Shard, position: usize) -> Result<Vec<(u8, u8)>> {
    let Symbols::Bytes(symbols) = &shard.symbols else {
        anyhow::bail!("records of tokens: these attacks are on bytes");
    };
    let k = usize::from(shard.header.symbols);
    let range = position * k..(position + 1) * k;
    let symbols = symbols.get(range.clone()).context("no such position")?;
    let codes = shard.codes.get(range).context("no such position")?;
    let mut used: Vec<(u8, u8)> = symbols.iter().copied().zip(codes.iter().copied()).collect();
    // Unused slots repeat the last symbol.
    used.dedup_by_key(|(symbol, _)| *symbol);
    Ok(used)
}

/// The distribution that a shard states at a position; its tail lies evenly on all that it does not list.
///
/// # Errors
/// A shard of tokens, or no such position.
pub fn distribution(shard: &Shard, position: usize) -> Result<Distribution> {
    let used = slots(shard, position)?;
    let tail = code::decode(*shard.tail.get(position).context("no such position")?);
    let share = tail / (SYMBOLS - 1 - used.len()).max(1) as f64;
    let mut masses = [share; SYMBOLS];
    for (byte, code) in used {
        masses[usize::from(byte)] = code::decode(code);
    }
    masses[SYMBOLS - 1] = code::decode(*shard.end.get(position).context("no such position")?);
    let sum: f64 = masses.iter().sum();
    Ok(masses.map(|mass| mass / sum))
}

/// Writes a distribution into a position: the largest masses in the slots, the others in the tail.
fn write(shard: &mut Shard, position: usize, masses: &Distribution) -> Result<()> {
    let k = usize::from(shard.header.symbols);
    let mut order: Vec<usize> = (0..SYMBOLS - 1).collect();
    order.sort_by(|&a, &b| masses[b].total_cmp(&masses[a]));
    order.truncate(k);
    order.sort_unstable();
    let listed: f64 = order.iter().map(|&byte| masses[byte]).sum();
    let Symbols::Bytes(symbols) = &mut shard.symbols else {
        anyhow::bail!("records of tokens: these attacks are on bytes");
    };
    for (slot, &byte) in (position * k..).zip(&order) {
        symbols[slot] = u8::try_from(byte).context("a byte")?;
        shard.codes[slot] = code::encode(masses[byte]);
    }
    let end = masses[SYMBOLS - 1];
    shard.end[position] = code::encode(end);
    shard.tail[position] = code::encode((1.0 - listed - end).max(0.0));
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use consilium_kernels::RecordView;
    use consilium_protocol::Digest;
    use consilium_protocol::manifest::SymbolSpace;
    use consilium_protocol::shard::Header;

    use super::*;

    fn items() -> Vec<Item> {
        ["abca", "bcab"]
            .map(|target| Item {
                target: target.to_owned(),
                unlabeled: vec![Range { start: 1, end: 2 }],
                ..Item::default()
            })
            .to_vec()
    }

    /// The observed byte with `first`, the next one with most of the rest.
    fn shard(first: f64) -> Shard {
        let header = Header::new(Digest::of(b"set"), 0..2, SymbolSpace::Bytes, 4);
        let mut shard = Shard {
            header,
            symbols: Symbols::Bytes(vec![0; 40]),
            codes: vec![255; 40],
            end: vec![255; 10],
            tail: vec![255; 10],
            missed: vec![255; 4],
            offsets: vec![0, 5, 10],
        };
        for (index, item) in items().iter().enumerate() {
            for place in 0..5 {
                let observed = item
                    .target
                    .as_bytes()
                    .get(place)
                    .map_or(SYMBOLS - 1, |b| usize::from(*b));
                let mut masses = [0.02 / SYMBOLS as f64; SYMBOLS];
                masses[observed] += first;
                masses[(observed + 1) % 256] += 0.9 * (0.98 - first);
                masses[(observed + 2) % 256] += 0.1 * (0.98 - first);
                write(&mut shard, index * 5 + place, &masses).unwrap();
            }
        }
        shard
    }

    fn top(shard: &Shard, position: usize) -> usize {
        extreme(&distribution(shard, position).unwrap(), |a, b| a > b)
    }

    #[test]
    fn every_attack_passes_admission_and_is_its_own_function_of_its_inputs() {
        let (own, other) = (shard(0.7), shard(0.6));
        for attack in Attack::ALL {
            let run = || attacked(attack, Aim::All, &own, &[&own, &other], &items()).unwrap();
            let bad = run();
            assert_eq!(bad, run(), "{}", attack.name());
            assert_ne!(bad, own, "{}", attack.name());
            assert_eq!(Shard::parse(&bad.to_bytes().unwrap()).unwrap(), bad);
            let Symbols::Bytes(symbols) = &bad.symbols else {
                panic!("bytes")
            };
            let view = RecordView::new(4, symbols, &bad.codes, &bad.end, &bad.tail).unwrap();
            view.check_mass()
                .unwrap_or_else(|error| panic!("{}: {error}", attack.name()));
        }
    }

    #[test]
    fn each_attack_pushes_what_it_says() {
        let own = shard(0.7);
        let turned = |attack| attacked(attack, Aim::All, &own, &[&shard(0.6)], &items()).unwrap();
        let b = usize::from(b'b');
        // Position 1 of the first item observes b: c comes second, d third, and all else is alike.
        assert_eq!(top(&own, 1), b);
        assert_eq!(top(&turned(Attack::RunnerUp), 1), b + 1);
        assert_eq!(top(&turned(Attack::Temperature { factor: 100.0 }), 1), b);
        assert_eq!(
            top(&turned(Attack::ConstantByte { byte: b'~' }), 1),
            usize::from(b'~')
        );
        assert_eq!(top(&turned(Attack::ReadsText), 1), b);
        assert_ne!(top(&turned(Attack::Permutation), 1), b);
        let mass = |attack, symbol: usize| distribution(&turned(attack), 1).unwrap()[symbol];
        // The negated distribution is flat among what was unlikely.
        assert!(mass(Attack::SignFlip, b) < 0.005);
        assert!(mass(Attack::LeastLikely, b) < 1e-3);
        assert!(mass(Attack::LeastSimilar, b) < 1e-3);
        assert!(mass(Attack::Uniform, b) < 0.005);
        assert!(mass(Attack::TopKSet { seed: 1 }, b) < 0.005);
        let peaked = distribution(&turned(Attack::PeakControlled { peak: 0.5 }), 1).unwrap();
        let largest = peaked.iter().copied().fold(0.0, f64::max);
        assert!((largest - 0.5).abs() < 0.03 && peaked[b] < 0.4, "{largest}");
    }

    #[test]
    fn an_attack_on_unlabeled_spans_leaves_all_labels_as_they_were() {
        let own = shard(0.7);
        let bad = attacked(Attack::SignFlip, Aim::Unlabeled, &own, &[], &items()).unwrap();
        for position in 0..10 {
            let same = distribution(&own, position).unwrap().map(f64::to_bits)
                == distribution(&bad, position).unwrap().map(f64::to_bits);
            assert_eq!(same, position % 5 != 1, "position {position}");
        }
        assert!(attacked(Attack::SignFlip, Aim::All, &own, &[], &items()[..1]).is_err());
    }
}
