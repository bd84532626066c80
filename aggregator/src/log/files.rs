//! The folder of a log: <https://c2sp.org/tlog-tiles>.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use consilium_protocol::transcript::tile::{self, TILE_WIDTH, Tile, TileKind};
use consilium_protocol::transcript::tree::Tree;

use super::LogError;
use crate::store::durable::{self, TEMPORARY, Temporary};

/// Longest checkpoint file that is read in bytes.
const MAX_CHECKPOINT: u64 = 1 << 20;

/// Folder with `checkpoint` and `tile/`.
#[derive(Debug)]
pub(super) struct Folder {
    path: PathBuf,
}

impl Folder {
    /// Opens or makes the folder and removes what interrupted writes left.
    pub(super) fn open(path: &Path) -> Result<Self, LogError> {
        durable::create_folder(path)
            .map_err(|error| LogError::io(path, "make this folder", error))?;
        let folder = Self {
            path: path.to_owned(),
        };
        for (path, _) in folder.files()? {
            if path.extension().is_some_and(|ending| ending == TEMPORARY) {
                remove(&path)?;
            }
        }
        Ok(folder)
    }

    pub(super) fn checkpoint_path(&self) -> PathBuf {
        self.path.join("checkpoint")
    }

    pub(super) fn tile_path(&self, tile: Tile) -> PathBuf {
        self.path.join(tile.to_string())
    }

