//! What both sides of the vsock tests know: bytes that can be made again, a sum of them, and AF_VSOCK sockets.
//!
//! A *sink* reads a connection to its end and answers with how much that was and its sum, 16 bytes: so a test compares
//! what arrived without sending it back, and each connection is half-closed.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use zerocopy::IntoBytes;

/// Bytes of connection number `seed`.
#[must_use]
pub fn bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    // By words: in an emulated guest, without optimisation, bytes for themselves take longer than their way.
    let mut words = vec![0; len.div_ceil(8)];
    for word in &mut words {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        *word = (state ^ state >> 31).to_le();
    }
    words.as_bytes().get(..len).unwrap_or_default().to_vec()
}

/// A sum over bytes and their order (FNV-1a).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sum {
    /// How many.
    pub len: u64,
    hash: u64,
}

impl Default for Sum {
    fn default() -> Self {
        Sum { len: 0, hash: 0xcbf2_9ce4_8422_2325 }
    }
}

impl Sum {
    /// Of all these bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        let mut sum = Sum::default();
        sum.add(bytes);
        sum
    }

    /// More bytes.
    pub fn add(&mut self, bytes: &[u8]) {
        self.len += bytes.len() as u64;
        let mut hash = self.hash;
        for byte in bytes {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        }
        self.hash = hash;
    }

    /// As a sink answers.
    #[must_use]
    pub fn answer(self) -> [u8; 16] {
        let mut answer = [0; 16];
        answer[..8].copy_from_slice(&self.len.to_le_bytes());
        answer[8..].copy_from_slice(&self.hash.to_le_bytes());
        answer
    }
}

/// Reads a connection to its end and answers.
///
/// # Errors
/// Those of the connection.
pub fn sink(stream: &mut (impl Read + Write)) -> io::Result<Sum> {
    let mut sum = Sum::default();
    let mut part = vec![0; 65536];
    loop {
        match stream.read(&mut part)? {
            0 => break,
            n => sum.add(&part[..n]),
        }
    }
    stream.write_all(&sum.answer())?;
    Ok(sum)
}

/// A connected AF_VSOCK socket.
#[derive(Debug)]
pub struct Vsock(OwnedFd);

/// What kind of socket.
pub type Kind = libc::c_int;
/// Bytes.
pub const STREAM: Kind = libc::SOCK_STREAM;
/// Messages.
pub const SEQPACKET: Kind = libc::SOCK_SEQPACKET;

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: integers only, for which zero is a value.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

fn checked(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn new_socket(kind: Kind) -> io::Result<OwnedFd> {
    // SAFETY: no memory is passed.
    let fd = checked(unsafe { libc::socket(libc::AF_VSOCK, kind | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

const ADDRESS: libc::socklen_t = size_of::<libc::sockaddr_vm>() as libc::socklen_t;

impl Vsock {
    /// Connects, and waits for that.
    ///
    /// # Errors
    /// Of socket(2) and connect(2).
    pub fn connect(kind: Kind, cid: u32, port: u32) -> io::Result<Vsock> {
        let (socket, address) = (new_socket(kind)?, address(cid, port));
        // SAFETY: the address lives over the call and has that length.
        checked(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), ADDRESS) })?;
        Ok(Vsock(socket))
    }

    /// Sends nothing more.
    ///
    /// # Errors
    /// Of shutdown(2).
    pub fn end(&self) -> io::Result<()> {
        // SAFETY: no memory is passed.
        checked(unsafe { libc::shutdown(self.0.as_raw_fd(), libc::SHUT_WR) }).map(drop)
    }

    /// One message, with flags.
    ///
    /// # Errors
    /// Of send(2).
    pub fn send(&self, bytes: &[u8], flags: libc::c_int) -> io::Result<usize> {
        let flags = flags | libc::MSG_NOSIGNAL;
        // SAFETY: the slice has that length.
        let sent = unsafe { libc::send(self.0.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags) };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }

    /// One message, up to its room, and whether it ends a record.
    ///
    /// # Errors
    /// Of recvmsg(2).
    pub fn receive(&self, bytes: &mut [u8]) -> io::Result<(usize, bool)> {
        let mut vector = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        // SAFETY: all zeros is a message header without anything.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        (message.msg_iov, message.msg_iovlen) = (&raw mut vector, 1);
        // SAFETY: one vector, which is the slice that is borrowed exclusively.
        let got = unsafe { libc::recvmsg(self.0.as_raw_fd(), &mut message, 0) };
        let got = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;
        Ok((got, message.msg_flags & libc::MSG_EOR != 0))
    }
}

impl Read for Vsock {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.receive(bytes).map(|(got, _)| got)
    }
}

impl Write for Vsock {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.send(bytes, 0)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A listening AF_VSOCK socket.
#[derive(Debug)]
pub struct Listener(OwnedFd);

impl Listener {
    /// Listens on a port of every context ID of this system.
    ///
    /// # Errors
    /// Of socket(2), bind(2) and listen(2).
    pub fn bind(kind: Kind, port: u32) -> io::Result<Listener> {
        let (socket, address) = (new_socket(kind)?, address(libc::VMADDR_CID_ANY, port));
        // SAFETY: the address lives over the call and has that length.
        checked(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), ADDRESS) })?;
        // SAFETY: no memory is passed.
        checked(unsafe { libc::listen(socket.as_raw_fd(), 1024) })?;
        Ok(Listener(socket))
    }

    /// Waits for who connects.
    ///
    /// # Errors
    /// Of accept(2).
    pub fn accept(&self) -> io::Result<Vsock> {
        // SAFETY: no address is wanted.
        let fd = checked(unsafe {
            libc::accept4(self.0.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut(), libc::SOCK_CLOEXEC)
        })?;
        // SAFETY: the descriptor is new and nobody else's.
        Ok(Vsock(unsafe { OwnedFd::from_raw_fd(fd) }))
    }
}
