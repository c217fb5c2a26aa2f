//! What lines are written in: requests cut in any way, answers checked, waiting that ends.
use std::time::{Duration, Instant};

use vm_virtio::Features;

use super::{Checked, Host, Request, Setup, Subject, broken, not_applicable};
use crate::ring::Shape;
use crate::{Buf, Interrupts, TestRam, Used};

/// How a request is cut into descriptors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cut {
    /// One for what is read, one for what is written.
    Whole,
    /// At most this many on each side, the last takes the rest.
    Pieces(usize),
}

/// A request that is out.
pub(super) struct Asked {
    pub(super) id: u16,
    pub(super) chain: Vec<Buf>,
    request: Request,
}

/// One run of one line.
pub struct Bench<'h> {
    pub(super) host: &'h mut dyn Host,
    pub(super) subject: Option<&'h Subject>,
    pub(super) setup: Setup,
    pub(super) patience: Duration,
    count: u64,
}

impl<'h> Bench<'h> {
    pub(super) fn new(
        host: &'h mut dyn Host,
        subject: Option<&'h Subject>,
        setup: Setup,
        patience: Duration,
    ) -> Self {
        Bench { host, subject, setup, patience, count: 0 }
    }

    pub(super) fn subject(&self) -> Checked<&'h Subject> {
        match self.subject {
            Some(subject) => Ok(subject),
            None => not_applicable("no valid request is known: name the device"),
        }
    }

    /// The queue that requests go to.
    pub(super) fn queue(&self) -> Checked<usize> {
        let queue = self.subject.map_or(0, |subject| subject.queue);
        if queue < self.host.queues() { Ok(queue) } else { broken(format!("there is no queue {queue}")) }
    }

    pub(super) fn ram(&self) -> TestRam {
        self.host.ram()
    }

    pub(super) fn has(&self, feature: Features) -> bool {
        self.setup.optional.contains(feature)
    }

    /// A new driver, up to FEATURES_OK.
    pub(super) fn renew(&mut self) -> Checked {
        self.host.renew(&self.setup)
    }

    /// Rings started, driver ready.
    pub(super) fn go(&mut self) -> Checked {
        self.host.start_rings()?;
        self.host.driver_ok()
    }

    /// A new driver and a device that works.
    pub(super) fn begin(&mut self) -> Checked {
        self.renew()?;
        self.go()
    }

    pub(super) fn next_request(&mut self) -> Checked<Request> {
        let subject = self.subject()?;
        self.count += 1;
        Ok((subject.request)(self.count))
    }

    fn cut(&self, request: &Request, cut: Cut) -> Vec<Buf> {
        let ram = self.ram();
        let pieces = |total: usize| -> Vec<usize> {
            let count = match cut {
                Cut::Whole => 1,
                Cut::Pieces(most) => most.max(1),
            };
            let count = count.min(total);
            (0..count).map(|i| if i + 1 < count { 1 } else { total + 1 - count }).collect()
        };
        let mut chain = Vec::new();
        let mut rest = request.readable.as_slice();
        for len in pieces(rest.len()) {
            let (piece, tail) = rest.split_at(len);
            chain.push(ram.readable(piece));
            rest = tail;
        }
        chain.extend(pieces(request.writable as usize).into_iter().map(|len| ram.writable(len as u32)));
        chain
    }

    /// Stages a request: it is not available yet.
    pub(super) fn stage(&mut self, queue: usize, cut: Cut, shape: Shape) -> Checked<Asked> {
        let request = self.next_request()?;
        let chain = self.cut(&request, cut);
        match self.host.ring(queue).stage(&chain, shape) {
            Ok(id) => Ok(Asked { id, chain, request }),
            Err(_) => not_applicable(format!("a ring of {} entries has no room", self.setup.size)),
        }
    }

    /// Makes a request available and kicks, if the device wants that.
    pub(super) fn submit(&mut self, queue: usize, cut: Cut, shape: Shape) -> Checked<Asked> {
        let asked = self.stage(queue, cut, shape)?;
        self.publish(queue)?;
        Ok(asked)
    }

    /// Makes what is staged available, kicks if the device wants that.
    pub(super) fn publish(&mut self, queue: usize) -> Checked {
        self.host.ring(queue).publish();
        if self.host.ring(queue).try_kick_wanted()? {
            self.host.kick(queue)?;
        }
        Ok(())
    }

    /// The next used buffer, with the interrupt that it comes with. None came in time: broken.
    pub(super) fn used(&mut self, queue: usize) -> Checked<Used> {
        let deadline = Instant::now() + self.patience;
        loop {
            if let Some(used) = self.host.ring(queue).try_used()? {
                return Ok(used);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if !self.host.wait(queue, left)? {
                let wanted = self.host.ring(queue).interrupts_wanted() == Interrupts::Always;
                return match self.host.ring(queue).try_used()? {
                    Some(_) if wanted => broken("a buffer was used without the interrupt that was asked for"),
                    Some(used) => Ok(used),
                    None => broken(format!("no answer within {:?}", self.patience)),
                };
            }
        }
    }

    /// Checks an answer and gives the memory back.
    pub(super) fn check(&mut self, asked: &Asked, used: Used) -> Checked {
        let subject = self.subject()?;
        if used.id != asked.id {
            return broken(format!("buffer {} was used instead of {}", used.id, asked.id));
        }
        let mut answer = self.ram().written(&asked.chain);
        answer.truncate(used.len as usize);
        // The device wrote no entry for it: how much it wrote is not known (2.7.9).
        if !used.skipped
            && let Err(why) = (subject.check)(&asked.request, &answer)
        {
            return broken(format!("wrong answer: {why}"));
        }
        asked.chain.iter().for_each(|buf| self.ram().free(buf.addr));
        Ok(())
    }

    /// One request from beginning to end.
    pub(super) fn ask_as(&mut self, queue: usize, cut: Cut, shape: Shape) -> Checked {
        let asked = self.submit(queue, cut, shape)?;
        let used = self.used(queue)?;
        self.check(&asked, used)
    }

    /// One request from beginning to end, and what must not be written is not.
    pub(super) fn ask(&mut self, queue: usize) -> Checked {
        self.ask_as(queue, Cut::Whole, Shape::Direct)
    }

    /// One request, and an interrupt for it even if the answer was seen without.
    pub(super) fn ask_notified(&mut self, queue: usize) -> Checked {
        // Finding nothing moves the driver's event on.
        if let Some(used) = self.host.ring(queue).try_used()? {
            return broken(format!("buffer {} was used, which is not out", used.id));
        }
        let before = self.host.interrupts(queue);
        self.ask(queue)?;
        self.interrupt_after(queue, before, "a buffer was used and no interrupt came")
    }

    /// Waits for an interrupt that was not counted `before`; it may come some time behind what it is for.
    pub(super) fn interrupt_after(&mut self, queue: usize, before: u64, otherwise: &str) -> Checked {
        let deadline = Instant::now() + self.patience;
        while self.host.interrupts(queue) == before {
            let left = deadline.saturating_duration_since(Instant::now());
            if !self.host.wait(queue, left)? && self.host.interrupts(queue) == before {
                return broken(otherwise);
            }
        }
        Ok(())
    }

    /// One request of the caller's own, whatever the answer.
    pub(super) fn exchange(&mut self, queue: usize, request: Request) -> Checked {
        let chain = self.cut(&request, Cut::Whole);
        if self.host.ring(queue).stage(&chain, Shape::Direct).is_err() {
            return not_applicable("the ring has no room");
        }
        self.publish(queue)?;
        self.used(queue).map(|_| ())
    }

    /// Several requests at once.
    pub(super) fn ask_many(&mut self, queue: usize, count: usize, cut: Cut, shape: Shape) -> Checked {
        let mut asked = Vec::new();
        for _ in 0..count {
            asked.push(self.stage(queue, cut, shape)?);
        }
        self.publish(queue)?;
        self.finish(queue, asked)
    }

    /// Waits for these requests, in whatever order they are used.
    pub(super) fn finish(&mut self, queue: usize, mut asked: Vec<Asked>) -> Checked {
        for _ in 0..asked.len() {
            let used = self.used(queue)?;
            let Some(at) = asked.iter().position(|asked| asked.id == used.id) else {
                return broken(format!("buffer {} was used, which is not out", used.id));
            };
            self.check(&asked.remove(at), used)?;
        }
        Ok(())
    }

    /// Kicks and checks that the device does nothing to a queue: no buffer used, no interrupt.
    pub(super) fn quiet(&mut self, queue: usize, when: &str) -> Checked {
        let before = self.host.interrupts(queue);
        self.host.kick(queue)?;
        self.host.rest()?;
        if let Some(used) = self.host.ring(queue).try_used()? {
            return broken(format!("{when}, buffer {} was used", used.id));
        }
        match self.host.interrupts(queue) - before {
            0 => Ok(()),
            count => broken(format!("{when}, {count} interrupts came")),
        }
    }
}
