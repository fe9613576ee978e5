//! What the dataplane's own tables remember of pods that are gone, made to forget them before an address is used again.
//!
//! | state | names a pod as | what becomes of it |
//! |---|---|---|
//! | flow records of Services and host ports | backend | a record holds its backend's generation, and is a miss when that is gone |
//! | the same | client | removed here: the backend lives, and its late answers would reach the next pod as the Service's |
//! | a gateway's BIB and sessions (RFC 6146) | inner host | removed here: hosts outside would be let through to the next pod |
//! | NAT64 port blocks | – | computed; nothing is remembered |
//! | ClientIP affinity | client | stays: it names a living backend, and who asks from an address is served as that address |
//! | TCP connections by connect(), names for getpeername() | peer | are the sockets' own; another pod at the address answers with a reset |
//! | kernel connection tracking | – | kun uses none |
//!
//! A pod that has no interface any more makes no new records, so that one walk for each release is enough, for all releases since
//! the last look together and on the looking thread: a full table of the default size takes 0.14 s, unoptimised. What other nodes
//! remember of a pod as a client, of their node ports and in their gateways' tables, ends by idleness there.

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use kun_cni::ipam::Unforgotten;
use kun_cni::look::addresses;
use kun_config::types::{PodPrefix, Slot};
use kun_ebpf_abi::Addr;
use kun_ebpf_loader::FlowRecords;

use super::dataplane::Message;

/// The dataplane's thread walks a gateway's tables, 12,288 entries at most, between two changes.
const GATEWAY_WITHIN: Duration = Duration::from_secs(10);

/// The tables.
#[derive(Debug)]
pub(crate) struct Flows {
    records: FlowRecords,
    /// Where the translator is, on a node that has one.
    gateway: Option<SyncSender<Message>>,
    /// The release for which a slot's addresses were removed last.
    done: Mutex<BTreeMap<Slot, u64>>,
}

impl Flows {
    pub(crate) fn new(records: FlowRecords, gateway: Option<SyncSender<Message>>) -> Self {
        Self {
            records,
            gateway,
            done: Mutex::default(),
        }
    }

    /// Removes what names these slots' addresses, as far as it was not done for their releases yet. Nothing of theirs may be on
    /// the node any more. `all`: every slot that rests; others are not remembered.
    pub(crate) fn forget(
        &self,
        gone: &[&Unforgotten],
        all: &[Unforgotten],
        prefix: PodPrefix,
    ) -> Result<(), String> {
        let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        let resting: BTreeMap<Slot, u64> = all.iter().map(|r| (r.slot, r.sequence)).collect();
        done.retain(|slot, sequence| resting.get(slot) == Some(sequence));
        let new: Vec<&Unforgotten> = gone
            .iter()
            .copied()
            .filter(|release| !done.contains_key(&release.slot))
            .collect();
        let named: HashSet<Addr> = new
            .iter()
            .flat_map(|release| addresses(release.slot, prefix))
            .map(addr)
            .collect();
        if named.is_empty() {
            return Ok(());
        }
        let mut removed = self
            .records
            .forget(&named)
            .map_err(|error| format!("flow records cannot be looked through: {error}"))?;
        if let Some(gateway) = &self.gateway {
            removed += ask(gateway, named)?;
        }
        tracing::debug!(slots = new.len(), removed, "flows of pods that are gone");
        done.extend(new.iter().map(|release| (release.slot, release.sequence)));
        Ok(())
    }
}

fn ask(gateway: &SyncSender<Message>, addresses: HashSet<Addr>) -> Result<u64, String> {
    let (reply, wait) = sync_channel(1);
    gateway
        .send(Message::Forget { addresses, reply })
        .map_err(|_| "the agent is stopping".to_owned())?;
    wait.recv_timeout(GATEWAY_WITHIN)
        .map_err(|_| format!("the translator did not answer in {GATEWAY_WITHIN:?}"))?
}

fn addr(ip: IpAddr) -> Addr {
    match ip {
        IpAddr::V4(a) => Addr::v4(a.octets()),
        IpAddr::V6(a) => Addr::v6(a.octets()),
    }
}
