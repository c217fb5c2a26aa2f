//! A device behind a transport, stepped without threads.
use std::time::{Duration, Instant};

use vm_virtio::{Features, RingPos, Status};

use super::{Checked, Host, Setup, broken, not_applicable};
use crate::transport::Machine;
use crate::{RingDriver, TestRam, hostile};

/// Makes a machine for each line.
pub struct RegisterBench<F: FnMut(&TestRam) -> Machine> {
    make: F,
    now: Option<Running>,
}

struct Running {
    machine: Machine,
    ram: TestRam,
    rings: Vec<RingDriver>,
    features: Features,
    /// Interrupts so far, and those that were waited for.
    heard: Vec<(u64, u64)>,
    config: usize,
    failed: bool,
}

impl Running {
    fn settle(&mut self) -> Checked {
        if !self.machine.settle() {
            return broken("the device does not come to rest");
        }
        // A driver's interrupt handler, until the line stays low.
        for _ in 0..64 {
            let heard = self.machine.driver.interrupt();
            if heard == Default::default() {
                return Ok(());
            }
            for (queue, (count, _)) in self.heard.iter_mut().enumerate() {
                *count += heard.queues >> queue & 1;
            }
            if heard.config {
                self.config += 1;
                self.failed |= self.machine.driver.status().contains(Status::DEVICE_NEEDS_RESET);
            }
            self.machine.settle();
        }
        broken("an interrupt that was acknowledged does not go away")
    }

    fn write_status(&mut self, status: Status) -> Checked<Status> {
        self.machine.driver.write_status(status);
        self.settle()?;
        Ok(self.machine.driver.status())
    }

    fn negotiate(&mut self, features: Features) -> Checked<Status> {
        self.write_status(Status::ACKNOWLEDGE)?;
        self.write_status(Status::ACKNOWLEDGE | Status::DRIVER)?;
        self.machine.driver.choose(features);
        self.write_status(Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK)
    }

    fn negotiate_well(&mut self) -> Checked {
        let status = self.negotiate(self.features)?;
        match status.contains(Status::FEATURES_OK) {
            true => Ok(()),
            false => broken(format!("features {:?} are refused", self.features)),
        }
    }
}

impl<F: FnMut(&TestRam) -> Machine> RegisterBench<F> {
    /// Lines run over machines that `make` makes on this memory.
    pub fn new(make: F) -> Self {
        RegisterBench { make, now: None }
    }

    fn now(&mut self) -> &mut Running {
        self.now.as_mut().expect("renew comes first")
    }
}

impl<F: FnMut(&TestRam) -> Machine> Host for RegisterBench<F> {
    fn offered(&mut self) -> Checked<Features> {
        let mut machine = (self.make)(&hostile::memory());
        let offered = machine.driver.offered();
        // What is the transport's own is none of the device's suite.
        Ok(offered - machine.driver.own_features())
    }

    fn renew(&mut self, setup: &Setup) -> Checked {
        self.now = None;
        if setup.start != RingPos::START {
            return not_applicable("a transport starts rings at their beginning");
        }
        let ram = hostile::memory();
        let mut machine = (self.make)(&ram);
        let features = setup.wanted(machine.driver.offered() - machine.driver.own_features());
        let sizes: Vec<u16> =
            (0..u16::MAX).map(|queue| machine.driver.queue_max(queue)).take_while(|max| *max != 0).collect();
        let ring = |max: &u16| RingDriver::new(&ram, setup.layout, setup.size.min(*max), features);
        let rings: Vec<_> = sizes.iter().map(ring).collect();
        let heard = vec![(0, 0); rings.len()];
        let mut now = Running { machine, ram, rings, features, heard, config: 0, failed: false };
        now.write_status(Status::empty())?;
        now.negotiate_well()?;
        self.now = Some(now);
        Ok(())
    }

    fn start_rings(&mut self) -> Checked {
        (0..self.queues()).try_for_each(|queue| self.start_ring(queue))
    }

    fn driver_ok(&mut self) -> Checked {
        let now = self.now();
        let status = now.machine.driver.status() | Status::DRIVER_OK;
        match now.write_status(status)?.contains(Status::DRIVER_OK) {
            true => Ok(()),
            false => broken("DRIVER_OK is refused"),
        }
    }

    fn status(&mut self) -> Checked<Status> {
        Ok(self.now().machine.driver.status())
    }

    fn write_status(&mut self, status: Status) -> Checked {
        self.now().write_status(status).map(|_| ())
    }

    fn reset_ring(&mut self, queue: usize) -> Checked {
        let now = self.now();
        now.machine.driver.reset_queue(queue as u16);
        now.settle()?;
        if now.machine.driver.is_queue_resetting(queue as u16) {
            return broken("a queue's reset does not end");
        }
        now.rings[queue].restart();
        Ok(())
    }

    fn reset(&mut self) -> Checked {
        let now = self.now();
        let status = now.write_status(Status::empty())?;
        if !status.is_empty() {
            return broken(format!("after a reset the status reads {status}"));
        }
        now.rings.iter_mut().for_each(RingDriver::restart);
        Ok(())
    }

    fn renegotiate(&mut self) -> Checked {
        self.now().negotiate_well()
    }

    fn refuses(&mut self, features: Features) -> Checked<bool> {
        let now = self.now();
        now.write_status(Status::empty())?;
        let all = now.features | features;
        Ok(!now.negotiate(all)?.contains(Status::FEATURES_OK))
    }

    fn stop_ring(&mut self, _queue: usize) -> Checked<RingPos> {
        not_applicable("a transport does not tell where a ring stopped")
    }

    fn start_ring(&mut self, queue: usize) -> Checked {
        let now = self.now();
        let config = now.rings[queue].queue_config();
        match now.machine.driver.start_queue(queue as u16, &config) {
            true => now.settle(),
            false => broken(format!("queue {queue} does not start")),
        }
    }

    fn queues(&self) -> usize {
        self.now.as_ref().map_or(0, |now| now.rings.len())
    }

    fn ram(&self) -> TestRam {
        self.now.as_ref().expect("renew comes first").ram.clone()
    }

    fn ring(&mut self, queue: usize) -> &mut RingDriver {
        &mut self.now().rings[queue]
    }

    fn kick(&mut self, queue: usize) -> Checked {
        self.now().machine.driver.notify(queue as u16);
        Ok(())
    }

    fn rest(&mut self) -> Checked {
        self.now().settle()
    }

    fn wait(&mut self, queue: usize, patience: Duration) -> Checked<bool> {
        let deadline = Instant::now() + patience;
        loop {
            let now = self.now();
            now.settle()?;
            let (count, waited) = &mut now.heard[queue];
            if std::mem::replace(waited, *count) != *count {
                return Ok(true);
            }
            if Instant::now() >= deadline {
                return Ok(false);
            }
            // A file or a timer of the device.
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    fn interrupts(&mut self, queue: usize) -> u64 {
        let now = self.now();
        // What does not come to rest is found by whoever waits.
        let _ = now.settle();
        now.heard[queue].0
    }

    fn ring_failed(&mut self, _queue: usize, _patience: Duration) -> bool {
        let now = self.now();
        now.settle().is_ok() && std::mem::take(&mut now.failed)
    }

    fn config(&mut self, offset: u32, len: u32) -> Checked<Vec<u8>> {
        Ok(self.now().machine.driver.config(offset, len))
    }

    fn config_changes(&mut self) -> Checked<usize> {
        let now = self.now();
        now.settle()?;
        Ok(std::mem::take(&mut now.config))
    }
}
