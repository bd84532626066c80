//! Where tensors lie, and moving a model there.

use std::sync::OnceLock;

use candle_core::{DType, Device};

use crate::worker::model::parameters::{Bank, Values};
use crate::worker::model::{Head, Model, ModelError};

/// Where a model computes with candle's operations, and in which type.
#[derive(Debug, Clone)]
pub struct Placement {
    /// Memory of the activations.
    pub device: Device,
    /// Type of frozen weights and of activations: f32 or bf16.
    pub dtype: DType,
    /// Whether frozen weights of the layers stay in the host's memory; each layer's are copied when it is computed, once
    /// in a forward and once in a backward pass, so that a model may be larger than the device.
    pub offload: bool,
}

impl Placement {
    /// All weights on the device.
    #[must_use]
    pub const fn new(device: Device, dtype: DType) -> Self {
        Self {
            device,
            dtype,
            offload: false,
        }
    }

    /// The same with the layers' frozen weights in the host's memory, or not.
    #[must_use]
    pub fn with_offload(self, offload: bool) -> Self {
        Self { offload, ..self }
    }

    /// Moves the weights of a layer, or its factors.
    pub(crate) fn take_layer(&self, bank: &mut Bank) -> candle_core::Result<()> {
        let stays = self.offload && !bank.is_trainable();
        let device = if stays { &Device::Cpu } else { &self.device };
        bank.place(device, self.dtype)
    }
}

impl Model {
    /// Moves the weights and computes there from now on, adapters that are attached later included. Trained tensors are
    /// f32, all others have the type of the placement; those stored in fewer bits stay in the host's memory and are decoded
    /// when they are used. Optimisers made before do not fit any more.
    ///
    /// # Errors
    /// The device is out of memory or fails.
    pub fn place(&mut self, placement: Placement) -> Result<(), ModelError> {
        self.placement = Some(placement);
        self.follow_placement()
    }

    /// Where the model computes, if not with the host's own operations.
    #[must_use]
    pub fn placement(&self) -> Option<&Placement> {
        self.placement.as_ref()
    }

    /// Moves what has come into being since the model was placed.
    pub(crate) fn follow_placement(&mut self) -> Result<(), ModelError> {
        self.host_head = OnceLock::new();
        let Some(placement) = self.placement.clone() else {
            return Ok(());
        };
        let Placement { device, dtype, .. } = &placement;
        self.embedding.place(device, *dtype)?;
        for layer in &mut self.layers {
            placement.take_layer(&mut layer.attention.1)?;
            placement.take_layer(&mut layer.feed_forward.1)?;
        }
        let blocks = self.lora.iter_mut().flat_map(|lora| &mut lora.blocks);
        for bank in blocks.flatten().filter_map(|factors| factors.bank.as_mut()) {
            bank.place(device, *dtype)?;
        }
        self.norm.place(device, *dtype)?;
        match &mut self.head {
            Head::Own(bank) => bank.place(device, *dtype)?,
            Head::Tied {
                ordered: Some(Values::Floats(ordered)),
            } => *ordered = ordered.to_dtype(*dtype)?.to_device(device)?,
            Head::Tied { .. } => {}
        }
        Ok(())
    }
}
