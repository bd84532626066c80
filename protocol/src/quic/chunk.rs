//! One chunk of a transfer: packed by the sender, checked and unpacked by the receiver. Pure.
//!
//! ```text
//! raw length u32 | packed length u32 | stride u8 | SHA-256 of these 9 bytes and the packed ones | packed bytes
//! ```
//!
//! Integers are little-endian; the header is 41 bytes. The digest is of what is sent: it is checked before anything is
//! unpacked, and records pack to a sixth of what would have to be hashed otherwise. That of the whole content, which is
//! its name, is of the raw bytes. Stride 0: the packed bytes are the raw ones. Stride s from 1: they
//! are one zstd frame of the raw bytes in the order 0, s, 2s, ..., 1, s+1, ... within the whole rows of s bytes, followed
//! by the rest. Columns of floats compress where rows do not.
//!
//! A packed chunk is shorter than its raw bytes, and only the last chunk of a transfer may be shorter than [`SHORTEST`].

use sha2::{Digest as _, Sha256};
use zstd::bulk::{Compressor, Decompressor};

use crate::ids::Digest;
use crate::limits;

/// Bytes of a header.
pub const HEADER: usize = 41;
/// Shortest raw content of a chunk, but for the last: keeps a peer from sending a file byte by byte.
pub const SHORTEST: usize = 64 * 1024;

const LEVEL: i32 = 1;
/// Bytes of a float.
const FLOAT: usize = 4;
/// Rows that are transposed at once: their source fits the first-level cache at any stride.
const TILE: usize = 64;
/// Chunks that are stored unasked after one that hardly became shorter.
const PAUSE: u8 = 7;

/// Why bytes are no chunk.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChunkError {
    /// No raw bytes, or more than a chunk or the rest of the content has.
    #[error("chunk of {length} bytes, expected {least} to {most}")]
    Length {
        /// Announced bytes.
        length: usize,
        /// Fewest that may come here.
        least: usize,
        /// Most that may come here.
        most: usize,
    },
    /// Packed bytes that cannot be.
    #[error("chunk of {raw} bytes packed into {packed} at stride {stride}")]
    Packed {
        /// Announced raw bytes.
        raw: usize,
        /// Announced packed bytes.
        packed: usize,
        /// Announced stride.
        stride: u8,
    },
    /// The packed bytes do not unpack to the announced length.
    #[error("the packed bytes of a chunk are damaged")]
    Damaged,
    /// What arrived has another digest.
    #[error("a chunk does not match its digest")]
    Digest,
}

/// Distance between bytes that resemble each other: 4 for floats, 1 for all else.
///
/// Records have slots, but are no columns: used slots vary from position to position, and what zstd
/// finds are whole rows that come again. Records of a trained model, 16 slots: 5.5 bytes per
/// position at stride 1, 10.2 at 16.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stride(u8);

impl Stride {
    /// Neighbours resemble each other.
    pub const BYTES: Self = Self(1);
    /// Little-endian floats of four bytes.
    pub const FLOATS: Self = Self(4);

    /// Any distance; `None` for 0.
    #[must_use]
    pub const fn new(bytes: u8) -> Option<Self> {
        if bytes == 0 { None } else { Some(Self(bytes)) }
    }

    /// The distance in bytes, from 1.
    #[must_use]
    pub const fn get(self) -> u8 {
        self.0
    }
}

/// What precedes the packed bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkHeader {
    raw: u32,
    packed: u32,
    stride: u8,
    digest: Digest,
}

impl ChunkHeader {
    /// Raw bytes, at most [`limits::CHUNK`].
    #[must_use]
    pub fn raw_length(&self) -> usize {
        size(self.raw)
    }

    /// Packed bytes that follow, at most [`Self::raw_length`].
    #[must_use]
    pub fn packed_length(&self) -> usize {
        size(self.packed)
    }

    /// Reads a header and checks everything that can be checked before the packed bytes arrive. `remaining`: content
    /// bytes that are still to come, this chunk included.
    ///
    /// # Errors
    /// The first field that is out of range.
    pub fn parse(bytes: &[u8; HEADER], remaining: u64) -> Result<Self, ChunkError> {
        let [r0, r1, r2, r3, p0, p1, p2, p3, stride, digest @ ..] = *bytes;
        let header = Self {
            raw: u32::from_le_bytes([r0, r1, r2, r3]),
            packed: u32::from_le_bytes([p0, p1, p2, p3]),
            stride,
            digest: Digest::from_bytes(digest),
        };
        let remaining = usize::try_from(remaining).unwrap_or(usize::MAX);
        let (least, most) = (remaining.clamp(1, SHORTEST), remaining.min(limits::CHUNK));
        let (raw, packed) = (header.raw_length(), header.packed_length());
        if !(least..=most).contains(&raw) {
            return Err(ChunkError::Length {
                length: raw,
                least,
                most,
            });
        }
        let possible = match stride {
            0 => packed == raw,
            _ => (1..raw).contains(&packed),
        };
        if possible {
            Ok(header)
        } else {
            Err(ChunkError::Packed {
                raw,
                packed,
                stride,
            })
        }
    }

