//! The answer cache: positive and negative halves, bounded in entries and octets, sharded so that cores do not meet.
//!
//! TTL rules are CoreDNS's: an answer lives as long as its shortest TTL (RFC 2181 §5.2, RFC 2308 §5), kept within the configured
//! bounds, and every record of it carries what is left. A SERVFAIL is remembered shortly (RFC 2308 §7.1) and never in place of
//! a good answer.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use foldhash::fast::FixedState;
use kun_config::corefile::{Cache as Spec, CacheHalf};
use kun_config::types::wire_is_within;

use crate::answer::{Answer, Key};
use crate::wire::rcode;

/// Locks to spread over: far more than cores, so that two of them rarely want one.
const SHARDS: usize = 64;

/// Larger answers are not kept: with 9984 entries a half stays below 80 MiB whatever is sent.
const MAX_ENTRY: usize = 8192;

/// Lifetime of an answer that does not say (CoreDNS: MinimalDefaultTTL).
const DEFAULT_TTL: Duration = Duration::from_secs(5);

#[derive(Debug)]
struct Entry {
    key: Box<[u8]>,
    answer: Arc<Answer>,
    stored: Duration,
    ttl: Duration,
    /// Looked at since the hand last passed.
    used: bool,
    /// Hits with no long gap between them, for prefetch.
    hits: u32,
    last_hit: Duration,
    /// A refresh was ordered for this entry.
    refreshing: bool,
}

#[derive(Debug)]
struct Half {
    index: HashMap<Box<[u8]>, usize, FixedState>,
    entries: Vec<Entry>,
    capacity: usize,
    hand: usize,
}

impl Half {
    fn new(capacity: usize, seed: u64) -> Self {
        Self {
            index: HashMap::with_hasher(FixedState::with_seed(seed)),
            entries: Vec::new(),
            capacity,
            hand: 0,
        }
    }

    fn get(&mut self, key: &[u8]) -> Option<&mut Entry> {
        let at = *self.index.get(key)?;
        Some(&mut self.entries[at])
    }

    fn insert(&mut self, entry: Entry) {
        if self.capacity == 0 {
            return;
        }
        if let Some(&at) = self.index.get(&entry.key) {
            self.entries[at] = entry;
        } else if self.entries.len() < self.capacity {
            self.index.insert(entry.key.clone(), self.entries.len());
            self.entries.push(entry);
        } else {
            // CLOCK: one round at most clears every mark, so the second finds a victim.
            while std::mem::take(&mut self.entries[self.hand].used) {
                self.hand = (self.hand + 1) % self.entries.len();
            }
            let at = self.hand;
            self.index.remove(&self.entries[at].key);
            self.index.insert(entry.key.clone(), at);
            self.entries[at] = entry;
            self.hand = (at + 1) % self.entries.len();
        }
    }

    fn remove(&mut self, key: &[u8]) {
        if let Some(at) = self.index.remove(key) {
            self.entries.swap_remove(at);
            if let Some(moved) = self.entries.get(at) {
                *self
                    .index
                    .get_mut(&moved.key)
                    .expect("every entry is indexed") = at;
            }
            if self.hand >= self.entries.len() {
                self.hand = 0;
            }
        }
    }
}

#[derive(Debug)]
struct Shard {
    success: Half,
    denial: Half,
}

/// A cache.
#[derive(Debug)]
pub struct Cache {
    spec: Spec,
    shards: Box<[Mutex<Shard>]>,
    hasher: FixedState,
}

/// What a lookup found.
#[derive(Debug, Clone)]
pub enum Found {
    /// Good: all TTLs become `ttl` seconds (`None`: stay as stored); `refresh`: ask upstream behind the client's back.
    Fresh {
        /// The answer.
        answer: Arc<Answer>,
        /// Seconds left.
        ttl: Option<u32>,
        /// A popular entry nears its end.
        refresh: bool,
    },
    /// Expired but within `serve_stale`: TTL 0.
    Stale {
        /// The answer.
        answer: Arc<Answer>,
        /// Ask upstream behind the client's back; false: someone already does.
        refresh: bool,
    },
    /// Nothing.
    Miss,
}

impl Cache {
    /// Empty; `seed` makes its hashing unpredictable from outside.
    pub fn new(spec: Spec, seed: u64) -> Self {
        let each = |half: CacheHalf| half.capacity.div_ceil(SHARDS);
        let shards = (0..SHARDS).map(|i| {
            Mutex::new(Shard {
                success: Half::new(each(spec.success), seed ^ i as u64),
                denial: Half::new(each(spec.denial), seed ^ i as u64),
            })
        });
        Self {
            shards: shards.collect(),
            hasher: FixedState::with_seed(seed.rotate_left(17)),
            spec,
        }
    }

