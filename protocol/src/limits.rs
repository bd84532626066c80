//! Every maximum in one place. Sizes are bytes unless the name says otherwise.

/// Longest frame body of any kind; also the allocation limit of one decode.
pub const FRAME: usize = 256 * 1024;
/// Longest raw content of one chunk of a transfer.
pub const CHUNK: usize = 1024 * 1024;
/// Longest artefact of any kind (64 GiB).
pub const ARTEFACT: u64 = 64 << 30;
/// Longest shard file: the largest that is held in memory at once.
pub const SHARD: u64 = 256 << 20;
/// Longest header of a safetensors file that is read piece by piece.
pub const TENSOR_HEADER: u64 = 16 << 20;
/// Longest evaluation document.
pub const EVALUATION: u64 = 64 * 1024;
/// Longest charter or manifest, signatures included.
pub const DOCUMENT: usize = 256 * 1024;
/// Longest log entry (C2SP tlog-tiles: 16-bit length prefix).
pub const LOG_ENTRY: usize = 65_535;
/// Longest identifier of an institution or a consortium, in characters.
pub const ID: usize = 64;
/// Longest free text in a message (software name, checkpoint origin), in characters.
pub const TEXT: usize = 128;
/// Members of one charter.
pub const MEMBERS: usize = 1024;
/// Items of one reference set.
pub const ITEMS: u64 = 100_000_000;
/// Bytes of one item's context or target.
pub const ITEM: usize = 1024 * 1024;
/// Symbol slots of one position (R-2.1: also at most an eighth of the hidden size, checked at the node).
pub const SYMBOLS: u16 = 256;
/// Items of one shard.
pub const SHARD_ITEMS: u32 = 1 << 20;
/// Inner rounds of one round.
pub const INNER_ROUNDS: u32 = 1024;
/// Weight of one member's adapter in a merge of mode `adapters`.
pub const WEIGHT: u32 = 1_000_000;
