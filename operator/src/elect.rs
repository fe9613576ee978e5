//! The thread that stands for the lease: reads it, takes it, renews it, gives it back. [`crate::lease`] decides.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{JoinHandle, Thread};
use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kun_cluster::ObjectName;
use kun_cluster::api::write::{WriteError, Writer};

use crate::lease::{DURATION, Election, RETRY, Record, Turn, may_call};

/// Time since the machine booted, asleep or not: a leader that slept must not take itself for one.
pub fn now() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    // Neither is negative on this clock.
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// The name of this process, as holder of the lease and on what it tells: no other has it, nor a later one in the same pod.
pub fn identity(pod: Option<&str>) -> String {
    use std::hash::{BuildHasher, Hasher};
    let host = || {
        let name = rustix::system::uname()
            .nodename()
            .to_string_lossy()
            .into_owned();
        name.to_lowercase()
    };
    // From the keys that the system seeds each hasher with: another in every process, also in one pod.
    let mut hasher = std::hash::RandomState::new().build_hasher();
    hasher.write_u32(std::process::id());
    let name = pod.map_or_else(host, str::to_owned);
    format!("{name}_{:016x}", hasher.finish())
}

/// The right to act: asked before every call.
#[derive(Debug, Clone, Default)]
pub struct Seat(Arc<AtomicU64>);

impl Seat {
    /// Whether a call may begin now. It ends before the lease does.
    pub fn may_call(&self) -> bool {
        let until = Duration::from_nanos(self.0.load(Ordering::Acquire));
        may_call((!until.is_zero()).then_some(until), now())
    }

    fn set(&self, until: Option<Duration>) {
        let until = until.unwrap_or_default().as_nanos() as u64;
        self.0.store(until, Ordering::Release);
    }
}

/// Where we stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Another acts, or nobody does yet.
    Waits,
    /// We may act, with nothing that we knew before: others may have acted meanwhile.
    Leads,
}

/// A candidacy; dropped, it is over and the lease is given back.
#[derive(Debug)]
pub struct Candidacy {
    stop: Arc<AtomicBool>,
    wake: Thread,
    thread: Option<JoinHandle<()>>,
    seat: Seat,
}

impl Candidacy {
    /// Stands for the lease `name` as `me`; `tell` hears whenever the standing changes, at first when the lease was read.
    pub fn stand(
        writer: Writer,
        name: ObjectName,
        me: String,
        tell: impl FnMut(Standing) + Send + 'static,
    ) -> std::io::Result<Self> {
        let (stop, seat) = (Arc::new(AtomicBool::new(false)), Seat::default());
        let candidate = Candidate {
            writer,
            name,
            election: Election::new(me),
            seat: seat.clone(),
            told: None,
            trouble: None,
        };
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("kun-lease".to_owned())
            .spawn(move || candidate.run(&stopped, tell))?;
        Ok(Self {
            stop,
            wake: thread.thread().clone(),
            thread: Some(thread),
            seat,
        })
    }

    /// The right to act.
    pub fn seat(&self) -> &Seat {
        &self.seat
    }
}

impl Drop for Candidacy {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.wake.unpark();
        if let Some(thread) = self.thread.take() {
            // A panic has been reported by its own message.
            let _ = thread.join();
        }
    }
}

struct Candidate {
    writer: Writer,
    name: ObjectName,
    election: Election,
    seat: Seat,
    told: Option<Standing>,
    trouble: Option<String>,
}

impl Candidate {
    fn run(mut self, stop: &AtomicBool, mut tell: impl FnMut(Standing)) {
        while !stop.load(Ordering::Acquire) {
            match self.turn() {
                Ok(()) => self.trouble = None,
                Err(error) => {
                    let error = error.to_string();
                    if self.trouble.as_ref() != Some(&error) {
                        tracing::warn!("lease {}: {error}", self.name);
                    }
                    self.trouble = Some(error);
                }
            }
            let holds = self.election.until().filter(|until| now() < *until);
            self.seat.set(holds);
            let standing = match holds {
                Some(_) => Standing::Leads,
                None => Standing::Waits,
            };
            // Before the lease was read once nothing is known.
            let known = self.trouble.is_none() || self.told.is_some();
            if known && self.told != Some(standing) {
                self.told = Some(standing);
                tell(standing);
            }
            std::thread::park_timeout(RETRY);
        }
        self.give_back();
    }

