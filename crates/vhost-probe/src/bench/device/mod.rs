//! What a load needs to know of a type of device: one file each, and a line in [`DEVICES`].
mod blk;
mod console;
mod rng;

use std::any::Any;

use virtio_testkit::load::floor::Floor;
use virtio_testkit::load::{LoadError, Requests};

use super::{Arguments, Case};

pub(super) const DEVICES: [&dyn Device; 3] = [&rng::Rng, &blk::Blk, &console::Console];

/// A type of device.
pub(super) trait Device: std::fmt::Debug + Sync {
    /// Its name on the command line.
    fn name(&self) -> &'static str;

    /// Kinds of load; the first is what is done if nothing is said.
    fn kinds(&self) -> &'static [&'static str];

    /// Bytes of a request if nothing is said.
    fn size(&self) -> u32;

    /// Names of the floors that are beside the others; the last is the one that times are compared with.
    fn floors(&self, arguments: &Arguments) -> Vec<&'static str>;

    /// What it keeps between the cases, for each contender.
    fn shelf(&self) -> Box<dyn Any> {
        Box::new(())
    }

    /// What one contender is asked in one case. `words` are the words of the command that starts it, if one does.
    ///
    /// # Errors
    /// It cannot be asked that.
    fn setting(
        &self,
        case: &Case,
        arguments: &Arguments,
        who: Who<'_>,
        shelf: &mut dyn Any,
    ) -> Result<Setting, LoadError>;
}

/// Who is asked.
#[derive(Clone, Copy)]
pub(super) enum Who<'a> {
    /// A floor of this name.
    Floor(&'a str),
    /// Whatever listens at a path.
    Running,
    /// What a command starts.
    Command(&'a str),
}

/// How one contender is asked in one case.
pub(super) struct Setting {
    /// The load of each queue.
    pub(super) loads: Vec<(u16, Box<dyn Requests>)>,
    /// Queues of the device.
    pub(super) queues: u16,
    /// What stands for what in the command.
    pub(super) words: Vec<(&'static str, String)>,
    /// What it is, if it is a floor.
    pub(super) floor: Option<Floor>,
}

/// By name.
pub(super) fn by_name(name: &str) -> Result<&'static dyn Device, String> {
    let found = DEVICES.into_iter().find(|device| device.name() == name);
    found.ok_or_else(|| {
        let names: Vec<_> = DEVICES.iter().map(|device| device.name()).collect();
        format!("devices that can be loaded are {}", names.join(", "))
    })
}
