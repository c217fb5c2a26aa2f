//! A guest in memory that speaks packets, and sockets of the host beside it.
#![allow(dead_code, reason = "each test binary uses what it needs")]
use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use virtio_testkit::daemon::TempDir;
use virtio_testkit::{Buf, MemoryHost, RingLayout, Shape};
use virtio_vsock::packet::{HEADER, HOST_CID, Header, Kind, Op};
use virtio_vsock::{Exchange, HostSide, Settings, Vsock};
use vm_virtio::Features;
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, IntoBytes};

/// Longer than anything takes.
pub(crate) const SOON: Duration = Duration::from_secs(20);
/// The guest's context ID.
pub(crate) const CID: u32 = 3;

pub(crate) const RX: usize = 0;
pub(crate) const TX: usize = 1;
pub(crate) const EVENT: usize = 2;

/// A packet, as it is sent or was received.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Packet {
    pub(crate) header: Header,
    pub(crate) data: Vec<u8>,
}

impl Packet {
    pub(crate) fn op(&self) -> u16 {
        self.header.op.get()
    }

    pub(crate) fn is(&self, op: Op) -> bool {
        self.op() == op.number()
    }
}

/// One end of a flow at the guest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct End {
    pub(crate) port: u32,
    pub(crate) peer: (u32, u32),
    pub(crate) kind: Kind,
}

impl End {
    pub(crate) fn packet(&self, op: Op) -> Header {
        Header {
            src_cid: U64::new(CID.into()),
            dst_cid: U64::new(self.peer.0.into()),
            src_port: U32::new(self.port),
            dst_port: U32::new(self.peer.1),
            kind: U16::new(self.kind.number()),
            op: U16::new(op.number()),
            buf_alloc: U32::new(1 << 20),
            ..Header::default()
        }
    }

    pub(crate) fn data(&self, len: usize) -> Header {
        Header { len: U32::new(len as u32), ..self.packet(Op::Rw) }
    }

    pub(crate) fn with_flags(&self, op: Op, flags: u32) -> Header {
        Header { flags: U32::new(flags), ..self.packet(op) }
    }
}

/// A flow from this port of the guest to that of the host.
pub(crate) fn to_host(port: u32, peer: u32) -> End {
    End { port, peer: (HOST_CID, peer), kind: Kind::Stream }
}

/// See the [module](self).
pub(crate) struct Guest {
    pub(crate) host: MemoryHost<Vsock>,
    pub(crate) dir: TempDir,
    buffers: HashMap<u16, Buf>,
    /// Size of receive buffers, which are made available again when they were used. None: the guest reads no more.
    pub(crate) receives: Option<u32>,
    got: Vec<Packet>,
}

pub(crate) fn settings(dir: &TempDir) -> Settings {
    Settings::new(CID.into(), HostSide::Unix(dir.join("vm")))
}

impl Guest {
    pub(crate) fn new(layout: RingLayout) -> Guest {
        Guest::with(layout, Features::empty(), |_| ())
    }

    pub(crate) fn with(layout: RingLayout, without: Features, tune: impl FnOnce(&mut Settings)) -> Guest {
        let dir = TempDir::new();
        let mut settings = settings(&dir);
        tune(&mut settings);
        Guest::of(Vsock::new(settings, &Exchange::new()).expect("a device"), dir, layout, without)
    }

    pub(crate) fn of(device: Vsock, dir: TempDir, layout: RingLayout, without: Features) -> Guest {
        let host = MemoryHost::builder(device).layout(layout).without(without).start();
        Guest::again(host, dir)
    }

    /// A driver that has just initialised the device.
    pub(crate) fn again(host: MemoryHost<Vsock>, dir: TempDir) -> Guest {
        let mut guest = Guest { host, dir, buffers: HashMap::new(), receives: Some(4096), got: Vec::new() };
        guest.fill();
        guest
    }

    /// Where connections to that port go.
    pub(crate) fn path(&self, port: u32) -> PathBuf {
        self.dir.join(&format!("vm_{port}"))
    }

    pub(crate) fn listen(&self, port: u32) -> UnixListener {
        let listener = UnixListener::bind(self.path(port)).expect("a listener");
        listener.set_nonblocking(true).expect("a listener");
        listener
    }

    /// Makes receive buffers available, as many as there is room for.
    pub(crate) fn fill(&mut self) {
        let Some(size) = self.receives else { return };
        while self.host.ring(RX).free_slots() > 0 {
            let buf = self.host.ram().writable(size);
            let id = self.host.ring(RX).add(&[buf]);
            self.buffers.insert(id, buf);
        }
        self.host.kick(RX);
    }

    /// Makes one receive buffer of that size available.
    pub(crate) fn post(&mut self, chain: &[Buf]) -> u16 {
        let id = self.host.ring(RX).add(chain);
        self.host.kick(RX);
        id
    }

