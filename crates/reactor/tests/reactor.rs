//! The promises of `Reactor`, each shown on real files.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use reactor::{Event, Interest, Reactor, Readiness, Registry, Token, Trigger, Waker};
use rustix::event::{PollFd, PollFlags, Timespec};

const A: Token = Token::new(1);
const B: Token = Token::new(2);

fn tick() -> Duration {
    Duration::from_millis(20)
}

fn events(reactor: &mut Reactor, timeout: Option<Duration>) -> Vec<Event> {
    reactor.wait(timeout).unwrap();
    std::iter::from_fn(|| reactor.next()).collect()
}

fn now(reactor: &mut Reactor) -> Vec<Event> {
    events(reactor, Some(Duration::ZERO))
}

/// The tokens of the collected watch events, in order of token.
fn ready(reactor: &mut Reactor) -> Vec<Token> {
    let mut tokens: Vec<Token> = now(reactor)
        .into_iter()
        .map(|event| match event {
            Event::Ready { token, .. } => token,
            other => panic!("{other:?}"),
        })
        .collect();
    tokens.sort();
    tokens
}

fn readiness(reactor: &mut Reactor) -> Readiness {
    match now(reactor)[..] {
        [Event::Ready { ready, .. }] => ready,
        ref other => panic!("{other:?}"),
    }
}

fn is_pollable(reactor: &Reactor, timeout: Duration) -> bool {
    let timeout = Timespec::try_from(timeout).unwrap();
    let mut fds = [PollFd::new(reactor, PollFlags::IN)];
    rustix::event::poll(&mut fds, Some(&timeout)).unwrap() == 1
}

#[test]
fn tokens_of_devices_and_hosts_never_meet() {
    assert_ne!(Token::new(7), Token::host(7));
    assert!(Token::host(0).is_host() && !Token::new(u32::MAX).is_host());
    assert_eq!(Token::host(u32::MAX).number(), u32::MAX);
    assert_eq!(Token::new(u32::MAX).number(), u32::MAX);
}

#[test]
fn level_reports_as_long_as_it_lasts_and_edge_once_for_each_arrival() {
    let mut reactor = Reactor::new().unwrap();
    let (level, edge) = (Waker::new().unwrap(), Waker::new().unwrap());
    reactor.watch(level.as_fd(), A, Interest::READ).unwrap();
    reactor.watch(edge.as_fd(), B, Interest::READ_EDGE).unwrap();
    assert_eq!(ready(&mut reactor), []);
    level.wake();
    edge.wake();
    assert_eq!(ready(&mut reactor), [A, B]);
    assert_eq!(ready(&mut reactor), [A]);
    // The eventfd has not been read in between: each write is an event all the same.
    edge.wake();
    level.clear();
    assert_eq!(ready(&mut reactor), [B]);
    assert_eq!(ready(&mut reactor), []);
}

#[test]
fn readiness_tells_directions_and_the_other_ends_close() {
    let mut reactor = Reactor::new().unwrap();
    let (near, mut far) = UnixStream::pair().unwrap();
    reactor.watch(near.as_fd(), A, Interest::READ_WRITE).unwrap();
    let got = readiness(&mut reactor);
    assert!(got.writable() && !got.readable() && !got.closed() && !got.error());
    reactor.watch(near.as_fd(), A, Interest::READ).unwrap();
    assert_eq!(now(&mut reactor), []);
    far.write_all(b"x").unwrap();
    drop(far);
    let got = readiness(&mut reactor);
    assert!(got.readable() && got.closed() && !got.writable());
}

#[test]
fn a_half_close_is_reported_to_somebody_who_reads() {
    let mut reactor = Reactor::new().unwrap();
    let (near, far) = UnixStream::pair().unwrap();
    reactor.watch(near.as_fd(), A, Interest::READ).unwrap();
    far.shutdown(std::net::Shutdown::Write).unwrap();
    let got = readiness(&mut reactor);
    assert!(got.readable() && got.closed());
}

#[test]
fn a_half_close_is_not_reported_to_somebody_who_does_not_read() {
    let mut reactor = Reactor::new().unwrap();
    let (near, far) = UnixStream::pair().unwrap();
    let quiet = Interest { readable: false, writable: false, trigger: Trigger::Level };
    reactor.watch(near.as_fd(), A, quiet).unwrap();
    far.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(now(&mut reactor), []);
}

