//! Features, protocol features, status and reset.
//!
//! Virtio wants the status to say when a driver is ready; vhost-user had no status at first, and with
//! `VHOST_USER_PROTOCOL_F_STATUS` front-ends use it in different ways:
//!
//! * One that passes on what the driver writes sets DRIVER before anything else. Its rings wait for DRIVER_OK.
//! * QEMU (11.1) sets FEATURES_OK alone, starts rings when the driver has set DRIVER_OK, and *then* sets
//!   ACKNOWLEDGE | DRIVER | DRIVER_OK - but not for its generic devices (`vhost-user-rng`, `-gpio`, `-i2c`, ...), for
//!   which FEATURES_OK is all that ever comes.
//! * Without the feature, nothing comes.
//!
//! So unless the front-end has set DRIVER, a ring that it starts says that the driver is ready, and the session makes
//! the missing steps itself ([`Session::make_ready`]). GET_STATUS does not show them.
use std::sync::Arc;

use vhost_user::{F_LOG_ALL, F_PROTOCOL_FEATURES, ProtocolFeatures};
use vm_virtio::device::VirtioDevice;
use vm_virtio::{FeatureError, Features, HostRequests, QueueState, Status, WaitFor};

use super::{Refused, Session};
use crate::ring::{Notify, Position, RingError, first_base};
use crate::task::TaskWaker;

/// What devices have that know these requests of the host.
const OF_DEVICES: [(HostRequests, ProtocolFeatures); 4] = [
    (HostRequests::ANNOUNCE, ProtocolFeatures::RARP),
    (HostRequests::NET_MTU, ProtocolFeatures::MTU),
    (HostRequests::CRYPTO_SESSIONS, ProtocolFeatures::CRYPTO_SESSION),
    (HostRequests::SHARED_OBJECTS, ProtocolFeatures::SHARED_OBJECT),
];

/// What a device has, beyond what every device has.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Has {
    /// A configuration space.
    pub(crate) config: bool,
    /// Shared memory regions.
    pub(crate) shared_memory: bool,
    /// A state that can be saved.
    pub(crate) state: bool,
    /// What it knows of the host's requests.
    pub(crate) requests: HostRequests,
}

/// Everything that is implemented for every device, and for those that have what it is about.
pub(crate) fn protocol_features(device: Has) -> ProtocolFeatures {
    let always = ProtocolFeatures::MQ
        | ProtocolFeatures::LOG_SHMFD
        | ProtocolFeatures::REPLY_ACK
        | ProtocolFeatures::BACKEND_REQ
        | ProtocolFeatures::RESET_DEVICE
        | ProtocolFeatures::INBAND_NOTIFICATIONS
        | ProtocolFeatures::CONFIGURE_MEM_SLOTS
        | ProtocolFeatures::INFLIGHT_SHMFD
        | ProtocolFeatures::STATUS;
    let known = OF_DEVICES.into_iter().map(|(request, feature)| (device.requests.contains(request), feature));
    let parts = [
        (device.config, ProtocolFeatures::CONFIG),
        // Files to map go to the front-end.
        (device.shared_memory, ProtocolFeatures::SHMEM_MAP | ProtocolFeatures::BACKEND_SEND_FD),
        (device.state, ProtocolFeatures::DEVICE_STATE),
    ];
    let own = parts.into_iter().chain(known).filter_map(|(there, features)| there.then_some(features));
    own.fold(always, ProtocolFeatures::union)
}