    fn turn(&mut self) -> Result<(), WriteError> {
        let found = self.writer.lease(&self.name)?;
        let (turn, asked) = {
            let now = now();
            (self.election.look(found.as_ref().map(record), now), now)
        };
        match turn {
            Turn::Wait => return Ok(()),
            Turn::Create => {
                let record = Record::default();
                self.writer.create_lease(&self.lease(None, &record, true))?;
                tracing::info!(lease = %self.name, holder = self.election.me(), "the lease is ours");
            }
            Turn::Renew(held) => {
                self.writer.update_lease(&self.lease(found, &held, false))?;
            }
            Turn::Take(over) => {
                self.writer.update_lease(&self.lease(found, &over, true))?;
                tracing::info!(lease = %self.name, holder = self.election.me(), before = over.holder, "the lease is ours");
            }
        }
        self.election.held(asked);
        Ok(())
    }

    /// What `over` becomes with us as its holder.
    fn lease(&self, found: Option<Lease>, over: &Record, anew: bool) -> Lease {
        let time = || Some(MicroTime(Timestamp::now()));
        let mut lease = found.unwrap_or_else(|| Lease {
            metadata: ObjectMeta {
                namespace: Some(self.name.namespace.to_string()),
                name: Some(self.name.name.to_string()),
                ..ObjectMeta::default()
            },
            spec: None,
        });
        let spec = lease.spec.get_or_insert_with(LeaseSpec::default);
        if anew {
            spec.acquire_time = time();
            // The first holder took it from nobody.
            let known = lease.metadata.resource_version.is_some();
            spec.lease_transitions = Some(over.transitions + i32::from(known));
        }
        spec.holder_identity = Some(self.election.me().to_owned());
        spec.lease_duration_seconds = Some(DURATION.as_secs() as i32);
        spec.renew_time = time();
        lease
    }

    /// Whoever waits need not wait for the lease to run out.
    fn give_back(&mut self) {
        let held = self.election.until().is_some();
        self.seat.set(None);
        if !held {
            return;
        }
        let given = self.writer.lease(&self.name).and_then(|found| {
            let Some(mut lease) = found else {
                return Ok(());
            };
            let back = self.election.given_back(record(&lease));
            if let Some(spec) = &mut lease.spec
                && spec.holder_identity.as_deref() == Some(self.election.me())
            {
                spec.holder_identity = Some(back.holder);
                spec.lease_duration_seconds = Some(back.duration.as_secs() as i32);
                spec.renew_time = Some(MicroTime(Timestamp::now()));
                self.writer.update_lease(&lease)?;
            }
            Ok(())
        });
        if let Err(error) = given {
            tracing::warn!(
                "lease {}: not given back, it runs out by itself: {error}",
                self.name
            );
        }
    }
}

fn record(lease: &Lease) -> Record {
    let spec = lease.spec.as_ref();
    let seconds = spec.and_then(|s| s.lease_duration_seconds);
    Record {
        holder: spec
            .and_then(|s| s.holder_identity.clone())
            .unwrap_or_default(),
        // One without a duration was written by nobody who stands for it.
        duration: seconds.map_or(DURATION, |s| Duration::from_secs(s.max(0) as u64)),
        transitions: spec.and_then(|s| s.lease_transitions).unwrap_or_default(),
        renewed: spec
            .and_then(|s| s.renew_time.as_ref())
            .map(|t| t.0.to_string())
            .unwrap_or_default(),
        version: lease.metadata.resource_version.clone().unwrap_or_default(),
    }
}
