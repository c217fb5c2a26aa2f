//! Descriptors of a connection go with it. Alone in its process, since it counts all there are.
mod support;
use std::time::Duration;
use support::*;
use virtio_testkit::RingLayout;

fn eventfds() -> usize {
    std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|e| std::fs::read_link(e.ok()?.path()).ok())
        .filter(|l| l.to_string_lossy().contains("eventfd"))
        .count()
}

/// Also those of rings that were stopped in order before it ended.
#[test]
fn call_files_go_with_the_connection() {
    let daemon = TestDaemon::with(1, || Echo::new(8).queues(16, 1));
    std::thread::sleep(Duration::from_millis(300));
    let before = eventfds();
    let mut driver = daemon.driver(0, RingLayout::Split);
    driver.stop().unwrap();
    drop(driver);
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(eventfds(), before, "eventfds left behind");
}
