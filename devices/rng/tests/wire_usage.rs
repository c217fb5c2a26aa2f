//! The daemon's command line: what makes no sense is refused before a socket exists, with reason and way out.
#![cfg(feature = "daemon")]
mod support;

use support::{ask, connect, run, start};
use virtio_testkit::RingLayout;
use virtio_testkit::daemon::{DaemonProcess, TempDir};

/// Exit code 2, nothing left behind, and a message with these words.
#[track_caller]
fn refused(args: &[&str], words: &[&str]) {
    DaemonProcess::refuses_to_listen(support::DAEMON, args, words);
}

#[test]
fn senseless_command_lines_are_refused_before_a_socket_exists() {
    refused(&["--period", "0"], &["period of 0 ms", "at least 1 ms"]);
    refused(&["--max-bytes", "0"], &["0 bytes", "leave the limit out"]);
    refused(&["--max-bytes", "3", "--socket-count", "4"], &["shared by 4 guests", "give at least 4"]);
    refused(&["--rate-limit", "10M"], &["10M", "bytes=N"]);
    refused(&["--rate-limit", "ops=3", "--socket-count", "4"], &["shared by 4 guests", "give at least 4"]);
    refused(&["--rate-limit", "ops=3", "--max-bytes", "4"], &["--rate-limit", "--max-bytes"]);
    refused(&["--rng-source", "/"], &["/ is a directory", "name a file"]);
    refused(&["--rng-source", "/no/such/source"], &["/no/such/source", "No such file", "name a file"]);
    refused(&["--seed", "1", "--rng-source", "/dev/urandom"], &["--seed", "--rng-source"]);
    refused(&["--period", "soon"], &["soon", "--period"]);
    refused(&["--max-bytes", "-1"], &["-1"]);
    refused(&["--without", "entropy"], &["entropy"]);
}

#[test]
fn the_flags_that_users_know() {
    let directory = TempDir::new();
    let socket = directory.join("rng.sock");
    let path = socket.to_str().unwrap();
    for (short, source, count, period, bytes) in [
        ("-s", "-f", "-c", "-p", "-m"),
        ("--socket", "--filename", "--socket-count", "--period", "--max-bytes"),
    ] {
        let args = [count, "2", source, "/dev/urandom", period, "100", bytes, "4096"];
        // The helper gives the long form of the socket: the others are known, or they would not clash with it.
        let output = run(&[&["--socket-path", path, short, path][..], &args].concat());
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(text.contains("cannot be used multiple times"), "{text}");
        let _daemon = start(&socket, &args);
        assert_eq!(ask(&mut connect(&directory.join("rng.sock1"), RingLayout::Split), 64).len(), 64);
    }
}

#[test]
fn the_socket_is_the_exact_path_unless_counted() {
    let directory = TempDir::new();
    let socket = directory.join("rng.sock");
    let daemon = start(&socket, &[]);
    assert_eq!(directory.names(), ["rng.sock"]);
    assert!(daemon.terminate().success());
    assert_eq!(directory.names(), Vec::<String>::new(), "no socket is left behind");

    let daemon = start(&socket, &["--socket-count", "1"]);
    assert_eq!(directory.names(), ["rng.sock0"]);
    assert!(daemon.terminate().success());
    assert_eq!(directory.names(), Vec::<String>::new());
}

#[test]
fn capabilities_are_printed_as_qemu_wants_them() {
    let output = run(&["--print-capabilities", "--period", "0"]);
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("\"type\": \"rng\"") || text.contains("\"type\":\"rng\""), "{text}");
}