#[test]
fn events_already_collected_are_dropped_by_unwatch() {
    let mut reactor = Reactor::new().unwrap();
    let (a, b) = (Waker::new().unwrap(), Waker::new().unwrap());
    reactor.watch(a.as_fd(), A, Interest::READ).unwrap();
    reactor.watch(b.as_fd(), B, Interest::READ).unwrap();
    a.wake();
    b.wake();
    reactor.wait(Some(Duration::ZERO)).unwrap();
    let Some(Event::Ready { token: first, .. }) = reactor.next() else { panic!() };
    reactor.unwatch(if first == A { B } else { A });
    assert_eq!(reactor.next(), None);
}

#[test]
fn events_already_collected_do_not_reach_a_new_watch_of_the_same_token_or_slot() {
    let mut reactor = Reactor::new().unwrap();
    let (old, new) = (Waker::new().unwrap(), Waker::new().unwrap());
    reactor.watch(old.as_fd(), A, Interest::READ).unwrap();
    old.wake();
    reactor.wait(Some(Duration::ZERO)).unwrap();
    // The same token and the same slot, another file, which is not ready.
    reactor.unwatch(A);
    reactor.watch(new.as_fd(), A, Interest::READ).unwrap();
    assert_eq!(reactor.next(), None);
    reactor.watch(old.as_fd(), A, Interest::READ).unwrap();
    reactor.wait(Some(Duration::ZERO)).unwrap();
    reactor.watch(new.as_fd(), A, Interest::READ).unwrap();
    assert_eq!(reactor.next(), None);
}

#[test]
fn a_closed_and_reused_number_never_disturbs_another_watch() {
    let mut reactor = Reactor::new().unwrap();
    let (old, old_far) = UnixStream::pair().unwrap();
    let number = old.as_raw_fd();
    reactor.watch(old.as_fd(), A, Interest::READ).unwrap();
    drop(old);
    // Let the number be taken by another file. Tests run side by side, so it may take a few.
    let mut others: Vec<Waker> = Vec::new();
    for _ in 0..64 {
        others.push(Waker::new().unwrap());
        if others.iter().any(|other| other.as_fd().as_raw_fd() == number) {
            break;
        }
    }
    for (n, other) in others.iter().enumerate() {
        reactor.watch(other.as_fd(), Token::new(100 + n as u32), Interest::READ).unwrap();
    }
    reactor.unwatch(A);
    for other in &others {
        other.wake();
    }
    assert_eq!(ready(&mut reactor).len(), others.len(), "a watch was removed with a stranger's");
    // And the old file is really gone from the reactor: its other end sees the close.
    let mut end = Vec::new();
    assert_eq!((&old_far).read_to_end(&mut end).unwrap(), 0);
}

#[test]
fn a_watch_survives_the_close_of_the_callers_descriptor_without_spinning() {
    let mut reactor = Reactor::new().unwrap();
    let eventfd = Waker::new().unwrap();
    let copy: OwnedFd = eventfd.as_fd().try_clone_to_owned().unwrap();
    reactor.watch(copy.as_fd(), A, Interest::READ).unwrap();
    drop(copy);
    eventfd.wake();
    assert_eq!(ready(&mut reactor), [A]);
    // The file is still open through `eventfd`: without a real removal it would be reported for ever.
    reactor.unwatch(A);
    assert!(!is_pollable(&reactor, Duration::ZERO));
}

#[test]
fn one_file_may_be_watched_twice() {
    let mut reactor = Reactor::new().unwrap();
    let waker = Waker::new().unwrap();
    reactor.watch(waker.as_fd(), A, Interest::READ).unwrap();
    reactor.watch(waker.as_fd(), B, Interest::READ).unwrap();
    waker.wake();
    assert_eq!(ready(&mut reactor), [A, B]);
    reactor.unwatch(A);
    assert_eq!(ready(&mut reactor), [B]);
}

#[test]
fn a_file_without_readiness_is_refused_and_the_former_watch_stays() {
    let mut reactor = Reactor::new().unwrap();
    let waker = Waker::new().unwrap();
    reactor.watch(waker.as_fd(), A, Interest::READ).unwrap();
    let file = std::fs::File::open(env!("CARGO_MANIFEST_PATH")).unwrap();
    let error = reactor.watch(file.as_fd(), A, Interest::READ).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
    waker.wake();
    assert_eq!(ready(&mut reactor), [A]);
}

