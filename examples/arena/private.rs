//! An arm in which what leaves a source is one draw a position, from a distribution that hides what any one source knows.

use anyhow::{Context, Result, bail};
use consilium_examples::lab::clock::say;
use consilium_examples::lab::mollifier::{ALPHA, drawn, epsilon, mixed, radius, total};
use consilium_kernels::{RecordShape, code};
use consilium_node::worker::LoadedModel;
use consilium_node::worker::score::score_shard;
use consilium_protocol::shard::{Header, Shard, Symbols};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::bench::{Bench, DENSE};

/// Epsilon of one draw at order [`ALPHA`].
const DRAW: f64 = 1.0;
/// Delta of the sum over all draws.
const DELTA: f64 = 1e-5;
/// Place of the end among symbols.
const END: usize = 256;

/// `PMixED` (arXiv 2403.15638) on bytes, all sources at every position, the pivot before the round as the public model: the
/// target of a position is one symbol, drawn from the mean of the sources after each was mixed with the pivot.
///
/// The paper answers some thousand queries at epsilon 8 in all. A reference set asks one at every byte: epsilon 1 a draw is a
/// guarantee for a draw and, summed over the set, none. The sum is printed.
pub(crate) fn pmixed(bench: &Bench) -> Result<LoadedModel> {
    let shape = RecordShape {
        k: DENSE.into(),
        fill_permille: 1000,
    };
    let pivot = LoadedModel::load(&bench.pivot)?;
    let all = 0..bench.reference.items().len() as u64;
    let public = score_shard(&pivot, &bench.reference, all, &shape, &mut ())?.shard;
    let sources: Vec<Shard> = bench
        .records(DENSE)?
        .into_iter()
        .map(|(_, shard)| shard)
        .collect();
    let radius = radius(DRAW, sources.len());
    let mut random = ChaCha8Rng::seed_from_u64(bench.world.seed);
    let mut symbols = Vec::with_capacity(public.positions());
    for position in 0..public.positions() {
        let of = |shard: &Shard| distribution(shard, position);
        let sources = sources.iter().map(of).collect::<Result<Vec<_>>>()?;
        let mixed = mixed(&sources, &of(&public)?, radius);
        symbols.push(drawn(&mixed, unit(random.next_u64())));
    }
    let draws = symbols.len();
    let one = epsilon(radius, sources.len());
    say(&format!(
        "           PMixED: epsilon {one:.2} a draw at order {ALPHA}, {draws} draws: {:.0} at delta {DELTA:e}",
        total(one, draws, DELTA)
    ));
    bench.distil(&certain(&public, &symbols))
}

/// Uniform from 0 to below 1.
fn unit(bits: u64) -> f64 {
    (bits >> 11) as f64 / (1_u64 << 53) as f64
}

/// Probabilities of all bytes and the end; what is not listed shares the tail.
fn distribution(shard: &Shard, position: usize) -> Result<Vec<f64>> {
    let Symbols::Bytes(symbols) = &shard.symbols else {
        bail!("records of tokens have no bytes");
    };
    let k = usize::from(shard.header.symbols);
    let slots = position * k..(position + 1) * k;
    let (symbols, codes) = symbols
        .get(slots.clone())
        .zip(shard.codes.get(slots))
        .context("no such position")?;
    let mut mass = vec![0.0; END + 1];
    let mut listed = 0;
    for (slot, (&symbol, &code)) in symbols.iter().zip(codes).enumerate() {
        // Unused slots repeat the last symbol.
        if slot > 0 && symbols[slot - 1] == symbol {
            break;
        }
        mass[usize::from(symbol)] = code::decode(code);
        listed += 1;
    }
    let rest = code::decode(shard.tail[position]) / (END - listed).max(1) as f64;
    for mass in &mut mass[..END] {
        if *mass <= 0.0 {
            *mass = rest;
        }
    }
    mass[END] = code::decode(shard.end[position]);
    let total: f64 = mass.iter().sum();
    mass.iter_mut().for_each(|mass| *mass /= total);
    Ok(mass)
}

/// Records of the same items in which one symbol has all of the mass.
fn certain(like: &Shard, symbols: &[usize]) -> Shard {
    let code = |is_it: bool| if is_it { 0 } else { code::FLOOR };
    let is_end = |&symbol: &usize| symbol == END;
    Shard {
        header: Header {
            symbols: 1,
            ..like.header.clone()
        },
        symbols: Symbols::Bytes(
            symbols
                .iter()
                .map(|&symbol| u8::try_from(symbol).unwrap_or_default())
                .collect(),
        ),
        codes: symbols.iter().map(|symbol| code(!is_end(symbol))).collect(),
        end: symbols.iter().map(|symbol| code(is_end(symbol))).collect(),
        tail: vec![code::FLOOR; symbols.len()],
        missed: like.missed.clone(),
        offsets: like.offsets.clone(),
    }
}
