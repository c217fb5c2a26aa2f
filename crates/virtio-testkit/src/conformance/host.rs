//! What a line needs of whatever the device is behind.
use std::time::Duration;

use vm_virtio::{Features, RingPos, Status};

use super::{Checked, Setup, SocketBench, not_applicable};
use crate::{RingDriver, TestRam};

/// A driver and a device, over which lines run.
///
/// ```text
/// renew         a new driver, which has negotiated (FEATURES_OK): memory and rings are there, nothing is started
/// start_rings   the device may look at the rings as soon as the driver is ready
/// driver_ok     it is
/// reset         status 0; rings are fresh; renegotiate leads back to where renew ended
/// ```
pub trait Host {
    /// What the device offers, asked anew.
    fn offered(&mut self) -> Checked<Features>;
    /// A new driver. What the former one did is over.
    fn renew(&mut self, setup: &Setup) -> Checked;
    /// Starts and enables every ring.
    fn start_rings(&mut self) -> Checked;
    /// Says that the driver is ready.
    fn driver_ok(&mut self) -> Checked;
    /// The status field.
    fn status(&mut self) -> Checked<Status>;
    /// Writes the status field of a driver that is past FEATURES_OK.
    fn write_status(&mut self, status: Status) -> Checked;
    /// Resets one queue and takes its buffers back: its ring is fresh, and not started.
    fn reset_ring(&mut self, queue: usize) -> Checked;
    /// Resets the device and takes every buffer back.
    fn reset(&mut self) -> Checked;
    /// Negotiates the same once more after a reset.
    fn renegotiate(&mut self) -> Checked;
    /// The driver chooses features that were not offered. Whether the device refuses.
    fn refuses(&mut self, features: Features) -> Checked<bool>;
    /// Stops a ring: it finishes what it took. Returns where it would go on.
    fn stop_ring(&mut self, queue: usize) -> Checked<RingPos>;
    /// Starts a ring again where it stopped.
    fn start_ring(&mut self, queue: usize) -> Checked;
    /// How many queues there are.
    fn queues(&self) -> usize;
    /// Guest memory.
    fn ram(&self) -> TestRam;
    /// The driver's side of a queue.
    fn ring(&mut self, queue: usize) -> &mut RingDriver;
    /// Notifies the device, wanted or not.
    fn kick(&mut self, queue: usize) -> Checked;
    /// Gives the device time to do what it would do unasked.
    fn rest(&mut self) -> Checked;
    /// Waits for an interrupt of a queue. False: none came in this time.
    fn wait(&mut self, queue: usize, patience: Duration) -> Checked<bool>;
    /// Interrupts of a queue so far.
    fn interrupts(&mut self, queue: usize) -> u64;
    /// Whether an error of a ring was reported since the last call, waiting for it if need be.
    fn ring_failed(&mut self, queue: usize, patience: Duration) -> bool;
    /// Part of the configuration space.
    fn config(&mut self, offset: u32, len: u32) -> Checked<Vec<u8>>;
    /// Configuration-change notifications since the last call.
    fn config_changes(&mut self) -> Checked<usize>;
    /// Whether there are messages.
    fn is_wire(&self) -> bool {
        false
    }
    /// The socket, for lines about messages.
    fn wire(&mut self) -> Checked<&mut SocketBench> {
        not_applicable("about messages of vhost-user")
    }
}
