//! The conformance suite of `virtio-testkit` through the proxy: the entropy daemon, as a driver in this process sees it.
mod support;

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use support::{Backend, Guest, Setup, counted, entropy_options, readable};
use vhost_proxy::Proxy;
use virtio_testkit::conformance::{Checked, Host, Outcome, Subject, Trouble, check};
use virtio_testkit::{RingDriver, RingLayout, TestRam, hostile};
use vm_virtio::{Features, HostEvent, QueueState, RingPos, Status, Stop, WaitFor};

struct ProxyBench {
    socket: PathBuf,
    now: Option<Guest>,
    stopped: Vec<Option<QueueState>>,
    faults: usize,
    changes: usize,
}

impl ProxyBench {
    fn proxy(&self) -> Checked<Proxy> {
        Proxy::connect(&self.socket, entropy_options()).map_err(|error| Trouble::Broken(error.to_string()))
    }

    fn now(&mut self) -> &mut Guest {
        self.now.as_mut().expect("renew comes first")
    }

    fn try_negotiate(&mut self) -> Checked {
        let guest = self.now();
        let status = Status::ACKNOWLEDGE | Status::DRIVER;
        guest.engine.set_status(status).wait();
        let chosen = guest.engine.set_driver_features(guest.features);
        chosen.map_err(|error| Trouble::Broken(error.to_string()))?;
        guest.engine.set_status(status | Status::FEATURES_OK).wait();
        if !guest.engine.status().contains(Status::FEATURES_OK) {
            return Err(Trouble::Broken(format!("features {:?} are refused", guest.features)));
        }
        guest.engine.memory(guest.ram.ram(), WaitFor::NewRequests).wait();
        Ok(())
    }
}

impl Host for ProxyBench {
    fn offered(&mut self) -> Checked<Features> {
        self.now = None;
        let guest = Guest::new(self.proxy()?, Setup::new(RingLayout::Split));
        Ok(guest.engine.offered())
    }

    fn renew(&mut self, setup: &virtio_testkit::conformance::Setup) -> Checked {
        let offered = self.offered()?;
        let wanted = setup.wanted(offered);
        let mine = Setup {
            size: setup.size,
            start: setup.start,
            ram: hostile::memory(),
            with: wanted,
            without: (Features::RING - Features::VERSION_1 - wanted)
                | if setup.own { Features::empty() } else { offered - wanted },
            ..Setup::new(setup.layout)
        };
        let guest = Guest::new(self.proxy()?, mine);
        let state = QueueState { avail: setup.start, used: setup.start, held: Vec::new() };
        self.stopped = vec![Some(state); guest.lines.len()];
        (self.faults, self.changes) = (0, 0);
        self.now = Some(guest);
        self.try_negotiate()
    }

    fn start_rings(&mut self) -> Checked {
        (0..self.queues()).try_for_each(|queue| self.start_ring(queue))
    }

    fn driver_ok(&mut self) -> Checked {
        self.now().ready();
        Ok(())
    }

    fn status(&mut self) -> Checked<Status> {
        Ok(self.now().engine.status())
    }

    fn write_status(&mut self, status: Status) -> Checked {
        self.now().engine.set_status(status).wait();
        Ok(())
    }

    fn reset_ring(&mut self, queue: usize) -> Checked {
        let guest = self.now();
        let reset = guest.engine.reset_queue(queue as u16).wait();
        reset.map_err(|error| Trouble::Broken(error.to_string()))?;
        guest.lines[queue].ring.restart();
        self.stopped[queue] = None;
        Ok(())
    }

    fn reset(&mut self) -> Checked {
        let guest = self.now();
        guest.engine.set_status(Status::empty()).wait();
        let status = guest.engine.status();
        if !status.is_empty() {
            return Err(Trouble::Broken(format!("after a reset the status reads {status}")));
        }
        guest.lines.iter_mut().for_each(|line| line.ring.restart());
        self.stopped.fill(None);
        Ok(())
    }

