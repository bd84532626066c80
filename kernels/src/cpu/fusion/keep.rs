//! The choice of the largest masses and their codes.

use crate::code;
use crate::fusion::MASS_BITS;
use crate::records::{ColumnsMut, RecordShape, Symbol};

/// Bytes up to which counting the larger ones of each is faster than sorting.
const RANKED: usize = 64;
/// Keys that are compared at once.
const LANES: usize = 8;

/// Fused masses of one position and the space to choose among them.
pub(super) struct Keeper<S> {
    /// Tokens with their masses.
    masses: Vec<(S, u64)>,
    /// Bytes: a mass above the complement of its byte, so that the order of the keys is that of the
    /// choice. Masses have 48 bits.
    keys: Vec<i64>,
    chosen: [u64; 256],
    listed: Vec<(S, u8)>,
    slots: usize,
    full: u64,
}

impl<S: Symbol> Keeper<S> {
    pub(super) fn new(shape: &RecordShape) -> Self {
        let full = (u128::from(shape.fill_permille) << MASS_BITS).div_ceil(1000);
        Self {
            masses: Vec::new(),
            keys: Vec::with_capacity(256),
            chosen: [0; 256],
            listed: Vec::with_capacity(shape.k),
            slots: shape.k,
            full: u64::try_from(full).unwrap_or(u64::MAX),
        }
    }

    /// Adds a symbol that was not added before.
    #[inline(always)]
    #[expect(
        clippy::cast_possible_wrap,
        reason = "48 bits of mass and 8 of the byte"
    )]
    pub(super) fn push(&mut self, symbol: S, mass: u64) {
        if S::HAS_END {
            self.keys
                .push((mass << 8 | (255 - symbol.index() as u64)) as i64);
        } else {
            self.masses.push((symbol, mass));
        }
    }

    /// Writes the position that what was added and the end make, and forgets it.
    #[inline(always)]
    pub(super) fn write(&mut self, position: usize, end: u64, out: &mut ColumnsMut<'_, S>) {
        self.listed.clear();
        let filled = if S::HAS_END {
            self.list_bytes(end)
        } else {
            self.list_tokens(end)
        };
        self.keys.clear();
        self.masses.clear();
        let tail = (1 << MASS_BITS) - filled;
        out.write(
            position,
            &self.listed,
            code::encode_mass(end, MASS_BITS),
            code::encode_mass(tail, MASS_BITS),
        );
    }

    /// Fills `listed` in order of symbols; the mass of what is listed and of the end.
    fn list_tokens(&mut self, end: u64) -> u64 {
        self.masses
            .sort_unstable_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(&b.0)));
        let mut filled = end;
        for &(symbol, mass) in self.masses.iter().take(self.slots) {
            if !self.listed.is_empty() && filled >= self.full {
                break;
            }
            filled += mass;
            self.listed
                .push((symbol, code::encode_mass(mass, MASS_BITS)));
        }
        self.listed.sort_unstable_by_key(|&(symbol, _)| symbol);
        filled
    }

    #[inline(always)]
    #[expect(clippy::cast_sign_loss, reason = "keys are positive")]
    fn list_bytes(&mut self, end: u64) -> u64 {
        let mut sorted = [0_i64; RANKED + LANES];
        let keys = if self.keys.len() <= RANKED {
            rank(&mut self.keys, &mut sorted)
        } else {
            self.keys.sort_unstable_by(|a, b| b.cmp(a));
            &self.keys
        };
        let mut filled = end;
        let mut bytes = [0_u64; 4];
        for (count, &key) in keys.iter().take(self.slots).enumerate() {
            if count > 0 && filled >= self.full {
                break;
            }
            let (mass, byte) = (key as u64 >> 8, 255 - (key & 255) as usize);
            filled += mass;
            self.chosen[byte] = mass;
            bytes[byte / 64] |= 1 << (byte % 64);
        }
        for (word, &chosen) in bytes.iter().enumerate() {
            let mut rest = chosen;
            while rest != 0 {
                let byte = 64 * word + rest.trailing_zeros() as usize;
                let code = code::encode_mass(self.chosen[byte], MASS_BITS);
                self.listed.push((S::of(byte), code));
                rest &= rest - 1;
            }
        }
        filled
    }
}

/// The keys in descending order: each goes to the place that the number of larger ones says.
#[inline(always)]
fn rank<'a>(keys: &mut Vec<i64>, sorted: &'a mut [i64; RANKED + LANES]) -> &'a [i64] {
    let count = keys.len();
    // Whole vectors; what pads them is smaller than any key and goes behind.
    keys.resize(count.next_multiple_of(LANES), -1);
    for lanes in keys.as_chunks::<LANES>().0 {
        let mut larger = [0_i64; LANES];
        for &other in &keys[..count] {
            for (larger, &key) in larger.iter_mut().zip(lanes) {
                *larger += i64::from(other > key);
            }
        }
        for (&larger, &key) in larger.iter().zip(lanes) {
            sorted[usize::try_from(larger).unwrap_or(0) % (RANKED + LANES)] = key;
        }
    }
    &sorted[..count]
}
