//! The node's IPAM service: one core over one durable store, for the agent (many threads, one flush for all that wait) and for
//! the plugin alone (one request, then the store is closed again).
//!
//! No reply is told before it is durable. When a commit fails, the state in memory is thrown away and read again from the
//! store before the next request.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use kun_cni_core::ipam::{
    Choice, Command, Effect, Ipam, Key, Needs, Owner, Pod, Reply, Rules, Unavailable,
};
use kun_cni_core::leaks::Interface;
use kun_config::types::{BlockId, PodPrefix, Slot, SlotClass};
use kun_config::{ClusterSource, Config};
use kun_control::{Allocation, AttachmentKey, Exhausted, Holder, PodRef, Request, Response};

use crate::lost::{not_lost, not_older, tagged};
use crate::rows;
use crate::spool::Spool;
use crate::store::{FILE, Store, StoreError};

pub use kun_cni_core::ipam::{
    BootId, BootTime, Claim, ClusterLook, Look, Revision, Standing, Unforgotten, Watermark,
};

/// How long a starting agent waits for plugins that have the store open: each holds it for milliseconds.
pub const OPEN_WITHIN: Duration = Duration::from_secs(10);

/// Requests that may wait for a commit. The node's densest burst is 2,500 pods; beyond this the caller is told to come again.
const MAX_WAITING: usize = 8192;

/// Longest part of a key: container ids have 64 signs, pod names and namespaces at most 253.
const MAX_PART: usize = 256;

/// Why the service did not open, or does not answer.
#[derive(Debug, thiserror::Error)]
pub enum IpamError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// More blocks than a node may have.
    #[error(
        "{blocks} blocks are more than one node may have ({}); give it larger pools of fewer",
        kun_cni_core::ipam::MAX_BLOCKS
    )]
    TooManyBlocks {
        /// How many there were.
        blocks: usize,
    },
    /// Too many callers at once.
    #[error("{MAX_WAITING} requests wait for the store already; try again")]
    Overloaded,
}

/// The service. Share it by reference: every method takes `&self`.
#[derive(Debug)]
pub struct IpamService {
    prefix: PodPrefix,
    default_class: SlotClass,
    pools: rows::Pools,
    rules: Rules,
    boot: BootId,
    state_dir: PathBuf,
    spool: Spool,
    open: Mutex<Option<Open>>,
    /// The store is an older copy: so it stays for as long as this process lives.
    older: OnceLock<String>,
    queue: Mutex<Queue>,
    answered: Condvar,
}

/// The store and the state that it holds.
#[derive(Debug)]
struct Open {
    store: Store,
    core: Ipam,
    /// What a new boot means: part of the next commit. Nothing is told before it, and after a crash it is found out again.
    owed: Vec<Effect>,
}

/// Releases out of the spool that were stepped.
#[derive(Debug, Default)]
struct Drained {
    effects: Vec<Effect>,
    paths: Vec<PathBuf>,
}

#[derive(Debug, Default)]
struct Queue {
    next: u64,
    waiting: Vec<(u64, Command, BootTime)>,
    replies: BTreeMap<u64, Result<Reply, String>>,
    /// One of the callers commits for all that waited when it began.
    led: bool,
}

impl IpamService {
    /// Opens the store in this directory, applies what a new boot means, and drains the spool. Fails when the store is damaged
    /// or another process keeps it for longer than [`OPEN_WITHIN`].
    pub fn open(
        state_dir: &Path,
        config: &Config,
        boot: BootId,
        now: BootTime,
    ) -> Result<Self, IpamError> {
        Self::open_within(state_dir, config, boot, now, OPEN_WITHIN)
    }

