//! The daemon's command line: what makes no sense is refused before a socket exists, with reason and way out; what QEMU and
//! its users know works.
#![cfg(feature = "daemon")]
mod support;

use support::{IN, IOERR, OK, OUT, ask, connect, feature, image, pattern, run, start};
use virtio_testkit::RingLayout;
use virtio_testkit::daemon::DaemonProcess;

/// Exit code 2, nothing left behind, and a message with these words.
#[track_caller]
fn refused(args: &[&str], words: &[&str]) {
    DaemonProcess::refuses_to_listen(support::DAEMON, args, words);
}

#[test]
fn senseless_command_lines_are_refused_before_a_socket_exists() {
    let (directory, image) = image(8192);
    let disk = image.to_str().unwrap();
    let with =
        |more: &[&'static str], words: &[&str]| refused(&[&["--blk-file", disk], more].concat(), words);
    refused(&[], &["--blk-file"]);
    refused(&["--blk-file", "/"], &["/ is a directory", "name a file or a block device"]);
    refused(&["--blk-file", "/dev/zero"], &["a character device", "name a file or a block device"]);
    refused(&["--blk-file", "/no/such/disk"], &["No such file", "--read-only"]);
    refused(&["--blk-file", "path="], &["path="]);
    refused(&["--blk-file", &format!("path={disk},speed=9")], &["speed", "block-size"]);
    refused(&["--blk-file", &format!("path={disk},readonly")], &["readonly", "KEY=VALUE"]);
    refused(&["--blk-file", &format!("path={disk},readonly=maybe")], &["readonly=maybe", "--help"]);
    with(&["--num-queues", "0"], &["0 queues", "between 1 and"]);
    with(&["--num-queues", "65"], &["65 queues"]);
    for size in ["0", "2", "3", "100", "2048"] {
        with(&["--queue-size", size], &["power of two"]);
    }
    with(&["--block-size", "1000"], &["1000", "power of two"]);
    with(&["--block-size", "16384"], &["16384", "8192"]);
    with(&["--serial", "longer than twenty characters"], &["20 printable"]);
    with(&["--serial", "smörgåsbord"], &["20 printable"]);
    with(&["--format", "vmdk"], &["raw"]);
    with(&["--rate-limit", "10M"], &["bytes=N"]);
    with(&["--socket-count", "2"], &["would write to one disk", "--lock off"]);
    with(&["--socket-count", "3", "--blk-file", "/dev/null"], &["2 disks", "3 guests"]);
    let small = directory.join("small");
    std::fs::write(&small, [0; 511]).unwrap();
    refused(&["--blk-file", small.to_str().unwrap()], &["511 bytes", "truncate"]);
}

#[test]
fn capabilities_are_printed_as_qemu_wants_them() {
    let output = run(&["--print-capabilities", "--num-queues", "0"]);
    assert!(output.status.success());
    let text: String = String::from_utf8(output.stdout).unwrap().split_whitespace().collect();
    assert_eq!(text, r#"{"type":"block","features":["read-only","blk-file"]}"#);
}

#[test]
fn qemu_back_end_conventions_blk_file_and_read_only() {
    let (directory, image) = image(8192);
    let socket = directory.join("block.sock");
    for args in
        [["--blk-file", image.to_str().unwrap(), "--read-only"], ["-b", image.to_str().unwrap(), "-r"]]
    {
        let _daemon = start(&socket, &args);
        let mut driver = connect(&socket, RingLayout::Split);
        assert!(driver.offered().contains(feature::RO));
        assert_eq!(ask(&mut driver, IN, 3, &[], 512), (OK, (1536..2048).map(pattern).collect()));
        assert_eq!(ask(&mut driver, OUT, 3, &[1; 512], 0).0, IOERR);
    }
    assert!(std::fs::read(&image).unwrap().into_iter().eq((0..8192).map(pattern)), "nothing was written");
}

#[test]
fn a_disk_for_each_socket_each_with_its_own_options() {
    let (directory, first) = image(8192);
    let second = directory.join("second,with=comma.img");
    let third = directory.join("third.img");
    std::fs::write(&second, vec![2; 4096]).unwrap();
    std::fs::write(&third, vec![3; 4096]).unwrap();
    let socket = directory.join("block.sock");
    let third = format!("path={},readonly=on,serial=third,block-size=4096", third.display());
    let (first, second) = (first.to_str().unwrap(), second.to_str().unwrap());
    let args = ["--blk-file", first, "--blk-file", second, "--blk-file", &third];
    let daemon = start(&socket, &args);
    let mut sockets: Vec<_> = directory.names().into_iter().filter(|name| name.contains("sock")).collect();
    sockets.sort();
    assert_eq!(sockets, ["block.sock0", "block.sock1", "block.sock2"]);
    let mut drivers =
        [0, 1, 2].map(|guest| connect(&directory.join(&format!("block.sock{guest}")), RingLayout::Packed));
    assert_eq!(ask(&mut drivers[0], IN, 1, &[], 512).1, (512..1024).map(pattern).collect::<Vec<_>>());
    assert_eq!(ask(&mut drivers[1], IN, 1, &[], 512).1, [2; 512]);
    assert_eq!(ask(&mut drivers[2], IN, 1, &[], 512).1, [3; 512]);
    assert_eq!(ask(&mut drivers[1], OUT, 1, &[9; 512], 0).0, OK);
    assert_eq!(ask(&mut drivers[2], OUT, 1, &[9; 512], 0).0, IOERR, "its own option");
    let id = ask(&mut drivers[2], support::GET_ID, 0, &[], 20).1;
    assert_eq!(id, b"third\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(drivers[2].endpoint().get_config(20, 4, 0).unwrap(), 4096u32.to_le_bytes());
    drop(drivers);
    assert!(daemon.terminate().success());
}

#[test]
fn one_read_only_disk_for_many_guests() {
    let (directory, image) = image(8192);
    let socket = directory.join("block.sock");
    let _daemon =
        start(&socket, &["--blk-file", image.to_str().unwrap(), "--read-only", "--socket-count", "2"]);
    for name in ["block.sock0", "block.sock1"] {
        let mut driver = connect(&directory.join(name), RingLayout::Split);
        assert_eq!(ask(&mut driver, IN, 0, &[], 512).1, (0..512).map(pattern).collect::<Vec<_>>());
    }
}

#[test]
fn an_image_that_another_daemon_has_is_not_given_away() {
    let (directory, image) = image(8192);
    let (socket, other) = (directory.join("block.sock"), directory.join("other.sock"));
    let disk = ["--blk-file", image.to_str().unwrap()];
    let _daemon = start(&socket, &disk);
    let output = run(&[&["--socket-path", other.to_str().unwrap()], &disk[..]].concat());
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("used by another process") && text.contains("--lock off"), "{text}");
    let _second = start(&other, &[&disk[..], &["--lock", "off"]].concat());
}
