//! Machine code with labels.

use std::collections::BTreeMap;

use super::ORIGIN;

/// A program: bytes, names for places in it, and places where such a name stands.
#[derive(Debug, Default)]
pub(crate) struct Code {
    bytes: Vec<u8>,
    labels: BTreeMap<&'static str, usize>,
    /// Where, how many bytes, whose address; relative to the end of the place or absolute.
    uses: Vec<(usize, usize, &'static str, bool)>,
}

impl Code {
    /// Bytes of instructions.
    pub(crate) fn op(&mut self, bytes: &[u8]) -> &mut Code {
        self.bytes.extend(bytes);
        self
    }

    /// A name for what comes next.
    pub(crate) fn label(&mut self, name: &'static str) -> &mut Code {
        assert!(self.labels.insert(name, self.bytes.len()).is_none(), "{name} twice");
        self
    }

    /// A jump to a name within 127 bytes: 0xeb always, 0x74 if equal (zero), 0x75 if not.
    pub(crate) fn jump(&mut self, opcode: u8, to: &'static str) -> &mut Code {
        self.bytes.push(opcode);
        self.place(1, to, true)
    }

    /// The address of a name, in two bytes.
    pub(crate) fn address16(&mut self, of: &'static str) -> &mut Code {
        self.place(2, of, false)
    }

    /// The address of a name, in four bytes.
    pub(crate) fn address32(&mut self, of: &'static str) -> &mut Code {
        self.place(4, of, false)
    }

    fn place(&mut self, len: usize, name: &'static str, relative: bool) -> &mut Code {
        self.uses.push((self.bytes.len(), len, name, relative));
        self.bytes.resize(self.bytes.len() + len, 0);
        self
    }

    /// The program, to be loaded at [`ORIGIN`].
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        for &(at, len, name, relative) in &self.uses {
            let to = i64::try_from(self.labels[name]).unwrap();
            let end = i64::try_from(at + len).unwrap();
            let value = if relative { to - end } else { to + i64::from(ORIGIN) };
            assert!(!relative || (-128..128).contains(&value), "{name} is too far away");
            bytes[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
        }
        bytes
    }

    /// Sixteen bits: `out port, al` with this value.
    pub(crate) fn out8(&mut self, port: u16, value: u8) -> &mut Code {
        let [low, high] = port.to_le_bytes();
        self.op(&[0xba, low, high]) // mov dx, port
            .op(&[0xb0, value]) // mov al, value
            .op(&[0xee]) // out dx, al
    }

    /// Sixteen bits: `mov dword [address], value` anywhere below 4 GiB.
    pub(crate) fn store(&mut self, address: u32, value: u32) -> &mut Code {
        self.op(&[0x67, 0x66, 0xc7, 0x05]).op(&address.to_le_bytes()).op(&value.to_le_bytes())
    }

    /// Sixteen bits: `mov word [address], value` anywhere below 4 GiB.
    pub(crate) fn store16(&mut self, address: u32, value: u16) -> &mut Code {
        self.op(&[0x67, 0xc7, 0x05]).op(&address.to_le_bytes()).op(&value.to_le_bytes())
    }

    /// Sixteen bits: `out port, eax` with this value.
    pub(crate) fn out32(&mut self, port: u16, value: u32) -> &mut Code {
        let [low, high] = port.to_le_bytes();
        self.op(&[0xba, low, high]) // mov dx, port
            .op(&[0x66, 0xb8]) // mov eax, value
            .op(&value.to_le_bytes())
            .op(&[0x66, 0xef]) // out dx, eax
    }

    /// Sixteen bits: `in eax, port`, then to memory.
    pub(crate) fn in32(&mut self, port: u16, to: u16) -> &mut Code {
        let ([low, high], [to_low, to_high]) = (port.to_le_bytes(), to.to_le_bytes());
        self.op(&[0xba, low, high]) // mov dx, port
            .op(&[0x66, 0xed]) // in eax, dx
            .op(&[0x66, 0xa3, to_low, to_high]) // mov [to], eax
    }

    /// Sixteen bits: copies four bytes, anywhere below 4 GiB.
    pub(crate) fn copy(&mut self, from: u32, to: u32) -> &mut Code {
        self.op(&[0x67, 0x66, 0xa1]).op(&from.to_le_bytes()); // mov eax, [from]
        self.op(&[0x67, 0x66, 0xa3]).op(&to.to_le_bytes()) // mov [to], eax
    }

    /// Sixteen bits: `cmp dword [address], value`.
    pub(crate) fn compare(&mut self, address: u32, value: u32) -> &mut Code {
        self.op(&[0x67, 0x66, 0x81, 0x3d]).op(&address.to_le_bytes()).op(&value.to_le_bytes())
    }

    /// Sixteen or 32 bits: the end.
    pub(crate) fn done(&mut self) -> &mut Code {
        self.op(&[0xe6, super::DONE]) // out DONE, al
    }
}
