//! What crosses to the device: the arguments of the kernels, field by field as the CUDA sources declare them.
//!
//! Addresses are of device memory. A job does not keep that memory alive: whoever launches it holds the buffers until
//! the device is done.

use cudarc::driver::DeviceRepr;

/// A device address; zero is none.
pub(super) type Address = u64;

/// No row, node, segment, child or rank.
pub(super) const NONE: u32 = u32::MAX;

/// Threads of a block.
pub(super) const THREADS: u32 = 256;

/// Warps of a block.
pub(super) const WARPS: u32 = THREADS / 32;

/// Elements that a warp takes at a time.
pub(super) const TILE: u32 = 256;

/// Bytes of a warp's tiles that are on their way.
pub(super) const RING: u32 = 4096;

/// Most elements between a boundary of 128 bytes and the start of a row.
pub(super) const SKEW: u32 = 63;

/// Compiled sources.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unit {
    Score,
    Loss,
    Listed,
    Gemm,
    Fusion,
    Robust,
    Adapters,
}

impl Unit {
    pub(super) const COUNT: usize = 7;

    pub(super) fn ptx(self) -> &'static str {
        match self {
            Self::Score => include_str!("ptx/score.ptx"),
            Self::Loss => include_str!("ptx/loss.ptx"),
            Self::Listed => include_str!("ptx/listed.ptx"),
            Self::Gemm => include_str!("ptx/gemm.ptx"),
            Self::Fusion => include_str!("ptx/fusion.ptx"),
            Self::Robust => include_str!("ptx/robust.ptx"),
            Self::Adapters => include_str!("ptx/adapters.ptx"),
        }
    }
}

macro_rules! plain {
    ($($(#[$doc:meta])* struct $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default)]
        #[repr(C)]
        pub(super) struct $name {
            $($(#[$field_doc])* pub(super) $field: $type,)*
        }

        // SAFETY: `repr(C)`, made of integers and floats of which the sources declare the same, in this order.
        unsafe impl DeviceRepr for $name {}
    )*};
}

plain! {
    /// A trie node.
    struct Node {
        start: u32,
        stop: u32,
        end: u32,
        first_child: u32,
        children: u32,
        byte: u32,
    }

    /// One node along a token.
    struct Level {
        node: u32,
        /// Place of the next node among the children, or [`NONE`].
        path: u32,
        /// Index of the node's first segment.
        left: u32,
        /// Index of the segment of the first child behind the path.
        right: u32,
    }

    /// Partition of a row.
    struct Row {
        first_level: u32,
        levels: u32,
        first_segment: u32,
        segments: u32,
    }

    /// Sum of exponentials relative to a shift; or a shift and a coefficient.
    struct Mass {
        shift: f32,
        sum: f32,
    }

    /// Rows of logits and where their masses go.
    struct Rows {
        nodes: Address,
        starts: Address,
        levels: Address,
        rows: Address,
        logits: Address,
        stride: u64,
        count: u32,
        live: u32,
        ends: u32,
        width: u32,
        tiles: u32,
        slices: u32,
        most_segments: u32,
        most_levels: u32,
        edges: Address,
        segments: Address,
        layout: Address,
        owners: Address,
        arrived: Address,
        bad: Address,
    }

    /// Place of a row in the output.
    struct ScoreRow {
        position: u32,
        bytes: u32,
        previous: u32,
        padding: u32,
    }

    /// Job of `write_records`.
    struct Output {
        rows: Rows,
        branches: Rows,
        score: Address,
        branch: Address,
        observed: Address,
        slots: u32,
        fill_permille: u32,
        symbols: Address,
        codes: Address,
        end: Address,
        tail: Address,
        missed: Address,
    }

    /// Job of `find_branches`.
    struct Branches {
        rows: Rows,
        score: Address,
        found: Address,
        threshold: f32,
        padding: u32,
    }

    /// Job of `token_bits`.
    struct TokenBits {
        rows: Rows,
        bits: Address,
    }

    /// One term of a row's loss.
    struct Term {
        kind: u32,
        weight: f32,
        slots: u32,
        symbols: u32,
        codes: u32,
        end: u32,
        tail: u32,
        segment: u32,
        shares: u32,
        classes: u32,
    }

    /// Terms, neighbours and slots of a row.
    struct LossRow {
        first_term: u32,
        terms: u32,
        previous: u32,
        first: u32,
        next: u32,
        first_slot: u32,
        listed: u32,
        top: u32,
    }

    /// A column with a gradient of its own.
    struct Slot {
        column: u32,
        owner: u32,
        logit: f32,
        gradient: f32,
    }

    /// Slots of a class, counted from the row's first.
    struct Class {
        from: u32,
        to: u32,
    }

    /// Job of the loss kernels.
    struct Loss {
        rows: Rows,
        loss_rows: Address,
        terms: Address,
        columns: Address,
        probability: Address,
        slots: Address,
        classes: Address,
        shares: Address,
        gradient: Address,
        gradient_stride: u64,
        coefficients: Address,
        losses: Address,
        ready: Address,
        ticket: Address,
        lag: u32,
        scale: f32,
        most_listed: u32,
        candidates: u32,
    }

    /// Matrix product.
    struct Gemm {
        a: Address,
        b: Address,
        c: Address,
        a_stride: u64,
        b_stride: u64,
        c_stride: u64,
        m: u32,
        n: u32,
        k: u32,
        alpha: f32,
        add: u32,
        padding: u32,
    }

    /// One source of a fusion.
    struct Source {
        symbols: Address,
        codes: Address,
        end: Address,
        tail: Address,
        slots: u32,
        weight: u32,
    }

    /// Job of the fusion kernels.
    struct Fusion {
        sources: Address,
        masses: Address,
        half_steps: Address,
        count: u32,
        positions: u32,
        most: u32,
        slots: u32,
        full: u64,
        symbols: Address,
        codes: Address,
        end: Address,
        tail: Address,
        weights: Address,
        dropped: u32,
        padding: u32,
    }

    /// Job of the merge kernels.
    struct Merge {
        adapters: Address,
        weights: Address,
        thresholds: Address,
        out: Address,
        bad: Address,
        overflow: Address,
        count: u64,
        among: u32,
        rule: u32,
        dropped: u32,
        padding: u32,
    }
}

/// [`Term::kind`] of a trie target.
pub(super) const TERM_TRIE: u32 = 0;

/// [`Term::kind`] of a label.
pub(super) const TERM_LABEL: u32 = 1;

/// [`Term::kind`] of classes of listed columns.
pub(super) const TERM_GROUP: u32 = 2;

/// [`Term::kind`] of sorted probabilities.
pub(super) const TERM_SORTED: u32 = 3;

/// [`Term::kind`] of standardised logits.
pub(super) const TERM_STANDARDISED: u32 = 4;

/// [`Merge::rule`] of weighted sums.
pub(super) const RULE_SUM: u32 = 0;

/// [`Merge::rule`] of statistics.
pub(super) const RULE_ROBUST: u32 = 1;

/// [`Merge::rule`] of TIES.
pub(super) const RULE_TIES: u32 = 2;

/// [`Merge::rule`] of SCE.
pub(super) const RULE_SCE: u32 = 3;

/// Bytes that the loss kernels keep per level in shared memory.
pub(super) const LEVEL_STATE: u32 = 96;
