//! A disk in this process, stepped without threads.
#![allow(dead_code, reason = "each test binary uses what it needs")]
use std::sync::Arc;

use virtio_block::backend::Image;
use virtio_block::{Block, Options};
use virtio_testkit::{Buf, MemoryHost, RingLayout, Shape, Used};

use super::{SOON, chain, pattern};

pub(crate) type Host = MemoryHost<Block>;

pub(crate) fn disk(image: Arc<dyn Image>, tune: impl FnOnce(&mut Options)) -> Block {
    let mut options = Options::new(Options::own_pool());
    tune(&mut options);
    Block::new(image, options).expect("a disk")
}

pub(crate) fn host(layout: RingLayout, image: Arc<dyn Image>, tune: impl FnOnce(&mut Options)) -> Host {
    MemoryHost::builder(disk(image, tune)).layout(layout).start()
}

/// So many bytes of [`pattern`].
pub(crate) fn patterned(bytes: u64) -> Vec<u8> {
    (0..bytes).map(pattern).collect()
}

/// Waits for the next used buffer of a queue.
#[track_caller]
pub(crate) fn wait(host: &mut Host, queue: usize) -> Used {
    let mut used = None;
    let came = host.run_until(SOON, |host| {
        used = host.ring(queue).used();
        used.is_some()
    });
    assert!(came, "an answer");
    used.unwrap()
}

/// Sends a chain and waits for its answer: the length, and what is in the device-writable part.
#[track_caller]
pub(crate) fn send(host: &mut Host, chain: &[Buf], shape: Shape) -> (u32, Vec<u8>) {
    let id = host.ring(0).add_as(chain, shape);
    host.kick(0);
    let used = wait(host, 0);
    assert_eq!(used.id, id);
    let bytes = host.ram().written(chain);
    for buf in chain {
        host.ram().free(buf.addr);
    }
    host.ram().check_guards().unwrap();
    (used.len, bytes)
}

/// One request in the usual layout: status, data, length.
#[track_caller]
pub(crate) fn ask(host: &mut Host, kind: u32, sector: u64, data: &[u8], room: u32) -> (u8, Vec<u8>, u32) {
    let chain = chain(host.ram(), kind, sector, data, room);
    let (len, mut bytes) = send(host, &chain, Shape::Direct);
    let status = bytes.pop().unwrap();
    (status, bytes, len)
}

/// The same, of which the status is all that matters.
#[track_caller]
pub(crate) fn status(host: &mut Host, kind: u32, sector: u64, data: &[u8]) -> u8 {
    ask(host, kind, sector, data, 0).0
}
