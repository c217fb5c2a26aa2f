//! A guest's console driver in memory, and clients on the host.
#![allow(dead_code, reason = "each test binary uses what it needs")]
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use virtio_console::control::event;
use virtio_console::{Console, MULTIPORT, PortSpec};
use virtio_testkit::daemon::TempDir;
use virtio_testkit::{Buf, MemoryHost, RingLayout};
use vm_virtio::Features;
use vm_virtio::controls::{Arguments, ControlRequest, Value};
use vm_virtio::{HostError, HostReply, HostRequest};

/// Longer than anything takes.
pub(crate) const SOON: Duration = Duration::from_secs(20);

pub(crate) fn spec(text: &str) -> PortSpec {
    text.parse().expect("a port")
}

/// A device with these ports.
pub(crate) fn console(ports: &[&str]) -> Console {
    let specs: Vec<PortSpec> = ports.iter().map(|text| spec(text)).collect();
    Console::new(&specs, 0, 64).expect("a console")
}

/// One on whose only console nothing happens.
pub(crate) fn null() -> Console {
    console(&["backend=null"])
}

pub(crate) fn queues(port: usize) -> (usize, usize) {
    if port == 0 { (0, 1) } else { (2 * port + 2, 2 * port + 3) }
}

/// The driver.
pub(crate) struct Guest {
    pub(crate) host: MemoryHost<Console>,
    controls: Vec<Buf>,
    /// Receive buffers that are out, for each port, oldest first.
    buffers: Vec<Vec<Buf>>,
    /// Messages in the order in which they came: port, event, value, payload.
    pub(crate) heard: Vec<(u32, u16, u16, Vec<u8>)>,
}

impl Guest {
    /// A driver that has the device, with MULTIPORT and nothing said yet.
    pub(crate) fn silent(device: Console, layout: RingLayout) -> Guest {
        let host = MemoryHost::builder(device).layout(layout).start();
        Guest::of(host)
    }

    /// One that does not know MULTIPORT.
    pub(crate) fn simple(device: Console, layout: RingLayout) -> Guest {
        let host = MemoryHost::builder(device).layout(layout).without(Features::from(MULTIPORT)).start();
        Guest::of(host)
    }

    pub(crate) fn of(host: MemoryHost<Console>) -> Guest {
        let ports = host.engine().queues().len() / 2;
        Guest { host, controls: Vec::new(), buffers: vec![Vec::new(); ports], heard: Vec::new() }
    }

    /// One that is as Linux is: ready, and ready for each port.
    pub(crate) fn ready(device: Console, layout: RingLayout) -> Guest {
        let mut guest = Guest::silent(device, layout);
        guest.shake_hands();
        guest
    }

    /// The same driver after its device's process was killed, with another one in its place.
    pub(crate) fn survives(self, device: Console) -> Guest {
        let Guest { host, controls, buffers, .. } = self;
        Guest { host: host.take_over(device), controls, buffers, heard: Vec::new() }
    }

    pub(crate) fn shake_hands(&mut self) {
        self.add_controls(32, 512);
        self.say(u32::MAX, event::DEVICE_READY, 1);
        self.listen();
    }

    /// Gives buffers for control messages.
    pub(crate) fn add_controls(&mut self, count: usize, size: u32) {
        for _ in 0..count {
            let buf = self.host.ram().writable(size);
            self.host.ring(2).add(&[buf]);
            self.controls.push(buf);
        }
        self.host.kick(2);
        self.host.settle();
    }

    pub(crate) fn say(&mut self, id: u32, event: u16, value: u16) {
        let bytes = [&id.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat();
        self.say_bytes(&bytes);
    }

    pub(crate) fn say_bytes(&mut self, bytes: &[u8]) {
        let buf = self.host.ram().readable(bytes);
        let id = self.host.ring(3).add(&[buf]);
        self.host.kick(3);
        self.host.settle();
        let used = self.host.ring(3).used().expect("a control message is taken at once");
        assert_eq!((used.id, used.len), (id, 0));
        self.host.ram().free(buf.addr);
    }

    /// Takes the messages that came, answers DEVICE_ADD and CONSOLE_PORT, until there are no more.
    pub(crate) fn listen(&mut self) -> Vec<(u32, u16, u16, Vec<u8>)> {
        let begin = self.heard.len();
        while let Some(message) = self.message() {
            let (id, what) = (message.0, message.1);
            self.heard.push(message);
            let buf = self.host.ram().writable(512);
            self.host.ring(2).add(&[buf]);
            self.controls.push(buf);
            self.host.kick(2);
            match what {
                event::DEVICE_ADD => self.say(id, event::PORT_READY, 1),
                event::CONSOLE_PORT => self.say(id, event::PORT_OPEN, 1),
                _ => {}
            }
        }
        self.heard[begin..].to_vec()
    }

    /// The next message, unanswered. Buffers that were too small are skipped.
    pub(crate) fn message(&mut self) -> Option<(u32, u16, u16, Vec<u8>)> {
        let mut settled = false;
        loop {
            let Some(used) = self.host.ring(2).used() else {
                if std::mem::replace(&mut settled, true) {
                    return None;
                }
                self.host.settle();
                continue;
            };
            let buf = self.controls.remove(0);
            let mut bytes = self.host.ram().contents(&buf);
            self.host.ram().free(buf.addr);
            bytes.truncate(used.len as usize);
            if bytes.len() >= 8 {
                let id = u32::from_le_bytes(bytes[..4].try_into().unwrap());
                let pair = |at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap());
                return Some((id, pair(4), pair(6), bytes[8..].to_vec()));
            }
        }
    }