    /// What it was made for.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// Whether answers to `name` (lower-case wire form) are kept here.
    pub fn covers(&self, name: &[u8]) -> bool {
        self.spec
            .zones
            .iter()
            .any(|z| wire_is_within(name, z.wire()))
    }

    fn shard(&self, key: &Key) -> MutexGuard<'_, Shard> {
        use std::hash::BuildHasher;
        let hash = self.hasher.hash_one(key.bytes());
        // A panic while the lock was held leaves a shard that is at worst short of an entry.
        self.shards[(hash >> 32) as usize % SHARDS]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks `key` up at `now`.
    pub fn get(&self, key: &Key, now: Duration) -> Found {
        let mut shard = self.shard(key);
        let stale_for = self.spec.serve_stale.map_or(Duration::ZERO, |s| s.duration);
        let Shard { success, denial } = &mut *shard;
        // A denial is the newer word: storing a positive answer removes it.
        let entry = match denial.get(key.bytes()) {
            Some(e) if now < e.stored + e.ttl + stale_for => Some(e),
            _ => success.get(key.bytes()),
        };
        let Some(e) = entry else { return Found::Miss };
        e.used = true;
        let expires = e.stored + e.ttl;
        if now >= expires {
            if now >= expires + stale_for {
                return Found::Miss;
            }
            return Found::Stale {
                answer: e.answer.clone(),
                refresh: !std::mem::replace(&mut e.refreshing, true),
            };
        }
        let left = expires - now;
        let mut refresh = false;
        if let Some(p) = self.spec.prefetch {
            e.hits = if now.saturating_sub(e.last_hit) <= p.duration {
                e.hits.saturating_add(1)
            } else {
                1
            };
            e.last_hit = now;
            let near = left.as_millis() * 100 <= e.ttl.as_millis() * u128::from(p.percentage);
            refresh = near && e.hits >= p.amount && !std::mem::replace(&mut e.refreshing, true);
        }
        Found::Fresh {
            answer: e.answer.clone(),
            // Rounded up, so that what lives does not say 0.
            ttl: (!self.spec.keep_ttl).then(|| left.as_millis().div_ceil(1000) as u32),
            refresh,
        }
    }

    /// Only what is expired yet within `serve_stale`: for a resolution that failed.
    pub fn get_stale(&self, key: &Key, now: Duration) -> Option<Arc<Answer>> {
        match self.get(key, now) {
            Found::Fresh { answer, .. } | Found::Stale { answer, .. } => {
                Some(answer).filter(|a| a.rcode() != rcode::SERVFAIL)
            }
            Found::Miss => None,
        }
    }

    /// Allows the next lookup of `key` to order a refresh: the last one failed.
    pub fn refresh_failed(&self, key: &Key) {
        let mut shard = self.shard(key);
        let Shard { success, denial } = &mut *shard;
        for half in [success, denial] {
            if let Some(e) = half.get(key.bytes()) {
                e.refreshing = false;
            }
        }
    }

    /// Keeps `answer`, if it is of a kind that is kept; returns the TTL that its records are to carry.
    pub fn put(&self, key: &Key, name: &[u8], answer: &Arc<Answer>, now: Duration) -> Option<u32> {
        let within = |zones: &[kun_config::types::DnsName]| {
            zones.iter().any(|z| wire_is_within(name, z.wire()))
        };
        let code = answer.rcode();
        let denial = match code {
            rcode::SERVFAIL => true,
            rcode::NOERROR | rcode::NXDOMAIN => answer.is_denial(),
            _ => return None,
        };
        let half = if denial {
            self.spec.denial
        } else {
            self.spec.success
        };
        let ttl = match code {
            rcode::SERVFAIL => self.spec.servfail,
            _ => {
                let lifetime = answer
                    .lifetime()
                    .map_or(DEFAULT_TTL, |s| Duration::from_secs(s.into()));
                lifetime
                    .min(half.max_ttl)
                    .max(half.min_ttl.min(half.max_ttl))
            }
        };
        if ttl.is_zero()
            || half.capacity == 0
            || answer.size() > MAX_ENTRY
            || within(if denial {
                &self.spec.disable_denial
            } else {
                &self.spec.disable_success
            })
        {
            return None;
        }
        let entry = Entry {
            key: key.bytes().into(),
            answer: answer.clone(),
            stored: now,
            ttl,
            used: false,
            hits: 0,
            last_hit: now,
            refreshing: false,
        };
        let mut shard = self.shard(key);
        if denial {
            // A SERVFAIL must not hide a good answer that is stale at worst.
            if code == rcode::SERVFAIL
                && self.spec.serve_stale.is_some()
                && shard.success.get(key.bytes()).is_some()
            {
                return None;
            }
            if code != rcode::SERVFAIL {
                shard.success.remove(key.bytes());
            }
            shard.denial.insert(entry);
        } else {
            shard.denial.remove(key.bytes());
            shard.success.insert(entry);
        }
        (!self.spec.keep_ttl).then_some(ttl.as_secs() as u32)
    }

