//! What the back-end has to say by itself: changes of the configuration space, errors of rings, and interrupts where
//! they are messages. All of it bounded: news merge while the front-end does not listen.
use std::collections::{BTreeSet, VecDeque};
use std::os::fd::{AsFd, OwnedFd};

use vhost_user::{BackendChannel, BackendCode, BackendRequest, Error, ProtocolFeatures, RequestId};
use vm_virtio::device::VirtioDevice;
use vm_virtio::{HostEvent, ObjectId, QueueError, Ticket};

use super::upcalls::Questions;
use super::{Refused, Session, iommu};
use crate::ring::Notify;
use crate::task::Watch;

/// The socket of SET_BACKEND_REQ_FD.
pub(super) struct Channel {
    pub(super) socket: BackendChannel,
    /// Interrupts that are not acknowledged, in the order of their messages, and whose ring they are of.
    calls: VecDeque<(RequestId, usize)>,
    /// What workers asked.
    pub(super) questions: Questions,
    /// Exported objects that the front-end was told of, and the state of [`Events::exports`](crate::events::Events)
    /// when it was.
    objects: BTreeSet<ObjectId>,
    exports: u64,
    _watch: Watch,
}

impl Channel {
    pub(super) fn set_protocol_features(&mut self, negotiated: ProtocolFeatures) {
        self.socket.set_protocol_features(negotiated);
    }

    /// Sends what waits.
    fn flush(&mut self) -> Result<(), Error> {
        if self.socket.wants_write() { self.socket.flush() } else { Ok(()) }
    }

    fn call(&mut self, ring: usize) -> Result<(), Error> {
        // Rings have 16-bit numbers.
        let id = self.socket.request(BackendRequest::VringCall { index: ring as u32 }, true)?;
        self.calls.push_back((id, ring));
        Ok(())
    }
}

