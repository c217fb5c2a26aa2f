//! A device in this process, stepped without threads.
use std::time::{Duration, Instant};

use vm_virtio::{Engine, Features, HostEvent, QueueState, RingPos, Status, Stop, VirtioDevice, WaitFor};

use super::{Checked, Host, Setup, broken};
use crate::{MemoryHost, RingDriver, RingLayout, TestRam, hostile};

/// Makes a device for each line.
pub struct MemoryBench<D: VirtioDevice, F: FnMut() -> D> {
    make: F,
    now: Option<Running<D>>,
}

struct Running<D: VirtioDevice> {
    host: MemoryHost<D>,
    /// Interrupts that were waited for.
    heard: Vec<u64>,
    stopped: Vec<Option<QueueState>>,
    failed: Vec<bool>,
    changes: usize,
}

impl<D: VirtioDevice> Running<D> {
    /// Runs the device until it rests.
    fn settle(&mut self, patience: Duration) -> Checked {
        let deadline = Instant::now() + patience;
        while self.host.step() {
            if Instant::now() > deadline {
                return broken("the device does not come to rest");
            }
        }
        for event in self.host.events() {
            match event {
                HostEvent::QueueFault { queue, .. } => {
                    if let Some(failed) = self.failed.get_mut(usize::from(queue)) {
                        *failed = true;
                    }
                }
                HostEvent::ConfigChanged => self.changes += 1,
                _ => {}
            }
        }
        Ok(())
    }

    fn engine(&self) -> &Engine<D> {
        self.host.engine()
    }

    fn status(&mut self, status: Status) -> Status {
        self.host.set_status(status);
        self.engine().status()
    }

    /// ACKNOWLEDGE, DRIVER, the features, FEATURES_OK.
    fn negotiate(&mut self) -> Checked {
        self.status(Status::ACKNOWLEDGE);
        self.status(Status::ACKNOWLEDGE | Status::DRIVER);
        let features = self.host.features();
        if let Err(error) = self.engine().set_driver_features(features) {
            return broken(error.to_string());
        }
        let status = self.status(Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK);
        if !status.contains(Status::FEATURES_OK) {
            return broken(format!("features {features:?} are refused"));
        }
        let order = self.engine().memory(self.host.ram().ram(), WaitFor::NewRequests);
        self.host.finish(order);
        Ok(())
    }
}

/// Long enough for whatever a device does by itself.
const SETTLE: Duration = Duration::from_secs(20);

impl<D: VirtioDevice, F: FnMut() -> D> MemoryBench<D, F> {
    /// Lines run over devices that `make` makes.
    pub fn new(make: F) -> Self {
        MemoryBench { make, now: None }
    }

    fn now(&mut self) -> &mut Running<D> {
        self.now.as_mut().expect("renew comes first")
    }
}

impl<D: VirtioDevice, F: FnMut() -> D> Host for MemoryBench<D, F> {
    fn offered(&mut self) -> Checked<Features> {
        let host = MemoryHost::builder((self.make)()).build();
        Ok(host.engine().offered())
    }

    fn renew(&mut self, setup: &Setup) -> Checked {
        self.now = None;
        let offered = self.offered()?;
        let wanted = setup.wanted(offered);
        let optional = Features::RING - Features::VERSION_1;
        let host = MemoryHost::builder((self.make)())
            .layout(setup.layout)
            .queue_size(setup.size)
            .start_at(setup.start)
            .ram(hostile::memory())
            .with(wanted)
            .without((optional - wanted) | if setup.own { Features::empty() } else { offered - wanted })
            .build();
        let queues = host.engine().queues().len();
        let state = QueueState { avail: setup.start, used: setup.start, held: Vec::new() };
        self.now = Some(Running {
            host,
            heard: vec![0; queues],
            stopped: vec![Some(state); queues],
            failed: vec![false; queues],
            changes: 0,
        });
        self.now().negotiate()
    }

