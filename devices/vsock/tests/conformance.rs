//! What virtio and vhost-user demand of every device, in memory and over the daemon's socket.
use virtio_testkit::conformance::Subject;
use virtio_testkit::daemon::{DaemonProcess, TempDir, announcing};
use virtio_vsock::{Exchange, HostSide, Settings, Vsock};

virtio_testkit::conformance!(
    Subject::SOCKET,
    device = || Vsock::new(Settings::new(3, HostSide::Nobody), &Exchange::new()).expect("a socket device"),
    daemon = || {
        let directory = TempDir::new();
        let socket = directory.join("vsock.sock");
        let mut command = announcing(std::path::Path::new(env!("CARGO_BIN_EXE_vhost-device-vsock")));
        command.args(["--log-level", "warn", "--uds-path"]).arg(directory.join("vm"));
        command.arg("--socket-path").arg(&socket);
        ((DaemonProcess::ready(&mut command), directory), socket)
    },
);
