//! The agent's part in letting addresses go: it looks at the node and the cluster for whoever still knows a released one, and
//! reclaims what pods that are gone have left.
//!
//! What the cluster's part proves: a node sees its own Pods and every EndpointSlice (of a folder: every Pod). The slots of its
//! blocks are given to its own pods alone, so that no Pod seen and no slice holds an address means that the control plane sends
//! nobody there any more; a block that another node had cools anew first. It does not prove that a client who resolved the
//! address has forgotten it: for that is the cooldown. What the dataplane's own tables remember is removed (`flows`) as soon as
//! the node has nothing of the pod any more, and the slot rests until that is done.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};

use kun_cluster::Store;
use kun_cni::host_interface_names;
use kun_cni::ipam::{BootTime, ClusterLook, Look, Revision, Unforgotten};
use kun_cni::look::{self, Leak, Sight, Watch, addresses};
use kun_config::Interfaces;
use kun_config::types::{PodPrefix, SlotClass};
use kun_control::{AttachmentKey, Request, Response};

use super::answers::Answers;
use super::cluster::Between;
use super::flows::Flows;
use super::home::Home;
use super::node;

/// Lines that are kept of one address.
const MAX_HELD: usize = 8;

/// What leaks were found so far, and the dataplane's memory.
#[derive(Debug)]
pub(crate) struct Leaks {
    watch: Mutex<Watch>,
    flows: Flows,
    home: Home,
}

/// What one round did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Round {
    /// Slots and interfaces that were reclaimed.
    pub(crate) reclaimed: u64,
    /// Interfaces of pods that are gone and that are still there.
    pub(crate) not_reclaimed: u64,
    /// Of these, the ones that could not be removed: name, and why.
    pub(crate) left: Vec<String>,
}

impl Leaks {
    pub(crate) fn new(flows: Flows, home: Home) -> Self {
        Self {
            watch: Mutex::default(),
            flows,
            home,
        }
    }

    /// Why nothing that is absent here proves anything.
    pub(crate) fn trouble(&self) -> Option<String> {
        self.home.trouble()
    }

    /// Looks once, tells the address store what was seen, and reclaims what two looks agree on.
    pub(crate) fn round(&self, answers: &Answers, now: BootTime) -> Option<Round> {
        // A look begins after the question was read: it names the release that it is about.
        let released = answers
            .ipam
            .unforgotten(now)
            .inspect_err(|error| tracing::warn!(%error, "cooling addresses cannot be looked at"))
            .ok()?;
        let sight = Sight::take()
            .inspect_err(|error| tracing::warn!(%error, "this node's interfaces cannot be looked at; addresses rest until they can"))
            .ok()?;
        let prefix = answers.ipam.prefix();
        let interfaces = sight.interfaces(prefix);
        if let Err(error) = answers.ipam.believe(&interfaces, now) {
            tracing::error!(%error, "no address is given any more");
            return None;
        }
        let (live, standing) = answers
            .ipam
            .read(now, |core| look::standing(core, &interfaces))
            .inspect_err(|error| tracing::warn!(%error, "leaks cannot be looked for"))
            .ok()?;
        if !self.home.is_here(live, standing) {
            return None;
        }
        observe(answers, &released, &sight, &self.flows, now);
        let mut watch = self.watch.lock().unwrap_or_else(PoisonError::into_inner);
        let leaks = answers
            .ipam
            .read(now, |core| watch.look(core, &interfaces, now))
            .inspect_err(|error| tracing::warn!(%error, "leaks cannot be looked for"))
            .ok()?;
        let mut round = Round::default();
        for leak in leaks {
            match reclaim(answers, &leak) {
                Ok(done) => round.reclaimed += u64::from(done),
                Err(left) => round.left.push(left),
            }
        }
        round.not_reclaimed = u64::try_from(watch.suspected_interfaces()).unwrap_or(u64::MAX);
        Some(round)
    }
}

