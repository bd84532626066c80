//! Forms of a fused record that is sent back as a target: sampled, with its tail on labels, or
//! without it.

use std::cmp::Reverse;

use crate::code::{self, FLOOR};
use crate::error::FusionError;
use crate::fusion::MASS_BITS;
use crate::records::{RecordView, Records, Symbol};

/// Draws `draws` symbols from every position and lists how often each was drawn, at most `k`.
///
/// Random-sampling distillation (arXiv 2503.16870): a symbol of probability q is drawn q x draws
/// times on the mean, so the expected target is the distribution itself, where the k largest
/// probabilities are not. The end and the tail are drawn like symbols. Where more than k different
/// symbols are drawn, the most frequent are listed (ties: the smaller) and the others count as
/// tail; k = draws never needs that, and bytes seldom do. Counts become codes, to half of a
/// sixteenth of a bit.
///
/// Position p draws from `SplitMix64` (Steele, Lea and Flood, OOPSLA 2014) seeded with the p-th
/// output of the one seeded with `seed`: integers only, the same on every machine.
///
/// # Errors
/// Where `k` is not a number of slots, or there are no draws.
pub fn sample<S: Symbol>(
    record: RecordView<'_, S>,
    draws: u32,
    seed: u64,
    k: usize,
) -> Result<Records<S>, FusionError> {
    let mut out = Records::new(k)?;
    if draws == 0 {
        return Err(FusionError::Draws);
    }
    let mut seeds = SplitMix(seed);
    let mut counts: Vec<(S, u32)> = Vec::new();
    for position in 0..record.positions() {
        let mut random = SplitMix(seeds.next());
        let total = record.total_mass(position);
        let end_mass = record
            .end()
            .get(position)
            .map_or(0, |&code| u64::from(code::mass(code)));
        counts.clear();
        counts.extend(record.listed(position).map(|(symbol, _)| (symbol, 0)));
        let (_, codes) = record.used(position);
        let (mut end, mut tail) = (0, 0);
        for _ in 0..draws {
            let drawn = (u128::from(random.next()) * u128::from(total)) >> 64;
            let mut rest = u64::try_from(drawn).unwrap_or(u64::MAX);
            let hit = codes.iter().position(|&code| {
                let mass = u64::from(code::mass(code));
                let is_here = rest < mass;
                rest = rest.saturating_sub(mass);
                is_here
            });
            match hit {
                Some(index) => counts[index].1 += 1,
                None if rest < end_mass => end += 1,
                None => tail += 1,
            }
        }
        counts.sort_unstable_by_key(|&(symbol, count)| (Reverse(count), symbol));
        let used = counts.iter().filter(|(_, count)| *count > 0).count();
        let kept = used.clamp(1, k);
        tail += counts[kept..].iter().map(|(_, count)| count).sum::<u32>();
        let code = |count: u32| code::encode_mass((u64::from(count) << 32) / u64::from(draws), 32);
        let mut listed: Vec<(S, u8)> = counts[..kept]
            .iter()
            .map(|&(symbol, count)| (symbol, code(count)))
            .collect();
        listed.sort_unstable_by_key(|&(symbol, _)| symbol);
        out.push(&listed, code(end), code(tail));
    }
    Ok(out)
}

/// The record without its tail: what is listed, and the end, has all of the mass again.
///
/// Plain top-k targets, the biased form that the literature compares with (arXiv 2503.16870,
/// section on top-k): the tail's code becomes the floor.
#[must_use]
pub fn without_tail<S: Symbol>(record: RecordView<'_, S>) -> Records<S> {
    let mut out = Records::empty(record.k());
    for position in 0..record.positions() {
        let tail = u64::from(code::mass(record.tail()[position]));
        let total = record.total_mass(position) - tail;
        let again = |code: u8| {
            let mass = (u128::from(code::mass(code)) << MASS_BITS) / u128::from(total);
            code::encode_mass(u64::try_from(mass).unwrap_or(u64::MAX), MASS_BITS)
        };
        let listed: Vec<(S, u8)> = record
            .listed(position)
            .map(|(symbol, code)| (symbol, again(code)))
            .collect();
        let end = record
            .end()
            .get(position)
            .map_or(FLOOR, |&code| again(code));
        out.push(&listed, end, FLOOR);
    }
    out
}