    fn start_rings(&mut self) -> Checked {
        (0..self.queues()).try_for_each(|queue| self.start_ring(queue))
    }

    fn driver_ok(&mut self) -> Checked {
        let now = self.now();
        let status = now.engine().status() | Status::DRIVER_OK;
        if now.status(status).contains(Status::DRIVER_OK) { Ok(()) } else { broken("DRIVER_OK is refused") }
    }

    fn status(&mut self) -> Checked<Status> {
        Ok(self.now().engine().status())
    }

    fn write_status(&mut self, status: Status) -> Checked {
        self.now().status(status);
        Ok(())
    }

    fn reset_ring(&mut self, queue: usize) -> Checked {
        let now = self.now();
        let order = now.engine().reset_queue(queue as u16);
        if let Err(error) = now.host.finish(order) {
            return broken(error.to_string());
        }
        now.host.ring(queue).restart();
        now.stopped[queue] = None;
        Ok(())
    }

    fn reset(&mut self) -> Checked {
        let now = self.now();
        let status = now.status(Status::empty());
        if !status.is_empty() {
            return broken(format!("after a reset the status reads {status}"));
        }
        now.settle(SETTLE)?;
        for queue in 0..now.stopped.len() {
            now.host.ring(queue).restart();
            now.stopped[queue] = None;
        }
        Ok(())
    }

    fn renegotiate(&mut self) -> Checked {
        self.now().negotiate()
    }

    fn refuses(&mut self, features: Features) -> Checked<bool> {
        let now = self.now();
        let all = now.host.features() | features;
        Ok(now.engine().set_driver_features(all).is_err()
            || !now.status(Status::FEATURES_OK).contains(Status::FEATURES_OK))
    }

    fn stop_ring(&mut self, queue: usize) -> Checked<RingPos> {
        let now = self.now();
        match now.host.stop_queue(queue, Stop::Drain) {
            Ok(state) => {
                let packed = now.host.ring(queue).layout_of() == RingLayout::Packed;
                let at = if packed { state.used } else { state.avail };
                now.stopped[queue] = Some(state);
                Ok(at)
            }
            Err(error) => broken(error.to_string()),
        }
    }

    fn start_ring(&mut self, queue: usize) -> Checked {
        let now = self.now();
        let state = now.stopped[queue].take();
        now.host.start_queue(queue, state);
        let order = now.engine().enable(queue as u16, true);
        now.host.finish(order);
        Ok(())
    }

    fn queues(&self) -> usize {
        self.now.as_ref().map_or(0, |now| now.engine().queues().len())
    }

    fn ram(&self) -> TestRam {
        self.now.as_ref().expect("renew comes first").host.ram().clone()
    }

    fn ring(&mut self, queue: usize) -> &mut RingDriver {
        self.now().host.ring(queue)
    }

    fn kick(&mut self, queue: usize) -> Checked {
        self.now().host.kick_anyway(queue);
        Ok(())
    }

    fn rest(&mut self) -> Checked {
        self.now().settle(SETTLE)
    }

    fn wait(&mut self, queue: usize, patience: Duration) -> Checked<bool> {
        let deadline = Instant::now() + patience;
        let now = self.now();
        loop {
            now.settle(SETTLE)?;
            let count = now.host.interrupts(queue);
            if std::mem::replace(&mut now.heard[queue], count) != count {
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
        self.now().host.interrupts(queue)
    }

    fn ring_failed(&mut self, queue: usize, _patience: Duration) -> bool {
        let now = self.now();
        now.settle(SETTLE).is_ok() && std::mem::take(&mut now.failed[queue])
    }

    fn config(&mut self, offset: u32, len: u32) -> Checked<Vec<u8>> {
        let mut bytes = vec![0; len as usize];
        self.now().host.config().read(offset, &mut bytes);
        Ok(bytes)
    }

    fn config_changes(&mut self) -> Checked<usize> {
        let now = self.now();
        now.settle(SETTLE)?;
        Ok(std::mem::take(&mut now.changes))
    }
}