    /// Lets the device run, and takes what it has received.
    pub(crate) fn settle(&mut self) {
        loop {
            self.host.settle();
            let mut some = false;
            while let Some(used) = self.host.ring(RX).used() {
                let Some(buf) = self.buffers.remove(&used.id) else { continue };
                some = true;
                let bytes = self.host.ram().written(&[buf]);
                self.host.ram().free(buf.addr);
                let bytes = &bytes[..used.len as usize];
                let (header, data) = Header::read_from_prefix(bytes).expect("a whole header");
                assert_eq!(data.len(), header.len.get() as usize, "used length (contract: 44 + payload)");
                self.got.push(Packet { header, data: data.to_vec() });
            }
            if !some || self.receives.is_none() {
                return;
            }
            self.fill();
        }
    }

    /// What was received since the last time.
    pub(crate) fn received(&mut self) -> Vec<Packet> {
        self.settle();
        std::mem::take(&mut self.got)
    }

    /// Waits for something: more than `settle` only where time matters.
    #[track_caller]
    pub(crate) fn wait(&mut self, what: &str, mut done: impl FnMut(&mut Guest) -> bool) {
        let deadline = std::time::Instant::now() + SOON;
        loop {
            self.settle();
            if done(self) {
                return;
            }
            assert!(std::time::Instant::now() < deadline, "{what} did not come");
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Waits for the next packet.
    #[track_caller]
    pub(crate) fn next(&mut self) -> Packet {
        self.wait("a packet", |guest| !guest.got.is_empty());
        self.got.remove(0)
    }

    /// Nothing is received.
    #[track_caller]
    pub(crate) fn quiet(&mut self) {
        assert_eq!(self.received(), [], "nothing is to come");
    }

    /// Sends bytes as they are, in these pieces; the device has to give the chain back with length 0.
    #[track_caller]
    pub(crate) fn send_raw(&mut self, pieces: &[&[u8]], shape: Shape) {
        let chain: Vec<Buf> = pieces.iter().map(|piece| self.host.ram().readable(piece)).collect();
        let id = self.host.ring(TX).add_as(&chain, shape);
        self.host.kick(TX);
        self.settle();
        let used = self.host.ring(TX).used().expect("tx goes on");
        assert_eq!((used.id, used.len), (id, 0), "tx used length (contract: 0)");
        chain.iter().for_each(|buf| self.host.ram().free(buf.addr));
    }

    #[track_caller]
    pub(crate) fn send(&mut self, header: Header, data: &[u8]) {
        if data.is_empty() {
            self.send_raw(&[header.as_bytes()], Shape::Direct);
        } else {
            self.send_raw(&[header.as_bytes(), data], Shape::Direct);
        }
    }

    /// A connection of the guest to the host, and its end there.
    #[track_caller]
    pub(crate) fn connect(&mut self, end: End) -> UnixStream {
        let listener = self.listen(end.peer.1);
        self.send(end.packet(Op::Request), &[]);
        let answer = self.next();
        assert!(answer.is(Op::Response), "{answer:?}");
        let (stream, _) = listener.accept().expect("a connection");
        stream.set_nonblocking(true).expect("a stream");
        let _ = std::fs::remove_file(self.path(end.peer.1));
        stream
    }

    /// A client of the host that has said which port it wants.
    pub(crate) fn client(&self, line: &str) -> UnixStream {
        let mut stream = UnixStream::connect(self.dir.join("vm")).expect("a client");
        stream.set_nonblocking(true).expect("a stream");
        stream.write_all(line.as_bytes()).expect("a line");
        stream
    }

    /// The request of such a client, and the guest's end of it.
    #[track_caller]
    pub(crate) fn asked(&mut self) -> End {
        let request = self.next();
        assert!(request.is(Op::Request), "{request:?}");
        end_of(&request.header)
    }
}

/// The guest's end of a flow.
pub(crate) fn end_of(header: &Header) -> End {
    End {
        port: header.dst_port.get(),
        peer: (header.src_cid.get() as u32, header.src_port.get()),
        kind: Kind::of(header.kind.get()).expect("a type"),
    }
}

/// What can be read now.
pub(crate) fn read_all(stream: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut part = [0; 65536];
    loop {
        match stream.read(&mut part) {
            Ok(0) => return bytes,
            Ok(n) => bytes.extend(&part[..n]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return bytes,
            Err(error) => panic!("{error}"),
        }
    }
}

/// Whether the other end has closed, and nothing is left to read.
pub(crate) fn is_closed(stream: &mut UnixStream) -> bool {
    match stream.read(&mut [0; 16]) {
        Ok(0) => true,
        Ok(_) => false,
        Err(error) => error.kind() != ErrorKind::WouldBlock,
    }
}

/// Bytes that repeat nowhere near.
pub(crate) fn pattern(len: usize) -> Vec<u8> {
    (0..len as u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

/// Bytes of a header.
pub(crate) fn bytes(header: &Header) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    bytes.copy_from_slice(header.as_bytes());
    bytes
}