#[test]
fn unwatch_of_nothing_is_nothing_and_retain_ends_the_rest() {
    let mut reactor = Reactor::new().unwrap();
    reactor.unwatch(A);
    reactor.cancel_timer(A);
    let waker = Waker::new().unwrap();
    waker.wake();
    for token in [A, B, Token::host(1)] {
        reactor.watch(waker.as_fd(), token, Interest::READ).unwrap();
        reactor.set_timer(token, Instant::now());
    }
    reactor.retain(Token::is_host);
    assert!(reactor.is_watched(Token::host(1)) && !reactor.is_watched(A));
    let got = now(&mut reactor);
    assert_eq!(got.len(), 2, "{got:?}");
    assert!(got.iter().all(|event| matches!(
        event,
        Event::Timer { token } | Event::Ready { token, .. } if token.is_host()
    )));
}

#[test]
fn more_ready_files_than_a_batch_are_all_served() {
    let mut reactor = Reactor::new().unwrap();
    let waker = Waker::new().unwrap();
    for n in 0..200 {
        reactor.watch(waker.as_fd(), Token::new(n), Interest::READ_EDGE).unwrap();
    }
    waker.wake();
    let mut seen = std::collections::BTreeSet::new();
    while let got @ [_, ..] = &ready(&mut reactor)[..] {
        seen.extend(got.iter().copied());
    }
    assert_eq!(seen.len(), 200);
}

#[test]
fn timers_fire_in_order_and_not_early() {
    let mut reactor = Reactor::new().unwrap();
    let start = Instant::now();
    let due = [(A, start + tick()), (B, start + tick() * 2)];
    due.iter().rev().for_each(|(token, at)| reactor.set_timer(*token, *at));
    // Whoever looks late finds both at once.
    for (token, at) in due {
        let next = loop {
            match reactor.next() {
                Some(event) => break event,
                None => reactor.wait(None).unwrap(),
            }
        };
        assert_eq!(next, Event::Timer { token });
        assert!(Instant::now() >= at, "{token:?} early");
    }
    assert_eq!(now(&mut reactor), []);
}

#[test]
fn a_timer_in_the_past_fires_once_in_each_turn_even_if_its_handler_sets_it_again() {
    let mut reactor = Reactor::new().unwrap();
    let past = Instant::now() - Duration::from_millis(1);
    reactor.set_timer(A, past);
    reactor.wait(None).unwrap();
    assert_eq!(reactor.next(), Some(Event::Timer { token: A }));
    reactor.set_timer(A, past);
    assert_eq!(reactor.next(), None);
    assert_eq!(events(&mut reactor, None), [Event::Timer { token: A }]);
}

#[test]
fn a_collected_timer_is_dropped_by_cancel_and_by_setting_it_again() {
    let mut reactor = Reactor::new().unwrap();
    reactor.set_timer(A, Instant::now());
    reactor.set_timer(B, Instant::now());
    reactor.wait(None).unwrap();
    reactor.cancel_timer(A);
    reactor.set_timer(B, Instant::now() + Duration::from_secs(3600));
    assert_eq!(reactor.next(), None);
}

#[test]
fn an_idle_reactor_makes_no_wakeups_after_its_timers_are_cancelled() {
    let mut reactor = Reactor::new().unwrap();
    reactor.set_timer(A, Instant::now() + Duration::from_millis(5));
    reactor.cancel_timer(A);
    let start = Instant::now();
    assert_eq!(events(&mut reactor, Some(tick() * 3)), []);
    assert!(start.elapsed() >= tick() * 3, "woke after {:?}", start.elapsed());
    assert!(!is_pollable(&reactor, tick()));
}

#[test]
fn a_timer_that_is_pushed_back_fires_at_its_new_time() {
    let mut reactor = Reactor::new().unwrap();
    let start = Instant::now();
    for n in 1..=100 {
        reactor.set_timer(A, start + Duration::from_millis(5) + Duration::from_micros(200 * n));
    }
    let mut turns = 0;
    loop {
        turns += 1;
        if events(&mut reactor, None) == [Event::Timer { token: A }] {
            break;
        }
    }
    assert!(start.elapsed() >= Duration::from_millis(25));
    assert!(turns <= 2, "{turns}: at most one early wake-up");
}

