//! What the device's workers ask of the front-end: mappings of shared memory, objects of other devices.
//!
//! Questions go out in their order and are always to be acknowledged: a mapping that may or may not be there is none.
//! While the answer to one that was given up is outstanding nothing else is asked, since what the front-end made of it has
//! to be undone first. So a front-end that never answers is asked a few times, once, and each worker hears of it when its
//! own patience ends.
use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::Pin;

use vhost_user::{
    BackendRequest, ChannelReply, Error, MAX_UNANSWERED, ProtocolFeatures, RequestId, ShmemRange,
};
use vm_virtio::device::VirtioDevice;
use vm_virtio::{Responder, ShmRange, Ticket, UpcallError, UpcallReply, UpcallRequest};

use super::Session;
use super::channel::Channel;
use crate::memory::MEMORY_SLOTS;

/// A question that the front-end was asked.
pub(super) struct Question {
    id: RequestId,
    about: About,
    responder: Responder,
}

enum About {
    Map(ShmRange),
    Unmap(ShmRange),
    LookUp,
}

/// Those that are not answered, in the order of their messages.
pub(super) type Questions = VecDeque<Question>;

/// What has to be negotiated for a question.
fn needs(request: &UpcallRequest) -> Option<ProtocolFeatures> {
    let own = match request {
        UpcallRequest::Map { .. } => ProtocolFeatures::SHMEM_MAP | ProtocolFeatures::BACKEND_SEND_FD,
        UpcallRequest::Unmap(_) => ProtocolFeatures::SHMEM_MAP,
        // Always answered.
        UpcallRequest::LookUp(_) => return Some(ProtocolFeatures::SHARED_OBJECT),
        _ => return None,
    };
    Some(own | ProtocolFeatures::REPLY_ACK)
}

fn on_the_wire(range: ShmRange) -> ShmemRange {
    ShmemRange { shmid: range.region, offset: range.offset, len: range.len }
}

impl<D: VirtioDevice> Session<'_, D> {
    /// Waits for a lane that may itself wait for the front-end.
    pub(super) async fn answering<T>(&mut self, mut ticket: Ticket<T>) -> T {
        poll_fn(|context| {
            self.hear_channel();
            self.ask_front_end();
            Pin::new(&mut ticket).poll(context)
        })
        .await
    }

    /// Asks what there is to ask, as far as the channel takes it. Not while no ring runs: "Suspended device state".
    pub(super) fn ask_front_end(&mut self) {
        let guest = self.guest;
        guest.shmem.borrow_mut().notice_resets(&guest.upcalls);
        if self.is_suspended() {
            return;
        }
        while let Some(channel) = &self.channel {
            let in_doubt = channel.questions.iter().any(|question| !question.responder.is_awaited());
            if in_doubt || channel.socket.wants_write() || channel.socket.unanswered() >= MAX_UNANSWERED {
                return;
            }
            let stale = guest.shmem.borrow_mut().stale.pop_front();
            if let Some(range) = stale {
                // Nobody waits for the answer: if it is not mapped any more, so much the better.
                let request = BackendRequest::ShmemUnmap(on_the_wire(range));
                self.with_channel(|channel| match channel.socket.request(request, false) {
                    // It was another front-end's.
                    Err(Error::NotNegotiated(_)) | Ok(_) => Ok(()),
                    Err(error) => Err(error),
                });
                let _ = guest.shmem.borrow_mut().mapped.unmap(range);
            } else if let Some((request, responder)) = guest.upcalls.next() {
                self.ask(request, responder);
            } else {
                return;
            }
        }
    }

    fn ask(&mut self, request: UpcallRequest, responder: Responder) {
        if needs(&request).is_none_or(|needs| !self.endpoint.protocol_features().contains(needs)) {
            responder.respond(Err(UpcallError::Unsupported));
            return;
        }
        let shmem = &self.guest.shmem;
        let (about, request) = match request {
            UpcallRequest::Map { .. } if self.slots_are_taken() => {
                responder.respond(Err(UpcallError::Busy));
                return;
            }
            UpcallRequest::Map { to, file, file_offset, writable } => {
                if let Err(error) = shmem.borrow_mut().mapped.map(to) {
                    responder.respond(Err(error));
                    return;
                }
                let request = BackendRequest::ShmemMap {
                    range: on_the_wire(to),
                    fd: file,
                    fd_offset: file_offset,
                    writable,
                };
                (About::Map(to), request)
            }
            UpcallRequest::Unmap(range) if !shmem.borrow().mapped.contains(range) => {
                responder.respond(Err(UpcallError::NotMapped));
                return;
            }
            UpcallRequest::Unmap(range) => {
                (About::Unmap(range), BackendRequest::ShmemUnmap(on_the_wire(range)))
            }
            UpcallRequest::LookUp(id) => (About::LookUp, BackendRequest::SharedObjectLookup(id)),
            _ => return,
        };
        self.with_channel(|channel| channel.ask(request, about, responder));
    }

    /// Whether one more mapping may be more than the front-end has memory slots for. QEMU makes a memory region of each, of
    /// all of its vhost-user devices, and ends with an assertion when there are too many (11.1). It tells of the region
    /// after it has answered: one may be on its way, and so may those of mappings that are asked for.
    fn slots_are_taken(&self) -> bool {
        let coming = 1 + self.channel.as_ref().map_or(0, |channel| channel.questions.len());
        self.memory.slots() + coming >= MEMORY_SLOTS
    }

    /// The channel is gone: who waits for an answer gets none, and what the front-end maps yet is stale.
    pub(super) fn give_up_questions(&mut self, questions: Questions) {
        self.guest.upcalls.close();
        let shmem = &mut self.guest.shmem.borrow_mut();
        shmem.stale.extend(questions.into_iter().filter_map(|question| match question.about {
            About::Map(range) => Some(range),
            About::Unmap(_) | About::LookUp => None,
        }));
    }

    /// An answer of the front-end.
    pub(super) fn answered(&self, question: Question, reply: ChannelReply) {
        let Question { about, responder, .. } = question;
        let mut shmem = self.guest.shmem.borrow_mut();
        let outcome = match (about, reply.value, reply.fd) {
            (About::Map(range), 0, _) => {
                if !responder.respond(Ok(UpcallReply::Done)) {
                    shmem.stale.push_back(range);
                }
                return;
            }
            (About::Map(range), ..) => {
                let _ = shmem.mapped.unmap(range);
                Err(UpcallError::Refused)
            }
            (About::Unmap(range), 0, _) => {
                let _ = shmem.mapped.unmap(range);
                Ok(UpcallReply::Done)
            }
            (About::LookUp, 0, Some(file)) => Ok(UpcallReply::File(file)),
            (About::Unmap(_) | About::LookUp, ..) => Err(UpcallError::Refused),
        };
        responder.respond(outcome);
    }
}

impl Channel {
    /// What waits for the answer to this request.
    pub(super) fn question(&mut self, id: RequestId) -> Option<Question> {
        self.questions.pop_front_if(|question| question.id == id)
    }

    fn ask(&mut self, request: BackendRequest, about: About, responder: Responder) -> Result<(), Error> {
        let id = self.socket.request(request, true)?;
        self.questions.push_back(Question { id, about, responder });
        Ok(())
    }
}
