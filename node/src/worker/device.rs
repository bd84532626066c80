//! Where a worker computes.

use std::sync::OnceLock;

use candle_core::{DType, Device};
use consilium_kernels::Backend;
use serde::{Deserialize, Serialize};

use super::error::WorkError;
use super::model::Placement;

/// Where models compute, as settings and options say it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceChoice {
    /// This machine's processors.
    Cpu,
    /// The first NVIDIA device that the process sees (`CUDA_VISIBLE_DEVICES`); an error where there is none.
    Cuda,
    /// An NVIDIA device where this program can use one, else the processors.
    #[default]
    Auto,
}

impl DeviceChoice {
    /// All choices by name.
    pub const NAMES: [(&'static str, Self); 3] = [
        ("cpu", Self::Cpu),
        ("cuda", Self::Cuda),
        ("auto", Self::Auto),
    ];

    /// The choice of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        let found = Self::NAMES.into_iter().find(|(known, _)| *known == name);
        found.map(|(_, choice)| choice)
    }

    /// Where models are placed: none for the host's own operations, in f32. On an NVIDIA device frozen weights and activations are
    /// bf16, and with `offload` the layers' frozen weights stay in the host's memory.
    ///
    /// # Errors
    /// `cuda` was chosen, and this program was built without it or there is no such device.
    pub fn placement(self, offload: bool) -> Result<Option<Placement>, WorkError> {
        if self == Self::Cpu {
            return Ok(None);
        }
        match (cuda(), self) {
            (Ok(device), _) => {
                let placement = Placement::new(device, DType::BF16);
                Ok(Some(placement.with_offload(offload)))
            }
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
        assert!(DeviceChoice::Cpu.placement(false).unwrap().is_none());
        for (name, choice) in DeviceChoice::NAMES {
            assert_eq!(DeviceChoice::named(name), Some(choice));
        }
        assert_eq!(DeviceChoice::named("gpu"), None);
        match DeviceChoice::Cuda.placement(true) {
            Ok(placement) => assert!(placement.unwrap().offload),
            Err(error) => {
                let error = error.to_string();
                assert!(
                    error.starts_with("device: ") && error.contains("cpu"),
                    "{error}"
                );
                assert!(DeviceChoice::Auto.placement(true).unwrap().is_none());
            }
        }
    }
}
