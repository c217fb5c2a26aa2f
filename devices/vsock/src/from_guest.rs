//! The tx queue: packets of the guest.
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::Shutdown;
use vm_virtio::queue::Reader;
use vm_virtio::{Chain, Lane, Queue};

use crate::backend::Dialed;
use crate::flow::{Flow, Heard, Key, Phase};
use crate::packet::{HEADER, HOST_CID, Header, Kind, Op};
use crate::syscall::{self, Source};
use crate::table::{Id, Slot, Stage};
use crate::worker::{STRAY, TX, VsockWorker};

/// A busy listener is tried again after this.
pub(crate) const REDIAL: Duration = Duration::from_millis(10);

/// Packets of one connection that go to its socket together.
const BATCH: usize = 32;
/// The same in bytes: what a socket of the host takes at once, about.
const BATCH_BYTES: usize = 256 << 10;

impl VsockWorker {
    pub(crate) fn serve_tx(&mut self, lane: &mut Lane<'_>) {
        let Some(queue) = lane.queues.get(TX) else { return };
        // Each packet makes one RST at most.
        while self.stray.len() < STRAY {
            let Some(chain) = queue.pop() else { break };
            self.take(queue, chain);
        }
        self.send_batch(queue);
    }

    /// One packet. Its chain is completed here or by [`Self::send_batch`].
    fn take(&mut self, queue: &mut Queue, chain: Chain) {
        let mut reader = queue.reader(&chain);
        let Ok(header) = reader.read_obj::<Header>() else {
            queue.note_refused();
            return queue.add_used(chain, 0);
        };
        if header.src_cid.get() != u64::from(self.cid) {
            // 5.10.6.4.1: nobody to answer to.
            queue.note_refused();
            return queue.add_used(chain, 0);
        }
        let len = header.len.get();
        let is_data = header.op.get() == Op::Rw.number();
        let is_short = is_data && reader.remaining() < u64::from(len);
        // The upper half of a context ID is reserved: there is no such destination.
        let key = u32::try_from(header.dst_cid.get()).ok().map(|peer_cid| Key {
            peer_cid,
            peer_port: header.dst_port.get(),
            guest_port: header.src_port.get(),
        });
        let known = key.and_then(|key| self.table.find(key));
        if is_data
            && !is_short
            && let Some(id) = known
            && let Some(slot) = self.table.get(id)
            && slot.flow.kind() == Kind::Stream
            && slot.is_direct()
        {
            if self.batch.id.is_some_and(|other| other != id) {
                self.send_batch(queue);
            }
            return self.take_data(queue, chain, id, &header);
        }
        self.send_batch(queue);
        match (known, key) {
            (Some(id), _) => {
                // The reader is made again: sending needed the queue.
                let mut reader = queue.reader(&chain);
                reader.skip(HEADER);
                if is_short {
                    queue.note_refused();
                    if let Some(slot) = self.table.get(id) {
                        slot.flow.abort();
                    }
                    self.ended(id);
                } else {
                    self.hear(id, &header, &mut reader);
                }
            }
            (None, Some(key)) if !is_short => self.hear_stranger(key, &header),
            (None, _) => self.refuse(&header),
        }
        if is_data {
            queue.note_read(u64::from(len));
        }
        queue.add_used(chain, 0);
    }

    /// Payload of a stream that goes straight to its socket.
    fn take_data(&mut self, queue: &mut Queue, chain: Chain, id: Id, header: &Header) {
        let Some(slot) = self.table.get(id) else { return };
        match slot.flow.hear(header) {
            Heard::Data { .. } => {
                let len = header.len.get();
                self.batch.id = Some(id);
                self.batch.bytes += len as usize;
                self.batch.chains.push((chain, len));
                if self.batch.chains.len() >= BATCH || self.batch.bytes >= BATCH_BYTES {
                    self.send_batch(queue);
                }
            }
            Heard::Broken => {
                queue.note_refused();
                queue.add_used(chain, 0);
                // What came before it was right.
                self.send_batch(queue);
                self.ended(id);
            }
            _ => {
                queue.add_used(chain, 0);
                self.settle(id);
            }
        }
    }

    /// Hands the collected payload to its socket, and what does not find room there to the backlog.
    fn send_batch(&mut self, queue: &mut Queue) {
        let Some(id) = self.batch.id.take() else { return };
        let total = std::mem::take(&mut self.batch.bytes);
        let mut done = 0;
        if let Some(slot) = self.table.get(id) {
            let mut failed = None;
            while let Some(socket) = slot.socket.as_ref().filter(|_| done < total) {
                match send_from(queue, &self.batch.chains, done, socket.as_fd()) {
                    Ok((sent, wanted)) => {
                        done += sent;
                        slot.writable = sent == wanted;
                    }
                    Err(Errno::AGAIN) => slot.writable = false,
                    Err(error) => failed = Some(error),
                }
                if failed.is_some() || !slot.writable {
                    break;
                }
            }
            slot.flow.forwarded(u32::try_from(done).unwrap_or(u32::MAX));
            match failed {
                // The guest's memory is gone (failure policy 6): its flow's loss.
                Some(Errno::FAULT) => {
                    queue.note_failed();
                    slot.flow.abort();
                }
                Some(_) => deafen(slot),
                None => {
                    let mut skip = done;
                    for (chain, len) in &self.batch.chains {
                        let (len, gone) = (*len as usize, skip.min(*len as usize));
                        skip -= gone;
                        if gone < len {
                            let mut reader = queue.reader(chain);
                            reader.skip(HEADER + gone);
                            slot.backlog.append(&mut reader, len - gone);
                        }
                    }
                }
            }
        }
        queue.note_read(total as u64);
        for (chain, _) in self.batch.chains.drain(..) {
            queue.add_used(chain, 0);
        }
        self.ended(id);
    }