fn observe(
    answers: &Answers,
    released: &[Unforgotten],
    sight: &Sight,
    flows: &Flows,
    now: BootTime,
) {
    if released.is_empty() {
        return;
    }
    let prefix = answers.ipam.prefix();
    let known = known(released, sight, flows, prefix);
    let cluster = answers.view.whole().then(|| {
        let store = answers.view.store();
        let all = released
            .iter()
            .flat_map(|slot| addresses(slot.slot, prefix));
        let between = answers.view.between_looks(&store, all);
        (holders(&store, released, prefix), between)
    });
    let looks = released
        .iter()
        .zip(known)
        .map(|(slot, known)| Look {
            slot: slot.slot,
            sequence: slot.sequence,
            node: Some(known),
            cluster: cluster.as_ref().map(|(holders, between)| ClusterLook {
                held: held(&addresses(slot.slot, prefix), holders, between),
                revision: between.revision.map(Revision),
            }),
        })
        .collect();
    let watermark = answers.watermark.as_ref().and_then(|w| w.believed());
    if let Err(error) = answers.ipam.observe(looks, watermark, now) {
        tracing::warn!(%error, "what was seen of cooling addresses cannot be stored");
    }
}

/// What on this node knows each of these slots, one line each. What the kernel has learnt of them, and the flows of those of
/// which nothing else is left, are removed.
fn known(
    released: &[Unforgotten],
    sight: &Sight,
    flows: &Flows,
    prefix: PodPrefix,
) -> Vec<Vec<String>> {
    if let Err(error) = sight.remove_learnt(released, prefix) {
        tracing::warn!(%error, "learnt neighbours of pods that are gone stay");
    }
    let mut known: Vec<Vec<String>> = released
        .iter()
        .map(|slot| sight.knows(slot, prefix))
        .collect();
    let gone: Vec<&Unforgotten> = released
        .iter()
        .zip(&known)
        .filter_map(|(slot, known)| known.is_empty().then_some(slot))
        .collect();
    if let Err(what) = flows.forget(&gone, released, prefix) {
        known.iter_mut().for_each(|lines| lines.push(what.clone()));
    }
    known
}

/// What holds one of these addresses, or has since the last look.
fn held(
    addresses: &[IpAddr],
    holders: &HashMap<IpAddr, Vec<String>>,
    between: &Between,
) -> Vec<String> {
    let objects = addresses.iter().filter_map(|a| holders.get(a));
    let mut held: Vec<String> = objects.flatten().cloned().collect();
    let touched = addresses.iter().filter(|a| between.touched.contains(a));
    held.extend(touched.map(|a| format!("an EndpointSlice had {a} since the last look")));
    if between.listed_anew {
        held.push(
            "EndpointSlices were listed anew since the last look: what was between is not known"
                .to_owned(),
        );
    }
    held
}

/// The objects that hold one of these slots' addresses, one line each. One walk over all endpoints: 5 ms at 100,000 of them.
fn holders(
    store: &Store,
    released: &[Unforgotten],
    prefix: PodPrefix,
) -> HashMap<IpAddr, Vec<String>> {
    let mut holders: HashMap<IpAddr, Vec<String>> = released
        .iter()
        .flat_map(|slot| addresses(slot.slot, prefix))
        .map(|address| (address, Vec::new()))
        .collect();
    let mut hold = |address: &IpAddr, line: &dyn Fn() -> String| {
        if let Some(lines) = holders.get_mut(address)
            && lines.len() < MAX_HELD
        {
            lines.push(line());
        }
    };
    for slice in store.slices() {
        for endpoint in &slice.endpoints {
            hold(&endpoint.address, &|| {
                format!("EndpointSlice {} has {}", slice.meta.name, endpoint.address)
            });
        }
    }
    for pod in store.pods() {
        for address in pod.own_ips() {
            hold(address, &|| format!("Pod {} has {address}", pod.meta.name));
        }
    }
    holders.retain(|_, lines| !lines.is_empty());
    holders
}

