//! The rx queue: what the guest is owed, and payload from sockets straight into its buffers. The event queue.
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use rustix::io::Errno;
use vm_virtio::{Chain, Lane, Queue};
use zerocopy::IntoBytes;

use crate::packet::{HEADER, Header, Kind, Op, SEQ_EOM, SEQ_EOR};
use crate::syscall::{self, Sink};
use crate::table::{Id, Inbox, Slot, Stage};
use crate::worker::{EVENT, RX, VsockWorker};

/// Buffers of the guest that one read fills, at most.
const BURST: u8 = 32;

/// Longest message from the host: no socket's default is larger, and it is kept while it waits for the guest's buffers.
const LONGEST_MESSAGE: usize = 4 << 20;

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (5.10.6.7).
const TRANSPORT_RESET: u32 = 0;

/// How a turn of a connection ended.
enum Turn {
    /// It may have more.
    More,
    /// Nothing now.
    Idle,
    /// The guest has no buffer.
    NoBuffer,
}

impl VsockWorker {
    pub(crate) fn serve_rx(&mut self, lane: &mut Lane<'_>) {
        if !self.live {
            return;
        }
        let Some(queue) = lane.queues.get(RX) else { return };
        while let Some(header) = self.stray.front() {
            if !put(queue, header) {
                return;
            }
            self.stray.pop_front();
        }
        while let Some(id) = self.table.next() {
            match self.turn(queue, id) {
                Turn::More => self.table.activate(id),
                Turn::Idle => self.settle(id),
                Turn::NoBuffer => return self.table.put_back(id),
            }
        }
    }

    /// What one connection has for the guest: all that is owed, and one read.
    fn turn(&mut self, queue: &mut Queue, id: Id) -> Turn {
        let cid = self.cid;
        let Some(slot) = self.table.get(id) else { return Turn::Idle };
        let Some(key) = slot.key() else { return Turn::Idle };
        while let Some(op) = slot.flow.owed() {
            let Some(chain) = buffer(queue) else { return Turn::NoBuffer };
            complete(queue, chain, &slot.flow.header(cid, key, op, 0, 0), 0);
            if op == Op::Rst {
                self.gauges.resets.fetch_add(1, Ordering::Relaxed);
                return Turn::Idle;
            }
        }
        if !slot.has_input() || slot.flow.room() == 0 {
            return Turn::Idle;
        }
        let turn = match slot.flow.kind() {
            Kind::Stream if slot.inbox.is_some() => hand_over(queue, slot, cid),
            Kind::Stream => read_stream(queue, slot, cid),
            Kind::SeqPacket => read_message(queue, slot, cid),
        };
        if slot.flow.host_is_gone() || slot.flow.owed().is_some() {
            // The rest of it follows: it has something to say.
            self.ended(id);
        }
        turn
    }

    pub(crate) fn serve_event(&mut self, lane: &mut Lane<'_>) {
        if !self.event_due {
            return;
        }
        let Some(queue) = lane.queues.get(EVENT) else { return };
        while let Some(chain) = queue.pop() {
            let mut writer = queue.writer(&chain);
            let told = writer.write_obj(&TRANSPORT_RESET.to_le_bytes()).is_ok();
            let written = writer.written();
            if !told {
                queue.note_refused();
            }
            queue.add_used(chain, written);
            if told {
                self.event_due = false;
                return;
            }
        }
    }
}

/// A buffer of the guest that has room for a header. One that has not goes back (5.10.6).
fn buffer(queue: &mut Queue) -> Option<Chain> {
    while let Some(chain) = queue.pop() {
        if room(queue, &chain) >= HEADER as u64 {
            return Some(chain);
        }
        queue.note_refused();
        queue.add_used(chain, 0);
    }
    None
}

fn room(queue: &Queue, chain: &Chain) -> u64 {
    queue.writable(chain).iter().map(|segment| segment.len() as u64).sum()
}

/// Completes a buffer that holds `len` bytes of payload behind its header.
fn complete(queue: &mut Queue, chain: Chain, header: &Header, len: usize) {
    queue.writer(&chain).write(header.as_bytes());
    queue.add_used(chain, u32::try_from(HEADER + len).unwrap_or(u32::MAX));
}

fn put(queue: &mut Queue, header: &Header) -> bool {
    match buffer(queue) {
        Some(chain) => {
            complete(queue, chain, header, 0);
            true
        }
        None => false,
    }
}

