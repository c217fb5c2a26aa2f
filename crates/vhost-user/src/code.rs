//! The codes of all requests of the document (sections "Front-end message types" and "Back-end message types").

use std::fmt;

macro_rules! codes {
    ($(#[$meta:meta])* $name:ident, $prefix:literal: $($variant:ident = $number:literal $text:literal,)*) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u32)]
        pub enum $name {
            $(
                #[doc = concat!("`", $prefix, $text, "`, id ", stringify!($number))]
                $variant = $number,
            )*
        }

        impl $name {
            /// Every code, in ascending order.
            pub const ALL: &'static [$name] = &[$($name::$variant),*];

            /// The request with this code, if the document has one.
            pub const fn from_code(code: u32) -> Option<$name> {
                match code {
                    $($number => Some($name::$variant),)*
                    _ => None,
                }
            }

            /// The number in the header.
            pub const fn code(self) -> u32 {
                self as u32
            }

            /// The document's name.
            pub const fn name(self) -> &'static str {
                match self {
                    $($name::$variant => concat!($prefix, $text),)*
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.name())
            }
        }
    };
}

codes! {
    /// Requests of the front-end (section "Front-end message types").
    FrontendCode, "VHOST_USER_":
    GetFeatures = 1 "GET_FEATURES",
    SetFeatures = 2 "SET_FEATURES",
    SetOwner = 3 "SET_OWNER",
    ResetOwner = 4 "RESET_OWNER",
    SetMemTable = 5 "SET_MEM_TABLE",
    SetLogBase = 6 "SET_LOG_BASE",
    SetLogFd = 7 "SET_LOG_FD",
    SetVringNum = 8 "SET_VRING_NUM",
    SetVringAddr = 9 "SET_VRING_ADDR",
    SetVringBase = 10 "SET_VRING_BASE",
    GetVringBase = 11 "GET_VRING_BASE",
    SetVringKick = 12 "SET_VRING_KICK",
    SetVringCall = 13 "SET_VRING_CALL",
    SetVringErr = 14 "SET_VRING_ERR",
    GetProtocolFeatures = 15 "GET_PROTOCOL_FEATURES",
    SetProtocolFeatures = 16 "SET_PROTOCOL_FEATURES",
    GetQueueNum = 17 "GET_QUEUE_NUM",
    SetVringEnable = 18 "SET_VRING_ENABLE",
    SendRarp = 19 "SEND_RARP",
    NetSetMtu = 20 "NET_SET_MTU",
    SetBackendReqFd = 21 "SET_BACKEND_REQ_FD",
    IotlbMsg = 22 "IOTLB_MSG",
    SetVringEndian = 23 "SET_VRING_ENDIAN",
    GetConfig = 24 "GET_CONFIG",
    SetConfig = 25 "SET_CONFIG",
    CreateCryptoSession = 26 "CREATE_CRYPTO_SESSION",
    CloseCryptoSession = 27 "CLOSE_CRYPTO_SESSION",
    PostcopyAdvise = 28 "POSTCOPY_ADVISE",
    PostcopyListen = 29 "POSTCOPY_LISTEN",
    PostcopyEnd = 30 "POSTCOPY_END",
    GetInflightFd = 31 "GET_INFLIGHT_FD",
    SetInflightFd = 32 "SET_INFLIGHT_FD",
    GpuSetSocket = 33 "GPU_SET_SOCKET",
    ResetDevice = 34 "RESET_DEVICE",
    VringKick = 35 "VRING_KICK",
    GetMaxMemSlots = 36 "GET_MAX_MEM_SLOTS",
    AddMemReg = 37 "ADD_MEM_REG",
    RemMemReg = 38 "REM_MEM_REG",
    SetStatus = 39 "SET_STATUS",
    GetStatus = 40 "GET_STATUS",
    GetSharedObject = 41 "GET_SHARED_OBJECT",
    SetDeviceStateFd = 42 "SET_DEVICE_STATE_FD",
    CheckDeviceState = 43 "CHECK_DEVICE_STATE",
    GetShmemConfig = 44 "GET_SHMEM_CONFIG",
}

codes! {
    /// Requests of the back-end (section "Back-end message types").
    BackendCode, "VHOST_USER_BACKEND_":
    IotlbMsg = 1 "IOTLB_MSG",
    ConfigChangeMsg = 2 "CONFIG_CHANGE_MSG",
    VringHostNotifierMsg = 3 "VRING_HOST_NOTIFIER_MSG",
    VringCall = 4 "VRING_CALL",
    VringErr = 5 "VRING_ERR",
    SharedObjectAdd = 6 "SHARED_OBJECT_ADD",
    SharedObjectRemove = 7 "SHARED_OBJECT_REMOVE",
    SharedObjectLookup = 8 "SHARED_OBJECT_LOOKUP",
    ShmemMap = 9 "SHMEM_MAP",
    ShmemUnmap = 10 "SHMEM_UNMAP",
}

/// Stands for the name of a request that the document does not have.
pub(crate) const UNKNOWN: &str = "an unknown request";

/// The document's name of a front-end's request, for messages to people.
pub(crate) fn frontend_name(code: u32) -> &'static str {
    FrontendCode::from_code(code).map_or(UNKNOWN, FrontendCode::name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_the_documents_without_a_gap() {
        for (codes, count) in [
            (FrontendCode::ALL.iter().map(|code| code.code()).collect::<Vec<_>>(), 44),
            (BackendCode::ALL.iter().map(|code| code.code()).collect(), 10),
        ] {
            assert_eq!(codes, (1..=count).collect::<Vec<_>>());
        }
        assert_eq!(FrontendCode::from_code(0), None);
        assert_eq!(FrontendCode::from_code(45), None);
        assert_eq!(BackendCode::from_code(11), None);
        assert_eq!(FrontendCode::from_code(37), Some(FrontendCode::AddMemReg));
        assert_eq!(FrontendCode::AddMemReg.to_string(), "VHOST_USER_ADD_MEM_REG");
        assert_eq!(BackendCode::ConfigChangeMsg.to_string(), "VHOST_USER_BACKEND_CONFIG_CHANGE_MSG");
    }
}
