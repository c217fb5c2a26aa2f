//! The first serial port: `vm-superio`'s 16550A on our ports and our interrupt line. What the guest writes goes to standard
//! output; nothing is ever received (a console that works both ways is virtio's).

use std::convert::Infallible;
use std::io::{self, Stdout};
use std::sync::{Mutex, PoisonError};

use vm_device::DevicePio;
use vm_device::bus::{PioAddress, PioAddressOffset};
use vm_device::interrupt::IrqSource;
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial};

/// How many ports it has.
pub(crate) const PORTS: u16 = 8;

/// Its interrupt, of the edge kind as on a PC.
struct Pulse(IrqSource);

impl Trigger for Pulse {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.pulse();
        Ok(())
    }
}

pub(crate) struct SerialPort(Mutex<Serial<Pulse, NoEvents, Stdout>>);

impl SerialPort {
    pub(crate) fn new(line: IrqSource) -> SerialPort {
        SerialPort(Mutex::new(Serial::new(Pulse(line), io::stdout())))
    }
}

impl DevicePio for SerialPort {
    fn pio_read(&self, _base: PioAddress, offset: PioAddressOffset, data: &mut [u8]) {
        let mut serial = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Its registers are a byte each; wider accesses have no meaning.
        data.fill(0xff);
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            *byte = serial.read(offset);
        }
    }

    fn pio_write(&self, _base: PioAddress, offset: PioAddressOffset, data: &[u8]) {
        let mut serial = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let (&[byte], Ok(offset)) = (data, u8::try_from(offset)) {
            // A byte that nobody takes is lost, as on a cable without a plug.
            let _ = serial.write(offset, byte);
        }
    }
}