    /// The signed checkpoint; none in a folder that holds no log yet.
    pub(super) fn read_checkpoint(&self) -> Result<Option<Vec<u8>>, LogError> {
        let path = self.checkpoint_path();
        let bytes = fs::metadata(&path).and_then(|metadata| {
            if metadata.len() > MAX_CHECKPOINT {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "far too long for a checkpoint",
                ));
            }
            fs::read(&path)
        });
        match bytes {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if self.tiles()?.is_empty() {
                    return Ok(None);
                }
                Err(LogError::NoCheckpoint { path })
            }
            Err(error) => Err(LogError::io(&path, "read this file", error)),
        }
    }

    /// Makes a new checkpoint durable under a temporary name.
    pub(super) fn stage_checkpoint(&self, note: &str) -> Result<Temporary, LogError> {
        Temporary::new(&self.path)
            .and_then(|mut temporary| temporary.write(note.as_bytes()).map(|()| temporary))
            .map_err(|error| LogError::io(&self.checkpoint_path(), "write this file", error))
    }

    /// Replaces the checkpoint by a staged one. After an error either of them is there.
    pub(super) fn publish_checkpoint(&self, staged: Temporary) -> Result<(), LogError> {
        let path = self.checkpoint_path();
        staged
            .publish(&path)
            .map_err(|error| LogError::io(&path, "replace this file", error))
    }

    /// Entries of a log of `size` entries, in order.
    pub(super) fn read_entries(&self, size: u64) -> Result<Vec<Vec<u8>>, LogError> {
        let mut entries = Vec::new();
        for bundle in tile::tiles_of(size).filter(|tile| tile.kind() == TileKind::Entries) {
            let path = self.tile_path(bundle);
            let bytes =
                fs::read(&path).map_err(|error| LogError::io(&path, "read this file", error))?;
            let read = tile::read_entries(&bytes).map_err(|source| LogError::Bundle {
                path: path.clone(),
                source,
            })?;
            if read.len() != usize::from(bundle.width()) {
                return Err(LogError::Bundle {
                    path,
                    source: tile::TileError::Bundle,
                });
            }
            entries.extend(read.into_iter().map(<[u8]>::to_vec));
        }
        Ok(entries)
    }

    /// Makes everything durable that a tree grown from `old` entries needs besides the checkpoint:
    /// entries first, then hashes. `entries` are all of the tree's.
    pub(super) fn write_growth<'a>(
        &self,
        old: u64,
        tree: &Tree,
        entries: impl Fn(usize) -> Option<&'a [u8]>,
    ) -> Result<(), LogError> {
        for tile in tile::new_tiles(old, tree.size()) {
            let path = self.tile_path(tile);
            let failed = |source| LogError::Bundle {
                path: path.clone(),
                source,
            };
            let content = match tile.kind() {
                TileKind::Hashes { .. } => tile::hash_tile(tree, tile).map_err(failed)?,
                TileKind::Entries => bundle(tile, &entries).map_err(failed)?,
            };
            durable::write_file(&path, &content)
                .map_err(|error| LogError::io(&path, "write this file", error))?;
        }
        Ok(())
    }

    /// Brings the files in line with a tree whose entries are on disk and whose root is signed.
    ///
    /// Entries beyond it are dropped: one at most, which no one was told of. Missing hash tiles
    /// are made again.
    pub(super) fn settle(&self, tree: &Tree) -> Result<(), LogError> {
        let size = tree.size();
        let tiles = self.tiles()?;
        let beyond: Vec<&(PathBuf, Tile)> = tiles
            .iter()
            .filter(|(_, tile)| end(*tile) > members(tile.kind(), size))
            .collect();
        if let Some((path, tile)) = beyond.iter().find(|(_, tile)| {
            let allowed = members(tile.kind(), size.saturating_add(1));
            end(*tile) > allowed
        }) {
            return Err(LogError::RolledBack {
                path: path.clone(),
                checkpoint: size,
                end: end(*tile),
            });
        }
        for (path, tile) in beyond {
            tracing::warn!(%tile, size, "dropping an entry that was never acknowledged");
            remove(path)?;
        }
        for tile in tile::tiles_of(size).filter(|tile| tile.kind() != TileKind::Entries) {
            let path = self.tile_path(tile);
            let expected = tile::hash_tile(tree, tile).map_err(|source| LogError::Bundle {
                path: path.clone(),
                source,
            })?;
            match fs::read(&path) {
                Ok(bytes) if bytes == expected => {}
                Ok(_) => return Err(LogError::HashTile { path }),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    tracing::warn!(%tile, "a hash tile is missing and is made again");
                    durable::write_file(&path, &expected)
                        .map_err(|error| LogError::io(&path, "write this file", error))?;
                }
                Err(error) => return Err(LogError::io(&path, "read this file", error)),
            }
        }
        Ok(())
    }

    /// Removes the narrower versions of tiles that became full on the way from `old` to `new`.
    /// Only to be called once the checkpoint of `new` is durable.
    pub(super) fn remove_partials(&self, old: u64, new: u64) -> Result<(), LogError> {
        for tile in tile::new_tiles(old, new).filter(|tile| tile.is_full()) {
            let mut folder = self.tile_path(tile).into_os_string();
            folder.push(".p");
            let folder = PathBuf::from(folder);
            match fs::remove_dir_all(&folder) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(LogError::io(&folder, "remove this folder", error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Tiles on disk, in order of their paths.
    fn tiles(&self) -> Result<Vec<(PathBuf, Tile)>, LogError> {
        let files = self.files()?.into_iter();
        Ok(files
            .filter_map(|(path, name)| Some((path, name.parse().ok()?)))
            .collect())
    }

    /// Files with their paths relative to the folder.
    fn files(&self) -> Result<Vec<(PathBuf, String)>, LogError> {
        let mut found = Vec::new();
        let mut waiting = vec![self.path.clone()];
        while let Some(folder) = waiting.pop() {
            let failed = |error| LogError::io(&folder, "list this folder", error);
            for entry in fs::read_dir(&folder).map_err(failed)? {
                let entry = entry.map_err(failed)?;
                let path = entry.path();
                if entry.file_type().map_err(failed)?.is_dir() {
                    waiting.push(path);
                } else if let Some(name) = path.strip_prefix(&self.path).ok().and_then(Path::to_str)
                {
                    let name = name.to_owned();
                    found.push((path, name));
                }
            }
        }
        found.sort();
        Ok(found)
    }
}

/// Entries or hashes up to and including the tile's last.
fn end(tile: Tile) -> u64 {
    tile.number()
        .saturating_mul(u64::from(TILE_WIDTH))
        .saturating_add(u64::from(tile.width()))
}

/// Entries or hashes that a log of `size` entries has in that row.
fn members(kind: TileKind, size: u64) -> u64 {
    match kind {
        TileKind::Entries => size,
        TileKind::Hashes { level } => size
            .checked_shr(u32::from(level).saturating_mul(8))
            .unwrap_or(0),
    }
}

fn bundle<'a>(
    tile: Tile,
    entries: &impl Fn(usize) -> Option<&'a [u8]>,
) -> Result<Vec<u8>, tile::TileError> {
    let beyond = || tile::TileError::OutOfRange(tile);
    let end = usize::try_from(end(tile)).map_err(|_| beyond())?;
    let mut bytes = Vec::new();
    for index in end.saturating_sub(usize::from(tile.width()))..end {
        tile::push_entry(&mut bytes, entries(index).ok_or_else(beyond)?)?;
    }
    Ok(bytes)
}

fn remove(path: &Path) -> Result<(), LogError> {
    let folder = path.parent().unwrap_or_else(|| Path::new(""));
    fs::remove_file(path)
        .and_then(|()| durable::sync_folder(folder))
        .map_err(|error| LogError::io(path, "remove this file", error))
}
