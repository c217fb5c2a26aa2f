//! What a device asks for and what it is given. Names and fields are those of rust-vmm's `vm-device` 0.1, so that devices
//! written for it need no change; what is new is said so.

/// What a device needs of one kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ResourceConstraint {
    /// A range of I/O ports.
    PioAddress {
        /// All of it between these two, both included, if given.
        range: Option<(u16, u16)>,
        /// The first port is a multiple of this power of two.
        align: u16,
        /// Number of ports.
        size: u16,
    },
    /// A range of memory-mapped I/O.
    MmioAddress {
        /// All of it between these two, both included, if given.
        range: Option<(u64, u64)>,
        /// The first address is a multiple of this power of two.
        align: u64,
        /// Number of bytes.
        size: u64,
    },
    /// An interrupt line of its own.
    LegacyIrq {
        /// This one, if given.
        irq: Option<u32>,
    },
    /// Numbers for the messages of a PCI function's MSI.
    PciMsiIrq {
        /// How many: 1, 2, 4, 8, 16 or 32.
        size: u32,
    },
    /// Numbers for the messages of a PCI function's MSI-X.
    PciMsixIrq {
        /// How many: 1 to 2048.
        size: u32,
    },
    /// Numbers for messages that do not come from PCI.
    GenericIrq {
        /// How many.
        size: u32,
    },
    /// The address of a network card. (New: rust-vmm has the resource, but nothing to ask for it with.)
    MacAddress {
        /// This one, if given: `52:54:00:12:34:56`. Otherwise a locally administered one that no other device of this VM has.
        address: Option<String>,
    },
    /// Slots of KVM for mapping memory into the guest.
    KvmMemSlot {
        /// The first one, if given.
        slot: Option<u32>,
        /// How many, one after the other.
        size: u32,
    },
}

impl ResourceConstraint {
    /// `size` I/O ports anywhere.
    pub fn new_pio(size: u16) -> Self {
        Self::pio_with_constraints(size, None, 1)
    }

    /// `size` I/O ports within `range` (both ends included), aligned to `align`.
    pub fn pio_with_constraints(size: u16, range: Option<(u16, u16)>, align: u16) -> Self {
        Self::PioAddress { range, align, size }
    }

    /// `size` I/O ports from `base` on, and nowhere else. (New.) A range that wraps around is refused by the allocator.
    pub fn pio_at(base: u16, size: u16) -> Self {
        Self::pio_with_constraints(size, Some((base, base.saturating_add(size.saturating_sub(1)))), 1)
    }

    /// `size` bytes of memory-mapped I/O anywhere, from a page's beginning (4096 bytes) on.
    pub fn new_mmio(size: u64) -> Self {
        Self::mmio_with_constraints(size, None, 0x1000)
    }

    /// `size` bytes of memory-mapped I/O within `range` (both ends included), aligned to `align`.
    pub fn mmio_with_constraints(size: u64, range: Option<(u64, u64)>, align: u64) -> Self {
        Self::MmioAddress { range, align, size }
    }

    /// `size` bytes of memory-mapped I/O from `base` on, and nowhere else. (New.) A range that wraps around is refused by
    /// the allocator.
    pub fn mmio_at(base: u64, size: u64) -> Self {
        Self::mmio_with_constraints(size, Some((base, base.saturating_add(size.saturating_sub(1)))), 1)
    }

    /// An interrupt line: `irq`, or any.
    pub fn new_legacy_irq(irq: Option<u32>) -> Self {
        Self::LegacyIrq { irq }
    }

    /// `size` slots of KVM for memory: from `slot` on, or any.
    pub fn new_kvm_mem_slot(size: u32, slot: Option<u32>) -> Self {
        Self::KvmMemSlot { slot, size }
    }
}

/// What messages are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MsiIrqType {
    /// MSI of a PCI function.
    PciMsi,
    /// MSI-X of a PCI function.
    PciMsix,
    /// Messages that do not come from PCI.
    GenericMsi,
}

/// What a device was given of one kind.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Resource {
    /// I/O ports.
    PioAddressRange {
        /// The first.
        base: u16,
        /// How many.
        size: u16,
    },
    /// Memory-mapped I/O.
    MmioAddressRange {
        /// The first address.
        base: u64,
        /// Number of bytes.
        size: u64,
    },
    /// An interrupt line.
    LegacyIrq(u32),
    /// Numbers for messages.
    MsiIrq {
        /// What for.
        ty: MsiIrqType,
        /// The first.
        base: u32,
        /// How many.
        size: u32,
    },
    /// The address of a network card, as `52:54:00:12:34:56`. (The spelling of the name is rust-vmm's.)
    MacAddresss(String),
    /// One slot of KVM for memory.
    KvmMemSlot(u32),
}

/// All that one device was given, in the order of its constraints.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceResources(Vec<Resource>);

