//! What an operator sees and changes of the entropy device, and what it counts.
use std::time::Duration;

use virtio_rng::{Entropy, RateLimit, Rng};
use virtio_testkit::{MemoryHost, RingLayout};
use vm_virtio::controls::{ControlRequest, Value};
use vm_virtio::{HostError, HostReply, HostRequest};

const SOON: Duration = Duration::from_secs(30);

fn host(limit: Option<RateLimit>) -> MemoryHost<Rng> {
    let device = Rng::new(&Entropy::insecure_seeded(1), 0, limit).unwrap();
    MemoryHost::builder(device).layout(RingLayout::Packed).start()
}

fn request(host: &MemoryHost<Rng>, request: ControlRequest) -> Result<HostReply, HostError> {
    host.engine().host_request(HostRequest::Control(request))
}

fn get(host: &MemoryHost<Rng>, name: &str) -> Value {
    match request(host, ControlRequest::Get(name.into())).unwrap() {
        HostReply::Value(value) => value,
        other => panic!("{other:?}"),
    }
}

fn set(host: &mut MemoryHost<Rng>, name: &str, value: u64) {
    let done = request(host, ControlRequest::Set(name.into(), Value::U64(value))).unwrap();
    assert_eq!(done, HostReply::Done);
    host.settle();
}

fn ask(host: &mut MemoryHost<Rng>, len: u32) -> Option<u32> {
    let buf = host.ram().writable(len);
    host.ring(0).add(&[buf]);
    host.kick_anyway(0);
    host.settle();
    host.ring(0).used().map(|used| used.len)
}

#[test]
fn source_and_limit_are_told() {
    let limit = RateLimit::new(1000, Duration::from_secs(5)).unwrap();
    let host = host(Some(limit));
    assert_eq!(get(&host, "max-bytes"), Value::U64(1000));
    assert_eq!(get(&host, "period-ms"), Value::U64(5000));
    assert_eq!(get(&host, "source"), Value::Text("a seeded generator, INSECURE".into()));
    let error = request(&host, ControlRequest::Set("source".into(), Value::Text("/dev/zero".into())));
    assert!(matches!(error, Err(HostError::ReadOnly(_))), "{error:?}");
    let error = request(&host, ControlRequest::Set("period-ms".into(), Value::U64(0)));
    assert!(matches!(error, Err(HostError::Value { .. })), "{error:?}");
}

#[test]
fn a_limit_comes_into_force_and_goes_while_the_guest_reads() {
    let mut host = host(None);
    assert_eq!(get(&host, "max-bytes"), Value::U64(0));
    assert_eq!(ask(&mut host, 4096), Some(4096));
    set(&mut host, "period-ms", 3_600_000);
    set(&mut host, "max-bytes", 100);
    assert_eq!(ask(&mut host, 4096), Some(100));
    assert_eq!(ask(&mut host, 4096), None, "it waits for the end of the hour");
    // A larger limit serves who waits.
    set(&mut host, "max-bytes", 150);
    assert_eq!(host.ring(0).used().map(|used| used.len), Some(50));
    assert_eq!(ask(&mut host, 10), None);
    // So does none, and so would a shorter period.
    set(&mut host, "max-bytes", 0);
    assert_eq!(host.ring(0).used().map(|used| used.len), Some(10));
    assert_eq!(ask(&mut host, 4096), Some(4096));
    set(&mut host, "max-bytes", 1);
    assert_eq!(ask(&mut host, 10), Some(1));
    assert_eq!(ask(&mut host, 10), None);
    set(&mut host, "period-ms", 1);
    let mut used = None;
    assert!(host.run_until(SOON, |host| {
        used = host.ring(0).used();
        used.is_some()
    }));
}

#[test]
fn numbers_at_their_ends_do_no_harm() {
    let mut host = host(None);
    for bytes in [u64::MAX, 1, u64::MAX, 0] {
        for period in [1, u64::MAX, 1] {
            set(&mut host, "max-bytes", bytes);
            set(&mut host, "period-ms", period);
            let _ = ask(&mut host, 1);
        }
    }
    set(&mut host, "max-bytes", 0);
    while host.ring(0).used().is_some() {}
    assert_eq!(ask(&mut host, 64), Some(64));
}

#[test]
fn requests_that_make_no_sense_are_counted() {
    let mut host = host(None);
    let readable = host.ram().readable(b"nonsense");
    host.ring(0).add(&[readable]);
    host.kick_anyway(0);
    host.settle();
    assert_eq!(host.ring(0).used().map(|used| used.len), Some(0));
    let stats = host.engine().stats(0).unwrap();
    assert_eq!((stats.requests.refused, stats.requests.completed), (1, 1));
}
