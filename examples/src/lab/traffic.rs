//! Bytes on the wire, and what dense logits would be.

use anyhow::Result;
use consilium_node::worker::LoadedModel;
use consilium_protocol::limits;
use consilium_protocol::quic::chunk::{Packer, Stride};
use consilium_protocol::reference::Item;

/// Bytes of the chunks that carry `content`.
///
/// # Errors
/// The compressor cannot be made.
pub fn packed(content: &[u8], stride: Stride) -> Result<u64> {
    let mut packer = Packer::new(stride)?;
    let mut chunk = Vec::new();
    let mut bytes = 0;
    for raw in content.chunks(limits::CHUNK) {
        chunk.clear();
        packer.pack(raw, &mut chunk);
        bytes += chunk.len() as u64;
    }
    Ok(bytes)
}

/// Bytes of f16 logits over the source's whole vocabulary at every predicted token of the items.
///
/// # Errors
/// A target that the source cannot tokenise.
pub fn dense(source: &LoadedModel, items: &[Item]) -> Result<u64> {
    let mut tokens = 0;
    for item in items {
        tokens += source.whole_item(&item.context, &item.target)?.target.len() + 1;
    }
    Ok(2 * (tokens * source.vocab.len()) as u64)
}