/// Whether something was reclaimed; an error is an interface that stays, and why.
fn reclaim(answers: &Answers, leak: &Leak) -> Result<bool, String> {
    match leak {
        Leak::Slot {
            slot,
            generation,
            key,
        } => {
            let key = AttachmentKey {
                network: key.network.clone(),
                container_id: key.container_id.clone(),
                ifname: key.ifname.clone(),
            };
            // An ADD that took that long may have made them since the look, which may have waited for the dataplane.
            let names = host_interface_names(&key, SlotClass::Dual, Interfaces::Split);
            if names
                .iter()
                .any(|name| node::interface_index(name).is_some())
            {
                return Ok(false);
            }
            let container = key.container_id.clone();
            let release = Request::Release {
                key,
                generation: Some(*generation),
            };
            let done = answers.answer(&release) == Response::Done;
            tracing::info!(%slot, generation, container, done, "a slot whose pod has no interface any more is let go");
            Ok(done)
        }
        Leak::Interface {
            index,
            name,
            generation,
            key,
        } => match look::reclaim(*index, name, key, *generation) {
            Ok(()) => {
                tracing::info!(
                    interface = name,
                    generation,
                    container = key.container_id,
                    "an interface of a pod that is gone is removed"
                );
                Ok(true)
            }
            Err(error) => {
                tracing::warn!(interface = name, %error, "the interface of a pod that is gone stays");
                Err(format!("{name}: {error}"))
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use kun_cluster::folder::parse_manifest;
    use kun_cluster::{Delta, Store};
    use kun_config::types::Slot;

    use super::*;

    /// Slots 10.64.0.1 to 10.64.0.6.
    const OBJECTS: &str = "
apiVersion: v1
kind: Pod
metadata: {name: lives, namespace: shop}
status: {phase: Running, podIPs: [{ip: 'fd00:64::a40:1'}, {ip: 10.64.0.1}]}
---
apiVersion: v1
kind: Pod
metadata: {name: ended, namespace: shop}
status: {phase: Succeeded, podIPs: [{ip: 'fd00:64::a40:2'}, {ip: 10.64.0.2}]}
---
apiVersion: v1
kind: Pod
metadata: {name: of-the-node, namespace: shop}
spec: {hostNetwork: true}
status: {phase: Running, podIPs: [{ip: 10.64.0.3}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: four, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: '', port: 80}]
endpoints: [{addresses: [10.64.0.4], conditions: {ready: false}}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: six, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv6
ports: [{name: '', port: 80}]
endpoints: [{addresses: ['fd00:64::a40:5']}]
";

    fn prefix() -> PodPrefix {
        PodPrefix::new("fd00:64::/96".parse().unwrap()).unwrap()
    }

    fn released(last: u8) -> Unforgotten {
        Unforgotten {
            slot: Slot::from(std::net::Ipv4Addr::new(10, 64, 0, last)),
            sequence: u64::from(last),
            generation: 1,
            key: None,
        }
    }

    /// What is said of each of these slots.
    fn said(between: &Between) -> Vec<Vec<String>> {
        let mut store = Store::default();
        for object in parse_manifest("objects.yaml", OBJECTS).unwrap().objects {
            store.apply(Delta::Upsert(object));
        }
        let all: Vec<Unforgotten> = (1..=6).map(released).collect();
        let holders = holders(&store, &all, prefix());
        all.iter()
            .map(|slot| held(&addresses(slot.slot, prefix()), &holders, between))
            .collect()
    }

    #[test]
    fn pods_and_slices_hold_their_addresses_in_either_family() {
        let lines = said(&Between::default());
        let expected: [&[&str]; 6] = [
            &[
                "Pod shop/lives has fd00:64::a40:1",
                "Pod shop/lives has 10.64.0.1",
            ],
            &[],
            &[],
            &["EndpointSlice shop/four has 10.64.0.4"],
            &["EndpointSlice shop/six has fd00:64::a40:5"],
            &[],
        ];
        assert_eq!(lines, expected);
    }

    #[test]
    fn what_was_so_between_two_looks_holds_too() {
        let touched = Between {
            touched: HashSet::from([IpAddr::from([10, 64, 0, 6])]),
            ..Between::default()
        };
        let lines = said(&touched);
        assert_eq!(
            lines[5],
            ["an EndpointSlice had 10.64.0.6 since the last look"]
        );
        assert!(lines[1].is_empty());
        let anew = Between {
            listed_anew: true,
            ..Between::default()
        };
        assert!(said(&anew).iter().all(|lines| !lines.is_empty()));
    }
}
