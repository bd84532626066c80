//! Merkle tree of RFC 6962 section 2.1; verification follows RFC 9162 sections 2.1.3 and 2.1.4.

use sha2::{Digest as _, Sha256};

use crate::ids::Digest;

/// Most hashes a proof can hold: one per level of a tree of 2^63 leaves.
pub const MAX_PROOF_HASHES: usize = 63;

/// Why a tree or a proof was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TreeError {
    /// A leaf or a size beyond what the tree holds.
    #[error("position {position} is outside a tree of {size} leaves")]
    OutOfRange {
        /// The leaf or tree size asked for.
        position: u64,
        /// Leaves there are.
        size: u64,
    },
    /// The proof has too few or too many hashes for its positions.
    #[error("a proof of {hashes} hashes does not fit these positions")]
    WrongLength {
        /// Hashes in the proof.
        hashes: usize,
    },
    /// The hashes lead to another root.
    #[error("the proof leads to root {got}, expected {expected}")]
    WrongRoot {
        /// Root computed from the proof.
        got: Digest,
        /// Root that was to be reached.
        expected: Digest,
    },
}

/// SHA-256(0x00 || entry).
#[must_use]
pub fn leaf_hash(entry: &[u8]) -> Digest {
    Digest::from_bytes(
        Sha256::new()
            .chain_update([0])
            .chain_update(entry)
            .finalize()
            .into(),
    )
}

/// SHA-256(0x01 || left || right).
#[must_use]
pub fn node_hash(left: &Digest, right: &Digest) -> Digest {
    let hash = Sha256::new()
        .chain_update([1])
        .chain_update(left.as_bytes())
        .chain_update(right.as_bytes());
    Digest::from_bytes(hash.finalize().into())
}

/// Root of the tree without leaves: SHA-256 of nothing.
#[must_use]
pub fn empty_root() -> Digest {
    Digest::of(&[])
}

/// A growing tree that keeps the hash of every complete subtree: 64 bytes a leaf.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tree {
    /// `levels[l][i]` covers leaves `i * 2^l .. (i + 1) * 2^l`.
    levels: Vec<Vec<Digest>>,
}

