//! The eBPF maps as a [`Backend`]: ops applied, everything read back for adoption; programs attached and flows expired besides.

use std::collections::HashSet;
use std::path::Path;
use std::time::Duration;

use kun_config::Config;
use kun_ebpf_abi::reason::Reason;
use kun_ebpf_abi::service::View;
use kun_ebpf_abi::service::packet::UDP;
use kun_ebpf_loader::{
    Adopted, Error, Expired, FlowRecords, Missing, PeerWay, ServiceConfig, ServiceDataplane,
};
use kun_proxy_core::{Backend, Limits, Observed, Op, PLANNED_VIEWS};

/// f_type of a bpffs (linux/magic.h).
const BPF_FS_MAGIC: rustix::fs::FsWord = 0xcafe_4a11;

/// The maps and programs of the service dataplane. Dropping it leaves them at work.
#[derive(Debug)]
pub struct EbpfBackend {
    dataplane: ServiceDataplane,
}

impl EbpfBackend {
    /// Loads the programs, or adopts what an earlier agent pinned.
    pub fn open(config: &Config) -> Result<(Self, Adopted), Error> {
        make_directory(&config.agent.bpffs_root);
        let proxy = &config.proxy;
        let (dataplane, adopted) = ServiceDataplane::open(&ServiceConfig {
            bpffs_root: config.agent.bpffs_root.clone(),
            mount_bpffs: false,
            cgroup_root: proxy.cgroup_root.clone(),
            max_services: proxy.max_services,
            max_backends: proxy.max_backends,
            max_slots: proxy.max_slots,
            max_flows: proxy.max_flows,
        })?;
        Ok((Self { dataplane }, adopted))
    }

    /// Detaches and frees what any agent pinned there, and put on these interfaces.
    pub fn remove(config: &Config, interfaces: &[String]) -> Result<(), Error> {
        ServiceDataplane::remove(&config.agent.bpffs_root, interfaces)
    }

    /// The maps' real sizes: adopted ones keep those that they were made with.
    pub fn limits(&mut self) -> Limits {
        let capacities = self.dataplane.maps().capacities();
        Limits {
            services: capacities.services,
            backends: capacities.backends,
            slots: capacities.slots,
        }
    }

    /// What this kernel lacks, with what it costs.
    pub fn missing(&self) -> Vec<Missing> {
        self.dataplane.missing()
    }

    /// Serves connect() of the processes below the configured cgroup.
    pub fn attach_cgroup(&mut self) -> Result<(), Error> {
        self.dataplane.attach_cgroup()
    }

    /// Serves the packets of a pod, by its host interface.
    pub fn attach_pod(&mut self, interface: &str) -> Result<(), Error> {
        self.dataplane.attach_pod(interface)
    }

    /// Serves packets from outside.
    pub fn attach_uplink(&mut self, interface: &str) -> Result<(), Error> {
        self.dataplane.attach_uplink(interface)
    }

    /// Takes the programs off an interface, whether it still exists or not.
    pub fn detach(&mut self, interface: &str) -> Result<(), Error> {
        self.dataplane.detach(interface)
    }

    /// Packets dropped and connects refused since the maps were made.
    pub fn reasons(&self) -> Result<Vec<(Reason, u64)>, Error> {
        self.dataplane.reasons()
    }

    /// The flow records, for a thread of its own.
    pub fn flow_records(&mut self) -> Result<FlowRecords, Error> {
        self.dataplane.maps().flow_records()
    }

    /// Where the connect program led the socket of this cookie.
    pub fn peer(&mut self, socket: u64) -> Result<Option<PeerWay>, Error> {
        self.dataplane.maps().peer(socket)
    }

    /// Those of these ways of UDP of which the frontend's service has no such backend any more.
    pub fn gone(&mut self, ways: HashSet<PeerWay>) -> Result<HashSet<PeerWay>, Error> {
        self.dataplane.maps().gone(ways, UDP)
    }

    /// Removes idle flows. `now`: CLOCK_BOOTTIME.
    pub fn expire_flows(&mut self, now: Duration, udp_idle: Duration) -> Result<Expired, Error> {
        let now = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        self.dataplane.maps().expire_flows(now, udp_idle)
    }
}

/// Makes the directory of our pins, if that is on a bpffs. Elsewhere nothing is left behind, and the loader says what is wrong.
fn make_directory(path: &Path) {
    let exists = path.ancestors().find(|p| p.exists());
    let on_bpffs = exists
        .and_then(|p| rustix::fs::statfs(p).ok())
        .is_some_and(|s| s.f_type == BPF_FS_MAGIC);
    if on_bpffs && let Err(error) = std::fs::create_dir_all(path) {
        tracing::warn!(path = %path.display(), %error, "cannot be made");
    }
}

impl Backend for EbpfBackend {
    type Error = Error;

    fn apply(&mut self, op: &Op) -> Result<(), Error> {
        let maps = self.dataplane.maps();
        match op {
            Op::Backend { id, record } => maps.write_backend(*id, record),
            Op::Slots { base, ids } => maps.write_slots(*base, ids),
            Op::Publish {
                service,
                view,
                value,
            } => maps.publish(*service, *view, *value),
            Op::Frontend { key, value } => maps.upsert_service(key, value),
            Op::RemoveFrontend { key } => maps.remove_service(key).map(|_| ()),
            Op::Grace => maps.grace(),
        }
    }

    fn observe(&mut self) -> Result<Observed, Error> {
        let maps = self.dataplane.maps();
        // An earlier agent may have died before its grace period.
        maps.grace()?;
        let mut observed = Observed {
            services: maps.services()?.into_iter().collect(),
            ..Observed::default()
        };
        let capacities = maps.capacities();
        for service in 0..capacities.services {
            for kind in PLANNED_VIEWS {
                let view = maps.view(service, kind)?;
                if view == View::default() {
                    continue;
                }
                let at = (service, kind as u32);
                observed.views.insert(at, view);
                if view.count > 0 {
                    observed
                        .slots
                        .insert(at, maps.slots(view.base, view.count)?);
                }
            }
        }
        for id in 0..capacities.backends {
            let record = maps.backend(id)?;
            if record.generation != 0 {
                observed.backends.insert(id, record);
            }
        }
        Ok(observed)
    }
}
