//! No descriptor is left after any of this, counted over the whole process: the one test of this program, because
//! others would open and close files meanwhile.

#![cfg(target_endian = "little")]

mod wire;

use vhost_user::{Answer, BackendChannel, BackendListener, BackendRequest, Error};
use wire::{Probes, backend, message, samples, send, with_need_reply};

fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn no_descriptor_is_leaked_by_good_bad_cut_and_stray_messages() {
    // The first use of anything lazy is not a leak.
    let _ = backend();
    let before = open_files();
    for sample in samples() {
        let whole = with_need_reply(&sample.bytes);
        let mut long = message(sample.code.code(), 1, &[sample.bytes[12..].to_vec(), vec![0]].concat());
        long.extend(&sample.bytes);
        let messages =
            [whole.clone(), long, message(77, 9, b"?"), message(5, 1, &[0xff; 4096]), vec![0xff; 12]];
        for bytes in messages {
            for fds in [0, 1, 2, 8, 9, 20, 250] {
                for cut in [1, 11, 12, bytes.len() - 1, bytes.len()] {
                    let probes = Probes::new(fds);
                    {
                        let (mut endpoint, socket) = backend();
                        let (first, second) = bytes.split_at(cut.min(bytes.len()));
                        send(&socket, first, &probes.fds());
                        if !second.is_empty() {
                            send(&socket, second, &probes.fds());
                        }
                        loop {
                            match endpoint.receive() {
                                Ok(Some(received)) => {
                                    endpoint.reply(received.ticket, (sample.answer)()).unwrap();
                                }
                                Err(Error::Invalid { ticket, .. }) => {
                                    match endpoint.reply(ticket, Answer::Failed) {
                                        Ok(()) => {}
                                        Err(_) => break,
                                    }
                                }
                                Ok(None) | Err(_) => break,
                            }
                        }
                    }
                    probes.assert_closed(&sample.name());
                    assert_eq!(open_files(), before, "{} with {fds} fds cut at {cut}", sample.name());
                }
            }
        }
    }
    the_channel(before);
}

/// The same for the back-end's own requests.
fn the_channel(before: usize) {
    for sample in wire::backend::samples() {
        let long = message(sample.code.code(), 9, &[&sample.bytes[12..], &[0]].concat());
        for bytes in [with_need_reply(&sample.bytes), long, vec![0xff; 12]] {
            for fds in [0, 1, 2, 8, 9, 20, 250] {
                for cut in [1, 11, 12, bytes.len() - 1, bytes.len()] {
                    let probes = Probes::new(fds);
                    {
                        let (mut listener, other) = BackendListener::pair(wire::features()).unwrap();
                        let far = std::os::unix::net::UnixStream::from(other);
                        let (first, second) = bytes.split_at(cut);
                        send(&far, first, &probes.fds());
                        if !second.is_empty() {
                            send(&far, second, &probes.fds());
                        }
                        while let Ok(Some(_)) | Err(Error::Invalid { .. }) = listener.receive() {}
                        // And as answers to a lookup, which bring descriptors, and to one that never comes.
                        let mut channel = BackendChannel::new(far.into(), wire::features()).unwrap();
                        channel.request((sample.request)(), true).unwrap();
                        channel.request(BackendRequest::SharedObjectLookup([0; 16]), true).unwrap();
                        let _ = listener.receive();
                    }
                    probes.assert_closed(sample.code.name());
                    assert_eq!(open_files(), before, "{} with {fds} fds cut at {cut}", sample.code);
                }
            }
        }
    }
}