impl Tree {
    /// A tree without leaves.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Number of leaves.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.levels.first().map_or(0, |leaves| leaves.len() as u64)
    }

    /// Appends a leaf hash ([`leaf_hash`] of the entry).
    pub fn push(&mut self, leaf: Digest) {
        let mut hash = leaf;
        let mut level = 0_usize;
        loop {
            let Some(row) = self.levels.get_mut(level) else {
                self.levels.push(vec![hash]);
                return;
            };
            row.push(hash);
            if row.len() % 2 == 1 {
                return;
            }
            let [.., left, right] = row.as_slice() else {
                return;
            };
            hash = node_hash(left, right);
            level = level.saturating_add(1);
        }
    }

    /// Root over all leaves.
    #[must_use]
    pub fn root(&self) -> Digest {
        self.root_at(self.size()).unwrap_or_else(|_| empty_root())
    }

    /// Root over the first `size` leaves.
    ///
    /// # Errors
    /// `size` exceeds the tree.
    pub fn root_at(&self, size: u64) -> Result<Digest, TreeError> {
        self.check(size)?;
        self.range(0, size)
    }

    /// Proof that leaf `index` is in the tree of the first `size` leaves; sibling of the leaf first.
    ///
    /// # Errors
    /// `index` is not below `size`, or `size` exceeds the tree.
    pub fn inclusion(&self, index: u64, size: u64) -> Result<Vec<Digest>, TreeError> {
        self.check(size)?;
        if index >= size {
            return Err(TreeError::OutOfRange {
                position: index,
                size,
            });
        }
        let (mut start, mut length) = (0_u64, size);
        let mut path = Vec::new();
        while let Some((left, right)) = split(length) {
            let middle = left.saturating_add(start);
            if index < middle {
                path.push(self.range(middle, right)?);
                length = left;
            } else {
                path.push(self.range(start, left)?);
                (start, length) = (middle, right);
            }
        }
        path.reverse();
        Ok(path)
    }

    /// Proof that the tree of the first `old` leaves is a prefix of that of the first `new` leaves.
    /// Empty if `old` is 0 or equals `new`.
    ///
    /// # Errors
    /// `old` exceeds `new`, or `new` exceeds the tree.
    pub fn consistency(&self, old: u64, new: u64) -> Result<Vec<Digest>, TreeError> {
        self.check(new)?;
        if old > new {
            return Err(TreeError::OutOfRange {
                position: old,
                size: new,
            });
        }
        if old == 0 {
            return Ok(Vec::new());
        }
        let (mut start, mut length) = (0_u64, new);
        let mut path = Vec::new();
        while start.saturating_add(length) != old {
            let Some((left, right)) = split(length) else {
                break;
            };
            let middle = left.saturating_add(start);
            if old <= middle {
                path.push(self.range(middle, right)?);
                length = left;
            } else {
                path.push(self.range(start, left)?);
                (start, length) = (middle, right);
            }
        }
        // The old tree itself is known to the verifier; any other last subtree is not.
        if start != 0 {
            path.push(self.range(start, length)?);
        }
        path.reverse();
        Ok(path)
    }

    /// Hashes of complete subtrees of `2^level` leaves, from subtree `first` on, `count` of them.
    pub(super) fn row(&self, level: u32, first: u64, count: usize) -> Option<&[Digest]> {
        let row = self.levels.get(usize::try_from(level).ok()?)?;
        let first = usize::try_from(first).ok()?;
        row.get(first..first.checked_add(count)?)
    }

    fn check(&self, size: u64) -> Result<(), TreeError> {
        if size > self.size() {
            return Err(TreeError::OutOfRange {
                position: size,
                size: self.size(),
            });
        }
        Ok(())
    }

    /// Hash over leaves `start .. start + length`, where `start` is a multiple of the power of two
    /// that `length` rounds up to: the only ranges that proofs need.
    fn range(&self, start: u64, length: u64) -> Result<Digest, TreeError> {
        if length.is_power_of_two() {
            let level = length.trailing_zeros();
            let first = start.checked_shr(level).unwrap_or(0);
            return match self.row(level, first, 1) {
                Some([hash]) => Ok(*hash),
                _ => Err(TreeError::OutOfRange {
                    position: start,
                    size: self.size(),
                }),
            };
        }
        let Some((left, right)) = split(length) else {
            return Ok(empty_root());
        };
        let first = self.range(start, left)?;
        let second = self.range(start.saturating_add(left), right)?;
        Ok(node_hash(&first, &second))
    }
}

impl FromIterator<Digest> for Tree {
    fn from_iter<I: IntoIterator<Item = Digest>>(leaves: I) -> Self {
        let mut tree = Self::new();
        for leaf in leaves {
            tree.push(leaf);
        }
        tree
    }
}

/// Checks that `leaf` is number `index` of the `size` leaves under `root`.
///
/// # Errors
/// The position is impossible, the proof has the wrong length or leads elsewhere.
pub fn verify_inclusion(
    leaf: &Digest,
    index: u64,
    size: u64,
    path: &[Digest],
    root: &Digest,
) -> Result<(), TreeError> {
    if index >= size {
        return Err(TreeError::OutOfRange {
            position: index,
            size,
        });
    }
    let wrong_length = TreeError::WrongLength { hashes: path.len() };
    let mut node = index;
    let mut last = size.saturating_sub(1);
    let mut hash = *leaf;
    for sibling in path {
        if last == 0 {
            return Err(wrong_length);
        }
        if odd(node) || node == last {
            hash = node_hash(sibling, &hash);
            (node, last) = climb_left_edge(node, last);
        } else {
            hash = node_hash(&hash, sibling);
        }
        (node, last) = (node >> 1, last >> 1);
    }
    if last != 0 {
        return Err(wrong_length);
    }
    expect_root(hash, *root)
}