impl DeviceResources {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds one more.
    pub fn append(&mut self, entry: Resource) {
        self.0.push(entry);
    }

    fn all<T>(&self, pick: impl Fn(&Resource) -> Option<T>) -> Vec<T> {
        self.0.iter().filter_map(pick).collect()
    }

    /// First port and number of ports of each range.
    pub fn get_pio_address_ranges(&self) -> Vec<(u16, u16)> {
        self.all(|entry| match *entry {
            Resource::PioAddressRange { base, size } => Some((base, size)),
            _ => None,
        })
    }

    /// First address and bytes of each range.
    pub fn get_mmio_address_ranges(&self) -> Vec<(u64, u64)> {
        self.all(|entry| match *entry {
            Resource::MmioAddressRange { base, size } => Some((base, size)),
            _ => None,
        })
    }

    /// The first interrupt line.
    pub fn get_legacy_irq(&self) -> Option<u32> {
        self.0.iter().find_map(|entry| match *entry {
            Resource::LegacyIrq(irq) => Some(irq),
            _ => None,
        })
    }

    /// First number and count of the first messages for MSI.
    pub fn get_pci_msi_irqs(&self) -> Option<(u32, u32)> {
        self.messages(MsiIrqType::PciMsi)
    }

    /// First number and count of the first messages for MSI-X.
    pub fn get_pci_msix_irqs(&self) -> Option<(u32, u32)> {
        self.messages(MsiIrqType::PciMsix)
    }

    /// First number and count of the first messages that do not come from PCI.
    pub fn get_generic_msi_irqs(&self) -> Option<(u32, u32)> {
        self.messages(MsiIrqType::GenericMsi)
    }

    fn messages(&self, wanted: MsiIrqType) -> Option<(u32, u32)> {
        self.0.iter().find_map(|entry| match *entry {
            Resource::MsiIrq { ty, base, size } if ty == wanted => Some((base, size)),
            _ => None,
        })
    }

    /// All slots of KVM.
    pub fn get_kvm_mem_slots(&self) -> Vec<u32> {
        self.all(|entry| match *entry {
            Resource::KvmMemSlot(slot) => Some(slot),
            _ => None,
        })
    }

    /// The first address of a network card.
    pub fn get_mac_address(&self) -> Option<String> {
        self.0.iter().find_map(|entry| match entry {
            Resource::MacAddresss(address) => Some(address.clone()),
            _ => None,
        })
    }

    /// All, in order.
    pub fn get_all_resources(&self) -> &[Resource] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_found_and_of_several_the_first_or_all() {
        let mut given = DeviceResources::new();
        assert_eq!((given.get_legacy_irq(), given.get_mac_address()), (None, None));
        for at in [1_u16, 2] {
            let number = u32::from(at);
            given.append(Resource::PioAddressRange { base: at, size: 8 });
            given.append(Resource::MmioAddressRange { base: u64::from(at) << 12, size: 0x1000 });
            given.append(Resource::LegacyIrq(number));
            given.append(Resource::MsiIrq { ty: MsiIrqType::GenericMsi, base: number, size: 10 });
            given.append(Resource::MsiIrq { ty: MsiIrqType::PciMsi, base: number, size: 20 });
            given.append(Resource::MsiIrq { ty: MsiIrqType::PciMsix, base: number, size: 30 });
            given.append(Resource::MacAddresss(format!("02:00:00:00:00:0{at}")));
            given.append(Resource::KvmMemSlot(number));
        }
        assert_eq!(given.get_pio_address_ranges(), [(1, 8), (2, 8)]);
        assert_eq!(given.get_mmio_address_ranges(), [(0x1000, 0x1000), (0x2000, 0x1000)]);
        assert_eq!(given.get_legacy_irq(), Some(1));
        assert_eq!(given.get_generic_msi_irqs(), Some((1, 10)));
        assert_eq!(given.get_pci_msi_irqs(), Some((1, 20)));
        assert_eq!(given.get_pci_msix_irqs(), Some((1, 30)));
        assert_eq!(given.get_mac_address().as_deref(), Some("02:00:00:00:00:01"));
        assert_eq!(given.get_kvm_mem_slots(), [1, 2]);
        assert_eq!(given.get_all_resources().len(), 16);
    }

    #[test]
    fn the_short_forms_have_the_defaults_that_users_know() {
        assert_eq!(
            ResourceConstraint::new_pio(2),
            ResourceConstraint::PioAddress { range: None, align: 1, size: 2 }
        );
        assert_eq!(
            ResourceConstraint::new_mmio(2),
            ResourceConstraint::MmioAddress { range: None, align: 0x1000, size: 2 }
        );
        assert_eq!(
            ResourceConstraint::new_kvm_mem_slot(3, Some(9)),
            ResourceConstraint::KvmMemSlot { slot: Some(9), size: 3 }
        );
    }
}
