//! Bandwidth limits in the kernel: buckets, which interface has which, and the programs on those interfaces.
//!
//! Everything is pinned: a limit holds while no agent runs, and the next one finds every bucket as full as it is. Whose bucket
//! has which number is the caller's to know; it may read here what an earlier agent left.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use kun_ebpf_abi::bandwidth::{Bucket, Limits, Terms};

use crate::Error;
use crate::features::Features;
use crate::object::{Adopted, Direction, Object, Order, remove_filters};
use crate::pins::{MapSpec, Pins};
use crate::sys::{self, Mapped, Ran, map_flag, map_type};

const OBJECT: &str = "bandwidth";

const PROGRAMS: [(&str, Direction); 2] = [
    ("limit_ingress", Direction::Ingress),
    ("limit_egress", Direction::Egress),
];

/// Buckets: two for each of more pods than a node runs. 512 KiB.
pub const BUCKETS: u32 = 8192;

/// Interfaces with a limit: a pod has two at most, and as many buckets.
const INTERFACES: u32 = BUCKETS;

/// Words of a bucket, in the order of its fields.
const WORDS: usize = size_of::<Bucket>() / 8;
const NEXT: usize = 0;
const PER_BYTE: usize = 1;
const BURST: usize = 2;
const HORIZON: usize = 3;
const DROPPED_PACKETS: usize = 4;
const DROPPED_BYTES: usize = 5;
const _: () = {
    assert!(std::mem::offset_of!(Bucket, terms.per_byte) == PER_BYTE * 8);
    assert!(std::mem::offset_of!(Bucket, terms.burst) == BURST * 8);
    assert!(std::mem::offset_of!(Bucket, terms.horizon) == HORIZON * 8);
    assert!(std::mem::offset_of!(Bucket, dropped_packets) == DROPPED_PACKETS * 8);
    assert!(std::mem::offset_of!(Bucket, dropped_bytes) == DROPPED_BYTES * 8);
};

/// The programs and maps in the kernel. Dropping it leaves everything at work.
#[derive(Debug)]
pub struct BandwidthDataplane {
    object: Object,
    limited: OwnedFd,
    buckets: Mapped,
}

fn specs() -> [MapSpec; 2] {
    [
        MapSpec {
            name: "limited",
            map_type: map_type::HASH,
            key: 4,
            value: size_of::<Limits>(),
            flags: map_flag::NO_PREALLOC,
            max_entries: INTERFACES,
        },
        MapSpec {
            name: "buckets",
            map_type: map_type::ARRAY,
            key: 4,
            value: size_of::<Bucket>(),
            flags: map_flag::MMAPABLE,
            max_entries: BUCKETS,
        },
    ]
}

fn failed(map: &'static str, operation: &'static str) -> impl Fn(std::io::Error) -> Error {
    move |source| Error::Map {
        map,
        operation,
        source,
    }
}

impl BandwidthDataplane {
    /// Loads the programs; adopts what an earlier agent of this ABI pinned below `bpffs_root`.
    pub fn open(bpffs_root: &Path, mount_bpffs: bool) -> Result<(Self, Adopted), Error> {
        let bytes = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/bandwidth.o"));
        let pins = Pins::open(bpffs_root, OBJECT, mount_bpffs)?;
        let features = Features::probe()?;
        // Before the service programs: those may end the chain.
        let (object, adopted) = Object::load(
            OBJECT,
            bytes,
            pins,
            &specs(),
            Vec::new(),
            features,
            Order::First,
        )?;
        let limited = object.map("limited")?;
        let buckets = object.map("buckets")?;
        let buckets = Mapped::new(buckets.as_fd(), BUCKETS as usize * size_of::<Bucket>())
            .map_err(failed("buckets", "mmap"))?;
        Ok((
            BandwidthDataplane {
                object,
                limited,
                buckets,
            },
            adopted,
        ))
    }

