//! BGP: what this node owns and has ready, to route sets, to the speaker.
//!
//! One task owns the speaker. The dataplane and the cluster source write their share of [`Facts`]; whatever they change, the task
//! plans anew and announces the difference. Nothing is announced before the cluster is synced and the datapath stands.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use kun_bgp::{Datapath, Inputs, Options, RouteSet, Speaker, StartError, StopMode, plan};
use kun_config::Config;
use kun_config::types::BlockId;
use kun_control::BgpSession;
use kun_telemetry::Registry;
use tokio::sync::{mpsc, oneshot, watch};

/// A peer that does not take our last word in this time loses the session without it.
const SHUTDOWN_WITHIN: Duration = Duration::from_secs(2);

/// Questions that may wait: kunctl asks one at a time.
const QUESTIONS: usize = 16;

/// What announcements depend on, as the agent's parts see it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Facts {
    /// Blocks of this node; `None`: the cluster is not synced.
    pub(crate) blocks: Option<Vec<BlockId>>,
    /// Virtual addresses, and whether this node has a ready endpoint; `None`: nothing is programmed yet.
    pub(crate) vips: Option<BTreeMap<IpAddr, bool>>,
    /// The kernel side.
    pub(crate) datapath: Datapath,
    /// The translator stands; always false on nodes that are no gateway.
    pub(crate) nat64: bool,
}

/// The handle to the task.
#[derive(Debug)]
pub(crate) struct Announcer {
    questions: mpsc::Sender<Question>,
}

#[derive(Debug)]
enum Question {
    Status(oneshot::Sender<Vec<BgpSession>>),
    Stop(oneshot::Sender<()>),
}

impl Announcer {
    /// Starts the speaker and its task; must be called inside the runtime. No session opens before the first plan.
    pub(crate) fn start(
        config: &Config,
        router_id: Ipv4Addr,
        restarted: bool,
        registry: &mut Registry,
        facts: watch::Receiver<Facts>,
    ) -> Result<Self, StartError> {
        let options = Options {
            router_id,
            restarted,
            seed: kun_proxy_core::stable_hash(config.node.name.as_bytes()),
        };
        let speaker = Speaker::start(&config.bgp, options, registry)?;
        let (questions, asked) = mpsc::channel(QUESTIONS);
        tokio::spawn(run(config.clone(), speaker, facts, asked));
        Ok(Self { questions })
    }

    /// Every session. Called from a thread, not from a task.
    pub(crate) fn status(&self) -> Vec<BgpSession> {
        let (reply, answer) = oneshot::channel();
        if self
            .questions
            .blocking_send(Question::Status(reply))
            .is_err()
        {
            return Vec::new();
        }
        answer.blocking_recv().unwrap_or_default()
    }

    /// Ends the sessions as a restart does: peers keep our routes while the datapath goes on.
    pub(crate) async fn stop(&self) {
        let (done, wait) = oneshot::channel();
        if self.questions.send(Question::Stop(done)).await.is_ok() {
            // An error means that the task is gone, and its sessions with it.
            let _ = wait.await;
        }
    }
}

async fn run(
    config: Config,
    speaker: Speaker,
    mut facts: watch::Receiver<Facts>,
    mut questions: mpsc::Receiver<Question>,
) {
    let mut held: BTreeMap<String, RouteSet> = BTreeMap::new();
    let mut connected = true;
    loop {
        let wanted = inputs(&config, &facts.borrow_and_update());
        match plan(&config.bgp, &wanted, &held) {
            Ok(sets) => {
                if sets != held {
                    report(&sets);
                    speaker.announce(sets.clone());
                    held = sets;
                }
            }
            Err(hold) => tracing::debug!(%hold, "announcements are held"),
        }
        tokio::select! {
            changed = facts.changed(), if connected => connected = changed.is_ok(),
            question = questions.recv() => match question {
                Some(Question::Status(reply)) => {
                    // Whoever asked may have gone.
                    let _ = reply.send(speaker.status().into_iter().map(session).collect());
                }
                Some(Question::Stop(done)) => {
                    speaker.shutdown(StopMode::Graceful, SHUTDOWN_WITHIN).await;
                    let _ = done.send(());
                    return;
                }
                None => return,
            },
        }
    }
}

fn inputs(config: &Config, facts: &Facts) -> Inputs {
    let gateway = config.nat64.gateway.as_ref().filter(|_| facts.nat64);
    Inputs {
        pod_prefix: config.ipam.pod_prefix,
        blocks: facts.blocks.clone().unwrap_or_default(),
        vips: facts.vips.clone().unwrap_or_default(),
        pref64: gateway.map_or_else(Vec::new, |_| config.nat64.pref64.clone()),
        nat64_pool: gateway.map_or_else(Vec::new, |g| g.pool.clone()),
        synced: facts.blocks.is_some() && facts.vips.is_some(),
        datapath: facts.datapath,
        draining: false,
    }
}

fn report(sets: &BTreeMap<String, RouteSet>) {
    for (peer, set) in sets {
        tracing::info!(peer, routes = set.len(), "announcing");
        for refused in set.refused() {
            tracing::warn!(peer, prefix = %refused.prefix, reason = %refused.reason, "not announced");
        }
    }
}

fn session(status: kun_bgp::SessionStatus) -> BgpSession {
    BgpSession {
        peer: status.peer,
        address: status.address,
        state: status.state.to_owned(),
        since_secs: status.since_secs,
        announced: status.announced,
        last_error: status.last_error,
    }
}