#[test]
fn a_deadline_beyond_all_clocks_is_no_trouble() {
    let mut reactor = Reactor::new().unwrap();
    let far = Instant::now() + Duration::from_secs(200 * 365 * 24 * 3600);
    reactor.set_timer(A, far);
    assert_eq!(now(&mut reactor), []);
    assert_eq!(events(&mut reactor, Some(Duration::from_millis(1))), []);
}

#[test]
fn the_reactor_is_pollable_for_files_and_for_timers() {
    let mut reactor = Reactor::new().unwrap();
    assert!(!is_pollable(&reactor, Duration::ZERO));
    let waker = Waker::new().unwrap();
    reactor.watch(waker.as_fd(), A, Interest::READ_EDGE).unwrap();
    waker.wake();
    assert!(is_pollable(&reactor, Duration::ZERO));
    assert_eq!(ready(&mut reactor), [A]);
    assert!(!is_pollable(&reactor, Duration::ZERO));
    // Set after the last wait: whoever polls from outside sees it all the same.
    reactor.set_timer(B, Instant::now() + Duration::from_secs(3600));
    assert!(!is_pollable(&reactor, Duration::ZERO));
    reactor.set_timer(B, Instant::now() + tick());
    assert!(is_pollable(&reactor, Duration::from_secs(30)));
    assert_eq!(now(&mut reactor), [Event::Timer { token: B }]);
    assert!(!is_pollable(&reactor, tick()));
}

#[test]
fn a_reactor_in_a_reactor() {
    let mut outer = Reactor::new().unwrap();
    let mut inner = Reactor::new().unwrap();
    outer.watch(inner.as_fd(), A, Interest::READ).unwrap();
    let waker = Waker::new().unwrap();
    inner.watch(waker.as_fd(), B, Interest::READ_EDGE).unwrap();
    assert_eq!(ready(&mut outer), []);
    waker.wake();
    assert_eq!(ready(&mut outer), [A]);
    assert_eq!(ready(&mut inner), [B]);
    assert_eq!(ready(&mut outer), []);
    inner.set_timer(B, Instant::now() + tick());
    assert!(matches!(events(&mut outer, None)[..], [Event::Ready { token: A, .. }]));
    assert_eq!(now(&mut inner), [Event::Timer { token: B }]);
    // A circle is refused, not followed.
    assert!(inner.watch(outer.as_fd(), A, Interest::READ).is_err());
}

#[test]
fn wait_does_not_sleep_over_events_that_were_not_taken() {
    let mut reactor = Reactor::new().unwrap();
    let waker = Waker::new().unwrap();
    reactor.watch(waker.as_fd(), A, Interest::READ_EDGE).unwrap();
    waker.wake();
    reactor.wait(None).unwrap();
    reactor.wait(None).unwrap();
    assert!(reactor.next().is_some());
    reactor.set_timer(B, Instant::now());
    reactor.wait(None).unwrap();
    reactor.wait(None).unwrap();
    assert_eq!(reactor.next(), Some(Event::Timer { token: B }));
}

#[test]
fn a_signal_ends_a_sleep_without_an_error() {
    // A stop and a continue interrupt epoll_wait(2) even without a handler; the child does it to itself by a helper,
    // because signals are for the whole process and other tests run in this one.
    if std::env::var_os("REACTOR_TEST_SLEEPER").is_some() {
        let mut reactor = Reactor::new().unwrap();
        println!("sleeping");
        reactor.wait(Some(Duration::from_secs(120))).unwrap();
        assert_eq!(reactor.next(), None);
        println!("woke");
        return;
    }
    let mut child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_signal_ends_a_sleep_without_an_error", "--nocapture"])
        .env("REACTOR_TEST_SLEEPER", "1")
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let start = Instant::now();
    let pid = rustix::process::Pid::from_child(&child);
    let mut output = child.stdout.take().unwrap();
    let mut seen = String::new();
    let mut chunk = [0; 256];
    while !seen.contains("sleeping") {
        let n = output.read(&mut chunk).unwrap();
        assert_ne!(n, 0, "{seen}");
        seen.push_str(&String::from_utf8_lossy(&chunk[..n]));
    }
    // Again and again: the child may not have reached its sleep at the first.
    while child.try_wait().unwrap().is_none() {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::STOP);
        std::thread::sleep(Duration::from_millis(10));
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::CONT);
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(child.wait().unwrap().success());
    assert!(start.elapsed() < Duration::from_secs(100), "the sleep was not interrupted");
}

