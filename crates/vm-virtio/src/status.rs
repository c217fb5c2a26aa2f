//! The device status field (virtio 1.4, section 2.1).
use std::fmt;

bitflags::bitflags! {
    /// Device status, as the driver writes it and the device completes it.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Status: u8 {
        /// The guest noticed the device.
        const ACKNOWLEDGE = 1;
        /// The guest has a driver for it.
        const DRIVER = 2;
        /// The driver is ready: the device is live.
        const DRIVER_OK = 4;
        /// Negotiation is complete and the device accepted the result.
        const FEATURES_OK = 8;
        /// The driver suspended the device (3.4; only with `SUSPEND`).
        const SUSPEND = 16;
        /// The device gave up and wants to be reset.
        const DEVICE_NEEDS_RESET = 64;
        /// The driver gave up.
        const FAILED = 128;
        // Bit 32 is reserved: kept as the driver wrote it.
        const _ = !0;
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() { f.write_str("reset") } else { bitflags::parser::to_writer(self, f) }
    }
}
