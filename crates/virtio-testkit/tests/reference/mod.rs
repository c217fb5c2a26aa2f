//! A small back-end that keeps every rule of the conformance suite, written from the documents alone: it shares no code
//! with the project's queues and endpoints. Named after a line of the suite, a [`Reference`] breaks exactly that rule; the
//! places where it does so read `self.is("name-of-the-line")`.
//!
//! The device gives back what it is sent, on two queues; its configuration space has 8 bytes, the first of which is the
//! driver's to write, and a request can change.
mod memory;
mod message;
mod ring;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_testkit::conformance::{Request, Subject};
use virtio_testkit::daemon::TempDir;

use memory::Memory;
use message::{Message, field};
use ring::Ring;

pub(crate) const QUEUES: usize = 2;
const CONFIG: u8 = b'C';

/// What the device says of itself.
pub(crate) const ECHO: Subject = Subject {
    name: "echo",
    queue: 0,
    queues: QUEUES,
    request: |n| Request { readable: (0..9).map(|i| b'a' + ((n + i) % 17) as u8).collect(), writable: 12 },
    check: |request, answer| match request.readable == answer {
        true => Ok(()),
        false => Err(format!("{answer:02x?} to {:02x?}", request.readable)),
    },
    configure: Some(|n| Request { readable: vec![CONFIG, 100 + n as u8], writable: 12 }),
    read_only: Some(4),
};

mod bit {
    pub(crate) const OWN: u64 = 1 << 5;
    pub(crate) const LOG_ALL: u64 = 1 << 26;
    pub(crate) const INDIRECT: u64 = 1 << 28;
    pub(crate) const EVENT_IDX: u64 = 1 << 29;
    pub(crate) const PROTOCOL: u64 = 1 << 30;
    pub(crate) const VERSION_1: u64 = 1 << 32;
    pub(crate) const PLATFORM: u64 = 1 << 33;
    pub(crate) const PACKED: u64 = 1 << 34;
    pub(crate) const IN_ORDER: u64 = 1 << 35;
    pub(crate) const RING_RESET: u64 = 1 << 40;
    pub(crate) const SUSPEND: u64 = 1 << 43;
}

/// MQ, LOG_SHMFD, REPLY_ACK, BACKEND_REQ, CONFIG, INFLIGHT_SHMFD, RESET_DEVICE, INBAND_NOTIFICATIONS, CONFIGURE_MEM_SLOTS,
/// STATUS, DEVICE_STATE, SHMEM_MAP.
const PROTOCOL: u64 = 1
    | 1 << 1
    | 1 << 3
    | 1 << 5
    | 1 << 9
    | 1 << 12
    | 1 << 13
    | 1 << 14
    | 1 << 15
    | 1 << 16
    | 1 << 19
    | 1 << 22;
const REPLY_ACK: u64 = 1 << 3;
const STATUS: u64 = 1 << 16;

const FEATURES_OK: u8 = 8;
const DRIVER_OK: u8 = 4;
const SUSPENDED: u8 = 16;
const NEEDS_RESET: u8 = 64;

/// A running back-end, in a folder of its own.
pub(crate) struct Reference {
    folder: TempDir,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Reference {
    /// One that breaks the rule of that name; none: the right one.
    pub(crate) fn start(mutant: &'static str) -> Reference {
        let folder = TempDir::new();
        let listener = UnixListener::bind(folder.join("socket")).expect("a listener");
        listener.set_nonblocking(true).expect("non-blocking");
        let over = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&over);
        let thread = std::thread::spawn(move || Backend::new(mutant, stop).run(&listener));
        Reference { folder, over, thread: Some(thread) }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.join("socket")
    }
}

impl Drop for Reference {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        let ended = self.thread.take().map(JoinHandle::join);
        if !std::thread::panicking() && matches!(ended, Some(Err(_))) {
            panic!("the reference back-end panicked");
        }
    }
}