/// The record in `k` slots, or in its own if these are more, with its tail on `labels`: where a
/// label is not listed and a slot is free, the label is listed with all of the tail's mass.
/// Elsewhere the tail stays what it is.
///
/// A label is a draw from what the tail stands for, so a student that sees many of them learns how
/// the tail is shared out, which neither a ghost nor dropping it says. The literature's name is the
/// naive fix of top-k (arXiv 2503.16870), there for all positions; spans that are no label have
/// none here.
///
/// # Errors
/// Where there are too many slots, or `labels` are not one per position.
pub fn tail_to_labels<S: Symbol>(
    record: RecordView<'_, S>,
    labels: &[Option<S>],
    k: usize,
) -> Result<Records<S>, FusionError> {
    if labels.len() != record.positions() {
        return Err(FusionError::Labels {
            labels: labels.len(),
            expected: record.positions(),
        });
    }
    let k = k.max(record.k());
    let mut out = Records::new(k)?;
    let mut listed: Vec<(S, u8)> = Vec::with_capacity(k);
    for (position, label) in labels.iter().enumerate() {
        listed.clear();
        listed.extend(record.listed(position));
        let mut tail = record.tail()[position];
        let end = record.end().get(position).copied().unwrap_or(FLOOR);
        if let Some(label) = *label
            && tail < FLOOR
            && listed.len() < k
            && let Err(place) = listed.binary_search_by_key(&label, |&(symbol, _)| symbol)
        {
            listed.insert(place, (label, tail));
            tail = FLOOR;
        }
        out.push(&listed, end, tail);
    }
    Ok(out)
}

/// `SplitMix64`.
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Byte 1 with half, byte 2 with a quarter, the end and the tail with an eighth each.
    fn record(positions: usize) -> Records {
        let mut out = Records::new(2).unwrap();
        for _ in 0..positions {
            out.push(&[(1, 16), (2, 32)], 48, 48);
        }
        out
    }

    #[test]
    fn splitmix_is_the_published_generator() {
        // First outputs for seed 1234567, from the reference implementation by Vigna.
        let mut random = SplitMix(1_234_567);
        let first = [(); 3].map(|()| random.next());
        assert_eq!(
            first,
            [
                6_457_827_717_110_365_317,
                3_203_168_211_198_807_973,
                9_817_491_932_198_370_423
            ]
        );
    }

    #[test]
    fn the_mean_of_samples_is_the_distribution() {
        let source = record(20_000);
        let sampled = sample(source.view(), 12, 7, 2).unwrap();
        let view = sampled.view();
        assert_eq!(view.check_mass(), Ok(()));
        let mean = |of: &dyn Fn(usize) -> f64| (0..20_000).map(of).sum::<f64>() / 20_000.0;
        let listed = |byte: u8| {
            mean(&|position| {
                let found = view.listed(position).find(|(symbol, _)| *symbol == byte);
                found.map_or(0.0, |(_, code)| code::decode(code))
            })
        };
        // Twelfths, rounded to codes: 2.2 % at most each way.
        for (got, exact) in [
            (listed(1), 0.5),
            (listed(2), 0.25),
            (mean(&|position| code::decode(view.end()[position])), 0.125),
            (mean(&|position| code::decode(view.tail()[position])), 0.125),
        ] {
            assert!((got / exact - 1.0).abs() < 0.02, "{got} {exact}");
        }
        assert_eq!(sample(source.view(), 12, 7, 2).unwrap(), sampled);
        assert_ne!(sample(source.view(), 12, 8, 2).unwrap(), sampled);
        assert_eq!(sample(source.view(), 0, 7, 2), Err(FusionError::Draws));
        let narrow = sample(source.view(), 4096, 7, 1).unwrap();
        assert_eq!(narrow.view().symbols()[0], 1);
        // A quarter and an eighth are tail now.
        assert!((code::decode(narrow.view().tail()[0]) - 0.375).abs() < 0.03);
    }

    #[test]
    fn the_tail_goes_to_labels_that_are_not_listed() {
        let source = record(4);
        let labels = [Some(0), Some(2), None, Some(9)];
        let out = tail_to_labels(source.view(), &labels, 3).unwrap();
        let view = out.view();
        let listed = |position| view.listed(position).collect::<Vec<_>>();
        assert_eq!(listed(0), [(0, 48), (1, 16), (2, 32)]);
        assert_eq!(listed(1), [(1, 16), (2, 32)]);
        assert_eq!(listed(2), [(1, 16), (2, 32)]);
        assert_eq!(listed(3), [(1, 16), (2, 32), (9, 48)]);
        assert_eq!(view.tail(), [FLOOR, 48, 48, FLOOR]);
        assert_eq!(view.end(), [48; 4]);
        assert_eq!(view.check_mass(), Ok(()));
        // Without a free slot the tail stays.
        let full = tail_to_labels(source.view(), &labels, 2).unwrap();
        assert_eq!(full, source);
        assert!(tail_to_labels(source.view(), &labels[1..], 3).is_err());
        assert!(tail_to_labels(source.view(), &labels, 257).is_err());
    }

    #[test]
    fn without_its_tail_a_record_sums_to_one() {
        let whole = without_tail(record(1).view());
        let view = whole.view();
        assert_eq!(view.check_mass(), Ok(()));
        assert_eq!(view.tail(), [FLOOR]);
        assert!((code::decode(view.codes()[0]) - 0.5 / 0.875).abs() < 0.02);
        assert!((code::decode(view.end()[0]) - 0.125 / 0.875).abs() < 0.005);
    }
}