    /// [`IpamService::open`] with another patience.
    pub fn open_within(
        state_dir: &Path,
        config: &Config,
        boot: BootId,
        now: BootTime,
        wait: Duration,
    ) -> Result<Self, IpamError> {
        let ipam = &config.ipam;
        let service = Self {
            prefix: ipam.pod_prefix,
            default_class: ipam.default_class,
            pools: rows::Pools::of(ipam),
            rules: Rules::new(ipam.cooldown, ipam.quarantine_after, needs(&config.cluster)),
            boot,
            state_dir: state_dir.to_owned(),
            spool: Spool::new(state_dir),
            open: Mutex::new(None),
            older: OnceLock::new(),
            queue: Mutex::new(Queue::default()),
            answered: Condvar::new(),
        };
        let mut open = service.open_store(now, wait)?;
        let released = service.step_spool(&mut open, now);
        service.finish(&mut open, Vec::new(), &released)?;
        *service.lock_open() = Some(open);
        Ok(service)
    }

    /// Answers `Allocate`, `Class`, `Attached`, `Verify`, `Release`, `Lookup`, `Capacity` and `Ipam`, durably where something changed; blocks for one flush.
    /// `Attached` and `Verify` are only acknowledged: programs and routes are the agent's.
    pub fn handle(&self, request: &Request, now: BootTime) -> Response {
        match request {
            Request::Allocate {
                key,
                pod,
                class,
                slot,
                within,
                delegated,
                // For the agent to see, before it asks.
                ports: _,
            } => {
                if let Some(refused) = refuse(key, pod) {
                    return refused;
                }
                let owner = Owner {
                    key: core_key(key),
                    pod: Pod {
                        namespace: pod.namespace.clone(),
                        name: pod.name.clone(),
                        uid: pod.uid.clone(),
                    },
                    delegated: *delegated,
                };
                let class = class.unwrap_or(self.default_class);
                let command = match (slot, within.as_slice()) {
                    (Some(slot), _) => Command::AllocateOf {
                        owner,
                        choice: Choice::Slot(*slot),
                    },
                    (None, []) => Command::Allocate { owner, class },
                    (None, ranges) => Command::AllocateOf {
                        owner,
                        choice: Choice::Within {
                            class,
                            ranges: ranges.iter().map(|r| (r.first, r.last)).collect(),
                        },
                    },
                };
                self.respond(command, now)
            }
            Request::Release { key, generation } => {
                let key = core_key(key);
                let generation = *generation;
                self.respond(Command::Release { key, generation }, now)
            }
            Request::Attached { .. } | Request::Verify { .. } => Response::Done,
            Request::Class { .. } => Response::Class {
                class: self.default_class,
            },
            Request::Capacity { class } => {
                match self.counts(class.unwrap_or(self.default_class), now) {
                    Ok((allocated, cooling, free)) => Response::Capacity {
                        allocated,
                        cooling,
                        free,
                    },
                    Err(e) => failed(e),
                }
            }
            Request::Lookup { key } => match self.read(now, |core| core.lookup(&core_key(key))) {
                Ok(Some(found)) => Response::Allocation {
                    allocation: self.allocation(&found),
                },
                Ok(None) => Response::Unknown,
                Err(e) => failed(e),
            },
            Request::Ipam => {
                match self.read(now, |core| rows::all(core, self.prefix, &self.pools, now)) {
                    Ok((slots, blocks, pools)) => Response::Ipam {
                        slots,
                        blocks,
                        pools,
                    },
                    Err(e) => failed(e),
                }
            }
            // Whether an interface still carries the address is for the agent to see, before it asks.
            Request::Free {
                slot, generation, ..
            } => self.free(*slot, *generation, now),
            Request::Status | Request::Why { .. } => Response::Failed {
                message: "the address service answers only for addresses; ask the node agent"
                    .into(),
            },
        }
    }

    /// The blocks that this node owns from now on; durable, so that the plugin alone knows them too.
    pub fn set_blocks(&self, blocks: &[BlockId], now: BootTime) -> Result<(), IpamError> {
        let wanted: BTreeSet<BlockId> = blocks.iter().copied().collect();
        let count = wanted.len();
        match self.submit(Command::SetBlocks(wanted), now) {
            Ok(Reply::TooManyBlocks) => Err(IpamError::TooManyBlocks { blocks: count }),
            Ok(_) => Ok(()),
            Err(what) => Err(self.store_io(what)),
        }
    }