/// The connection or the whole back-end is over.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Connection,
    Everything,
}

struct Backend {
    mutant: &'static str,
    over: Arc<AtomicBool>,
    // Of the device: outlives connections.
    status: u8,
    config: [u8; 8],
    ever_started: bool,
    // Of a connection.
    acked: Option<u64>,
    times_acked: u32,
    protocol: u64,
    memory: Memory,
    rings: Vec<Ring>,
    channel: Option<UnixStream>,
    loading: Option<File>,
}

impl Backend {
    fn new(mutant: &'static str, over: Arc<AtomicBool>) -> Backend {
        Backend {
            mutant,
            over,
            status: 0,
            config: [1, 2, 3, 4, 5, 6, 7, 8],
            ever_started: false,
            acked: None,
            times_acked: 0,
            protocol: 0,
            memory: Memory::default(),
            rings: Vec::new(),
            channel: None,
            loading: None,
        }
    }

    fn is(&self, mutant: &str) -> bool {
        self.mutant == mutant
    }

    fn has(&self, feature: u64) -> bool {
        self.acked.is_some_and(|acked| acked & feature != 0)
    }

    fn run(&mut self, listener: &UnixListener) {
        while !self.over.load(Ordering::SeqCst) {
            let Ok((stream, _)) = listener.accept() else {
                wait(&[listener.as_fd()]);
                continue;
            };
            (self.acked, self.times_acked, self.protocol) = (None, 0, 0);
            self.memory = Memory::default();
            self.rings = (0..QUEUES).map(|_| Ring::default()).collect();
            (self.channel, self.loading) = (None, None);
            let end = self.serve(&stream);
            if end == End::Everything || self.is("reconnect") {
                return;
            }
        }
    }

    fn serve(&mut self, stream: &UnixStream) -> End {
        loop {
            if self.over.load(Ordering::SeqCst) {
                return End::Everything;
            }
            let mut files = vec![stream.as_fd()];
            files.extend(self.rings.iter().filter_map(|ring| ring.kick.as_ref().map(AsFd::as_fd)));
            let ready = wait(&files);
            for (queue, kicked) in self.kicked().into_iter().enumerate() {
                if kicked && let Err(end) = self.kick(queue) {
                    return end;
                }
            }
            if ready.first() == Some(&true) {
                let message = match Message::receive(stream) {
                    Ok(Some(message)) => message,
                    Ok(None) => return End::Connection,
                    Err(_) if self.is("cut-anywhere") => return End::Everything,
                    Err(_) => {
                        while self.is("oversized-refused") && !self.over.load(Ordering::SeqCst) {
                            std::thread::sleep(Duration::from_millis(5));
                        }
                        return End::Connection;
                    }
                };
                if let Err(end) = self.handle(stream, message) {
                    return end;
                }
            }
        }
    }