    /// A packet of a flow that exists.
    fn hear(&mut self, id: Id, header: &Header, payload: &mut Reader<'_>) {
        let Some(slot) = self.table.get(id) else { return };
        match slot.flow.hear(header) {
            Heard::Nothing => {}
            Heard::Opened => self.opened(id),
            Heard::Data { eom, eor } => {
                let len = header.len.get() as usize;
                match slot.flow.kind() {
                    Kind::Stream => slot.backlog.append(payload, len),
                    Kind::SeqPacket if eom && slot.is_direct() => message_from(slot, payload, len, eor),
                    Kind::SeqPacket => {
                        slot.backlog.append(payload, len);
                        if eom {
                            end_message(slot, eor);
                        }
                    }
                }
                drain(slot);
            }
            Heard::Shut => shut_by_guest(slot),
            Heard::Reset => return self.table.remove(id),
            Heard::Broken => {}
        }
        self.ended(id);
    }

    /// After something that may have ended a connection: its socket goes with it, unless a client has still to take what
    /// the guest has sent.
    pub(crate) fn ended(&mut self, id: Id) {
        let Some(slot) = self.table.get(id) else { return };
        if slot.flow.phase() == Phase::Over {
            slot.inbox = None;
            slot.readable = false;
            let closed_by_guest = !slot.flow.guest_will_send() && !slot.flow.guest_will_receive();
            if closed_by_guest && slot.has_output() && slot.socket.is_some() {
                self.table.set_deadline(id, Some(Instant::now() + self.timeouts.drain));
            } else {
                slot.socket = None;
                slot.backlog.clear();
                self.table.set_deadline(id, None);
            }
        } else if slot.flow.host_is_gone() && slot.socket.take().is_some() {
            slot.inbox = None;
            slot.backlog.clear();
            self.table.set_deadline(id, Some(Instant::now() + self.timeouts.close));
        }
        self.settle(id);
    }

    /// A packet of a flow that does not exist.
    fn hear_stranger(&mut self, key: Key, header: &Header) {
        match (Op::of(header.op.get()), Kind::of(header.kind.get())) {
            // Never an RST for an RST.
            (Some(Op::Rst), _) => {}
            (Some(Op::Request), Some(kind)) if self.knows(kind) => {
                if !self.call(key, kind, header) {
                    self.refuse(header);
                }
            }
            _ => self.refuse(header),
        }
    }