    /// The same, with how the node stands to each block.
    pub fn set_claims(
        &self,
        claims: &BTreeMap<BlockId, Claim>,
        now: BootTime,
    ) -> Result<(), IpamError> {
        match self.submit(Command::SetClaims(claims.clone()), now) {
            Ok(Reply::TooManyBlocks) => Err(IpamError::TooManyBlocks {
                blocks: claims.len(),
            }),
            Ok(_) => Ok(()),
            Err(what) => Err(self.store_io(what)),
        }
    }

    /// Lets cooled slots become free in the store too; call it every few seconds, so that a reboot does not cool them again.
    pub fn tick(&self, now: BootTime) -> Result<(), IpamError> {
        self.submit(Command::Tick, now)
            .map(|_| ())
            .map_err(|what| self.store_io(what))
    }

    /// Every live allocation.
    pub fn live(&self, now: BootTime) -> Result<Vec<Allocation>, IpamError> {
        self.read(now, |core| core.live().collect::<Vec<_>>())
            .map(|live| live.iter().map(|a| self.allocation(a)).collect())
    }

    /// The blocks that are ours.
    pub fn blocks(&self, now: BootTime) -> Result<Vec<BlockId>, IpamError> {
        self.read(now, |core| core.owned().collect())
    }

    /// Every block that is or was ours: how we stand to it, and how many of its slots pods have and how many are not free yet.
    pub fn standings(
        &self,
        now: BootTime,
    ) -> Result<BTreeMap<BlockId, (Claim, u32, u32)>, IpamError> {
        self.read(now, |core| {
            let with = |(block, claim)| {
                let (allocated, cooling) = core.in_use(block);
                (block, (claim, allocated, cooling))
            };
            core.claims().map(with).collect()
        })
    }

    /// Slots of the class: allocated, cooling, free.
    pub fn counts(&self, class: SlotClass, now: BootTime) -> Result<(u32, u32, u32), IpamError> {
        self.read(now, |core| core.counts(class))
    }

    /// Lets a slot go by hand; the caller has made sure that nothing uses it.
    pub fn free(&self, slot: Slot, generation: u64, now: BootTime) -> Response {
        self.respond(Command::Free { slot, generation }, now)
    }

    /// Which evidence this node asks for before an address is used again.
    pub fn needs(&self) -> Needs {
        self.rules.needs
    }

    /// The slots to look at, with what a look must name. Empty where time decides alone.
    pub fn unforgotten(&self, now: BootTime) -> Result<Vec<Unforgotten>, IpamError> {
        if self.rules.needs == Needs::NONE {
            return Ok(Vec::new());
        }
        self.read(now, |core| core.unforgotten().collect())
    }

    /// Tells what was seen of slots since [`IpamService::unforgotten`] named them.
    pub fn observe(
        &self,
        looks: Vec<Look>,
        watermark: Option<Watermark>,
        now: BootTime,
    ) -> Result<(), IpamError> {
        self.submit(Command::Observe { looks, watermark }, now)
            .map(|_| ())
            .map_err(|what| self.store_io(what))
    }

    /// Fails, and so does everything from then on, when one of these interfaces, which were seen before this call, tells that the store is
    /// an older copy of itself.
    pub fn believe(&self, interfaces: &[Interface], now: BootTime) -> Result<(), IpamError> {
        let path = self.state_dir.join(FILE);
        let believed = self.read(now, |core| not_older(&path, core, interfaces))?;
        if let Err(StoreError::Older { evidence, .. }) = &believed {
            self.older.get_or_init(|| evidence.clone());
            *self.lock_open() = None;
        }
        Ok(believed?)
    }