impl<D: VirtioDevice> Session<'_, D> {
    pub(super) fn set_channel(&mut self, fd: OwnedFd) -> Result<(), Refused> {
        let socket = BackendChannel::new(fd, self.endpoint.protocol_features())?;
        let token = self.guest.tokens().channel();
        // The former channel's watch must be gone before its token is used again.
        self.lose_channel();
        let watch = Watch::new(&self.guest.host.reactor, token, socket.as_fd())?;
        self.channel = Some(Channel {
            socket,
            calls: VecDeque::new(),
            questions: Questions::new(),
            objects: BTreeSet::new(),
            exports: 0,
            _watch: watch,
        });
        self.guest.upcalls.open();
        Ok(())
    }

    pub(super) fn lose_channel(&mut self) {
        if let Some(channel) = self.channel.take() {
            self.give_up_questions(channel.questions);
        }
        self.rings.iter().filter_map(|ring| ring.in_band.as_ref()).for_each(|call| call.lost());
    }

    /// Tells the front-end that a ring is broken. A file is not written on this thread: the front-end can make it block.
    /// Whoever can be made to do so again and again waits for the ticket, so that no more than one is under way.
    pub(super) fn signal_error(&mut self, at: usize) -> Ticket<()> {
        let Some(ring) = self.rings.get(at) else { return Ticket::ready(()) };
        match &ring.err {
            Notify::File(file) => return self.guest.engine.signal(at as u16, file.clone()),
            // Not of a ring that was stopped meanwhile: a suspended device sends no messages.
            Notify::Unsaid if self.in_band().is_some() && ring.kick.is_some() => {
                let error = BackendRequest::VringErr { index: at as u32 };
                self.with_channel(|channel| channel.socket.request(error, true).map(|_| ()));
            }
            _ => {}
        }
        Ticket::ready(())
    }

    /// Errors of rings, interrupts and changes of the configuration space to the front-end; its acknowledgements.
    pub(super) fn pass_on_events(&mut self) {
        for event in self.guest.events.take() {
            self.guest.log_event(&event);
            match event {
                HostEvent::Miss { miss, .. } => {
                    if miss.denied {
                        self.denied.push(miss.iova);
                    }
                    self.report(iommu::miss(miss));
                }
                HostEvent::QueueFault { queue, error } => {
                    if let QueueError::Denied(miss) = error {
                        self.report(iommu::access_fail(miss));
                    }
                    // Once per start of a ring.
                    drop(self.signal_error(usize::from(queue)));
                }
                // A worker that failed serves no ring any more. After the fault of one ring the others go on.
                HostEvent::NeedsReset { .. } if self.guest.worker_failed() => {
                    for at in 0..self.rings.len() {
                        if self.rings[at].running.is_some() {
                            drop(self.signal_error(at));
                        }
                    }
                }
                _ => {}
            }
        }
        self.hear_channel();
        self.send_reports();
        self.ask_front_end();
        // "Suspended device state": no messages to the front-end while no ring runs. The news is kept.
        if self.is_suspended() {
            return;
        }
        self.send_calls();
        self.tell_objects();
        let wanted = wants_config(self.endpoint.protocol_features());
        if self.channel.is_some() && wanted && self.guest.events.config_changed() {
            self.guest.events.config_told();
            self.with_channel(|channel| channel.socket.config_changed().map(|_| ()));
        }
    }

    /// What the device exports, as far as the front-end does not know it: a new channel is told everything. As much as
    /// the channel takes; the rest when it is empty again.
    fn tell_objects(&mut self) {
        if !self.endpoint.protocol_features().contains(ProtocolFeatures::SHARED_OBJECT) {
            return;
        }
        let events = &self.guest.events;
        let Some(channel) = self.channel.as_mut().filter(|channel| !channel.socket.wants_write()) else {
            return;
        };
        let exports = events.exports();
        if channel.exports == exports {
            return;
        }
        let objects = events.objects();
        let gone: Vec<_> = channel.objects.difference(&objects).copied().collect();
        let new: Vec<_> = objects.difference(&channel.objects).copied().collect();
        self.with_channel(|channel| {
            let gone = gone.into_iter().map(|id| (id, BackendRequest::SharedObjectRemove(id)));
            let new = new.into_iter().map(|id| (id, BackendRequest::SharedObjectAdd(id)));
            for (id, request) in gone.chain(new) {
                if channel.socket.wants_write() {
                    return Ok(());
                }
                channel.socket.request(request, false)?;
                if !channel.objects.remove(&id) {
                    channel.objects.insert(id);
                }
            }
            channel.exports = exports;
            Ok(())
        });
    }

    /// One message for each ring that has used buffers since its last; see `inband.rs`.
    fn send_calls(&mut self) {
        for at in 0..self.rings.len() {
            self.send_call(at, false);
        }
    }

    /// The same for one ring. `last`: it stops.
    pub(super) fn send_call(&mut self, at: usize, last: bool) {
        let Some(ring) = self.rings.get(at).filter(|ring| ring.running.is_some()) else { return };
        if self.channel.is_some() && ring.in_band.as_ref().is_some_and(|call| call.take(last)) {
            self.with_channel(|channel| channel.call(at));
        }
    }

    /// Sends what waits and takes the answers that came.
    pub(super) fn hear_channel(&mut self) {
        self.with_channel(Channel::flush);
        while let Some(channel) = &mut self.channel {
            match channel.socket.receive() {
                Ok(None) => return,
                Ok(Some(reply)) => {
                    if reply.value != 0 {
                        let (code, value) = (reply.code, reply.value);
                        tracing::warn!(guest = self.guest.index, %code, value, "the front-end refused a request");
                    }
                    if reply.code == BackendCode::VringCall
                        && let Some((_, ring)) = channel.calls.pop_front_if(|(id, _)| *id == reply.id)
                        && !channel.calls.iter().any(|(_, other)| *other == ring)
                        && let Some(call) = self.rings.get(ring).and_then(|ring| ring.in_band.as_ref())
                    {
                        call.acknowledged();
                    } else if let Some(question) = channel.question(reply.id) {
                        self.answered(question, reply);
                    }
                }
                Err(error) => {
                    self.channel_ended(&error);
                    return;
                }
            }
        }
    }

    pub(super) fn with_channel(&mut self, what: impl FnOnce(&mut Channel) -> Result<(), Error>) {
        let Some(channel) = &mut self.channel else { return };
        if let Err(error) = what(channel) {
            self.channel_ended(&error);
        }
    }

    pub(super) fn channel_ended(&mut self, error: &Error) {
        let (guest, what) = (self.guest.index, "the channel for requests to the front-end has ended");
        match error {
            Error::Disconnected => tracing::debug!(guest, "{what}"),
            error => tracing::warn!(guest, %error, "{what}"),
        }
        self.lose_channel();
    }
}

/// Whether the front-end wants to hear of configuration changes.
fn wants_config(negotiated: ProtocolFeatures) -> bool {
    negotiated.contains(ProtocolFeatures::BACKEND_REQ | ProtocolFeatures::CONFIG)
}
