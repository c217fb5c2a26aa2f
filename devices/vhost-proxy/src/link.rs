//! A connection to a back-end, and bringing what is behind it to where it is wanted.
//!
//! Runs on a thread of the blocking pool: a message waits for its answer, and all messages of one [`Link::bring`] together have a
//! deadline. Whatever goes wrong ends the connection: then nobody has to know how far the back-end got, since the next
//! one begins from nothing.
//!
//! The order of messages is QEMU's (11.1): stops first; a state, status and features, in-flight buffer, memory, log; then per
//! ring NUM, BASE, ADDR, ERR, KICK, CALL, ENABLE; DRIVER_OK last.
//!
//! User addresses, in which rings are told, are guest addresses shifted by [`USER`]: they only have to fit the memory table, and no
//! address of this process is told to anybody.
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use vhost_user::{
    Error, F_LOG_ALL, F_PROTOCOL_FEATURES, FrontendEndpoint, LogArea, MAX_FDS, MemoryRegion,
    ProtocolFeatures, VringAddr, config_flags,
};
use vm_virtio::memory::FileRegion;
use vm_virtio::{Features, GuestAddress, QueueState, Status, Stop};

use crate::ProxyError;
use crate::offer::{Offer, timed};
use crate::target::{Inflight, Report, Ring, Target, Told, ToldRing};
use crate::transfer;

/// What is added to a guest address to make it a user address.
const USER: u64 = 1 << 46;

/// `VHOST_VRING_F_LOG`.
const RING_LOG: u32 = 1;

/// A connection, and what was told on it.
pub(crate) struct Link {
    endpoint: FrontendEndpoint,
    offer: Arc<Offer>,
    told: Told,
    deadline: Instant,
}

impl Link {
    /// A connection on which nothing but the protocol was negotiated. `epoch`: the device behind it was brought up
    /// after this reset, by the connection before; none: it may be in any state.
    pub(crate) fn new(endpoint: FrontendEndpoint, offer: Arc<Offer>, epoch: Option<u64>) -> Link {
        let told = Told { epoch, ..Told::default() };
        Link { endpoint, offer, told, deadline: Instant::now() }
    }

    /// The socket: to watch it, and to end it from outside.
    pub(crate) fn socket(&self) -> std::io::Result<UnixStream> {
        self.endpoint.stream().try_clone()
    }

    fn has(&self, feature: ProtocolFeatures) -> bool {
        self.offer.protocol.contains(feature)
    }

    fn endpoint(&mut self) -> Result<&mut FrontendEndpoint, ProxyError> {
        timed(&mut self.endpoint, self.deadline)
    }

    /// Sends what the back-end was not told yet. What is in the report holds, whatever the outcome.
    pub(crate) fn bring(
        &mut self,
        target: &Target,
        deadline: Instant,
        report: &mut Report,
    ) -> Result<(), ProxyError> {
        self.deadline = deadline;
        self.told.rings.resize(target.rings.len(), None);
        self.stop_rings(target, report)?;
        if self.told.epoch != Some(target.epoch) {
            self.reset()?;
            // Memory and log are the connection's, and stay.
            let (regions, log) = (std::mem::take(&mut self.told.regions), self.told.log.take());
            let rings = vec![None; target.rings.len()];
            self.told = Told { epoch: Some(target.epoch), regions, log, rings, ..Told::default() };
        }
        if let Some(features) = target.session {
            self.go_live(target, features, report)?;
        }
        if target.save && self.told.rings.iter().all(Option::is_none) {
            report.state = Some(transfer::save(&mut self.endpoint, deadline)?);
        }
        self.configure(target, report)?;
        if !self.has(ProtocolFeatures::REPLY_ACK) {
            // Messages are carried out in their order: an answer to this one means that the others were.
            self.endpoint()?.get_features()?;
        }
        Ok(())
    }

    /// Rings that are not wanted any more, or not as they are.
    fn stop_rings(&mut self, target: &Target, report: &mut Report) -> Result<(), ProxyError> {
        let packed = Features::from(self.told.features.unwrap_or(0)).contains(Features::RING_PACKED);
        for (queue, wanted) in (0..).zip(&target.rings) {
            let told = self.told.rings.get(usize::from(queue)).cloned().flatten();
            let never_ran =
                |ring: &Ring| ring.stop.is_some() && !(ring.ran && ring.stop == Some(Stop::Drain));
            let goes_on = |told: &ToldRing| {
                wanted.as_ref().is_some_and(|ring| ring.serial == told.serial && ring.stop.is_none())
            };
            match (told, wanted) {
                (Some(told), _) if goes_on(&told) => {}
                (Some(told), _) => {
                    let state = self.stop_ring(queue, packed)?;
                    report.stopped.push((queue, told.serial, state));
                }
                // It never got there: a back-end that died with requests is another matter.
                (None, Some(ring)) if never_ran(ring) && !report.has_stopped(queue, ring.serial) => {
                    report.stopped.push((queue, ring.serial, ring.state.clone()));
                }
                (None, _) => {}
            }
        }
        Ok(())
    }