    /// A header for these packed bytes.
    fn of(raw: u32, stride: u8, packed: &[u8]) -> Self {
        let mut header = Self {
            raw,
            packed: u32::try_from(packed.len()).unwrap_or(u32::MAX),
            stride,
            digest: Digest::from_bytes([0; 32]),
        };
        header.digest = header.digest_with(packed);
        header
    }

    /// Digest of the other fields and the packed bytes.
    fn digest_with(&self, packed: &[u8]) -> Digest {
        let hash = Sha256::new()
            .chain_update(self.raw.to_le_bytes())
            .chain_update(self.packed.to_le_bytes())
            .chain_update([self.stride])
            .chain_update(packed);
        Digest::from_bytes(hash.finalize().into())
    }

    fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.raw.to_le_bytes());
        out.extend_from_slice(&self.packed.to_le_bytes());
        out.push(self.stride);
        out.extend_from_slice(self.digest.as_bytes());
    }
}

/// Packs chunk after chunk of one transfer.
pub struct Packer {
    zstd: Compressor<'static>,
    stride: Stride,
    columns: Vec<u8>,
    packed: Vec<u8>,
    pause: u8,
}

impl Packer {
    /// A packer for content of this stride.
    ///
    /// # Errors
    /// No memory for the compressor.
    pub fn new(stride: Stride) -> std::io::Result<Self> {
        Ok(Self {
            zstd: Compressor::new(LEVEL)?,
            stride,
            columns: Vec::new(),
            packed: Vec::new(),
            pause: 0,
        })
    }

    /// Appends header and packed bytes of one chunk to `out`. `raw` has 1 to [`limits::CHUNK`] bytes.
    ///
    /// Content that does not compress costs one attempt in eight chunks: the network is faster than the attempt.
    pub fn pack(&mut self, raw: &[u8], out: &mut Vec<u8>) {
        let length = u32::try_from(raw.len()).unwrap_or(u32::MAX);
        let packed = match self.pause.checked_sub(1) {
            Some(rest) => {
                self.pause = rest;
                None
            }
            None => self.compress(raw),
        };
        let (stride, body) = match packed {
            Some(packed) => (
                self.stride.get(),
                self.packed.get(..packed).unwrap_or_default(),
            ),
            None => (0, raw),
        };
        out.reserve(HEADER + body.len());
        ChunkHeader::of(length, stride, body).write(out);
        out.extend_from_slice(body);
    }

    /// Length in `self.packed`, if that is shorter.
    fn compress(&mut self, raw: &[u8]) -> Option<usize> {
        let source = match self.stride.get() {
            1 => raw,
            stride => {
                self.columns.resize(raw.len(), 0);
                transpose(raw, usize::from(stride), &mut self.columns);
                &self.columns
            }
        };
        self.packed.resize(raw.len().saturating_sub(1), 0);
        // Fails when the result does not fit, which is the question asked.
        let packed = self
            .zstd
            .compress_to_buffer(source, self.packed.as_mut_slice())
            .ok();
        if packed.is_none_or(|packed| packed > raw.len() - raw.len() / 32) {
            self.pause = PAUSE;
        }
        packed
    }
}

impl std::fmt::Debug for Packer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Packer({:?})", self.stride)
    }
}

/// Unpacks chunk after chunk.
pub struct Unpacker {
    zstd: Decompressor<'static>,
    columns: Vec<u8>,
}

