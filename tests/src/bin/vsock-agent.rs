//! The guest's side of the vsock tests, run in the lab guest.
//!
//! | words | what it does |
//! |---|---|
//! | `flood CID PORT N` | N connections at once to a sink, each with bytes of its own |
//! | `sizes CID PORT` | a connection to a sink for each size from 1 byte to 1 MiB, sent in one write |
//! | `messages CID PORT` | SEQPACKET: messages of many sizes, each comes back as it was |
//! | `hold CID PORT` | a connection that is there until the guest is not |
//! | `broken CID PORT N M` | N connections that send all the time and M that wait, until each of them has ended |
//! | `sink PORT` | is a sink |
//! | `echo PORT` | SEQPACKET: sends each message back |
//! | `forward DAEMON` | runs DAEMON with `--forward-cid 1` against a driver of its own, and the kernel's AF_VSOCK |
use std::error::Error;
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use backplane_tests::vsock::{Listener, SEQPACKET, STREAM, Sum, Vsock, bytes, sink};
use virtio_testkit::{Buf, RingLayout, VhostUserDriver, VhostUserOptions};
use virtio_vsock::packet::{Header, Op, SEQ_EOM, SEQ_EOR, SHUTDOWN_BOTH, SHUTDOWN_SEND};

type Outcome = Result<(), Box<dyn Error>>;

/// Sizes of single writes: around each limit that somebody has.
const SIZES: [usize; 16] = [
    1,
    63,
    64,
    1000,
    4051,
    4052,
    4053,
    4096,
    32 << 10,
    (32 << 10) + 1,
    64 << 10,
    (64 << 10) + 1,
    100_000,
    256 << 10,
    (256 << 10) + 1,
    1 << 20,
];

fn flood(cid: u32, port: u32, count: u64) -> Outcome {
    let size = |seed: u64| 1 + (seed * 7919 % 30_000) as usize;
    let mut all = Vec::new();
    for seed in 0..count {
        let stream = Vsock::connect(STREAM, cid, port).map_err(|e| format!("connection {seed}: {e}"))?;
        all.push((stream, bytes(seed, size(seed))));
    }
    // All are open; they send in turns.
    let mut total = 0;
    for part in 0..4usize {
        for (stream, data) in &mut all {
            let piece = data.len().div_ceil(4);
            let from = (part * piece).min(data.len());
            let to = (from + piece).min(data.len());
            stream.write_all(&data[from..to])?;
            total += to - from;
        }
    }
    for (seed, (stream, data)) in all.iter_mut().enumerate() {
        stream.end()?;
        let mut answer = [0; 16];
        stream.read_exact(&mut answer).map_err(|e| format!("connection {seed}: {e}"))?;
        if answer != Sum::of(data).answer() {
            return Err(format!("connection {seed}: another sum").into());
        }
        if stream.read(&mut answer)? != 0 {
            return Err(format!("connection {seed}: more than the answer").into());
        }
    }
    println!("{count} connections at once, {total} bytes, every sum as sent");
    Ok(())
}

fn sizes(cid: u32, port: u32) -> Outcome {
    for (seed, size) in (1000..).zip(SIZES) {
        let mut stream = Vsock::connect(STREAM, cid, port)?;
        let data = bytes(seed, size);
        stream.write_all(&data)?;
        stream.end()?;
        let mut answer = [0; 16];
        stream.read_exact(&mut answer)?;
        if answer != Sum::of(&data).answer() {
            return Err(format!("a write of {size} bytes: another sum").into());
        }
    }
    println!("{} writes from 1 byte to 1 MiB, every sum as sent", SIZES.len());
    Ok(())
}

fn messages(cid: u32, port: u32) -> Outcome {
    let socket = Vsock::connect(SEQPACKET, cid, port)?;
    let sizes = [1, 2, 100, 4000, 4052, 4053, 10_000, 65_536, 100_000, 7];
    let mut room = vec![0; 1 << 18];
    // Several are under way before the first comes back.
    for group in sizes.chunks(5) {
        for size in group {
            socket.send(&bytes(*size as u64, *size), libc::MSG_EOR)?;
        }
        for size in group {
            let (got, _) = socket.receive(&mut room)?;
            if room[..got] != bytes(*size as u64, *size) {
                return Err(format!("a message of {size} bytes came back as {got}").into());
            }
        }
    }
    println!("{} messages from 1 to 100000 bytes, each as it was", sizes.len());
    Ok(())
}

/// Connections that somebody else ends. None may hang.
fn broken(cid: u32, port: u32, senders: usize, readers: usize) -> Outcome {
    let (told, ends) = std::sync::mpsc::channel();
    for number in 0..senders + readers {
        let mut stream = Vsock::connect(STREAM, cid, port)?;
        let told = told.clone();
        std::thread::spawn(move || {
            let data = bytes(number as u64, 1000);
            let error = loop {
                let outcome =
                    if number < senders { stream.write_all(&data) } else { stream.read_exact(&mut [0]) };
                if let Err(error) = outcome {
                    break error;
                }
                std::thread::sleep(Duration::from_millis(1));
            };
            let _ = told.send(error.kind());
        });
    }
    println!("open");
    let mut reset = 0;
    for number in 0..senders + readers {
        let kind = ends.recv_timeout(SOON).map_err(|_| format!("only {number} connections have ended"))?;
        // Who was not in a call meanwhile finds a connection that is none.
        let gone = [ErrorKind::ConnectionReset, ErrorKind::BrokenPipe, ErrorKind::NotConnected];
        if !gone.contains(&kind) {
            return Err(format!("a connection ended with {kind:?}").into());
        }
        reset += 1;
    }
    println!("{reset} connections reset, of which {readers} only waited");
    Ok(())
}