    fn stop_ring(&mut self, queue: u16, packed: bool) -> Result<QueueState, ProxyError> {
        let index = u32::from(queue);
        if self.offer.enable_rules {
            self.endpoint()?.set_vring_enable(index, false)?;
        }
        let base = self.endpoint()?.get_vring_base(index)?;
        if let Some(told) = self.told.rings.get_mut(usize::from(queue)) {
            *told = None;
        }
        // A split ring's base has 16 bits.
        let bad =
            |_| Error::BadReply { code: vhost_user::FrontendCode::GetVringBase.code(), what: "no position" };
        Ok(QueueState::from_vring_base(base, packed).map_err(bad)?)
    }

    /// Back to the state of a device that nobody has used.
    fn reset(&mut self) -> Result<(), ProxyError> {
        if self.has(ProtocolFeatures::RESET_DEVICE) {
            self.endpoint()?.reset_device()?;
        }
        if self.has(ProtocolFeatures::STATUS) {
            self.endpoint()?.set_status(0)?;
        }
        Ok(())
    }

    fn go_live(
        &mut self,
        target: &Target,
        features: Features,
        report: &mut Report,
    ) -> Result<(), ProxyError> {
        let begins = self.told.features.is_none();
        if begins && let Some(state) = &target.load {
            transfer::load(&mut self.endpoint, state, self.deadline)?;
            report.loaded = true;
        }
        let status = Status::ACKNOWLEDGE | Status::DRIVER;
        if begins && self.has(ProtocolFeatures::STATUS) {
            self.endpoint()?.set_status(status.bits())?;
        }
        self.set_features(target, features)?;
        if begins {
            self.share_inflight(target, report)?;
            self.accept_features(status)?;
        }
        self.share_memory(target.ram.files())?;
        for (queue, ring) in (0..).zip(&target.rings) {
            if let Some(ring) = ring {
                let stopped = report.has_stopped(queue, ring.serial);
                if !stopped {
                    self.follow_ring(queue, ring, target, features)?;
                }
            }
        }
        if !std::mem::replace(&mut self.told.ready, true) && self.has(ProtocolFeatures::STATUS) {
            self.endpoint()?.set_status((status | Status::FEATURES_OK | Status::DRIVER_OK).bits())?;
        }
        // What a dead back-end had taken: its successor finishes it, and stops.
        self.stop_rings(target, report)
    }

    /// SET_FEATURES with the switch for the log, and where the log is.
    fn set_features(&mut self, target: &Target, features: Features) -> Result<(), ProxyError> {
        let same = match (&self.told.log, &target.log) {
            (None, None) => true,
            (Some(told), Some(wanted)) => Arc::ptr_eq(told, wanted),
            _ => false,
        };
        if let (Some(log), false) = (&target.log, same) {
            if !self.offer.logs {
                return Err(ProxyError::Log("the back-end cannot do it"));
            }
            let Some((file, offset)) = log.area().file() else {
                return Err(ProxyError::Log("the log has no file that could be shared"));
            };
            let area = LogArea { size: log.area().len() as u64, offset };
            self.endpoint()?.set_log_base(area, file.as_fd())?;
        }
        let protocol = if self.offer.enable_rules { F_PROTOCOL_FEATURES } else { 0 };
        let log = if target.log.is_some() { F_LOG_ALL } else { 0 };
        let bits = features.low64() | protocol | log;
        if self.told.features != Some(bits) {
            self.endpoint()?.set_features(bits)?;
            self.told.features = Some(bits);
        }
        self.told.log = target.log.clone();
        Ok(())
    }

    fn share_inflight(&mut self, target: &Target, report: &mut Report) -> Result<(), ProxyError> {
        if !self.has(ProtocolFeatures::INFLIGHT_SHMFD) {
            return Ok(());
        }
        let inflight = match &target.inflight {
            Some(inflight) => inflight.clone(),
            None => {
                let size = target.rings.iter().flatten().map(|ring| ring.config.size).max().unwrap_or(1);
                let size = size.max(target.inflight_size);
                let queues = self.offer.queues;
                match self.endpoint()?.get_inflight_fd(queues, size) {
                    Ok((area, file)) => Arc::new(Inflight { area, file }),
                    // It offers to, but has none for this device.
                    Err(Error::Refused { .. }) => return Ok(()),
                    Err(error) => return Err(error.into()),
                }
            }
        };
        report.inflight = Some(inflight.clone());
        self.endpoint()?.set_inflight_fd(inflight.area, inflight.file.as_fd())?;
        self.told.tracks = true;
        Ok(())
    }

