//! The blocks of this node: taken into the address store, confirmed to whoever gives them, routed, announced, and returned. One thread does
//! all of it, since saying something to an API server may take its time; it is poked when the cluster changed or a pod got nothing.
//!
//! What to do next is decided in `kun_cni_core::claims`. While the API server is away the node goes on with what is in its store:
//! nothing is confirmed and nothing is returned, and all that was confirmed is given out from. Owns the order: store, then routes and
//! announcements, then words, so that a block is not announced before it is confirmed and not said to be drained while it is announced.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ipnet::IpNet;
use kun_cluster::api::write::Writer;
use kun_cluster::blocks::{ApiBlocks, Blocks as Giver, BlocksError, Held, ListedBlocks, Word};
use kun_cluster::crd;
use kun_cni::claims::{Appetite, Move, Phase, Said, Supply, next};
use kun_cni::clock;
use kun_cni::ipam::{BootTime, Claim, IpamError, IpamService, Standing};
use kun_config::types::{BlockId, SlotClass};
use kun_config::{ClusterSource, Config};
use tokio::sync::watch;

use super::AgentError;
use super::announce::Facts;
use super::cluster::View;
use super::routes::{self, RouteError};

/// How full its blocks are, a node says at most once in so long, and only when it changed: 10,000 nodes make 33 writes a second, as many
/// as their kubelets make to say that they are alive. Nothing depends on these counts; what the operator acts on is said at once.
const COUNTS_EVERY: Duration = Duration::from_secs(300);

/// Steps of one block in its store before something has to be said: an unknown epoch, taken, draining, returned.
const MOST_STEPS: usize = 8;

/// A first round takes some commits, and one write for each block that is new.
const FIRST_ROUND: Duration = Duration::from_secs(2);

/// After a word that was not taken: somebody wrote, and the watch is about to tell what.
const AFTER_CONFLICT: Duration = Duration::from_secs(1);

/// The first wait after a failure is at most this and at least half of it, each next one twice as long, …
const WAIT_FIRST: Duration = Duration::from_secs(1);

/// … and at most this: a server that is back is told within half a minute, and ten thousand nodes do not come all at once.
const WAIT_AT_MOST: Duration = Duration::from_secs(30);

const CLASSES: [SlotClass; 2] = [SlotClass::Dual, SlotClass::V6Only];

/// The blocks of this node. Questions are answered from what was done last.
#[derive(Debug)]
pub(crate) struct Blocks {
    poke: SyncSender<()>,
    /// Listed in manifests: nobody can be asked for more.
    listed: bool,
    seen: Mutex<Seen>,
    looked: Condvar,
}

/// What others may know.
#[derive(Debug, Default)]
struct Seen {
    /// Rounds over a cluster that is synced.
    rounds: u64,
    any: bool,
    trouble: Option<String>,
    counted: BTreeMap<SlotClass, Counted>,
    asks: BTreeMap<SlotClass, BootTime>,
}

/// Blocks of a class.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counted {
    /// In the store, not confirmed.
    pub(crate) taken: u32,
    /// Given out from.
    pub(crate) confirmed: u32,
    /// On their way back.
    pub(crate) draining: u32,
    /// Wanted in all; 0: nothing is known yet.
    pub(crate) wanted: u32,
}

impl Blocks {
    /// Something changed. Never blocks: one poke that waits is as good as many.
    pub(crate) fn poke(&self) {
        // Full: it is about to look. Closed: the process ends.
        let _ = self.poke.try_send(());
    }

    /// The cluster is synced: waits for the first round, so that an agent that says it is ready has its blocks; not for long, since a
    /// server that does not answer keeps no datapath back.
    pub(crate) fn first_round(&self) {
        self.poke();
        let seen = self.seen();
        // Timed out: the node has no block yet, and says so.
        let _ = self
            .looked
            .wait_timeout_while(seen, FIRST_ROUND, |seen| seen.rounds == 0);
    }

    /// Whether there is any address to give.
    pub(crate) fn any(&self) -> bool {
        self.seen().any
    }

    /// What does not stand, for status.
    pub(crate) fn trouble(&self) -> Option<String> {
        self.seen().trouble.clone()
    }

    /// Blocks of a class.
    pub(crate) fn counted(&self, class: SlotClass) -> Counted {
        self.seen().counted.get(&class).copied().unwrap_or_default()
    }

