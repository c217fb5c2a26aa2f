//! Registering a thousand ranges.
use std::sync::Arc;
use std::time::Instant;

use peer_vm_device::device_manager::IoManager as PeerManager;
use vm_device::device_manager::IoManager;
use vm_device::dispatch::IoDevice;

use super::variants::{self, Array, Register};
use super::{Effort, shown};

const RANGES: usize = 1000;
const TARGET: f64 = 200.0;

/// A permutation of all ranges.
fn order(shuffled: bool) -> Vec<usize> {
    // 7 and 1000 have no common divisor.
    (0..RANGES).map(|at| if shuffled { (at * 377 + 11) % RANGES } else { at }).collect()
}

/// Microseconds. Devices are made before, and all is dropped after.
fn time<T>(order: &[usize], work: impl FnOnce(&[usize], Vec<Arc<Register>>) -> T) -> f64 {
    let devices: Vec<Arc<Register>> = order.iter().map(|_| Arc::default()).collect();
    let begin = Instant::now();
    let made = work(order, devices);
    let time = begin.elapsed();
    drop(made);
    time.as_secs_f64() * 1e6
}

fn array(order: &[usize], devices: Vec<Arc<Register>>) -> Array {
    let mut array = Array(Vec::new());
    for (at, device) in order.iter().zip(devices) {
        let row = Array::row(*at, device);
        let place = array.0.partition_point(|known| known.0 < row.0);
        array.0.insert(place, row);
    }
    array
}

fn ours(order: &[usize], devices: Vec<Arc<Register>>) -> IoManager {
    let mut manager = IoManager::new();
    for (at, device) in order.iter().zip(devices) {
        variants::register(&mut manager, *at, device);
    }
    manager
}

fn watched(order: &[usize], devices: Vec<Arc<Register>>) -> impl Sized + use<> {
    let mut manager = IoManager::new();
    let vcpu = manager.vcpu();
    for (at, device) in order.iter().zip(devices) {
        variants::register(&mut manager, *at, device);
    }
    (vcpu, manager)
}

fn together(order: &[usize], mut devices: Vec<Arc<Register>>) -> impl Sized + use<> {
    let manager = IoManager::new();
    let vcpu = manager.vcpu();
    let ranges: Vec<_> = order.iter().map(|at| variants::range(*at).into()).collect();
    let device = devices.pop().expect("a thousand");
    let registration = manager.space().register(IoDevice::mmio(device), &ranges).expect("they are free");
    (registration, vcpu, manager)
}

fn peer(order: &[usize], devices: Vec<Arc<Register>>) -> PeerManager {
    let mut manager = PeerManager::new();
    for (at, device) in order.iter().zip(devices) {
        variants::register_peer(&mut manager, *at, device);
    }
    manager
}

pub fn table(effort: Effort) -> usize {
    println!(
        "\nmicroseconds to register {RANGES} ranges; target of the second column {TARGET}, ! if missed\n"
    );
    println!(
        "| order     | sorted array  | ours, before vCPUs | ours, vCPU there | ours, one device | vm-device      |"
    );
    println!(
        "|-----------|---------------|--------------------|------------------|------------------|----------------|"
    );
    let mut missed = 0;
    for shuffled in [false, true] {
        let order = order(shuffled);
        let mut times: [Vec<f64>; 5] = Default::default();
        for _ in 0..effort.sets * effort.rounds {
            times[0].push(time(&order, array));
            times[1].push(time(&order, ours));
            times[2].push(time(&order, watched));
            times[3].push(time(&order, together));
            times[4].push(time(&order, peer));
        }
        let met = super::median(&mut times[1]) <= TARGET;
        missed += usize::from(!met);
        let [array, ours, watched, together, peer] = times.each_mut().map(|times| shown(times));
        println!(
            "| {:<9} | {array:<13} | {:<18} | {watched:<16} | {together:<16} | {peer:<14} |",
            if shuffled { "shuffled" } else { "ascending" },
            format!("{ours}{}", if met { "" } else { " !" }),
        );
    }
    missed
}
