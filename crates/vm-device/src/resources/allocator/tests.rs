use proptest::prelude::*;

use super::*;

fn pc() -> SystemAllocator {
    let base = GuestAddress(0);
    SystemAllocator::new(None, None, base, 1 << 36, X86_64_IRQ_BASE, X86_64_IRQ_END, INSTANCE_ID_BASE)
        .unwrap()
}

/// All that is given away.
fn state(allocator: &SystemAllocator) -> String {
    format!("{:?}", allocator.lock())
}

#[test]
fn a_machine_without_extent_is_none() {
    let new = |base, size, mmio, bytes, first, last| {
        SystemAllocator::new(base, size, GuestAddress(mmio), bytes, first, last, 0).is_some()
    };
    assert!(new(None, None, 0, 1, 5, 5));
    assert!(new(Some(GuestAddress(0xffff)), Some(1), u64::MAX, 1, 0, u32::MAX - 1));
    assert!(!new(None, Some(0), 0, 1, 5, 5), "no ports");
    assert!(!new(None, Some(0x1_0001), 0, 1, 5, 5), "beyond the last port");
    assert!(!new(Some(GuestAddress(0x1_0000)), None, 0, 1, 5, 5), "begins beyond the last port");
    assert!(!new(Some(GuestAddress(u64::MAX)), Some(2), 0, 1, 5, 5), "ports wrap around");
    assert!(!new(None, None, 0, 0, 5, 5), "no addresses");
    assert!(!new(None, None, 2, u64::MAX, 5, 5), "addresses wrap around");
    assert!(!new(None, None, 0, 1, 6, 5), "lines end before they begin");
    assert!(!new(None, None, 0, 1, 0, u32::MAX), "no number is left for messages");
}

#[test]
fn the_vmm_assigns_by_saying_where_and_only_once() {
    let allocator = pc();
    let serial = [ResourceConstraint::pio_at(0x3f8, 8), ResourceConstraint::new_legacy_irq(Some(5))];
    let given = allocator.allocate(&serial).unwrap();
    assert_eq!(
        given.get_all_resources(),
        [Resource::PioAddressRange { base: 0x3f8, size: 8 }, Resource::LegacyIrq(5)]
    );
    let before = state(&allocator);
    assert!(matches!(allocator.allocate(&serial), Err(ResourceError::Exhausted { pool: Pool::Pio, .. })));
    assert!(matches!(allocator.allocate_irq(Some(5)), Err(ResourceError::InUse { pool: Pool::Irq, .. })));
    assert!(allocator.allocate(&[ResourceConstraint::pio_at(0xfffc, 8)]).is_err(), "wraps around");
    assert!(allocator.allocate(&[ResourceConstraint::mmio_at(u64::MAX, 2)]).is_err(), "wraps around");
    assert_eq!(state(&allocator), before);
}

