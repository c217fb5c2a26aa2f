//! The messages about rings (vhost-user, "Ring states").
use std::os::fd::OwnedFd;

use vhost_user::VringAddr;
use vm_virtio::device::{Stop, VirtioDevice};
use vm_virtio::{QueueStart, QueueState, StartError, StopError};

use super::{Refused, Session};
use crate::inflight::Most;
use crate::ring::{KickFile, Notify, Position, RingError, Size};

impl<D: VirtioDevice> Session<'_, D> {
    /// The number of the ring, if there is one.
    fn ring(&self, index: u32) -> Result<usize, Refused> {
        usize::try_from(index).ok().filter(|at| *at < self.rings.len()).ok_or(Refused::NoSuchRing(index))
    }

    /// The ring, if it is stopped.
    fn stopped_ring(&self, index: u32) -> Result<usize, Refused> {
        let at = self.ring(index)?;
        if self.rings[at].running.is_some() { Err(Refused::Started(index)) } else { Ok(at) }
    }

    /// SET_VRING_NUM. A size that is refused leaves the ring without one: it must not run with another than the
    /// driver's.
    pub(super) fn set_num(&mut self, index: u32, num: u32) -> Result<(), Refused> {
        let at = self.stopped_ring(index)?;
        let max = self.guest.engine.queues().get(at).map_or(0, |spec| spec.max_size);
        let refuse = |why| Err(Refused::Size { index, num, why });
        self.rings[at].size = Size::Refused(num);
        let Some(size) = u16::try_from(num).ok().filter(|size| *size <= max) else {
            return refuse("the device's queue is smaller");
        };
        if size == 0 {
            return refuse("a ring has entries");
        }
        // 2.7: split rings only. Before SET_FEATURES the layout is not known, and the start decides.
        if self.acked.is_some() && !self.packed() && !size.is_power_of_two() {
            return refuse("it is not a power of two");
        }
        self.rings[at].size = Size::Set(size);
        Ok(())
    }

    /// SET_VRING_ADDR, possible while the ring runs: to log, which changes nothing here, or to another place.
    pub(super) async fn set_addr(&mut self, addr: VringAddr) -> Result<(), Refused> {
        let index = addr.index;
        let at = self.ring(index)?;
        self.rings[at].addr = Some(addr);
        self.apply_ring_log(at).await;
        if self.rings[at].kick.is_none() {
            return Ok(());
        }
        let place = self.rings[at].place(&self.memory, self.packed());
        if place.is_ok_and(|place| Some(place) == self.rings[at].running) {
            return Ok(());
        }
        self.halt(at).await;
        self.start_if_possible(at).await
    }

    pub(super) fn set_base(&mut self, index: u32, base: u32) -> Result<(), Refused> {
        let at = self.stopped_ring(index)?;
        // Split rings have an index of 16 bits, the rest is reserved and zero.
        if self.acked.is_some() && !self.packed() && base > u32::from(u16::MAX) {
            return Err(Refused::Base { index, base });
        }
        self.rings[at].position = Position::Base(base);
        if let (true, Some(inflight)) = (self.rings[at].told, &self.inflight) {
            inflight.clear(at);
        }
        Ok(())
    }

    /// GET_VRING_BASE: finishes what was taken, stops the ring, says where it would go on. The answer goes out after
    /// the last update of the used ring.
    pub(super) async fn get_base(&mut self, index: u32) -> Result<u32, Refused> {
        let at = self.ring(index)?;
        let packed = self.packed();
        let ran = self.rings[at].running.is_some();
        self.halt(at).await;
        // What there is to say about the ring is said before it is stopped: a suspended device says nothing.
        self.pass_on_events();
        if ran {
            self.remember(at as u16, packed);
        }
        let ring = &mut self.rings[at];
        ring.told = ran && matches!(&ring.position, Position::At(state) if state.avail == state.used);
        let base = ring.base(packed);
        ring.position = Position::Base(base);
        ring.kick = None;
        self.forget_reports();
        self.forget_translations().await?;
        Ok(base)
    }

    /// SET_VRING_KICK: starts the ring, without waiting for a kick. On a running ring it changes the file.
    pub(super) async fn set_kick(&mut self, index: u32, fd: Option<OwnedFd>) -> Result<(), Refused> {
        let at = self.ring(index)?;
        self.halt(at).await;
        self.rings[at].asked = None;
        self.rings[at].kick = Some(fd.map_or(KickFile::Poll, KickFile::Fd));
        self.notice_new_driver(at).await;
        self.start_if_possible(at).await
    }

    /// VRING_KICK: announces buffers, and starts the ring if need be. Heard by the ring's lane when this is over, so a
    /// front-end that sends more than that can keep up with waits.
    pub(super) async fn vring_kick(&mut self, index: u32) -> Result<(), Refused> {
        let at = self.ring(index)?;
        if self.rings[at].kick.is_none() {
            self.rings[at].kick = Some(KickFile::InBand);
            self.notice_new_driver(at).await;
            self.start_if_possible(at).await?;
        }
        self.guest.engine.kick_heard(at as u16).await;
        Ok(())
    }

    pub(super) async fn set_call(&mut self, index: u32, fd: Option<OwnedFd>) -> Result<(), Refused> {
        let at = self.ring(index)?;
        self.rings[at].call = Notify::new(fd)?;
        self.exchange_call(at).await;
        Ok(())
    }

    /// Where the interrupts of a ring go has changed.
    pub(super) async fn exchange_call(&mut self, at: usize) {
        if self.rings[at].running.is_some() {
            let in_band = self.in_band();
            let call = self.rings[at].call(in_band.as_ref());
            self.guest.engine.set_call(at as u16, call).await;
        }
    }

    pub(super) fn set_err(&mut self, index: u32, fd: Option<OwnedFd>) -> Result<(), Refused> {
        let at = self.ring(index)?;
        self.rings[at].err = Notify::new(fd)?;
        Ok(())
    }

    pub(super) async fn set_enable(&mut self, index: u32, on: bool) -> Result<(), Refused> {
        let at = self.ring(index)?;
        self.enable(at, on).await;
        Ok(())
    }

    /// Enables or disables a ring, also a stopped one.
    pub(super) async fn enable(&mut self, at: usize, on: bool) {
        self.rings[at].enabled = on;
        self.guest.engine.enable(at as u16, on).await;
    }

    /// Starts a started ring in the engine. One that lacks something which may still come waits for it; any other
    /// failure is a broken ring: the error file is written to and the ring counts as stopped.
    pub(super) async fn start_if_possible(&mut self, at: usize) -> Result<(), Refused> {
        let Err(source) = self.start(at).await else { return Ok(()) };
        let index = at as u32;
        if let Some(miss) = source.miss() {
            if miss.denied {
                // Not by `change_memory`, which starts rings.
                self.memory = self.memory.invalidated(miss.iova, 1)?;
            }
            if self.ring_misses(at, miss) {
                tracing::debug!(guest = self.guest.index, ring = index, "started, but {source}");
                return Ok(());
            }
        }
        if matches!(source, RingError::Incomplete) {
            tracing::debug!(guest = self.guest.index, ring = index, "started, but {source}");
            return Ok(());
        }
        if !source.may_heal() {
            self.signal_error(at).await;
            self.rings[at].kick = None;
        }
        Err(Refused::Ring { index, source })
    }

    async fn start(&mut self, at: usize) -> Result<(), RingError> {
        let packed = self.packed();
        let config = self.rings[at].place(&self.memory, packed)?;
        let state = self.rings[at].state(&config, self.memory.ram(), packed)?;
        self.make_ready().await?;
        let in_band = self.in_band();
        self.apply_ring_log(at).await;
        let ring = &mut self.rings[at];
        let call = ring.call(in_band.as_ref());
        let Some(kick) = &ring.kick else { return Err(RingError::Incomplete) };
        let queue = at as u16;
        let inflight = self.inflight.as_ref().and_then(|inflight| inflight.region(at));
        let start = QueueStart { config, state, inflight, kick: kick.for_engine()?, call };
        let engine = &self.guest.engine;
        // A reset has disabled it in the engine.
        engine.enable(queue, ring.enabled).await;
        match engine.start(queue, start).await {
            Ok(()) => {
                self.rings[at].running = Some(config);
                self.rings[at].asked = None;
                self.rings[at].told = false;
                Ok(())
            }
            Err(error @ (StartError::Queue(_) | StartError::Kick(_) | StartError::TooLarge { .. })) => {
                Err(error.into())
            }
            Err(error) => {
                tracing::error!(guest = self.guest.index, ring = at, %error, "the engine did not start a ring");
                Err(error.into())
            }
        }
    }

    /// What an in-flight buffer of this device can hold.
    pub(super) fn most_in_flight(&self) -> Most {
        let queues = self.guest.engine.queues();
        Most { queues: queues.len(), size: queues.iter().map(|spec| spec.max_size).max().unwrap_or(0) }
    }

    /// Stops a ring if it runs, in order to change something or for good; requests that were taken are finished.
    pub(super) async fn halt(&mut self, at: usize) {
        if self.rings[at].running.is_some() {
            let queue = at as u16;
            let stop = self.guest.engine.stop(queue, Stop::Drain, None);
            let stopped = self.answering(stop).await;
            self.stopped(queue, stopped).await;
        }
    }

    /// Notes where a ring stopped. Requests that did not finish in time are lost with it: the engine says so in the
    /// status, and the front-end hears of it here (failure policy 7).
    pub(super) async fn stopped(&mut self, queue: u16, stopped: Result<QueueState, StopError>) {
        // While the ring still runs: its last interrupts.
        self.send_call(usize::from(queue), true);
        let Some(ring) = self.rings.get_mut(usize::from(queue)) else { return };
        ring.running = None;
        match stopped {
            Ok(state) => ring.position = Position::At(state),
            Err(StopError::Stuck(state)) => {
                tracing::warn!(
                    guest = self.guest.index,
                    ring = queue,
                    "stopped with requests that did not finish"
                );
                ring.position = Position::At(QueueState { held: Vec::new(), ..state });
                self.signal_error(usize::from(queue)).await;
            }
            Err(error) => {
                tracing::error!(guest = self.guest.index, ring = queue, %error, "a ring was not stopped");
            }
        }
    }

    /// Remembers how far the ring got, for the next driver.
    pub(super) fn remember(&self, queue: u16, packed: bool) {
        let at = usize::from(queue);
        if let (Some(ring), Some(slot)) = (self.rings.get(at), self.guest.stopped_at.borrow_mut().get_mut(at))
        {
            *slot = Some(ring.base(packed));
        }
    }
}
