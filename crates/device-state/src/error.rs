//! Why a state cannot be saved or restored.
use crate::{MAX_STATE, Tag};

/// A state that cannot be saved or restored.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// The device cannot be saved.
    #[error("this device cannot be saved")]
    Unsupported,
    /// Something else altogether.
    #[error("this is no saved device state")]
    Magic,
    /// A layout that a later version made.
    #[error("the state has layout version {0}, this program knows {known}", known = crate::state::VERSION)]
    Version(u16),
    /// Bits that a later version gave a meaning.
    #[error("the state has unknown flags {0:#x}")]
    Flags(u16),
    /// It ends too early.
    #[error("the state is cut off")]
    Truncated,
    /// It goes on behind its end.
    #[error("the state is followed by something else")]
    Trailing,
    /// It is larger than any state is.
    #[error("the state has {0} bytes, more than {MAX_STATE}")]
    TooLarge(u64),
    /// It is damaged.
    #[error("the state is damaged: its checksum is wrong")]
    Checksum,
    /// A section that this version does not know.
    #[error("the state has a section {0} that this program does not know")]
    UnknownSection(Tag),
    /// A section that has to be there is not.
    #[error("the state has no section {0}")]
    MissingSection(Tag),
    /// A section is there twice.
    #[error("the state has section {0} twice")]
    DuplicateSection(Tag),
    /// A section that a later version made.
    #[error("a section has version {found}, this program knows {known}")]
    SectionVersion {
        /// Its version.
        found: u16,
        /// The newest that is known.
        known: u16,
    },
    /// A section's data is no such thing.
    #[error("a section cannot be decoded")]
    Malformed,
    /// A value cannot be encoded.
    #[error("a section cannot be encoded")]
    Encode,
    /// It is well-formed, but not for this device.
    #[error("{0}")]
    Refused(String),
}

impl StateError {
    /// A state that does not fit a device, and why.
    pub fn refused(why: impl Into<String>) -> StateError {
        StateError::Refused(why.into())
    }
}