#[test]
fn no_descriptor_is_leaked() {
    // In a process of its own: the other tests open and close files at the same time.
    if std::env::var_os("REACTOR_TEST_LEAKS").is_some() {
        let count = || std::fs::read_dir("/proc/self/fd").unwrap().count();
        let before = count();
        {
            let mut reactor = Reactor::new().unwrap();
            let waker = Waker::new().unwrap();
            for n in 0..1000 {
                reactor.watch(waker.as_fd(), Token::new(n % 10), Interest::READ).unwrap();
                if n % 3 == 0 {
                    reactor.unwatch(Token::new(n % 10));
                }
            }
            assert!(count() <= before + 2 + 1 + 10);
        }
        assert_eq!(count(), before);
        return;
    }
    let status = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "no_descriptor_is_leaked", "--test-threads=1"])
        .env("REACTOR_TEST_LEAKS", "1")
        .stdout(std::process::Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());
}

/// Numbers and directions of what is registered and ready.
fn registered(reactor: &mut Reactor) -> Vec<(u64, bool, bool)> {
    now(reactor)
        .into_iter()
        .map(|event| match event {
            Event::Registered { number, ready } => (number, ready.readable(), ready.writable()),
            other => panic!("{other:?}"),
        })
        .collect()
}

#[test]
fn registered_files_are_told_by_number_until_they_are_closed() {
    let mut reactor = Reactor::new().unwrap();
    let registry = reactor.registry().unwrap();
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let last = Registry::NUMBERS - 1;
    registry.add(ours.as_fd(), last, Interest::READ_EDGE).unwrap();
    assert_eq!(registered(&mut reactor), []);
    theirs.write_all(&[0]).unwrap();
    assert!(registry.has_news());
    assert_eq!(registered(&mut reactor), [(last, true, false)]);
    assert_eq!(registered(&mut reactor), [], "at the edge, once");
    assert!(!registry.has_news());
    registry.change(ours.as_fd(), 7, Interest::READ_WRITE_EDGE).unwrap();
    assert_eq!(registered(&mut reactor), [(7, true, true)], "what is there is told again");
    registry.change(ours.as_fd(), 7, Interest::NONE).unwrap();
    theirs.write_all(&[0]).unwrap();
    assert_eq!(registered(&mut reactor), []);
    registry.change(ours.as_fd(), 7, Interest::READ).unwrap();
    drop(ours);
    assert_eq!(registered(&mut reactor), [], "it ends with the file");
}

#[test]
fn registered_files_hang_up() {
    let mut reactor = Reactor::new().unwrap();
    let registry = reactor.registry().unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    registry.add(ours.as_fd(), 0, Interest::READ_EDGE).unwrap();
    theirs.shutdown(Shutdown::Write).unwrap();
    let half = now(&mut reactor);
    drop(theirs);
    let whole = now(&mut reactor);
    let ends = |events: &[Event]| match events {
        [Event::Registered { number: 0, ready }] => (ready.closed(), ready.hung_up()),
        other => panic!("{other:?}"),
    };
    assert_eq!((ends(&half), ends(&whole)), ((true, false), (true, true)));
}

#[test]
fn registered_numbers_are_never_taken_for_watches_nor_timers() {
    let mut reactor = Reactor::new().unwrap();
    let registry = reactor.registry().unwrap();
    let waker = Waker::new().unwrap();
    for number in [Registry::NUMBERS, u64::MAX] {
        let refused = registry.add(waker.as_fd(), number, Interest::READ).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::InvalidInput);
    }
    // The key of the first watch, as a number.
    registry.add(waker.as_fd(), 0, Interest::READ_EDGE).unwrap();
    reactor.watch(waker.as_fd(), A, Interest::READ_EDGE).unwrap();
    waker.wake();
    let both = now(&mut reactor);
    assert_eq!(both.len(), 2, "{both:?}");
    assert!(both.iter().any(|event| matches!(event, Event::Registered { number: 0, .. })), "{both:?}");
    assert!(both.iter().any(|event| matches!(event, Event::Ready { token: A, .. })), "{both:?}");
    reactor.retain(|_| false);
    waker.wake();
    assert_eq!(registered(&mut reactor), [(0, true, false)], "it is nobody's token");
}
