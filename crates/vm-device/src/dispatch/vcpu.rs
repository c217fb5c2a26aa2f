//! Access: the handle of a vCPU, and of who has none.
use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

use super::IoSpace;
use super::gate::Gate;
use super::table::{self, IoGate, IoPass, Table, Work, kind};
use crate::bus::{Error, MmioAddress, PioAddress};

/// The buses of a machine, as their owner has them.
pub(crate) struct Io {
    gate: Arc<IoGate>,
}

impl Io {
    pub(crate) fn new() -> Io {
        Io { gate: Arc::new(Gate::new(Work::default(), Table::default())) }
    }

    pub(crate) fn space(&self) -> IoSpace {
        IoSpace::new(&self.gate)
    }

    pub(crate) fn vcpu(&self) -> VcpuIo {
        let pass = NonNull::from(take_pass(&self.gate));
        VcpuIo { gate: self.gate.clone(), pass }
    }

    pub(crate) fn counts(&self) -> Counts {
        Counts::of(&self.gate)
    }

    /// Reads, by somebody who has no handle.
    pub(crate) fn pio_read(&self, addr: PioAddress, data: &mut [u8]) -> Result<(), Error> {
        // SAFETY: `with_pass` gives a pass of this gate to us alone.
        self.with_pass(|pass| unsafe { table::read(&self.gate, pass, addr, data) })
    }

    pub(crate) fn pio_write(&self, addr: PioAddress, data: &[u8]) -> Result<(), Error> {
        // SAFETY: as above.
        self.with_pass(|pass| unsafe { table::write(&self.gate, pass, addr, data) })
    }

    pub(crate) fn mmio_read(&self, addr: MmioAddress, data: &mut [u8]) -> Result<(), Error> {
        // SAFETY: as above.
        self.with_pass(|pass| unsafe { table::read(&self.gate, pass, addr, data) })
    }

    pub(crate) fn mmio_write(&self, addr: MmioAddress, data: &[u8]) -> Result<(), Error> {
        // SAFETY: as above.
        self.with_pass(|pass| unsafe { table::write(&self.gate, pass, addr, data) })
    }

    /// An access that no bus has to look at is wrong in itself.
    pub(crate) fn refuse(&self, error: Error) -> Result<(), Error> {
        self.with_pass(|pass| pass.counts.add(kind::INVALID));
        Err(error)
    }

    fn with_pass<R>(&self, access: impl FnOnce(&IoPass) -> R) -> R {
        let pass = take_pass(&self.gate);
        let done = access(pass);
        // SAFETY: it is ours until now; no panic gets out of an access, and an access ends in no room.
        unsafe { self.gate.return_pass(pass, true) };
        done
    }
}

fn take_pass(gate: &IoGate) -> &IoPass {
    gate.take_pass(|work| std::mem::take(&mut work.unseen).then(|| Table::of(work)))
}

/// A vCPU's way to the devices. Each vCPU's thread has its own; see the [module](super).
///
/// Every access is one of these: reads that end with an error are filled with ones, as on a bus where nobody answers, so
/// that a VMM may hand `data` to the guest whatever the outcome.
///
/// # Errors
/// Of each access:
/// * [`Error::DeviceNotFound`]: no range has all of its bytes.
/// * [`Error::InvalidRange`]: it has no bytes, or leaves the address space; [`Error::InvalidAccessLength`]: it has more
///   bytes than the address space.
/// * [`Error::DeviceFailed`]: the device panicked, now or before.
pub struct VcpuIo {
    gate: Arc<IoGate>,
    pass: NonNull<IoPass>,
}

// SAFETY: the pass belongs to the gate, which is kept, and is used by who has this handle only.
unsafe impl Send for VcpuIo {}
// SAFETY: nothing uses the pass by a shared reference.
unsafe impl Sync for VcpuIo {}

impl VcpuIo {
    /// The guest reads from a port.
    ///
    /// # Errors
    /// See [`VcpuIo`].
    #[inline]
    pub fn pio_read(&mut self, addr: PioAddress, data: &mut [u8]) -> Result<(), Error> {
        // SAFETY: the pass is of this gate and ours alone; `&mut self` says that no access of ours is going on.
        unsafe { table::read(&self.gate, self.pass.as_ref(), addr, data) }
    }

    /// The guest writes to a port.
    ///
    /// # Errors
    /// See [`VcpuIo`].
    #[inline]
    pub fn pio_write(&mut self, addr: PioAddress, data: &[u8]) -> Result<(), Error> {
        // SAFETY: as above.
        unsafe { table::write(&self.gate, self.pass.as_ref(), addr, data) }
    }

    /// The guest reads from memory that is a device.
    ///
    /// # Errors
    /// See [`VcpuIo`].
    #[inline]
    pub fn mmio_read(&mut self, addr: MmioAddress, data: &mut [u8]) -> Result<(), Error> {
        // SAFETY: as above.
        unsafe { table::read(&self.gate, self.pass.as_ref(), addr, data) }
    }

    /// The guest writes to memory that is a device.
    ///
    /// # Errors
    /// See [`VcpuIo`].
    #[inline]
    pub fn mmio_write(&mut self, addr: MmioAddress, data: &[u8]) -> Result<(), Error> {
        // SAFETY: as above.
        unsafe { table::write(&self.gate, self.pass.as_ref(), addr, data) }
    }

    /// What was refused so far, by all vCPUs of the machine.
    pub fn counts(&self) -> Counts {
        Counts::of(&self.gate)
    }
}

impl Drop for VcpuIo {
    fn drop(&mut self) {
        // SAFETY: the pass is of this gate and ours; not used any more.
        unsafe { self.gate.return_pass(self.pass.as_ref(), false) };
    }
}

impl fmt::Debug for VcpuIo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VcpuIo").finish_non_exhaustive()
    }
}

/// What was refused since the buses were made, by all vCPUs together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Accesses that touch no device's range.
    pub unclaimed: u64,
    /// Accesses that are in a device's range in part, or in those of several.
    pub straddling: u64,
    /// Accesses without bytes, with too many, or beyond the end of the address space.
    pub invalid: u64,
    /// Accesses to devices that had failed before.
    pub failed: u64,
    /// Accesses in which a device panicked.
    pub panics: u64,
}

impl Counts {
    fn of(gate: &IoGate) -> Counts {
        let mut all = gate.counts().into_iter().enumerate();
        let mut counts = Counts::default();
        for (at, count) in &mut all {
            match at {
                kind::UNCLAIMED => counts.unclaimed = count,
                kind::STRADDLING => counts.straddling = count,
                kind::INVALID => counts.invalid = count,
                kind::FAILED => counts.failed = count,
                _ => counts.panics = count,
            }
        }
        counts
    }
}
