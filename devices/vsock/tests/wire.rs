//! The daemon: its command line, its sockets, guests of one process.
#![cfg(feature = "daemon")]
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Output;
use std::time::Duration;

use virtio_testkit::daemon::{DaemonProcess, TempDir, announcing};
use virtio_testkit::{Buf, RingLayout, VhostUserDriver, VhostUserOptions};
use virtio_vsock::packet::{Header, Op};
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, IntoBytes};

const SOON: Duration = Duration::from_secs(20);
const DAEMON: &str = env!("CARGO_BIN_EXE_vhost-device-vsock");

fn run(args: &[&str]) -> Output {
    DaemonProcess::run(DAEMON, args)
}

fn start(args: &[&str]) -> DaemonProcess {
    let mut command = announcing(Path::new(DAEMON));
    DaemonProcess::ready(command.args(["--log-level", "warn"]).args(args))
}

/// A guest behind a front-end, with receive buffers.
struct Guest {
    driver: VhostUserDriver,
    cid: u32,
    buffers: Vec<(u16, Buf)>,
}

impl Guest {
    fn connect(socket: &Path, layout: RingLayout) -> Guest {
        let mut driver = VhostUserDriver::connect(socket, VhostUserOptions::new(layout)).expect("a device");
        let config = driver.endpoint().get_config(0, 8, 0).expect("a configuration");
        let cid = u64::from_le_bytes(config.try_into().expect("eight bytes"));
        let mut guest = Guest { driver, cid: cid as u32, buffers: Vec::new() };
        for _ in 0..8 {
            guest.post();
        }
        guest
    }

    fn post(&mut self) {
        let buf = self.driver.ram().writable(4096);
        let id = self.driver.ring(0).add(&[buf]);
        self.driver.kick(0);
        self.buffers.push((id, buf));
    }

    fn send(&mut self, header: Header, data: &[u8]) {
        let header =
            Header { src_cid: U64::new(self.cid.into()), len: U32::new(data.len() as u32), ..header };
        let mut chain = vec![self.driver.ram().readable(header.as_bytes())];
        if !data.is_empty() {
            chain.push(self.driver.ram().readable(data));
        }
        self.driver.ring(1).add(&chain);
        self.driver.kick(1);
        assert_eq!(self.driver.wait_used(1, SOON).expect("it is taken").len, 0);
    }

    fn next(&mut self) -> (Header, Vec<u8>) {
        let used = self.driver.wait_used(0, SOON).expect("a packet");
        let at = self.buffers.iter().position(|(id, _)| *id == used.id).expect("one of ours");
        let (_, buf) = self.buffers.swap_remove(at);
        let bytes = self.driver.ram().contents(&buf);
        let (header, data) = Header::read_from_prefix(&bytes[..used.len as usize]).expect("a header");
        let answer = (header, data.to_vec());
        self.post();
        answer
    }
}

fn packet(op: Op, port: u32, peer: (u32, u32)) -> Header {
    Header {
        dst_cid: U64::new(peer.0.into()),
        src_port: U32::new(port),
        dst_port: U32::new(peer.1),
        kind: U16::new(1),
        op: U16::new(op.number()),
        buf_alloc: U32::new(1 << 18),
        ..Header::default()
    }
}

#[track_caller]
fn refused(args: &[&str], words: &[&str]) {
    DaemonProcess::refuses(DAEMON, args, words);
}

#[test]
fn senseless_command_lines_are_refused_before_a_socket_exists() {
    let dir = TempDir::new();
    let path = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    let (socket, uds) = (path("s"), path("vm"));
    refused(&["--socket", &socket, "--guest-cid", "2"], &["context ID 2 is reserved"]);
    refused(&["--socket", &socket, "--uds-path", &uds, "--forward-cid", "1"], &["--forward-cid"]);
    refused(&["--socket", &socket, "--forward-listen", "1"], &["--forward-cid"]);
    refused(&["--socket", &socket, "--tx-buffer-size", "12"], &["4096"]);
    refused(&["--socket", &socket, "--queue-size", "1000"], &["power of two"]);
    refused(&["--vm", "guest-cid=3"], &["no socket"]);
    refused(&["--vm", "guest-cid=3,sucket=/x"], &["no key", "sucket"]);
    refused(&["--vm", &format!("socket={socket}"), "--guest-cid", "4"], &["beside --vm"]);
    refused(&["--vm", &format!("socket={socket}"), "--socket", &socket], &["--socket-path"]);
    refused(&["--config", "/no/such/file"], &["/no/such/file", "README"]);
    let file = path("config.yaml");
    for (text, word) in [("vms: []", "no guest"), ("vms:\n - cid: 3", "cid"), ("[", "config.yaml")] {
        std::fs::write(&file, text).unwrap();
        refused(&["--config", &file], &[word]);
    }
    std::fs::remove_file(&file).unwrap();
    assert_eq!(dir.names(), Vec::<String>::new());
}

#[test]
fn print_capabilities_whatever_else_is_said() {
    let output = run(&["--vm", "nonsense", "--print-capabilities"]);
    assert!(output.status.success());
    assert_eq!(
        String::from_utf8(output.stdout).unwrap().split_whitespace().collect::<String>(),
        r#"{"type":"vsock"}"#
    );
}

