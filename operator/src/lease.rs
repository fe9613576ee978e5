//! Who acts: leader election on a Lease, as client-go does it, so that any tool can read who leads. Pure: leases and the time go in,
//! what to do comes out.
//!
//! Nobody's wall clock is believed. A lease is over for others when its record has not changed for its own duration *since they saw
//! it*; for its holder it is over that long after it *asked* for its last renewal. The holder's time therefore always ends first, if
//! all clocks run alike, and [`CALL_WITHIN`] before that it begins no call any more. Governing: coordination.k8s.io/v1 Lease.

use std::time::Duration;

/// How long a record holds: client-go's default, so that a change of leaders takes as long as people know it.
pub const DURATION: Duration = Duration::from_secs(15);

/// How often it is renewed or looked at: client-go's RetryPeriod.
pub const RETRY: Duration = Duration::from_secs(2);

/// A call of the holder to the API server may last so long, hence is begun no later than this before the lease is over.
pub const CALL_WITHIN: Duration = Duration::from_secs(4);

/// A lease as read. Times of day in it are for people.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Record {
    /// spec.holderIdentity; empty: given back.
    pub holder: String,
    /// spec.leaseDurationSeconds
    pub duration: Duration,
    /// spec.leaseTransitions
    pub transitions: i32,
    /// spec.renewTime, as written: only whether it changes is of interest.
    pub renewed: String,
    /// metadata.resourceVersion
    pub version: String,
}

/// What to do with a lease that was just read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Turn {
    /// Make it, with us as its holder.
    Create,
    /// Replace this record: we hold it already.
    Renew(Record),
    /// Replace this record: it is nobody's any more.
    Take(Record),
    /// It is another's.
    Wait,
}

/// One candidate.
#[derive(Debug)]
pub struct Election {
    me: String,
    /// The record that was last seen, and when it was first seen.
    seen: Option<(Record, Duration)>,
    /// When the renewal that succeeded last was asked for.
    renewed: Option<Duration>,
}

impl Election {
    /// `me` names this process and no other, also not a later one in the same pod.
    pub fn new(me: String) -> Self {
        Self {
            me,
            seen: None,
            renewed: None,
        }
    }

    /// Our name.
    pub fn me(&self) -> &str {
        &self.me
    }

    /// What to do about the lease as it was found at `now`.
    pub fn look(&mut self, found: Option<Record>, now: Duration) -> Turn {
        let Some(found) = found else {
            self.seen = None;
            self.renewed = None;
            return Turn::Create;
        };
        if found.holder == self.me {
            return Turn::Renew(found);
        }
        self.renewed = None;
        let since = match &self.seen {
            Some((seen, since)) if *seen == found => *since,
            _ => now,
        };
        self.seen = Some((found.clone(), since));
        let over = found.holder.is_empty() || now >= since + found.duration;
        if over { Turn::Take(found) } else { Turn::Wait }
    }

    /// A create or replace that was asked for at `asked` succeeded: we hold the lease.
    pub fn held(&mut self, asked: Duration) {
        self.seen = None;
        self.renewed = Some(asked);
    }

    /// Until when we hold it; `None`: we do not.
    pub fn until(&self) -> Option<Duration> {
        self.renewed.map(|asked| asked + DURATION)
    }

    /// The record that gives it back: the next one need not wait.
    pub fn given_back(&mut self, held: Record) -> Record {
        self.renewed = None;
        Record {
            holder: String::new(),
            duration: Duration::from_secs(1),
            ..held
        }
    }
}