fn serve_sink(port: u32) -> Outcome {
    let listener = Listener::bind(STREAM, port)?;
    loop {
        let mut stream = listener.accept()?;
        std::thread::Builder::new().stack_size(128 << 10).spawn(move || sink(&mut stream).map(drop))?;
    }
}

fn serve_echo(port: u32) -> Outcome {
    let listener = Listener::bind(SEQPACKET, port)?;
    let mut room = vec![0; 1 << 18];
    loop {
        let socket = listener.accept()?;
        while let Ok((got, eor)) = socket.receive(&mut room) {
            if got == 0 {
                break;
            }
            socket.send(&room[..got], if eor { libc::MSG_EOR } else { 0 })?;
        }
    }
}

/// The daemon's guest: a driver without a kernel.
struct Driver {
    driver: VhostUserDriver,
    buffers: Vec<(u16, Buf)>,
}

const CID: u32 = 5;
const SOON: Duration = Duration::from_secs(20);

impl Driver {
    fn post(&mut self) {
        let buf = self.driver.ram().writable(4096);
        let id = self.driver.ring(0).add(&[buf]);
        self.driver.kick(0);
        self.buffers.push((id, buf));
    }

    fn send(&mut self, header: Header, data: &[u8]) -> Outcome {
        let header = Header { src_cid: u64::from(CID).into(), len: (data.len() as u32).into(), ..header };
        let mut chain = vec![self.driver.ram().readable(zerocopy::IntoBytes::as_bytes(&header))];
        if !data.is_empty() {
            chain.push(self.driver.ram().readable(data));
        }
        self.driver.ring(1).add(&chain);
        self.driver.kick(1);
        self.driver.wait_used(1, SOON).ok_or("the daemon takes nothing")?;
        Ok(())
    }

    fn next(&mut self, wanted: Op) -> Result<(Header, Vec<u8>), Box<dyn Error>> {
        let used = self.driver.wait_used(0, SOON).ok_or(format!("no {wanted:?}"))?;
        let at = self.buffers.iter().position(|(id, _)| *id == used.id).ok_or("a foreign buffer")?;
        let (_, buf) = self.buffers.swap_remove(at);
        let bytes = self.driver.ram().contents(&buf);
        let bytes = bytes.get(..used.len as usize).ok_or("too long")?;
        let (header, data) =
            <Header as zerocopy::FromBytes>::read_from_prefix(bytes).map_err(|_| "no header")?;
        let data = data.to_vec();
        self.post();
        if header.op.get() != wanted.number() {
            return Err(format!("{header:?} instead of {wanted:?}").into());
        }
        Ok((header, data))
    }
}

fn packet(op: Op, kind: u16, port: u32, peer: u32) -> Header {
    Header {
        dst_cid: 2.into(),
        src_port: port.into(),
        dst_port: peer.into(),
        kind: kind.into(),
        op: op.number().into(),
        buf_alloc: (1 << 18).into(),
        ..Header::default()
    }
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, got: T, wanted: T) -> Outcome {
    if got == wanted { Ok(()) } else { Err(format!("{what}: {got:?} instead of {wanted:?}").into()) }
}

/// Both ways through the kernel's AF_VSOCK: this system is host and, by the daemon, guest.
fn forward(daemon: &[String]) -> Outcome {
    let socket = PathBuf::from("/tmp/forward.sock");
    let (program, first) = daemon.split_first().ok_or("no daemon")?;
    let mut child = Command::new(program)
        .args(first)
        .args(["--guest-cid", "5", "--forward-cid", "1", "--forward-listen", "9001+9002/seqpacket"])
        .arg("--socket")
        .arg(&socket)
        .stdin(Stdio::null())
        .spawn()?;
    let outcome = forwarded(&socket);
    child.kill()?;
    child.wait()?;
    outcome
}

