//! Descriptors of a connection go with it. Alone in its process, since it counts all there are.
mod support;
use support::*;
use vhost_user::FrontendEndpoint;
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
    // It serves, so it has all files of its own.
    FrontendEndpoint::connect(daemon.socket(0)).unwrap().get_features().unwrap();
    let before = eventfds();
    let mut driver = daemon.driver(0, RingLayout::Split);
    driver.stop().unwrap();
    drop(driver);
    eventually("no eventfds are left behind", || eventfds() == before);
}