/// Checks that the `old` leaves under `old_root` are the first of the `new` leaves under `new_root`.
///
/// # Errors
/// The sizes are impossible, the proof has the wrong length or leads elsewhere.
pub fn verify_consistency(
    old: u64,
    new: u64,
    path: &[Digest],
    old_root: &Digest,
    new_root: &Digest,
) -> Result<(), TreeError> {
    let wrong_length = TreeError::WrongLength { hashes: path.len() };
    if old > new {
        return Err(TreeError::OutOfRange {
            position: old,
            size: new,
        });
    }
    if old == 0 || old == new {
        if !path.is_empty() {
            return Err(wrong_length);
        }
        let expected = if old == 0 { empty_root() } else { *new_root };
        return expect_root(*old_root, expected);
    }
    let (first, rest) = if old.is_power_of_two() {
        (old_root, path)
    } else {
        path.split_first().ok_or_else(|| wrong_length.clone())?
    };
    let mut node = old.saturating_sub(1);
    let mut last = new.saturating_sub(1);
    while odd(node) {
        (node, last) = (node >> 1, last >> 1);
    }
    let (mut old_hash, mut new_hash) = (*first, *first);
    for sibling in rest {
        if last == 0 {
            return Err(wrong_length);
        }
        if odd(node) || node == last {
            old_hash = node_hash(sibling, &old_hash);
            new_hash = node_hash(sibling, &new_hash);
            (node, last) = climb_left_edge(node, last);
        } else {
            new_hash = node_hash(&new_hash, sibling);
        }
        (node, last) = (node >> 1, last >> 1);
    }
    if last != 0 {
        return Err(wrong_length);
    }
    expect_root(old_hash, *old_root)?;
    expect_root(new_hash, *new_root)
}

/// `length` as left and right subtree, the left one the largest power of two below it.
fn split(length: u64) -> Option<(u64, u64)> {
    let left = 1_u64.checked_shl(length.checked_sub(1)?.checked_ilog2()?)?;
    Some((left, length.checked_sub(left)?))
}

fn odd(node: u64) -> bool {
    node & 1 == 1
}

/// Skips the levels at which the last, incomplete subtree has no sibling.
fn climb_left_edge(mut node: u64, mut last: u64) -> (u64, u64) {
    while !odd(node) && node != 0 {
        (node, last) = (node >> 1, last >> 1);
    }
    (node, last)
}

fn expect_root(got: Digest, expected: Digest) -> Result<(), TreeError> {
    if got == expected {
        Ok(())
    } else {
        Err(TreeError::WrongRoot { got, expected })
    }
}

