//! What a VMM decides about a proxied device.
use std::time::Duration;

use reactor::BlockingPool;
use vm_virtio::DeviceType;

use crate::ProxyError;

/// Most queues: messages name them with eight bits (vhost-user, `VHOST_USER_SET_VRING_KICK`).
pub const MAX_QUEUES: u16 = 256;

/// Longest time that an option can be.
const LONGEST: Duration = Duration::from_secs(86_400);

/// Largest configuration space that one message carries.
const MAX_CONFIG: u32 = 4084;

/// Where the configuration space comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConfigSource {
    /// The back-end: these many bytes of it, the first size that it answers for. There is no message that asks for the
    /// size, and some back-ends refuse to read beyond their end. If it has no `VHOST_USER_PROTOCOL_F_CONFIG`, there is no
    /// configuration space.
    Backend(Vec<u32>),
    /// The VMM, for back-ends that leave it to the front-end (a file system's tag, for one). The driver cannot write it.
    Fixed(Vec<u8>),
}

/// What a VMM decides about a proxied device.
#[derive(Clone, Debug)]
pub struct ProxyOptions {
    /// The device type, which the protocol does not tell.
    pub device_type: DeviceType,
    /// How many queues; none: as many as the back-end says, or one if it says nothing.
    pub queues: Option<u16>,
    /// Entries that a queue may have at most: a power of two up to 32768. The protocol does not tell it either; QEMU's
    /// library for back-ends has a limit of 1024. 256 if not said otherwise.
    pub queue_size: u16,
    /// Where the configuration space comes from.
    pub config: ConfigSource,
    /// The back-end keeps nothing that has to move with the guest: the device may be saved and restored although the
    /// back-end cannot transfer its state (`VHOST_USER_PROTOCOL_F_DEVICE_STATE`).
    pub stateless: bool,
    /// How long one exchange of messages may take, however many messages it has; stopping a ring, which finishes its
    /// requests, included. Then the connection ends. 4 seconds if not said otherwise; at most a day.
    pub patience: Duration,
    /// How long a driver that is live has to wait for a back-end that is gone, before its device needs a reset. 30 seconds if not
    /// said otherwise; at most a day.
    pub give_up: Duration,
    /// Where messages are exchanged. None: a thread of this device's own, which begins with the first exchange. One pool can
    /// serve all devices of a VMM; a back-end that does not answer holds a thread for `patience`.
    pub pool: Option<BlockingPool>,
}

impl ProxyOptions {
    /// The defaults for a device of this type.
    pub fn new(device_type: DeviceType) -> ProxyOptions {
        ProxyOptions {
            device_type,
            queues: None,
            queue_size: 256,
            config: ConfigSource::Backend(config_sizes(device_type).to_vec()),
            stateless: false,
            patience: Duration::from_secs(4),
            give_up: Duration::from_secs(30),
            pool: None,
        }
    }

    pub(crate) fn check(&self) -> Result<(), ProxyError> {
        if !self.queue_size.is_power_of_two() || self.queue_size > 32768 {
            return Err(ProxyError::Options("this queue size"));
        }
        if self.queues.is_some_and(|queues| queues == 0 || queues > MAX_QUEUES) {
            return Err(ProxyError::Options("this number of queues"));
        }
        // Longer than the clock goes on is no time either.
        if self.patience.is_zero() || self.patience.max(self.give_up) > LONGEST {
            return Err(ProxyError::Options("no patience, or a time of more than a day"));
        }
        let large = match &self.config {
            ConfigSource::Backend(sizes) => sizes.iter().any(|size| *size > MAX_CONFIG),
            ConfigSource::Fixed(bytes) => bytes.len() > MAX_CONFIG as usize,
        };
        if large { Err(ProxyError::Options("a configuration space of more than 4084 bytes")) } else { Ok(()) }
    }
}

/// Sizes of configuration spaces in bytes (virtio 1.4, section 5), the newest layout first.
fn config_sizes(device_type: DeviceType) -> &'static [u32] {
    match device_type.0 {
        1 => &[24, 12, 10],     // net
        2 => &[96, 72, 60, 36], // block
        3 => &[12],             // console
        5 => &[16, 8],          // memory balloon
        8 => &[36],             // SCSI host
        16 => &[16],            // GPU
        18 => &[136],           // input
        19 => &[8],             // socket
        20 => &[56],            // crypto
        25 => &[16, 12],        // sound
        26 => &[44, 40],        // file system
        27 => &[8],             // persistent memory
        41 => &[8],             // GPIO
        _ => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_options_are_refused() {
        let good = ProxyOptions::new(DeviceType::BLOCK);
        assert!(good.check().is_ok());
        for bad in [
            ProxyOptions { queue_size: 0, ..good.clone() },
            ProxyOptions { queue_size: 3, ..good.clone() },
            ProxyOptions { queues: Some(0), ..good.clone() },
            ProxyOptions { queues: Some(257), ..good.clone() },
            ProxyOptions { patience: Duration::ZERO, ..good.clone() },
            ProxyOptions { give_up: Duration::MAX, ..good.clone() },
            ProxyOptions { config: ConfigSource::Backend(vec![4085]), ..good.clone() },
            ProxyOptions { config: ConfigSource::Fixed(vec![0; 4085]), ..good.clone() },
        ] {
            assert!(matches!(bad.check(), Err(ProxyError::Options(_))), "{bad:?}");
        }
    }
}
