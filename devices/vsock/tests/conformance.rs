//! What virtio and vhost-user demand of every device: in memory, over registers, over the daemon's socket.
use virtio_testkit::conformance::Subject;
use virtio_testkit::daemon::{DaemonProcess, TempDir};
use virtio_vsock::{Exchange, HostSide, Settings, Vsock};

virtio_testkit::conformance!(
    Subject::SOCKET,
    device = || Vsock::new(Settings::new(3, HostSide::Nobody), &Exchange::new()).expect("a socket device"),
    daemon = || {
        let directory = TempDir::new();
        let socket = directory.join("vsock.sock");
        let path = directory.join("vm");
        let args = ["--uds-path", path.to_str().unwrap()];
        let daemon = DaemonProcess::listening(env!("CARGO_BIN_EXE_vhost-device-vsock"), &socket, &args);
        ((daemon, directory), socket)
    },
);