#[test]
fn the_manager_assigns_all_or_nothing() {
    let allocator = pc();
    let everything = |last| {
        [
            ResourceConstraint::pio_with_constraints(8, Some((0xc000, 0xcfff)), 8),
            ResourceConstraint::mmio_with_constraints(0x3000, Some((0xc000_0000, 0xfebf_ffff)), 0x4000),
            ResourceConstraint::new_legacy_irq(None),
            ResourceConstraint::PciMsiIrq { size: 4 },
            ResourceConstraint::PciMsixIrq { size: 33 },
            ResourceConstraint::GenericIrq { size: 7 },
            ResourceConstraint::MacAddress { address: None },
            ResourceConstraint::new_kvm_mem_slot(3, None),
            last,
        ]
    };
    let empty = state(&allocator);
    for impossible in [
        ResourceConstraint::new_pio(0),
        ResourceConstraint::new_mmio(1 << 37),
        ResourceConstraint::mmio_with_constraints(1, None, 3),
        ResourceConstraint::new_legacy_irq(Some(4)),
        ResourceConstraint::new_legacy_irq(Some(5)),
        ResourceConstraint::PciMsiIrq { size: 0 },
        ResourceConstraint::PciMsiIrq { size: 3 },
        ResourceConstraint::PciMsiIrq { size: 64 },
        ResourceConstraint::PciMsixIrq { size: 0 },
        ResourceConstraint::PciMsixIrq { size: 2049 },
        ResourceConstraint::GenericIrq { size: u32::MAX },
        ResourceConstraint::MacAddress { address: Some("02:00:00:00:00:01".into()) },
        ResourceConstraint::MacAddress { address: Some("01:00:5e:00:00:01".into()) },
        ResourceConstraint::new_kvm_mem_slot(1, Some(2)),
        ResourceConstraint::new_kvm_mem_slot(u32::MAX, Some(1)),
        ResourceConstraint::new_kvm_mem_slot(0, None),
    ] {
        let failed = allocator.allocate(&everything(impossible.clone()));
        assert!(failed.is_err(), "{impossible:?}");
        assert_eq!(state(&allocator), empty, "{impossible:?}");
    }
    let given = allocator.allocate(&everything(ResourceConstraint::new_kvm_mem_slot(1, Some(9)))).unwrap();
    assert_eq!(
        given.get_all_resources(),
        [
            Resource::PioAddressRange { base: 0xc000, size: 8 },
            Resource::MmioAddressRange { base: 0xc000_0000, size: 0x3000 },
            Resource::LegacyIrq(5),
            Resource::MsiIrq { ty: MsiIrqType::PciMsi, base: 24, size: 4 },
            Resource::MsiIrq { ty: MsiIrqType::PciMsix, base: 28, size: 33 },
            Resource::MsiIrq { ty: MsiIrqType::GenericMsi, base: 61, size: 7 },
            Resource::MacAddresss("02:00:00:00:00:01".into()),
            Resource::KvmMemSlot(0),
            Resource::KvmMemSlot(1),
            Resource::KvmMemSlot(2),
            Resource::KvmMemSlot(9),
        ]
    );
    allocator.free(&given).unwrap();
    assert_eq!(state(&allocator), empty);
}

#[test]
fn giving_back_is_all_or_nothing_too() {
    let allocator = pc();
    let mut given = allocator
        .allocate(&[ResourceConstraint::new_pio(4), ResourceConstraint::new_kvm_mem_slot(2, None)])
        .unwrap();
    let shared = allocator.allocate_shared_irq(Some(10)).unwrap();
    assert_eq!(allocator.allocate_shared_irq(Some(10)), Ok(shared));
    given.append(Resource::LegacyIrq(shared));
    let before = state(&allocator);
    for wrong in [
        Resource::PioAddressRange { base: 0, size: 4 }, // Twice.
        Resource::PioAddressRange { base: 0, size: 2 },
        Resource::MmioAddressRange { base: 0, size: 0x1000 },
        Resource::LegacyIrq(11),
        Resource::KvmMemSlot(2),
        Resource::MacAddresss("no".into()),
        Resource::MsiIrq { ty: MsiIrqType::PciMsi, base: u32::MAX, size: u32::MAX },
    ] {
        let mut all = given.clone();
        all.append(wrong.clone());
        assert!(allocator.free(&all).is_err(), "{wrong:?}");
        assert_eq!(state(&allocator), before, "{wrong:?}");
    }
    // Both shares in one list: the line is free in between, and is not afterwards.
    let mut all = given.clone();
    all.append(Resource::LegacyIrq(shared));
    all.append(Resource::LegacyIrq(shared));
    assert!(allocator.free(&all).is_err());
    assert_eq!(state(&allocator), before);
    allocator.free(&given).unwrap();
    assert!(allocator.free(&given).is_err());
    assert_eq!(
        allocator.allocate_irq(Some(10)).unwrap_err(),
        ResourceError::InUse { pool: Pool::Irq, base: 10, size: 1 }
    );
}