    /// Output of a port: adds a buffer without waiting for it to be used.
    pub(crate) fn write(&mut self, port: usize, bytes: &[u8]) {
        let buf = self.host.ram().readable(bytes);
        let (_, transmit) = queues(port);
        self.host.ring(transmit).add(&[buf]);
        self.host.kick(transmit);
        self.host.settle();
    }

    /// How many buffers of output came back since the last time; each unwritten.
    pub(crate) fn written(&mut self, port: usize) -> usize {
        self.host.settle();
        let (_, transmit) = queues(port);
        let used = self.host.ring(transmit).drain();
        assert!(used.iter().all(|used| used.len == 0), "transmit buffers are not written");
        used.len()
    }

    /// Output that is taken at once.
    pub(crate) fn print(&mut self, port: usize, bytes: &[u8]) {
        self.write(port, bytes);
        assert_eq!(self.written(port), 1, "output is taken at once");
    }

    /// Gives a port a buffer for input.
    pub(crate) fn give(&mut self, port: usize, size: u32) {
        let buf = self.host.ram().writable(size);
        let (receive, _) = queues(port);
        self.host.ring(receive).add(&[buf]);
        self.buffers[port].push(buf);
        self.host.kick(receive);
        self.host.settle();
    }

    /// The next buffer of input.
    pub(crate) fn input(&mut self, port: usize) -> Option<Vec<u8>> {
        self.host.settle();
        let (receive, _) = queues(port);
        let used = self.host.ring(receive).used()?;
        let buf = self.buffers[port].remove(0);
        let mut bytes = self.host.ram().contents(&buf);
        self.host.ram().free(buf.addr);
        bytes.truncate(used.len as usize);
        Some(bytes)
    }

    pub(crate) fn wait_input(&mut self, port: usize) -> Vec<u8> {
        let mut input = None;
        let deadline = std::time::Instant::now() + SOON;
        while input.is_none() {
            assert!(std::time::Instant::now() < deadline, "no input");
            input = self.input(port);
        }
        input.unwrap_or_default()
    }

    /// Runs the device until it has something to say.
    pub(crate) fn wait_told(&mut self, id: u32, what: u16, value: u16) {
        let deadline = std::time::Instant::now() + SOON;
        loop {
            let heard = self.listen();
            if heard.iter().any(|message| (message.0, message.1, message.2) == (id, what, value)) {
                return;
            }
            assert!(std::time::Instant::now() < deadline, "not told: {:?}", self.heard);
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Lets the device see what happened on the host.
    pub(crate) fn look(&mut self) {
        for _ in 0..3 {
            std::thread::sleep(Duration::from_millis(1));
            self.host.settle();
        }
    }

    pub(crate) fn control(&mut self, request: ControlRequest) -> Result<HostReply, HostError> {
        let reply = self.host.engine().host_request(HostRequest::Control(request));
        self.host.settle();
        reply
    }

    pub(crate) fn get(&mut self, name: &str) -> Value {
        match self.control(ControlRequest::Get(name.into())) {
            Ok(HostReply::Value(value)) => value,
            other => panic!("{name}: {other:?}"),
        }
    }

    pub(crate) fn run(&mut self, command: &str, arguments: &[(&str, Value)]) -> Result<HostReply, HostError> {
        let arguments = arguments.iter().map(|(name, value)| ((*name).into(), value.clone())).collect();
        self.control(ControlRequest::Run(command.into(), Arguments(arguments)))
    }
}

/// A place for sockets.
pub(crate) struct Place(TempDir);

impl Place {
    pub(crate) fn new() -> Place {
        Place(TempDir::new())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// `KEY=VALUE` of a port on a Unix socket.
    pub(crate) fn unix(&self, name: &str) -> String {
        format!("backend=unix:{}", self.path(name).display())
    }

    pub(crate) fn names(&self) -> Vec<String> {
        self.0.names()
    }
}

/// A client that does not block.
pub(crate) fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).expect("a port that listens");
    stream.set_nonblocking(true).unwrap();
    stream
}

/// What there is to read now; whether the other side has closed.
pub(crate) fn drain(stream: &mut UnixStream) -> (Vec<u8>, bool) {
    let (mut all, mut buffer) = (Vec::new(), vec![0; 1 << 16]);
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return (all, true),
            Ok(count) => all.extend(&buffer[..count]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return (all, false),
            Err(error) => panic!("{error}"),
        }
    }
}

/// Writes as much as goes in.
pub(crate) fn fill(stream: &mut UnixStream, bytes: &[u8]) -> usize {
    let mut done = 0;
    while done < bytes.len() {
        match stream.write(&bytes[done..]) {
            Ok(count) => done += count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => panic!("{error}"),
        }
    }
    done
}

/// Bytes that are not the same anywhere.
pub(crate) fn pattern(count: usize) -> Vec<u8> {
    (0..count as u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).take(count).collect()
}