    /// 5.10.6.4.2, 5.10.6.5.
    fn refuse(&mut self, header: &Header) {
        if header.op.get() != Op::Rst.number() {
            self.stray.push_back(header.rst());
            self.gauges.resets.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The guest wants a connection. False: it is refused.
    fn call(&mut self, key: Key, kind: Kind, header: &Header) -> bool {
        let promise = self.promise(kind);
        let (stage, socket) = if key.peer_cid == HOST_CID {
            match self.host.dial(kind, key.peer_port) {
                Dialed::Connected(socket) => (Stage::Live, Some(socket)),
                Dialed::Pending(socket) => (Stage::Dialing, Some(socket)),
                Dialed::Busy => (Stage::Redial { until: Instant::now() + self.timeouts.connect }, None),
                Dialed::Refused(error) => {
                    tracing::debug!(port = key.peer_port, "nothing to connect to: {error}");
                    return false;
                }
            }
        } else if key.peer_cid == self.cid {
            return false;
        } else {
            let from = (self.cid, key.guest_port);
            let to = (key.peer_cid, key.peer_port);
            match self.exchange.call(&self.groups, kind, from, to, promise) {
                Ok(socket) => (Stage::Sibling, Some(socket)),
                Err(_) => return false,
            }
        };
        let flow = Flow::asked(kind, header, promise);
        let Some(id) = self.table.insert(Slot::new(flow, stage, socket)) else { return false };
        if !self.watch(id) {
            self.table.remove(id);
            return false;
        }
        self.table.name(id, key);
        let timeout = if matches!(stage, Stage::Redial { .. }) { REDIAL } else { self.timeouts.connect };
        match stage {
            Stage::Live => self.answered(id),
            _ => self.table.set_deadline(id, Some(Instant::now() + timeout)),
        }
        true
    }

    /// What the guest called is there.
    pub(crate) fn answered(&mut self, id: Id) {
        let Some(slot) = self.table.get(id) else { return };
        slot.stage = Stage::Live;
        slot.flow.accept();
        self.gauges.opened.fetch_add(1, Ordering::Relaxed);
        self.table.set_deadline(id, None);
        self.settle(id);
    }

    /// What happens to a connection's socket is told from now on.
    pub(crate) fn watch(&mut self, id: Id) -> bool {
        let Some(slot) = self.table.get(id) else { return false };
        // The end of connect(2) is room.
        slot.room_watched = slot.stage == Stage::Dialing;
        match &slot.socket {
            Some(socket) => self.poller.add(socket.as_fd(), id.number(), slot.room_watched).is_ok(),
            None => true,
        }
    }
}

/// Sends what is in the chains from `skip` on; how much that was, and how much it would have been.
fn send_from(
    queue: &Queue,
    chains: &[(Chain, u32)],
    mut skip: usize,
    socket: BorrowedFd<'_>,
) -> Result<(usize, usize), Errno> {
    let mut source = Source::new();
    for (chain, len) in chains {
        let len = *len as usize;
        if skip >= len {
            skip -= len;
            continue;
        }
        let mut reader = queue.reader(chain);
        reader.skip(HEADER + skip);
        let wanted = len - std::mem::take(&mut skip);
        if source.guest(&reader, wanted) < wanted {
            break;
        }
    }
    let wanted = source.len();
    Ok((syscall::send(socket, source, false)?, wanted))
}

/// A whole message, straight to its socket; to the backlog if that has no room.
fn message_from(slot: &mut Slot, payload: &mut Reader<'_>, len: usize, eor: bool) {
    let mut source = Source::new();
    let fits = source.guest(payload, len) == len;
    let sent = match &slot.socket {
        Some(socket) if fits => syscall::send(socket.as_fd(), source, eor),
        _ => Err(Errno::AGAIN),
    };
    match sent {
        Ok(_) => slot.flow.forwarded(u32::try_from(len).unwrap_or(u32::MAX)),
        Err(Errno::AGAIN) => {
            slot.writable &= !fits;
            slot.backlog.append(payload, len);
            end_message(slot, eor);
        }
        Err(error) => fail(slot, error),
    }
}

/// The message in the backlog is complete. More of them than bytes of credit can only be empty ones, without end.
fn end_message(slot: &mut Slot, eor: bool) {
    if !slot.backlog.end_message(eor, slot.flow.buf_alloc()) {
        slot.flow.abort();
    }
}

/// Sends what is in the backlog, as far as there is room.
pub(crate) fn drain(slot: &mut Slot) {
    while slot.writable && slot.has_output() {
        let Some(socket) = &slot.socket else { return };
        let mut source = Source::new();
        let (wanted, eor) = match slot.flow.kind() {
            Kind::Stream => (source.own(slot.backlog.stream()), false),
            Kind::SeqPacket => match slot.backlog.message() {
                Some((bytes, message)) => (source.own(bytes), message.eor),
                None => return,
            },
        };
        match syscall::send(socket.as_fd(), source, eor) {
            Ok(sent) => {
                match slot.flow.kind() {
                    Kind::Stream => slot.backlog.consume(sent),
                    Kind::SeqPacket => slot.backlog.consume_message(),
                }
                slot.flow.forwarded(u32::try_from(sent).unwrap_or(u32::MAX));
                slot.writable = sent == wanted;
            }
            Err(Errno::AGAIN) => slot.writable = false,
            Err(error) => return fail(slot, error),
        }
    }
    if !slot.has_output() && !slot.flow.guest_will_send() {
        end_output(slot);
    }
}

fn fail(slot: &mut Slot, error: Errno) {
    match error {
        // Too long for this socket, or memory that is gone: the message cannot be delivered, so the flow is broken.
        Errno::MSGSIZE | Errno::FAULT => slot.flow.abort(),
        _ => deafen(slot),
    }
}

/// The host's side receives nothing more; it may still have sent something.
fn deafen(slot: &mut Slot) {
    slot.backlog.clear();
    slot.flow.host_deaf();
}

/// The guest sends nothing more, and all that it sent is delivered: the host's side gets to see the end.
fn end_output(slot: &mut Slot) {
    if slot.flow.phase() == Phase::Over {
        slot.socket = None;
    } else if let Some(socket) = slot.socket.as_ref().filter(|_| !slot.output_ended) {
        // Once: a shutdown is an event of the socket, whatever it was before.
        let _ = rustix::net::shutdown(socket, Shutdown::Write);
        slot.output_ended = true;
    }
}

/// 5.10.6.5: the guest has shut down one direction or both.
fn shut_by_guest(slot: &mut Slot) {
    if !slot.flow.guest_will_receive() {
        slot.inbox = None;
        slot.readable = false;
        if let Some(socket) = &slot.socket {
            let _ = rustix::net::shutdown(socket, Shutdown::Read);
        }
    }
    if !slot.flow.guest_will_send() && !slot.has_output() {
        end_output(slot);
    }
    if !slot.flow.guest_will_send() && !slot.flow.guest_will_receive() {
        slot.flow.abort();
    }
}
