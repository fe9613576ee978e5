//! The service dataplane: its programs attached, its maps at hand.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use kun_ebpf_abi::reason::Reason;

use crate::features::{Features, Missing};
use crate::maps::{ServiceMaps, specs};
use crate::object::{Adopted, Direction, Object, Order, remove_filters};
use crate::pins::Pins;
use crate::sys::{self, Ran, attach_type};
use crate::{Error, REASONS_MAP};

pub(crate) const OBJECT: &str = "service";

/// The object.
pub(crate) fn bytes() -> &'static [u8] {
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/service.o"))
}

const POD: [(&str, Direction); 2] = [
    ("pod_ingress", Direction::Ingress),
    ("pod_egress", Direction::Egress),
];
const UPLINK: [(&str, Direction); 2] = [
    ("uplink_ingress", Direction::Ingress),
    ("uplink_egress", Direction::Egress),
];
const CGROUP: [(&str, u32); 8] = [
    ("connect4", attach_type::CONNECT4),
    ("connect6", attach_type::CONNECT6),
    ("getpeername4", attach_type::GETPEERNAME4),
    ("getpeername6", attach_type::GETPEERNAME6),
    ("sendmsg4", attach_type::SENDMSG4),
    ("sendmsg6", attach_type::SENDMSG6),
    ("recvmsg4", attach_type::RECVMSG4),
    ("recvmsg6", attach_type::RECVMSG6),
];

/// Where and how large.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceConfig {
    /// A directory on a bpffs.
    pub bpffs_root: PathBuf,
    /// Mount a bpffs there when there is none.
    pub mount_bpffs: bool,
    /// The cgroup v2 directory whose processes are served at connect().
    pub cgroup_root: PathBuf,
    /// Frontends, and service ids.
    pub max_services: u32,
    /// Backends.
    pub max_backends: u32,
    /// Slots over all extents.
    pub max_slots: u32,
    /// Flow records; two for each flow.
    pub max_flows: u32,
}

/// The packet programs, for test runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// What a pod sends.
    PodIngress,
    /// What reaches a pod.
    PodEgress,
    /// What comes from outside.
    UplinkIngress,
    /// What goes outside.
    UplinkEgress,
}

impl Hook {
    /// All.
    pub const ALL: [Hook; 4] = [
        Hook::PodIngress,
        Hook::PodEgress,
        Hook::UplinkIngress,
        Hook::UplinkEgress,
    ];

    /// The program's name.
    pub fn program(self) -> &'static str {
        match self {
            Hook::PodIngress => "pod_ingress",
            Hook::PodEgress => "pod_egress",
            Hook::UplinkIngress => "uplink_ingress",
            Hook::UplinkEgress => "uplink_egress",
        }
    }
}

/// The programs and maps in the kernel. Dropping it leaves everything at work: links and maps are pinned.
#[derive(Debug)]
pub struct ServiceDataplane {
    object: Object,
    maps: ServiceMaps,
    reasons: OwnedFd,
    cgroup_root: PathBuf,
    cpus: usize,
}

impl ServiceDataplane {
    /// Loads the programs; adopts the maps and links that an earlier agent of this ABI pinned, swapping each link's program.
    pub fn open(config: &ServiceConfig) -> Result<(Self, Adopted), Error> {
        let pins = Pins::open(&config.bpffs_root, OBJECT, config.mount_bpffs)?;
        let features = Features::probe()?;
        let set_retval = u32::from(features.set_retval);
        let netns = sys::netns_cookie().map_err(|source| Error::Path {
            path: PathBuf::from("/proc/self/ns/net"),
            source,
        })?;
        let globals = vec![
            ("HAS_SET_RETVAL", (&set_retval).into()),
            ("NODE_NETNS", (&netns).into()),
        ];
        let (object, adopted) = Object::load(
            OBJECT,
            bytes(),
            pins,
            &specs(config),
            globals,
            features,
            Order::Last,
        )?;
        let maps = ServiceMaps::open(&object)?;
        let reasons = object.map(REASONS_MAP)?;
        let cpus = sys::possible_cpus().map_err(|source| Error::Map {
            map: REASONS_MAP,
            operation: "count CPUs",
            source,
        })?;
        Ok((
            ServiceDataplane {
                object,
                maps,
                reasons,
                cgroup_root: config.cgroup_root.clone(),
                cpus,
            },
            adopted,
        ))
    }

    /// Removes what any agent of this ABI has pinned below `bpffs_root` and put on these interfaces: programs detach, maps are freed.
    pub fn remove(bpffs_root: &Path, interfaces: &[String]) -> Result<(), Error> {
        remove_filters(interfaces, &POD, Order::Last)?;
        remove_filters(interfaces, &UPLINK, Order::Last)?;
        Pins::remove(bpffs_root, OBJECT)
    }

    /// What this kernel lacks, with what it costs.
    pub fn missing(&self) -> Vec<Missing> {
        self.object.features().missing()
    }

    /// Serves connect() of the processes below the configured cgroup, and UDP of those in the node's network namespace.
    pub fn attach_cgroup(&mut self) -> Result<(), Error> {
        for (program, attach) in CGROUP {
            self.object
                .attach_cgroup(program, &self.cgroup_root, attach)?;
        }
        Ok(())
    }

    /// Serves a pod's packets; `interface` is the node's end of its veth pair, in the current network namespace.
    pub fn attach_pod(&mut self, interface: &str) -> Result<(), Error> {
        self.object.attach_passing(interface, &POD)
    }

    /// Serves packets from outside.
    pub fn attach_uplink(&mut self, interface: &str) -> Result<(), Error> {
        for (program, direction) in UPLINK {
            self.object
                .attach_interface(program, interface, direction)?;
        }
        Ok(())
    }

    /// Detaches from an interface, whether it is a pod's or the uplink, and whether it still exists.
    pub fn detach(&mut self, interface: &str) -> Result<(), Error> {
        self.object.detach_interface(interface, &POD)?;
        self.object.detach_interface(interface, &UPLINK)
    }

    /// The maps.
    pub fn maps(&mut self) -> &mut ServiceMaps {
        &mut self.maps
    }

    /// Packets dropped and connects refused since the maps were made, by reason.
    pub fn reasons(&self) -> Result<Vec<(Reason, u64)>, Error> {
        Reason::ALL
            .into_iter()
            .map(|reason| {
                let counts = sys::lookup_per_cpu(self.reasons.as_fd(), reason as u32, self.cpus);
                let counts = counts.map_err(|source| Error::Map {
                    map: REASONS_MAP,
                    operation: "look up",
                    source,
                })?;
                Ok((reason, counts.iter().sum()))
            })
            .collect()
    }

    /// Nanoseconds that a program has run, and how often, while [`crate::account_run_time`] was in force.
    pub fn run_time(&self, program: &str) -> Result<(u64, u64), Error> {
        sys::run_time(self.object.program(program)?).map_err(|source| Error::Path {
            path: PathBuf::from("/proc/self/fdinfo"),
            source,
        })
    }

    /// Runs a packet program on one packet (from its Ethernet header on), without an interface.
    pub fn test_run(&self, hook: Hook, packet: &[u8], repeat: u32) -> Result<Ran, Error> {
        sys::test_run(self.object.program(hook.program())?, packet, repeat).map_err(|source| {
            Error::Attach {
                program: hook.program().to_owned(),
                target: "a test run".to_owned(),
                source,
            }
        })
    }
}
