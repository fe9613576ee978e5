//! One BPF object in the kernel: maps made or adopted by pin, programs loaded, links made, kept and swapped.
//!
//! Everything is pinned, so nothing detaches when the agent ends; the next one finds the links and puts its own programs into
//! them, one atomic exchange each. A clsact filter of fixed priority and handle outlives the agent as well, and is replaced in place.
//!
//! Interfaces that are there for good, the uplinks, have tcx links, which nobody can take away by mistake; where the kernel has no
//! tcx (< 6.6), filters. Pods' interfaces have filters: making a tcx link waits for an RCU grace period under the lock that every
//! interface and route of the node needs (`tcx_entry_sync`), 10 to 70 ms each, and a pod has four.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use aya::programs::tc::TcHandle;
use aya::programs::{Program, ProgramError, SchedClassifier, TcAttachType};
use aya::{Ebpf, EbpfLoader, GlobalData};

use crate::features::Features;
use crate::filters::{self, Mark};
use crate::pins::{KeptCapacity, MapSpec, Pins};
use crate::{Error, hook, sys};

/// Priority of the filters that come first, and of those that come last. Others' come before at lower, after at higher numbers.
pub const FIRST_FILTERS: u16 = 106;
/// See [`FIRST_FILTERS`].
pub const LAST_FILTERS: u16 = 107;

/// The handle of our filters within their priority.
const HANDLE: u16 = 1;

/// Where in an interface's chain of programs an object's are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// Before all that are there.
    First,
    /// After all that are there.
    Last,
}

impl Order {
    /// Ours among a clsact hook's filters.
    fn clsact_priority(self) -> u16 {
        match self {
            Order::First => FIRST_FILTERS,
            Order::Last => LAST_FILTERS,
        }
    }

    fn tcx_flags(self) -> u32 {
        match self {
            Order::First => sys::BPF_F_BEFORE,
            Order::Last => 0,
        }
    }
}

/// Which way a packet passes an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From the wire (or the pod) into the node.
    Ingress,
    /// Out of the node.
    Egress,
}

impl Direction {
    fn tcx(self) -> u32 {
        match self {
            Direction::Ingress => sys::attach_type::TCX_INGRESS,
            Direction::Egress => sys::attach_type::TCX_EGRESS,
        }
    }

    fn clsact(self) -> TcAttachType {
        match self {
            Direction::Ingress => TcAttachType::Ingress,
            Direction::Egress => TcAttachType::Egress,
        }
    }
}

/// What was there before us.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Adopted {
    /// Pinned maps taken over.
    pub maps: u32,
    /// Links whose programs were swapped: `program` or `program:interface`.
    pub links: Vec<String>,
    /// Links that were removed because their interface is gone.
    pub stale: Vec<String>,
    /// Maps whose capacity is not the configured one.
    pub capacities: Vec<KeptCapacity>,
}

/// A loaded object.
#[derive(Debug)]
pub(crate) struct Object {
    name: &'static str,
    ebpf: Ebpf,
    pins: Pins,
    features: Features,
    order: Order,
}

impl Object {
    /// Makes or adopts the maps, loads the programs `wanted` (name and whether it is a classifier is the object's word), and
    /// swaps them into the pinned links.
    pub(crate) fn load(
        name: &'static str,
        bytes: &[u8],
        pins: Pins,
        specs: &[MapSpec],
        globals: Vec<(&'static str, GlobalData<'_>)>,
        features: Features,
        order: Order,
    ) -> Result<(Self, Adopted), Error> {
        let (maps, capacities) = pins.check(specs)?;
        let mut loader = EbpfLoader::new();
        for spec in specs {
            loader.map_max_entries(spec.name, spec.max_entries);
            loader.map_pin_path(spec.name, pins.map(spec.name));
        }
        for (global, value) in globals {
            loader.override_global(global, value, true);
        }
        let mut ebpf = loader.load(bytes).map_err(|source| Error::Object {
            object: name,
            source: Box::new(source),
        })?;
        for (program, loaded) in ebpf.programs_mut() {
            let result = match loaded {
                Program::SchedClassifier(p) => p.load(),
                Program::CgroupSockAddr(p) => p.load(),
                // No other kind is in our objects.
                _ => Ok(()),
            };
            result.map_err(|source| Error::Program {
                object: name,
                program: program.to_owned(),
                source: Box::new(source),
            })?;
        }
        let object = Object {
            name,
            ebpf,
            pins,
            features,
            order,
        };
        let (links, stale) = object.swap()?;
        Ok((
            object,
            Adopted {
                maps,
                links,
                stale,
                capacities,
            },
        ))
    }