impl<D: VirtioDevice> Session<'_, D> {
    pub(super) fn offered_features(&self) -> u64 {
        self.guest.engine.offered().low64() | F_PROTOCOL_FEATURES | F_LOG_ALL
    }

    pub(super) fn offered_protocol_features(&self) -> ProtocolFeatures {
        let engine = &self.guest.engine;
        protocol_features(Has {
            config: !engine.config().is_empty(),
            shared_memory: !engine.shared_memory().is_empty(),
            state: engine.can_save(),
            requests: engine.host_requests(),
        })
    }

    /// Whether the rings have the packed layout.
    pub(super) fn packed(&self) -> bool {
        self.acked.is_some_and(|features| features.contains(Features::RING_PACKED))
    }

    fn has_status(&self) -> bool {
        self.endpoint.protocol_features().contains(ProtocolFeatures::STATUS)
    }

    /// Whether any ring is started, running or not.
    pub(super) fn is_started(&self) -> bool {
        self.rings.iter().any(|ring| ring.kick.is_some())
    }

    pub(super) fn is_suspended(&self) -> bool {
        self.rings.iter().all(|ring| ring.running.is_none())
    }

    /// SET_FEATURES. The same set again changes nothing (front-ends repeat it). Another one is possible while all
    /// rings are stopped: then it is a new driver, and the device is reset for it if the last one had got as far as
    /// FEATURES_OK. A device that waits for its reset gets it here as well, since not every front-end can ask for one.
    pub(super) async fn set_features(&mut self, bits: u64) -> Result<(), Refused> {
        let excess = bits & !self.offered_features();
        if excess != 0 {
            return Err(FeatureError::NotOffered(excess.into()).into());
        }
        let features = Features::from(bits & !(F_PROTOCOL_FEATURES | F_LOG_ALL));
        let translated = features.contains(Features::ACCESS_PLATFORM);
        if translated && !self.endpoint.protocol_features().contains(ProtocolFeatures::BACKEND_REQ) {
            return Err(Refused::NoTranslations);
        }
        let engine = &self.guest.engine;
        let status = engine.status();
        let negotiated = status.contains(Status::FEATURES_OK) && engine.driver_features() != features;
        let broken = status.intersects(Status::DEVICE_NEEDS_RESET | Status::FAILED);
        if (negotiated || broken) && self.is_suspended() {
            self.reset().await;
            // Where a ring of the other features stopped means nothing to these.
            for ring in &mut self.rings {
                if matches!(ring.position, Position::At(_)) {
                    ring.position = Position::Start;
                }
            }
        }
        engine.set_driver_features(features)?;
        self.acked = Some(features);
        if translated != self.memory.is_translated() {
            let next = self.memory.behind_iommu(translated)?;
            self.change_memory(next, WaitFor::NewRequests).await;
        }
        self.forget_translations().await?;
        let log = bits & F_LOG_ALL != 0;
        if log != std::mem::replace(&mut self.log.wanted, log) {
            self.apply_log().await;
        }
        self.enable_rules = bits & F_PROTOCOL_FEATURES != 0;
        if !self.enable_rules {
            // "The back-end must enable all rings immediately."
            for queue in 0..self.rings.len() {
                self.enable(queue, true).await;
            }
        }
        Ok(())
    }

    pub(super) async fn set_protocol_features(&mut self, features: ProtocolFeatures) -> Result<(), Refused> {
        let excess = features.difference(self.offered_protocol_features());
        if !excess.is_empty() {
            return Err(Refused::NotOffered(excess));
        }
        if let Some((feature, needed)) = features.unmet() {
            return Err(Refused::Unmet(feature, needed));
        }
        // Before the answer: whether there is one depends on it.
        self.endpoint.set_protocol_features(features);
        if let Some(channel) = &mut self.channel {
            channel.set_protocol_features(features);
        }
        // Where interrupts go without a file depends on it.
        for at in 0..self.rings.len() {
            if matches!(self.rings[at].call, Notify::Unsaid) {
                self.exchange_call(at).await;
            }
        }
        Ok(())
    }

    /// What to wake for interrupts and errors that have no file, if they are messages then.
    pub(super) fn in_band(&self) -> Option<Arc<TaskWaker>> {
        let negotiated = self.endpoint.protocol_features();
        let in_band = negotiated.contains(ProtocolFeatures::INBAND_NOTIFICATIONS);
        in_band.then(|| self.guest.events.waker().clone())
    }

    /// Resets the device, with which nothing is in flight any more.
    async fn reset(&mut self) {
        self.guest.reset().await;
        if let Some(inflight) = &self.inflight {
            inflight.clear_all();
        }
    }

    /// RESET_DEVICE and SET_STATUS(0).
    pub(super) async fn reset_device(&mut self) {
        self.guest.shmem.borrow_mut().forget();
        self.reset().await;
        for ring in &mut self.rings {
            ring.reset();
            // Without bit 30 there is no message that would enable it again.
            ring.enabled = !self.enable_rules;
        }
        self.forget_reports();
    }

    pub(super) async fn set_status(&mut self, status: u8) -> Result<(), Refused> {
        let status = Status::from_bits_retain(status);
        if status.is_empty() {
            self.reset_device().await;
            return Ok(());
        }
        let engine = &self.guest.engine;
        if let Some(acked) = self.acked.filter(|acked| {
            status.contains(Status::FEATURES_OK)
                && !engine.status().contains(Status::FEATURES_OK)
                && engine.driver_features() != *acked
        }) {
            // A reset forgot the features that this connection chose before.
            engine.set_driver_features(acked)?;
        }
        engine.set_status(status).await;
        self.guest.implied.set(self.guest.implied.get() - status);
        Ok(())
    }

    /// Called when ring `at` is about to start: resets the device if the driver behind it begins from scratch, that is
    /// if the ring starts at the beginning although it had got further, as far as the rings that run already do not
    /// contradict. A mapping in shared memory says as much as a ring that had got further, unless it may be of a ring
    /// that runs: the front-end has unmapped it if this is a reset, and the device would count on it for ever. If it is
    /// none - the VM was paused before its driver's first request - the device maps again what it maps by itself.
    ///
    /// Some front-ends neither set the status to 0 nor send RESET_DEVICE (QEMU for its generic devices): a guest's
    /// reboot, or a driver that is bound again, looks no different through them. Nor does a new VM on the socket of one
    /// that was killed. The device must not go on with what the other driver left.
    pub(super) async fn notice_new_driver(&mut self, at: usize) {
        let packed = self.packed();
        let (Some(acked), Some(ring)) = (self.acked, self.rings.get(at)) else { return };
        // A ring that has an in-flight region goes on where that says, wherever the front-end believes it to be.
        if self.inflight.as_ref().is_some_and(|inflight| !inflight.is_fresh(at)) {
            return;
        }
        let Ok(config) = ring.place(&self.memory, packed) else { return };
        let Ok(start) = ring.state(&config, self.memory.ram(), packed) else { return };
        let begins = start.is_none_or(|state| state == QueueState::new());
        let others: Vec<usize> = (0..).zip(&self.rings).filter_map(|(i, r)| r.running.map(|_| i)).collect();
        {
            let stopped_at = self.guest.stopped_at.borrow();
            let got_further = |ring: usize| {
                stopped_at.get(ring).copied().flatten().is_some_and(|base| base != first_base(packed))
            };
            let mapped = others.is_empty() && !self.guest.shmem.borrow().mapped.is_empty();
            let left_off = got_further(at) || mapped;
            if !begins || !left_off || others.iter().any(|other| got_further(*other)) {
                return;
            }
        }
        tracing::debug!(guest = self.guest.index, "the driver begins from scratch; the device is reset");
        for other in &others {
            self.halt(*other).await;
        }
        let status = self.guest.status() - Status::DEVICE_NEEDS_RESET;
        self.reset().await;
        let engine = &self.guest.engine;
        // What the front-end has chosen since holds on.
        if let Err(error) = engine.set_driver_features(acked) {
            tracing::warn!(guest = self.guest.index, %error, "after a reset");
        }
        if !status.is_empty() {
            engine.set_status(status).await;
        }
        for other in others {
            if let Err(error) = self.start_if_possible(other).await {
                tracing::warn!(guest = self.guest.index, %error, "after a reset");
            }
        }
    }

    /// Gets the device ready for a ring: takes the steps of the status that the front-end does not.
    pub(super) async fn make_ready(&mut self) -> Result<(), RingError> {
        let acked = self.acked.ok_or(RingError::Features)?;
        let engine = &self.guest.engine;
        // A reset forgot them, and the ring has to have the layout that this connection chose.
        engine.set_driver_features(acked).map_err(|_| RingError::Features)?;
        if self.has_status() && self.guest.status().contains(Status::DRIVER) {
            return Ok(());
        }
        // 3.1.1, steps 2 to 8. FEATURES_OK stays clear if the device refuses the features, and DRIVER_OK with it.
        let before = engine.status();
        if !before.contains(Status::DRIVER_OK) {
            engine.set_status(Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK).await;
            engine.set_status(Status::DRIVER_OK).await;
            let added = (engine.status() - before) - Status::DEVICE_NEEDS_RESET;
            self.guest.implied.set(self.guest.implied.get() | added);
        }
        match engine.status().contains(Status::DRIVER_OK) {
            true => Ok(()),
            false => Err(RingError::Features),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// MQ 0, LOG_SHMFD 1, REPLY_ACK 3, BACKEND_REQ 5, CONFIG 9, INFLIGHT_SHMFD 12, RESET_DEVICE 13,
    /// INBAND_NOTIFICATIONS 14, CONFIGURE_MEM_SLOTS 15, STATUS 16.
    #[test]
    fn exactly_what_is_implemented_is_offered() {
        let bits = |list: &[u32]| list.iter().fold(0u64, |bits, bit| bits | 1 << bit);
        let none = Has::default();
        let always = bits(&[0, 1, 3, 5, 12, 13, 14, 15, 16]);
        assert_eq!(protocol_features(none).bits(), always);
        let parts = [
            (Has { config: true, ..none }, bits(&[9])),
            (Has { shared_memory: true, ..none }, bits(&[10, 22])),
            (Has { state: true, ..none }, bits(&[19])),
            (Has { requests: HostRequests::all(), ..none }, bits(&[2, 4, 7, 18])),
            // A display has a socket, and no feature for it.
            (Has { requests: HostRequests::GPU_SOCKET, ..none }, 0),
        ];
        for (has, own) in parts {
            assert_eq!(protocol_features(has).bits(), always | own, "{has:?}");
        }
        let all = Has { config: true, shared_memory: true, state: true, requests: HostRequests::all() };
        assert_eq!(protocol_features(all).bits(), parts.iter().fold(always, |bits, (_, own)| bits | own));
        assert_eq!(protocol_features(all).unmet(), None);
    }
}
