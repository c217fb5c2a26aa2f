//! A write of the guest that is only a signal: `KVM_IOEVENTFD`.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::file::eventfd;

/// Where the guest writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IoAddress {
    /// A port.
    Pio(u16),
    /// Memory-mapped I/O.
    Mmio(u64),
}

/// Which writes signal; all others leave the guest as without it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IoMatch {
    /// Each one that begins at the address, whatever its width. The value is lost.
    Any,
    /// One byte with this value.
    U8(u8),
    /// Two bytes with this value.
    U16(u16),
    /// Four bytes with this value.
    U32(u32),
    /// Eight bytes with this value.
    U64(u64),
}

impl IoMatch {
    /// Writes of this width in bytes (0: any) and, if there is one, this value. A width needs a value and a value a width that
    /// it fits into, since KVM matches both or none: `None` otherwise.
    ///
    /// ```
    /// use vm_device::kvm::IoMatch;
    ///
    /// assert_eq!(IoMatch::of(0, None), Some(IoMatch::Any));
    /// assert_eq!(IoMatch::of(4, Some(1)), Some(IoMatch::U32(1)));
    /// assert_eq!(IoMatch::of(1, Some(256)), None);
    /// ```
    pub fn of(width: u8, value: Option<u32>) -> Option<Self> {
        match (width, value) {
            (0, None) => Some(Self::Any),
            (1, Some(value)) => Some(Self::U8(value.try_into().ok()?)),
            (2, Some(value)) => Some(Self::U16(value.try_into().ok()?)),
            (4, Some(value)) => Some(Self::U32(value)),
            (8, Some(value)) => Some(Self::U64(value.into())),
            _ => None,
        }
    }
}

/// Lets a write of the guest signal an event instead of leaving the guest, as long as this exists.
#[derive(Debug)]
pub struct IoEvent {
    vm: Arc<VmFd>,
    address: IoAddress,
    matched: IoMatch,
    event: EventFd,
}

impl IoEvent {
    /// From now on such writes signal `event`: an [`Event`](crate::interrupt::Event), or whoever's eventfd.
    ///
    /// # Errors
    /// The kernel's: `EEXIST` if there is an overlapping one at this address already (one that matches [any](IoMatch::Any) value
    /// overlaps with all), `ENOSPC` if there are too many.
    pub fn new(vm: &Arc<VmFd>, address: IoAddress, matched: IoMatch, event: impl AsFd) -> io::Result<Self> {
        let event = eventfd(event.as_fd())?;
        let at = kvm_address(address);
        match matched {
            IoMatch::Any => vm.register_ioevent(&event, &at, NoDatamatch),
            IoMatch::U8(value) => vm.register_ioevent(&event, &at, value),
            IoMatch::U16(value) => vm.register_ioevent(&event, &at, value),
            IoMatch::U32(value) => vm.register_ioevent(&event, &at, value),
            IoMatch::U64(value) => vm.register_ioevent(&event, &at, value),
        }?;
        Ok(Self { vm: vm.clone(), address, matched, event })
    }

    /// Where the guest writes.
    pub fn address(&self) -> IoAddress {
        self.address
    }
}

impl Drop for IoEvent {
    fn drop(&mut self) {
        let Self { vm, address, matched, event } = self;
        let at = kvm_address(*address);
        // Can only fail if it is not there.
        let _ = match *matched {
            IoMatch::Any => vm.unregister_ioevent(event, &at, NoDatamatch),
            IoMatch::U8(value) => vm.unregister_ioevent(event, &at, value),
            IoMatch::U16(value) => vm.unregister_ioevent(event, &at, value),
            IoMatch::U32(value) => vm.unregister_ioevent(event, &at, value),
            IoMatch::U64(value) => vm.unregister_ioevent(event, &at, value),
        };
    }
}

fn kvm_address(address: IoAddress) -> IoEventAddress {
    match address {
        IoAddress::Pio(port) => IoEventAddress::Pio(u64::from(port)),
        IoAddress::Mmio(address) => IoEventAddress::Mmio(address),
    }
}
