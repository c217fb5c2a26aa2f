//! One connection as the guest sees it: a state machine without any I/O.
//!
//! What comes from the guest goes through [`Flow::hear`], what the host's side does through the methods that are named
//! after it, and what is to be sent to the guest comes out of [`Flow::owed`] and [`Flow::room`].
//!
//! What holds:
//! * Never more than `buf_alloc` bytes of the guest are accepted and not forwarded: more is a violation, so that memory
//!   is bounded by what was promised.
//! * Never more is sent than the guest has room for, whatever it says about its counters: a lie stalls or wraps its own
//!   flow at most (5.10.6.3.2).
//! * All counters run freely modulo 2^32 and are compared by their differences.
//! * Directions that were shut down stay so (5.10.6.5).
//! * What is owed is a set of flags, not a queue: a guest that never reads costs nothing more.
use crate::packet::{Header, Kind, Op, SEQ_EOM, SEQ_EOR, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use zerocopy::byteorder::little_endian::{U16, U32, U64};

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The guest wants it; the host's side is not there yet.
    Asked,
    /// The host's side wants it; the guest has not answered.
    Asking,
    /// It is there.
    Open,
    /// It is over; an RST may be owed.
    Over,
}

/// Both ends of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) peer_cid: u32,
    pub(crate) peer_port: u32,
    pub(crate) guest_port: u32,
}

/// What a packet of the guest means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    /// Nothing to do for the host's side.
    Nothing,
    /// The guest accepted the connection.
    Opened,
    /// Payload, all of it within the credit.
    Data {
        /// It ends a message.
        eom: bool,
        /// It ends a record.
        eor: bool,
    },
    /// Directions that the guest has shut down by now.
    Shut,
    /// The guest ended the connection: it is not to hear of it again.
    Reset,
    /// The guest broke a rule: the connection is over, and an RST is owed.
    Broken,
}

/// A set of packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Owed(u8);

impl Owed {
    /// In the order in which they are sent.
    const ORDER: [Op; 6] =
        [Op::Rst, Op::Request, Op::Response, Op::CreditUpdate, Op::CreditRequest, Op::Shutdown];

    fn bit(op: Op) -> u8 {
        1 << (op.number() & 7)
    }

    fn add(&mut self, op: Op) {
        self.0 |= Owed::bit(op);
    }

    fn remove(&mut self, op: Op) {
        self.0 &= !Owed::bit(op);
    }

    fn first(self) -> Option<Op> {
        Owed::ORDER.into_iter().find(|op| self.0 & Owed::bit(*op) != 0)
    }
}

/// A connection.
#[derive(Clone, Debug)]
pub(crate) struct Flow {
    kind: Kind,
    phase: Phase,
    owed: Owed,
    /// A CREDIT_REQUEST was sent since the guest last told its credit.
    credit_asked: bool,
    guest_shutdown: u32,
    host_shutdown: u32,

    // From the guest to the host.
    buf_alloc: u32,
    received: u32,
    forwarded: u32,
    /// `forwarded` as the guest last heard of it.
    told: u32,

    // From the host to the guest.
    peer_alloc: u32,
    peer_forwarded: u32,
    sent: u32,
}

impl Flow {
    fn new(kind: Kind, phase: Phase, buf_alloc: u32) -> Flow {
        Flow {
            kind,
            phase,
            owed: Owed::default(),
            credit_asked: false,
            guest_shutdown: 0,
            host_shutdown: 0,
            buf_alloc,
            received: 0,
            forwarded: 0,
            told: 0,
            peer_alloc: 0,
            peer_forwarded: 0,
            sent: 0,
        }
    }

    /// The guest's REQUEST. `buf_alloc` is what is promised to it.
    pub(crate) fn asked(kind: Kind, request: &Header, buf_alloc: u32) -> Flow {
        let mut flow = Flow::new(kind, Phase::Asked, buf_alloc);
        flow.note_credit(request);
        flow
    }

    /// A connection that the host's side wants: a REQUEST is owed.
    pub(crate) fn asking(kind: Kind, buf_alloc: u32) -> Flow {
        let mut flow = Flow::new(kind, Phase::Asking, buf_alloc);
        flow.owed.add(Op::Request);
        flow
    }

    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    pub(crate) fn phase(&self) -> Phase {
        self.phase
    }

    /// Most bytes that are accepted and not forwarded.
    pub(crate) fn buf_alloc(&self) -> u32 {
        self.buf_alloc
    }

    /// The guest's buffer as a whole: no message can be larger.
    pub(crate) fn peer_alloc(&self) -> u32 {
        self.peer_alloc
    }

    pub(crate) fn guest_will_send(&self) -> bool {
        self.guest_shutdown & SHUTDOWN_SEND == 0
    }

    pub(crate) fn guest_will_receive(&self) -> bool {
        self.guest_shutdown & SHUTDOWN_RECEIVE == 0
    }

    /// The host's side has said that it sends nothing more.
    pub(crate) fn host_has_ended(&self) -> bool {
        self.host_shutdown & SHUTDOWN_SEND != 0
    }

    /// The host's side is gone altogether.
    pub(crate) fn host_is_gone(&self) -> bool {
        self.host_shutdown == SHUTDOWN_BOTH
    }

    fn note_credit(&mut self, header: &Header) {
        self.peer_alloc = header.buf_alloc.get();
        self.peer_forwarded = header.fwd_cnt.get();
        self.credit_asked = false;
        self.owed.remove(Op::CreditRequest);
    }

