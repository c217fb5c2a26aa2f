//! A back-end that answers anything, behind a proxied device that is used meanwhile. Checked: no panic, no order without an end, and
//! a reset that leads back to status 0 whatever the back-end does.
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use vhost_proxy::{ConfigSource, Proxy, ProxyOptions};
use vhost_user::{F_LOG_ALL, F_PROTOCOL_FEATURES, FrontendCode, HEADER_LEN, ProtocolFeatures, flags};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vm_virtio::device::ConfigWriter;
use vm_virtio::memory::SharedMemory;
use vm_virtio::{
    DeviceType, DirtyLog, Engine, EngineOptions, Features, GuestRam, HostEvent, HostEvents, Kick, LaneRunner,
    QueueConfig, QueueStart, Status, Stop, Ticket, WaitFor,
};

use crate::bytes::Bytes;

/// Whatever takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(30);
/// What one exchange with the back-end may take.
const EXCHANGE: Duration = Duration::from_millis(20);
/// Things that a driver does.
const STEPS: usize = 16;

struct Deaf;

impl HostEvents for Deaf {
    fn event(&self, _: HostEvent) {}
}

/// Decisions for all connections, one after the other.
struct Dice(Mutex<Vec<u8>>);

impl Dice {
    fn take(&self, count: usize) -> Vec<u8> {
        let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let left = bytes.len();
        bytes.drain(..count.min(left)).collect()
    }

    fn u8(&self) -> u8 {
        self.take(1).first().copied().unwrap_or(0)
    }

    fn u64(&self) -> u64 {
        self.take(8).iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
    }
}

/// Answers until it is tired of it. Descriptors that come are dropped by the kernel.
fn backend(mut stream: UnixStream, dice: &Dice, features: u64) -> Option<()> {
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    loop {
        let mut header = [0; HEADER_LEN];
        stream.read_exact(&mut header).ok()?;
        let word =
            |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let (code, needs_reply) = (word(0), word(4) & flags::NEED_REPLY != 0);
        let mut body = vec![0; word(8).min(4096) as usize];
        stream.read_exact(&mut body).ok()?;
        let mood = dice.u8();
        let odd = |value: u64| if mood >= 200 { dice.u64() } else { value };
        let number = |value: u64| Some(odd(value).to_le_bytes().to_vec());
        let reply = match FrontendCode::ALL.iter().find(|known| known.code() == code) {
            Some(FrontendCode::GetFeatures) => number(features),
            Some(FrontendCode::GetProtocolFeatures) => {
                let all = ProtocolFeatures::MQ
                    | ProtocolFeatures::REPLY_ACK
                    | ProtocolFeatures::CONFIG
                    | ProtocolFeatures::LOG_SHMFD
                    | ProtocolFeatures::STATUS
                    | ProtocolFeatures::INFLIGHT_SHMFD
                    | ProtocolFeatures::BACKEND_REQ
                    | ProtocolFeatures::DEVICE_STATE;
                number(all.bits())
            }
            Some(FrontendCode::GetQueueNum) => number(2),
            Some(FrontendCode::GetMaxMemSlots) => number(8),
            Some(FrontendCode::GetStatus) => number(0x0f),
            Some(FrontendCode::CheckDeviceState) => number(0),
            Some(FrontendCode::SetDeviceStateFd) => number(0x100),
            Some(FrontendCode::SetLogBase) => number(0),
            Some(FrontendCode::GetConfig) => Some(body),
            Some(FrontendCode::GetInflightFd) => Some(vec![0; 24]),
            Some(FrontendCode::GetVringBase) => {
                let base = odd(0) as u32;
                Some([&body[..body.len().min(4)], &base.to_le_bytes()].concat())
            }
            _ if needs_reply => number(0),
            _ => None,
        };
        match mood {
            190..=193 => return None,
            194..=195 => continue,
            196..=197 => stream.write_all(&dice.take(24)).ok()?,
            _ => {}
        }
        if let Some(reply) = reply {
            let flags = 1 | flags::REPLY;
            let mut message: Vec<u8> =
                [code, flags, reply.len() as u32].into_iter().flat_map(u32::to_le_bytes).collect();
            message.extend(reply);
            let cut = if mood == 198 { message.len() / 2 } else { message.len() };
            stream.write_all(&message[..cut]).ok()?;
        }
    }
}

struct Guest {
    engine: Engine<Proxy>,
    lane: LaneRunner<vhost_proxy::ProxyWorker>,
    ram: GuestRam,
}

