//! A back-end behind a vhost-user socket, anybody's.
//!
//! Every step has a deadline, nothing that arrives is trusted: a back-end that hangs, vanishes or talks nonsense breaks a
//! rule and nothing else.
use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhost_user::{
    BackendListener, BackendRequest, F_LOG_ALL, F_PROTOCOL_FEATURES, FrontendEndpoint, IotlbAccess,
    IotlbChange, IotlbReport, MemoryRegion, ProtocolFeatures, VringAddr,
};
use vm_virtio::{Features, GuestAddress, RingPos, Status};

use super::{Checked, Host, Setup, Trouble, broken, not_applicable};
use crate::vhost_user_driver::{PAGE, PHYSICAL, counted, new_eventfd};
use crate::{RamRegion, RingDriver, RingLayout, TestRam, connect, hostile};

/// Rings that are tried, whatever the back-end says it has.
const MOST_RINGS: u64 = 4;

/// What an ordinary driver takes.
const USUAL: ProtocolFeatures = ProtocolFeatures::MQ
    .union(ProtocolFeatures::REPLY_ACK)
    .union(ProtocolFeatures::BACKEND_REQ)
    .union(ProtocolFeatures::CONFIG)
    .union(ProtocolFeatures::RESET_DEVICE)
    .union(ProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(ProtocolFeatures::STATUS);

/// Which back-end, and how long it may take.
#[derive(Debug, Clone)]
pub struct SocketOptions {
    /// The socket that it listens on.
    pub path: PathBuf,
    /// For an answer to a message, and to listen again.
    pub patience: Duration,
    /// How long to look whether something happens that should not.
    pub quiet: Duration,
}

impl SocketOptions {
    /// Two seconds of patience, 30 ms of looking.
    pub fn new(path: impl Into<PathBuf>) -> SocketOptions {
        let (patience, quiet) = (Duration::from_secs(2), Duration::from_millis(30));
        SocketOptions { path: path.into(), patience, quiet }
    }
}

/// One ring and its files.
pub(super) struct Ring {
    pub(super) driver: RingDriver,
    pub(super) kick: OwnedFd,
    pub(super) call: OwnedFd,
    pub(super) err: OwnedFd,
    interrupts: u64,
    /// Where it starts next.
    pub(super) base: u32,
    started: bool,
}

/// A connection and what was negotiated over it.
pub(super) struct Connection {
    pub(super) endpoint: FrontendEndpoint,
    pub(super) setup: Setup,
    pub(super) features: Features,
    pub(super) protocol: ProtocolFeatures,
    pub(super) ram: TestRam,
    pub(super) rings: Vec<Ring>,
    requests: Option<BackendListener>,
    /// Behind an IOMMU: whether misses are answered, those that came, and the pages whose translation the back-end has.
    pub(super) translates: bool,
    pub(super) missed: BTreeSet<u64>,
    pub(super) translated: BTreeSet<u64>,
}

/// Lines run over connections to a back-end.
pub struct SocketBench {
    pub(super) options: SocketOptions,
    now: Option<Connection>,
    /// How many queues the back-end has, once it was asked. Who does not ask knows it from the type of the device.
    queues: u64,
}

pub(super) fn region(r: &RamRegion) -> MemoryRegion {
    let RamRegion { guest_addr, size, user_addr, mmap_offset } = *r;
    MemoryRegion { guest_addr, size, user_addr, mmap_offset }
}

/// Waits until one of these files is ready for that. False: not in time.
fn any_ready(files: &[BorrowedFd<'_>], wanted: PollFlags, patience: Duration) -> bool {
    let deadline = Instant::now() + patience;
    let mut files: Vec<_> = files.iter().map(|file| PollFd::from_borrowed_fd(*file, wanted)).collect();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let limit = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        match poll(&mut files, Some(&limit)) {
            Err(rustix::io::Errno::INTR) => {}
            ready => return ready.is_ok_and(|count| count > 0),
        }
    }
}

/// The same for one.
pub(super) fn ready(file: impl AsFd, wanted: PollFlags, patience: Duration) -> bool {
    any_ready(&[file.as_fd()], wanted, patience)
}

impl Connection {
    pub(super) fn has(&self, feature: ProtocolFeatures) -> bool {
        self.protocol.contains(feature)
    }

    pub(super) fn need(&self, feature: ProtocolFeatures) -> Checked {
        if self.has(feature) {
            return Ok(());
        }
        let names: Vec<_> = feature.iter_names().map(|(name, _)| name.to_lowercase()).collect();
        not_applicable(format!("{} not offered", names.join(", ")))
    }

    /// SET_FEATURES as far as the status, if there is one.
    fn negotiate(&mut self) -> Checked {
        let bit = if self.setup.rings_disabled { F_PROTOCOL_FEATURES } else { 0 };
        if self.has(ProtocolFeatures::STATUS) {
            // 3.1.1, step 1: the device may remember another driver.
            self.endpoint.set_status(0)?;
            self.endpoint.set_status(Status::ACKNOWLEDGE.bits())?;
            self.endpoint.set_status((Status::ACKNOWLEDGE | Status::DRIVER).bits())?;
        }
        self.endpoint.set_features(self.features.low64() | bit)?;
        if self.has(ProtocolFeatures::STATUS) {
            let wanted = Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK;
            self.endpoint.set_status(wanted.bits())?;
            let status = Status::from_bits_retain(self.endpoint.get_status()?);
            if !status.contains(Status::FEATURES_OK) {
                return broken(format!(
                    "features {:?} are refused: the status reads {status}",
                    self.features
                ));
            }
        }
        self.share_memory()
    }

    /// Whether the addresses of the driver are those of an IOMMU.
    fn is_translated(&self) -> bool {
        self.features.contains(Features::ACCESS_PLATFORM)
    }

    /// A region of guest memory. Behind an IOMMU no address of it is one that the driver uses.
    fn region(&self, r: &RamRegion) -> MemoryRegion {
        let physical = if self.is_translated() { PHYSICAL } else { 0 };
        MemoryRegion { guest_addr: r.guest_addr + physical, ..region(r) }
    }

    /// Takes the translations that the back-end asks for, and gives it those that it may have. Requests of other kinds
    /// are lost.
    pub(super) fn answer_misses(&mut self) -> Checked {
        while let Some(requests) = &mut self.requests
            && let Some(received) = requests.receive()?
        {
            if let BackendRequest::Iotlb(IotlbReport::Miss { iova, .. }) = received.request {
                self.missed.insert(iova - iova % PAGE);
            }
        }
        if !self.translates {
            return Ok(());
        }
        for iova in std::mem::take(&mut self.missed) {
            if !self.ram.regions().iter().any(|r| iova.wrapping_sub(r.guest_addr) < r.size) {
                return broken(format!(
                    "a translation of {iova:#x} is asked for, which the driver does not use"
                ));
            }
            let user_addr = self.ram.user_addr(GuestAddress(iova));
            let access = IotlbAccess::READ | IotlbAccess::WRITE;
            self.endpoint.iotlb(IotlbChange::Update { iova, size: PAGE, user_addr, access })?;
            self.translated.insert(iova);
        }
        Ok(())
    }

    fn share_memory(&mut self) -> Checked {
        let ram = self.ram.clone();
        if self.has(ProtocolFeatures::CONFIGURE_MEM_SLOTS) {
            for r in ram.regions() {
                self.endpoint.add_mem_reg(self.region(r), ram.fd())?;
            }
        } else {
            self.set_mem_table()?;
        }
        Ok(())
    }

    pub(super) fn set_mem_table(&mut self) -> Checked {
        let ram = self.ram.clone();
        let table: Vec<_> = ram.regions().iter().map(|r| (self.region(r), ram.fd())).collect();
        Ok(self.endpoint.set_mem_table(&table)?)
    }

    pub(super) fn address(&self, queue: usize) -> VringAddr {
        let config = self.rings[queue].driver.queue_config();
        let place = |addr: GuestAddress| if self.is_translated() { addr.0 } else { self.ram.user_addr(addr) };
        VringAddr {
            index: queue as u32,
            flags: 0,
            desc: place(config.desc),
            used: place(config.device),
            avail: place(config.driver),
            log: 0,
        }
    }

    /// NUM, BASE, ADDR: all that a ring needs but the file that starts it.
    pub(super) fn place_ring(&mut self, queue: usize) -> Checked {
        let index = queue as u32;
        let ring = &self.rings[queue];
        self.endpoint.set_vring_num(index, u32::from(ring.driver.size()))?;
        self.endpoint.set_vring_base(index, ring.base)?;
        let address = self.address(queue);
        Ok(self.endpoint.set_vring_addr(&address)?)
    }

    /// KICK and CALL.
    pub(super) fn kick_off(&mut self, queue: usize) -> Checked {
        let ring = &mut self.rings[queue];
        self.endpoint.set_vring_kick(queue as u32, Some(ring.kick.as_fd()))?;
        self.endpoint.set_vring_call(queue as u32, Some(ring.call.as_fd()))?;
        ring.started = true;
        Ok(())
    }

    pub(super) fn enable(&mut self, queue: usize, on: bool) -> Checked {
        match self.setup.rings_disabled {
            true => Ok(self.endpoint.set_vring_enable(queue as u32, on)?),
            false => Ok(()),
        }
    }

    pub(super) fn stop(&mut self, queue: usize) -> Checked<u32> {
        self.enable(queue, false)?;
        let base = self.endpoint.get_vring_base(queue as u32)?;
        self.rings[queue].started = false;
        self.rings[queue].base = base;
        Ok(base)
    }

    fn forget_memory(&mut self) -> Checked {
        if self.has(ProtocolFeatures::CONFIGURE_MEM_SLOTS) {
            for r in self.ram.clone().regions() {
                self.endpoint.rem_mem_reg(self.region(r))?;
            }
        }
        Ok(())
    }

    fn fresh_rings(&mut self) {
        for ring in &mut self.rings {
            ring.driver.restart();
            ring.base = base(self.setup.layout, RingPos::START);
        }
    }
}

/// A position as SET_VRING_BASE has it: split the next index, packed both positions with their wrap counters.
pub(super) fn base(layout: RingLayout, at: RingPos) -> u32 {
    let half = u32::from(at.index) | u32::from(at.wrap) << 15;
    match layout {
        RingLayout::Split => u32::from(at.index),
        RingLayout::Packed => half | half << 16,
    }
}

impl SocketBench {
    /// Lines run over the back-end that listens there.
    pub fn new(options: SocketOptions) -> SocketBench {
        SocketBench { options, now: None, queues: 1 }
    }

    /// The connection.
    pub(super) fn now(&mut self) -> Checked<&mut Connection> {
        self.now.as_mut().ok_or_else(|| Trouble::Broken("the connection is gone".to_owned()))
    }

    /// A connection on which nothing was said. The one before ends.
    pub(super) fn connect(&mut self) -> Checked<FrontendEndpoint> {
        if let Some(old) = self.now.take() {
            let _ = old.endpoint.stream().shutdown(std::net::Shutdown::Both);
        }
        let mut endpoint = match connect(&self.options.path, self.options.patience) {
            Ok(endpoint) => endpoint,
            Err(error) => return broken(format!("no connection to the back-end: {error}")),
        };
        endpoint.set_timeout(self.options.patience);
        Ok(endpoint)
    }

    /// Whether a new front-end finds the back-end well: it answers.
    pub(super) fn alive(&mut self) -> Checked {
        match self.connect()?.get_features() {
            Ok(_) => Ok(()),
            Err(error) => broken(format!("afterwards a new front-end is not served: {error}")),
        }
    }

    /// The configuration space before SET_FEATURES.
    pub(super) fn early_config(&mut self) -> Checked<Vec<u8>> {
        let mut endpoint = self.connect()?;
        if endpoint.get_features()? & F_PROTOCOL_FEATURES == 0 {
            return not_applicable("protocol_features not offered");
        }
        let protocol = endpoint.get_protocol_features()? & USUAL;
        if !protocol.contains(ProtocolFeatures::CONFIG) {
            return not_applicable("config not offered");
        }
        endpoint.set_protocol_features(protocol)?;
        endpoint.set_owner()?;
        // Every device with a configuration space has at least four bytes of it.
        Ok(endpoint.get_config(0, 4, 0)?)
    }

    /// As [`Host::renew`], with these protocol features on top of the usual ones.
    pub(super) fn renew_with(&mut self, setup: &Setup, more: ProtocolFeatures) -> Checked {
        let mut endpoint = self.connect()?;
        let offered = endpoint.get_features()?;
        let mut protocol = ProtocolFeatures::empty();
        // Without acknowledging bit 30 there are no protocol features.
        if offered & F_PROTOCOL_FEATURES != 0 && setup.rings_disabled {
            protocol = endpoint.get_protocol_features()? & (USUAL | more);
            endpoint.set_protocol_features(protocol)?;
            if protocol.contains(ProtocolFeatures::MQ) {
                self.queues = endpoint.get_queue_num()?;
            }
        }
        endpoint.set_owner()?;
        let mut setup = *setup;
        setup.rings_disabled &= offered & F_PROTOCOL_FEATURES != 0;
        let features = setup.wanted(Features::from(offered & !F_PROTOCOL_FEATURES & !F_LOG_ALL));
        let packed = setup.layout == RingLayout::Packed;
        if packed != features.contains(Features::RING_PACKED) {
            return not_applicable("ring_packed not offered");
        }
        let mut requests = None;
        if protocol.contains(ProtocolFeatures::BACKEND_REQ) {
            let (listener, other) = BackendListener::pair(protocol)?;
            endpoint.set_backend_req_fd(other.as_fd())?;
            requests = Some(listener);
        }
        let ram = hostile::memory();
        let mut rings = Vec::new();
        for index in 0..self.queues.min(MOST_RINGS) as u32 {
            let ring = Ring {
                driver: RingDriver::start_at(&ram, setup.layout, setup.size, features, setup.start),
                kick: new_eventfd()?,
                call: new_eventfd()?,
                err: new_eventfd()?,
                interrupts: 0,
                base: base(setup.layout, setup.start),
                started: false,
            };
            endpoint.set_vring_call(index, Some(ring.call.as_fd()))?;
            endpoint.set_vring_err(index, Some(ring.err.as_fd()))?;
            rings.push(ring);
        }
        let now = Connection {
            endpoint,
            setup,
            features,
            protocol,
            ram,
            rings,
            requests,
            translates: true,
            missed: BTreeSet::new(),
            translated: BTreeSet::new(),
        };
        self.now.insert(now).negotiate()
    }
}

impl Host for SocketBench {
    fn offered(&mut self) -> Checked<Features> {
        let offered = self.connect()?.get_features()?;
        Ok(Features::from(offered & !F_PROTOCOL_FEATURES & !F_LOG_ALL))
    }

    fn renew(&mut self, setup: &Setup) -> Checked {
        self.renew_with(setup, ProtocolFeatures::empty())
    }

    fn start_rings(&mut self) -> Checked {
        for queue in 0..self.queues() {
            let now = self.now()?;
            now.place_ring(queue)?;
            now.kick_off(queue)?;
        }
        (0..self.queues()).try_for_each(|queue| self.now()?.enable(queue, true))
    }

    fn driver_ok(&mut self) -> Checked {
        let now = self.now()?;
        if !now.has(ProtocolFeatures::STATUS) {
            return Ok(());
        }
        let status = Status::from_bits_retain(now.endpoint.get_status()?) | Status::DRIVER_OK;
        now.endpoint.set_status(status.bits())?;
        let status = Status::from_bits_retain(now.endpoint.get_status()?);
        match status.contains(Status::DRIVER_OK) {
            true => Ok(()),
            false => broken(format!("after DRIVER_OK the status reads {status}")),
        }
    }

    fn status(&mut self) -> Checked<Status> {
        let now = self.now()?;
        now.need(ProtocolFeatures::STATUS)?;
        Ok(Status::from_bits_retain(now.endpoint.get_status()?))
    }

    fn write_status(&mut self, status: Status) -> Checked {
        let now = self.now()?;
        now.need(ProtocolFeatures::STATUS)?;
        Ok(now.endpoint.set_status(status.bits())?)
    }

    /// As QEMU does it for its vhost devices: there is no message for it, the ring is stopped and begins again.
    fn reset_ring(&mut self, queue: usize) -> Checked {
        let now = self.now()?;
        now.stop(queue)?;
        let layout = now.setup.layout;
        let ring = &mut now.rings[queue];
        ring.driver.restart();
        ring.base = base(layout, RingPos::START);
        Ok(())
    }

    /// As QEMU does it: rings are stopped, then the device is reset with whatever message there is for it.
    fn reset(&mut self) -> Checked {
        let now = self.now()?;
        for queue in 0..now.rings.len() {
            if now.rings[queue].started {
                now.stop(queue)?;
            }
        }
        if now.has(ProtocolFeatures::STATUS) {
            now.endpoint.set_status(0)?;
            let status = now.endpoint.get_status()?;
            if status != 0 {
                return broken(format!(
                    "after a reset the status reads {}",
                    Status::from_bits_retain(status)
                ));
            }
        } else if now.has(ProtocolFeatures::RESET_DEVICE) {
            now.endpoint.reset_device()?;
        }
        now.forget_memory()?;
        now.fresh_rings();
        Ok(())
    }

    fn renegotiate(&mut self) -> Checked {
        self.now()?.negotiate()
    }

    fn refuses(&mut self, features: Features) -> Checked<bool> {
        let now = self.now()?;
        let all = (now.features | features).low64() | F_PROTOCOL_FEATURES;
        let refused = match now.endpoint.set_features(all) {
            Err(vhost_user::Error::Refused { .. } | vhost_user::Error::Disconnected) => return Ok(true),
            other => other,
        };
        refused?;
        if !now.has(ProtocolFeatures::STATUS) {
            return Ok(false);
        }
        let status = Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK;
        now.endpoint.set_status(status.bits())?;
        Ok(now.endpoint.get_status()? & Status::FEATURES_OK.bits() == 0)
    }

    fn stop_ring(&mut self, queue: usize) -> Checked<RingPos> {
        let now = self.now()?;
        let base = now.stop(queue)?;
        match now.setup.layout {
            RingLayout::Split => match u16::try_from(base) {
                Ok(index) => Ok(RingPos { index, wrap: true }),
                Err(_) => broken(format!("GET_VRING_BASE says {base:#x}, more than an index")),
            },
            RingLayout::Packed => {
                let half = (base >> 16) as u16;
                Ok(RingPos { index: half & 0x7fff, wrap: half >> 15 == 1 })
            }
        }
    }

    fn start_ring(&mut self, queue: usize) -> Checked {
        let now = self.now()?;
        now.place_ring(queue)?;
        now.kick_off(queue)?;
        now.enable(queue, true)
    }

    fn queues(&self) -> usize {
        self.now.as_ref().map_or(0, |now| now.rings.len())
    }

    fn ram(&self) -> TestRam {
        self.now.as_ref().expect("renew comes first").ram.clone()
    }

    fn ring(&mut self, queue: usize) -> &mut RingDriver {
        &mut self.now.as_mut().expect("renew comes first").rings[queue].driver
    }

    fn kick(&mut self, queue: usize) -> Checked {
        // Full means that a notification is pending.
        let _ = rustix::io::write(&self.now()?.rings[queue].kick, &1u64.to_ne_bytes());
        Ok(())
    }

    fn rest(&mut self) -> Checked {
        std::thread::sleep(self.options.quiet);
        Ok(())
    }

    fn wait(&mut self, queue: usize, patience: Duration) -> Checked<bool> {
        let now = self.now()?;
        let deadline = Instant::now() + patience;
        loop {
            let translated = now.is_translated();
            if translated {
                now.answer_misses()?;
            }
            let requests = now.requests.as_ref().filter(|_| translated);
            let files: Vec<_> = [now.rings[queue].call.as_fd()]
                .into_iter()
                .chain(requests.map(|file| file.as_fd()))
                .collect();
            let left = deadline.saturating_duration_since(Instant::now());
            if !any_ready(&files, PollFlags::IN, left) {
                return Ok(false);
            }
            let ring = &mut now.rings[queue];
            let count = counted(&ring.call);
            ring.interrupts += count;
            if count > 0 {
                return Ok(true);
            }
        }
    }

    fn interrupts(&mut self, queue: usize) -> u64 {
        let Some(ring) = self.now.as_mut().and_then(|now| now.rings.get_mut(queue)) else { return 0 };
        ring.interrupts += counted(&ring.call);
        ring.interrupts
    }

    fn ring_failed(&mut self, queue: usize, patience: Duration) -> bool {
        let Some(ring) = self.now.as_mut().and_then(|now| now.rings.get_mut(queue)) else { return false };
        ready(&ring.err, PollFlags::IN, patience) && counted(&ring.err) != 0
    }

    fn config(&mut self, offset: u32, len: u32) -> Checked<Vec<u8>> {
        let now = self.now()?;
        now.need(ProtocolFeatures::CONFIG)?;
        Ok(now.endpoint.get_config(offset, len, 0)?)
    }

    fn config_changes(&mut self) -> Checked<usize> {
        let quiet = self.options.quiet;
        let now = self.now()?;
        let Some(requests) = &mut now.requests else { return not_applicable("backend_req not offered") };
        let mut changes = 0;
        // A back-end that never falls silent is not listened to for ever.
        for _ in 0..64 {
            match requests.wait(quiet)? {
                Some(received) => {
                    changes += usize::from(matches!(received.request, BackendRequest::ConfigChange))
                }
                None => break,
            }
        }
        Ok(changes)
    }

    fn is_wire(&self) -> bool {
        true
    }

    fn wire(&mut self) -> Checked<&mut SocketBench> {
        Ok(self)
    }
}
