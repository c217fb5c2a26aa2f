//! What a [`DeviceManager`](super::DeviceManager) knows of a device, and what a device has to do for it.
use std::fmt;

use device_state::{Section, StateError};
use vm_memory::{GuestAddress, GuestUsize};

/// A device, or a bus, which is a device with children.
///
/// Several vCPUs may call [`read`](Self::read) and [`write`](Self::write) at once, and the VMM any of the others meanwhile:
/// a device protects its own data. One that panics in any of them is not called by the guest any more.
pub trait Device: Send + Sync {
    /// What people call it. Need not be unique, but stay the same over save and restore.
    fn name(&self) -> String;

    /// The guest reads from an address in one of the device's ranges. All bytes of the access are within that range.
    fn read(&self, addr: GuestAddress, data: &mut [u8], io_type: IoType);

    /// The guest writes to an address in one of the device's ranges. All bytes of the access are within that range.
    fn write(&self, addr: GuestAddress, data: &[u8], io_type: IoType);

    /// Tells the device, before the guest can reach it, what it was given: each of these resources has an address, and an
    /// interrupt has a number.
    fn set_resources(&self, res: &[IoResource], irq: Option<IrqResource>);

    /// As after power on. The device keeps its resources.
    fn reset(&self) {}

    /// What a restored device needs to go on, while no vCPU runs.
    ///
    /// # Errors
    /// [`StateError::Unsupported`] for a device that does not implement this: then its machine cannot be saved. A device
    /// without state gives an [empty section](Section::empty).
    fn save(&self) -> Result<Section, StateError> {
        Err(StateError::Unsupported)
    }

    /// Takes over what [`save`](Self::save) gave, maybe in another process. It comes from outside, and may hold anything.
    ///
    /// # Errors
    /// Whatever is wrong with it. The device is then [reset](Self::reset).
    fn restore(&self, state: &Section) -> Result<(), StateError> {
        let _ = state;
        Err(StateError::Unsupported)
    }
}

/// How the guest reaches a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IoType {
    /// Ports; each access is an exit.
    Pio,
    /// Memory without anything behind it; each access is an exit.
    Mmio,
    /// Memory with pages behind it, which the hypervisor maps into the guest. The range is reserved, so that nothing else
    /// gets it, but accesses cause no exits.
    PhysicalMmio,
}

/// A range that a device asks for, or was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoResource {
    /// The first port or byte. `None`: anywhere.
    pub addr: Option<GuestAddress>,
    /// Number of ports or bytes, not zero.
    pub size: GuestUsize,
    /// How the guest reaches it.
    pub io_type: IoType,
}

impl IoResource {
    /// So much from this address on, or anywhere.
    pub fn new(addr: Option<GuestAddress>, size: GuestUsize, io_type: IoType) -> IoResource {
        IoResource { addr, size, io_type }
    }
}

impl fmt::Display for IoResource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.io_type {
            IoType::Pio => "ports",
            IoType::Mmio => "memory",
            IoType::PhysicalMmio => "mapped memory",
        })?;
        match self.addr {
            Some(addr) => write!(f, " {:#x}+{:#x}", addr.0, self.size),
            None => write!(f, " anywhere+{:#x}", self.size),
        }
    }
}

/// An interrupt line that a device asks for, or was given. `IrqResource(None)`: any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IrqResource(pub Option<u32>);
