//! The store on a disk that loses, tears and reorders what was not flushed: after a crash at any write it holds what was told,
//! or what was about to be told, and nothing else. And how many flushes a verb costs.

#![allow(missing_docs)]

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kun_cni::disk::Disk;
use kun_cni::store::{Store, StoreError};
use kun_cni_core::ipam::{
    BootId, BootTime, Command, Effect, Ipam, Key, Owner, Pod, Rules, Snapshot,
};
use kun_config::types::{BlockId, Slot, SlotClass};
use redb::StorageBackend;

/// A disk writes this much at once or not at all.
const SECTOR: usize = 512;

/// Ways in which the writes since the last flush survive, besides none and all.
const RANDOM_SUBSETS: u64 = 2;

#[derive(Debug, Clone)]
enum Op {
    Write(usize, Vec<u8>),
    Length(usize),
}

/// What a disk holds, what its cache holds, and what is between.
#[derive(Debug, Clone, Default)]
struct Platter {
    durable: Vec<u8>,
    cached: Vec<u8>,
    pending: Vec<Op>,
    flushes: usize,
    operations: usize,
    /// After so many operations nothing reaches the disk any more: the process was killed.
    fuse: Option<usize>,
    /// The platter before each operation.
    trace: Option<Vec<Moment>>,
}

/// One point in time at which the power may fail.
#[derive(Debug, Clone)]
struct Moment {
    durable: Arc<Vec<u8>>,
    pending: Vec<Op>,
    told: usize,
}

#[derive(Debug, Clone, Default)]
struct Shared {
    platter: Arc<Mutex<Platter>>,
    told: Arc<Mutex<usize>>,
}

impl Shared {
    fn with_image(image: Vec<u8>) -> Self {
        let shared = Self::default();
        let mut platter = shared.platter.lock().unwrap();
        platter.durable.clone_from(&image);
        platter.cached = image;
        drop(platter);
        shared
    }

    /// With an empty store, as [`Store::open`] makes it under another name first.
    fn created() -> Self {
        let disk = Self::default();
        drop(disk.open().unwrap());
        let mut platter = disk.platter.lock().unwrap();
        platter.durable = platter.cached.clone();
        platter.pending.clear();
        platter.operations = 0;
        drop(platter);
        disk
    }

    fn open(&self) -> Result<Store, StoreError> {
        Store::on(Path::new("ipam.redb"), Disk::new(self.clone()))
    }

    fn flushes(&self) -> usize {
        self.platter.lock().unwrap().flushes
    }

    fn operation(&self, change: impl FnOnce(&mut Platter)) -> io::Result<()> {
        let told = *self.told.lock().unwrap();
        let mut platter = self.platter.lock().unwrap();
        if platter.fuse.is_some_and(|fuse| platter.operations >= fuse) {
            return Err(io::Error::other("killed"));
        }
        platter.operations += 1;
        if let Some(mut trace) = platter.trace.take() {
            // Moments between two flushes share the image.
            let durable = match trace.last() {
                Some(last) if *last.durable == platter.durable => Arc::clone(&last.durable),
                _ => Arc::new(platter.durable.clone()),
            };
            trace.push(Moment {
                durable,
                pending: platter.pending.clone(),
                told,
            });
            platter.trace = Some(trace);
        }
        change(&mut platter);
        Ok(())
    }
}

