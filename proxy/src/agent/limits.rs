//! Pods' bandwidth limits in force: buckets by attachment, programs on the interfaces of those that have one.
//!
//! What reaches a pod waits in its interface's queue where the kernel has `fq`; what a pod sends never does, for it comes from the
//! pod's own end, whose queue is the pod's.

use std::collections::BTreeMap;

use kun_config::Config;
use kun_control::{AttachmentKey, Bandwidth, Fact, RateLimit};
use kun_ebpf_abi::bandwidth::{Limits, Terms};
use kun_ebpf_loader::{BUCKETS, BandwidthDataplane, Error};
use kun_proxy_core::{Buckets, LimitOp, PodLimits};

use super::dataplane::fact;
use super::{links, node};

/// Pods that status names one by one: those that lose most.
const NAMED: usize = 8;

/// What a bucket has dropped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Dropped {
    /// Namespace and name.
    pub(crate) pod: String,
    /// `ingress` or `egress`, as the pod's annotations say it.
    pub(crate) direction: &'static str,
    /// Packets; a super-packet is one.
    pub(crate) packets: u64,
    /// Bytes on the wire.
    pub(crate) bytes: u64,
}

#[derive(Debug)]
struct Owner {
    pod: String,
    interfaces: Vec<String>,
    bandwidth: Bandwidth,
}

/// The limits of this node's pods.
pub(crate) struct Limiter {
    dataplane: BandwidthDataplane,
    buckets: Buckets<AttachmentKey>,
    owners: BTreeMap<AttachmentKey, Owner>,
}

impl Limiter {
    /// Takes over what an earlier agent limited, until [`Limiter::settle`].
    pub(crate) fn open(config: &Config) -> Result<Self, Error> {
        let (dataplane, _) = BandwidthDataplane::open(&config.agent.bpffs_root, false)?;
        let buckets = Buckets::adopt(dataplane.limited()?, BUCKETS);
        Ok(Self {
            dataplane,
            buckets,
            owners: BTreeMap::new(),
        })
    }

    /// Detaches and frees what any agent pinned there, and put on these interfaces.
    pub(crate) fn remove_all(config: &Config, interfaces: &[String]) -> Result<(), Error> {
        BandwidthDataplane::remove(&config.agent.bpffs_root, interfaces)
    }

    /// Holds a pod to its limits, on those of its interfaces that there are. None: as [`Limiter::remove`].
    pub(crate) fn put(
        &mut self,
        key: &AttachmentKey,
        pod: &str,
        interfaces: &[String],
        bandwidth: &Bandwidth,
    ) -> Result<(), String> {
        if bandwidth.is_unlimited() {
            self.remove(key);
            return Ok(());
        }
        let indexes: Vec<u32> = (interfaces.iter())
            .filter_map(|name| node::interface_index(name))
            .collect();
        let mut paced = bandwidth.ingress.is_some();
        for index in indexes.iter().filter(|_| bandwidth.ingress.is_some()) {
            paced &= links::pace(*index).map_err(|e| format!("queue of {pod}: {e}"))?;
        }
        let terms = |limit: RateLimit, paced| {
            Terms::new(limit.rate.get(), limit.burst.map(|b| b.get()), paced)
        };
        let want = PodLimits {
            interfaces: indexes,
            sends: bandwidth.egress.map(|limit| terms(limit, false)),
            receives: bandwidth.ingress.map(|limit| terms(limit, paced)),
        };
        let ops = self
            .buckets
            .put(key.clone(), &want)
            .map_err(|e| e.to_string())?;
        self.apply(&ops).map_err(|e| e.to_string())?;
        // The entry is there before the program: its first packet is held already.
        for name in interfaces {
            if node::interface_index(name).is_some() {
                self.dataplane.attach(name).map_err(|e| e.to_string())?;
            }
        }
        let owner = Owner {
            pod: pod.to_owned(),
            interfaces: interfaces.to_vec(),
            bandwidth: *bandwidth,
        };
        self.owners.insert(key.clone(), owner);
        Ok(())
    }

    /// Puts the programs back on an interface that lost them, if it is limited.
    pub(crate) fn attach_again(&mut self, interface: &str) -> Result<(), String> {
        match self.limits(interface) {
            true => self.dataplane.attach(interface).map_err(|e| e.to_string()),
            false => Ok(()),
        }
    }

