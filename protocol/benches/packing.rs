//! Packing and unpacking of chunks on one core, digests included: rates of raw bytes, and packed bytes per position.
//!
//! `CONSILIUM_BENCH_SHARD` names a shard of records, a safetensors file; without it a shard with the statistics of a
//! trained model's records is made up. Rates are medians of seven.
#![expect(clippy::print_stdout, reason = "a benchmark prints its table")]

use std::time::Instant;

use consilium_protocol::quic::chunk::{ChunkHeader, HEADER, Packer, Stride, Unpacker};
use consilium_protocol::shard::Shard;
use consilium_protocol::{Digest, limits};

const REPETITIONS: usize = 7;
const SLOTS: usize = 16;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let shard = match std::env::var_os("CONSILIUM_BENCH_SHARD") {
        Some(path) => std::fs::read(path)?,
        None => made_up(35_000),
    };
    let positions = Shard::parse(&shard).map_or(35_000, |shard| shard.positions());
    let floats: Vec<u8> = (0..4_u32 << 20)
        .flat_map(|at| bell(at).to_le_bytes())
        .collect();
    println!(
        "{:<22} {:>10} {:>10} {:>10} {:>10} {:>12}",
        "content", "pack MB/s", "unpack", "SHA-256", "memcpy", "packed share"
    );
    for (name, content, stride) in [
        ("records", &shard, Some(Stride::BYTES)),
        ("records, by slots", &shard, Stride::new(16)),
        ("floats", &floats, Some(Stride::FLOATS)),
    ] {
        let stride = stride.unwrap_or(Stride::BYTES);
        let repeated = content.repeat((16 << 20) / content.len() + 1);
        let chunks = pack(&repeated, stride)?;
        let packed: usize = chunks.iter().map(Vec::len).sum();
        let (mut packer, mut chunk) = (Packer::new(stride)?, Vec::new());
        let pack_rate = rate(repeated.len(), || {
            for raw in repeated.chunks(limits::CHUNK) {
                chunk.clear();
                packer.pack(raw, &mut chunk);
            }
            Ok(())
        })?;
        let (mut unpacker, mut raw) = (Unpacker::new()?, Vec::new());
        let unpack_rate = rate(repeated.len(), || {
            unpack(&mut unpacker, &chunks, &mut raw, repeated.len())
        })?;
        let mut copy = vec![0; repeated.len()];
        let copy_rate = rate(repeated.len(), || {
            copy.copy_from_slice(std::hint::black_box(&repeated));
            Ok(())
        })?;
        let digest_rate = rate(repeated.len(), || {
            std::hint::black_box(Digest::of(&repeated));
            Ok(())
        })?;
        let share = packed as f64 / repeated.len() as f64;
        println!(
            "{name:<22} {pack_rate:>10.0} {unpack_rate:>10.0} {digest_rate:>10.0} {copy_rate:>10.0} {share:>12.4}"
        );
        if name.starts_with("records") {
            let bytes = pack(content, stride)?.iter().map(Vec::len).sum::<usize>();
            println!(
                "{:<22} {:.2} bytes per position",
                "",
                bytes as f64 / positions as f64
            );
        }
    }
    Ok(())
}

type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

/// Chunks, headers included.
fn pack(content: &[u8], stride: Stride) -> Fallible<Vec<Vec<u8>>> {
    let mut packer = Packer::new(stride)?;
    let chunks = content.chunks(limits::CHUNK).map(|raw| {
        let mut chunk = Vec::new();
        packer.pack(raw, &mut chunk);
        chunk
    });
    Ok(chunks.collect())
}

fn unpack(
    unpacker: &mut Unpacker,
    chunks: &[Vec<u8>],
    raw: &mut Vec<u8>,
    length: usize,
) -> Fallible<()> {
    let mut remaining = length;
    for chunk in chunks {
        let (header, body) = chunk.split_first_chunk::<HEADER>().ok_or("a short chunk")?;
        let header = ChunkHeader::parse(header, remaining as u64)?;
        unpacker.unpack(&header, body, raw)?;
        remaining -= raw.len();
    }
    Ok(())
}

/// Megabytes per second.
fn rate(bytes: usize, mut work: impl FnMut() -> Fallible<()>) -> Fallible<f64> {
    work()?;
    let mut seconds = Vec::new();
    for _ in 0..REPETITIONS {
        #[expect(clippy::disallowed_methods, reason = "a benchmark reads the clock")]
        let start = Instant::now();
        work()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    Ok(bytes as f64 / seconds[REPETITIONS / 2] / 1e6)
}

/// Columns of records: four used slots on average, and positions that come again as words do.
#[expect(clippy::cast_possible_truncation, reason = "below 256")]
fn made_up(positions: u64) -> Vec<u8> {
    let (mut symbols, mut codes, mut end, mut tail) = (vec![], vec![], vec![], vec![]);
    for position in 0..positions {
        // Of every ten positions nine repeat one of 800, as the inside of a frequent word does.
        let word = if random(position) % 10 < 9 {
            random(position) / 10 % 800
        } else {
            1000 + position
        };
        let used = 1 + (random(word ^ 0x55) % 4 + random(word ^ 0xaa) % 5) as usize;
        for slot in 0..SLOTS {
            let at = slot.min(used - 1);
            symbols.push(b' ' + (at * 12) as u8 + (random(word << 8 | at as u64) % 12) as u8);
            let code = random(word << 9 | at as u64) % 120;
            let drift = random(position << 8 | at as u64) % 16 / 14;
            codes.push(if slot < used {
                (code + drift) as u8
            } else {
                u8::MAX
            });
        }
        end.push(255 - (random(position) % 2) as u8);
        tail.push(120 + (random(word) % 40) as u8);
    }
    [codes, end, symbols, tail].concat()
}

/// Values around zero, as trained adapters have them.
fn bell(at: u32) -> f32 {
    let bits = random(u64::from(at));
    let sum: u64 = (0..4).map(|part| bits >> (16 * part) & 0xffff).sum();
    (sum as f32 - 131_070.0) * 1e-6
}

/// SplitMix64 of an index.
fn random(index: u64) -> u64 {
    let mut z = index
        .wrapping_add(0x9e37_79b9_7f4a_7c15)
        .wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
