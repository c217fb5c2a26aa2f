//! Front-ends that are asked for mappings and objects and answer in every wrong way: nothing is left of it, counted in a
//! process of its own.
mod support;

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, memfd_create};
use support::echo::{PAGE, ask as op};
use support::*;
use vhost_user::{Answer, ProtocolFeatures};
use virtio_testkit::{RingLayout, VhostUserDriver, VhostUserOptions};
use vm_virtio::{HostRequests, ShmRegion};

/// What a front-end does with the questions of a round.
#[derive(Clone, Copy, Debug)]
enum Way {
    Refuse,
    Accept,
    /// Answers the first one only, and goes.
    FirstOnly,
    Silent,
    Nonsense,
    /// Takes another channel with questions unanswered.
    Exchange,
    /// Resets the device with questions unanswered.
    Reset,
}

const WAYS: [Way; 7] =
    [Way::Refuse, Way::Accept, Way::FirstOnly, Way::Silent, Way::Nonsense, Way::Exchange, Way::Reset];

fn options_with_shmem() -> VhostUserOptions {
    let all = options(RingLayout::Split);
    let shmem =
        ProtocolFeatures::SHMEM_MAP | ProtocolFeatures::BACKEND_SEND_FD | ProtocolFeatures::SHARED_OBJECT;
    VhostUserOptions { protocol: all.protocol | shmem, ..all }
}

fn round(daemon: &TestDaemon, way: Way) {
    let mut driver = VhostUserDriver::connect(daemon.socket(0), options_with_shmem()).unwrap();
    for request in [[op::MAP, 0, 0, 1, 0, 1], [op::LOOK_UP, 1, 0, 0, 0, 0], [op::MAP, 0, 4, 2, 0, 0]] {
        submit(&mut driver, 0, &request);
    }
    let listener = driver.backend_requests().unwrap();
    let first = listener.wait(SOON).unwrap().expect("a question");
    match way {
        Way::Refuse | Way::Accept => {
            let mut next = Some(first);
            while let Some(received) = next {
                let lookup = matches!(received.request, vhost_user::BackendRequest::SharedObjectLookup(_));
                let answer = match way {
                    Way::Refuse => Answer::Failed,
                    _ if lookup => Answer::Fd(memfd_create("object", MemfdFlags::CLOEXEC).unwrap()),
                    _ => Answer::Done,
                };
                listener.reply(received.ticket, answer).unwrap();
                next = listener.wait(NEVER).unwrap();
            }
            for _ in 0..3 {
                answer(&mut driver, 0);
            }
        }
        Way::FirstOnly => listener.reply(first.ticket, Answer::Done).unwrap(),
        Way::Silent => {}
        Way::Nonsense | Way::Exchange => {
            let (ours, theirs) = UnixStream::pair().unwrap();
            driver.endpoint().set_backend_req_fd(theirs.as_fd()).unwrap();
            for _ in 0..3 {
                answer(&mut driver, 0);
            }
            if matches!(way, Way::Nonsense) {
                submit(&mut driver, 0, &[op::MAP, 0, 8, 1, 0, 0]);
                std::io::Write::write_all(&mut &ours, &[0xff; 100]).unwrap();
                answer(&mut driver, 0);
            }
        }
        Way::Reset => driver.reset().unwrap(),
    }
    if !matches!(way, Way::Reset) {
        // So that the next one may map again.
        let _ = driver.reset();
    }
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn whatever_front_ends_make_of_questions_nothing_is_left_behind() {
    let file = Arc::new(File::from(memfd_create("pages", MemfdFlags::CLOEXEC).unwrap()));
    file.set_len(8 * PAGE).unwrap();
    let regions = [ShmRegion { id: 0, size: 16 * PAGE }];
    let daemon = TestDaemon::with(1, move || {
        let (requests, heard) = (HostRequests::SHARED_OBJECTS, Arc::default());
        Echo::new(8).shared_memory(&regions, file.clone()).host_requests(requests, heard)
    });
    WAYS.into_iter().for_each(|way| round(&daemon, way));
    let mut before = descriptors();
    eventually("what is used lazily", || {
        let now = descriptors();
        std::mem::replace(&mut before, now) == now
    });
    for _ in 0..10 {
        WAYS.into_iter().for_each(|way| round(&daemon, way));
    }
    eventually("the descriptors of before", || descriptors() <= before);
    let mut driver = VhostUserDriver::connect(daemon.socket(0), options_with_shmem()).unwrap();
    assert_eq!(ask(&mut driver, 0, b"well"), b"well");
}
