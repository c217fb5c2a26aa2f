//! The conformance suite of `virtio-testkit` through the proxy: daemons, as a driver in this process sees them.
mod support;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use support::{Backend, Guest, Setup, counted, echo_options, entropy_options, readable};
use vhost_proxy::{Proxy, ProxyOptions};
use virtio_testkit::conformance::{Checked, Host, Line, PATIENCE, Place, Request, Subject, Trouble, check};
use virtio_testkit::{RingDriver, RingLayout, TestRam, hostile};
use vm_virtio::{Features, HostEvent, QueueState, RingPos, Status, Stop, WaitFor};

struct ProxyBench {
    socket: PathBuf,
    options: ProxyOptions,
    now: Option<Guest>,
    stopped: Vec<Option<QueueState>>,
    faults: usize,
    changes: usize,
}

impl ProxyBench {
    fn proxy(&self) -> Checked<Proxy> {
        Proxy::connect(&self.socket, self.options.clone()).map_err(|error| Trouble::Broken(error.to_string()))
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

/// The example's other device: it gives back what it is sent.
const ECHO: Subject = Subject {
    name: "echo",
    queue: 0,
    queues: 3,
    request: |n| Request { readable: (0..9).map(|i| b'a' + ((n + i) % 17) as u8).collect(), writable: 12 },
    check: |request, answer| match request.readable == answer {
        true => Ok(()),
        false => Err(format!("{answer:02x?} to {:02x?}", request.readable)),
    },
    configure: Some(|n| Request { readable: vec![b'C', 100 + n as u8], writable: 12 }),
    read_only: Some(4),
};

/// Lines that there is nothing to look at for: those about messages, which are this device's own business; what looks at
/// the ring from the driver's thread while the device runs, which the suite does over messages only; what is not offered.
const ELSEWHERE: [&str; 6] = [
    "entry-before-index",
    "suspend-rests",
    "suspend-early",
    "suspend-reset",
    "queue-reset",
    "queue-reset-alone",
];

fn through_the_proxy(backend: &Backend, options: ProxyOptions, subject: &Subject, more: &[&str]) {
    let (stopped, socket) = (Vec::new(), backend.socket());
    let mut host = ProxyBench { socket, options, now: None, stopped, faults: 0, changes: 0 };
    let report = check(&mut host, Some(subject), PATIENCE);
    report.assert_passed();
    let wire = Line::all().into_iter().filter(|line| line.place == Place::Wire).map(|line| line.id);
    let mut left_out: Vec<_> = wire.chain(ELSEWHERE).chain(more.iter().copied()).collect();
    let mut not_applicable = report.not_applicable();
    left_out.sort_unstable();
    not_applicable.sort_unstable();
    assert_eq!(not_applicable, left_out);
}

#[test]
fn conformance_of_the_entropy_device() {
    let backend = Backend::start(&["--entropy"]);
    // It has no features, no configuration, and one queue.
    let more = ["own-features-optional", "config-change-notified", "other-queues"];
    through_the_proxy(&backend, entropy_options(), &Subject::ENTROPY, &more);
}

#[test]
fn conformance_of_a_device_with_everything() {
    let backend = Backend::start(&["--queues", "3"]);
    through_the_proxy(&backend, echo_options(), &ECHO, &[]);
}