/// Puts buffers back that were not needed, the latest first.
fn put_back(queue: &mut Queue, chains: impl DoubleEndedIterator<Item = Chain>) {
    for chain in chains.rev() {
        // The latest can always be put back; if not, it goes back empty.
        if let Err(chain) = queue.unpop(chain) {
            queue.add_used(chain, 0);
        }
    }
}

/// Fills as many buffers as the connection's burst, the guest's credit and the socket have something for.
fn read_stream(queue: &mut Queue, slot: &mut Slot, cid: u32) -> Turn {
    let Some(key) = slot.key() else { return Turn::Idle };
    let credit = slot.flow.room() as usize;
    let mut chains: [Option<Chain>; BURST as usize] = [const { None }; BURST as usize];
    let mut parts = [0usize; BURST as usize];
    let (mut used, mut total) = (0, 0);
    while used < usize::from(slot.burst) && total < credit {
        let Some(chain) = buffer(queue) else { break };
        let room = usize::try_from(room(queue, &chain)).unwrap_or(usize::MAX).saturating_sub(HEADER);
        let part = room.min(credit - total);
        if let (Some(place), Some(length)) = (chains.get_mut(used), parts.get_mut(used)) {
            (*place, *length) = (Some(chain), part);
        }
        used += 1;
        total += part;
    }
    let taken = || chains.iter().flatten().zip(parts);
    if used == 0 {
        return Turn::NoBuffer;
    }
    if total == 0 {
        // Room for headers only. They hold what is never wrong.
        let header = slot.flow.header(cid, key, Op::CreditUpdate, 0, 0);
        for chain in chains.into_iter().flatten() {
            complete(queue, chain, &header, 0);
        }
        return Turn::More;
    }
    let Some(socket) = &slot.socket else { return Turn::Idle };
    let mut sink = Sink::new();
    for (chain, part) in taken() {
        let mut writer = queue.writer(chain);
        writer.skip(HEADER);
        if sink.guest(&writer, part) < part {
            break;
        }
    }
    let wanted = sink.len();
    let received = syscall::receive(socket.as_fd(), sink, false);
    let bytes = match &received {
        Ok(received) => received.bytes,
        Err(_) => 0,
    };
    let mut left = bytes;
    let needed = parts
        .iter()
        .take(used)
        .position(|part| {
            let enough = left <= *part;
            left = left.saturating_sub(*part);
            enough
        })
        .map_or(used, |last| last + 1);
    let needed = if bytes == 0 { 0 } else { needed };
    let (filled, spare) = chains.split_at_mut(needed);
    put_back(queue, spare.iter_mut().filter_map(Option::take));
    let mut left = bytes;
    for (chain, part) in filled.iter_mut().filter_map(Option::take).zip(parts) {
        let part = part.min(left);
        left -= part;
        let header = slot.flow.header(cid, key, Op::Rw, u32::try_from(part).unwrap_or(0), 0);
        complete(queue, chain, &header, part);
    }
    match received {
        Ok(_) if bytes == wanted => {
            slot.burst = (slot.burst * 2).min(BURST);
            return Turn::More;
        }
        Ok(received) if bytes > 0 => {
            // All there was, unless the kernel stopped early. At the end of the stream there is no further event.
            slot.readable = slot.ended || received.cut;
            slot.burst = u8::try_from(needed).unwrap_or(BURST).max(1);
            return if slot.readable { Turn::More } else { Turn::Idle };
        }
        Ok(_) => end_of_input(slot),
        Err(Errno::AGAIN) => slot.readable = false,
        // The guest's memory is gone (failure policy 6).
        Err(Errno::FAULT) => {
            queue.note_failed();
            slot.flow.abort();
        }
        Err(_) => {
            slot.readable = false;
            slot.flow.host_gone();
        }
    }
    Turn::Idle
}

/// The host's side sends nothing more; whether it is gone altogether, its socket says.
fn end_of_input(slot: &mut Slot) {
    slot.readable = false;
    let gone = slot.hung_up
        // No bytes are sent, but an error tells whether the peer still reads: AF_VSOCK has no event for that.
        || slot.flow.kind() == Kind::Stream
            && slot.socket.as_ref().is_some_and(|socket| {
                syscall::send(socket.as_fd(), syscall::Source::new(), false) == Err(Errno::PIPE)
            });
    if gone || slot.flow.kind() == Kind::SeqPacket {
        slot.flow.host_gone();
    } else {
        slot.flow.host_ended();
    }
}

