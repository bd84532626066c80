//! The trie of a byte-sorted vocabulary: every node is a contiguous range of ranks.

use std::ops::Range;

/// A byte string that starts at least one token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Node {
    /// First rank below the node.
    pub(crate) start: u32,
    /// End of the ranks that spell exactly this node; equals `start` where it is no token.
    pub(crate) stop: u32,
    /// End of the ranks below the node.
    pub(crate) end: u32,
    /// Last byte of the node; 0 at the root.
    pub(crate) byte: u8,
    pub(crate) children: u16,
    pub(crate) first_child: u32,
}

impl Node {
    /// All ranks below the node, itself included.
    #[cfg(test)]
    pub(crate) fn all(&self) -> Range<usize> {
        self.start as usize..self.end as usize
    }

    /// Ranks that spell exactly this node.
    pub(crate) fn stops(&self) -> Range<usize> {
        self.start as usize..self.stop as usize
    }

    /// Ranks that spell more than this node.
    pub(crate) fn longer(&self) -> Range<usize> {
        self.stop as usize..self.end as usize
    }

    pub(crate) fn has_children(&self) -> bool {
        self.children > 0
    }
}

/// Nodes in breadth-first order, so that the children of a node are neighbours, ascending by byte.
#[derive(Clone, Debug)]
pub(crate) struct Trie {
    nodes: Vec<Node>,
}

impl Trie {
    /// Builds the trie of `count` sorted byte strings. The number of nodes is at most the number of
    /// bytes plus one.
    pub(crate) fn new<'a>(count: u32, bytes_of: impl Fn(u32) -> &'a [u8]) -> Self {
        let mut nodes = vec![Node {
            start: 0,
            stop: 0,
            end: count,
            byte: 0,
            children: 0,
            first_child: 0,
        }];
        let mut level = 0..1;
        let mut depth = 0;
        while !level.is_empty() {
            let next = nodes.len();
            for index in level {
                split(&mut nodes, index, depth, &bytes_of);
            }
            level = next..nodes.len();
            depth += 1;
        }
        nodes.shrink_to_fit();
        Self { nodes }
    }

    /// All nodes, the root first.
    #[cfg(feature = "cuda")]
    pub(crate) fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    pub(crate) fn root(&self) -> &Node {
        &self.nodes[0]
    }

    pub(crate) fn children(&self, node: &Node) -> &[Node] {
        let first = node.first_child as usize;
        &self.nodes[first..first + usize::from(node.children)]
    }

    pub(crate) fn child(&self, node: &Node, byte: u8) -> Option<&Node> {
        let children = self.children(node);
        let index = children
            .binary_search_by_key(&byte, |child| child.byte)
            .ok()?;
        Some(&children[index])
    }

    /// The node that spells `bytes`, if any token starts with them.
    pub(crate) fn find(&self, bytes: &[u8]) -> Option<&Node> {
        bytes
            .iter()
            .try_fold(self.root(), |node, &byte| self.child(node, byte))
    }
}

fn split<'a>(
    nodes: &mut Vec<Node>,
    index: usize,
    depth: usize,
    bytes_of: impl Fn(u32) -> &'a [u8],
) {
    let Node { start, end, .. } = nodes[index];
    let mut stop = start;
    while stop < end && bytes_of(stop).len() == depth {
        stop += 1;
    }
    let first_child = nodes.len();
    let mut rank = stop;
    while rank < end {
        let byte = bytes_of(rank)[depth];
        let from = rank;
        while rank < end && bytes_of(rank)[depth] == byte {
            rank += 1;
        }
        nodes.push(Node {
            start: from,
            stop: from,
            end: rank,
            byte,
            children: 0,
            first_child: 0,
        });
    }
    let children = nodes.len() - first_child;
    let node = &mut nodes[index];
    node.stop = stop;
    node.children = u16::try_from(children).expect("at most one child per byte value");
    node.first_child = u32::try_from(first_child).expect("nodes are no more than token bytes");
}
