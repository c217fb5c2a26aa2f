//! A driver over a vhost-user socket: what QEMU and the guest behind it do to a back-end, in QEMU's order.
//!
//! ```text
//! connect:  GET_FEATURES, GET/SET_PROTOCOL_FEATURES, GET_QUEUE_NUM, GET_MAX_MEM_SLOTS, SET_OWNER, GET_FEATURES,
//!           SET_BACKEND_REQ_FD, SET_VRING_CALL, SET_VRING_ERR
//! start:    SET_FEATURES, GET_INFLIGHT_FD (once), SET_INFLIGHT_FD, status FEATURES_OK, ADD_MEM_REG ... or SET_MEM_TABLE,
//!           per ring NUM, BASE, ADDR, KICK, CALL; ENABLE; status ACKNOWLEDGE | DRIVER | DRIVER_OK
//! stop:     per ring ENABLE 0, GET_VRING_BASE
//! ```
//! Each step is skipped where the feature that it needs was not offered or not wanted.
use std::cell::Cell;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use vhost_user::{
    Answer, BackendListener, BackendRequest, Error, F_LOG_ALL, F_PROTOCOL_FEATURES, FrontendEndpoint,
    InflightArea, IotlbAccess, IotlbChange, IotlbReport, MemoryRegion, MigrationPhase, ProtocolFeatures,
    TransferDirection, VringAddr,
};
use vm_virtio::{Features, GuestAddress, QueueState, RingPos, Status};

use crate::connect::connect;
use crate::{Interrupts, RingDriver, RingLayout, TestRam, Used, Violation};

/// How long [`VhostUserDriver::connect`] waits for a socket that somebody listens on, and then for each answer; long, because
/// test machines are slow.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the driver wants from the back-end.
#[derive(Clone)]
pub struct VhostUserOptions {
    /// The layout of all rings.
    pub layout: RingLayout,
    /// Features that the driver does not take. Otherwise it takes the device's own and [`RingLayout::features`].
    pub without: Features,
    /// Features that the driver takes in addition, if they are offered, e.g. `IN_ORDER`.
    pub with: Features,
    /// Protocol features to take, where offered.
    pub protocol: ProtocolFeatures,
    /// Whether to negotiate protocol features at all. Without, rings are enabled from the start.
    pub negotiate_protocol: bool,
    /// Entries of each ring.
    pub queue_size: u16,
    /// Most rings to set up; none: as many as the back-end has.
    pub queues: Option<u32>,
    /// The guest's memory.
    pub ram: TestRam,
    /// Kicks, interrupts and errors as messages instead of eventfds, if the back-end offers that.
    pub in_band: bool,
    /// The device is behind an IOMMU, if it can be: the addresses of `ram` are IOVAs, the guest-physical ones are
    /// [`PHYSICAL`] more. Misses are answered, page by page, in [`VhostUserDriver::wait_used`].
    pub iommu: bool,
}

/// What is added to an IOVA to make it a guest-physical address.
pub const PHYSICAL: u64 = 1 << 32;

/// What one translation is for.
pub(crate) const PAGE: u64 = 0x1000;

impl VhostUserOptions {
    /// What QEMU would want for most devices: everything that is offered, but for in-flight tracking. Rings of 64
    /// entries, two regions of 8 MiB.
    pub fn new(layout: RingLayout) -> VhostUserOptions {
        VhostUserOptions {
            layout,
            without: Features::empty(),
            with: Features::empty(),
            protocol: ProtocolFeatures::MQ
                | ProtocolFeatures::REPLY_ACK
                | ProtocolFeatures::BACKEND_REQ
                | ProtocolFeatures::CONFIG
                | ProtocolFeatures::RESET_DEVICE
                | ProtocolFeatures::CONFIGURE_MEM_SLOTS
                | ProtocolFeatures::STATUS
                | ProtocolFeatures::DEVICE_STATE,
            negotiate_protocol: true,
            queue_size: 64,
            queues: None,
            ram: TestRam::spread(2, 8 << 20),
            in_band: false,
            iommu: false,
        }
    }
}

