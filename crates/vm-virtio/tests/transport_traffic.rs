//! Save and restore while a driver submits, behind each transport. The function of PCI with its configuration space is in
//! `transport_buses.rs`.
mod puppet;
mod traffic;

use std::sync::Arc;
use std::time::Duration;

use puppet::{Ear, Puppet, Strings};
use traffic::{Movable, Place, moves_under_traffic};
use virtio_testkit::transport::{
    CcwDriver, MmioDriver, PciDriver, TestChannel, TestFunction, TestLine, VECTORS,
};
use virtio_testkit::{RingLayout, TestRam};
use vm_virtio::transport::Options;
use vm_virtio::transport::ccw::Ccw;
use vm_virtio::transport::mmio::Mmio;
use vm_virtio::transport::pci::Pci;
use vm_virtio::{LaneRunner, WaitFor};

fn options() -> Options {
    let mut options = Options::new(Arc::new(Ear::default()));
    options.patience = Duration::from_secs(20);
    options
}

/// Lanes on threads of their own, until the engine is gone.
fn run(lanes: Vec<LaneRunner<Strings>>) {
    for lane in lanes {
        drop(std::thread::spawn(move || lane.run()));
    }
}

macro_rules! movable {
    ($transport:ty) => {
        impl Movable for $transport {
            type State = Vec<u8>;
            fn suspend(&self) {
                self.engine().suspend().wait().unwrap();
            }
            fn save(&self) -> Vec<u8> {
                (**self).save().unwrap()
            }
            fn restore(&self, state: &Vec<u8>) {
                (**self).restore(state).unwrap();
            }
        }
    };
}

movable!(Arc<Mmio<Puppet>>);
movable!(Arc<Pci<Puppet>>);
movable!(Arc<Ccw<Puppet>>);

#[test]
fn snapshot_mmio_under_traffic() {
    for layout in RingLayout::ALL {
        let ram = TestRam::new(&[(1 << 20, 8 << 20)]);
        let line = Arc::new(TestLine::default());
        let machine = || {
            let (mmio, lanes) = Mmio::new(Puppet::counting(), options(), 1, line.clone()).unwrap();
            run(lanes);
            mmio.engine().memory(ram.ram(), WaitFor::NewRequests).wait();
            Arc::new(mmio)
        };
        let place = Place::new(machine());
        let high = line.clone();
        let mut driver = MmioDriver::new(place.clone(), move || high.is_high());
        moves_under_traffic(&ram, layout, &place, &mut driver, |_| machine());
        assert_eq!(place.now().ignored().count(), 0);
    }
}

#[test]
fn snapshot_pci_under_traffic() {
    for (layout, messages) in RingLayout::ALL.into_iter().flat_map(|layout| [(layout, true), (layout, false)])
    {
        let ram = TestRam::new(&[(1 << 20, 8 << 20)]);
        let function = Arc::new(TestFunction::default());
        let machine = || {
            let (pci, lanes) = Pci::new(Puppet::counting(), options(), VECTORS).unwrap();
            run(lanes);
            pci.connect(function.clone());
            pci.engine().memory(ram.ram(), WaitFor::NewRequests).wait();
            Arc::new(pci)
        };
        let place = Place::new(machine());
        let capabilities: Vec<_> = place
            .now()
            .capabilities(4)
            .iter()
            .map(|capability| [&[9, 0], &capability.body[..]].concat())
            .collect();
        let mut driver = PciDriver::new(place.clone(), function.clone(), &capabilities, messages);
        moves_under_traffic(&ram, layout, &place, &mut driver, |_| machine());
        assert_eq!(place.now().ignored().count(), 0);
    }
}

#[test]
fn snapshot_ccw_under_traffic() {
    for (layout, adapter) in RingLayout::ALL.into_iter().flat_map(|layout| [(layout, true), (layout, false)])
    {
        let ram = TestRam::new(&[(1 << 20, 8 << 20)]);
        let channel = Arc::new(TestChannel::default());
        let machine = || {
            let (ccw, lanes) = Ccw::new(Puppet::counting(), options(), channel.clone()).unwrap();
            run(lanes);
            ccw.memory(ram.ram(), WaitFor::NewRequests).wait();
            Arc::new(ccw)
        };
        let place = Place::new(machine());
        let mut driver = CcwDriver::new(place.clone(), channel.clone(), &ram, adapter);
        moves_under_traffic(&ram, layout, &place, &mut driver, |_| machine());
    }
}
