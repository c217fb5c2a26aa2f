//! A write of the guest that is only a signal: `KVM_IOEVENTFD`.

use std::io;
use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::file::eventfd;
use crate::interrupt::Event;

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

/// Lets a write of the guest signal an event instead of leaving the guest, as long as this exists.
#[derive(Debug)]
pub struct IoEvent {
    vm: Arc<VmFd>,
    address: IoAddress,
    matched: IoMatch,
    event: EventFd,
}

impl IoEvent {
    /// From now on such writes signal `event`.
    ///
    /// # Errors
    /// The kernel's: `EEXIST` if there is an overlapping one at this address already (one that matches [any](IoMatch::Any) value
    /// overlaps with all), `ENOSPC` if there are too many.
    pub fn new(vm: &Arc<VmFd>, address: IoAddress, matched: IoMatch, event: &Event) -> io::Result<Self> {
        let event = eventfd(event)?;
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
