//! Where a worker computes, and how it holds weights that are not trained.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use candle_core::{DType, Device};
use consilium_kernels::Backend;
use consilium_kernels::quant::Format;

use super::error::WorkError;
use super::model::{BaseStorage, OffloadFile, Placement};
use crate::config::{DeviceChoice, Memory};

/// Type of frozen weights and of activations on a device.
pub(crate) const ON_DEVICE: DType = DType::BF16;

impl DeviceChoice {
    /// What the choice comes to here: [`Self::Cpu`] or [`Self::Cuda`].
    ///
    /// # Errors
    /// As [`placement`](Self::placement).
    pub fn found(self) -> Result<Self, WorkError> {
        Ok(match self.placement()? {
            None => Self::Cpu,
            Some(_) => Self::Cuda,
        })
    }

    /// Where models are placed: none for the host's own operations, in f32. On an NVIDIA device frozen weights and activations are
    /// bf16.
    ///
    /// # Errors
    /// `cuda` was chosen, and this program was built without it or there is no such device.
    pub fn placement(self) -> Result<Option<Placement>, WorkError> {
        if self == Self::Cpu {
            return Ok(None);
        }
        match (cuda(), self) {
            (Ok(device), _) => Ok(Some(Placement::new(device, ON_DEVICE))),
            (Err(problem), Self::Cuda) => Err(WorkError::Setting {
                field: "device",
                problem,
            }),
            (Err(reason), _) => {
                tracing::debug!(reason, "computes on the processors");
                Ok(None)
            }
        }
    }
}

impl Memory {
    /// [`DeviceChoice::placement`], with the layers' frozen weights in the host's memory where they are to stay behind.
    ///
    /// # Errors
    /// As there.
    pub fn placement(&self) -> Result<Option<Placement>, WorkError> {
        let placement = self.device.placement()?;
        Ok(placement.map(|placement| placement.with_offload(self.offload)))
    }

    /// How a model is loaded whose adapter is to be trained, with embedding and head or without. On the processors offloaded
    /// weights go to a file in `folder`.
    ///
    /// # Errors
    /// There is no such device, or the file cannot be made.
    pub(crate) fn storage(
        &self,
        trains_tables: bool,
        folder: &Path,
    ) -> Result<BaseStorage, WorkError> {
        let placement = self.placement()?;
        let on_device = placement.is_some();
        let file = || OffloadFile::create(folder).map(Arc::new);
        Ok(BaseStorage {
            // On a device weights have the placement's type, unless they are stored in fewer bits than that.
            format: match self.base {
                Format::Bf16 if on_device => Format::F32,
                format => format,
            },
            tables: !trains_tables,
            offload: (self.offload && !on_device).then(file).transpose()?,
            placement,
        })
    }
}

/// The first NVIDIA device, or why there is none; looked for once, because tensors of one opening do not mix with another's.
fn cuda() -> Result<Device, String> {
    static DEVICE: OnceLock<Result<Device, String>> = OnceLock::new();
    DEVICE.get_or_init(open_cuda).clone()
}

fn open_cuda() -> Result<Device, String> {
    if !cfg!(feature = "cuda") {
        return Err(
            "this program was built without CUDA; build it with `--features cuda` (node/README.md), or choose `cpu`"
                .to_owned(),
        );
    }
    // The kernels look for driver and device first and say what is missing.
    if let Some((_, reason)) = Backend::absent().into_iter().next() {
        return Err(format!(
            "no NVIDIA device: {reason}; choose `cpu`, or `auto`"
        ));
    }
    // A missing library of CUDA is a panic there.
    let opened = std::panic::catch_unwind(|| Device::new_cuda(0));
    match opened {
        Ok(Ok(device)) => Ok(device),
        Ok(Err(error)) => Err(format!("the NVIDIA device cannot be used: {error}")),
        Err(_) => {
            Err("CUDA's libraries (cuBLAS, cuRAND) cannot be loaded; install them".to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_cannot_be_had_is_refused_by_name_and_auto_does_without() {
        let held = |device| Memory {
            offload: true,
            device,
            ..Memory::default()
        };
        let [cpu, cuda, auto] =
            [DeviceChoice::Cpu, DeviceChoice::Cuda, DeviceChoice::Auto].map(held);
        let folder = tempfile::tempdir().unwrap();
        let stored = cpu.storage(false, folder.path()).unwrap();
        assert!(stored.placement.is_none() && stored.offload.is_some());
        match cuda.storage(false, folder.path()) {
            Ok(stored) => {
                assert!(stored.placement.unwrap().offload && stored.offload.is_none());
            }
            Err(error) => {
                let error = error.to_string();
                assert!(
                    error.starts_with("device: ") && error.contains("cpu"),
                    "{error}"
                );
                assert!(auto.placement().unwrap().is_none());
                assert_eq!(DeviceChoice::Auto.found().unwrap(), DeviceChoice::Cpu);
            }
        }
    }
}
