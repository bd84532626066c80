//! Files of a tiled log: <https://c2sp.org/tlog-tiles>.
//!
//! `tile/<level>/<number>` holds 256 hashes of tree level `8 * level`, `tile/entries/<number>` the
//! 256 entries below; the last of each may be partial (`.p/<width>`).

use std::fmt;
use std::str::FromStr;

use super::checkpoint::parse_decimal;
use super::tree::Tree;
use crate::ids::Digest;
use crate::limits;

/// Hashes or entries in a full tile.
pub const TILE_WIDTH: u16 = 256;

const ROW: u64 = TILE_WIDTH as u64;

/// Longest entry in bytes: its length is stored in 16 bits.
pub const MAX_ENTRY_BYTES: usize = limits::LOG_ENTRY;

/// Highest tile level the format allows.
pub const MAX_LEVEL: u8 = 63;

/// Why a tile, a path or a bundle was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TileError {
    /// Not a path of a tile.
    #[error("{0:?} is not a tile path")]
    Path(String),
    /// The tree does not hold all of the tile yet.
    #[error("{0} reaches beyond the tree")]
    OutOfRange(Tile),
    /// Beyond [`MAX_ENTRY_BYTES`].
    #[error("entry has {0} bytes, at most {MAX_ENTRY_BYTES} fit a log")]
    EntryTooLong(usize),
    /// The bundle ends inside an entry, or holds more than 256.
    #[error("entry bundle is cut off or holds more than {TILE_WIDTH} entries")]
    Bundle,
}

/// What a tile holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TileKind {
    /// Hashes of tree level `8 * level`.
    Hashes {
        /// 0 to [`MAX_LEVEL`].
        level: u8,
    },
    /// The entries themselves.
    Entries,
}

/// One tile of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tile {
    kind: TileKind,
    number: u64,
    width: u16,
}

impl Tile {
    /// A tile; `None` if the width is not 1 to 256 or the level exceeds [`MAX_LEVEL`].
    #[must_use]
    pub fn new(kind: TileKind, number: u64, width: u16) -> Option<Self> {
        let level_fits = match kind {
            TileKind::Hashes { level } => level <= MAX_LEVEL,
            TileKind::Entries => true,
        };
        let fits = level_fits && (1..=TILE_WIDTH).contains(&width);
        fits.then_some(Self {
            kind,
            number,
            width,
        })
    }

    /// What it holds.
    #[must_use]
    pub const fn kind(self) -> TileKind {
        self.kind
    }

    /// Position among the tiles of its kind.
    #[must_use]
    pub const fn number(self) -> u64 {
        self.number
    }

    /// Hashes or entries in it: 256, or fewer in the last one.
    #[must_use]
    pub const fn width(self) -> u16 {
        self.width
    }

    /// Whether it will never change again.
    #[must_use]
    pub const fn is_full(self) -> bool {
        self.width == TILE_WIDTH
    }
}

impl fmt::Display for Tile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            TileKind::Hashes { level } => write!(f, "tile/{level}")?,
            TileKind::Entries => f.write_str("tile/entries")?,
        }
        let digits = self.number.to_string();
        let padded = format!(
            "{digits:0>width$}",
            width = digits.len().next_multiple_of(3)
        );
        let last = padded.len() / 3;
        for (group, chunk) in (1..).zip(padded.as_bytes().chunks(3)) {
            let prefix = if group == last { "" } else { "x" };
            write!(f, "/{prefix}{}", chunk.escape_ascii())?;
        }
        if !self.is_full() {
            write!(f, ".p/{}", self.width)?;
        }
        Ok(())
    }
}

impl FromStr for Tile {
    type Err = TileError;

    fn from_str(path: &str) -> Result<Self, TileError> {
        parse_path(path)
            .filter(|tile| tile.to_string() == path)
            .ok_or_else(|| TileError::Path(path.chars().take(128).collect()))
    }
}

/// Every tile and entry bundle of a log of `size` entries: entries first, then hashes by level.
pub fn tiles_of(size: u64) -> impl Iterator<Item = Tile> {
    new_tiles(0, size)
}

/// Tiles and bundles to write when a log grows from `old` to `new` entries: those of the new size
/// that the old size did not have in the same width.
pub fn new_tiles(old: u64, new: u64) -> impl Iterator<Item = Tile> {
    let bundles = row(TileKind::Entries, old, new);
    let hashes = (0..=MAX_LEVEL).map_while(move |level| {
        let shift = u32::from(level).saturating_mul(8);
        let hashes = new.checked_shr(shift).filter(|hashes| *hashes > 0)?;
        let before = old.checked_shr(shift).unwrap_or(0);
        Some(row(TileKind::Hashes { level }, before, hashes))
    });
    bundles.chain(hashes.flatten())
}

