//! The saved state of a device: a header, then a section for each part, each with a version of its own.
//!
//! ```text
//!  0  magic      "BKPLSTAT"
//!  8  version    u16   of this layout
//! 10  flags      u16   0
//! 12  device     u32   virtio device type
//! 16  length     u64   of all that follows the header
//! 24  checksum   u32   CRC-32 (IEEE) of the 24 bytes before it and of all that follows
//! 28  sections   tag [u8; 4], version u16, flags u16 (0), length u32, data
//! ```
//!
//! All numbers are little-endian; data is [postcard](https://postcard.jamesmunns.com/wire-format), which is compact and
//! specified. What is read comes from outside (a file, a migration stream), so:
//!
//! * Every length is checked against what is there and against [`MAX_STATE`] before anything is allocated; a section's
//!   data never makes more than a constant multiple of its own size.
//! * A newer layout or section, an unknown section, a damaged byte, anything too short or too long is a [`StateError`] of
//!   its own, never a guess. The checksum finds damage, not malice.
//! * The layout cannot change unnoticed: a test holds its bytes.
mod error;
mod section;
mod state;

pub use error::StateError;
pub use section::{Section, Tag};
pub use state::{HEADER, Header, MAX_STATE, SavedState};
