//! Requests through a daemon: layouts, reconnects, several guests.
mod support;

use support::*;
use virtio_testkit::RingLayout;

#[test]
fn a_request_is_answered_over_split_and_packed_rings() {
    let daemon = TestDaemon::start();
    for layout in RingLayout::ALL {
        let mut driver = daemon.driver(0, layout);
        for i in 0..40u8 {
            assert_eq!(ask(&mut driver, 0, &[b'x', i]), [b'x', i]);
        }
        driver.stop().unwrap();
    }
}