    /// Removes what any agent of this ABI has pinned below `bpffs_root` and put on these interfaces: no limit holds any more.
    pub fn remove(bpffs_root: &Path, interfaces: &[String]) -> Result<(), Error> {
        remove_filters(interfaces, &PROGRAMS, Order::First)?;
        Pins::remove(bpffs_root, OBJECT)
    }

    fn words(&self, number: u32) -> Result<&[std::sync::atomic::AtomicU64], Error> {
        if number >= BUCKETS {
            return Err(Error::Capacity {
                map: "buckets",
                index: number.into(),
                capacity: BUCKETS.into(),
            });
        }
        let at = number as usize * WORDS;
        Ok(&self.buckets.words64()[at..at + WORDS])
    }

    /// Empties a bucket's past and gives it terms: full, nothing dropped.
    pub fn fill(&mut self, number: u32, terms: &Terms) -> Result<(), Error> {
        let words = self.words(number)?;
        // No limit while the terms are of two minds.
        words[PER_BYTE].store(0, Release);
        for word in [NEXT, DROPPED_PACKETS, DROPPED_BYTES] {
            words[word].store(0, Release);
        }
        self.set(number, terms)
    }

    /// Other terms for a bucket that is in use. A packet meanwhile sees some of the old and some of the new.
    pub fn set(&mut self, number: u32, terms: &Terms) -> Result<(), Error> {
        let words = self.words(number)?;
        words[BURST].store(terms.burst, Release);
        words[HORIZON].store(terms.horizon, Release);
        words[PER_BYTE].store(terms.per_byte, Release);
        Ok(())
    }

    /// A bucket as it is.
    pub fn bucket(&self, number: u32) -> Result<Bucket, Error> {
        let words = self.words(number)?;
        Ok(Bucket {
            next: words[NEXT].load(Relaxed),
            terms: Terms {
                per_byte: words[PER_BYTE].load(Acquire),
                burst: words[BURST].load(Relaxed),
                horizon: words[HORIZON].load(Relaxed),
            },
            dropped_packets: words[DROPPED_PACKETS].load(Relaxed),
            dropped_bytes: words[DROPPED_BYTES].load(Relaxed),
            pad: [0; 2],
        })
    }

    /// Gives an interface its buckets.
    pub fn limit(&mut self, interface: u32, limits: &Limits) -> Result<(), Error> {
        sys::update(self.limited.as_fd(), &interface, limits).map_err(failed("limited", "update"))
    }

    /// Takes an interface's buckets away; false: it had none.
    pub fn unlimit(&mut self, interface: u32) -> Result<bool, Error> {
        sys::delete(self.limited.as_fd(), &interface).map_err(failed("limited", "delete"))
    }

    /// All interfaces with buckets, in no order.
    pub fn limited(&self) -> Result<Vec<(u32, Limits)>, Error> {
        let mut all = Vec::new();
        sys::for_each_batch(self.limited.as_fd(), |keys: &[u32], values: &[Limits]| {
            all.extend(keys.iter().copied().zip(values.iter().copied()));
        })
        .map_err(failed("limited", "walk"))?;
        Ok(all)
    }

    /// Puts the programs on an interface of the current network namespace.
    pub fn attach(&mut self, interface: &str) -> Result<(), Error> {
        self.object.attach_passing(interface, &PROGRAMS)
    }

    /// Takes the programs off an interface, whether it still exists or not.
    pub fn detach(&mut self, interface: &str) -> Result<(), Error> {
        self.object.detach_interface(interface, &PROGRAMS)
    }

    /// Runs a program on one packet, as if it passed the loopback interface: what the pod sends, or what reaches it.
    pub fn test_run(&self, sends: bool, packet: &[u8], repeat: u32) -> Result<Ran, Error> {
        let (program, _) = PROGRAMS[usize::from(!sends)];
        sys::test_run(self.object.program(program)?, packet, repeat).map_err(|source| {
            Error::Attach {
                program: program.to_owned(),
                target: "a test run".to_owned(),
                source,
            }
        })
    }
}
