//! `vhost-probe features` as a process, against back-ends that this test plays.
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::thread;

use vhost_user::{Answer, BackendEndpoint, FrontendRequest as Request, ProtocolFeatures, Received};
use virtio_testkit::daemon::TempDir;

/// A socket in a directory that ends with the test.
struct Socket(PathBuf, #[expect(dead_code, reason = "held for its drop")] TempDir);

impl Socket {
    fn new() -> Socket {
        let folder = TempDir::new();
        Socket(folder.join("socket"), folder)
    }
}

/// Asks, with patience for a back-end that lives on a machine that stands still for a while.
fn features(socket: &Socket, more: &[&str]) -> Output {
    within("30000", socket, more)
}

/// The same with so many milliseconds.
fn within(timeout: &str, socket: &Socket, more: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-probe"));
    command.arg("features").arg(&socket.0).args(["--timeout", timeout]).args(more);
    command.output().expect("the probe runs")
}

/// A block device with 60 bytes of configuration space, in front of which larger questions are refused.
fn disk(request: &Request) -> Answer {
    match request {
        Request::GetFeatures => Answer::U64(1 << 30 | 1 << 32 | 1 << 34 | 1 << 9 | 1 << 63),
        Request::GetProtocolFeatures => Answer::U64(
            (ProtocolFeatures::MQ | ProtocolFeatures::CONFIG | ProtocolFeatures::REPLY_ACK).bits() | 1 << 60,
        ),
        Request::GetQueueNum => Answer::U64(4),
        Request::GetConfig { size, .. } if *size <= 60 => {
            Answer::Config((0..*size).map(|i| u8::from(i == 1) * 8).collect())
        }
        Request::GetConfig { .. } => Answer::Failed,
        _ => Answer::Done,
    }
}

/// Serves one connection.
fn serve(socket: &Socket, answer: impl Fn(&Request) -> Answer + Send + 'static) -> thread::JoinHandle<()> {
    let listener = UnixListener::bind(&socket.0).expect("a listener");
    thread::spawn(move || {
        let (stream, _) = listener.accept().expect("a connection");
        let mut endpoint = BackendEndpoint::new(stream).expect("an endpoint");
        loop {
            match endpoint.receive() {
                Ok(Some(Received { request, ticket })) => {
                    if let Request::SetProtocolFeatures(features) = request {
                        endpoint.set_protocol_features(features);
                    }
                    endpoint.reply(ticket, answer(&request)).expect("a reply");
                }
                Ok(None) => thread::sleep(std::time::Duration::from_millis(1)),
                Err(_) => return,
            }
        }
    })
}

#[test]
fn names_and_numbers_are_listed() {
    let socket = Socket::new();
    let backend = serve(&socket, disk);
    let output = features(&socket, &["--device", "blk"]);
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    assert!(output.status.success(), "{text}");
    for line in [
        "ring_packed                     34",
        "flush                           9",
        "bit 63                          63",
        "reply_ack         3",
        "bit 60            60",
        "queues               4",
        "memory slots         unknown: configure_mem_slots is not offered",
        "configuration space  60 bytes readable",
        "capacity                  0       2048",
    ] {
        assert!(text.lines().any(|l| l == line), "{line:?} is not in\n{text}");
    }
    backend.join().expect("the back-end");
}

#[test]
fn json_says_the_same() {
    let socket = Socket::new();
    let backend = serve(&socket, disk);
    let output = features(&socket, &["--device", "block", "--json"]);
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(json["queues"], 4);
    assert_eq!(json["features"][0]["name"], "flush");
    assert_eq!(json["config"]["fields"][0]["value"], 2048);
    assert_eq!(json["memory_slots"]["unknown"], "configure_mem_slots is not offered");
    backend.join().expect("the back-end");
}

#[test]
fn a_back_end_that_says_nothing_is_a_failure_and_no_hang() {
    let socket = Socket::new();
    let _listener = UnixListener::bind(&socket.0).expect("a listener");
    let output = within("200", &socket, &[]);
    assert!(!output.status.success());
    let text = String::from_utf8(output.stderr).expect("UTF-8");
    assert!(text.contains("did not answer in time"), "{text}");
}

#[test]
fn nobody_there_is_a_failure() {
    let output = features(&Socket::new(), &[]);
    assert!(!output.status.success());
    assert!(!output.stderr.is_empty());
}
