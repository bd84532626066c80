//! Numeric operations of Consilium on slices: values in, values out, no IO and no clock.
//!
//! Logits are rows of `f32` in rank order, the byte-sorted order of [`vocab::Vocab`]; a model
//! permutes the rows of its output head once at load. Floats end where records begin: [`fusion`] is
//! integer arithmetic on [`code`]s, so its results are the same bytes on every machine and any
//! number of threads. Unsafe code is in [`matmul`], [`adapters::product`], the SIMD passes and the
//! choice of an instruction set.

pub mod adamw;
pub mod adapters;
pub mod backend;
pub mod bytes;
pub mod code;
mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod element;
pub mod error;
pub mod fusion;
pub mod head;
pub mod layers;
pub mod listed;
pub mod loss;
#[cfg(feature = "mapped")]
pub mod mapped;
pub mod matmul;
pub mod quant;
pub mod records;
mod reference;
mod rows;
pub mod score;
#[cfg(test)]
mod testing;
mod trie;
pub mod vocab;

pub use backend::Backend;
pub use element::{Dtype, Element};
pub use error::{
    AdapterError, CudaError, FusionError, HeadError, ListedError, LossError, RecordError,
    ScoreError, VocabError,
};
pub use head::{Head, Weights};
pub use listed::ListedRow;
pub use records::{RecordShape, RecordView, Records, Symbol};
pub use vocab::{TokenKind, Vocab};