/// Content of a hash tile: its hashes, 32 bytes each.
///
/// # Errors
/// The tree does not reach that far, or the tile is an entry bundle.
pub fn hash_tile(tree: &Tree, tile: Tile) -> Result<Vec<u8>, TileError> {
    let TileKind::Hashes { level } = tile.kind else {
        return Err(TileError::OutOfRange(tile));
    };
    let first = tile.number.checked_mul(ROW);
    let hashes = first
        .and_then(|first| {
            tree.row(
                u32::from(level).saturating_mul(8),
                first,
                usize::from(tile.width),
            )
        })
        .ok_or(TileError::OutOfRange(tile))?;
    Ok(hashes.iter().flat_map(Digest::as_bytes).copied().collect())
}

/// Appends one entry to the content of an entry bundle.
///
/// # Errors
/// The entry is too long.
pub fn push_entry(bundle: &mut Vec<u8>, entry: &[u8]) -> Result<(), TileError> {
    let length = u16::try_from(entry.len()).map_err(|_| TileError::EntryTooLong(entry.len()))?;
    bundle.extend_from_slice(&length.to_be_bytes());
    bundle.extend_from_slice(entry);
    Ok(())
}

/// Entries of a bundle.
///
/// # Errors
/// The bundle is cut off, or holds more than 256 entries.
pub fn read_entries(bundle: &[u8]) -> Result<Vec<&[u8]>, TileError> {
    let mut entries = Vec::new();
    let mut rest = bundle;
    while let Some((length, after)) = rest.split_first_chunk::<2>() {
        let length = usize::from(u16::from_be_bytes(*length));
        let (entry, after) = after.split_at_checked(length).ok_or(TileError::Bundle)?;
        if entries.len() == usize::from(TILE_WIDTH) {
            return Err(TileError::Bundle);
        }
        entries.push(entry);
        rest = after;
    }
    if rest.is_empty() {
        Ok(entries)
    } else {
        Err(TileError::Bundle)
    }
}

/// Tiles of one row that has grown from `old` to `new` members.
fn row(kind: TileKind, old: u64, new: u64) -> impl Iterator<Item = Tile> {
    let full_before = old / ROW;
    let full = new / ROW;
    let partial = u16::try_from(new % ROW).unwrap_or(0);
    let last = (partial > 0 && old != new).then_some(Tile {
        kind,
        number: full,
        width: partial,
    });
    (full_before..full)
        .map(move |number| Tile {
            kind,
            number,
            width: TILE_WIDTH,
        })
        .chain(last)
}