impl Unpacker {
    /// An unpacker.
    ///
    /// # Errors
    /// No memory for the decompressor.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self {
            zstd: Decompressor::new()?,
            columns: Vec::new(),
        })
    }

    /// Puts the raw bytes of a chunk into `raw`, which is valid only on success. Writes no more than the header says,
    /// whatever `packed` claims.
    ///
    /// # Errors
    /// The packed bytes have another digest, or are no packed bytes of that length.
    pub fn unpack(
        &mut self,
        header: &ChunkHeader,
        packed: &[u8],
        raw: &mut Vec<u8>,
    ) -> Result<(), ChunkError> {
        if header.packed_length() != packed.len() || header.digest_with(packed) != header.digest {
            return Err(ChunkError::Digest);
        }
        // Not cleared: chunks are as long as the one before, and every byte is written.
        raw.resize(header.raw_length(), 0);
        match header.stride {
            0 if packed.len() == raw.len() => raw.copy_from_slice(packed),
            0 => return Err(ChunkError::Damaged),
            1 => decompress(&mut self.zstd, packed, raw)?,
            stride => {
                self.columns.resize(raw.len(), 0);
                decompress(&mut self.zstd, packed, &mut self.columns)?;
                restore(&self.columns, usize::from(stride), raw);
            }
        }
        Ok(())
    }
}

impl std::fmt::Debug for Unpacker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Unpacker")
    }
}

fn size(length: u32) -> usize {
    usize::try_from(length).unwrap_or(usize::MAX)
}

fn decompress(
    zstd: &mut Decompressor<'static>,
    packed: &[u8],
    out: &mut [u8],
) -> Result<(), ChunkError> {
    match zstd.decompress_to_buffer(packed, out) {
        Ok(written) if written == out.len() => Ok(()),
        _ => Err(ChunkError::Damaged),
    }
}

/// Rows of `stride` bytes to columns; the rest that fills no row stays at the end. `out` is as long as `raw`.
fn transpose(raw: &[u8], stride: usize, out: &mut [u8]) {
    let rows = raw.len() / stride;
    let (whole, rest) = raw.split_at(rows * stride);
    let (columns, end) = out.split_at_mut(rows * stride);
    end.copy_from_slice(rest);
    if stride == FLOAT {
        return split_floats(whole.as_chunks().0, columns);
    }
    for (index, tile) in whole.chunks(TILE * stride).enumerate() {
        for column in 0..stride {
            let start = column * rows + index * TILE;
            let to = &mut columns[start..start + tile.len() / stride];
            for (to, from) in to.iter_mut().zip(tile[column..].iter().step_by(stride)) {
                *to = *from;
            }
        }
    }
}

/// The inverse of [`transpose`].
fn restore(columns: &[u8], stride: usize, out: &mut [u8]) {
    let rows = columns.len() / stride;
    let (columns, rest) = columns.split_at(rows * stride);
    let (whole, end) = out.split_at_mut(rows * stride);
    end.copy_from_slice(rest);
    if stride == FLOAT {
        return join_floats(columns, whole.as_chunks_mut().0);
    }
    for (index, tile) in whole.chunks_mut(TILE * stride).enumerate() {
        let height = tile.len() / stride;
        for column in 0..stride {
            let start = column * rows + index * TILE;
            let from = &columns[start..start + height];
            for (to, from) in tile[column..].iter_mut().step_by(stride).zip(from) {
                *to = *from;
            }
        }
    }
}

/// [`transpose`] for floats: loops over words, which compilers turn into vectors.
fn split_floats(rows: &[[u8; FLOAT]], columns: &mut [u8]) {
    let mut columns = columns.chunks_exact_mut(rows.len().max(1));
    let (Some(a), Some(b), Some(c), Some(d)) = (
        columns.next(),
        columns.next(),
        columns.next(),
        columns.next(),
    ) else {
        return;
    };
    for ((((row, a), b), c), d) in rows.iter().zip(a).zip(b).zip(c).zip(d) {
        [*a, *b, *c, *d] = *row;
    }
}