    /// For whoever got no address: what became of the wish for another block.
    pub(crate) fn more(&self, class: SlotClass, now: BootTime) -> Option<String> {
        let seen = self.seen();
        let since = seen.asks.get(&class)?;
        Some(match self.listed {
            true => {
                "this node's blocks are listed in manifests: add an IPAMBlock for it".to_owned()
            }
            false => format!(
                "another block was asked for {} s ago and none came yet: `kubectl get ippools` shows whether a pool has one left",
                now.since(*since).as_secs()
            ),
        })
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        // Whole at every moment: fields are replaced.
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Starts the thread, which lives as long as the process.
pub(crate) fn start(
    config: &Config,
    ipam: &Arc<IpamService>,
    facts: Arc<watch::Sender<Facts>>,
    view: &Arc<View>,
) -> Result<Arc<Blocks>, AgentError> {
    let node = &config.node.name;
    let (giver, listed): (Box<dyn Giver>, bool) = match &config.cluster {
        ClusterSource::Folder(_) => (Box::new(ListedBlocks::new(node)), true),
        ClusterSource::Kubernetes { kubeconfig } => {
            let writer = Writer::open(kubeconfig.as_deref())?;
            (Box::new(ApiBlocks::new(node, writer)), false)
        }
    };
    let (poke, pokes) = sync_channel(1);
    let blocks = Arc::new(Blocks {
        poke,
        listed,
        seen: Mutex::default(),
        looked: Condvar::new(),
    });
    let mut keeper = Keeper {
        seed: kun_proxy_core::stable_hash(node.as_bytes()),
        config: config.clone(),
        ipam: Arc::clone(ipam),
        facts,
        giver,
        blocks: Arc::clone(&blocks),
        view: Arc::clone(view),
        routed: None,
        returning: BTreeSet::new(),
        appetites: BTreeMap::new(),
        counts_of: None,
        failures: 0,
        quiet_until: BootTime::default(),
    };
    std::thread::Builder::new()
        .name("kun-blocks".to_owned())
        .spawn(move || keeper.run(&pokes))
        .map_err(|source| AgentError::System {
            what: "a thread",
            source,
        })?;
    Ok(blocks)
}

/// Why blocks are not as they should be.
#[derive(Debug, thiserror::Error)]
enum KeepError {
    #[error("the address store: {0}")]
    Ipam(#[from] IpamError),
    #[error(transparent)]
    Route(#[from] RouteError),
    #[error(transparent)]
    Word(#[from] BlocksError),
}

struct Keeper {
    config: Config,
    ipam: Arc<IpamService>,
    facts: Arc<watch::Sender<Facts>>,
    giver: Box<dyn Giver>,
    blocks: Arc<Blocks>,
    view: Arc<View>,
    routed: Option<BTreeSet<BlockId>>,
    /// On their way back by our own wish.
    returning: BTreeSet<BlockId>,
    appetites: BTreeMap<SlotClass, Appetite>,
    /// The period in which counts were told last.
    counts_of: Option<u64>,
    failures: u32,
    /// The giver is left alone until then.
    quiet_until: BootTime,
    /// Differs between nodes.
    seed: u64,
}

/// How we stand to each block that is or was ours, and how many of its slots are allocated and not free for another reason.
type Standings = BTreeMap<BlockId, (Claim, u32, u32)>;

impl Keeper {
    fn run(&mut self, pokes: &Receiver<()>) {
        loop {
            let left = self.quiet_until.0.saturating_sub(clock::now().0);
            let wait = match left.is_zero() {
                true => super::HOUSEKEEPING,
                false => left.min(super::HOUSEKEEPING),
            };
            match pokes.recv_timeout(wait) {
                Ok(()) | Err(RecvTimeoutError::Timeout) => self.round(),
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// Brings store, routes, announcements and words to what the cluster says. Cheap when nothing changed; what failed is tried again.
    fn round(&mut self) {
        if !self.view.synced() {
            return;
        }
        let failed = self.bring().err().map(|e| e.to_string());
        let mut seen = self.blocks.seen();
        if let Some(what) = &failed
            && seen.trouble != failed
        {
            tracing::error!("blocks: {what}; trying again");
        }
        seen.trouble = failed;
        seen.rounds += 1;
        self.blocks.looked.notify_all();
    }

    fn bring(&mut self) -> Result<(), KeepError> {
        let (mut owned, mut standings) = self.settle_store()?;
        self.show(&standings);
        self.route(&standings)?;
        if clock::now() < self.quiet_until {
            return Ok(());
        }
        let said = self.say(&owned, &standings);
        // What was said changed both.
        (owned, standings) = self.settle_store()?;
        self.show(&standings);
        self.route(&standings)?;
        let said = said
            .and_then(|()| self.want(&owned, &standings))
            .and_then(|()| {
                owned = self.giver.owned(&self.view.store());
                self.count(&owned, &standings)
            });
        match said {
            Ok(()) => {
                self.failures = 0;
                Ok(())
            }
            Err(KeepError::Word(error)) => self.wait(error),
            Err(error) => Err(error),
        }
    }

    /// Leaves the giver alone for a while. Somebody who was faster is no trouble.
    fn wait(&mut self, error: BlocksError) -> Result<(), KeepError> {
        let (wait, trouble) = match &error {
            BlocksError::Overtaken { .. } => (AFTER_CONFLICT, false),
            BlocksError::Listed { .. } | BlocksError::NoVoice { .. } => return Ok(()),
            BlocksError::Refused { .. } => (WAIT_AT_MOST, true),
            BlocksError::Away { .. } => {
                let full =
                    (WAIT_FIRST * 2_u32.saturating_pow(self.failures.min(16))).min(WAIT_AT_MOST);
                self.failures += 1;
                let share = kun_proxy_core::stable_hash(
                    &(self.seed ^ u64::from(self.failures)).to_be_bytes(),
                ) % 1000;
                let jittered = full / 2 + full.mul_f64(share as f64 / 2000.0);
                let asked = error.retry_after().unwrap_or_default();
                (jittered.max(asked.min(WAIT_AT_MOST)), true)
            }
        };
        self.quiet_until = BootTime(clock::now().0 + wait);
        match trouble {
            true => Err(error.into()),
            false => {
                tracing::debug!("{error}");
                Ok(())
            }
        }
    }

    /// Every step that is the store's alone, until something has to be said or all is done.
    fn settle_store(&mut self) -> Result<(Vec<Held>, Standings), KeepError> {
        let now = clock::now();
        for _ in 0..MOST_STEPS {
            let owned = self.giver.owned(&self.view.store());
            let standings = self.ipam.standings(now)?;
            let mut claims: BTreeMap<BlockId, Claim> = standings
                .iter()
                .filter_map(|(block, (claim, ..))| claim.is_owned().then_some((*block, *claim)))
                .collect();
            let mut changed = false;
            for (block, step) in self.steps(&owned, &standings) {
                let Move::Store(claim) = step else {
                    continue;
                };
                changed = true;
                log(block, claim);
                match claim.is_owned() {
                    true => claims.insert(block, claim),
                    false => claims.remove(&block),
                };
            }
            if !changed {
                return Ok((owned, standings));
            }
            self.ipam.set_claims(&claims, now)?;
        }
        // A block has not so many steps: somebody changes it all the while.
        let owned = self.giver.owned(&self.view.store());
        Ok((owned, self.ipam.standings(now)?))
    }

    /// The next step of every block. While the view is partial, blocks that the store knows and no manifest gives to another stay as they
    /// are.
    fn steps(&self, owned: &[Held], standings: &Standings) -> Vec<(BlockId, Move)> {
        let said: BTreeMap<BlockId, &Held> = owned.iter().map(|h| (h.block, h)).collect();
        let elsewhere: Option<BTreeSet<BlockId>> = self
            .view
            .partial()
            .then(|| self.view.store().blocks().map(|b| b.block()).collect());
        let all: BTreeSet<BlockId> = said.keys().chain(standings.keys()).copied().collect();
        let step = |block: BlockId| {
            let held = said.get(&block).copied();
            let (claim, allocated, cooling) = match standings.get(&block) {
                Some((claim, allocated, cooling)) => (Some(*claim), *allocated, *cooling),
                None => (None, 0, 0),
            };
            if held.is_none()
                && elsewhere
                    .as_ref()
                    .is_some_and(|named| !named.contains(&block))
            {
                return None;
            }
            let returning = self.returning.contains(&block);
            let said = held.map(said_of);
            let step = next(said, claim, allocated + cooling, returning)?;
            Some((block, step))
        };
        all.into_iter().filter_map(step).collect()
    }

    /// Says what has to be said of each block; what is confirmed enters the store at once.
    fn say(&mut self, owned: &[Held], standings: &Standings) -> Result<(), KeepError> {
        let steps = self.steps(owned, standings);
        let mut failed = None;
        for held in owned {
            let Some((_, step)) = steps.iter().find(|(block, _)| *block == held.block) else {
                continue;
            };
            let word = Word {
                wanted: held.word.wanted,
                ..word_of(held.block, standings)
            };
            let told = match step {
                Move::Store(_) => continue,
                Move::Tell(phase) => self.giver.tell(held, crd_phase(*phase), word),
                Move::Confirm(_) => self.giver.tell(held, crd::Phase::Confirmed, word),
            };
            match (told, step) {
                (Ok(()), Move::Confirm(claim)) => {
                    log(held.block, *claim);
                    self.store(held.block, *claim)?;
                }
                (Ok(()), _) => {
                    tracing::info!(block = %held.block, epoch = held.epoch, said = ?step, "told");
                }
                // One that was overtaken keeps no other back.
                (Err(error @ BlocksError::Overtaken { .. }), _) => failed = Some(error),
                (Err(error), _) => return Err(error.into()),
            }
        }
        failed.map_or(Ok(()), |error| Err(error.into()))
    }

    /// One claim beside those that are.
    fn store(&self, block: BlockId, claim: Claim) -> Result<(), KeepError> {
        let now = clock::now();
        let mut claims: BTreeMap<BlockId, Claim> = self
            .ipam
            .standings(now)?
            .into_iter()
            .filter_map(|(block, (claim, ..))| claim.is_owned().then_some((block, claim)))
            .collect();
        claims.insert(block, claim);
        Ok(self.ipam.set_claims(&claims, now)?)
    }

    /// Asks for more, or begins to return.
    fn want(&mut self, owned: &[Held], standings: &Standings) -> Result<(), KeepError> {
        let now = clock::now();
        let mut failed = Ok(());
        for class in CLASSES {
            let supply = self.supply(class, owned, standings, now)?;
            // The first block comes unasked, where there is any.
            if supply.blocks.is_empty() {
                self.appetites.remove(&class);
                let mut seen = self.blocks.seen();
                seen.counted.entry(class).or_default().wanted = 0;
                seen.asks.remove(&class);
                continue;
            }
            let appetite = self.appetites.entry(class).or_default();
            let wants = appetite.look(&supply, self.config.ipam.return_blocks_after, now);
            let asks = appetite.asks();
            {
                let mut seen = self.blocks.seen();
                seen.counted.entry(class).or_default().wanted = wants.blocks;
                match asks {
                    Some(since) => seen.asks.insert(class, since),
                    None => seen.asks.remove(&class),
                };
            }
            let has = u32::try_from(supply.blocks.len()).unwrap_or(u32::MAX);
            let of_class = || owned.iter().filter(|held| held.block.class() == class);
            let spoke = of_class().any(|held| held.word.wanted.is_some());
            // Who never wanted more than was given has nothing to say.
            let said = match wants.blocks != has || spoke {
                true => self.giver.want(owned, class, wants.blocks),
                false => Ok(()),
            };
            self.returning.retain(|block| block.class() != class);
            match said {
                // Said first: else the operator would make up for what goes.
                Ok(()) => self.returning.extend(wants.returning),
                Err(BlocksError::Listed { .. } | BlocksError::NoVoice { .. }) => {}
                Err(error) => failed = Err(error.into()),
            }
        }
        failed
    }

    fn supply(
        &self,
        class: SlotClass,
        owned: &[Held],
        standings: &Standings,
        now: BootTime,
    ) -> Result<Supply, KeepError> {
        let mut supply = Supply {
            free: self.ipam.counts(class, now)?.2,
            least: self.config.operator.blocks_per_node,
            ..Supply::default()
        };
        // A list is what it is: of it nothing goes back.
        if self.blocks.listed {
            supply.least = u32::MAX;
        }
        let of_class = owned.iter().filter(|held| held.block.class() == class);
        for held in of_class.filter(|held| !held.draining) {
            let Some((claim, allocated, cooling)) = standings.get(&held.block) else {
                continue;
            };
            let counts = match claim.standing {
                Standing::Confirmed => true,
                Standing::Taken => {
                    supply.coming += 1;
                    true
                }
                Standing::Draining => self.returning.contains(&held.block),
                Standing::Returned => false,
            };
            if counts {
                supply.blocks.insert(held.block, (*allocated, *cooling));
            }
        }
        Ok(supply)
    }

    /// Says how full the blocks are, in this node's moment of each period.
    fn count(&mut self, owned: &[Held], standings: &Standings) -> Result<(), KeepError> {
        let every = COUNTS_EVERY.as_secs();
        let period = (clock::now().0.as_secs() + self.seed % every) / every;
        if self.counts_of == Some(period) {
            return Ok(());
        }
        for held in owned.iter().filter(|held| held.is_counted()) {
            let word = Word {
                wanted: held.word.wanted,
                ..word_of(held.block, standings)
            };
            let speaks = matches!(held.phase, crd::Phase::Confirmed | crd::Phase::Draining);
            if speaks && (word != held.word || held.observed != held.generation) {
                self.giver.tell(held, held.phase, word)?;
            }
        }
        self.counts_of = Some(period);
        Ok(())
    }

    fn show(&self, standings: &Standings) {
        let mut seen = self.blocks.seen();
        for class in CLASSES {
            let of_class = standings.iter().filter(|(block, _)| block.class() == class);
            let mut counted = Counted {
                wanted: seen.counted.get(&class).map_or(0, |c| c.wanted),
                ..Counted::default()
            };
            for (_, (claim, ..)) in of_class {
                match claim.standing {
                    Standing::Returned => {}
                    Standing::Taken => counted.taken += 1,
                    Standing::Confirmed => counted.confirmed += 1,
                    Standing::Draining => counted.draining += 1,
                }
            }
            seen.counted.insert(class, counted);
        }
        seen.any = standings.values().any(|(claim, ..)| claim.gives());
    }

    /// Routes and announces what is confirmed. A block that is taken away while pods still live in it stays until the last one is gone.
    fn route(&mut self, standings: &Standings) -> Result<(), KeepError> {
        let routed: BTreeSet<BlockId> = standings
            .iter()
            .filter(|(_, (claim, allocated, _))| {
                *allocated > 0 || matches!(claim.standing, Standing::Confirmed | Standing::Draining)
            })
            .map(|(block, _)| *block)
            .collect();
        if self.routed.as_ref() == Some(&routed) {
            return Ok(());
        }
        routes::set(&self.nets(&routed))?;
        let list = routed.iter().copied().collect();
        self.facts.send_modify(|facts| facts.blocks = Some(list));
        tracing::info!(blocks = routed.len(), "blocks of this node");
        self.routed = Some(routed);
        Ok(())
    }

    /// What has to end here: both halves of each block, and on a gateway the addresses that it translates to.
    fn nets(&self, blocks: &BTreeSet<BlockId>) -> BTreeSet<IpNet> {
        let prefix = self.config.ipam.pod_prefix;
        let v6 = blocks.iter().map(|b| IpNet::V6(b.v6(prefix)));
        let v4 = blocks
            .iter()
            .filter(|b| b.class() == SlotClass::Dual)
            .map(|b| IpNet::V4(b.v4()));
        let gateway = self.config.nat64.gateway.iter();
        let pool = gateway.flat_map(|g| g.pool.iter()).map(|p| IpNet::V4(*p));
        v6.chain(v4).chain(pool).collect()
    }
}

fn log(block: BlockId, claim: Claim) {
    tracing::info!(%block, epoch = claim.epoch, standing = ?claim.standing, "block");
}

fn word_of(block: BlockId, standings: &Standings) -> Word {
    let (allocated, cooling) = standings
        .get(&block)
        .map_or((0, 0), |(_, allocated, cooling)| (*allocated, *cooling));
    Word {
        allocated,
        cooling,
        wanted: None,
    }
}

fn said_of(held: &Held) -> Said {
    Said {
        // The schema begins at 1.
        epoch: u64::try_from(held.epoch).unwrap_or(1),
        counted: held.is_counted(),
        draining: held.draining,
        phase: match held.phase {
            crd::Phase::Pending => Phase::Pending,
            crd::Phase::Confirmed => Phase::Confirmed,
            crd::Phase::Draining => Phase::Draining,
            crd::Phase::Drained => Phase::Drained,
        },
    }
}

fn crd_phase(phase: Phase) -> crd::Phase {
    match phase {
        Phase::Pending => crd::Phase::Pending,
        Phase::Confirmed => crd::Phase::Confirmed,
        Phase::Draining => crd::Phase::Draining,
        Phase::Drained => crd::Phase::Drained,
    }
}