fn parse_path(path: &str) -> Option<Tile> {
    let mut parts = path.strip_prefix("tile/")?.split('/');
    let kind = match parts.next()? {
        "entries" => TileKind::Entries,
        level => TileKind::Hashes {
            level: u8::try_from(parse_decimal(level)?).ok()?,
        },
    };
    let mut number = 0_u64;
    let mut last = None;
    for part in parts.by_ref() {
        let (group, more) = match part.strip_prefix('x') {
            Some(group) => (group, true),
            None => (part.strip_suffix(".p").unwrap_or(part), false),
        };
        if group.len() != 3 || !group.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        number = number.checked_mul(1000)?.checked_add(group.parse().ok()?)?;
        if !more {
            last = Some(part);
            break;
        }
    }
    let width = if last?.ends_with(".p") {
        u16::try_from(parse_decimal(parts.next()?)?).ok()?
    } else {
        TILE_WIDTH
    };
    if parts.next().is_some() {
        return None;
    }
    Tile::new(kind, number, width)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::tree::leaf_hash;
    use super::*;

    const ROOT_ROW: TileKind = TileKind::Hashes { level: 0 };

    #[test]
    fn the_path_of_the_specification_is_written_and_read() {
        let tile = Tile::new(ROOT_ROW, 1_234_067, 256).unwrap();
        assert_eq!(tile.to_string(), "tile/0/x001/x234/067");
        let partial = Tile::new(TileKind::Entries, 273, 112).unwrap();
        assert_eq!(partial.to_string(), "tile/entries/273.p/112");
        assert_eq!(
            Tile::new(ROOT_ROW, 0, 256).unwrap().to_string(),
            "tile/0/000"
        );
    }

    #[test]
    fn a_log_of_seventy_thousand_entries_has_the_tiles_of_the_specification() {
        let tiles: Vec<Tile> = tiles_of(70_000).collect();
        let of = |kind| tiles.iter().filter(move |tile| tile.kind() == kind);
        for kind in [TileKind::Entries, ROOT_ROW] {
            assert_eq!(of(kind).filter(|tile| tile.is_full()).count(), 273);
            assert_eq!(of(kind).next_back().unwrap().width(), 112);
        }
        let level_1: Vec<String> = of(TileKind::Hashes { level: 1 })
            .map(ToString::to_string)
            .collect();
        assert_eq!(level_1, ["tile/1/000", "tile/1/001.p/17"]);
        let level_2: Vec<String> = of(TileKind::Hashes { level: 2 })
            .map(ToString::to_string)
            .collect();
        assert_eq!(level_2, ["tile/2/000.p/1"]);
        assert_eq!(of(TileKind::Hashes { level: 3 }).count(), 0);
        assert_eq!(tiles_of(0).count(), 0);
    }

    #[test]
    fn tiles_of_a_tree_hash_to_the_tiles_above_them() {
        let tree: Tree = (0_u64..600).map(|i| leaf_hash(&i.to_be_bytes())).collect();
        for tile in tiles_of(600).filter(|tile| tile.kind() != TileKind::Entries) {
            let bytes = hash_tile(&tree, tile).unwrap();
            assert_eq!(bytes.len(), usize::from(tile.width()) * 32, "{tile}");
        }
        let first: Tree = hash_tile(&tree, Tile::new(ROOT_ROW, 0, 256).unwrap())
            .unwrap()
            .chunks(32)
            .map(|hash| Digest::from_bytes(hash.try_into().unwrap()))
            .collect();
        let above = Tile::new(TileKind::Hashes { level: 1 }, 0, 2).unwrap();
        assert_eq!(
            hash_tile(&tree, above).unwrap()[..32],
            *first.root().as_bytes()
        );
        let beyond = Tile::new(ROOT_ROW, 2, 200).unwrap();
        assert_eq!(hash_tile(&tree, beyond), Err(TileError::OutOfRange(beyond)));
    }

    #[test]
    fn malformed_paths_are_refused() {
        for path in [
            "",
            "tile",
            "tile/0",
            "tile/0/0",
            "tile/0/x001",
            "tile/0/x000/001",
            "tile/00/001",
            "tile/64/001",
            "tile/0/001.p/0",
            "tile/0/001.p/256",
            "tile/0/001.p/01",
            "tile/0/001/2",
            "tile/0/001.p",
            "tile/0/../001",
            "/tile/0/001",
            "tile/entries/x001/x234/067.p/5/6",
            "tile/0/x999/x999/x999/x999/x999/x999/x999/999",
        ] {
            assert_eq!(path.parse::<Tile>(), Err(TileError::Path(path.to_owned())));
        }
    }

    #[test]
    fn bundles_read_back_and_cut_ones_are_refused() {
        let entries: [&[u8]; 3] = [b"one", b"", &[7; MAX_ENTRY_BYTES]];
        let mut bundle = Vec::new();
        for entry in entries {
            push_entry(&mut bundle, entry).unwrap();
        }
        assert_eq!(read_entries(&bundle).unwrap(), entries);
        assert_eq!(
            read_entries(&bundle[..bundle.len() - 1]),
            Err(TileError::Bundle)
        );
        assert_eq!(read_entries(&[0]), Err(TileError::Bundle));
        assert_eq!(read_entries(&[0; 514]), Err(TileError::Bundle));
        let long = vec![0; MAX_ENTRY_BYTES + 1];
        assert_eq!(
            push_entry(&mut bundle, &long),
            Err(TileError::EntryTooLong(65_536))
        );
    }

    proptest! {
        #[test]
        fn paths_read_back(number: u64, width in 1_u16..=256, level in 0_u8..=63, entries: bool) {
            let kind = if entries { TileKind::Entries } else { TileKind::Hashes { level } };
            let tile = Tile::new(kind, number, width).unwrap();
            prop_assert_eq!(tile.to_string().parse::<Tile>().unwrap(), tile);
        }

        #[test]
        fn growing_in_steps_writes_every_tile(sizes in prop::collection::vec(0_u64..140_000, 1..5)) {
            let mut sizes = sizes;
            sizes.sort_unstable();
            let mut written = std::collections::BTreeSet::new();
            let mut size = 0;
            for next in sizes {
                written.extend(new_tiles(size, next));
                size = next;
            }
            for tile in tiles_of(size) {
                prop_assert!(written.contains(&tile), "{} of {}", tile, size);
            }
        }

        #[test]
        fn arbitrary_paths_and_bundles_never_panic(path in "tile/[0-9x./pentris]{0,30}", bundle in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = path.parse::<Tile>();
            let _ = read_entries(&bundle);
        }
    }
}
