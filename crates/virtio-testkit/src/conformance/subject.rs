//! What a device has to say of itself: a valid request, and what is a right answer to it.

/// One request: bytes for the device, room for its answer. How they are cut into descriptors is the suite's choice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// What the device reads.
    pub readable: Vec<u8>,
    /// How much it may write.
    pub writable: u32,
}

/// A device under test.
#[derive(Debug, Clone, Copy)]
pub struct Subject {
    /// Its name, for reports.
    pub name: &'static str,
    /// The first queue that takes such requests.
    pub queue: usize,
    /// How many queues from there on take them.
    pub queues: usize,
    /// The n-th request.
    pub request: fn(u64) -> Request,
    /// What is wrong with an answer: the request, and the bytes that count as written.
    pub check: fn(&Request, &[u8]) -> Result<(), String>,
    /// The n-th request that makes the device change its configuration space, if there is one.
    pub configure: Option<fn(u64) -> Request>,
    /// The offset of a byte of the configuration space that a driver cannot change, if there is one.
    pub read_only: Option<u32>,
}

impl Subject {
    /// The entropy device (5.4): no request, some bytes. Enough of them that all being the filling is no chance.
    pub const ENTROPY: Subject = Subject {
        name: "rng",
        queue: 0,
        queues: 1,
        request: |n| Request { readable: Vec::new(), writable: 16 + (n % 49) as u32 },
        check: |_, answer| match answer {
            [] => Err("5.4.6.2: one or more random bytes".to_owned()),
            [first, rest @ ..] if rest.len() >= 15 && rest.iter().all(|byte| byte == first) => {
                Err(format!("5.4: random bytes, not {} times {first:#x}", answer.len()))
            }
            _ => Ok(()),
        },
        configure: None,
        read_only: None,
    };

    /// The block device (5.2): a sector is read.
    pub const BLOCK: Subject = Subject {
        name: "blk",
        queue: 0,
        queues: 1,
        request: |n| {
            // VIRTIO_BLK_T_IN, reserved, sector.
            let mut readable = vec![0; 16];
            readable[8] = (n % 8) as u8;
            Request { readable, writable: 512 + 1 }
        },
        check: |_, answer| match answer {
            [data @ .., 0] if data.len() == 512 => Ok(()),
            [.., status] if answer.len() == 513 => Err(format!("5.2.6: status {status}")),
            _ => Err(format!("5.2.6: {} of 513 bytes", answer.len())),
        },
        configure: None,
        // capacity
        read_only: Some(0),
    };

    /// The socket device (5.10): the guest ends a flow that does not exist, which is not answered.
    pub const SOCKET: Subject = Subject {
        name: "vsock",
        queue: 1,
        queues: 1,
        request: |n| {
            let mut readable = vec![0; 44];
            // src_cid, dst_cid; src_port; type STREAM, op RST.
            (readable[0], readable[8], readable[16], readable[28], readable[30]) = (3, 2, n as u8, 1, 3);
            Request { readable, writable: 0 }
        },
        check: |_, answer| match answer {
            [] => Ok(()),
            _ => Err(format!("5.10.6.4: {} bytes written to an outgoing packet", answer.len())),
        },
        configure: None,
        // guest_cid
        read_only: Some(0),
    };

    /// The console device (5.3): output of port 0. Nothing comes back but the buffer.
    pub const CONSOLE: Subject = Subject {
        name: "console",
        queue: 1,
        queues: 1,
        request: |n| Request { readable: format!("line {n}\r\n").into_bytes(), writable: 0 },
        check: |_, answer| match answer {
            [] => Ok(()),
            _ => Err(format!("5.3.6: {} bytes written to output", answer.len())),
        },
        configure: None,
        // max_nr_ports
        read_only: Some(4),
    };

    /// A device that the suite knows a request of.
    pub fn by_name(name: &str) -> Option<&'static Subject> {
        match name {
            "rng" | "entropy" => Some(&Subject::ENTROPY),
            "blk" | "block" => Some(&Subject::BLOCK),
            "vsock" | "socket" => Some(&Subject::SOCKET),
            "console" => Some(&Subject::CONSOLE),
            _ => None,
        }
    }
}