    /// Which kick files have something to say, which is read.
    fn kicked(&self) -> Vec<bool> {
        let read = |ring: &Ring| {
            ring.kick.as_ref().is_some_and(|kick| {
                let ready =
                    poll(&mut [PollFd::new(kick, PollFlags::IN)], Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
                ready.is_ok_and(|count| count > 0) && rustix::io::read(kick, &mut [0; 8]).is_ok()
            })
        };
        self.rings.iter().map(read).collect()
    }

    fn kick(&mut self, queue: usize) -> Result<(), End> {
        let ring = &self.rings[queue];
        if !ring.started && self.is("reset-quiet") || !ring.enabled && self.is("disabled-no-effect") {
            ring.signal();
        }
        if self.is("spurious-kicks") && !self.available(queue) {
            self.rings[queue].signal();
        }
        if queue > 0 && self.is("other-queues") {
            return Ok(());
        }
        self.work(queue)
    }

    fn offered(&self) -> u64 {
        let mut offered = bit::OWN
            | bit::LOG_ALL
            | bit::INDIRECT
            | bit::EVENT_IDX
            | bit::PROTOCOL
            | bit::VERSION_1
            | bit::PLATFORM
            | bit::PACKED
            | bit::IN_ORDER
            | bit::RING_RESET
            | bit::SUSPEND;
        match self.mutant {
            "version-1-offered" => offered &= !bit::VERSION_1,
            "no-legacy-features" => offered |= 1 << 24,
            "no-reserved-features" => offered |= 1 << 45,
            "no-pci-features" => offered |= 1 << 37,
            "features-stable" if self.ever_started => offered &= !bit::OWN,
            _ => {}
        }
        offered
    }

    fn protocol_offered(&self) -> u64 {
        match self.mutant {
            "mq-offered" => PROTOCOL & !1,
            "protocol-bits-consistent" => PROTOCOL & !(1 << 5),
            _ => PROTOCOL,
        }
    }

    /// Whether the device takes these features.
    fn accepts(&self) -> bool {
        match self.mutant {
            "every-subset-works" => self.has(bit::EVENT_IDX),
            "own-features-optional" => self.has(bit::OWN),
            "accepted-again" => self.times_acked < 2,
            _ => true,
        }
    }

    fn driver_ready(&self) -> bool {
        let awake = self.is("suspend-rests") && self.status & SUSPENDED != 0;
        self.protocol & STATUS == 0
            || self.status & DRIVER_OK != 0
            || self.is("nothing-before-driver-ok")
            || awake
    }

    fn reset(&mut self) {
        self.status = match self.mutant {
            "reset-status" => self.status,
            "suspend-reset" => self.status & SUSPENDED,
            _ => 0,
        };
        let ill = self.is("fault-heals");
        for ring in &mut self.rings {
            ring.started = false;
            ring.enabled = false;
            ring.broken &= ill;
        }
    }

    fn handle(&mut self, stream: &UnixStream, message: Message) -> Result<(), End> {
        let Message { code, need_reply, body, mut fds } = message;
        let own_reply = |bytes: &[u8]| Message::reply(stream, code, bytes, &[]).map_err(|_| End::Connection);
        let number = field(&body, 0);
        let value = (&body[..8.min(body.len())]).try_into().map_or(0, u64::from_ne_bytes);
        let ring = number as usize & 0xff;
        let num = field(&body, 4);
        let known = ring < QUEUES && number & !0x1ff == 0;
        let mut done = true;
        match code {
            1 => {
                own_reply(&self.offered().to_ne_bytes())?;
                if need_reply && self.is("one-reply") {
                    own_reply(&0u64.to_ne_bytes())?;
                }
                return Ok(());
            }
            2 => {
                done = value & !self.offered() == 0 || self.is("unoffered-refused");
                if done {
                    self.times_acked +=
                        u32::from(self.acked.is_none_or(|old| (old ^ value) & bit::LOG_ALL == 0));
                    self.acked = Some(value);
                    if self.has(bit::PLATFORM) != self.memory.iotlb.is_some() {
                        self.memory.iotlb = self.has(bit::PLATFORM).then(Default::default);
                    }
                    if value & bit::PROTOCOL == 0 && !self.is("enabled-without-bit-30") {
                        self.rings.iter_mut().for_each(|ring| ring.enabled = true);
                    }
                }
            }
            3 | 4 => {
                if self.is("replies-asked-for") {
                    return Ok(());
                }
                if !need_reply && self.is("no-reply-unasked") {
                    return own_reply(&0u64.to_ne_bytes());
                }
            }
            5 => done = self.set_table(&body, fds),
            6 => {
                let size = value;
                let offset = (&body[8..]).try_into().map_or(0, u64::from_ne_bytes);
                self.memory.log = fds.pop().map(|fd| (File::from(fd), offset, size));
                return own_reply(&0u64.to_ne_bytes());
            }
            8 => {
                let power = !self.has(bit::PACKED) || self.is("packed-any-size");
                let fits = (1..=0x8000).contains(&num) && (num.is_power_of_two() || !power);
                done = known && fits;
                if done {
                    self.rings[ring].size = num as u16;
                }
                done |= self.is("queue-index-checked") && !known || self.is("ring-size-checked") && known;
            }
            9 => {
                let address = |at: usize| (&body[at..at + 8]).try_into().map_or(0, u64::from_ne_bytes);
                done = known && {
                    let places = [8, 24, 16].map(|at| self.memory.guest(address(at)));
                    self.rings[ring].user = [8, 24, 16].map(address);
                    places.iter().all(Option::is_some)
                };
            }
            10 => {
                done = known;
                let again = self.is("reset-indices") || self.is("queue-reset");
                let kept = self.is("begins-where-told") || again && self.ever_started;
                if known && !kept {
                    self.rings[ring].set_base(num, self.acked.is_some_and(|acked| acked & bit::PACKED != 0));
                    self.read_used_index(ring);
                }
            }
            11 => {
                if !known {
                    return Err(End::Connection);
                }
                let packed = self.has(bit::PACKED);
                let runs_on = self.is("stopped-quiet");
                self.rings[ring].started &= runs_on;
                self.rings[ring].enabled |= runs_on;
                if self.is("queue-reset-alone") {
                    self.rings.iter_mut().for_each(|ring| ring.started = false);
                }
                let base = if self.is("stop-tells-where") { 0 } else { self.rings[ring].base(packed) };
                let reply: Vec<u8> = [number.to_ne_bytes(), base.to_ne_bytes()].concat();
                return own_reply(&reply);
            }
            12 => {
                done = known;
                if known {
                    let again = self.rings[ring].kick.is_some();
                    if !(again && self.is("kick-changes")) {
                        self.rings[ring].kick = fds.pop();
                    }
                    self.rings[ring].started = !(again && self.is("stopped-goes-on"));
                    self.ever_started = true;
                    if !self.is("started-with-buffers") {
                        self.work(ring)?;
                    }
                }
            }
            13 => {
                done = known;
                if known && !(self.rings[ring].started && self.is("call-changes")) {
                    self.rings[ring].call = fds.pop();
                }
            }
            14 => {
                done = known;
                if known {
                    self.rings[ring].err = fds.pop();
                }
            }
            15 => {
                if self.is("protocol-features-first") && self.acked.is_none() {
                    return Err(End::Connection);
                }
                return own_reply(&self.protocol_offered().to_ne_bytes());
            }
            16 => self.protocol = value,
            17 => return own_reply(&(QUEUES as u64).to_ne_bytes()),
            18 => {
                done = known && number & 0x100 == 0;
                if done {
                    self.rings[ring].enabled = num == 1;
                    if !self.is("enable-scans") && !self.is("started-with-buffers") {
                        self.work(ring)?;
                    }
                }
                done |= self.is("queue-index-checked");
            }
            21 => self.channel = fds.pop().map(UnixStream::from),
            22 => {
                self.change_iotlb(&body)?;
                return own_reply(&0u64.to_ne_bytes());
            }
            24 => return self.get_config(stream, &body),
            25 => {
                let offset = number as usize;
                for (at, byte) in (offset..8).zip(body.get(12..).unwrap_or(&[])) {
                    if at == 0 || self.is("config-read-only") {
                        self.config[at] = *byte;
                    }
                }
            }
            31 => {
                let (queues, size) = (field(&body, 16) as u16, (field(&body, 16) >> 16) as u16);
                let file =
                    rustix::fs::memfd_create("inflight", rustix::fs::MemfdFlags::CLOEXEC).expect("memfd");
                let len = 64 * u64::from(queues) * u64::from(size);
                let real = if self.is("inflight-area") { len / 2 } else { len };
                rustix::fs::ftruncate(&file, real).expect("its size");
                let mut reply = [len.to_ne_bytes(), 0u64.to_ne_bytes()].concat();
                reply.extend(queues.to_ne_bytes());
                reply.extend(size.to_ne_bytes());
                reply.extend([0; 4]);
                return Message::reply(stream, code, &reply, &[file.as_fd()]).map_err(|_| End::Connection);
            }
            32 => {}
            34 => {
                let status = self.status;
                self.reset();
                if self.is("reset-device") {
                    self.status = status;
                }
            }
            35 => {
                done = known;
                if known && !self.is("kicks-as-messages") {
                    self.work(ring)?;
                }
            }
            42 => {
                let Some(mut channel) = fds.pop().map(File::from) else { return Err(End::Connection) };
                let mut theirs = None;
                if self.has(bit::PACKED) {
                    // As good a reason as any to want a channel of its own.
                    let (reader, writer) = std::io::pipe().map_err(|_| End::Connection)?;
                    let (near, far): (OwnedFd, OwnedFd) = if number == 0 {
                        (writer.into(), reader.into())
                    } else {
                        (reader.into(), writer.into())
                    };
                    (channel, theirs) = (near.into(), Some(far));
                }
                if number == 0 {
                    let _ = channel.write_all(&self.config);
                } else {
                    // Read when the front-end has written all.
                    self.loading = Some(channel);
                }
                return match theirs {
                    Some(file) => Message::reply(stream, code, &0u64.to_ne_bytes(), &[file.as_fd()])
                        .map_err(|_| End::Connection),
                    None => own_reply(&(1u64 << 8).to_ne_bytes()),
                };
            }
            43 => {
                let loaded = self.loading.take().map_or(Ok(()), |mut file| file.read_exact(&mut self.config));
                let failed = loaded.is_err() || self.is("device-state");
                return own_reply(&u64::from(failed).to_ne_bytes());
            }
            44 => {
                let mut sizes = [0u64; 256];
                (sizes[0], sizes[3]) = (1 << 20, if self.is("shmem-config") { 0x1001 } else { 0x1000 });
                let mut reply = [2u32.to_ne_bytes(), 0u32.to_ne_bytes()].concat();
                reply.extend(sizes.iter().flat_map(|size| size.to_ne_bytes()));
                return own_reply(&reply);
            }
            36 => return own_reply(&64u64.to_ne_bytes()),
            37 => {
                let busy = self.is("memory-slots") && self.rings.iter().any(|ring| ring.started);
                let fd = fds.pop().filter(|_| fds.is_empty() && !busy);
                let anywhere = self.is("overlap-refused");
                done = fd.is_some_and(|fd| self.memory.add(&body[8..], &fd, anywhere));
            }
            38 => done = self.is("memory-removed") || self.memory.remove(&body[8..]),
            39 => {
                if value == 0 {
                    self.reset();
                } else {
                    let mut new = value as u8;
                    let starts = new & !self.status & FEATURES_OK != 0;
                    if starts && !self.accepts() {
                        new &= !FEATURES_OK;
                    }
                    let live = self.status & DRIVER_OK != 0 || self.is("suspend-early");
                    if new & SUSPENDED != 0 && live && self.has(bit::SUSPEND) {
                        self.status = self.status & !DRIVER_OK | SUSPENDED;
                        new &= !DRIVER_OK;
                    } else if new & DRIVER_OK != 0 {
                        self.status &= !SUSPENDED;
                    }
                    self.status |= new & !NEEDS_RESET & !SUSPENDED;
                    if !self.is("started-with-buffers") {
                        (0..QUEUES).try_for_each(|queue| self.work(queue))?;
                    }
                }
            }
            40 => {
                let status = if self.is("status-kept") { self.status & !1 } else { self.status };
                return own_reply(&u64::from(status).to_ne_bytes());
            }
            _ => done = self.is("unknown-refused"),
        }
        done |= self.is("failures-told");
        if need_reply && self.protocol & REPLY_ACK != 0 {
            return own_reply(&u64::from(!done).to_ne_bytes());
        }
        // Both sides would think differently of features or memory.
        if !done && matches!(code, 2 | 5) { Err(End::Connection) } else { Ok(()) }
    }

    /// IOTLB_MSG: address, size, address of the front-end, rights and kind.
    fn change_iotlb(&mut self, body: &[u8]) -> Result<(), End> {
        let word = |at: usize| (&body[at..at + 8]).try_into().map_or(0, u64::from_ne_bytes);
        let (first, size, user, kind) = (word(0), word(8), word(16), body[25]);
        let Some(iotlb) = &mut self.memory.iotlb else { return Ok(()) };
        for offset in (0..size).step_by(0x1000) {
            match kind {
                2 => drop(iotlb.insert(first + offset, user + offset)),
                3 if self.mutant != "iotlb-invalidate" => drop(iotlb.remove(&(first + offset))),
                _ => {}
            }
        }
        if kind == 2 { (0..QUEUES).try_for_each(|queue| self.work(queue)) } else { Ok(()) }
    }

    /// Asks for a translation.
    fn miss(&mut self, page: u64) {
        let mut message = [1u32, 1, 32].map(u32::to_ne_bytes).concat();
        message.extend(
            [page, 0, 0, u64::from_ne_bytes([3, 1, 0, 0, 0, 0, 0, 0])].map(u64::to_ne_bytes).concat(),
        );
        if let Some(channel) = &mut self.channel
            && self.mutant != "iotlb-miss"
        {
            let _ = channel.write_all(&message);
        }
    }

    fn set_table(&mut self, body: &[u8], fds: Vec<OwnedFd>) -> bool {
        let count = field(body, 0) as usize;
        let loose = self.is("descriptors-counted");
        if (fds.len() != count && !loose) || body.len() != 8 + 32 * count {
            return false;
        }
        let mut next = Memory::default();
        next.log = self.memory.log.take();
        next.iotlb = self.memory.iotlb.take();
        if self.is("memory-table-replaced") {
            next = std::mem::take(&mut self.memory);
        }
        let regions = body[8..].chunks(32).zip(&fds);
        let all = regions.fold(true, |all, (region, fd)| next.add(region, fd, false) && all);
        if all || loose {
            self.memory = next;
        }
        all || loose
    }

    fn get_config(&self, stream: &UnixStream, body: &[u8]) -> Result<(), End> {
        let (mut offset, mut size) = (field(body, 0), field(body, 4));
        let asked = offset;
        if self.is("config-in-pieces") {
            offset = 0;
        }
        if self.is("config-size") {
            size = 8;
        }
        let mut reply = [asked.to_ne_bytes(), size.to_ne_bytes(), 0u32.to_ne_bytes()].concat();
        let early = self.acked.is_none() && self.is("config-early");
        let byte = |at: u32| self.config.get(at as usize).filter(|_| !early).copied().unwrap_or(0);
        reply.extend((offset..offset.saturating_add(size.min(256))).map(byte));
        Message::reply(stream, 24, &reply, &[]).map_err(|_| End::Connection)
    }

    /// The device: what it answers.
    fn answer(&mut self, request: &[u8]) -> Vec<u8> {
        if let [CONFIG, value, ..] = *request {
            self.config[0] = value;
            let message = [2u32, 1, 0].map(u32::to_ne_bytes).concat();
            if let Some(channel) = &mut self.channel
                && self.mutant != "config-change-notified"
            {
                let _ = channel.write_all(&message);
            }
        }
        request.to_vec()
    }
}

/// Sleeps until one of these can be read, or a moment.
fn wait(files: &[std::os::fd::BorrowedFd<'_>]) -> Vec<bool> {
    let mut polled: Vec<_> = files.iter().map(|file| PollFd::new(file, PollFlags::IN)).collect();
    let _ = poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 10_000_000 }));
    polled.iter().map(|file| !file.revents().is_empty()).collect()
}
