//! Memory regions with Xen's fields: XEN_MMAP gives three messages another form.

#![cfg(target_endian = "little")]

mod wire;

use std::os::unix::net::UnixStream;

use vhost_user::{
    BackendEndpoint, Error, FrontendEndpoint, FrontendRequest as R, ProtocolFeatures, Reason, XenMapping,
    xen_flags,
};
use wire::{HIGH, LOW, Probes, features, hex, message, read, received, refused, samples, send};

const GRANT: XenMapping = XenMapping { flags: xen_flags::GRANT | xen_flags::NO_ADVANCE_MAP, domid: 7 };
const FOREIGN: XenMapping = XenMapping { flags: xen_flags::FOREIGN, domid: 0x7ff0 };
const LOW_HEX: &str = "0000000000000000 0000001000000000 00000000007f0000 0010000000000000 02010000 07000000";
const HIGH_HEX: &str =
    "0000000001000000 0020000000000000 00000000107f0000 0000000000000000 01000000 f07f0000";

fn xen() -> (BackendEndpoint, UnixStream) {
    let (mut endpoint, socket) = wire::backend();
    endpoint.set_protocol_features(features() | ProtocolFeatures::XEN_MMAP);
    (endpoint, socket)
}

type Call = fn(&mut FrontendEndpoint, &Probes) -> Result<(), Error>;

type Check = fn(&R) -> bool;

/// Bytes, descriptors, whether they were understood, the front-end's method.
fn forms() -> [(Vec<u8>, usize, Check, Call); 3] {
    [
        (
            hex(&format!("05000000 01000000 58000000 02000000 00000000 {LOW_HEX} {HIGH_HEX}")),
            2,
            |r| {
                let R::SetXenMemTable(table) = r else { return false };
                let got: Vec<_> = table.iter().map(|(region, xen, _)| (*region, *xen)).collect();
                got == [(LOW, GRANT), (HIGH, FOREIGN)]
            },
            |f, probes| {
                let fds = probes.fds();
                f.set_xen_mem_table(&[(LOW, GRANT, fds[0]), (HIGH, FOREIGN, fds[1])])
            },
        ),
        (
            hex(&format!("25000000 01000000 30000000 0000000000000000 {LOW_HEX}")),
            1,
            |r| matches!(r, R::AddXenMemReg(LOW, GRANT, _)),
            |f, probes| f.add_xen_mem_reg(LOW, GRANT, probes.fds()[0]),
        ),
        (
            hex(&format!("26000000 01000000 30000000 0000000000000000 {HIGH_HEX}")),
            0,
            |r| matches!(r, R::RemXenMemReg(HIGH, FOREIGN)),
            |f, _| f.rem_xen_mem_reg(HIGH, FOREIGN),
        ),
    ]
}

#[test]
fn both_sides_speak_the_documents_bytes() {
    for (bytes, fds, check, call) in forms() {
        let (mut endpoint, socket) = xen();
        let probes = Probes::new(fds);
        send(&socket, &bytes, &probes.fds());
        let got = received(&mut endpoint, "xen");
        assert!(check(&got.request), "{:?}", got.request);
        assert_eq!(got.request.code().code(), bytes[0].into());
        drop(got);
        probes.assert_closed("xen");
        let (near, far) = UnixStream::pair().unwrap();
        call(&mut FrontendEndpoint::new(near), &Probes::new(fds)).unwrap();
        assert_eq!(read(&far, bytes.len()), bytes);
    }
}

#[test]
fn wrong_by_one_byte_or_descriptor_is_refused() {
    for (bytes, fds, _, _) in forms() {
        let body = &bytes[12..];
        for body in [&body[..body.len() - 1], &[body, &[0]].concat()] {
            let (mut endpoint, socket) = xen();
            let probes = Probes::new(fds);
            send(&socket, &message(bytes[0].into(), 1, body), &probes.fds());
            assert!(matches!(refused(&mut endpoint, &socket, "xen"), Reason::BodySize { .. }));
            probes.assert_closed("xen");
        }
        // REM_MEM_REG tolerates one.
        for count in (0..5).filter(|count| *count != fds && (fds > 0 || *count > 1)) {
            let (mut endpoint, socket) = xen();
            let probes = Probes::new(count);
            send(&socket, &bytes, &probes.fds());
            assert!(matches!(refused(&mut endpoint, &socket, "xen"), Reason::FdCount { .. }));
            probes.assert_closed("xen");
        }
    }
}

/// Each form is refused where the other was negotiated: there is no guessing by length.
#[test]
fn the_forms_are_not_mixed() {
    for (bytes, fds, _, _) in forms() {
        let (mut endpoint, socket) = wire::backend();
        let probes = Probes::new(fds);
        send(&socket, &bytes, &probes.fds());
        assert!(matches!(refused(&mut endpoint, &socket, "plain"), Reason::BodySize { .. }));
        probes.assert_closed("plain");
    }
    let plain = samples();
    for sample in plain.iter().filter(|sample| [5, 37, 38].contains(&sample.code.code())) {
        let (mut endpoint, socket) = xen();
        let probes = Probes::new(sample.fds);
        send(&socket, &sample.bytes, &probes.fds());
        match endpoint.receive() {
            // A table without regions is one in either form.
            Ok(Some(got)) => assert!(matches!(got.request, R::SetXenMemTable(table) if table.is_empty())),
            Err(Error::Invalid { reason: Reason::BodySize { .. }, .. }) => {}
            other => panic!("{other:?}"),
        }
        probes.assert_closed("xen");
    }
}
