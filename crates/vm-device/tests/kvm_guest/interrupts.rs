//! What programs need for interrupts in real mode, and what a VMM's event loop does for level-triggered lines.

use std::sync::Arc;
use std::thread::{self, JoinHandle};

use rustix::event::{PollFd, PollFlags, poll};
use vm_device::interrupt::{Event, IrqLine};

use super::Code;

/// Line 5, vector 0x25, in real mode: the first 8259A begins at vector 0x20, takes line 5 only, level-triggered or not (the
/// register of edges and levels is port 0x4d0). `handler` is a label.
pub(crate) fn set_up_pic(code: &mut Code, level: bool, handler: &'static str) {
    code.op(&[0xfa]) // cli
        .op(&[0xc7, 0x06, 0x94, 0x00]) // mov word [0x25 * 4], handler
        .address16(handler)
        .op(&[0xc7, 0x06, 0x96, 0x00, 0x00, 0x00]) // mov word [0x25 * 4 + 2], 0
        .out8(0x20, 0x11) // begin; edges; a second one
        .out8(0x21, 0x20) // vectors from 0x20 on
        .out8(0x21, 0x04) // the second one is at line 2
        .out8(0x21, 0x01) // 8086 mode
        .out8(0x21, !0x20) // all but line 5 are masked
        .out8(0x4d0, if level { 0x20 } else { 0 });
}

/// Waits, halted, until the word at 0x500 has this value.
pub(crate) fn wait_for(code: &mut Code, again: &'static str, over: &'static str, value: u8) {
    code.label(again)
        .op(&[0xfa]) // cli
        .op(&[0x83, 0x3e, 0x00, 0x05, value]) // cmp word [0x500], value
        .jump(0x74, over) // je over
        .op(&[0xfb, 0xf4]) // sti; hlt: an interrupt in between ends the halt
        .jump(0xeb, again) // jmp again
        .label(over)
        .op(&[0xfb]); // sti
}

/// Goes round until the double word at `address` is `value`.
pub(crate) fn spin(code: &mut Code, address: u32, value: u32, name: &'static str) {
    code.label(name)
        .op(&[0xf3, 0x90]) // pause
        .compare(address, value)
        .jump(0x75, name); // jne
}

/// Vectors 0x41 and 0x42 count at 0x500 and 0x504; the local APIC is switched on.
pub(crate) fn set_up_apic(code: &mut Code) {
    code.op(&[0xfa]); // cli
    for (vector, handler) in [(0x41_u16, "first"), (0x42, "second")] {
        let [low, high] = (vector * 4).to_le_bytes();
        code.op(&[0xc7, 0x06, low, high]).address16(handler); // mov word [vector * 4], handler
        code.op(&[0xc7, 0x06, low + 2, high, 0, 0]); // mov word [vector * 4 + 2], 0
    }
    code.store(0xfee0_00f0, 0x1ff); // spurious vector, APIC enabled
    code.op(&[0xfb]); // sti
}

/// Count, and end the interrupt at the local APIC.
pub(crate) fn handlers(code: &mut Code) {
    for (name, count) in [("first", 0x500_u16), ("second", 0x504)] {
        let [low, high] = count.to_le_bytes();
        code.label(name).op(&[0x66, 0xff, 0x06, low, high]); // inc dword [count]
        code.store(0xfee0_00b0, 0); // end of interrupt
        code.op(&[0xcf]); // iret
    }
}

/// Watches a line's resample file, as a VMM's event loop does.
pub(crate) struct Watcher {
    stop: Arc<Event>,
    thread: Option<JoinHandle<(u32, u32)>>,
}

impl Watcher {
    pub(crate) fn new(line: &IrqLine) -> Watcher {
        let stop = Arc::new(Event::new().unwrap());
        let (line, stopped) = (line.clone(), stop.clone());
        let thread = thread::spawn(move || {
            let resample = line.resample().unwrap();
            let (mut ended, mut raised) = (0, 0);
            loop {
                let mut files = [PollFd::new(resample, PollFlags::IN), PollFd::new(&*stopped, PollFlags::IN)];
                poll(&mut files, None).unwrap();
                let [ready, stop] = files.map(|file| file.revents().contains(PollFlags::IN));
                if ready {
                    ended += 1;
                    raised += u32::from(line.resampled());
                } else if stop {
                    return (ended, raised);
                }
            }
        });
        Watcher { stop, thread: Some(thread) }
    }

    /// How often the guest ended an interrupt, and how often the line was raised again for that. All that a program did before
    /// it was done is counted.
    pub(crate) fn finish(mut self) -> (u32, u32) {
        self.stop.signal();
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.stop.signal();
    }
}