fn forwarded(socket: &Path) -> Outcome {
    let deadline = Instant::now() + SOON;
    while !socket.exists() {
        if Instant::now() > deadline {
            return Err("the daemon does not listen".into());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let driver = VhostUserDriver::connect(socket, VhostUserOptions::new(RingLayout::Split))?;
    let mut guest = Driver { driver, buffers: Vec::new() };
    (0..8).for_each(|_| guest.post());

    // From the guest to the host: refused, then STREAM with half-close in both directions.
    guest.send(packet(Op::Request, 1, 50, 7000), &[])?;
    guest.next(Op::Rst)?;
    let listener = Listener::bind(STREAM, 7000)?;
    guest.send(packet(Op::Request, 1, 50, 7000), &[])?;
    guest.next(Op::Response)?;
    let mut stream = listener.accept()?;
    guest.send(packet(Op::Rw, 1, 50, 7000), &bytes(1, 3000))?;
    guest.send(Header { flags: SHUTDOWN_SEND.into(), ..packet(Op::Shutdown, 1, 50, 7000) }, &[])?;
    let mut got = Vec::new();
    stream.read_to_end(&mut got)?;
    same("bytes from the guest", got, bytes(1, 3000))?;
    stream.write_all(&bytes(2, 3000))?;
    same("bytes to the guest", guest.next(Op::Rw)?.1, bytes(2, 3000))?;
    drop(stream);
    let (shut, _) = guest.next(Op::Shutdown)?;
    if shut.flags.get() & SHUTDOWN_SEND == 0 {
        return Err("the end of the host's side is not told".into());
    }
    guest.send(Header { flags: SHUTDOWN_BOTH.into(), ..packet(Op::Shutdown, 1, 50, 7000) }, &[])?;
    if guest.next(Op::Rst).is_err() {
        // A change of its mind about the end may come first.
        guest.next(Op::Rst)?;
    }
    println!("STREAM to the host: 3000 bytes each way, refusal, half-close");

    // From the host to the guest: a port of the host.
    let client = std::thread::spawn(|| -> std::io::Result<Vec<u8>> {
        let mut stream = Vsock::connect(STREAM, 1, 9001)?;
        stream.write_all(&bytes(3, 2000))?;
        let mut got = vec![0; 2000];
        stream.read_exact(&mut got)?;
        Ok(got)
    });
    let (request, _) = guest.next(Op::Request)?;
    same("the guest's port", request.dst_port.get(), 9001)?;
    let peer = request.src_port.get();
    guest.send(packet(Op::Response, 1, 9001, peer), &[])?;
    same("bytes of the client", guest.next(Op::Rw)?.1, bytes(3, 2000))?;
    guest.send(packet(Op::Rw, 1, 9001, peer), &bytes(4, 2000))?;
    same("bytes to the client", client.join().map_err(|_| "the client panicked")??, bytes(4, 2000))?;
    println!("STREAM from the host: 2000 bytes each way");
    guest.next(Op::Shutdown)?;
    guest.send(packet(Op::Rst, 1, 9001, peer), &[])?;

    // Messages, with ends of records, which AF_VSOCK tells.
    let client = std::thread::spawn(|| -> std::io::Result<Vec<(Vec<u8>, bool)>> {
        let socket = Vsock::connect(SEQPACKET, 1, 9002)?;
        socket.send(b"one", 0)?;
        socket.send(b"two", libc::MSG_EOR)?;
        let mut got = Vec::new();
        let mut room = [0; 100];
        for _ in 0..2 {
            let (len, eor) = socket.receive(&mut room)?;
            got.push((room[..len].to_vec(), eor));
        }
        Ok(got)
    });
    let (request, _) = guest.next(Op::Request)?;
    same("its type", request.kind.get(), 2)?;
    let peer = request.src_port.get();
    guest.send(packet(Op::Response, 2, 9002, peer), &[])?;
    for (text, flags) in [("one", SEQ_EOM), ("two", SEQ_EOM | SEQ_EOR)] {
        let (header, data) = guest.next(Op::Rw)?;
        same("a message", (data.as_slice(), header.flags.get()), (text.as_bytes(), flags))?;
    }
    for (text, flags) in [("three", SEQ_EOM), ("four", SEQ_EOM | SEQ_EOR)] {
        guest.send(Header { flags: flags.into(), ..packet(Op::Rw, 2, 9002, peer) }, text.as_bytes())?;
    }
    let wanted = vec![(b"three".to_vec(), false), (b"four".to_vec(), true)];
    same("messages to the client", client.join().map_err(|_| "the client panicked")??, wanted)?;
    println!("SEQPACKET from the host: 2 messages each way, with the ends of records");
    Ok(())
}

fn obey(words: &[String]) -> Outcome {
    let number = |at: usize| -> Result<u32, Box<dyn Error>> {
        Ok(words.get(at).ok_or("a number is missing")?.parse()?)
    };
    match words.first().map(String::as_str) {
        Some("flood") => flood(number(1)?, number(2)?, number(3)?.into()),
        Some("sizes") => sizes(number(1)?, number(2)?),
        Some("messages") => messages(number(1)?, number(2)?),
        Some("hold") => {
            let _stream = Vsock::connect(STREAM, number(1)?, number(2)?)?;
            println!("held");
            std::thread::sleep(Duration::from_secs(1000));
            Ok(())
        }
        Some("broken") => broken(number(1)?, number(2)?, number(3)? as usize, number(4)? as usize),
        Some("sink") => serve_sink(number(1)?),
        Some("echo") => serve_echo(number(1)?),
        Some("forward") => forward(words.get(1..).unwrap_or_default()),
        _ => Err("no such word".into()),
    }
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match obey(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("{words:?}: {error}");
            ExitCode::FAILURE
        }
    }
}