/// Whether a call may begin at `now` that ends, one way or the other, while the lease holds `until` then.
pub fn may_call(until: Option<Duration>, now: Duration) -> bool {
    until.is_some_and(|until| now + CALL_WITHIN <= until)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn record(holder: &str, renewed: &str) -> Record {
        Record {
            holder: holder.into(),
            duration: DURATION,
            transitions: 3,
            renewed: renewed.into(),
            version: renewed.into(),
        }
    }

    #[test]
    fn a_lease_that_is_renewed_is_never_taken() {
        let mut b = Election::new("b".into());
        for i in 0..100 {
            let found = record("a", &i.to_string());
            assert_eq!(b.look(Some(found), SECOND * 14 * i), Turn::Wait);
        }
    }

    #[test]
    fn one_that_is_not_is_taken_after_its_own_duration_since_it_was_seen() {
        let mut b = Election::new("b".into());
        let found = record("a", "1");
        assert_eq!(b.look(Some(found.clone()), SECOND * 100), Turn::Wait);
        assert_eq!(b.look(Some(found.clone()), SECOND * 114), Turn::Wait);
        assert_eq!(b.look(Some(found.clone()), SECOND * 115), Turn::Take(found));
    }

    #[test]
    fn one_that_is_given_back_or_gone_is_taken_at_once() {
        let mut a = Election::new("a".into());
        let back = a.given_back(record("a", "1"));
        let mut b = Election::new("b".into());
        assert_eq!(b.look(Some(back.clone()), SECOND), Turn::Take(back));
        assert_eq!(b.look(None, SECOND), Turn::Create);
    }

    #[test]
    fn who_sees_another_in_its_place_holds_nothing() {
        let mut a = Election::new("a".into());
        a.held(SECOND);
        assert_eq!(a.until(), Some(SECOND * 16));
        assert!(may_call(a.until(), SECOND * 12) && !may_call(a.until(), SECOND * 13));
        assert_eq!(a.look(Some(record("b", "9")), SECOND * 2), Turn::Wait);
        assert_eq!(a.until(), None);
        assert!(!may_call(a.until(), SECOND * 2));
    }

    /// A server, and candidates whose requests may be slow, lost on the way there or on the way back, and whose clocks began at
    /// different times.
    #[derive(Debug, Clone)]
    enum Move {
        /// A candidate looks, and writes what comes of it; the write arrives so much later, or its answer is lost.
        Turn {
            who: usize,
            slow: u64,
            answered: bool,
        },
        /// Time passes.
        Pass(u64),
    }

    fn moves() -> impl Strategy<Value = Vec<Move>> {
        let turn =
            (0..3_usize, 0..4_u64, any::<bool>()).prop_map(|(who, slow, answered)| Move::Turn {
                who,
                slow,
                answered,
            });
        prop::collection::vec(
            prop_oneof![3 => turn, 1 => (0..20_u64).prop_map(Move::Pass)],
            1..200,
        )
    }

    proptest! {
        /// At no time may two of them begin a call.
        #[test]
        fn never_two(moves in moves()) {
            let names = ["a", "b", "c"];
            let offsets = [SECOND * 7, SECOND * 1000, SECOND * 31];
            let mut all = names.map(|n| Election::new(n.into()));
            let mut lease: Option<Record> = None;
            let (mut now, mut version) = (Duration::ZERO, 0_u64);
            for step in moves {
                match step {
                    Move::Pass(seconds) => now += SECOND * seconds as u32,
                    Move::Turn { who, slow, answered } => {
                        let clock = |now: Duration| now + offsets[who];
                        let asked = clock(now);
                        let turn = all[who].look(lease.clone(), asked);
                        let over = match turn {
                            Turn::Wait => continue,
                            Turn::Create => None,
                            Turn::Renew(over) | Turn::Take(over) => Some(over),
                        };
                        now += SECOND * slow as u32;
                        // Nobody moved meanwhile here; `slow` stands for the clock that ran on.
                        if lease.as_ref().map(|l| &l.version) == over.as_ref().map(|o| &o.version) {
                            version += 1;
                            lease = Some(record(names[who], &version.to_string()));
                            if answered {
                                all[who].held(asked);
                            }
                        }
                    }
                }
                let acting = (0..3).filter(|i| may_call(all[*i].until(), now + offsets[*i])).count();
                prop_assert!(acting <= 1, "{acting} at {now:?}");
            }
        }
    }
}
