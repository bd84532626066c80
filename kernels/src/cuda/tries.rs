//! Vocabularies on the device: the trie, and the partition of a row by every token.

use std::sync::Arc;

use crate::cuda::device::{Buffer, Device, count};
use crate::cuda::raw::{Level, NONE, Node, Row};
use crate::error::CudaError;
use crate::trie::Trie;
use crate::vocab::Vocab;

/// Vocabularies that stay on the device at a time.
const KEPT: usize = 4;

/// The vocabularies used last.
#[derive(Default)]
pub(super) struct Tries(Vec<(u64, Arc<ResidentTrie>)>);

impl Tries {
    pub(super) fn find_or_add(
        &mut self,
        id: u64,
        upload: impl FnOnce() -> Result<ResidentTrie, CudaError>,
    ) -> Result<Arc<ResidentTrie>, CudaError> {
        let entry = match self.0.iter().position(|&(known, _)| known == id) {
            Some(index) => self.0.remove(index),
            None => (id, Arc::new(upload()?)),
        };
        let trie = Arc::clone(&entry.1);
        self.0.truncate(KEPT - 1);
        self.0.insert(0, entry);
        Ok(trie)
    }
}

/// Trie and partitions, made once per vocabulary.
pub(super) struct ResidentTrie {
    pub(super) nodes: Buffer<Node>,
    /// First ranks of the nodes.
    pub(super) starts: Buffer<u32>,
    pub(super) levels: Buffer<Level>,
    /// By rank of a byte token, and last the row without a token.
    paths: Vec<Path>,
    whole: Path,
}

/// How a token cuts a row.
#[derive(Clone, Copy, Debug)]
pub(super) struct Path {
    first_level: u32,
    pub(super) levels: u32,
    pub(super) segments: u32,
    /// Node that the token spells.
    pub(super) node: u32,
    /// Segment of the tokens that spell the same.
    pub(super) stop: u32,
}

impl Path {
    pub(super) fn row(&self, first_segment: u32) -> Row {
        Row {
            first_level: self.first_level,
            levels: self.levels,
            first_segment,
            segments: self.segments,
        }
    }

    /// Segment of the tokens that end a record.
    pub(super) fn end(&self) -> u32 {
        self.segments - 1
    }
}

impl ResidentTrie {
    pub(super) fn new(device: &Device, vocab: &Vocab) -> Result<Self, CudaError> {
        let trie = vocab.trie();
        let mut nodes: Vec<Node> = trie
            .nodes()
            .iter()
            .map(|node| Node {
                start: node.start,
                stop: node.stop,
                end: node.end,
                first_child: node.first_child,
                children: u32::from(node.children),
                byte: u32::from(node.byte),
            })
            .collect();
        let mut levels = Vec::new();
        let mut paths = Vec::with_capacity(vocab.byte_tokens() as usize + 1);
        for rank in 0..vocab.byte_tokens() {
            paths.push(path(trie, vocab.token_bytes(rank), &mut levels)?);
        }
        paths.push(path(trie, &[], &mut levels)?);
        let whole = whole(vocab, &mut nodes, &mut levels)?;
        let starts: Vec<u32> = nodes.iter().map(|node| node.start).collect();
        Ok(Self {
            nodes: device.upload(&nodes)?,
            starts: device.upload(&starts)?,
            levels: device.upload(&levels)?,
            paths,
            whole,
        })
    }

    /// A row that is cut nowhere but where the ends of the record start.
    pub(super) fn whole(&self) -> &Path {
        &self.whole
    }

    /// Path of a byte token, or of a row without a token.
    pub(super) fn path(&self, rank: Option<u32>) -> &Path {
        let last = self.paths.len() - 1;
        let index = rank.map_or(last, |rank| rank as usize);
        &self.paths[index.min(last)]
    }
}

/// Adds a node with one child, which is all byte tokens, and its level.
fn whole(vocab: &Vocab, nodes: &mut Vec<Node>, all: &mut Vec<Level>) -> Result<Path, CudaError> {
    let node = count(nodes.len())?;
    let below = Node {
        end: vocab.byte_tokens(),
        ..Node::default()
    };
    let above = Node {
        first_child: node + 1,
        children: 1,
        ..below
    };
    nodes.extend([above, below]);
    let first_level = count(all.len())?;
    all.push(Level {
        node,
        path: NONE,
        left: 0,
        right: 0,
    });
    Ok(Path {
        first_level,
        levels: 1,
        segments: 2,
        node,
        stop: 0,
    })
}

/// Adds the levels along `bytes`, which some token spells or which are empty.
fn path(trie: &Trie, bytes: &[u8], all: &mut Vec<Level>) -> Result<Path, CudaError> {
    let nodes = trie.nodes();
    let first = all.len();
    let mut node = 0_u32;
    let mut left = 0_u32;
    for depth in 0..=bytes.len() {
        let here = &nodes[node as usize];
        let stop = u32::from(!here.stops().is_empty());
        let next = bytes.get(depth).and_then(|&byte| {
            let children = trie.children(here);
            let place = children.binary_search_by_key(&byte, |child| child.byte);
            place.ok().and_then(|place| u32::try_from(place).ok())
        });
        all.push(Level {
            node,
            path: next.unwrap_or(NONE),
            left,
            right: 0,
        });
        left += stop + next.unwrap_or_else(|| u32::from(here.children));
        if let Some(place) = next {
            node = here.first_child + place;
        }
    }
    let mut right = left;
    for level in all[first..].iter_mut().rev().skip(1) {
        level.right = right;
        right += u32::from(nodes[level.node as usize].children) - level.path - 1;
    }
    Ok(Path {
        first_level: count(first)?,
        levels: count(all.len() - first)?,
        segments: right + 1,
        node,
        stop: all[all.len() - 1].left,
    })
}
