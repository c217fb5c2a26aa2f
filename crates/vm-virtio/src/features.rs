//! Feature bits (virtio 1.4, sections 2.2 and 6) and device types (section 5).
//!
//! A device names its own bits only; the bits of rings and negotiation are the host's to offer: [`Features::RING`].
use std::fmt;

bitflags::bitflags! {
    /// A set of virtio feature bits, 128 wide. Bits that no constant names are the device's own.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Features: u128 {
        /// Legacy only (section 6.3): never offered.
        const NOTIFY_ON_EMPTY = 1 << 24;
        /// Legacy only (section 6.3): never offered.
        const ANY_LAYOUT = 1 << 27;
        /// `VIRTIO_F_INDIRECT_DESC`: a descriptor may refer to a table of descriptors (2.7.5.3, 2.8.7).
        const INDIRECT_DESC = 1 << 28;
        /// `VIRTIO_F_EVENT_IDX`: notifications are suppressed by index (2.7.7, 2.7.10, 2.8.10).
        const EVENT_IDX = 1 << 29;
        /// Unused by virtio; over vhost-user it is `VHOST_USER_F_PROTOCOL_FEATURES` and never reaches a driver.
        const BIT_30 = 1 << 30;
        /// `VIRTIO_F_VERSION_1`: must be offered (6.2).
        const VERSION_1 = 1 << 32;
        /// `VIRTIO_F_ACCESS_PLATFORM`: addresses go through the platform, e.g. an IOMMU.
        const ACCESS_PLATFORM = 1 << 33;
        /// `VIRTIO_F_RING_PACKED`: packed virtqueues (2.8).
        const RING_PACKED = 1 << 34;
        /// `VIRTIO_F_IN_ORDER`: buffers are used in the order in which they were made available (2.7.9, 2.8.8).
        const IN_ORDER = 1 << 35;
        /// `VIRTIO_F_ORDER_PLATFORM`: barriers as the platform needs them.
        const ORDER_PLATFORM = 1 << 36;
        /// `VIRTIO_F_SR_IOV`: PCI only.
        const SR_IOV = 1 << 37;
        /// `VIRTIO_F_NOTIFICATION_DATA`: kicks carry the driver's position.
        const NOTIFICATION_DATA = 1 << 38;
        /// `VIRTIO_F_NOTIF_CONFIG_DATA`: PCI only.
        const NOTIF_CONFIG_DATA = 1 << 39;
        /// `VIRTIO_F_RING_RESET`: one queue can be reset by itself (2.6.1).
        const RING_RESET = 1 << 40;
        /// `VIRTIO_F_ADMIN_VQ`: PCI only.
        const ADMIN_VQ = 1 << 41;
        /// `VIRTIO_F_SUSPEND`: the driver can suspend the device (3.4).
        const SUSPEND = 1 << 43;
        // Everything else belongs to the device.
        const _ = !0;
    }
}

/// The features that have a name here, in the order of their bits: what `--without` accepts.
const NAMES: &[(&str, Features)] = &[
    ("indirect_desc", Features::INDIRECT_DESC),
    ("event_idx", Features::EVENT_IDX),
    ("version_1", Features::VERSION_1),
    ("access_platform", Features::ACCESS_PLATFORM),
    ("ring_packed", Features::RING_PACKED),
    ("in_order", Features::IN_ORDER),
    ("order_platform", Features::ORDER_PLATFORM),
    ("notification_data", Features::NOTIFICATION_DATA),
    ("ring_reset", Features::RING_RESET),
    ("suspend", Features::SUSPEND),
];

impl Features {
    /// What the core implements for every device, whatever its type.
    pub const RING: Features = Features::INDIRECT_DESC
        .union(Features::EVENT_IDX)
        .union(Features::VERSION_1)
        .union(Features::RING_PACKED)
        .union(Features::IN_ORDER);

    /// What the core implements but a driver can use only through a host that carries it: notifications with data, the
    /// reset of a single queue, the SUSPEND bit of the status, translations of an IOMMU; over PCI, notifications with a
    /// value of the device's own.
    pub const CARRIED: Features = Features::NOTIFICATION_DATA
        .union(Features::NOTIF_CONFIG_DATA)
        .union(Features::RING_RESET)
        .union(Features::SUSPEND)
        .union(Features::ACCESS_PLATFORM);

    /// Bits that a device must leave to its host: legacy, queue and negotiation bits, and the reserved ones
    /// (section 2.2: 24 to 40, 43 to 49, 128 and above).
    pub const NOT_A_DEVICES: Features =
        Features::from_bits_retain((((1 << 17) - 1) << 24) | (((1 << 7) - 1) << 43));

    /// The feature of that name: the specification's, in lower case without its prefix, e.g. `ring_packed`.
    pub fn by_name(name: &str) -> Option<Features> {
        NAMES.iter().find(|(known, _)| *known == name).map(|(_, bit)| *bit)
    }

    /// Names of the features of this set that have one, in the order of their bits.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        NAMES.iter().filter(move |(_, bit)| self.contains(*bit)).map(|(name, _)| *name)
    }

    /// The low 64 bits, as vhost-user and the first two feature words of the transports carry them.
    pub fn low64(self) -> u64 {
        (self.bits() & u128::from(u64::MAX)) as u64
    }
}

impl From<u64> for Features {
    fn from(bits: u64) -> Self {
        Features::from_bits_retain(u128::from(bits))
    }
}

/// Virtio device type, the "device ID" of section 5.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DeviceType(pub u32);

impl DeviceType {
    /// Network card (5.1).
    pub const NET: DeviceType = DeviceType(1);
    /// Block device (5.2).
    pub const BLOCK: DeviceType = DeviceType(2);
    /// Console (5.3).
    pub const CONSOLE: DeviceType = DeviceType(3);
    /// Entropy source (5.4).
    pub const ENTROPY: DeviceType = DeviceType(4);
}

impl fmt::Display for DeviceType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            DeviceType::NET => f.write_str("net"),
            DeviceType::BLOCK => f.write_str("block"),
            DeviceType::CONSOLE => f.write_str("console"),
            DeviceType::ENTROPY => f.write_str("entropy"),
            DeviceType(other) => write!(f, "type {other}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_standard() {
        for (name, bit) in NAMES {
            assert_eq!(Features::by_name(name), Some(*bit));
            assert_eq!(bit.bits().count_ones(), 1);
        }
        assert_eq!(Features::by_name("EVENT_IDX"), None);
        let names: Vec<_> = Features::RING.names().collect();
        assert_eq!(names, ["indirect_desc", "event_idx", "version_1", "ring_packed", "in_order"]);
    }

    #[test]
    fn reserved_bits_are_not_the_devices() {
        for bit in (24..=40).chain(43..=49) {
            assert!(Features::NOT_A_DEVICES.bits() & (1 << bit) != 0, "bit {bit}");
        }
        for bit in [0, 23, 41, 42, 50, 127] {
            assert!(Features::NOT_A_DEVICES.bits() & (1 << bit) == 0, "bit {bit}");
        }
    }

    #[test]
    fn what_this_version_does_not_implement_is_not_in_the_ring_set() {
        let named: Features = NAMES.iter().map(|(_, bit)| *bit).fold(Features::empty(), |a, b| a | b);
        assert_eq!(named - Features::RING - Features::CARRIED, Features::ORDER_PLATFORM);
    }
}
