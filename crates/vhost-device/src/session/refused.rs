//! Why a message is refused.
use std::io;

use vhost_user::{FrontendCode, ProtocolFeatures};
use vm_virtio::{ConfigError, FeatureError, HostError};

use crate::inflight::InflightFault;
use crate::mapping::MapError;
use crate::memory::MemoryError;
use crate::ring::RingError;
use crate::session::transfer::TransferError;

const BACKEND_REQ: ProtocolFeatures = ProtocolFeatures::BACKEND_REQ;

/// A message that is understood and cannot be carried out.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refused {
    /// Features that were not offered, or cannot change now.
    #[error(transparent)]
    Features(#[from] FeatureError),
    /// The same in the bits that vhost-user uses for itself.
    #[error("protocol features {0:?} were not offered")]
    NotOffered(ProtocolFeatures),
    /// Features that need others.
    #[error("protocol feature {0:?} needs {1:?}")]
    Unmet(ProtocolFeatures, ProtocolFeatures),
    /// No such ring.
    #[error("there is no ring {0}")]
    NoSuchRing(u32),
    /// Only a stopped ring can be changed in this way.
    #[error("ring {0} is started")]
    Started(u32),
    /// No size of a ring.
    #[error("ring {index} cannot have {num} entries: {why}")]
    Size { index: u32, num: u32, why: &'static str },
    /// No position in a ring.
    #[error("ring {index} cannot go on at {base:#x}")]
    Base { index: u32, base: u32 },
    /// The ring does not run.
    #[error("ring {index} does not run: {source}")]
    Ring { index: u32, source: RingError },
    /// The memory table is not acceptable.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A file that is no log.
    #[error("no log of dirty pages: {0}")]
    Log(MapError),
    /// Nobody could translate.
    #[error("VIRTIO_F_ACCESS_PLATFORM needs {BACKEND_REQ:?}")]
    NoTranslations,
    /// The in-flight buffer is not acceptable.
    #[error(transparent)]
    Inflight(#[from] InflightFault),
    /// Outside of the configuration space.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Flags that no one defined.
    #[error("flags {0:#x} of a write to the configuration space are not defined")]
    ConfigFlags(u32),
    /// A descriptor that cannot serve.
    #[error("the descriptor cannot be used: {0}")]
    Descriptor(#[from] io::Error),
    /// Not the socket that it should be.
    #[error(transparent)]
    Channel(#[from] vhost_user::Error),
    /// The device's state does not come or go.
    #[error(transparent)]
    Transfer(#[from] TransferError),
    /// The device does not do it.
    #[error("the device refuses: {0}")]
    Device(#[from] HostError),
    /// The device answered something else.
    #[error("the device's answer is of another kind")]
    WrongReply,
    /// Known, but not served.
    #[error("{0:?} is not served")]
    Unsupported(FrontendCode),
}

impl Refused {
    /// Whether the connection has to be closed, heard or not ("In-band notifications": there is no other way of
    /// signalling this error).
    pub(crate) fn ends_connection(&self) -> bool {
        matches!(self, Refused::Unmet(ProtocolFeatures::INBAND_NOTIFICATIONS, _))
    }

    /// Whether a front-end that does not hear of it would go on with features or memory that the back-end does not
    /// have. Everything else shows by itself: a ring that does not run, and its error file.
    pub(crate) fn desyncs(&self) -> bool {
        use Refused as R;
        matches!(
            self,
            R::Features(_)
                | R::NotOffered(_)
                | R::Unmet(..)
                | R::Memory(_)
                | R::NoTranslations
                | R::Inflight(_)
        )
    }
}
