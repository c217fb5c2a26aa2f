//! Postcopy mode gives the two messages that bring memory a reply of their own: where the back-end has mapped it
//! (sections "VHOST_USER_SET_MEM_TABLE", "VHOST_USER_ADD_MEM_REG").

#![cfg(target_endian = "little")]

mod wire;

use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use vhost_user::{
    Answer, BackendEndpoint, Error, FrontendCode, FrontendEndpoint, FrontendRequest as R, ProtocolFeatures,
    Reason, XenMapping,
};
use wire::{
    HIGH, LOW, Probes, acknowledgement, assert_silent, features, hex, read, received, refused, send,
    with_need_reply,
};

const LOW_HEX: &str = "0000000000000000 0000001000000000 00000000007f0000 0010000000000000";
const HIGH_HEX: &str = "0000000001000000 0020000000000000 00000000107f0000 0000000000000000";
/// The same at other user addresses: what the back-end answers.
const LOW_THERE: &str = "0000000000000000 0000001000000000 0000000000100000 0010000000000000";
const HIGH_THERE: &str = "0000000001000000 0020000000000000 0050000000200000 0000000000000000";
const BASES: [u64; 2] = [0x1000_0000_0000, 0x2000_0000_5000];
const LISTEN: &str = "1d000000 01000000 00000000";

fn table() -> Vec<u8> {
    hex(&format!("05000000 01000000 48000000 02000000 00000000 {LOW_HEX} {HIGH_HEX}"))
}

fn table_there() -> Vec<u8> {
    hex(&format!("05000000 05000000 48000000 02000000 00000000 {LOW_THERE} {HIGH_THERE}"))
}

fn region() -> Vec<u8> {
    hex(&format!("25000000 01000000 28000000 0000000000000000 {HIGH_HEX}"))
}

fn region_there() -> Vec<u8> {
    hex(&format!("25000000 05000000 28000000 0000000000000000 {HIGH_THERE}"))
}