#[cfg(test)]
pub(super) mod tests {
    #![expect(
        clippy::arithmetic_side_effects,
        reason = "small numbers of the tests' own making"
    )]

    use proptest::prelude::*;

    use super::*;

    /// Leaves of the certificate-transparency test suites.
    pub(in crate::transcript) const LEAVES: [&str; 8] = [
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    ];

    const ROOTS: [&str; 8] = [
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
        "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
        "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
        "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
        "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
    ];

    pub(in crate::transcript) fn example_tree() -> Tree {
        LEAVES
            .iter()
            .map(|leaf| leaf_hash(&hex::decode(leaf).unwrap()))
            .collect()
    }

    fn numbered(count: u64) -> Tree {
        (0..count)
            .map(|index| leaf_hash(&index.to_be_bytes()))
            .collect()
    }

    fn naive_root(leaves: &[Digest]) -> Digest {
        match leaves {
            [] => empty_root(),
            [leaf] => *leaf,
            _ => {
                let mut middle = 1;
                while middle * 2 < leaves.len() {
                    middle *= 2;
                }
                let (left, right) = leaves.split_at(middle);
                node_hash(&naive_root(left), &naive_root(right))
            }
        }
    }

    #[test]
    fn roots_of_the_published_leaves_are_the_published_roots() {
        let tree = example_tree();
        for (size, root) in (1..).zip(ROOTS) {
            assert_eq!(tree.root_at(size).unwrap().to_string(), root, "size {size}");
        }
        assert_eq!(tree.root_at(0).unwrap(), Digest::of(b""));
        assert!(tree.root_at(9).is_err());
    }

    #[test]
    fn consistency_from_six_to_eight_is_the_published_proof() {
        let tree = example_tree();
        let proof = tree.consistency(6, 8).unwrap();
        let text: Vec<String> = proof.iter().map(ToString::to_string).collect();
        let expected = [
            ("0ebc5d34", "58ef6a"),
            ("ca854ea1", "5a0ae0"),
            ("d37ee418", "9614b7"),
        ];
        assert_eq!(text.len(), expected.len());
        for (hash, (head, tail)) in text.iter().zip(expected) {
            assert!(hash.starts_with(head) && hash.ends_with(tail), "{hash}");
        }
        let (old, new) = (tree.root_at(6).unwrap(), tree.root_at(8).unwrap());
        verify_consistency(6, 8, &proof, &old, &new).unwrap();
    }

    #[test]
    fn the_incremental_root_is_the_recursive_definition() {
        let leaves: Vec<Digest> = (0_u64..70).map(|i| leaf_hash(&i.to_be_bytes())).collect();
        for size in 0..=leaves.len() {
            let tree: Tree = leaves.iter().take(size).copied().collect();
            assert_eq!(tree.root(), naive_root(&leaves[..size]), "size {size}");
        }
    }

    #[test]
    fn every_inclusion_proof_of_every_small_tree_holds_and_no_other_position_accepts_it() {
        let tree = numbered(33);
        for size in 1..=33 {
            let root = tree.root_at(size).unwrap();
            for index in 0..size {
                let leaf = leaf_hash(&index.to_be_bytes());
                let path = tree.inclusion(index, size).unwrap();
                verify_inclusion(&leaf, index, size, &path, &root).unwrap();
                for other in (0..size).filter(|other| *other != index) {
                    assert!(verify_inclusion(&leaf, other, size, &path, &root).is_err());
                }
            }
        }
    }

    #[test]
    fn every_consistency_proof_of_every_small_tree_holds() {
        let tree = numbered(33);
        for new in 0..=33 {
            for old in 0..=new {
                let path = tree.consistency(old, new).unwrap();
                let (before, after) = (tree.root_at(old).unwrap(), tree.root_at(new).unwrap());
                verify_consistency(old, new, &path, &before, &after)
                    .unwrap_or_else(|error| panic!("{old} -> {new}: {error}"));
                if old != new && old != 0 {
                    assert!(verify_consistency(old, new, &path, &after, &before).is_err());
                }
            }
        }
    }

    proptest! {
        #[test]
        fn proofs_of_large_trees_hold_and_break_with_one_byte(
            size in 1_u64..3000, index: u64, old: u64, hash: prop::sample::Index,
            byte in 0_usize..32, mask in 1_u8..,
        ) {
            let tree = numbered(size);
            let (index, old) = (index % size, 1 + old % size);
            let leaf = leaf_hash(&index.to_be_bytes());
            let (before, after) = (tree.root_at(old).unwrap(), tree.root());
            let mut inclusion = tree.inclusion(index, size).unwrap();
            let mut consistency = tree.consistency(old, size).unwrap();
            verify_inclusion(&leaf, index, size, &inclusion, &after).unwrap();
            verify_consistency(old, size, &consistency, &before, &after).unwrap();
            prop_assert!(verify_inclusion(&leaf, index, size, &[inclusion.as_slice(), &[leaf]].concat(), &after).is_err());
            prop_assert!(verify_consistency(old, size, &[consistency.as_slice(), &[leaf]].concat(), &before, &after).is_err());
            for path in [&mut inclusion, &mut consistency] {
                if path.is_empty() { continue; }
                let at = hash.index(path.len());
                let mut bytes = *path[at].as_bytes();
                bytes[byte] ^= mask;
                path[at] = Digest::from_bytes(bytes);
            }
            if !inclusion.is_empty() {
                prop_assert!(verify_inclusion(&leaf, index, size, &inclusion, &after).is_err());
                inclusion.pop();
                prop_assert!(verify_inclusion(&leaf, index, size, &inclusion, &after).is_err());
            }
            if !consistency.is_empty() {
                prop_assert!(verify_consistency(old, size, &consistency, &before, &after).is_err());
                consistency.pop();
                prop_assert!(verify_consistency(old, size, &consistency, &before, &after).is_err());
            }
        }

        #[test]
        fn verification_of_arbitrary_numbers_never_panics(
            a: u64, b: u64, hashes in prop::collection::vec(any::<[u8; 32]>(), 0..70),
        ) {
            let path: Vec<Digest> = hashes.into_iter().map(Digest::from_bytes).collect();
            let root = empty_root();
            prop_assert!(verify_inclusion(&root, a, b, &path, &root).is_err());
            let _ = verify_consistency(a, b, &path, &root, &root);
        }
    }
}