/// The inverse of [`split_floats`].
fn join_floats(columns: &[u8], rows: &mut [[u8; FLOAT]]) {
    let mut columns = columns.chunks_exact(rows.len().max(1));
    let (Some(a), Some(b), Some(c), Some(d)) = (
        columns.next(),
        columns.next(),
        columns.next(),
        columns.next(),
    ) else {
        return;
    };
    for ((((row, &a), &b), &c), &d) in rows.iter_mut().zip(a).zip(b).zip(c).zip(d) {
        *row = [a, b, c, d];
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pack(raw: &[u8], stride: Stride) -> Vec<u8> {
        let mut out = Vec::new();
        Packer::new(stride).unwrap().pack(raw, &mut out);
        out
    }

    fn unpack(chunk: &[u8], remaining: u64) -> Result<Vec<u8>, ChunkError> {
        let (header, body) = chunk.split_first_chunk::<HEADER>().unwrap();
        let header = ChunkHeader::parse(header, remaining)?;
        let mut raw = Vec::new();
        Unpacker::new().unwrap().unpack(&header, body, &mut raw)?;
        Ok(raw)
    }

    fn content() -> impl Strategy<Value = Vec<u8>> {
        let noise = proptest::collection::vec(any::<u8>(), 1..3000);
        let regular = (1_usize..3000, 1_usize..300, any::<u8>()).prop_map(|(n, width, step)| {
            (0..n)
                .map(|i| u8::try_from(i % width % 256).unwrap().wrapping_mul(step))
                .collect()
        });
        prop_oneof![noise, regular]
    }

    proptest! {
        #[test]
        fn unpacking_gives_back_what_was_packed(raw in content(), width in 1_u8..) {
            let chunk = pack(&raw, Stride::new(width).unwrap());
            prop_assert!(chunk.len() <= HEADER + raw.len());
            prop_assert_eq!(unpack(&chunk, raw.len() as u64).unwrap(), raw);
        }

        #[test]
        fn every_flipped_bit_is_refused(raw in content(), width in 1_u8..40, at in any::<prop::sample::Index>(), bit in 0..8) {
            let mut chunk = pack(&raw, Stride::new(width).unwrap());
            let at = at.index(chunk.len());
            chunk[at] ^= 1_u8 << bit;
            prop_assert!(unpack(&chunk, raw.len() as u64).is_err());
        }

        #[test]
        fn any_bytes_are_handled_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), HEADER..HEADER + 300), stride in any::<u8>(), remaining in 0_u64..2_000_000) {
            let mut bytes = bytes;
            let packed = u32::try_from(bytes.len() - HEADER).unwrap();
            bytes[4..8].copy_from_slice(&packed.to_le_bytes());
            bytes[..4].copy_from_slice(&(packed + 100).to_le_bytes());
            bytes[8] = stride;
            prop_assert!(unpack(&bytes, remaining).is_err());
            // With a digest that holds: what the decompressor makes of them.
            let header = ChunkHeader::of(packed + 100, stride.max(1), &bytes[HEADER..]);
            let mut raw = Vec::new();
            prop_assert!(Unpacker::new().unwrap().unpack(&header, &bytes[HEADER..], &mut raw).is_err());
        }
    }

    #[test]
    fn lengths_are_bounded_before_anything_is_read() {
        let header = |raw: usize, packed: usize, stride| {
            let mut out = Vec::new();
            ChunkHeader {
                raw: u32::try_from(raw).unwrap(),
                packed: u32::try_from(packed).unwrap(),
                stride,
                digest: Digest::of(b""),
            }
            .write(&mut out);
            out
        };
        let parse =
            |bytes: Vec<u8>, remaining| ChunkHeader::parse(bytes.first_chunk().unwrap(), remaining);
        let plenty = 1 << 40;
        assert!(parse(header(limits::CHUNK, limits::CHUNK, 0), plenty).is_ok());
        assert!(parse(header(limits::CHUNK, 1, 4), plenty).is_ok());
        for (raw, packed, stride, remaining) in [
            (0, 0, 0, plenty),
            (0, 0, 0, 0),
            (limits::CHUNK + 1, 10, 1, plenty),
            (u32::MAX as usize, 10, 1, plenty),
            (SHORTEST - 1, SHORTEST - 1, 0, plenty),
            (100, 100, 0, 99),
            (99, 99, 0, 100),
            (100, 99, 0, 100),
            (100, 100, 1, 100),
            (100, 0, 1, 100),
            (100, u32::MAX as usize, 1, 100),
        ] {
            assert!(
                parse(header(raw, packed, stride), remaining).is_err(),
                "{raw} {packed} {stride} of {remaining}"
            );
        }
    }

    #[test]
    fn floats_become_shorter_by_their_stride() {
        let floats: Vec<u8> = (0..65_536_u32)
            .flat_map(|i| (1.0 + f32::from_bits(0x3400_0000 + i * 77)).to_le_bytes())
            .collect();
        let by_columns = pack(&floats, Stride::FLOATS).len();
        assert!(by_columns < pack(&floats, Stride::BYTES).len());
        assert_eq!(Stride::new(0), None);
    }

    #[test]
    fn a_bomb_writes_no_more_than_its_header_says() {
        let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 19).unwrap();
        for stride in [1, 4] {
            let header = ChunkHeader::of(1 << 20, stride, &bomb);
            let mut raw = Vec::new();
            let refused = Unpacker::new().unwrap().unpack(&header, &bomb, &mut raw);
            assert_eq!(refused, Err(ChunkError::Damaged));
            assert!(raw.capacity() <= 1 << 20, "{} bytes", raw.capacity());
        }
    }
}
