//! Protocol features (section "Protocol features") and the bits of `GET_FEATURES` that are the protocol's own.

use bitflags::bitflags;

/// `VHOST_USER_F_PROTOCOL_FEATURES`, bit 30 of the features: protocol features can be negotiated (section
/// "Communication"). Whether it is acknowledged decides whether rings begin disabled (section "Ring states").
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;

/// `VHOST_F_LOG_ALL`, bit 26 of the features: writes to memory are logged (section "Migration").
pub const F_LOG_ALL: u64 = 1 << 26;

bitflags! {
    /// `VHOST_USER_PROTOCOL_F_*` (section "Protocol features"). Bits that the document does not name are kept.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct ProtocolFeatures: u64 {
        /// `GET_QUEUE_NUM` (section "Multiple queue support").
        const MQ = 1 << 0;
        /// The dirty log is shared memory (section "Migration").
        const LOG_SHMFD = 1 << 1;
        /// `SEND_RARP`.
        const RARP = 1 << 2;
        /// Acknowledgements (section "VHOST_USER_PROTOCOL_F_REPLY_ACK").
        const REPLY_ACK = 1 << 3;
        /// `NET_SET_MTU`.
        const MTU = 1 << 4;
        /// `SET_BACKEND_REQ_FD` (section "Back-end communication").
        const BACKEND_REQ = 1 << 5;
        /// `SET_VRING_ENDIAN`.
        const CROSS_ENDIAN = 1 << 6;
        /// `CREATE_CRYPTO_SESSION` and `CLOSE_CRYPTO_SESSION`.
        const CRYPTO_SESSION = 1 << 7;
        /// `POSTCOPY_*` (section "Migration").
        const PAGEFAULT = 1 << 8;
        /// `GET_CONFIG`, `SET_CONFIG` and `BACKEND_CONFIG_CHANGE_MSG`.
        const CONFIG = 1 << 9;
        /// The back-end may send descriptors (section "Back-end communication").
        const BACKEND_SEND_FD = 1 << 10;
        /// `BACKEND_VRING_HOST_NOTIFIER_MSG`.
        const HOST_NOTIFIER = 1 << 11;
        /// `GET_INFLIGHT_FD` and `SET_INFLIGHT_FD` (section "Inflight I/O tracking").
        const INFLIGHT_SHMFD = 1 << 12;
        /// `RESET_DEVICE`.
        const RESET_DEVICE = 1 << 13;
        /// Kicks, calls and errors as messages (section "In-band notifications").
        const INBAND_NOTIFICATIONS = 1 << 14;
        /// `GET_MAX_MEM_SLOTS`, `ADD_MEM_REG` and `REM_MEM_REG` (section "Memory access").
        const CONFIGURE_MEM_SLOTS = 1 << 15;
        /// `SET_STATUS` and `GET_STATUS`.
        const STATUS = 1 << 16;
        /// Memory regions with Xen's fields (section "Memory region description").
        const XEN_MMAP = 1 << 17;
        /// `GET_SHARED_OBJECT` and `BACKEND_SHARED_OBJECT_*`.
        const SHARED_OBJECT = 1 << 18;
        /// `SET_DEVICE_STATE_FD` and `CHECK_DEVICE_STATE` (section "Migrating back-end state").
        const DEVICE_STATE = 1 << 19;
        /// `GET_VRING_BASE` may leave requests in flight.
        const GET_VRING_BASE_INFLIGHT = 1 << 20;
        /// Guest physical instead of user addresses (section "A vring address description").
        const GPA_ADDRESSES = 1 << 21;
        /// `GET_SHMEM_CONFIG` and `BACKEND_SHMEM_*`; the document also writes `SHMEM`.
        const SHMEM_MAP = 1 << 22;

        const _ = !0;
    }
}

impl ProtocolFeatures {
    /// What each feature cannot be negotiated without.
    const NEEDS: [(Self, Self); 2] = [
        // Section "In-band notifications": it is an error to negotiate it without the other two, and closing the
        // connection is the answer.
        (Self::INBAND_NOTIFICATIONS, Self::BACKEND_REQ.union(Self::REPLY_ACK)),
        // `VHOST_USER_GET_VRING_BASE`: must only be negotiated together.
        (Self::GET_VRING_BASE_INFLIGHT, Self::INFLIGHT_SHMFD),
    ];

    /// The first feature of this set that lacks what it depends on, and what it lacks.
    pub fn unmet(self) -> Option<(Self, Self)> {
        Self::NEEDS
            .into_iter()
            .map(|(feature, needs)| (feature, needs.difference(self)))
            .find(|(feature, lacking)| self.contains(*feature) && !lacking.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Contract: bit 14 needs 5 and 3, bit 20 needs 12.
    #[test]
    fn dependent_features_are_found_when_their_base_is_missing() {
        let inband = ProtocolFeatures::INBAND_NOTIFICATIONS;
        assert_eq!(
            (inband | ProtocolFeatures::REPLY_ACK).unmet(),
            Some((inband, ProtocolFeatures::BACKEND_REQ))
        );
        assert_eq!((inband | ProtocolFeatures::REPLY_ACK | ProtocolFeatures::BACKEND_REQ).unmet(), None);
        let base = ProtocolFeatures::GET_VRING_BASE_INFLIGHT;
        assert_eq!(base.unmet(), Some((base, ProtocolFeatures::INFLIGHT_SHMFD)));
        assert_eq!((base | ProtocolFeatures::INFLIGHT_SHMFD).unmet(), None);
        assert_eq!(ProtocolFeatures::empty().unmet(), None);
    }

    #[test]
    fn bits_have_the_numbers_of_the_document() {
        let names: Vec<_> =
            ProtocolFeatures::all().iter_names().map(|(name, bit)| (bit.bits(), name)).collect();
        let document = [
            "MQ",
            "LOG_SHMFD",
            "RARP",
            "REPLY_ACK",
            "MTU",
            "BACKEND_REQ",
            "CROSS_ENDIAN",
            "CRYPTO_SESSION",
            "PAGEFAULT",
            "CONFIG",
            "BACKEND_SEND_FD",
            "HOST_NOTIFIER",
            "INFLIGHT_SHMFD",
            "RESET_DEVICE",
            "INBAND_NOTIFICATIONS",
            "CONFIGURE_MEM_SLOTS",
            "STATUS",
            "XEN_MMAP",
            "SHARED_OBJECT",
            "DEVICE_STATE",
            "GET_VRING_BASE_INFLIGHT",
            "GPA_ADDRESSES",
            "SHMEM_MAP",
        ];
        let expected: Vec<_> =
            document.into_iter().enumerate().map(|(bit, name)| (1_u64 << bit, name)).collect();
        assert_eq!(names, expected);
    }
}
