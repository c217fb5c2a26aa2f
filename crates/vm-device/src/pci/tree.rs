//! The tree of a root complex: what is plugged in where, and where a bus number leads.
//!
//! Where a thing is in the tree is the VMM's doing and does not change by what a guest writes; the guest numbers the buses.
//! So numbers that overlap, loop or are reversed lead to the first bridge that claims them, or nowhere, but never around: each
//! step goes one level down.
use std::collections::BTreeMap;
use std::sync::Arc;

use super::express::PortKind;
use super::function::Function;
use super::{BusId, Card, PciError, PortId};

/// Functions of a bus by device and function number.
pub(crate) type Bus = BTreeMap<(u8, u8), Node>;

/// Device and function number on each bus from the root bus down.
pub(crate) type Path = Vec<(u8, u8)>;

/// A function in its place.
pub(crate) struct Node {
    pub(crate) function: Arc<Function>,
    /// If it is a bridge.
    pub(crate) port: Option<Port>,
}

/// A bridge's lower side.
pub(crate) struct Port {
    pub(crate) id: PortId,
    pub(crate) bus: Bus,
}

/// Device numbers of a bus.
pub(crate) const DEVICES: u8 = 32;
/// Functions of a device.
pub(crate) const FUNCTIONS: u8 = 8;

/// The bus that has this number, if bridges lead there: PCI-to-PCI Bridge 1.2, 3.1.2.1.2.
pub(crate) fn route(bus: &Bus, number: u8) -> Option<&Bus> {
    let mut bus = bus;
    loop {
        let claims = |node: &&Node| {
            let (secondary, subordinate) = node.function.buses();
            (secondary..=subordinate).contains(&number)
        };
        let node = bus.values().filter(|node| node.port.is_some()).find(claims)?;
        let port = node.port.as_ref().filter(|_| node.function.link_is_up())?;
        if node.function.buses().0 == number {
            return Some(&port.bus);
        }
        bus = &port.bus;
    }
}

/// The bus behind a port, and the node of the port. `None` is the root bus.
pub(crate) fn find(bus: &mut Bus, id: PortId) -> Option<&mut Node> {
    for node in bus.values_mut() {
        match &node.port {
            Some(port) if port.id == id => return Some(node),
            _ => {}
        }
        // Looked up twice, since a borrow that is returned on one path lasts on all.
        let below = node.port.as_ref().is_some_and(|port| contains(&port.bus, id));
        if below {
            return node.port.as_mut().and_then(|port| find(&mut port.bus, id));
        }
    }
    None
}

fn contains(bus: &Bus, id: PortId) -> bool {
    bus.values().filter_map(|node| node.port.as_ref()).any(|port| port.id == id || contains(&port.bus, id))
}

/// The bus of this name, with the kind of port that it is behind.
pub(crate) fn bus_mut(root: &mut Bus, id: BusId) -> Result<(&mut Bus, Option<Arc<Function>>), PciError> {
    match id {
        BusId::Root => Ok((root, None)),
        BusId::Behind(port) => {
            let node = find(root, port).ok_or(PciError::NoSuchPort)?;
            let function = node.function.clone();
            let port = node.port.as_mut().ok_or(PciError::NoSuchPort)?;
            Ok((&mut port.bus, Some(function)))
        }
    }
}

/// Whether a device may have this number on this bus, and nothing has it.
pub(crate) fn check_free(bus: &Bus, above: Option<PortKind>, device: u8) -> Result<(), PciError> {
    let most = if above.is_some_and(PortKind::has_link) { 1 } else { DEVICES };
    if device >= most {
        return Err(PciError::DeviceNumber(device));
    }
    if bus.keys().any(|(taken, _)| *taken == device) {
        return Err(PciError::Occupied);
    }
    Ok(())
}

/// All functions of a bus and of those behind its bridges, each with the sum of device numbers from the root bus to it, and
/// whether the guest can reach it.
pub(crate) fn walk(bus: &Bus, swizzle: usize, visible: bool, each: &mut impl FnMut(&Node, usize, bool)) {
    for ((device, _), node) in bus {
        let swizzle = swizzle + usize::from(*device);
        each(node, swizzle, visible);
        if let Some(port) = &node.port {
            walk(&port.bus, swizzle, visible && node.function.link_is_up(), each);
        }
    }
}

/// All functions below.
pub(crate) fn functions(bus: &Bus) -> Vec<Arc<Function>> {
    let mut all = Vec::new();
    walk(bus, 0, true, &mut |node, _, _| all.push(node.function.clone()));
    all
}

/// Takes the functions of a device out. Bridges stay: what is behind them would go with them.
pub(crate) fn take_card(bus: &mut Bus, device: u8) -> Option<Card> {
    let here = |(place, node): (&(u8, u8), &Node)| place.0 == device && node.port.is_none();
    let places: Vec<(u8, u8)> = bus.iter().filter(|entry| here(*entry)).map(|(place, _)| *place).collect();
    let taken = places.iter().filter_map(|place| Some((place.1, bus.remove(place)?.function)));
    let functions: Vec<_> = taken.collect();
    (!functions.is_empty()).then_some(Card { functions })
}
