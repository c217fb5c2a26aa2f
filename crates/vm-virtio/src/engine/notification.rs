//! Driver notifications whose value the host sees (virtio 1.4, 2.9): registers of transports rather than files.
use super::Engine;
use crate::device::VirtioDevice;
use crate::{Features, RingPos};

/// What a driver wrote to notify a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Notification {
    /// The queue.
    pub queue: u16,
    /// With `NOTIFICATION_DATA`: where the driver will put its next buffer, as it says. A split ring has the low 15
    /// bits of the index and, as `wrap`, its highest.
    pub next: Option<RingPos>,
}

impl Notification {
    /// Takes a written value apart under the negotiated features. `None` if it names no queue that there can be.
    pub fn decode(value: u32, features: Features) -> Option<Notification> {
        if !features.contains(Features::NOTIFICATION_DATA) {
            return u16::try_from(value).ok().map(|queue| Notification { queue, next: None });
        }
        let (queue, data) = ((value & 0xffff) as u16, (value >> 16) as u16);
        Some(Notification { queue, next: Some(RingPos { index: data & 0x7fff, wrap: data & 0x8000 != 0 }) })
    }
}

impl<D: VirtioDevice> Engine<D> {
    /// The driver wrote `value` to notify a queue, for hosts whose notifications carry one. A value that names no queue
    /// is ignored. The position in it is a hint that the ring itself gives better; it is not relied on.
    pub fn notify(&self, value: u32) {
        if let Some(Notification { queue, .. }) = Notification::decode(value, self.driver_features()) {
            self.kick(queue);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn common_2_9_the_value_of_a_notification_is_the_queue_and_with_the_feature_also_the_position() {
        let plain = Features::VERSION_1;
        assert_eq!(Notification::decode(7, plain), Some(Notification { queue: 7, next: None }));
        assert_eq!(Notification::decode(0x1_0007, plain), None);
        let data = plain | Features::NOTIFICATION_DATA;
        let next = Some(RingPos { index: 0x1234, wrap: true });
        assert_eq!(Notification::decode(0x9234_0007, data), Some(Notification { queue: 7, next }));
        let next = Some(RingPos { index: 0, wrap: false });
        assert_eq!(
            Notification::decode(u32::from(u16::MAX), data),
            Some(Notification { queue: 0xffff, next })
        );
    }
}