    /// [`IpamService::believe`] by all interfaces of this network namespace.
    pub fn believe_all(&self, now: BootTime) -> Result<(), IpamError> {
        let interfaces = tagged(&self.state_dir.join(FILE))?;
        self.believe(&interfaces, now)
    }

    /// Looks at the state as it is; for what the methods above do not say.
    pub fn read<T>(&self, now: BootTime, look: impl FnOnce(&Ipam) -> T) -> Result<T, IpamError> {
        let mut guard = self.lock_open();
        if guard.is_none() {
            *guard = Some(self.open_store(now, Duration::ZERO)?);
        }
        let open = guard.as_ref().expect("it was opened just now");
        Ok(look(&open.core))
    }

    /// The /96 over all pods.
    pub fn prefix(&self) -> PodPrefix {
        self.prefix
    }

    fn respond(&self, command: Command, now: BootTime) -> Response {
        match self.submit(command, now) {
            Ok(Reply::Allocated(allocation)) => Response::Allocation {
                allocation: self.allocation(&allocation),
            },
            Ok(Reply::Exhausted {
                class,
                retry_after,
                census,
                holders,
            }) => Response::Exhausted {
                exhausted: Exhausted {
                    class,
                    retry_after_secs: retry_after.map(round_up),
                    allocated: census.allocated,
                    cooling: census.cooling,
                    waiting: census.waiting,
                    quarantined: census.quarantined,
                    holders: holders
                        .into_iter()
                        .map(|(name, slots)| Holder { name, slots })
                        .collect(),
                    more: None,
                },
            },
            Ok(Reply::Elsewhere { class, blocks }) => Response::Elsewhere { class, blocks },
            Ok(Reply::Changed { generation }) => Response::Failed {
                message: format!(
                    "the slot has generation {generation} by now: look again before you free it"
                ),
            },
            Ok(Reply::Unavailable { slot, because }) => Response::Unavailable {
                slot,
                because: match because {
                    Unavailable::NotOurs => kun_control::Unavailable::NotOurs,
                    Unavailable::Allocated(owner) => kun_control::Unavailable::Allocated {
                        key: control_key(&owner.key),
                        pod: control_pod(&owner.pod),
                    },
                    Unavailable::Cooling(left) => kun_control::Unavailable::Cooling {
                        free_in_secs: Some(round_up(left)),
                    },
                    Unavailable::Known => kun_control::Unavailable::Cooling { free_in_secs: None },
                    Unavailable::HasAnother(slot) => kun_control::Unavailable::HasAnother { slot },
                },
            },
            Ok(
                Reply::Released(_) | Reply::NothingToRelease | Reply::Done | Reply::TooManyBlocks,
            ) => Response::Done,
            Err(message) => Response::Failed { message },
        }
    }

    /// Queues the command; whoever finds nobody leading commits for all that wait. A caller waits for at most two flushes.
    fn submit(&self, command: Command, now: BootTime) -> Result<Reply, String> {
        let mut queue = self.lock_queue();
        if queue.waiting.len() >= MAX_WAITING {
            return Err(IpamError::Overloaded.to_string());
        }
        let ticket = queue.next;
        queue.next += 1;
        queue.waiting.push((ticket, command, now));
        loop {
            if let Some(reply) = queue.replies.remove(&ticket) {
                return reply;
            }
            if queue.led {
                queue = self
                    .answered
                    .wait(queue)
                    .unwrap_or_else(std::sync::PoisonError::into_inner);
                continue;
            }
            queue.led = true;
            let batch = std::mem::take(&mut queue.waiting);
            drop(queue);
            let leads = Leads(self, batch.iter().map(|(ticket, ..)| *ticket).collect());
            let replies = self.commit(batch);
            leads.answer(replies);
            queue = self.lock_queue();
        }
    }

