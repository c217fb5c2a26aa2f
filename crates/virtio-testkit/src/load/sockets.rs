//! A guest's socket device under load: a driver that accepts whatever clients of the host want, and takes, floods or echoes.
//!
//! What a connection does is chosen by its port in the guest: [`SINK`], [`FLOOD`], [`ECHO`]. Clients reach the guest through
//! the Unix socket of the back-end, in the layout that all back-ends share ("CONNECT port"), and measure there: this side
//! only keeps up. It makes no more checks than a guest's driver does.
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::event::epoll;
use rustix::io::Errno;
use rustix::time::Timespec;
use vm_memory::VolatileSlice;

use super::placement::Process;
use super::ring::FastRing;
use super::{LoadError, Placement, Target, area, connect, system};
use crate::{Buf, RingLayout, TestRam, VhostUserDriver, VhostUserOptions};
use vhost_user::FrontendEndpoint;

/// A port that takes everything.
pub const SINK: u32 = 1;
/// A port that sends without end.
pub const FLOOD: u32 = 2;
/// A port that sends back what comes.
pub const ECHO: u32 = 3;

const HEADER: usize = 44;
/// As Linux's receive buffers.
const RECEIVE: u32 = 3776;
/// What Linux promises to a connection.
const BUFFER: u32 = 256 << 10;
const QUEUE_SIZE: u16 = 256;
const TICK: Duration = Duration::from_millis(20);

const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RST: u16 = 3;
const SHUTDOWN: u16 = 4;
const RW: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;

#[derive(Clone, Copy, Default)]
struct Flow {
    peer_alloc: u32,
    peer_forwarded: u32,
    sent: u32,
    received: u32,
    told: u32,
    /// Bytes that are to be sent back.
    owed: u32,
}

/// A driver under load.
pub struct SocketSession<'m> {
    driver: VhostUserDriver,
    process: Process,
    placement: Placement,
    cid: u64,
    payload: u32,
    events: OwnedFd,
    rx: FastRing<'m>,
    receive: Vec<(Vec<Buf>, VolatileSlice<'m>)>,
    tx: FastRing<'m>,
    send: Vec<(Vec<Buf>, VolatileSlice<'m>)>,
    /// Chains of `send` that are free: the first ones with payload, the last for control packets.
    free: Vec<usize>,
    /// By peer's port and own.
    flows: HashMap<(u32, u32), Flow>,
    /// Those that may have something to send.
    senders: Vec<(u32, u32)>,
    /// Header of control packets that found no free chain.
    waiting: Vec<[u8; HEADER]>,
}

fn word(header: &[u8; HEADER], at: usize) -> u32 {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&header[at..at + 4]);
    u32::from_le_bytes(bytes)
}