impl Guest {
    fn done<T>(&mut self, mut ticket: Ticket<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(value) = ticket.try_take() {
                return value;
            }
            assert!(Instant::now() < deadline, "an order without an end");
            self.lane.turn(Some(Duration::from_millis(1)));
        }
    }

    fn start(&mut self, queue: u16, size: u16) {
        let base = 0x1_0000 * u64::from(queue);
        let at = |offset| GuestAddress(base + offset);
        let config = QueueConfig { size, desc: at(0), driver: at(0x4000), device: at(0x8000) };
        let start = QueueStart { config, state: None, inflight: None, kick: Kick::Manual, call: None };
        let ticket = self.engine.start(queue, start);
        let _ = self.done(ticket);
        let ticket = self.engine.enable(queue, true);
        self.done(ticket);
    }

    fn bring_up(&mut self) {
        let ticket = self.engine.set_status(Status::ACKNOWLEDGE | Status::DRIVER);
        self.done(ticket);
        let _ = self.engine.set_driver_features(self.engine.offered() - Features::ACCESS_PLATFORM);
        let ticket = self.engine.set_status(Status::FEATURES_OK);
        self.done(ticket);
        let ticket = self.engine.memory(self.ram.clone(), WaitFor::NewRequests);
        self.done(ticket);
        self.start(0, 16);
        self.start(1, 16);
        let ticket = self.engine.set_status(Status::DRIVER_OK);
        self.done(ticket);
    }

    fn reset(&mut self) {
        let ticket = self.engine.set_status(Status::empty());
        self.done(ticket);
        assert_eq!(self.engine.status(), Status::empty(), "a reset does not depend on the back-end");
    }
}

/// A back-end that answers anything.
pub fn proxy(data: &[u8]) {
    let mut bytes = Bytes::new(data);
    let script = bytes.take(STEPS);
    let packed = if bytes.bool() { Features::RING_PACKED } else { Features::empty() };
    let features = (Features::VERSION_1 | Features::EVENT_IDX | packed).low64();
    let features = features | F_PROTOCOL_FEATURES | F_LOG_ALL;
    let dice = Arc::new(Dice(Mutex::new(bytes.take(data.len()).to_vec())));
    let connect = move || {
        let (ours, theirs) = UnixStream::pair()?;
        let dice = dice.clone();
        thread::spawn(move || backend(theirs, &dice, features));
        Ok(ours)
    };
    let options = ProxyOptions {
        config: ConfigSource::Backend(vec![8]),
        patience: EXCHANGE,
        give_up: Duration::from_millis(30),
        ..ProxyOptions::new(DeviceType(63))
    };
    let Ok(proxy) = Proxy::with(connect, options) else { return };
    let Ok((engine, mut lanes)) = Engine::new(proxy, EngineOptions::new(Arc::new(Deaf))) else { return };
    let memory = SharedFile::new();
    let lane = lanes.pop().expect("one lane");
    let mut guest = Guest { engine, lane, ram: GuestRam::new(&memory.0) };
    guest.bring_up();
    for step in script {
        let queue = u16::from(step >> 7);
        match step % 9 {
            0 => {
                let ram = if step & 16 == 0 { guest.ram.clone() } else { GuestRam::empty() };
                let ticket = guest.engine.memory(ram, WaitFor::NewRequests);
                guest.done(ticket);
            }
            1 => {
                let ticket = guest.engine.enable(queue, step & 16 == 0);
                guest.done(ticket);
            }
            2 => drop(guest.engine.write_config(0, &[*step], ConfigWriter::Driver)),
            3 => {
                let ticket = guest.engine.stop(queue, Stop::Drain, Some(Instant::now() + EXCHANGE));
                let _ = guest.done(ticket);
            }
            4 => guest.start(queue, 1 << (step >> 5)),
            5 => guest.engine.kick(queue),
            6 => {
                let area = SharedMemory::memfd(64).expect("a log");
                let log = (step & 16 == 0).then(|| Arc::new(DirtyLog::new(Arc::new(area), None)));
                let ticket = guest.engine.log(log);
                guest.done(ticket);
            }
            7 => {
                guest.reset();
                guest.bring_up();
            }
            _ => drop(guest.lane.turn(Some(Duration::from_millis(1)))),
        }
    }
    guest.reset();
}

/// Guest memory with a file behind it.
struct SharedFile(GuestMemoryMmap);

impl SharedFile {
    fn new() -> SharedFile {
        let fd = rustix::fs::memfd_create("fuzz", rustix::fs::MemfdFlags::CLOEXEC).expect("a file");
        rustix::fs::ftruncate(&fd, 0x2_0000).expect("its size");
        let window = vm_memory::FileOffset::new(std::fs::File::from(fd), 0);
        let ranges = [(GuestAddress(0), 0x2_0000, Some(window))];
        SharedFile(GuestMemoryMmap::from_ranges_with_files(ranges).expect("memory"))
    }
}