    pub(crate) fn features(&self) -> &Features {
        &self.features
    }

    /// A duplicate of a map's descriptor.
    pub(crate) fn map(&self, map: &'static str) -> Result<OwnedFd, Error> {
        let path = self.pins.map(map);
        match sys::obj_get(&path) {
            Ok(Some(fd)) => Ok(fd),
            Ok(None) => Err(Error::Absent {
                object: self.name,
                kind: "map",
                name: map.to_owned(),
            }),
            Err(source) => Err(Error::Path { path, source }),
        }
    }

    /// A program's descriptor.
    pub(crate) fn program(&self, program: &str) -> Result<BorrowedFd<'_>, Error> {
        self.ebpf
            .program(program)
            .and_then(|p| p.fd().ok())
            .map(|fd| fd.as_fd())
            .ok_or_else(|| Error::Absent {
                object: self.name,
                kind: "program",
                name: program.to_owned(),
            })
    }

    /// Puts the new programs into every pinned link; unpins those whose interface or cgroup is gone.
    fn swap(&self) -> Result<(Vec<String>, Vec<String>), Error> {
        let (mut swapped, mut stale) = (Vec::new(), Vec::new());
        for (path, program, interface) in self.pins.pinned_links()? {
            let label = match &interface {
                Some(interface) => format!("{program}:{interface}"),
                None => program.clone(),
            };
            let fault = |source| Error::Path {
                path: path.clone(),
                source,
            };
            let Some(link) = sys::obj_get(&path).map_err(fault)? else {
                continue;
            };
            // A program that this version no longer has: its link goes.
            let Ok(new) = self.program(&program) else {
                unpin(&path)?;
                stale.push(label);
                continue;
            };
            match sys::link_update(link.as_fd(), new) {
                Ok(()) => swapped.push(label),
                // ENOLINK: the interface or cgroup that it was attached to is gone.
                Err(e) if matches!(e.raw_os_error(), Some(libc::ENOLINK | libc::ENODEV)) => {
                    unpin(&path)?;
                    stale.push(label);
                }
                Err(source) => {
                    return Err(Error::Attach {
                        program,
                        target: interface.unwrap_or_else(|| "its cgroup".to_owned()),
                        source,
                    });
                }
            }
        }
        Ok((swapped, stale))
    }

    /// Attaches a program to a cgroup, unless its link is there already.
    pub(crate) fn attach_cgroup(
        &self,
        program: &str,
        cgroup: &Path,
        attach: u32,
    ) -> Result<(), Error> {
        let pin = self.pins.link(program, None);
        let fault = |source| Error::Attach {
            program: program.to_owned(),
            target: cgroup.display().to_string(),
            source,
        };
        let dir = fs::File::open(cgroup).map_err(|source| Error::Path {
            path: cgroup.to_owned(),
            source,
        })?;
        let id = rustix::fs::fstat(&dir).map_err(|e| fault(e.into()))?.st_ino;
        if let Some(link) = sys::obj_get(&pin).map_err(fault)? {
            if sys::link_info(link.as_fd()).map_err(fault)?.target == id {
                return Ok(());
            }
            unpin(&pin)?;
        }
        let link = sys::link_create(self.program(program)?, dir.as_raw_fd() as u32, attach, 0)
            .map_err(fault)?;
        sys::obj_pin(link.as_fd(), &pin).map_err(fault)
    }

    /// Attaches a program to an interface that is there for good, of the current network namespace, unless its link is there already.
    pub(crate) fn attach_interface(
        &mut self,
        program: &str,
        interface: &str,
        direction: Direction,
    ) -> Result<(), Error> {
        let fault = |source| Error::Attach {
            program: program.to_owned(),
            target: interface.to_owned(),
            source,
        };
        let index = sys::interface_index(interface).map_err(fault)?;
        if !self.features.tcx {
            return self.filter(program, interface, direction);
        }
        let pin = self.pins.link(program, Some(interface));
        if let Some(link) = sys::obj_get(&pin).map_err(fault)? {
            // The name may have been given to another interface meanwhile.
            if sys::link_info(link.as_fd()).map_err(fault)?.ifindex() == index {
                return Ok(());
            }
            unpin(&pin)?;
        }
        let flags = self.order.tcx_flags();
        let link = sys::link_create(self.program(program)?, index, direction.tcx(), flags)
            .map_err(fault)?;
        sys::obj_pin(link.as_fd(), &pin).map_err(fault)
    }

    /// Attaches programs to an interface that comes and goes with a pod.
    pub(crate) fn attach_passing(
        &mut self,
        interface: &str,
        programs: &[(&str, Direction)],
    ) -> Result<(), Error> {
        for (program, direction) in programs {
            self.filter(program, interface, *direction)?;
            // An earlier version of ours made links everywhere. Twice over a packet does no harm meanwhile: it is translated already.
            unpin(&self.pins.link(program, Some(interface)))?;
        }
        Ok(())
    }

    fn filter(
        &mut self,
        program: &str,
        interface: &str,
        direction: Direction,
    ) -> Result<(), Error> {
        let fault = |source: ProgramError| Error::Attach {
            program: program.to_owned(),
            target: interface.to_owned(),
            source: io::Error::other(source),
        };
        let absent = Error::Absent {
            object: self.name,
            kind: "program",
            name: program.to_owned(),
        };
        let Some(classifier) = self.ebpf.program_mut(program) else {
            return Err(absent);
        };
        let classifier: &mut SchedClassifier = classifier.try_into().map_err(fault)?;
        let (priority, handle) = (self.order.clsact_priority(), TcHandle::new(0, HANDLE));
        hook::clsact(classifier, interface, direction.clsact(), priority, handle).map_err(fault)
    }

    /// Detaches every program from an interface; one that is gone took its programs along.
    pub(crate) fn detach_interface(
        &self,
        interface: &str,
        programs: &[(&str, Direction)],
    ) -> Result<(), Error> {
        for (program, _) in programs {
            unpin(&self.pins.link(program, Some(interface)))?;
        }
        remove_filters_of(interface, programs, self.order)
    }
}

/// Removes an object's filters from these interfaces of the current network namespace.
pub(crate) fn remove_filters(
    interfaces: &[String],
    programs: &[(&str, Direction)],
    order: Order,
) -> Result<(), Error> {
    interfaces
        .iter()
        .try_for_each(|interface| remove_filters_of(interface, programs, order))
}

fn remove_filters_of(
    interface: &str,
    programs: &[(&str, Direction)],
    order: Order,
) -> Result<(), Error> {
    for (program, direction) in programs {
        let mark = Mark {
            priority: order.clsact_priority(),
            handle: HANDLE,
            program,
        };
        match filters::remove(interface, *direction, &mark) {
            Ok(_) => {}
            // It went meanwhile, alone or with its interface.
            Err(e)
                if matches!(
                    e.raw_os_error(),
                    Some(libc::ENOENT | libc::ENODEV | libc::EINVAL)
                ) => {}
            Err(source) => {
                return Err(Error::Detach {
                    program: (*program).to_owned(),
                    interface: interface.to_owned(),
                    source,
                });
            }
        }
    }
    Ok(())
}

/// Removes a pin; one that is not there is no fault.
fn unpin(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(Error::Path {
            path: path.to_owned(),
            source,
        }),
        _ => Ok(()),
    }
}
