//! Where a run computes, the memory that it may take there and here, and what it needs of both.

use super::{Budget, DeviceMemory, HostMemory, Memory, Shape};
use crate::worker::model::ModelConfig;

/// Bytes that the person in charge grants a run in place of what is found free.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Granted {
    /// Of the host's memory.
    pub host: Option<u64>,
    /// Of the device's.
    pub device: Option<u64>,
}

/// Memory that a run may take.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Room {
    /// Of the host, if anything says so.
    pub host: Option<Budget>,
    /// Of the device, where the run computes on one.
    pub device: Option<DeviceRoom>,
}

/// A device that a run computes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceRoom {
    /// Bytes of a frozen weight and of a value of the activations there.
    pub value_bytes: usize,
    /// Memory of the device, if anything says so.
    pub budget: Option<Budget>,
}

/// What a run needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Estimate {
    /// On the processors.
    Host(Memory),
    /// On a device, and of the host beside it.
    Device(DeviceMemory, HostMemory),
}

/// A memory that is too small.
pub(super) struct Short<'a> {
    pub(super) is_device: bool,
    pub(super) needed: u64,
    pub(super) budget: &'a Budget,
}

impl Estimate {
    /// Of a run in a room.
    #[must_use]
    pub fn of(config: &ModelConfig, shape: &Shape, room: &Room) -> Self {
        match &room.device {
            None => Self::Host(Memory::of(config, shape)),
            Some(device) => Self::Device(
                DeviceMemory::of(config, shape, device.value_bytes),
                HostMemory::of(config, shape, device.value_bytes),
            ),
        }
    }

    /// Bytes of the host.
    #[must_use]
    pub const fn host(&self) -> u64 {
        match self {
            Self::Host(memory) => memory.total() as u64,
            Self::Device(_, memory) => memory.total() as u64,
        }
    }

    /// Bytes of the device, where there is one.
    #[must_use]
    pub const fn device(&self) -> Option<u64> {
        match self {
            Self::Host(_) => None,
            Self::Device(memory, _) => Some(memory.total() as u64),
        }
    }

    /// Where the room is too small: on the device before here.
    pub(super) fn short<'a>(&self, room: &'a Room) -> Option<Short<'a>> {
        let device = room.device.as_ref().and_then(|room| room.budget.as_ref());
        let of_device = self.device().zip(device).map(|of| (true, of));
        let of_host = room
            .host
            .as_ref()
            .map(|budget| (false, (self.host(), budget)));
        let all = of_device.into_iter().chain(of_host);
        all.map(|(is_device, (needed, budget))| Short {
            is_device,
            needed,
            budget,
        })
        .find(|short| short.needed > short.budget.bytes)
    }
}
