//! The conformance suite of `virtio-testkit`, over the library, its transports, and the daemon.
mod support;

use std::sync::Arc;

use virtio_block::backend::MemoryImage;
use virtio_block::{Block, Options};
use virtio_testkit::conformance::Subject;

virtio_testkit::conformance!(
    Subject { queues: 2, ..Subject::BLOCK },
    device = || {
        let options = Options { num_queues: 2, ..Options::new(Options::own_pool()) };
        Block::new(Arc::new(MemoryImage::new(vec![1; 8192])), options).expect("a disk")
    },
    daemon = || {
        let (directory, image) = support::image(8192);
        let socket = directory.join("block.sock");
        let args = ["--num-queues", "2", "--blk-file", image.to_str().unwrap()];
        ((support::start(&socket, &args), directory), socket)
    },
);
