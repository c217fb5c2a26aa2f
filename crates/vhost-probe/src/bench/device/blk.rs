//! Block devices: reads and writes. Each contender whose command says {disk} has an image of its own, which stays for all
//! cases; only such images are written to.
use std::any::Any;
use std::collections::HashMap;
use std::sync::Arc;

use virtio_testkit::load::floor::Floor;
use virtio_testkit::load::{Access, BlockRequests, Disk, LoadError, Requests};

use super::{Device, Setting, Who};
use crate::bench::{Arguments, Case};

/// What stands for an image in a command.
const DISK: &str = "{disk}";

#[derive(Debug)]
pub(super) struct Blk;

/// Images by what is started with them.
type Shelf = HashMap<String, Arc<Disk>>;

impl Device for Blk {
    fn name(&self) -> &'static str {
        "blk"
    }

    fn kinds(&self) -> &'static [&'static str] {
        const NAMES: [&str; 4] = [
            Access::RandomRead.name(),
            Access::RandomWrite.name(),
            Access::Read.name(),
            Access::Write.name(),
        ];
        &NAMES
    }

    fn size(&self) -> u32 {
        4096
    }

    fn floors(&self, arguments: &Arguments) -> Vec<&'static str> {
        // Beside back-ends that carry nothing out, one that does would be no floor.
        let disks = arguments.spawn.iter().any(|spawned| spawned.command().contains(DISK));
        vec![if disks { FILE } else { Floor::Status.name() }]
    }

    fn shelf(&self) -> Box<dyn Any> {
        Box::new(Shelf::new())
    }

    fn setting(
        &self,
        case: &Case,
        arguments: &Arguments,
        who: Who<'_>,
        shelf: &mut dyn Any,
    ) -> Result<Setting, LoadError> {
        let access = Access::ALL.into_iter().find(|access| access.name() == case.kind);
        let access = access.ok_or(LoadError::NotOffered("such a load"))?;
        let (name, wanted) = match who {
            Who::Floor(name) => (name, name == FILE),
            Who::Command(command) => (command, command.contains(DISK)),
            Who::Running => ("", false),
        };
        let disk = if wanted { Some(disk(name, arguments, shelf)?) } else { None };
        let status = Floor::Status.name();
        if disk.is_none()
            && access != Access::RandomRead
            && access != Access::Read
            && name != status
            && !arguments.overwrite
        {
            return Err(LoadError::NotOffered("writing to a disk that is not for that (see --overwrite)"));
        }
        let path = disk.as_ref().map(|disk| disk.path().to_owned());
        let floor = match who {
            Who::Floor(name) => Floor::by_name(name, path.clone()),
            _ => None,
        };
        let size = u64::from(arguments.disk_mib) << 20;
        let loads = (0..case.queues).map(|queue| {
            let part = (queue, case.queues);
            let requests = BlockRequests::new(access, case.size, disk.clone(), part);
            // A floor has no configuration space to tell.
            let requests = if floor.is_some() { requests.with_capacity(size) } else { requests };
            (queue, Box::new(requests) as Box<dyn Requests>)
        });
        let words = path.map(|path| (DISK, path.to_string_lossy().into_owned()));
        Ok(Setting { loads: loads.collect(), queues: case.queues, words: words.into_iter().collect(), floor })
    }
}

/// The name of the floor with a file.
const FILE: &str = "floor-preadv";

fn disk(name: &str, arguments: &Arguments, shelf: &mut dyn Any) -> Result<Arc<Disk>, LoadError> {
    let failed = |error| LoadError::System("making a disk", error);
    let shelf = shelf.downcast_mut::<Shelf>().ok_or(LoadError::NotOffered("a disk"))?;
    if let Some(disk) = shelf.get(name) {
        return Ok(Arc::clone(disk));
    }
    let folder = arguments.disk_dir.clone().unwrap_or_else(std::env::temp_dir);
    let file = format!("vhost-probe-disk-{}-{}", std::process::id(), shelf.len());
    let disk = Disk::make(&folder.join(file), u64::from(arguments.disk_mib) << 20);
    let disk = Arc::new(disk.map_err(failed)?);
    shelf.insert(name.to_owned(), Arc::clone(&disk));
    Ok(disk)
}