    /// FEATURES_OK, which the back-end may refuse (virtio 1.4, 3.1.1 step 6).
    fn accept_features(&mut self, status: Status) -> Result<(), ProxyError> {
        if !self.has(ProtocolFeatures::STATUS) {
            return Ok(());
        }
        self.endpoint()?.set_status((status | Status::FEATURES_OK).bits())?;
        let got = Status::from_bits_retain(self.endpoint()?.get_status()?);
        if got.contains(Status::FEATURES_OK) { Ok(()) } else { Err(ProxyError::Features) }
    }

    /// The memory table, by slots or as a whole. Regions go before others come: they may be at the same addresses.
    fn share_memory(&mut self, regions: &[FileRegion]) -> Result<(), ProxyError> {
        if self.told.regions == regions {
            return Ok(());
        }
        let table = regions.iter().map(message).collect::<Result<Vec<_>, _>>()?;
        let slots = self.offer.slots;
        if regions.len() as u64 > slots {
            return Err(ProxyError::Slots { regions: regions.len(), slots });
        }
        if self.has(ProtocolFeatures::CONFIGURE_MEM_SLOTS) {
            let old = std::mem::take(&mut self.told.regions);
            for region in old.iter().filter(|region| !regions.contains(region)) {
                self.endpoint()?.rem_mem_reg(message(region)?)?;
            }
            for (region, message) in regions.iter().zip(table).filter(|(region, _)| !old.contains(region)) {
                self.endpoint()?.add_mem_reg(message, region.file.as_fd())?;
            }
        } else {
            debug_assert!(table.len() <= MAX_FDS, "slots are not negotiated");
            let table: Vec<_> = table
                .into_iter()
                .zip(regions)
                .map(|(message, region)| (message, region.file.as_fd()))
                .collect();
            self.endpoint()?.set_mem_table(&table)?;
        }
        self.told.regions = regions.to_vec();
        Ok(())
    }

    /// Starts a ring, or tells what has changed around it.
    fn follow_ring(
        &mut self,
        queue: u16,
        ring: &Ring,
        target: &Target,
        features: Features,
    ) -> Result<(), ProxyError> {
        let (at, index) = (usize::from(queue), u32::from(queue));
        let Some(told) = self.told.rings.get(at).cloned() else { return Ok(()) };
        let finishes = ring.stop == Some(Stop::Drain) && ring.ran;
        let told = match told {
            Some(told) => told,
            None if ring.stop.is_none() || finishes => return self.start_ring(queue, ring, target, features),
            None => return Ok(()),
        };
        let rules = self.offer.enable_rules;
        if told.enabled != ring.enabled && rules {
            self.endpoint()?.set_vring_enable(index, ring.enabled)?;
        }
        if told.call != ring.call.0 {
            self.endpoint()?.set_vring_call(index, ring.call.1.as_ref().map(|file| file.as_fd()))?;
        }
        if told.logged != ring.logged {
            let addr = self.addresses(queue, ring, features)?;
            self.endpoint()?.set_vring_addr(&addr)?;
        }
        self.note(queue, ring);
        Ok(())
    }

    fn start_ring(
        &mut self,
        queue: u16,
        ring: &Ring,
        target: &Target,
        features: Features,
    ) -> Result<(), ProxyError> {
        let index = u32::from(queue);
        let base = self.base(queue, ring, target, features)?;
        let addr = self.addresses(queue, ring, features)?;
        self.endpoint()?.set_vring_num(index, u32::from(ring.config.size))?;
        self.endpoint()?.set_vring_base(index, base)?;
        self.endpoint()?.set_vring_addr(&addr)?;
        self.endpoint()?.set_vring_err(index, Some(ring.err.as_fd()))?;
        self.endpoint()?.set_vring_call(index, ring.call.1.as_ref().map(|file| file.as_fd()))?;
        self.endpoint()?.set_vring_kick(index, ring.kick.as_ref().map(|file| file.as_fd()))?;
        if self.offer.enable_rules {
            self.endpoint()?.set_vring_enable(index, ring.enabled)?;
        }
        self.note(queue, ring);
        // A kick that the one before had read, an interrupt that it did not get to send: better one too many.
        let call = ring.call.1.as_ref().filter(|_| ring.ran);
        for file in [ring.kick.as_ref(), call].into_iter().flatten() {
            let _ = rustix::io::write(file, &1u64.to_ne_bytes());
        }
        Ok(())
    }