    /// Steps the whole batch, makes all effects durable in one transaction, and only then hands out the replies.
    fn commit(&self, batch: Vec<(u64, Command, BootTime)>) -> Vec<(u64, Result<Reply, String>)> {
        let tickets: Vec<u64> = batch.iter().map(|(ticket, ..)| *ticket).collect();
        let mut guard = self.lock_open();
        let outcome = match guard.take() {
            Some(open) => Ok(open),
            None => match batch.first() {
                Some((_, _, now)) => self.open_store(*now, Duration::ZERO),
                None => return Vec::new(),
            },
        }
        .and_then(|mut open| {
            let released = match batch.first() {
                Some((_, _, now)) => self.step_spool(&mut open, *now),
                None => Drained::default(),
            };
            let mut effects = Vec::new();
            let mut replies = Vec::with_capacity(batch.len());
            for (_, command, now) in batch {
                let step = open.core.step(command, now);
                effects.extend(step.effects);
                replies.push(step.reply);
            }
            self.finish(&mut open, effects, &released)?;
            Ok((open, replies))
        });
        match outcome {
            Ok((open, replies)) => {
                *guard = Some(open);
                tickets
                    .into_iter()
                    .zip(replies.into_iter().map(Ok))
                    .collect()
            }
            // `open` was dropped with the error: memory may be ahead of the store.
            Err(e) => {
                let message = e.to_string();
                tickets
                    .into_iter()
                    .map(|ticket| (ticket, Err(message.clone())))
                    .collect()
            }
        }
    }

    fn open_store(&self, now: BootTime, wait: Duration) -> Result<Open, IpamError> {
        let path = self.state_dir.join(FILE);
        if let Some(evidence) = self.older.get().cloned() {
            return Err(StoreError::Older { path, evidence }.into());
        }
        not_lost(&path, &self.spool, self.prefix)?;
        let store = Store::open(&self.state_dir, wait)?;
        let (core, owed) =
            Ipam::load(store.load()?, self.rules, self.boot, now).map_err(|e| store.damaged(e))?;
        Ok(Open { store, core, owed })
    }

    /// Steps the waiting releases, before anything else is allocated: an entry that knows no generation must never meet a newer
    /// allocation of its key.
    fn step_spool(&self, open: &mut Open, now: BootTime) -> Drained {
        let mut drained = Drained::default();
        for (path, entry) in self.spool.entries() {
            let command = Command::Release {
                key: entry.key,
                generation: entry.generation,
            };
            drained.effects.extend(open.core.step(command, now).effects);
            drained.paths.push(path);
        }
        drained
    }

    /// Everything that is owed, in one transaction; then the spool's entries go, durably, before anybody hears of anything.
    fn finish(
        &self,
        open: &mut Open,
        effects: Vec<Effect>,
        drained: &Drained,
    ) -> Result<(), IpamError> {
        let mut all = open.owed.clone();
        all.extend(drained.effects.iter().cloned());
        all.extend(effects);
        open.store.commit(&all)?;
        open.owed.clear();
        if drained.paths.is_empty() {
            return Ok(());
        }
        self.spool.remove(&drained.paths).map_err(|e| {
            IpamError::Store(StoreError::Io {
                path: self.state_dir.join(crate::spool::DIRECTORY),
                what: e.to_string(),
            })
        })
    }

    fn allocation(&self, a: &kun_cni_core::ipam::Allocation) -> Allocation {
        Allocation {
            key: control_key(&a.owner.key),
            slot: a.slot,
            generation: a.generation,
            v6: self.prefix.address(a.slot),
            v4: a.slot.v4(),
            pod: control_pod(&a.owner.pod),
            delegated: a.owner.delegated,
        }
    }

    fn store_io(&self, what: String) -> IpamError {
        IpamError::Store(StoreError::Io {
            path: self.state_dir.join(crate::store::FILE),
            what,
        })
    }

    fn lock_open(&self) -> MutexGuard<'_, Option<Open>> {
        self.open.lock().unwrap_or_else(|poisoned| {
            // A panic while stepping may have left half a step: the store is the truth.
            self.open.clear_poison();
            let mut guard = poisoned.into_inner();
            *guard = None;
            guard
        })
    }

    fn lock_queue(&self) -> MutexGuard<'_, Queue> {
        self.queue
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Whoever commits for others. All of them are answered, also when it panics: they would wait for ever.
struct Leads<'a>(&'a IpamService, Vec<u64>);