    fn renegotiate(&mut self) -> Checked {
        self.try_negotiate()
    }

    fn refuses(&mut self, features: Features) -> Checked<bool> {
        let guest = self.now();
        let all = guest.features | features;
        let refused = guest.engine.set_driver_features(all).is_err();
        guest.engine.set_status(Status::FEATURES_OK).wait();
        Ok(refused || !guest.engine.status().contains(Status::FEATURES_OK))
    }

    fn stop_ring(&mut self, queue: usize) -> Checked<RingPos> {
        let guest = self.now();
        let packed = guest.lines[queue].ring.layout_of() == RingLayout::Packed;
        let stopped = guest.engine.stop(queue as u16, Stop::Drain, None).wait();
        let state = stopped.map_err(|error| Trouble::Broken(error.to_string()))?;
        let at = if packed { state.used } else { state.avail };
        self.stopped[queue] = Some(state);
        Ok(at)
    }

    fn start_ring(&mut self, queue: usize) -> Checked {
        let state = self.stopped[queue].take();
        self.now().start(queue, state);
        Ok(())
    }

    fn queues(&self) -> usize {
        self.now.as_ref().map_or(0, |guest| guest.lines.len())
    }

    fn ram(&self) -> TestRam {
        self.now.as_ref().expect("renew comes first").ram.clone()
    }

    fn ring(&mut self, queue: usize) -> &mut RingDriver {
        &mut self.now().lines[queue].ring
    }

    fn kick(&mut self, queue: usize) -> Checked {
        let _ = rustix::io::write(&self.now().lines[queue].kick, &1u64.to_ne_bytes());
        Ok(())
    }

    fn rest(&mut self) -> Checked {
        // Long enough for a process that has nothing else to do.
        std::thread::sleep(Duration::from_millis(20));
        Ok(())
    }

    fn wait(&mut self, queue: usize, patience: Duration) -> Checked<bool> {
        let line = &mut self.now().lines[queue];
        if !readable(&line.call, patience) {
            return Ok(false);
        }
        line.interrupts += counted(&line.call);
        Ok(true)
    }

    fn interrupts(&mut self, queue: usize) -> u64 {
        let line = &mut self.now().lines[queue];
        line.interrupts += counted(&line.call);
        line.interrupts
    }

    fn ring_failed(&mut self, queue: usize, patience: Duration) -> bool {
        let known = self.faults;
        let guest = self.now();
        let fault = |event: &HostEvent| matches!(event, HostEvent::QueueFault { queue: of, .. } if usize::from(*of) == queue);
        let deadline = Instant::now() + patience;
        while guest.ear.count(fault) == known && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.faults = self.now().ear.count(fault);
        self.faults > known
    }

    fn config(&mut self, offset: u32, len: u32) -> Checked<Vec<u8>> {
        let mut bytes = vec![0; len as usize];
        self.now().engine.config().read(offset, &mut bytes);
        Ok(bytes)
    }

    fn config_changes(&mut self) -> Checked<usize> {
        self.rest()?;
        let all = self.now().ear.count(|event| matches!(event, HostEvent::ConfigChanged));
        Ok(all - std::mem::replace(&mut self.changes, all))
    }
}

#[test]
fn conformance_through_the_proxy() {
    let backend = Backend::start(&["--entropy"]);
    let mut host =
        ProxyBench { socket: backend.socket(), now: None, stopped: Vec::new(), faults: 0, changes: 0 };
    let report = check(&mut host, Some(&Subject::ENTROPY), Duration::from_secs(5));
    report.assert_passed();
    let passed = report.rows.iter().filter(|row| row.outcome == Outcome::Pass).count();
    assert!(passed > 40, "{passed} lines pass\n{report}");
    if let Some(guest) = &host.now {
        assert!(guest.stats.connections.load(Ordering::Relaxed) > 0);
    }
}