    fn note(&mut self, queue: u16, ring: &Ring) {
        let Ring { serial, call: (call, _), enabled, logged, .. } = *ring;
        if let Some(told) = self.told.rings.get_mut(usize::from(queue)) {
            *told = Some(ToldRing { serial, call, enabled, logged });
        }
    }

    /// Where a ring goes on. After a back-end that was lost: where the used ring says, if what that one had is tracked, or if it
    /// can have had nothing that the used ring does not tell of.
    fn base(&self, queue: u16, ring: &Ring, target: &Target, features: Features) -> Result<u32, ProxyError> {
        let packed = features.contains(Features::RING_PACKED);
        let told = ring.state.to_vring_base(packed);
        if !ring.ran {
            return Ok(told);
        }
        if packed {
            // The buffer of what is in flight has the positions, once there is anything in it.
            return if self.told.tracks { Ok(told) } else { Err(ProxyError::Lost { queue }) };
        }
        // 2.7.6, 2.7.8: flags, idx.
        let index = |area: GuestAddress| -> Result<u16, ProxyError> {
            let mut idx = [0; 2];
            let addr = area.0.checked_add(2).ok_or(ProxyError::RingMemory { queue })?;
            let read = target.ram.read(GuestAddress(addr), &mut idx);
            read.map(|()| u16::from_le_bytes(idx)).map_err(|_| ProxyError::RingMemory { queue })
        };
        let used = index(ring.config.device)?;
        let certain = features.contains(Features::IN_ORDER) || used == index(ring.config.driver)?;
        if self.told.tracks || certain { Ok(used.into()) } else { Err(ProxyError::Lost { queue }) }
    }

    fn addresses(&self, queue: u16, ring: &Ring, features: Features) -> Result<VringAddr, ProxyError> {
        let size = u64::from(ring.config.size);
        let packed = features.contains(Features::RING_PACKED);
        let (driver, device) = if packed { (4, 4) } else { (6 + 2 * size, 6 + 8 * size) };
        let regions = &self.told.regions;
        let user = |addr: GuestAddress, len: u64| {
            let inside = |region: &&FileRegion| {
                addr.0
                    .checked_sub(region.addr.0)
                    .and_then(|at| at.checked_add(len))
                    .is_some_and(|end| end <= region.len)
            };
            let found = regions.iter().find(inside).and_then(|_| addr.0.checked_add(USER));
            found.ok_or(ProxyError::RingMemory { queue })
        };
        Ok(VringAddr {
            index: queue.into(),
            flags: if ring.logged.is_some() { RING_LOG } else { 0 },
            desc: user(ring.config.desc, 16 * size)?,
            used: user(ring.config.device, device)?,
            avail: user(ring.config.driver, driver)?,
            log: ring.logged.map_or(0, |addr| addr.0),
        })
    }

    /// Writes to the configuration space, and what became of it.
    fn configure(&mut self, target: &Target, report: &mut Report) -> Result<(), ProxyError> {
        if !self.has(ProtocolFeatures::CONFIG) || self.offer.config.is_empty() {
            return Ok(());
        }
        for write in &target.writes {
            let flags = if write.migration { config_flags::MIGRATION } else { config_flags::WRITABLE };
            match self.endpoint()?.set_config(write.offset, flags, &write.data) {
                Ok(()) => {}
                // The driver's mistake, or the back-end's opinion: the field stays as it is.
                Err(Error::Refused { .. }) if !write.migration => report.refused_writes += 1,
                Err(error) => return Err(error.into()),
            }
        }
        if target.refresh || !target.writes.is_empty() {
            // At most 4084: it came in one message.
            let size = self.offer.config.len() as u32;
            report.config = Some(self.endpoint()?.get_config(0, size, 0)?);
        }
        if target.refresh && self.has(ProtocolFeatures::STATUS) {
            let status = Status::from_bits_retain(self.endpoint()?.get_status()?);
            report.needs_reset = status.contains(Status::DEVICE_NEEDS_RESET);
        }
        Ok(())
    }
}

fn message(region: &FileRegion) -> Result<MemoryRegion, ProxyError> {
    let high = || ProxyError::High(region.addr.0);
    let user_addr = region.addr.0.checked_add(USER).ok_or_else(high)?;
    user_addr.checked_add(region.len).ok_or_else(high)?;
    Ok(MemoryRegion { guest_addr: region.addr.0, size: region.len, user_addr, mmap_offset: region.offset })
}
