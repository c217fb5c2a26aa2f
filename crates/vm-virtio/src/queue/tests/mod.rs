//! Tests of the rings against the contract, with a driver written for it: field by field, so that it can break rules.
//! Names carry the section of the specification, or the row of the field's known defects.
mod chains;
mod driver;
mod hostile;
mod inflight;
mod iommu;
mod log;
mod malformed;
mod model;
mod packed;
mod split;
mod state;

use driver::{Driver, Elem, r, w};

use super::*;
use crate::memory::GuestAddress;

/// Both layouts, for what is the same on both.
const LAYOUTS: [bool; 2] = [false, true];

/// A driver of the layout, with indirect descriptors and event index if `features` say so.
fn driver(packed: bool, size: u16, features: Features) -> Driver {
    let layout = if packed { Features::RING_PACKED } else { Features::empty() };
    Driver::new(size, features | layout | Features::VERSION_1)
}