#[test]
fn the_firmware_moves_what_is_there_or_it_stays() {
    let allocator = pc();
    let at = |base| Request::new(0x1000).at(base);
    for base in [0x1000, 0x4000] {
        allocator.allocate_in(Pool::Mmio, &at(base)).unwrap();
    }
    allocator.relocate(Pool::Mmio, 0x1000, 0x2000, 0x1000).unwrap();
    allocator.relocate(Pool::Mmio, 0x2000, 0x2800, 0x1000).unwrap();
    let before = allocator.allocated(Pool::Mmio);
    assert_eq!(before, [(0x2800, 0x37ff), (0x4000, 0x4fff)]);
    for (from, to) in [(0x2800, 0x3001), (0x2800, 1 << 36), (0x2800, u64::MAX), (0x1000, 0x8000)] {
        assert!(allocator.relocate(Pool::Mmio, from, to, 0x1000).is_err(), "{from:#x} {to:#x}");
        assert_eq!(allocator.allocated(Pool::Mmio), before);
    }
}

#[test]
fn a_line_is_shared_by_those_who_want_to() {
    let allocator = pc();
    allocator.set_extent(Pool::Irq, 10, 12).unwrap();
    assert_eq!(allocator.allocate_irq(Some(11)), Ok(11));
    assert!(allocator.allocate_shared_irq(Some(11)).is_err(), "somebody has it for itself");
    assert_eq!(allocator.allocate_shared_irq(None), Ok(10));
    assert_eq!(allocator.allocate_shared_irq(None), Ok(12), "a free one rather than a shared one");
    assert!(allocator.allocate_irq(Some(10)).is_err(), "somebody shares it");
    assert_eq!(allocator.allocate_shared_irq(Some(10)), Ok(10));
    assert_eq!(allocator.allocate_shared_irq(None), Ok(12), "the one with fewer users");
    assert_eq!(allocator.allocate_shared_irq(None), Ok(10));
    for _ in 0..3 {
        assert!(allocator.allocate_irq(Some(10)).is_err());
        allocator.free_irq(10).unwrap();
    }
    assert!(allocator.free_irq(10).is_err());
    assert_eq!(allocator.allocate_irq(Some(10)), Ok(10));
}

#[test]
fn lines_messages_ids_and_slots_run_out() {
    let allocator = pc();
    allocator.set_extent(Pool::InstanceId, 7, 8).unwrap();
    assert_eq!((allocator.allocate_instance_id(), allocator.allocate_instance_id()), (Ok(7), Ok(8)));
    assert!(allocator.allocate_instance_id().is_err());
    allocator.free_instance_id(7).unwrap();
    assert!(allocator.free_instance_id(7).is_err());
    assert_eq!(allocator.allocate_instance_id(), Ok(7));
    for irq in X86_64_IRQ_BASE..=X86_64_IRQ_END {
        assert_eq!(allocator.allocate_irq(None), Ok(irq));
    }
    assert!(allocator.allocate_irq(None).is_err());
    assert!(allocator.allocate_shared_irq(None).is_err());
    let messages = [ResourceConstraint::PciMsixIrq { size: 2048 }];
    assert!(allocator.allocate(&messages).is_ok());
    assert!(allocator.allocate(&messages).is_err(), "24 of the 4096 are lines");
    let slots = [ResourceConstraint::new_kvm_mem_slot(32764, None)];
    assert_eq!(allocator.allocate(&slots).unwrap().get_kvm_mem_slots().len(), 32764);
    assert!(allocator.allocate(&[ResourceConstraint::new_kvm_mem_slot(1, None)]).is_err());
}

#[test]
fn an_extent_is_valid_and_changes_only_while_unused() {
    let allocator = pc();
    for (pool, first, last) in
        [(Pool::Mmio, 2, 1), (Pool::Pio, 0, 0x1_0000), (Pool::Msi, 0, 1 << 32), (Pool::Mac, 0, 1 << 48)]
    {
        assert!(matches!(allocator.set_extent(pool, first, last), Err(ResourceError::Window { .. })));
    }
    allocator.set_extent(Pool::Msi, 100, 100).unwrap();
    allocator.allocate(&[ResourceConstraint::GenericIrq { size: 1 }]).unwrap();
    assert_eq!(allocator.set_extent(Pool::Msi, 0, 200), Err(ResourceError::PoolInUse { pool: Pool::Msi }));
}