    /// A packet of the guest for this flow.
    pub(crate) fn hear(&mut self, header: &Header) -> Heard {
        let op = Op::of(header.op.get());
        match (self.phase, op) {
            (_, Some(Op::Rst)) => {
                self.phase = Phase::Over;
                self.owed = Owed::default();
                return Heard::Reset;
            }
            // The RST that is on its way answers everything.
            (Phase::Over, _) => return Heard::Nothing,
            _ if header.kind.get() != self.kind.number() => return self.broken(),
            _ => {}
        }
        self.note_credit(header);
        match (self.phase, op) {
            (Phase::Asking, Some(Op::Response)) => {
                self.phase = Phase::Open;
                Heard::Opened
            }
            (Phase::Open, Some(Op::Rw)) => self.hear_data(header),
            (Phase::Open, Some(Op::Shutdown)) => {
                self.guest_shutdown |= header.flags.get() & SHUTDOWN_BOTH;
                if self.guest_shutdown == 0 { Heard::Nothing } else { Heard::Shut }
            }
            (_, Some(Op::CreditUpdate)) => Heard::Nothing,
            (_, Some(Op::CreditRequest)) => {
                self.owed.add(Op::CreditUpdate);
                Heard::Nothing
            }
            _ => self.broken(),
        }
    }

    fn hear_data(&mut self, header: &Header) -> Heard {
        let len = header.len.get();
        let free = self.buf_alloc.saturating_sub(self.received.wrapping_sub(self.forwarded));
        if len > free || !self.guest_will_send() {
            return self.broken();
        }
        self.received = self.received.wrapping_add(len);
        if self.host_shutdown & SHUTDOWN_RECEIVE != 0 {
            // It was under way when the host's side went.
            self.forwarded(len);
            return Heard::Nothing;
        }
        let flags = header.flags.get();
        Heard::Data { eom: flags & SEQ_EOM != 0, eor: flags & SEQ_EOR != 0 }
    }

    fn broken(&mut self) -> Heard {
        self.abort();
        Heard::Broken
    }

    /// The host's side of what the guest asked for is there.
    pub(crate) fn accept(&mut self) {
        if self.phase == Phase::Asked {
            self.phase = Phase::Open;
            self.owed.add(Op::Response);
        }
    }

    /// Ends it: refused, timed out, done, against the rules. An RST is owed and nothing else.
    pub(crate) fn abort(&mut self) {
        if self.phase != Phase::Over {
            self.phase = Phase::Over;
            self.owed = Owed::default();
            self.owed.add(Op::Rst);
        }
    }

    /// So many bytes went to the host's side, or nowhere: the guest may send as many more. It is told once half of what
    /// was promised is in use as far as it knows, and then only what is worth a packet.
    pub(crate) fn forwarded(&mut self, bytes: u32) {
        self.forwarded = self.forwarded.wrapping_add(bytes);
        let news = self.forwarded.wrapping_sub(self.told);
        let known_free = self.buf_alloc.saturating_sub(self.received.wrapping_sub(self.told));
        let is_worth_it = news >= self.buf_alloc / 4 || self.forwarded == self.received;
        if news > 0
            && known_free <= self.buf_alloc / 2
            && is_worth_it
            && self.phase == Phase::Open
            && self.guest_will_send()
        {
            self.owed.add(Op::CreditUpdate);
        }
    }

    /// How many bytes may be sent to the guest now.
    pub(crate) fn room(&self) -> u32 {
        if self.phase != Phase::Open || !self.guest_will_receive() || self.host_has_ended() {
            return 0;
        }
        self.peer_alloc.saturating_sub(self.sent.wrapping_sub(self.peer_forwarded))
    }

    /// There is more to send than [`Flow::room`]: asks the guest for its credit, once.
    pub(crate) fn starve(&mut self) {
        if self.phase == Phase::Open && self.guest_will_receive() && !self.credit_asked {
            self.credit_asked = true;
            self.owed.add(Op::CreditRequest);
        }
    }

    /// The host's side sends nothing more (half-close).
    pub(crate) fn host_ended(&mut self) {
        self.shut_host(SHUTDOWN_SEND);
    }

    /// The host's side neither sends nor receives.
    pub(crate) fn host_gone(&mut self) {
        self.host_ended();
        self.host_deaf();
    }

    /// The host's side receives nothing more. What it had not taken is lost to it.
    pub(crate) fn host_deaf(&mut self) {
        self.shut_host(SHUTDOWN_RECEIVE);
        let lost = self.received.wrapping_sub(self.forwarded);
        self.forwarded(lost);
    }

    fn shut_host(&mut self, how: u32) {
        if self.phase == Phase::Open && self.host_shutdown | how != self.host_shutdown {
            self.host_shutdown |= how;
            self.owed.add(Op::Shutdown);
        }
    }

    /// The next packet without payload that the guest has to get.
    pub(crate) fn owed(&self) -> Option<Op> {
        self.owed.first()
    }

    /// The header of a packet for the guest, which is sent for certain. Tells credit, so no other packet is owed for that.
    pub(crate) fn header(&mut self, cid: u32, key: Key, op: Op, len: u32, flags: u32) -> Header {
        self.owed.remove(op);
        self.owed.remove(Op::CreditUpdate);
        self.told = self.forwarded;
        self.sent = self.sent.wrapping_add(len);
        let flags = if op == Op::Shutdown { self.host_shutdown } else { flags };
        Header {
            src_cid: U64::new(key.peer_cid.into()),
            dst_cid: U64::new(cid.into()),
            src_port: U32::new(key.peer_port),
            dst_port: U32::new(key.guest_port),
            len: U32::new(len),
            kind: U16::new(self.kind.number()),
            op: U16::new(op.number()),
            flags: U32::new(flags),
            buf_alloc: U32::new(self.buf_alloc),
            fwd_cnt: U32::new(self.forwarded),
        }
    }
}

#[cfg(test)]
mod tests;
