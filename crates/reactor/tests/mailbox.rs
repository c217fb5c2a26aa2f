//! The promises of mailboxes and wakers.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Wake;
use std::thread;
use std::time::{Duration, Instant};

use reactor::{Event, Interest, Reactor, SendError, Token, Waker, mailbox};

const A: Token = Token::new(1);

fn count(reactor: &mut Reactor) -> usize {
    reactor.wait(Some(Duration::ZERO)).unwrap();
    std::iter::from_fn(|| reactor.next()).count()
}

#[test]
fn mail_arrives_in_order_and_the_bound_holds() {
    let (mail, mut inbox) = mailbox(2).unwrap();
    mail.send(1).unwrap();
    mail.clone().send(2).unwrap();
    assert_eq!(mail.send(3), Err(SendError::Full(3)));
    assert!(!inbox.is_empty());
    assert_eq!(inbox.recv(), Some(1));
    mail.send(3).unwrap();
    assert_eq!((inbox.recv(), inbox.recv(), inbox.recv()), (Some(2), Some(3), None));
    assert!(inbox.is_empty());
    drop(inbox);
    assert_eq!(mail.send(4), Err(SendError::Closed(4)));
    assert_eq!(mail.send(5).unwrap_err().into_inner(), 5);
}

#[test]
fn a_receiver_that_goes_drops_what_it_has_not_read() {
    let message = Arc::new(());
    let (mail, inbox) = mailbox(8).unwrap();
    mail.send(Arc::clone(&message)).unwrap();
    drop(inbox);
    assert_eq!(Arc::strong_count(&message), 1);
}

#[test]
fn the_receiver_is_woken_once_until_it_has_looked() {
    let mut reactor = Reactor::new().unwrap();
    let (mail, mut inbox) = mailbox(8).unwrap();
    reactor.watch(inbox.as_fd(), A, Interest::READ_EDGE).unwrap();
    mail.send(1).unwrap();
    assert_eq!(count(&mut reactor), 1);
    mail.send(2).unwrap();
    assert_eq!(count(&mut reactor), 0, "a receiver that is still reading needs no wake-up");
    while inbox.recv().is_some() {}
    assert_eq!(count(&mut reactor), 0);
    mail.send(3).unwrap();
    assert_eq!(count(&mut reactor), 1);
}

#[test]
fn a_receiver_that_stops_early_is_woken_for_the_rest() {
    let mut reactor = Reactor::new().unwrap();
    let (mail, mut inbox) = mailbox(8).unwrap();
    reactor.watch(inbox.as_fd(), A, Interest::READ_EDGE).unwrap();
    for n in 0..3 {
        mail.send(n).unwrap();
    }
    assert_eq!(count(&mut reactor), 1);
    assert_eq!(inbox.recv(), Some(0));
    inbox.drained();
    assert_eq!(count(&mut reactor), 1);
    assert_eq!((inbox.recv(), inbox.recv()), (Some(1), Some(2)));
    inbox.drained();
    assert_eq!(count(&mut reactor), 0);
    mail.send(3).unwrap();
    assert_eq!(count(&mut reactor), 1);
}

/// Several senders against a receiver that sleeps whenever it finds nothing. A lost wake-up leaves it asleep over
/// waiting mail, which the time-out shows.
#[test]
fn no_wakeup_is_lost_under_load() {
    const SENDERS: usize = 3;
    const EACH: usize = 20_000;
    let mut reactor = Reactor::new().unwrap();
    let (mail, mut inbox) = mailbox(16).unwrap();
    reactor.watch(inbox.as_fd(), A, Interest::READ_EDGE).unwrap();
    let full = Arc::new(AtomicUsize::new(0));
    let senders: Vec<_> = (0..SENDERS)
        .map(|sender| {
            let (mail, full) = (mail.clone(), Arc::clone(&full));
            thread::spawn(move || {
                for n in 0..EACH {
                    let mut message = (sender, n);
                    while let Err(error) = mail.send(message) {
                        full.fetch_add(1, Ordering::Relaxed);
                        message = error.into_inner();
                        thread::yield_now();
                    }
                    // Pauses of several lengths, so that the receiver's sleep is met at every point.
                    if n % 16 == 0 {
                        thread::yield_now();
                    }
                }
            })
        })
        .collect();
    let mut next = [0; SENDERS];
    while next.iter().sum::<usize>() < SENDERS * EACH {
        let start = Instant::now();
        reactor.wait(Some(Duration::from_secs(30))).unwrap();
        assert!(start.elapsed() < Duration::from_secs(30), "slept over {:?}", inbox.recv());
        while let Some(event) = reactor.next() {
            assert!(matches!(event, Event::Ready { token: A, .. }));
        }
        while let Some((sender, n)) = inbox.recv() {
            assert_eq!(next[sender], n, "out of order");
            next[sender] += 1;
        }
    }
    for sender in senders {
        sender.join().unwrap();
    }
}

#[test]
fn a_waker_wakes_as_itself_as_its_clone_and_as_a_task_waker() {
    let mut reactor = Reactor::new().unwrap();
    let waker = Waker::new().unwrap();
    reactor.watch(waker.as_fd(), A, Interest::READ).unwrap();
    let clone = waker.clone();
    let task = waker.task_waker();
    let wake: [&dyn Fn(); 4] =
        [&|| waker.wake(), &|| clone.wake(), &|| task.wake_by_ref(), &|| Wake::wake(Arc::new(waker.clone()))];
    for wake in wake {
        assert_eq!(count(&mut reactor), 0);
        wake();
        assert_eq!(count(&mut reactor), 1);
        waker.clear();
        waker.clear();
    }
}