    /// Whether an interface is limited.
    pub(crate) fn limits(&self, interface: &str) -> bool {
        (self.owners.values()).any(|o| o.interfaces.iter().any(|i| i == interface))
    }

    /// The attachment is gone.
    pub(crate) fn remove(&mut self, key: &AttachmentKey) {
        let ops = self.buckets.remove(key);
        if let Err(error) = self.apply(&ops) {
            tracing::warn!(%error, "a limit of a pod that is gone stays until the next start");
        }
        for name in self.owners.remove(key).iter().flat_map(|o| &o.interfaces) {
            if let Err(error) = self.dataplane.detach(name) {
                tracing::warn!(interface = name, %error, "cannot detach");
            }
        }
    }

    /// Every live attachment has been put: what else an earlier agent limited is free.
    pub(crate) fn settle(&mut self) -> Result<(), Error> {
        let ops = self.buckets.settle();
        self.apply(&ops)
    }

    fn apply(&mut self, ops: &[LimitOp]) -> Result<(), Error> {
        for op in ops {
            match op {
                LimitOp::Fill { bucket, terms } => self.dataplane.fill(*bucket, terms)?,
                LimitOp::Set { bucket, terms } => self.dataplane.set(*bucket, terms)?,
                LimitOp::Limit { interface, limits } => {
                    self.dataplane.limit(*interface, limits)?;
                }
                LimitOp::Unlimit { interface } => drop(self.dataplane.unlimit(*interface)?),
            }
        }
        Ok(())
    }

    /// What an attachment's limits lack in the kernel, one line each.
    pub(crate) fn missing(
        &self,
        key: &AttachmentKey,
        interfaces: &[String],
        bandwidth: &Bandwidth,
    ) -> Vec<String> {
        if bandwidth.is_unlimited() {
            return Vec::new();
        }
        if self.owners.get(key).map(|o| o.bandwidth) != Some(*bandwidth) {
            return vec!["the bandwidth limits are not those of ADD".into()];
        }
        let limited: BTreeMap<u32, Limits> = match self.dataplane.limited() {
            Ok(limited) => limited.into_iter().collect(),
            Err(e) => return vec![e.to_string()],
        };
        (interfaces.iter())
            .filter(|name| node::interface_index(name).is_none_or(|i| !limited.contains_key(&i)))
            .map(|name| format!("{name} has no bandwidth limit"))
            .collect()
    }

    /// What each bucket has dropped since its pod came.
    pub(crate) fn dropped(&self) -> Vec<Dropped> {
        let keys = self.owners.keys();
        keys.flat_map(|key| self.dropped_of(key)).collect()
    }

    /// The same of one attachment.
    pub(crate) fn dropped_of(&self, key: &AttachmentKey) -> Vec<Dropped> {
        let (Some(owner), Some((sends, receives))) = (self.owners.get(key), self.buckets.of(key))
        else {
            return Vec::new();
        };
        let mut all = Vec::new();
        for (direction, bucket) in [("ingress", receives), ("egress", sends)] {
            if let Some(Ok(bucket)) = bucket.map(|number| self.dataplane.bucket(number)) {
                all.push(Dropped {
                    pod: owner.pod.clone(),
                    direction,
                    packets: bucket.dropped_packets,
                    bytes: bucket.dropped_bytes,
                });
            }
        }
        all
    }

    /// For status.
    pub(crate) fn facts(&self) -> Vec<Fact> {
        if self.owners.is_empty() {
            return Vec::new();
        }
        let mut dropped = self.dropped();
        let bytes: u64 = dropped.iter().map(|d| d.bytes).sum();
        let total = format!("of {} pods, {bytes} bytes dropped", self.owners.len());
        let mut facts = vec![fact("limits", total, true)];
        dropped.retain(|d| d.packets > 0);
        dropped.sort_by_key(|d| std::cmp::Reverse(d.bytes));
        facts.extend(dropped.iter().take(NAMED).map(|d| {
            fact(
                &format!("limit {} {}", d.pod, d.direction),
                format!("{} packets, {} bytes dropped", d.packets, d.bytes),
                true,
            )
        }));
        facts
    }
}
