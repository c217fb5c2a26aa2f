//! What a device has to do to be a PCI function.

/// A capability that the guest accesses, with [`Capability::watched`](super::Capability::watched) effects.
#[derive(Clone, Copy, Debug)]
pub struct CapabilityAccess<'a> {
    /// Where the capability is in configuration space, as the builder said.
    pub at: u8,
    /// Where the access begins, from the beginning of the capability.
    pub offset: u16,
    /// All of the capability as it is now; after a write, with what was written.
    pub bytes: &'a [u8],
}

/// The inside of a PCI function: what is behind its BARs.
///
/// vCPUs call while their guests wait, several at once; no lock of ours is held, but for
/// [`bar_moved`](Self::bar_moved). Configuration space, MSI-X table and pending bits are served without the device.
pub trait PciDevice: Send + Sync {
    /// The guest reads `data.len()` bytes at `offset` of a BAR (0 to 5). Offset and length are inside of it.
    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]);

    /// The guest writes `data` at `offset` of a BAR.
    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]);

    /// The guest reads a watched capability. `data` has the stored bytes already; the device may replace them.
    fn capability_read(&self, access: CapabilityAccess<'_>, data: &mut [u8]) {
        let _ = (access, data);
    }

    /// The guest wrote `data` to a watched capability. What its masks let through is stored already.
    fn capability_write(&self, access: CapabilityAccess<'_>, data: &[u8]) {
        let _ = (access, data);
    }

    /// A BAR is reachable for the guest at this address from now on, or not at all any more. For what has to follow it, as an
    /// ioeventfd does. Changes of one BAR are told one after the other.
    ///
    /// Called while the address map is changed: a write to configuration space from in here takes effect afterwards.
    fn bar_moved(&self, bar: u8, address: Option<u64>) {
        let _ = (bar, address);
    }

    /// The function is as after power-on: reset of the machine, of the bus above it or of the function alone, or its slot
    /// lost power. Its configuration space already is.
    fn reset(&self) {}
}