/// One message, or a part of one that does not fit into one buffer.
fn read_message(queue: &mut Queue, slot: &mut Slot, cid: u32) -> Turn {
    let Some(key) = slot.key() else { return Turn::Idle };
    if slot.inbox.is_none() {
        let Some(socket) = &slot.socket else { return Turn::Idle };
        let len = match syscall::message_len(socket.as_fd()) {
            Ok(0) if slot.ended => {
                end_of_input(slot);
                return Turn::Idle;
            }
            Ok(len) => len,
            Err(Errno::AGAIN) => {
                slot.readable = false;
                return Turn::Idle;
            }
            Err(_) => {
                slot.readable = false;
                slot.flow.host_gone();
                return Turn::Idle;
            }
        };
        if len > LONGEST_MESSAGE || len > slot.flow.peer_alloc() as usize {
            tracing::debug!(len, "a message that the guest can never take");
            slot.flow.abort();
            return Turn::Idle;
        }
        if len > slot.flow.room() as usize {
            slot.flow.starve();
            return Turn::Idle;
        }
        // What is there in one piece goes to the guest in one piece.
        let Some(chain) = buffer(queue) else { return Turn::NoBuffer };
        if room(queue, &chain) >= (HEADER + len) as u64 {
            let mut writer = queue.writer(&chain);
            writer.skip(HEADER);
            let mut sink = Sink::new();
            if sink.guest(&writer, len) == len {
                return match syscall::receive(socket.as_fd(), sink, false) {
                    Ok(message) => {
                        let flags = SEQ_EOM | if message.eor { SEQ_EOR } else { 0 };
                        let length = u32::try_from(message.bytes).unwrap_or(0);
                        let header = slot.flow.header(cid, key, Op::Rw, length, flags);
                        complete(queue, chain, &header, message.bytes);
                        Turn::More
                    }
                    Err(error) => {
                        put_back(queue, std::iter::once(chain));
                        slot.readable = false;
                        match error {
                            Errno::AGAIN => {}
                            Errno::FAULT => slot.flow.abort(),
                            _ => slot.flow.host_gone(),
                        }
                        Turn::Idle
                    }
                };
            }
        }
        put_back(queue, std::iter::once(chain));
        let mut bytes = vec![0; len];
        let mut sink = Sink::new();
        sink.own(&mut bytes);
        match syscall::receive(socket.as_fd(), sink, false) {
            Ok(message) => {
                bytes.truncate(message.bytes);
                slot.inbox = Some(Inbox { bytes, sent: 0, eor: message.eor });
            }
            Err(_) => return Turn::More,
        }
    }
    hand_over(queue, slot, cid)
}

/// Puts what was read before into the guest's buffers, as far as there is credit.
fn hand_over(queue: &mut Queue, slot: &mut Slot, cid: u32) -> Turn {
    let Some(key) = slot.key() else { return Turn::Idle };
    let is_message = slot.flow.kind() == Kind::SeqPacket;
    // The whole of a message fits into the credit, or did when it was taken.
    while let Some(inbox) = &mut slot.inbox {
        let rest = inbox.bytes.get(inbox.sent..).unwrap_or_default();
        let credit = slot.flow.room() as usize;
        if credit == 0 && !rest.is_empty() {
            slot.flow.starve();
            return Turn::Idle;
        }
        let Some(chain) = buffer(queue) else { return Turn::NoBuffer };
        let room = usize::try_from(room(queue, &chain)).unwrap_or(usize::MAX) - HEADER;
        let part = rest.len().min(room).min(credit);
        let last = part == rest.len();
        let flags = match (is_message && last, inbox.eor) {
            (false, _) => 0,
            (true, false) => SEQ_EOM,
            (true, true) => SEQ_EOM | SEQ_EOR,
        };
        let mut writer = queue.writer(&chain);
        writer.skip(HEADER);
        writer.write(rest.get(..part).unwrap_or_default());
        inbox.sent += part;
        // A buffer with room for a header only holds what is never wrong.
        let op = if part == 0 && !last { Op::CreditUpdate } else { Op::Rw };
        let header = slot.flow.header(cid, key, op, u32::try_from(part).unwrap_or(0), flags);
        complete(queue, chain, &header, part);
        if last {
            slot.inbox = None;
        }
    }
    if slot.stage == Stage::Live { Turn::More } else { Turn::Idle }
}