    /// Entries: positive, negative.
    pub fn len(&self) -> (usize, usize) {
        let mut total = (0, 0);
        for shard in &self.shards {
            let shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            total.0 += shard.success.entries.len();
            total.1 += shard.denial.entries.len();
        }
        total
    }

    /// Whether nothing is kept.
    pub fn is_empty(&self) -> bool {
        self.len() == (0, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answer::Profile;
    use crate::message::{Message, Record};
    use crate::wire::rtype;
    use kun_config::corefile::{Alone, Plugin, parse};

    const NAME: &[u8] = b"\x03www\x07example\x03org\0";

    fn cache(options: &str) -> Cache {
        let corefile = parse("t", &format!(". {{\ncache {options}\n}}"), &Alone).unwrap();
        let Plugin::Cache(spec) = &corefile.servers[0].plugins[0] else {
            panic!()
        };
        Cache::new(spec.clone(), 7)
    }

    fn key() -> Key {
        Key::new(NAME, rtype::A, Profile::default())
    }

    fn positive(ttls: &[u32]) -> Arc<Answer> {
        let mut m = Message::empty(NAME, rtype::A, 0);
        m.answers = ttls
            .iter()
            .map(|t| Record::new(NAME, rtype::A, *t, vec![192, 0, 2, 1]))
            .collect();
        Arc::new(Answer::from_message(&m).unwrap())
    }

    fn negative(code: u8, ttl: u32, minimum: u32) -> Arc<Answer> {
        let mut m = Message::empty(NAME, rtype::A, code);
        let mut soa = vec![0, 0];
        soa.extend_from_slice(&[0; 16]);
        soa.extend_from_slice(&minimum.to_be_bytes());
        m.authority = vec![Record::new(b"\x03org\0", rtype::SOA, ttl, soa)];
        Arc::new(Answer::from_message(&m).unwrap())
    }

    fn secs(s: u64) -> Duration {
        Duration::from_secs(s)
    }

    fn fresh_ttl(c: &Cache, now: Duration) -> Option<u32> {
        match c.get(&key(), now) {
            Found::Fresh { ttl, .. } => ttl,
            _ => None,
        }
    }

    #[test]
    fn the_shortest_ttl_counts_and_runs_down() {
        let c = cache("");
        assert_eq!(
            c.put(&key(), NAME, &positive(&[300, 60]), secs(10)),
            Some(60)
        );
        assert_eq!(fresh_ttl(&c, secs(10)), Some(60));
        assert_eq!(fresh_ttl(&c, Duration::from_millis(10_500)), Some(60));
        assert_eq!(fresh_ttl(&c, secs(69)), Some(1));
        assert!(matches!(c.get(&key(), secs(70)), Found::Miss));
    }

    #[test]
    fn bounds() {
        let c = cache("{\nsuccess 100 50 7\ndenial 100 20 6\n}");
        assert_eq!(c.put(&key(), NAME, &positive(&[3000]), secs(0)), Some(50));
        assert_eq!(c.put(&key(), NAME, &positive(&[1]), secs(0)), Some(7));
        assert_eq!(
            c.put(&key(), NAME, &negative(3, 3000, 15), secs(0)),
            Some(15),
            "RFC 2308: the SOA's minimum"
        );
        assert_eq!(
            c.put(&key(), NAME, &negative(3, 10, 900), secs(0)),
            Some(10)
        );
        assert_eq!(
            c.put(&key(), NAME, &negative(3, 900, 900), secs(0)),
            Some(20)
        );
    }

    #[test]
    fn one_word_at_a_time() {
        let c = cache("");
        c.put(&key(), NAME, &positive(&[300]), secs(0));
        c.put(&key(), NAME, &negative(0, 300, 300), secs(1));
        assert_eq!(c.len(), (0, 1));
        c.put(&key(), NAME, &positive(&[300]), secs(2));
        assert_eq!(c.len(), (1, 0));
    }

    #[test]
    fn servfail_is_short_and_hides_nothing() {
        let c = cache("{\nserve_stale 1h\n}");
        let fail = Arc::new(Answer::bare(NAME, rtype::A, rcode::SERVFAIL));
        c.put(&key(), NAME, &positive(&[60]), secs(0));
        assert_eq!(c.put(&key(), NAME, &fail, secs(61)), None);
        assert!(matches!(
            c.get(&key(), secs(61)),
            Found::Stale { refresh: true, .. }
        ));
        assert!(
            matches!(c.get(&key(), secs(61)), Found::Stale { refresh: false, .. }),
            "one refresh at a time"
        );
        c.refresh_failed(&key());
        assert!(matches!(
            c.get(&key(), secs(61)),
            Found::Stale { refresh: true, .. }
        ));
        assert!(matches!(c.get(&key(), secs(60 + 3600)), Found::Miss));
        let c = cache("");
        assert_eq!(c.put(&key(), NAME, &fail, secs(0)), Some(5));
        assert!(matches!(c.get(&key(), secs(5)), Found::Miss));
        assert_eq!(
            cache("{\nservfail 0\n}").put(&key(), NAME, &fail, secs(0)),
            None
        );
    }

    #[test]
    fn popular_entries_are_refreshed_once() {
        let c = cache("{\nprefetch 2 1m 20%\n}");
        c.put(&key(), NAME, &positive(&[100]), secs(0));
        let refresh = |now| matches!(c.get(&key(), secs(now)), Found::Fresh { refresh: true, .. });
        assert!(!refresh(50));
        assert!(!refresh(79));
        assert!(refresh(85));
        assert!(!refresh(86));
        let c = cache("{\nprefetch 2 10s 20%\n}");
        c.put(&key(), NAME, &positive(&[100]), secs(0));
        let refresh = |now| matches!(c.get(&key(), secs(now)), Found::Fresh { refresh: true, .. });
        assert!(!refresh(50));
        assert!(!refresh(85), "the gap was too long");
        assert!(refresh(86));
    }

    #[test]
    fn zones_disable_and_size() {
        let c = cache("{\ndisable success example.org\n}");
        assert_eq!(c.put(&key(), NAME, &positive(&[60]), secs(0)), None);
        assert!(c.put(&key(), NAME, &negative(3, 60, 60), secs(0)).is_some());
        assert!(!cache("example.net").covers(NAME));
        assert!(cache("example.org").covers(NAME));
        assert_eq!(
            cache("").put(&key(), NAME, &positive(&[60; 600]), secs(0)),
            None,
            "too large"
        );
        assert_eq!(
            cache("").put(
                &key(),
                NAME,
                &Arc::new(Answer::bare(NAME, 1, rcode::REFUSED)),
                secs(0)
            ),
            None
        );
        let c = cache("{\nkeepttl\n}");
        c.put(&key(), NAME, &positive(&[60]), secs(0));
        assert!(matches!(
            c.get(&key(), secs(30)),
            Found::Fresh { ttl: None, .. }
        ));
    }

    #[test]
    fn full_shards_evict_what_is_not_used() {
        let c = cache("{\nsuccess 64\n}");
        for i in 0..10_000u32 {
            let name = [&[8][..], format!("{i:08}").as_bytes(), &[0]].concat();
            c.put(
                &Key::new(&name, 1, Profile::default()),
                &name,
                &positive(&[60]),
                secs(0),
            );
        }
        assert!(c.len().0 <= 64, "{:?}", c.len());
        let mut half = Half::new(3, 0);
        let entry = |k: u8| Entry {
            key: Box::new([k]),
            answer: positive(&[60]),
            stored: secs(0),
            ttl: secs(60),
            used: false,
            hits: 0,
            last_hit: secs(0),
            refreshing: false,
        };
        for k in 0..3 {
            half.insert(entry(k));
        }
        half.get(&[0]).unwrap().used = true;
        half.insert(entry(3));
        assert!(half.get(&[0]).is_some(), "used entries stay");
        assert!(half.get(&[1]).is_none());
        half.remove(&[0]);
        assert!(half.get(&[2]).is_some() && half.get(&[3]).is_some());
        assert_eq!(half.index.len(), half.entries.len());
    }
}
