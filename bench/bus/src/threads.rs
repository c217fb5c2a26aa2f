//! Two vCPUs on different devices, and a third thread that plugs in and out: what an access of the first vCPU costs then.
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use peer_vm_device::device_manager::MmioManager as _;
use vm_device::dispatch::{IoDevice, Removal};

use super::variants::{self, Access, Addresses, LockedPeer, Register, Shared};
use super::{Effort, lap, median, shown};

const RANGES: usize = 100;
/// How much more than alone is still the same: the noise of two processors that share what they share.
const TARGET: f64 = 1.1;

/// Handles for two vCPUs, and what plugs in one device and out again.
struct Machine {
    vcpu: Box<dyn Fn() -> Box<dyn Access> + Sync>,
    plug: Box<dyn Fn() + Send + Sync>,
}

fn machines() -> Vec<Machine> {
    let ours = Arc::new(variants::ours(RANGES));
    let plug = || {
        let space = ours.space();
        Box::new(move || {
            let device = IoDevice::mmio(Arc::new(Register::default()));
            let registration = space.register(device, &[variants::range(RANGES).into()]).expect("it is free");
            assert!(matches!(registration.remove(), Removal::Done));
        })
    };
    let peer = Arc::new(Mutex::new(variants::peer(RANGES)));
    let changed = peer.clone();
    let (handles, shared) = (ours.clone(), ours.clone());
    vec![
        Machine { plug: plug(), vcpu: Box::new(move || Box::new(handles.vcpu())) },
        Machine { plug: plug(), vcpu: Box::new(move || Box::new(Shared(shared.clone()))) },
        Machine {
            vcpu: Box::new(move || Box::new(LockedPeer(peer.clone()))),
            plug: Box::new(move || {
                let lock = || changed.lock().expect("not poisoned");
                variants::register_peer(&mut lock(), RANGES, Arc::new(Register::default()));
                let base = peer_vm_device::bus::MmioAddress(variants::base(RANGES));
                drop(lock().deregister_mmio(base).expect("just registered"));
            }),
        },
    ]
}

/// What else runs.
#[derive(Clone, Copy)]
struct Company {
    second: bool,
    /// The pause between two times that a device is plugged in and out.
    plugger: Option<Duration>,
}

/// Nanoseconds of CPU time of an access of the first vCPU, and how often a second a device came and went.
fn measure(machine: &Machine, company: Company, accesses: usize) -> (f64, f64) {
    let end = AtomicBool::new(false);
    let plugged = AtomicU64::new(0);
    let all = Barrier::new(1 + usize::from(company.second) + usize::from(company.plugger.is_some()));
    let mut first = (machine.vcpu)();
    let mut second = (machine.vcpu)();
    thread::scope(|scope| {
        if company.second {
            scope.spawn(|| {
                let addresses = Addresses::one(RANGES / 2);
                all.wait();
                while !end.load(Ordering::Relaxed) {
                    second.run(&addresses, 1000);
                }
            });
        }
        if let Some(pause) = company.plugger {
            let (end, plugged, all) = (&end, &plugged, &all);
            scope.spawn(move || {
                all.wait();
                while !end.load(Ordering::Relaxed) {
                    (machine.plug)();
                    plugged.fetch_add(1, Ordering::Relaxed);
                    if !pause.is_zero() {
                        thread::sleep(pause);
                    }
                }
            });
        }
        let addresses = Addresses::one(0);
        all.wait();
        first.run(&addresses, accesses / 10);
        let (begin, before) = (Instant::now(), plugged.load(Ordering::Relaxed));
        let time = lap(first.as_mut(), &addresses, accesses);
        let plugs = (plugged.load(Ordering::Relaxed) - before) as f64 / begin.elapsed().as_secs_f64();
        end.store(true, Ordering::Relaxed);
        (time, plugs)
    })
}

pub fn table(effort: Effort) -> usize {
    const COMPANY: [(&str, Company); 4] = [
        ("alone", Company { second: false, plugger: None }),
        ("a second vCPU on another device", Company { second: true, plugger: None }),
        (
            "a second, and a plugger with pauses",
            Company { second: true, plugger: Some(Duration::from_millis(1)) },
        ),
        ("a second, and a plugger without", Company { second: true, plugger: Some(Duration::ZERO) }),
    ];
    println!(
        "\nnanoseconds of CPU time of a vCPU's access, {RANGES} ranges, by what else runs. A plugger registers a device and"
    );
    println!(
        "removes it, with pauses of a millisecond or without any (times a second in brackets: ours with handles, vm-device)."
    );
    println!("The time that a vCPU sleeps because another one has the lock is not in it.");
    println!(
        "ratio: ours with handles to the same alone; target {TARGET} but for the last row, ! if missed\n"
    );
    println!(
        "| beside                                             | ours, handles | ours, shared  | its Mutex     | ratio  |"
    );
    println!(
        "|----------------------------------------------------|---------------|---------------|---------------|--------|"
    );
    let machines = machines();
    let mut times: Vec<Vec<Vec<f64>>> = vec![vec![Vec::new(); machines.len()]; COMPANY.len()];
    let mut plugs: Vec<Vec<Vec<f64>>> = times.clone();
    for round in 0..effort.rounds {
        for i in 0..COMPANY.len() * machines.len() {
            let i = (i + round) % (COMPANY.len() * machines.len());
            let (company, machine) = (i % COMPANY.len(), i / COMPANY.len());
            let (time, rate) = measure(&machines[machine], COMPANY[company].1, effort.accesses * 4);
            times[company][machine].push(time);
            plugs[company][machine].push(rate);
        }
    }
    let mut missed = 0;
    for (row, (name, company)) in COMPANY.iter().enumerate() {
        let ratio = super::ratio(&times[row][0], &times[0][0]);
        let met = ratio <= TARGET || company.plugger.is_some_and(|pause| pause.is_zero());
        missed += usize::from(!met);
        let rates = match company.plugger {
            Some(_) => format!(" ({:.0}, {:.0})", median(&mut plugs[row][0]), median(&mut plugs[row][2])),
            None => String::new(),
        };
        let cells: Vec<String> = times[row].iter_mut().map(|times| format!("{:<13}", shown(times))).collect();
        let name = format!("{name}{rates}");
        println!("| {name:<50} | {} | {ratio:.2}{} |", cells.join(" | "), if met { "  " } else { " !" });
    }
    missed
}