impl StorageBackend for Shared {
    fn len(&self) -> io::Result<u64> {
        Ok(self.platter.lock().unwrap().cached.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let platter = self.platter.lock().unwrap();
        let begin = usize::try_from(offset).unwrap();
        let found = platter.cached.get(begin..begin + out.len());
        out.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let len = usize::try_from(len).unwrap();
        self.operation(|platter| {
            platter.cached.resize(len, 0);
            platter.pending.push(Op::Length(len));
        })
    }

    fn sync_data(&self) -> io::Result<()> {
        self.operation(|platter| {
            platter.durable.clone_from(&platter.cached);
            platter.pending.clear();
            platter.flushes += 1;
        })
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let begin = usize::try_from(offset).unwrap();
        self.operation(|platter| {
            platter.cached[begin..begin + data.len()].copy_from_slice(data);
            platter.pending.push(Op::Write(begin, data.to_vec()));
        })
    }
}

/// splitmix64: the subsets are the same in every run.
fn scramble(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

impl Moment {
    /// The disk after a power failure at this moment, where `keeps` decides about each sector of each write by its number.
    fn image(&self, keeps: impl Fn(u64) -> bool) -> Vec<u8> {
        let mut image = self.durable.to_vec();
        let mut number = 0;
        for op in &self.pending {
            match op {
                Op::Length(len) => {
                    number += 1;
                    if keeps(number) {
                        image.resize(*len, 0);
                    }
                }
                Op::Write(begin, data) => {
                    let mut at = *begin;
                    let end = begin + data.len();
                    while at < end {
                        number += 1;
                        let next = ((at / SECTOR + 1) * SECTOR).min(end);
                        // What lies beyond a length that was lost is lost with it.
                        if keeps(number) && next <= image.len() {
                            image[at..next].copy_from_slice(&data[at - begin..next - begin]);
                        }
                        at = next;
                    }
                }
            }
        }
        image
    }

    /// Nothing, everything, the last write alone, everything but the last, and some subsets between.
    fn images(&self, seed: u64) -> Vec<Vec<u8>> {
        if self.pending.is_empty() {
            return vec![self.durable.to_vec()];
        }
        let mut images = vec![self.image(|_| false), self.image(|_| true)];
        let header_only = Self {
            pending: self
                .pending
                .iter()
                .filter(|op| matches!(op, Op::Write(begin, _) if *begin < SECTOR))
                .cloned()
                .collect(),
            ..self.clone()
        };
        images.push(header_only.image(|_| true));
        let pages_only = Self {
            pending: self
                .pending
                .iter()
                .filter(|op| !matches!(op, Op::Write(begin, _) if *begin < SECTOR))
                .cloned()
                .collect(),
            ..self.clone()
        };
        images.push(pages_only.image(|_| true));
        for subset in 0..RANDOM_SUBSETS {
            let salt = scramble(seed ^ (subset << 32));
            images.push(self.image(|number| scramble(salt ^ number) & 1 == 1));
        }
        images
    }
}

fn at(seconds: u64) -> BootTime {
    BootTime(Duration::from_secs(seconds))
}

fn owner(n: u64) -> Owner {
    Owner {
        key: Key {
            container_id: format!("{n:064x}"),
            ifname: "eth0".into(),
            network: "kun".into(),
        },
        pod: Pod::default(),
        delegated: false,
    }
}

/// What a node does in a while: a boot, a block, and pods that come and go. Each is one transaction.
fn transactions(pods: u64) -> Vec<Vec<Effect>> {
    let rules = Rules::time_alone(Duration::from_secs(1));
    let (mut ipam, boot) = Ipam::load(Snapshot::default(), rules, BootId(7), at(0)).unwrap();
    let mut all = vec![boot];
    let block = BlockId::new(Slot(0x0a40_0000)).expect("aligned");
    all.push(ipam.step(Command::SetBlocks([block].into()), at(0)).effects);
    for n in 0..pods {
        let (owner, class) = (owner(n), SlotClass::Dual);
        let key = owner.key.clone();
        let now = at(n);
        all.push(ipam.step(Command::Allocate { owner, class }, now).effects);
        if n % 3 != 0 {
            let generation = None;
            all.push(ipam.step(Command::Release { key, generation }, now).effects);
        }
    }
    all
}

/// The store's content before the first transaction and after each.
fn states(transactions: &[Vec<Effect>]) -> Vec<Snapshot> {
    let mut state = Snapshot::default();
    let mut states = vec![state.clone()];
    for effects in transactions {
        effects.iter().cloned().for_each(|e| state.apply(e));
        states.push(state.clone());
    }
    states
}

/// Commits all, with the store closed and opened again every so many transactions, and gives every moment of it.
fn traced(transactions: &[Vec<Effect>], open_for: usize) -> Vec<Moment> {
    let disk = Shared::created();
    disk.platter.lock().unwrap().trace = Some(Vec::new());
    for chunk in transactions.chunks(open_for) {
        let store = disk.open().unwrap();
        for effects in chunk {
            store.commit(effects).unwrap();
            *disk.told.lock().unwrap() += 1;
        }
    }
    let mut platter = disk.platter.lock().unwrap();
    platter.trace.take().unwrap()
}

fn crash_everywhere(open_for: usize) {
    let transactions = transactions(5);
    let states = states(&transactions);
    let moments = traced(&transactions, open_for);
    let mut unfinished = 0;
    for (number, moment) in moments.iter().enumerate() {
        for (which, image) in moment.images(number as u64).into_iter().enumerate() {
            let what = format!("moment {number} of {}, image {which}", moments.len());
            let disk = Shared::with_image(image);
            let store = disk.open().unwrap_or_else(|e| panic!("{what}: {e}"));
            let found = store.load().unwrap_or_else(|e| panic!("{what}: {e}"));
            let next = (moment.told + 1).min(states.len() - 1);
            assert!(
                found == states[moment.told] || found == states[next],
                "{what}: after {} commits it holds something else",
                moment.told
            );
            unfinished += usize::from(found != states[moment.told]);
            // It goes on from there, and what it recovers with can itself be cut off.
            if number % 7 == 0 {
                let boot = [Effect::PutBoot(BootId(9))];
                store
                    .commit(&boot)
                    .unwrap_or_else(|e| panic!("{what}: {e}"));
                drop(store);
                let again = disk.open().unwrap().load().unwrap();
                assert_eq!(again.boot, Some(BootId(9)), "{what}");
                assert_eq!(again.records, found.records, "{what}");
            }
        }
    }
    assert!(unfinished > 0, "no crash met a commit that was on its way");
}

#[test]
fn a_power_failure_at_any_write_of_the_agent_loses_nothing_that_was_told() {
    crash_everywhere(usize::MAX);
}

#[test]
fn a_power_failure_at_any_write_of_a_plugin_alone_loses_nothing_that_was_told() {
    crash_everywhere(1);
}

/// A process is killed at any operation; the next one answers from what it finds, and then the power fails.
#[test]
fn what_is_answered_from_a_killed_process_commit_survives_a_power_failure() {
    let transactions = transactions(3);
    let states = states(&transactions);
    let base = Shared::created();
    let (last, before) = transactions.split_last().unwrap();
    for effects in before {
        base.open().unwrap().commit(effects).unwrap();
    }
    let base = base.platter.lock().unwrap().clone();
    let mut adopted = 0;
    for fuse in 0..200 {
        let disk = Shared {
            platter: Arc::new(Mutex::new(Platter {
                operations: 0,
                fuse: Some(fuse),
                ..base.clone()
            })),
            ..Shared::default()
        };
        let committed = disk.open().and_then(|store| store.commit(last)).is_ok();
        let burnt = disk.platter.lock().unwrap().operations >= fuse;
        disk.platter.lock().unwrap().fuse = None;
        let told = disk.open().unwrap().load().unwrap();
        let full = told == *states.last().unwrap();
        assert!(full || (!committed && told == states[states.len() - 2]));
        adopted += usize::from(full && !committed);
        let platter = disk.platter.lock().unwrap();
        let moment = Moment {
            durable: Arc::new(platter.durable.clone()),
            pending: platter.pending.clone(),
            told: 0,
        };
        drop(platter);
        for image in moment.images(fuse as u64) {
            let after = Shared::with_image(image).open().unwrap().load().unwrap();
            assert_eq!(after, told, "killed after {fuse} operations");
        }
        if !burnt {
            assert!(adopted > 0, "no kill left a whole commit behind");
            return;
        }
    }
    panic!("a verb takes more than 200 operations");
}

#[test]
fn a_verb_alone_costs_two_flushes_or_three_and_a_group_commit_one() {
    let transactions = transactions(12);
    let disk = Shared::created();
    let mut most = 0;
    let begin = disk.flushes();
    for effects in &transactions {
        let before = disk.flushes();
        disk.open().unwrap().commit(effects).unwrap();
        most = most.max(disk.flushes() - before);
    }
    // One of the commit and one of the closing, and one more when the file grows.
    assert!(most <= 3, "{most} flushes for one verb");
    let all = disk.flushes() - begin;
    assert!(all < transactions.len() * 3, "{all} flushes");
    let before = disk.flushes();
    let store = disk.open().unwrap();
    store.load().unwrap();
    assert_eq!(disk.flushes() - before, 0, "reading");
    let costs: Vec<usize> = (1..=6)
        .map(|n| {
            let before = disk.flushes();
            store.commit(&[Effect::PutBoot(BootId(n))]).unwrap();
            disk.flushes() - before
        })
        .collect();
    // The file may grow once on the way.
    let grown = costs.iter().filter(|cost| **cost == 2).count();
    let one = costs.iter().filter(|cost| **cost == 1).count();
    assert!(grown <= 1 && grown + one == costs.len(), "{costs:?}");
}
