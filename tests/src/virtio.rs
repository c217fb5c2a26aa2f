//! What the guest says about its virtio devices, and names for feature bits.

/// A device as the guest's kernel sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// `virtio0`, ...
    pub name: String,
    /// The virtio device type.
    pub id: u32,
    /// The status register.
    pub status: u32,
    /// The bound driver, empty without one.
    pub driver: String,
    /// Negotiated features, bit n of the standard's numbering.
    pub features: u128,
}

/// Status with which a driver runs a device: ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK.
pub const RUNNING: u32 = 0xf;

/// The block device's type.
pub const BLOCK: u32 = 2;

/// The entropy device's type.
pub const RNG: u32 = 4;

/// Indirect descriptors.
pub const INDIRECT_DESC: u32 = 28;
/// Event index.
pub const EVENT_IDX: u32 = 29;
/// A device of version 1 and up.
pub const VERSION_1: u32 = 32;
/// Addresses go through the platform, e.g. an IOMMU.
pub const ACCESS_PLATFORM: u32 = 33;
/// Packed rings.
pub const RING_PACKED: u32 = 34;
/// Buffers come back in order.
pub const IN_ORDER: u32 = 35;

const NAMES: [(u32, &str); 15] = [
    (24, "NOTIFY_ON_EMPTY"),
    (27, "ANY_LAYOUT"),
    (INDIRECT_DESC, "INDIRECT_DESC"),
    (EVENT_IDX, "EVENT_IDX"),
    (VERSION_1, "VERSION_1"),
    (ACCESS_PLATFORM, "ACCESS_PLATFORM"),
    (RING_PACKED, "RING_PACKED"),
    (IN_ORDER, "IN_ORDER"),
    (36, "ORDER_PLATFORM"),
    (37, "SR_IOV"),
    (38, "NOTIFICATION_DATA"),
    (39, "NOTIF_CONFIG_DATA"),
    (40, "RING_RESET"),
    (41, "ADMIN_VQ"),
    (42, "DEVICE_CONTEXT"),
];

impl Device {
    /// Whether a feature was negotiated.
    #[must_use]
    pub fn has(&self, bit: u32) -> bool {
        self.features >> bit & 1 == 1
    }

    /// The negotiated features by name; the device type's own ones by number.
    #[must_use]
    pub fn feature_names(&self) -> Vec<String> {
        (0..128).filter(|bit| self.has(*bit)).map(feature_name).collect()
    }

    /// Reads one of the guest's `LAB-VIRTIO` lines.
    pub(crate) fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_whitespace();
        let name = words.next()?.to_owned();
        let mut field = |key: &str| words.next()?.strip_prefix(key)?.strip_prefix('=');
        let hex = |text: &str| u32::from_str_radix(text.trim_start_matches("0x"), 16).ok();
        let (id, status) = (hex(field("id")?)?, hex(field("status")?)?);
        let driver = field("driver")?.to_owned();
        let bits = field("features")?;
        let features =
            bits.bytes().enumerate().take(128).fold(0, |all, (n, bit)| all | u128::from(bit == b'1') << n);
        Some(Self { name, id, status, driver, features })
    }
}

/// A feature bit's name in the standard.
#[must_use]
pub fn feature_name(bit: u32) -> String {
    match NAMES.iter().find(|(known, _)| *known == bit) {
        Some((_, name)) => (*name).to_owned(),
        None => format!("bit {bit}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_about_a_device() {
        let line = format!(
            "virtio1 id=0x0004 status=0x0000000f driver=virtio_rng features={}11{}",
            "0".repeat(28),
            "001"
        );
        let device = Device::parse(&line).expect("well formed");
        assert_eq!((device.id, device.status, device.driver.as_str()), (RNG, RUNNING, "virtio_rng"));
        assert_eq!(device.feature_names(), ["INDIRECT_DESC", "EVENT_IDX", "VERSION_1"]);
        assert!(Device::parse("virtio1 id=0x4").is_none());
    }
}