/// Both directions through Unix sockets; the sockets are gone at the end.
#[test]
fn a_guest_and_the_host() {
    for layout in RingLayout::ALL {
        let dir = TempDir::new();
        let path = |name: &str| dir.join(name).to_str().unwrap().to_owned();
        let mut daemon = start(&["--socket", &path("s"), "--uds-path", &path("vm"), "--guest-cid", "7"]);
        let mut guest = Guest::connect(&dir.join("s"), layout);
        assert_eq!(guest.cid, 7);
        let listener = UnixListener::bind(dir.join("vm_99")).unwrap();
        guest.send(packet(Op::Request, 5, (2, 99)), &[]);
        assert_eq!(guest.next().0.op.get(), Op::Response.number());
        let (mut stream, _) = listener.accept().unwrap();
        guest.send(packet(Op::Rw, 5, (2, 99)), b"ping");
        let mut four = [0; 4];
        stream.read_exact(&mut four).unwrap();
        assert_eq!(&four, b"ping");
        stream.write_all(b"pong").unwrap();
        assert_eq!(guest.next().1, b"pong");
        // A client of the host.
        let mut client = UnixStream::connect(dir.join("vm")).unwrap();
        client.write_all(b"CONNECT 33\nhi").unwrap();
        let (request, _) = guest.next();
        assert_eq!((request.op.get(), request.dst_port.get()), (Op::Request.number(), 33));
        let port = request.src_port.get();
        guest.send(packet(Op::Response, 33, (2, port)), &[]);
        assert_eq!(guest.next().1, b"hi");
        let mut line = vec![0; format!("OK {port}\n").len()];
        client.read_exact(&mut line).unwrap();
        assert_eq!(line, format!("OK {port}\n").as_bytes());
        assert!(daemon.is_running());
        drop(guest);
        assert!(daemon.terminate().success());
        assert_eq!(dir.names(), ["vm_99"], "no socket is left");
    }
}

/// Guests of one process, from options and from a file: siblings talk, a front-end that was never there refuses.
#[test]
fn siblings_of_one_daemon() {
    let dir = TempDir::new();
    let path = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    let vm = |cid: u32, groups: &str| {
        format!("guest-cid={cid},socket={},groups={groups}", path(&format!("s{cid}")))
    };
    let config = format!(
        "vms:\n  - guest_cid: 3\n    socket: {}\n    groups: a\n  - guest-cid: 4\n    socket: {}\n    groups: a+b\n  \
         - {{guest_cid: 5, socket: {}, groups: b}}\n",
        path("s3"),
        path("s4"),
        path("s5")
    );
    std::fs::write(dir.join("config.yaml"), config).unwrap();
    let lines: [Vec<String>; 2] = [
        vec!["--vm".into(), vm(3, "a"), "--vm".into(), vm(4, "a+b"), "--vm".into(), vm(5, "b")],
        vec!["--config".into(), path("config.yaml")],
    ];
    for line in lines {
        let daemon = start(&line.iter().map(String::as_str).collect::<Vec<_>>());
        let mut one = Guest::connect(&dir.join("s3"), RingLayout::Split);
        // Not booted yet, and in no common group.
        for cid in [4, 5] {
            one.send(packet(Op::Request, 5, (cid, 99)), &[]);
            assert_eq!(one.next().0.op.get(), Op::Rst.number(), "{cid}");
        }
        let mut other = Guest::connect(&dir.join("s4"), RingLayout::Packed);
        one.send(packet(Op::Request, 5, (4, 99)), &[]);
        assert_eq!(other.next().0.op.get(), Op::Request.number());
        other.send(packet(Op::Response, 99, (3, 5)), &[]);
        assert_eq!(one.next().0.op.get(), Op::Response.number());
        one.send(packet(Op::Rw, 5, (4, 99)), b"hello, sibling");
        assert_eq!(other.next().1, b"hello, sibling");
        drop((one, other));
        assert!(daemon.terminate().success());
    }
}

/// Guests with the same options have context IDs and paths of their own.
#[test]
fn guests_by_number() {
    let dir = TempDir::new();
    let path = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    let _daemon = start(&["-s", &path("s"), "-c", "2", "--uds-path", &path("vm"), "--guest-cid", "10"]);
    for (number, cid) in [("0", 10), ("1", 11)] {
        assert_eq!(Guest::connect(&dir.join(&format!("s{number}")), RingLayout::Split).cid, cid);
        assert!(dir.join(&format!("vm{number}")).exists());
    }
}

#[test]
fn a_socket_of_somebody_else_is_left_alone() {
    let dir = TempDir::new();
    let path = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    let _listener = UnixListener::bind(dir.join("vm")).unwrap();
    let output = run(&["--socket", &path("s"), "--uds-path", &path("vm")]);
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("another process listens"));
    std::fs::write(dir.join("file"), "precious").unwrap();
    let output = run(&["--socket", &path("s"), "--uds-path", &path("file")]);
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("not a socket"));
    // One whose owner is gone makes way.
    drop(UnixListener::bind(dir.join("stale")).unwrap());
    let _daemon = start(&["--socket", &path("s"), "--uds-path", &path("stale")]);
}