#[test]
fn mac_addresses_are_of_one_station_and_unique() {
    let allocator = pc();
    let ask = |text: &str| {
        allocator
            .allocate(&[ResourceConstraint::MacAddress { address: Some(text.to_owned()) }])
            .map(|given| given.get_mac_address().unwrap())
    };
    assert_eq!(ask("52:54:00:12:34:5F").as_deref(), Ok("52:54:00:12:34:5f"));
    assert!(matches!(ask("52:54:00:12:34:5f"), Err(ResourceError::InUse { pool: Pool::Mac, .. })));
    for bad in [
        "",
        "52:54:00:12:34",
        "52:54:00:12:34:56:78",
        "52:54:00:12:34:5",
        "52:54:00:12:34:+5",
        "52-54-00-12-34-56",
        "ff:ff:ff:ff:ff:ff",
        "00:00:00:00:00:00",
        "01:00:5e:00:00:01",
        "é:54:00:12:34:56",
    ] {
        assert_eq!(ask(bad), Err(ResourceError::MacAddress(bad.to_owned())));
    }
}

#[test]
fn a_claim_goes_back_unless_it_is_kept() {
    let allocator = pc();
    let constraints = [ResourceConstraint::new_pio(4), ResourceConstraint::new_legacy_irq(None)];
    let empty = state(&allocator);
    let claim = allocator.claim(&constraints).unwrap();
    assert_eq!(claim.resources().get_legacy_irq(), Some(5));
    assert_ne!(state(&allocator), empty);
    drop(claim);
    assert_eq!(state(&allocator), empty);
    let kept = allocator.claim(&constraints).unwrap().keep();
    assert_ne!(state(&allocator), empty);
    allocator.free(&kept).unwrap();
    assert_eq!(state(&allocator), empty);
}

fn constraint() -> impl Strategy<Value = ResourceConstraint> {
    prop_oneof![
        (proptest::option::of((0_u16..64, 0_u16..64)), 0_u16..10, 0_u16..12)
            .prop_map(|(range, align, size)| ResourceConstraint::PioAddress { range, align, size }),
        (proptest::option::of((0_u64..64, 0_u64..64)), 0_u64..10, 0_u64..12)
            .prop_map(|(range, align, size)| ResourceConstraint::MmioAddress { range, align, size }),
        proptest::option::of(3_u32..12).prop_map(|irq| ResourceConstraint::LegacyIrq { irq }),
        (0_u32..9).prop_map(|size| ResourceConstraint::PciMsiIrq { size }),
        (0_u32..9).prop_map(|size| ResourceConstraint::PciMsixIrq { size }),
        (proptest::option::of(0_u32..12), 0_u32..5)
            .prop_map(|(slot, size)| ResourceConstraint::KvmMemSlot { slot, size }),
    ]
}

proptest! {
    /// Whatever is asked for: a failure changes nothing, what is given is nobody else's, and all comes back.
    #[test]
    fn nothing_is_lost_and_nothing_is_given_twice(
        devices in proptest::collection::vec(proptest::collection::vec(constraint(), 0..6), 1..20),
    ) {
        let allocator = pc();
        for (pool, last) in
            [(Pool::Pio, 63), (Pool::Mmio, 63), (Pool::Irq, 8), (Pool::Msi, 31), (Pool::MemorySlot, 9)]
        {
            allocator.set_extent(pool, 0, last).unwrap();
        }
        let empty = state(&allocator);
        let mut plugged = Vec::new();
        let mut used = std::collections::BTreeSet::new();
        for constraints in devices {
            let before = state(&allocator);
            match allocator.allocate(&constraints) {
                Ok(given) => {
                    for resource in given.get_all_resources() {
                        let (pool, base, size) = place(resource).unwrap();
                        for number in base..base + size {
                            prop_assert!(used.insert((pool, number)), "{:?} twice", resource);
                        }
                    }
                    plugged.push(given);
                }
                Err(_) => prop_assert_eq!(state(&allocator), before),
            }
        }
        for given in &plugged {
            prop_assert_eq!(allocator.free(given), Ok(()));
        }
        prop_assert_eq!(state(&allocator), empty);
    }
}
