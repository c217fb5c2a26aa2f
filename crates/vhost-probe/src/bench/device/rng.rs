//! Entropy devices: random bytes.
use std::any::Any;

use virtio_testkit::load::floor::Floor;
use virtio_testkit::load::{Entropy, LoadError};

use super::{Device, Setting, Who};
use crate::bench::{Arguments, Case};

#[derive(Debug)]
pub(super) struct Rng;

impl Device for Rng {
    fn name(&self) -> &'static str {
        "rng"
    }

    fn kinds(&self) -> &'static [&'static str] {
        &["read"]
    }

    fn size(&self) -> u32 {
        64
    }

    fn floors(&self, _arguments: &Arguments) -> Vec<&'static str> {
        vec![Floor::Ring.name(), Floor::Random.name()]
    }

    fn setting(
        &self,
        case: &Case,
        _arguments: &Arguments,
        who: Who<'_>,
        _shelf: &mut dyn Any,
    ) -> Result<Setting, LoadError> {
        let floor = match who {
            Who::Floor(name) => Floor::by_name(name, None),
            _ => None,
        };
        if case.queues > 1 {
            return Err(LoadError::NotOffered("a second queue"));
        }
        Ok(Setting {
            loads: vec![(0, Box::new(Entropy::new(case.size)))],
            queues: 1,
            words: Vec::new(),
            floor,
        })
    }
}
