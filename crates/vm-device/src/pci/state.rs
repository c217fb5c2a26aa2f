//! Save and restore of a root complex: configuration space and interrupts of all functions, and the address register.
//!
//! A saved state is hostile input: it is taken over only if all of it fits the functions that are there. Read-only bits that
//! are not this function's, another set of functions, reserved bits in an MSI-X table: each is refused, and nothing is changed.
//! BARs may be anywhere, as a guest may put them anywhere.
use device_state::{Section, StateError};
use serde::{Deserialize, Serialize};
use std::sync::atomic::Ordering;

use super::RootComplex;
use super::function::SavedFunction;
use super::tree::Path;

/// The newest version of the layout.
const VERSION: u16 = 1;

#[derive(Serialize, Deserialize)]
struct Saved {
    address: u32,
    functions: Vec<(Path, SavedFunction)>,
}

impl RootComplex {
    /// Saves what the guest has written, and what it has yet to see. Devices save for themselves. While vCPUs write, each
    /// function is saved as it is at one moment, but not all at the same.
    ///
    /// # Errors
    /// The state could not be encoded.
    pub fn save(&self) -> Result<Section, StateError> {
        let functions = self.by_place().into_iter().map(|(path, function)| (path, function.save()));
        let saved =
            Saved { address: self.inner.address.load(Ordering::Relaxed), functions: functions.collect() };
        Section::encode(VERSION, &saved)
    }

    /// Takes over a saved state. The same functions have to be in the same places as when it was saved; cards that were
    /// plugged in meanwhile are [added](Self::add) first. When this returns BARs are where they were.
    ///
    /// # Errors
    /// It does not fit, in which case nothing is changed.
    pub fn restore(&self, state: &Section) -> Result<(), StateError> {
        let saved: Saved = state.decode(VERSION)?;
        if saved.address & !super::access::ADDRESS_BITS != 0 {
            return Err(StateError::refused("reserved bits in the PCI address register"));
        }
        let here = self.by_place();
        if here.len() != saved.functions.len() {
            return Err(StateError::refused(format!(
                "{} PCI functions in the state, {} in this machine",
                saved.functions.len(),
                here.len()
            )));
        }
        // Both are in the order of a walk.
        for ((path, function), (saved_path, saved)) in here.iter().zip(&saved.functions) {
            if path != saved_path {
                return Err(StateError::refused(format!(
                    "a PCI function at {saved_path:02x?} in the state, at {path:02x?} in this machine"
                )));
            }
            function.check(saved).map_err(|error| match error {
                StateError::Refused(why) => StateError::refused(format!("{}: {why}", function.name())),
                other => other,
            })?;
        }
        for ((_, function), (_, saved)) in here.iter().zip(&saved.functions) {
            function.restore(saved);
        }
        self.inner.address.store(saved.address, Ordering::Relaxed);
        self.settle();
        Ok(())
    }
}