impl Leads<'_> {
    fn answer(mut self, replies: Vec<(u64, Result<Reply, String>)>) {
        self.1.clear();
        self.0.lock_queue().replies.extend(replies);
    }
}

impl Drop for Leads<'_> {
    fn drop(&mut self) {
        let mut queue = self.0.lock_queue();
        queue.led = false;
        let unanswered = self.1.drain(..).map(|ticket| {
            let message = "the commit broke off; look again what became of it";
            (ticket, Err(message.to_owned()))
        });
        queue.replies.extend(unanswered);
        self.0.answered.notify_all();
    }
}

/// What can be seen of an address depends on where the cluster is read from. With neither API nor folder there would be nothing
/// to see; a new source has to say here what it can prove.
fn needs(source: &ClusterSource) -> Needs {
    match source {
        ClusterSource::Folder(_) => Needs::FOLDER,
        ClusterSource::Kubernetes { .. } => Needs::API,
    }
}

fn refuse(key: &AttachmentKey, pod: &PodRef) -> Option<Response> {
    let parts = [
        ("network", &key.network),
        ("containerId", &key.container_id),
        ("ifname", &key.ifname),
        ("namespace", &pod.namespace),
        ("name", &pod.name),
        ("uid", &pod.uid),
    ];
    parts
        .into_iter()
        .find(|(_, value)| value.len() > MAX_PART)
        .map(|(name, value)| Response::Failed {
            message: format!(
                "{name} has {} bytes; at most {MAX_PART} are stored",
                value.len()
            ),
        })
}

fn failed(error: IpamError) -> Response {
    Response::Failed {
        message: error.to_string(),
    }
}

pub(crate) fn round_up(duration: Duration) -> u64 {
    duration.as_secs() + u64::from(duration.subsec_nanos() > 0)
}

/// The core's form of a key.
pub(crate) fn core_key(key: &AttachmentKey) -> Key {
    Key {
        container_id: key.container_id.clone(),
        ifname: key.ifname.clone(),
        network: key.network.clone(),
    }
}

pub(crate) fn control_key(key: &Key) -> AttachmentKey {
    AttachmentKey {
        network: key.network.clone(),
        container_id: key.container_id.clone(),
        ifname: key.ifname.clone(),
    }
}

pub(crate) fn control_pod(pod: &Pod) -> PodRef {
    PodRef {
        namespace: pod.namespace.clone(),
        name: pod.name.clone(),
        uid: pod.uid.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    #[test]
    fn who_waits_for_a_leader_that_panics_is_told_and_the_next_one_leads() {
        let dir = tempfile::tempdir().unwrap();
        let text =
            "node: {name: n}\ncluster: {folder: /nonexistent}\nipam: {v4Pools: [10.64.0.0/14]}\n";
        let config = kun_config::parse("kun.yaml", text).unwrap();
        let (boot, now) = (clock::boot().unwrap(), clock::now());
        let service = IpamService::open(dir.path(), &config, boot, now).unwrap();
        service.lock_queue().led = true;
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| service.tick(now));
            let tickets: Vec<u64> = loop {
                let queue = service.lock_queue();
                if !queue.waiting.is_empty() {
                    break queue.waiting.iter().map(|(ticket, ..)| *ticket).collect();
                }
                drop(queue);
                std::thread::yield_now();
            };
            service.lock_queue().waiting.clear();
            let leading = std::panic::AssertUnwindSafe(|| {
                let _leads = Leads(&service, tickets);
                panic!("in the midst of a commit");
            });
            assert!(std::panic::catch_unwind(leading).is_err());
            let error = waiting.join().unwrap().unwrap_err();
            assert!(error.to_string().contains("broke off"), "{error}");
        });
        service.tick(now).unwrap();
    }
}
