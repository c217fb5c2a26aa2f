//! The system calls that move payload straight between guest memory and sockets, and those on AF_VSOCK addresses. No
//! safe wrapper offers either: guest memory is not Rust's to borrow, and rustix has no such address.
#![allow(unsafe_code)]
use std::io;
use std::marker::PhantomData;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;
use vm_virtio::queue::{Reader, Writer};

/// Pieces of memory that one system call takes. The kernel has a limit of 1024.
const VECTORS: usize = 256;

/// Pieces of memory, each valid for `'a`.
struct Vectors<'a> {
    list: [MaybeUninit<libc::iovec>; VECTORS],
    used: usize,
    bytes: usize,
    memory: PhantomData<&'a ()>,
}

impl Vectors<'_> {
    fn new() -> Self {
        Vectors { list: [MaybeUninit::uninit(); VECTORS], used: 0, bytes: 0, memory: PhantomData }
    }

    /// Adds up to `limit` bytes of these; how many found room.
    fn add(&mut self, pieces: impl Iterator<Item = libc::iovec>, limit: usize) -> usize {
        let mut left = limit;
        for piece in pieces {
            let Some(place) = self.list.get_mut(self.used).filter(|_| left > 0) else { break };
            let part = piece.iov_len.min(left);
            place.write(libc::iovec { iov_base: piece.iov_base, iov_len: part });
            self.used += 1;
            left -= part;
        }
        self.bytes += limit - left;
        limit - left
    }

    fn message(&mut self) -> libc::msghdr {
        // SAFETY: all zeros is a message header: without name, data and control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.list.as_mut_ptr().cast();
        message.msg_iovlen = self.used;
        message
    }
}

/// What is to be sent.
pub(crate) struct Source<'a>(Vectors<'a>);

impl<'a> Source<'a> {
    pub(crate) fn new() -> Source<'a> {
        Source(Vectors::new())
    }

    /// Up to `limit` bytes from where the reader is; how many found room.
    pub(crate) fn guest(&mut self, reader: &Reader<'a>, limit: usize) -> usize {
        self.0.add(reader.iovecs(), limit)
    }

    /// Memory of our own.
    pub(crate) fn own(&mut self, bytes: &'a [u8]) -> usize {
        let piece = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        self.0.add(std::iter::once(piece), bytes.len())
    }

    /// How many bytes are in it.
    pub(crate) fn len(&self) -> usize {
        self.0.bytes
    }
}

/// Room for what is received.
pub(crate) struct Sink<'a>(Vectors<'a>);

impl<'a> Sink<'a> {
    pub(crate) fn new() -> Sink<'a> {
        Sink(Vectors::new())
    }

    /// Up to `limit` bytes from where the writer is; how many found room.
    pub(crate) fn guest(&mut self, writer: &Writer<'a>, limit: usize) -> usize {
        self.0.add(writer.iovecs(), limit)
    }

    /// Memory of our own.
    pub(crate) fn own(&mut self, bytes: &'a mut [u8]) -> usize {
        let piece = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        self.0.add(std::iter::once(piece), bytes.len())
    }

    /// How many bytes it has room for.
    pub(crate) fn len(&self) -> usize {
        self.0.bytes
    }
}

fn again(mut call: impl FnMut() -> isize) -> Result<usize, Errno> {
    loop {
        match usize::try_from(call()) {
            Ok(count) => return Ok(count),
            Err(_) => match Errno::from_io_error(&io::Error::last_os_error()) {
                Some(Errno::INTR) => {}
                error => return Err(error.unwrap_or(Errno::IO)),
            },
        }
    }
}

/// Sends without waiting. `eor`: with `MSG_EOR`.
pub(crate) fn send(socket: BorrowedFd<'_>, mut source: Source<'_>, eor: bool) -> Result<usize, Errno> {
    let message = source.0.message();
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL | if eor { libc::MSG_EOR } else { 0 };
    // SAFETY: `msg_iovlen` entries of the list are initialised, and each is valid memory for 'a: guest memory that is
    // borrowed through its reader (if it is not mapped any more the kernel says EFAULT), or a slice. The kernel only
    // reads it.
    again(|| unsafe { libc::sendmsg(socket.as_raw_fd(), &message, flags) })
}

/// What [`receive`] got.
pub(crate) struct Received {
    pub(crate) bytes: usize,
    /// It ends a record: sockets that know of such.
    pub(crate) eor: bool,
    /// There was control data for which there is no room: files that a client passes. The kernel ends a read there,
    /// however much follows (`MSG_CTRUNC`).
    pub(crate) cut: bool,
}

/// Receives without waiting. With `peek` nothing is taken, and the length is that of the whole message.
pub(crate) fn receive(socket: BorrowedFd<'_>, mut sink: Sink<'_>, peek: bool) -> Result<Received, Errno> {
    let mut message = sink.0.message();
    let flags =
        libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC | if peek { libc::MSG_PEEK | libc::MSG_TRUNC } else { 0 };
    // SAFETY: as for `send`, and each piece may be written: guest memory that the driver made writable and nothing of
    // Rust's refers to, or a slice that the sink borrows exclusively. Without room for control data no file is taken.
    let bytes = again(|| unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, flags) })?;
    let flags = message.msg_flags;
    Ok(Received { bytes, eor: flags & libc::MSG_EOR != 0, cut: flags & libc::MSG_CTRUNC != 0 })
}

/// The length of the first message, which stays; 0 also at the end.
pub(crate) fn message_len(socket: BorrowedFd<'_>) -> Result<usize, Errno> {
    // Into some room: AF_VSOCK looks for no message if there is none.
    let mut byte = [0];
    let mut sink = Sink::new();
    sink.own(&mut byte);
    Ok(receive(socket, sink, true)?.bytes)
}

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: integers only, for which zero is a value.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

fn done(result: libc::c_int) -> Result<(), Errno> {
    if result == 0 {
        return Ok(());
    }
    Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO))
}

/// connect(2) to an AF_VSOCK address.
pub(crate) fn connect_vsock(socket: BorrowedFd<'_>, cid: u32, port: u32) -> Result<(), Errno> {
    let address = address(cid, port);
    let len = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
    // SAFETY: the address lives until the call is over, and has that length.
    done(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), len) })
}

/// bind(2) to a port of AF_VSOCK, on all of the host's context IDs.
pub(crate) fn bind_vsock(socket: BorrowedFd<'_>, port: u32) -> Result<(), Errno> {
    let address = address(libc::VMADDR_CID_ANY, port);
    let len = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
    // SAFETY: as above.
    done(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) })
}