/// A request, its descriptors, the bases of its answer, the reply, and what says that this was heard.
type Form = (Vec<u8>, usize, &'static [u64], Vec<u8>, Vec<u8>);

fn forms() -> [Form; 2] {
    [
        (table(), 2, &BASES, table_there(), hex("05000000 01000000 08000000 0000000000000000")),
        (region(), 1, &BASES[1..], region_there(), hex("25000000 01000000 08000000 0000000000000000")),
    ]
}

/// Sends a message and answers it.
fn exchange(endpoint: &mut BackendEndpoint, socket: &UnixStream, bytes: &str, answer: Answer) {
    send(socket, &hex(bytes), &[]);
    let got = received(endpoint, bytes);
    endpoint.reply(got.ticket, answer).unwrap();
}

fn listening() -> (BackendEndpoint, UnixStream) {
    let (mut endpoint, socket) = wire::backend();
    exchange(&mut endpoint, &socket, LISTEN, Answer::Done);
    (endpoint, socket)
}

#[test]
fn back_end_answers_with_its_own_addresses_once_asked_for_or_not() {
    for (bytes, fds, bases, reply, heard) in forms() {
        for bytes in [bytes.clone(), with_need_reply(&bytes)] {
            let (mut endpoint, socket) = listening();
            send(&socket, &bytes, &Probes::new(fds).fds());
            let got = received(&mut endpoint, "memory");
            assert!(endpoint.reply_owed());
            endpoint.reply(got.ticket, Answer::Bases(bases.to_vec())).unwrap();
            assert_eq!(read(&socket, reply.len()), reply);
            assert_silent(&socket, "one reply");
            // The front-end has heard it, which is not answered, and no table without regions.
            send(&socket, &heard, &[]);
            let got = received(&mut endpoint, "heard");
            let code = FrontendCode::from_code(bytes[0].into()).unwrap();
            assert!(matches!(got.request, R::BasesHeard(of) if of == code), "{:?}", got.request);
            assert_eq!(got.request.code(), code);
            endpoint.reply(got.ticket, Answer::Done).unwrap();
            assert_silent(&socket, "heard");
        }
    }
}

/// It is said once; the next one is what it looks like: a table without regions, and no region at all.
#[test]
fn what_was_heard_is_not_heard_twice() {
    let [(table, fds, bases, reply, heard), (_, _, _, _, other)] = forms();
    let (mut endpoint, socket) = listening();
    send(&socket, &table, &Probes::new(fds).fds());
    let got = received(&mut endpoint, "memory");
    endpoint.reply(got.ticket, Answer::Bases(bases.to_vec())).unwrap();
    read(&socket, reply.len());
    send(&socket, &other, &[]);
    let reason = match endpoint.receive() {
        Err(Error::Invalid { reason, ticket, .. }) => {
            // Memory was to come, and a failure cannot be told.
            assert!(matches!(endpoint.reply(ticket, Answer::Failed), Err(Error::CannotFail { code: 37 })));
            reason
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(reason, Reason::BodySize { expected: 40, got: 8 }, "the other request's");
    let (mut endpoint, socket) = listening();
    send(&socket, &heard, &[]);
    let got = received(&mut endpoint, "nothing to hear");
    assert!(matches!(got.request, R::SetMemTable(table) if table.is_empty()));
    endpoint.reply(got.ticket, Answer::Bases(Vec::new())).unwrap();
    assert_eq!(read(&socket, 20), hex("05000000 05000000 08000000 0000000000000000"));
}

#[test]
fn only_between_listen_and_end() {
    let end = "1e000000 01000000 00000000";
    for (bytes, fds, bases, _, heard) in forms() {
        for before in [&[][..], &[(LISTEN, false)], &[(LISTEN, true), (end, true)]] {
            let (mut endpoint, socket) = wire::backend();
            for (message, works) in before {
                let answer = if *works { Answer::Done } else { Answer::Failed };
                exchange(&mut endpoint, &socket, message, answer);
            }
            if before.len() == 2 {
                read(&socket, 20);
            }
            send(&socket, &bytes, &Probes::new(fds).fds());
            let got = received(&mut endpoint, "memory");
            assert!(!endpoint.reply_owed());
            endpoint.reply(got.ticket, Answer::Done).unwrap();
            assert_silent(&socket, "no postcopy mode");
            send(&socket, &with_need_reply(&bytes), &Probes::new(fds).fds());
            let got = received(&mut endpoint, "memory");
            assert!(matches!(
                endpoint.reply(got.ticket, Answer::Bases(bases.to_vec())),
                Err(Error::WrongAnswer { .. })
            ));
        }
        // What is told and not heard before the end is over with it.
        let (mut endpoint, socket) = listening();
        send(&socket, &bytes, &Probes::new(fds).fds());
        let got = received(&mut endpoint, "memory");
        endpoint.reply(got.ticket, Answer::Bases(bases.to_vec())).unwrap();
        exchange(&mut endpoint, &socket, end, Answer::Done);
        send(&socket, &heard, &[]);
        let next = endpoint.receive();
        assert!(!matches!(&next, Ok(Some(got)) if matches!(got.request, R::BasesHeard(_))), "{next:?}");
    }
}

/// Nothing is sent that is not an answer to these regions.
#[test]
fn another_number_of_bases_is_not_sent() {
    for (bytes, fds, _, _, _) in forms() {
        for count in (0..8).filter(|count| *count != fds) {
            let (mut endpoint, socket) = listening();
            send(&socket, &bytes, &Probes::new(fds).fds());
            let got = received(&mut endpoint, "memory");
            let answer = Answer::Bases(vec![0; count]);
            assert!(matches!(endpoint.reply(got.ticket, answer), Err(Error::WrongAnswer { .. })));
            assert_silent(&socket, "nothing");
        }
        let (mut endpoint, socket) = listening();
        send(&socket, &bytes, &Probes::new(fds).fds());
        let got = received(&mut endpoint, "memory");
        assert!(matches!(endpoint.reply(got.ticket, Answer::Failed), Err(Error::CannotFail { .. })));
        // Without POSTCOPY_LISTEN, a refusal is told as ever.
        let (mut endpoint, socket) = wire::backend();
        send(&socket, &with_need_reply(&bytes), &[]);
        refused(&mut endpoint, &socket, "no descriptors");
        assert_eq!(read(&socket, 20), acknowledgement(bytes[0].into(), 1));
    }
}

/// Xen's fields are behind those that change.
#[test]
fn regions_of_xen_keep_their_fields() {
    let xen = "02010000 07000000";
    let (mut endpoint, socket) = wire::backend();
    endpoint.set_protocol_features(features() | ProtocolFeatures::XEN_MMAP);
    exchange(&mut endpoint, &socket, LISTEN, Answer::Done);
    let message = |flags, low, high| {
        hex(&format!("05000000 {flags} 58000000 02000000 00000000 {low} {xen} {high} {xen}"))
    };
    send(&socket, &message("01000000", LOW_HEX, HIGH_HEX), &Probes::new(2).fds());
    let got = received(&mut endpoint, "xen");
    let mapping = XenMapping { flags: 0x102, domid: 7 };
    assert!(
        matches!(&got.request, R::SetXenMemTable(table) if table.iter().all(|(_, xen, _)| *xen == mapping))
    );
    endpoint.reply(got.ticket, Answer::Bases(BASES.to_vec())).unwrap();
    assert_eq!(read(&socket, 100), message("05000000", LOW_THERE, HIGH_THERE));
}

#[test]
fn front_end_sends_the_documents_bytes_and_understands_the_reply() {
    type Ask = fn(&mut FrontendEndpoint, &[BorrowedFd<'_>]) -> Result<Vec<u64>, Error>;
    let asks: [Ask; 2] = [
        |f, fds| f.set_mem_table_postcopy(&[(LOW, fds[0]), (HIGH, fds[1])]),
        |f, fds| f.add_mem_reg_postcopy(HIGH, fds[0]).map(|base| vec![base]),
    ];
    for ((bytes, fds, bases, reply, heard), ask) in forms().into_iter().zip(asks) {
        let probes = Probes::new(fds);
        let ask = |reply: &[u8]| {
            let (near, far) = UnixStream::pair().unwrap();
            let mut frontend = FrontendEndpoint::new(near);
            frontend.set_timeout(Duration::from_secs(30));
            frontend.set_protocol_features(features()).unwrap();
            read(&far, 20);
            send(&far, reply, &[]);
            let result = ask(&mut frontend, &probes.fds());
            assert_eq!(read(&far, bytes.len()), bytes, "without need_reply");
            (frontend, far, result)
        };
        let (mut frontend, far, result) = ask(&reply);
        assert_eq!(result.unwrap(), bases);
        frontend.bases_heard(FrontendCode::from_code(bytes[0].into()).unwrap()).unwrap();
        assert_eq!(read(&far, heard.len()), heard);
        // Of other regions, of another number of them, an acknowledgement, too long, too short.
        let mut cut = reply[..reply.len() - 1].to_vec();
        cut[8] -= 1;
        let mut long = [&reply[..], &[0]].concat();
        long[8] += 1;
        let mut wrong =
            vec![acknowledgement(bytes[0].into(), 0), acknowledgement(bytes[0].into(), 1), cut, long];
        // Guest address, size and offset are ours.
        for at in [20, 28, 44] {
            let mut other = reply.clone();
            other[at + 3] ^= 1;
            wrong.push(other);
        }
        for reply in wrong {
            let (_, _, result) = ask(&reply);
            assert!(matches!(result, Err(Error::BadReply { .. })), "{reply:x?}: {result:?}");
        }
    }
    let (near, _far) = UnixStream::pair().unwrap();
    let probes = Probes::new(1);
    let many = [(LOW, probes.fds()[0]); 9];
    let result = FrontendEndpoint::new(near).set_mem_table_postcopy(&many);
    assert!(matches!(result, Err(Error::Argument(_))), "{result:?}");
}