impl<'m> SocketSession<'m> {
    /// Connects, negotiates and starts; `payload` bytes are in each packet that is sent.
    ///
    /// # Errors
    /// As [`LoadSession::open`](super::LoadSession::open).
    pub fn open(
        target: Target,
        ram: &'m TestRam,
        layout: RingLayout,
        payload: u32,
        placement: Placement,
    ) -> Result<Self, LoadError> {
        let (mut endpoint, known) = match target {
            Target::Path(path) => (connect(&path)?, None),
            Target::Connected(socket, pid) => (FrontendEndpoint::new(socket), Some(pid)),
        };
        let mut wanted = VhostUserOptions::new(layout);
        wanted.ram = ram.clone();
        wanted.queue_size = QUEUE_SIZE;
        // As QEMU, which keeps the event queue to itself.
        wanted.queues = Some(2);
        endpoint.set_timeout(Duration::from_secs(5));
        let mut driver = VhostUserDriver::attach(endpoint, wanted)?;
        if layout == RingLayout::Packed && !driver.features().contains(vm_virtio::Features::RING_PACKED) {
            return Err(LoadError::NotOffered("VIRTIO_F_RING_PACKED"));
        }
        let mut cid = [0; 8];
        let config = driver.endpoint().get_config(0, 8, 0).map_err(crate::DriverError::from)?;
        cid.copy_from_slice(config.get(..8).ok_or(LoadError::Broken("short configuration".to_owned()))?);
        driver.start()?;
        let process = Process::behind(driver.endpoint().stream(), known)?;
        let events = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(system("epoll"))?;
        for queue in 0..2 {
            let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
            let key = epoll::EventData::new_u64(queue as u64);
            epoll::add(&events, driver.call_fd(queue), key, flags).map_err(system("epoll"))?;
        }
        let receive: Vec<_> = (0..QUEUE_SIZE / 2)
            .map(|_| {
                let buf = ram.writable(RECEIVE);
                (vec![buf], area(ram, buf.addr, u64::from(buf.len)))
            })
            .collect();
        // Half of the ring's room: two descriptors each where there are no indirect ones.
        let send: Vec<_> = (0..QUEUE_SIZE / 4)
            .map(|_| {
                let head = ram.readable(&[0; HEADER]);
                let data = ram.readable(&vec![0x5b; payload as usize]);
                (vec![head, data], area(ram, head.addr, HEADER as u64))
            })
            .collect();
        let chains = |all: &[(Vec<Buf>, VolatileSlice<'m>)]| -> Vec<Vec<Buf>> {
            all.iter().map(|(chain, _)| chain.clone()).collect()
        };
        let features = driver.features();
        let rx = FastRing::new(ram, layout, &driver.ring(0).queue_config(), features, &chains(&receive));
        let tx = FastRing::new(ram, layout, &driver.ring(1).queue_config(), features, &chains(&send));
        let free = (0..send.len()).collect();
        let mut session = SocketSession {
            driver,
            process,
            placement,
            cid: u64::from_le_bytes(cid),
            payload,
            events,
            rx,
            receive,
            tx,
            send,
            free,
            flows: HashMap::new(),
            senders: Vec::new(),
            waiting: Vec::new(),
        };
        for slot in 0..session.receive.len() {
            session.rx.push(slot, &session.receive[slot].0);
        }
        session.flush();
        Ok(session)
    }

    /// CPU time of the back-end's process so far.
    ///
    /// # Errors
    /// It is gone.
    pub fn backend_cpu(&self) -> Result<Duration, LoadError> {
        Ok(self.process.cpu_time()?)
    }

    /// Its resident memory in KiB, without the guest's.
    ///
    /// # Errors
    /// It is gone.
    pub fn resident_kib(&self) -> Result<u64, LoadError> {
        Ok(self.process.resident_kib()?)
    }

    /// Pins this thread and the back-end.
    ///
    /// # Errors
    /// The system refuses.
    pub fn pin(&self) -> Result<(), LoadError> {
        Ok(self.placement.apply(&self.process)?)
    }

    fn header(&self, (peer, own): (u32, u32), op: u16, len: u32, flow: &Flow) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        header[..8].copy_from_slice(&self.cid.to_le_bytes());
        header[8] = 2;
        for (at, value) in [
            (16, own),
            (20, peer),
            (24, len),
            (28, u32::from(op) << 16 | 1),
            (32, 0),
            (36, BUFFER),
            (40, flow.received),
        ] {
            header[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        header
    }

    fn control(&mut self, header: [u8; HEADER]) {
        match self.free.pop() {
            Some(slot) => self.put(slot, &header),
            None => self.waiting.push(header),
        }
    }

    fn put(&mut self, slot: usize, header: &[u8; HEADER]) {
        let (chain, head) = &self.send[slot];
        head.copy_from(&header[..]);
        self.tx.push(slot, chain);
    }

    fn flush(&mut self) {
        self.rx.publish();
        if self.rx.kick_wanted() {
            self.driver.kick_anyway(0);
        }
        self.tx.publish();
        if self.tx.kick_wanted() {
            self.driver.kick_anyway(1);
        }
    }

    fn hear(&mut self, header: &[u8; HEADER]) {
        let key = (word(header, 16), word(header, 20));
        let op = (word(header, 28) >> 16) as u16;
        if op == REQUEST {
            self.flows.insert(key, Flow::default());
            if key.1 == FLOOD {
                self.senders.push(key);
            }
        }
        let Some(flow) = self.flows.get_mut(&key) else { return };
        (flow.peer_alloc, flow.peer_forwarded) = (word(header, 36), word(header, 40));
        let answer = match op {
            REQUEST => Some(RESPONSE),
            RW => {
                flow.received = flow.received.wrapping_add(word(header, 24));
                if key.1 == ECHO {
                    if flow.owed == 0 {
                        self.senders.push(key);
                    }
                    flow.owed += word(header, 24);
                }
                let untold = flow.received.wrapping_sub(flow.told);
                (untold > BUFFER / 2).then_some(CREDIT_UPDATE)
            }
            CREDIT_REQUEST => Some(CREDIT_UPDATE),
            SHUTDOWN => Some(RST),
            _ => None,
        };
        if let Some(op) = answer {
            flow.told = flow.received;
            let flow = *flow;
            let header = self.header(key, op, 0, &flow);
            self.control(header);
        }
        if matches!(op, SHUTDOWN | RST) {
            self.flows.remove(&key);
        }
    }

    /// Sends what there is credit and room for. Whether that was anything.
    fn pump(&mut self) -> bool {
        let mut some = false;
        while let Some(header) = self.waiting.pop() {
            match self.free.pop() {
                Some(slot) => self.put(slot, &header),
                None => {
                    self.waiting.push(header);
                    return some;
                }
            }
            some = true;
        }
        let mut senders = std::mem::take(&mut self.senders);
        let mut room = true;
        senders.retain(|key| {
            if room {
                (room, some) = self.send_from(*key, some);
            }
            // One that floods has always more.
            self.flows.get(key).is_some_and(|flow| key.1 == FLOOD || flow.owed > 0)
        });
        self.senders = senders;
        some
    }

    /// Sends what a flow has, as far as there is credit. Whether there is still room in the ring, and whether anything was
    /// sent by now.
    fn send_from(&mut self, key: (u32, u32), mut some: bool) -> (bool, bool) {
        while let Some(flow) = self.flows.get(&key).copied() {
            let credit = flow.peer_alloc.saturating_sub(flow.sent.wrapping_sub(flow.peer_forwarded));
            let len = if key.1 == FLOOD { self.payload } else { flow.owed.min(self.payload) };
            if len == 0 || credit < len {
                break;
            }
            let Some(slot) = self.free.pop() else { return (false, some) };
            let header = self.header(key, RW, len, &flow);
            self.put(slot, &header);
            if let Some(flow) = self.flows.get_mut(&key) {
                flow.sent = flow.sent.wrapping_add(len);
                flow.owed = flow.owed.saturating_sub(len);
                flow.told = flow.received;
            }
            some = true;
        }
        (true, some)
    }

    /// Keeps up with clients until one of them says that it is enough.
    ///
    /// # Errors
    /// The back-end broke a rule.
    pub fn run(&mut self, enough: impl Fn() -> bool) -> Result<(), LoadError> {
        while !enough() {
            let mut some = false;
            while let Some((slot, _)) = self.tx.next_used().map_err(LoadError::Broken)? {
                self.free.push(slot);
                some = true;
            }
            while let Some((slot, written)) = self.rx.next_used().map_err(LoadError::Broken)? {
                let (chain, bytes) =
                    self.receive.get(slot).ok_or(LoadError::Broken("a foreign buffer".to_owned()))?;
                let mut header = [0; HEADER];
                bytes.copy_to(&mut header[..]);
                if (written as usize) < HEADER || written != HEADER as u32 + word(&header, 24) {
                    return Err(LoadError::Broken(format!("a packet of {written} bytes")));
                }
                self.rx.push(slot, chain);
                self.hear(&header);
                some = true;
            }
            some |= self.pump();
            if some {
                self.flush();
                continue;
            }
            if !(self.rx.arm() | self.tx.arm()) {
                self.wait()?;
            }
        }
        Ok(())
    }

    fn wait(&mut self) -> Result<(), LoadError> {
        let limit = Timespec { tv_sec: 0, tv_nsec: i64::from(TICK.subsec_nanos()) };
        let mut events =
            [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }; 2];
        match epoll::wait(&self.events, &mut events, Some(&limit)) {
            Ok(count) => {
                for event in events.iter().take(count) {
                    if event.data.u64() == 0 { self.rx.woke() } else { self.tx.woke() }
                }
                Ok(())
            }
            Err(Errno::INTR) => Ok(()),
            Err(error) => Err(system("epoll")(error)),
        }
    }
}