/// One ring with its three eventfds.
struct Line {
    ring: RingDriver,
    kick: OwnedFd,
    call: OwnedFd,
    err: OwnedFd,
    interrupts: u64,
    /// An error of the ring came as a message.
    failed: Cell<bool>,
    /// Where a stop ended; taken by the next start.
    base: Option<u32>,
}

/// Something did not work: the protocol, or a rule of virtio.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// The back-end or the socket.
    #[error(transparent)]
    Protocol(#[from] Error),
    /// The back-end broke a rule.
    #[error(transparent)]
    Broken(#[from] Violation),
}

/// A driver at the other end of a vhost-user socket.
pub struct VhostUserDriver {
    endpoint: FrontendEndpoint,
    options: VhostUserOptions,
    offered: Features,
    features: Features,
    protocol: ProtocolFeatures,
    backend_requests: Option<BackendListener>,
    /// Misses that were answered.
    misses: Vec<IotlbReport>,
    /// What survives the back-end.
    inflight: Option<(InflightArea, OwnedFd)>,
    lines: Vec<Line>,
}

pub(crate) fn new_eventfd() -> Result<OwnedFd, Error> {
    let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
    fd.map_err(|error| Error::from(std::io::Error::from(error)))
}

/// What an eventfd has counted since it was last asked.
pub(crate) fn counted(fd: &OwnedFd) -> u64 {
    let mut count = [0; 8];
    match rustix::io::read(fd, &mut count) {
        Ok(8) => u64::from_ne_bytes(count),
        _ => 0,
    }
}

fn patient(path: &Path) -> Result<FrontendEndpoint, Error> {
    let mut endpoint = connect(path, PATIENCE)?;
    endpoint.set_timeout(PATIENCE);
    Ok(endpoint)
}

impl VhostUserDriver {
    /// Connects, waiting for the socket to be there, negotiates and starts: the device works when this returns.
    pub fn connect(
        path: impl AsRef<Path>,
        options: VhostUserOptions,
    ) -> Result<VhostUserDriver, DriverError> {
        let mut driver = VhostUserDriver::attach(patient(path.as_ref())?, options)?;
        driver.start()?;
        Ok(driver)
    }

    /// Takes a connected endpoint and does what QEMU does before the guest runs: negotiation, nothing started.
    pub fn attach(
        endpoint: FrontendEndpoint,
        options: VhostUserOptions,
    ) -> Result<VhostUserDriver, DriverError> {
        let mut driver = VhostUserDriver {
            endpoint,
            options,
            offered: Features::empty(),
            features: Features::empty(),
            protocol: ProtocolFeatures::empty(),
            backend_requests: None,
            misses: Vec::new(),
            inflight: None,
            lines: Vec::new(),
        };
        driver.negotiate()?;
        Ok(driver)
    }

    fn negotiate(&mut self) -> Result<(), DriverError> {
        let offered = self.endpoint.get_features()?;
        let mut queues = 1;
        self.protocol = ProtocolFeatures::empty();
        if self.speaks_protocol(offered) {
            let in_band = match self.options.in_band {
                true => ProtocolFeatures::INBAND_NOTIFICATIONS,
                false => ProtocolFeatures::empty(),
            };
            self.protocol = self.endpoint.get_protocol_features()? & (self.options.protocol | in_band);
            self.endpoint.set_protocol_features(self.protocol)?;
            if self.protocol.contains(ProtocolFeatures::MQ) {
                queues = u32::try_from(self.endpoint.get_queue_num()?).unwrap_or(u32::MAX);
            }
        }
        if self.protocol.contains(ProtocolFeatures::CONFIGURE_MEM_SLOTS) {
            let slots = self.endpoint.get_max_mem_slots()?;
            let regions = self.options.ram.regions().len() as u64;
            if slots < regions {
                let seen = format!("{slots} slots, the guest has {regions} regions");
                return Err(Violation::new("at least 500 memory slots (GET_MAX_MEM_SLOTS)", seen).into());
            }
        }
        self.endpoint.set_owner()?;
        let again = self.endpoint.get_features()?;
        if again != offered {
            let seen = format!("{offered:#x}, then {again:#x}");
            return Err(Violation::new("the offered features do not change (2.2.2)", seen).into());
        }
        self.offered = Features::from(offered & !(F_PROTOCOL_FEATURES | F_LOG_ALL));
        let platform = if self.options.iommu { Features::ACCESS_PLATFORM } else { Features::empty() };
        let own = self.offered - Features::NOT_A_DEVICES;
        let wanted =
            (own | self.options.layout.features() | self.options.with | platform) - self.options.without;
        self.features = self.offered & wanted;
        if self.protocol.contains(ProtocolFeatures::BACKEND_REQ) {
            let (listener, other) = BackendListener::pair(self.protocol)?;
            self.endpoint.set_backend_req_fd(other.as_fd())?;
            self.backend_requests = Some(listener);
        }
        let queues = self.options.queues.map_or(queues, |most| most.min(queues));
        while (self.lines.len() as u32) < queues {
            let (layout, size) = (self.options.layout, self.options.queue_size);
            self.lines.push(Line {
                ring: RingDriver::new(&self.options.ram, layout, size, self.features),
                kick: new_eventfd()?,
                call: new_eventfd()?,
                err: new_eventfd()?,
                interrupts: 0,
                failed: Cell::new(false),
                base: None,
            });
        }
        let files = !self.in_band();
        for (index, line) in (0..).zip(&self.lines).filter(|_| files) {
            self.endpoint.set_vring_call(index, Some(line.call.as_fd()))?;
            self.endpoint.set_vring_err(index, Some(line.err.as_fd()))?;
        }
        Ok(())
    }

    fn speaks_protocol(&self, offered: u64) -> bool {
        self.options.negotiate_protocol && offered & F_PROTOCOL_FEATURES != 0
    }

    /// DRIVER_OK: features, memory, rings. A ring goes on where it was stopped, or where the driver knows the device
    /// to have been when it vanished.
    pub fn start(&mut self) -> Result<(), DriverError> {
        let bit = if self.options.negotiate_protocol { F_PROTOCOL_FEATURES } else { 0 };
        self.endpoint.set_features(self.features.low64() | bit)?;
        self.share_inflight()?;
        self.add_status(Status::FEATURES_OK)?;
        self.share_memory()?;
        for index in 0..self.lines.len() {
            self.start_ring(index)?;
        }
        if self.options.negotiate_protocol {
            for index in 0..self.lines.len() {
                self.endpoint.set_vring_enable(index as u32, true)?;
            }
        }
        self.add_status(Status::ACKNOWLEDGE | Status::DRIVER | Status::DRIVER_OK)
    }

    /// The buffer of the back-end before this one, if there was one.
    fn share_inflight(&mut self) -> Result<(), DriverError> {
        if !self.protocol.contains(ProtocolFeatures::INFLIGHT_SHMFD) {
            return Ok(());
        }
        let (area, file) = match self.inflight.take() {
            Some(inflight) => inflight,
            // No device has so many queues that this matters.
            None => self.endpoint.get_inflight_fd(self.lines.len() as u16, self.options.queue_size)?,
        };
        self.endpoint.set_inflight_fd(area, file.as_fd())?;
        self.inflight = Some((area, file));
        Ok(())
    }

    /// The buffer of what is in flight: [`VhostUserDriver::start`] hands it over.
    pub fn inflight(&mut self) -> &mut Option<(InflightArea, OwnedFd)> {
        &mut self.inflight
    }

    fn share_memory(&mut self) -> Result<(), DriverError> {
        let ram = self.options.ram.clone();
        let features = self.features;
        let region = |r: &crate::RamRegion| region(r, features);
        if self.protocol.contains(ProtocolFeatures::CONFIGURE_MEM_SLOTS) {
            for r in ram.regions() {
                self.endpoint.add_mem_reg(region(r), ram.fd())?;
            }
        } else {
            let table: Vec<_> = ram.regions().iter().map(|r| (region(r), ram.fd())).collect();
            self.endpoint.set_mem_table(&table)?;
        }
        Ok(())
    }

    /// Answers what the back-end misses now, as the IOMMU of this guest would. Other requests of it are dropped.
    pub fn answer_misses(&mut self) -> Result<usize, DriverError> {
        let before = self.misses.len();
        while let Some(listener) = &mut self.backend_requests
            && let Some(received) = listener.receive()?
        {
            let BackendRequest::Iotlb(report) = received.request else { continue };
            self.misses.push(report);
            let IotlbReport::Miss { iova, access: _ } = report else { continue };
            let page = iova - iova % PAGE;
            if self.options.ram.regions().iter().any(|r| page.wrapping_sub(r.guest_addr) < r.size) {
                self.translate(page, page, IotlbAccess::READ | IotlbAccess::WRITE)?;
            }
        }
        Ok(self.misses.len() - before)
    }

    /// What the back-end has missed so far.
    pub fn misses(&self) -> &[IotlbReport] {
        &self.misses
    }

    /// Says that a page of IOVAs is this page of [`Self::ram`].
    ///
    /// # Panics
    /// If there is no such page.
    pub fn translate(&mut self, iova: u64, page: u64, access: IotlbAccess) -> Result<(), DriverError> {
        let user_addr = self.options.ram.user_addr(GuestAddress(page));
        Ok(self.endpoint.iotlb(IotlbChange::Update { iova, size: PAGE, user_addr, access })?)
    }

    /// NUM, BASE, ADDR, KICK, CALL of one ring.
    pub fn start_ring(&mut self, index: usize) -> Result<(), DriverError> {
        let (number, in_band) = (index as u32, self.in_band());
        let line = &mut self.lines[index];
        let base = match line.base.take() {
            Some(base) => base,
            None => base_of(&line.ring.queue_state(), self.options.layout),
        };
        let config = line.ring.queue_config();
        let ram = &self.options.ram;
        self.endpoint.set_vring_num(number, u32::from(config.size))?;
        self.endpoint.set_vring_base(number, base)?;
        let translated = self.features.contains(Features::ACCESS_PLATFORM);
        let place = |addr| if translated { addr } else { ram.user_addr(GuestAddress(addr)) };
        self.endpoint.set_vring_addr(&VringAddr {
            index: number,
            flags: 0,
            desc: place(config.desc.0),
            used: place(config.device.0),
            avail: place(config.driver.0),
            log: 0,
        })?;
        if in_band {
            return Ok(self.endpoint.vring_kick(number)?);
        }
        self.endpoint.set_vring_kick(number, Some(line.kick.as_fd()))?;
        self.endpoint.set_vring_call(number, Some(line.call.as_fd()))?;
        Ok(())
    }

    /// Stops all rings, checked: what the device took is used (GET_VRING_BASE completes what is in flight), and the
    /// base that it tells is that of its last used entry.
    pub fn stop(&mut self) -> Result<(), DriverError> {
        for index in 0..self.lines.len() {
            let number = index as u32;
            if self.options.negotiate_protocol {
                self.endpoint.set_vring_enable(number, false)?;
            }
            let base = self.endpoint.get_vring_base(number)?;
            let line = &mut self.lines[index];
            let expected = base_of(&line.ring.queue_state(), self.options.layout);
            if base != expected {
                let rule = "GET_VRING_BASE finishes what is in flight and tells where the ring stopped";
                return Err(Violation::new(rule, format!("{base:#x}, expected {expected:#x}")).into());
            }
            line.base = Some(base);
        }
        Ok(())
    }

    /// A new connection to a back-end that went away, or after [`VhostUserDriver::stop`]: everything is negotiated
    /// again, the rings go on with what is in them.
    pub fn reconnect(&mut self, path: impl AsRef<Path>) -> Result<(), DriverError> {
        // The old connection ends first: a back-end serves one front-end at a time.
        let _ = self.endpoint.stream().shutdown(std::net::Shutdown::Both);
        self.endpoint = patient(path.as_ref())?;
        self.backend_requests = None;
        let features = self.features;
        self.negotiate()?;
        if self.features != features {
            let seen = format!("{features:?} before, {:?} now", self.features);
            return Err(Violation::new("the offered features do not change (2.2.2)", seen).into());
        }
        self.start()
    }

    /// Saves the state of the stopped device, as the source of a migration does.
    pub fn save_state(&mut self) -> Result<Vec<u8>, DriverError> {
        let (reader, writer) = std::io::pipe().map_err(Error::from)?;
        let (save, stopped) = (TransferDirection::Save, MigrationPhase::Stopped);
        let mut reader = match self.endpoint.set_device_state_fd(save, stopped, writer.as_fd())? {
            Some(better) => File::from(better),
            None => File::from(OwnedFd::from(reader)),
        };
        // The end of file is the back-end's: ours must not keep it open.
        drop(writer);
        let mut state = Vec::new();
        reader.read_to_end(&mut state).map_err(Error::from)?;
        self.endpoint.check_device_state()?;
        Ok(state)
    }

    /// Gives a connected device that has no ring running a saved state, as the destination of a migration does.
    pub fn load_state(&mut self, state: &[u8]) -> Result<(), DriverError> {
        let (reader, writer) = std::io::pipe().map_err(Error::from)?;
        let (load, stopped) = (TransferDirection::Load, MigrationPhase::Stopped);
        let mut writer = match self.endpoint.set_device_state_fd(load, stopped, reader.as_fd())? {
            Some(better) => File::from(better),
            None => File::from(OwnedFd::from(writer)),
        };
        drop(reader);
        // A back-end that has read enough to refuse it may close its end: what it says then counts.
        let written = writer.write_all(state);
        drop(writer);
        self.endpoint.check_device_state()?;
        Ok(written.map_err(Error::from)?)
    }

    /// Goes on with another back-end: this one is stopped, its state saved and loaded into the one at `path`, where the
    /// rings go on.
    pub fn migrate(&mut self, path: impl AsRef<Path>) -> Result<(), DriverError> {
        self.stop()?;
        let state = self.save_state()?;
        self.endpoint = patient(path.as_ref())?;
        self.backend_requests = None;
        self.negotiate()?;
        self.load_state(&state)?;
        self.start()
    }

    /// What the guest's reboot does: stop, reset through the status (or RESET_DEVICE), fresh rings, start.
    pub fn reboot(&mut self) -> Result<(), DriverError> {
        self.stop()?;
        self.reset()?;
        self.start()
    }

    /// Resets the device and takes every buffer back. The rings are stopped (or stop by it) and fresh.
    pub fn reset(&mut self) -> Result<(), DriverError> {
        if self.protocol.contains(ProtocolFeatures::STATUS) {
            self.endpoint.set_status(0)?;
            let status = self.endpoint.get_status()?;
            if status != 0 {
                let seen = format!("{status:#x}");
                return Err(Violation::new("status reads 0 once a reset is done (2.4.1)", seen).into());
            }
        } else if self.protocol.contains(ProtocolFeatures::RESET_DEVICE) {
            self.endpoint.reset_device()?;
        }
        // As QEMU does it: nothing that was in flight concerns the next driver.
        self.inflight = None;
        for line in &mut self.lines {
            line.ring.restart();
            line.base = None;
        }
        self.forget_memory()
    }

    /// With slots the front-end takes its memory back before it adds it again.
    fn forget_memory(&mut self) -> Result<(), DriverError> {
        if self.protocol.contains(ProtocolFeatures::CONFIGURE_MEM_SLOTS) {
            for r in self.options.ram.clone().regions() {
                self.endpoint.rem_mem_reg(region(r, self.features))?;
            }
        }
        Ok(())
    }

    /// As QEMU does it: reads the status, adds what is missing.
    fn add_status(&mut self, bits: Status) -> Result<(), DriverError> {
        if !self.protocol.contains(ProtocolFeatures::STATUS) {
            return Ok(());
        }
        let old = Status::from_bits_retain(self.endpoint.get_status()?);
        self.endpoint.set_status((old | bits).bits())?;
        let new = Status::from_bits_retain(self.endpoint.get_status()?);
        if !new.contains(bits) {
            let seen = format!("{old} and {bits} became {new}");
            return Err(Violation::new("GET_STATUS tells what was set, minus what was refused", seen).into());
        }
        Ok(())
    }

    /// The status, where the back-end has it.
    pub fn status(&mut self) -> Result<Status, DriverError> {
        Ok(Status::from_bits_retain(self.endpoint.get_status()?))
    }

    /// What the back-end offers, without bit 30.
    pub fn offered(&self) -> Features {
        self.offered
    }

    /// What is negotiated.
    pub fn features(&self) -> Features {
        self.features
    }

    /// The protocol features that are negotiated.
    pub fn protocol_features(&self) -> ProtocolFeatures {
        self.protocol
    }

    /// The front-end's end of the socket.
    pub fn endpoint(&mut self) -> &mut FrontendEndpoint {
        &mut self.endpoint
    }

    /// Requests of the back-end, if it may send any.
    pub fn backend_requests(&mut self) -> Option<&mut BackendListener> {
        self.backend_requests.as_mut()
    }

    /// Guest memory.
    pub fn ram(&self) -> &TestRam {
        &self.options.ram
    }

    /// How many rings were set up.
    pub fn queues(&self) -> usize {
        self.lines.len()
    }

    /// The driver's side of a queue.
    pub fn ring(&mut self, queue: usize) -> &mut RingDriver {
        &mut self.lines[queue].ring
    }

    /// The eventfd that interrupts come through.
    pub fn call_fd(&self, queue: usize) -> BorrowedFd<'_> {
        self.lines[queue].call.as_fd()
    }

    /// Whether notifications are messages.
    fn in_band(&self) -> bool {
        // Negotiated or not, files are preferred where they are given.
        self.options.in_band && self.protocol.contains(ProtocolFeatures::INBAND_NOTIFICATIONS)
    }

    /// Counts and acknowledges the interrupts and errors that came as messages. Other requests of the back-end are
    /// acknowledged and lost.
    fn hear(&mut self) {
        let Some(listener) = &mut self.backend_requests else { return };
        while let Ok(Some(received)) = listener.receive() {
            match received.request {
                BackendRequest::VringCall { index } => {
                    self.lines.get_mut(index as usize).into_iter().for_each(|line| line.interrupts += 1);
                }
                BackendRequest::VringErr { index } => {
                    self.lines.get(index as usize).into_iter().for_each(|line| line.failed.set(true));
                }
                _ => {}
            }
            // A back-end that is gone does not miss it.
            let _ = listener.reply(received.ticket, Answer::Done);
        }
    }

    /// Interrupts of a queue so far.
    pub fn interrupts(&mut self, queue: usize) -> u64 {
        if self.in_band() {
            self.hear();
        }
        let line = &mut self.lines[queue];
        line.interrupts += counted(&line.call);
        line.interrupts
    }

    /// Whether the back-end reported an error of a ring since the last call. What comes as a message is heard by
    /// [`VhostUserDriver::interrupts`] and while waiting.
    pub fn ring_failed(&self, queue: usize) -> bool {
        let line = &self.lines[queue];
        counted(&line.err) != 0 || line.failed.take()
    }

    /// Notifies the device of new buffers, if it wants that. Returns whether it did.
    ///
    /// # Panics
    /// With the [`Violation`] if the device's suppression fields are illegal.
    #[track_caller]
    pub fn kick(&mut self, queue: usize) -> bool {
        let wanted = self.lines[queue].ring.kick_wanted();
        if wanted {
            self.kick_anyway(queue);
        }
        wanted
    }

    /// Notifies the device, wanted or not.
    pub fn kick_anyway(&self, queue: usize) {
        if self.in_band() {
            // VRING_KICK without need_reply: code, version 1, size, index, 0.
            let message = [35, 1, 8, queue as u32, 0].map(u32::to_ne_bytes).concat();
            let _ = std::io::Write::write_all(&mut self.endpoint.stream(), &message);
            return;
        }
        // Full means that a notification is pending.
        let _ = rustix::io::write(&self.lines[queue].kick, &1u64.to_ne_bytes());
    }

    /// The next used buffer: waits for the interrupt, at most `timeout`.
    ///
    /// # Panics
    /// With the [`Violation`] if the device broke a rule, a missing interrupt included.
    #[track_caller]
    pub fn wait_used(&mut self, queue: usize, timeout: Duration) -> Option<Used> {
        crate::violation::expect(self.try_wait_used(queue, timeout))
    }

    /// As [`VhostUserDriver::wait_used`], for tests that expect a violation.
    pub fn try_wait_used(&mut self, queue: usize, timeout: Duration) -> Result<Option<Used>, Violation> {
        let deadline = Instant::now() + timeout;
        loop {
            if self.in_band() {
                self.hear();
            }
            if self.options.iommu && self.answer_misses().is_err() {
                // The connection ended; the ring tells.
                self.backend_requests = None;
            }
            let listener = self.backend_requests.as_ref().filter(|_| self.in_band());
            let line = &mut self.lines[queue];
            // Asking arms the interrupt and looks again: from here on a used buffer comes with one.
            if let Some(used) = line.ring.try_used()? {
                return Ok(Some(used));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let limit = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
            let notified = listener.map_or(line.call.as_fd(), |listener| listener.as_fd());
            let mut files = vec![PollFd::from_borrowed_fd(notified, PollFlags::IN)];
            if let Some(listener) = self.backend_requests.as_ref().filter(|_| self.options.iommu) {
                files.push(PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN));
            }
            let ready = match poll(&mut files, Some(&limit)) {
                Ok(ready) => ready,
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => panic!("poll: {error}"),
            };
            line.interrupts += counted(&line.call);
            if ready == 0 {
                let late = line.ring.try_used()?;
                return match late {
                    Some(used) if line.ring.interrupts_wanted() == Interrupts::Always => Err(Violation::new(
                        "a used buffer that passes the driver's event is notified (2.7.7.2, 2.8.10)",
                        format!("{used:?} without an interrupt within {timeout:?}"),
                    )),
                    late => Ok(late),
                };
            }
        }
    }
}

/// As the front-end announces it.
fn region(r: &crate::RamRegion, features: Features) -> MemoryRegion {
    let physical = if features.contains(Features::ACCESS_PLATFORM) { PHYSICAL } else { 0 };
    MemoryRegion {
        guest_addr: r.guest_addr + physical,
        size: r.size,
        user_addr: r.user_addr,
        mmap_offset: r.mmap_offset,
    }
}

/// A position as SET_VRING_BASE has it: split the next index, packed both positions with their wrap counters.
pub(crate) fn base_of(state: &QueueState, layout: RingLayout) -> u32 {
    let half = |pos: RingPos| u32::from(pos.index) | u32::from(pos.wrap) << 15;
    match layout {
        RingLayout::Split => u32::from(state.avail.index),
        RingLayout::Packed => half(state.avail) | half(state.used) << 16,
    }
}
