//! The NAT64 gateway's dataplane: loads the program or adopts what an earlier process left, attaches it to the uplink, tells
//! its figures and removes sessions whose time has passed (RFC 6146 §4).
//!
//! All state lies in maps pinned below `<bpffs_root>/v{ABI}/nat64/`, so a restart loses no flow. Refuses configurations that
//! [`Mapping`] refuses, a Pref64 that is no /96 (a gateway that answers for other lengths would need state to know which one a
//! packet came under), and pools that the Well-Known Prefix could not carry back.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use aya::maps::{Array, HashMap, MapData, MapError, PerCpuArray, ProgramArray};
use aya::programs::{SchedClassifier, TcAttachType, TestRun, TestRunOptions};
use aya::{Ebpf, EbpfLoader, include_bytes_aligned};
use kun_ebpf_abi::nat64::bib::{
    Bib4, Bib6, Fragment, FragmentKey, MAX_BIB, MAX_FRAGMENTS, MAX_SESSIONS, Session, SessionKey,
};
use kun_ebpf_abi::nat64::{
    COUNTERS, Counter, Mapping, MappingError, MappingParams, Ranges, Settings, is_global,
    is_well_known, step,
};
use kun_ebpf_abi::reason::{REASONS, Reason};
use kun_ebpf_abi::{ABI_VERSION, Addr};
use rustix::time::{ClockId, clock_gettime};

use crate::hook::{self, HookError, Mechanism};
use crate::object::Direction;
use crate::pins::file_name;
use crate::sys::{self, Plain};

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/nat64.o"));
const PROGRAM: &str = "nat64_uplink";

/// An IPv4 network: address and prefix length.
pub type V4Net = (Ipv4Addr, u8);

/// What a gateway translates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nat64Config {
    /// A directory on a bpffs.
    pub bpffs_root: PathBuf,
    /// The /96 over all pods.
    pub pod_prefix: Ipv6Addr,
    /// The /96 under which IPv4 is reached; a gateway has one.
    pub pref64: (Ipv6Addr, u8),
    /// External addresses, in order; the last one is for exceptions.
    pub pool: Vec<V4Net>,
    /// Slot ranges that have port blocks, in order.
    pub clients: Vec<V4Net>,
    /// k: a block is 2^k ports.
    pub port_block_bits: u8,
    /// First local port of every pod.
    pub local_port_base: u16,
    /// This gateway's slice of the exceptions' address.
    pub slice: u8,
}

/// Why the gateway cannot be.
#[derive(Debug, thiserror::Error)]
pub enum Nat64Error {
    /// The ranges or numbers.
    #[error("nat64: {0}")]
    Mapping(MappingError),
    /// Not a /96 with a zero octet at bits 64 to 71.
    #[error(
        "nat64.pref64 {prefix}/{len}: a gateway takes a /96 whose bits 64 to 71 and last 32 bits are zero (RFC 6052 §2.2)"
    )]
    Pref64 {
        /// As given.
        prefix: Ipv6Addr,
        /// As given.
        len: u8,
    },
    /// A network with host bits or a length beyond 32.
    #[error(
        "nat64: {address}/{len} is no network: its host bits must be zero and its length at most 32"
    )]
    Network {
        /// As given.
        address: Ipv4Addr,
        /// As given.
        len: u8,
    },
    /// The uplink is not there.
    #[error("interface {interface}: {source}")]
    Interface {
        /// Its name.
        interface: String,
        /// What the system said.
        source: io::Error,
    },
    /// IPv6 needs 1280.
    #[error("interface {interface}: MTU {mtu} is below the 1280 that IPv6 needs; raise it")]
    Mtu {
        /// Its name.
        interface: String,
        /// Its MTU.
        mtu: u32,
    },
    /// Making or reading the pins' directory.
    #[error("{path}: {source}; is it on a bpffs?")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A pinned map of another shape.
    #[error("{path}: a map of another shape is pinned there; remove it and start again")]
    Foreign {
        /// The pin.
        path: PathBuf,
    },
    /// Loading the object.
    #[error("loading the NAT64 program: {0}")]
    Load(#[from] aya::EbpfError),
    /// Verifying or querying the program.
    #[error("the NAT64 program: {0}")]
    Program(#[from] aya::programs::ProgramError),
    /// A map operation.
    #[error("map {map}: {source}")]
    Map {
        /// Its name.
        map: &'static str,
        /// What aya says.
        source: MapError,
    },
    /// Pinning a map.
    #[error("pinning {map}: {source}")]
    Pin {
        /// Its name.
        map: &'static str,
        /// What aya says.
        source: aya::pin::PinError,
    },
    /// Attaching.
    #[error(transparent)]
    Hook(#[from] HookError),
}

/// Something that works, but not as its author may think.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Nat64Warning {
    /// Slots beyond the pool's blocks are served as exceptions only.
    MoreClientsThanBlocks {
        /// Slots.
        clients: u64,
        /// Blocks.
        blocks: u64,
    },
    /// 64:ff9b::/96 must not carry this external address (RFC 6052 §3.1): pods cannot reach each other through it.
    PoolNotGlobal {
        /// The first such address.
        address: Ipv4Addr,
    },
}

impl std::fmt::Display for Nat64Warning {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::MoreClientsThanBlocks { clients, blocks } => write!(
                f,
                "nat64: {clients} client slots but {blocks} port blocks; the rest is served statefully. Enlarge the pool or lower portBlockBits"
            ),
            Self::PoolNotGlobal { address } => write!(
                f,
                "nat64: {address} is not global and Pref64 is 64:ff9b::/96, which carries global addresses only (RFC 6052 §3.1): such hosts are not reachable. Take a prefix of your own, or 64:ff9b:1::/48 (RFC 8215)"
            ),
        }
    }
}

impl Nat64Config {
    /// The settings without the uplink, and what is worth a warning.
    pub fn settings(&self) -> Result<(Settings, Vec<Nat64Warning>), Nat64Error> {
        let (prefix, len) = self.pref64;
        let octets = prefix.octets();
        if len != 96 || octets[8] != 0 || octets[12..] != [0; 4] {
            return Err(Nat64Error::Pref64 { prefix, len });
        }
        let mapping = Mapping::new(&MappingParams {
            clients: ranges(&self.clients)?,
            pool: ranges(&self.pool)?,
            block_bits: self.port_block_bits,
            local_port_base: self.local_port_base,
            slice: self.slice,
        })
        .map_err(Nat64Error::Mapping)?;
        let mut warnings = Vec::new();
        let (clients, blocks) = (u64::from(mapping.clients.total), mapping.capacity());
        if clients > blocks {
            warnings.push(Nat64Warning::MoreClientsThanBlocks { clients, blocks });
        }
        let well_known = is_well_known(octets, len);
        if well_known {
            let foreign = (0..mapping.pool.total.min(1 << 16))
                .filter_map(|i| mapping.pool.nth(i))
                .find(|a| !is_global(*a));
            warnings.extend(foreign.map(|a| Nat64Warning::PoolNotGlobal { address: a.into() }));
        }
        Ok((
            Settings {
                mapping,
                pod_prefix: words(self.pod_prefix),
                pref64: words(prefix),
                well_known: well_known.into(),
                uplink: 0,
                mtu: 0,
            },
            warnings,
        ))
    }

    /// Where everything is pinned.
    pub fn directory(&self) -> PathBuf {
        self.bpffs_root
            .join(format!("v{ABI_VERSION}"))
            .join("nat64")
    }
}

/// First 96 bits, as they lie in memory.
fn words(a: Ipv6Addr) -> [u32; 3] {
    let o = a.octets();
    [0, 4, 8].map(|i| u32::from_ne_bytes([o[i], o[i + 1], o[i + 2], o[i + 3]]))
}

fn ranges(nets: &[V4Net]) -> Result<Ranges, Nat64Error> {
    let mut pairs = Vec::with_capacity(nets.len());
    for &(address, len) in nets {
        let bad = Nat64Error::Network { address, len };
        if len > 32 || len == 0 {
            return Err(bad);
        }
        let count = 1u64 << (32 - len);
        if u64::from(u32::from(address)) % count != 0 {
            return Err(bad);
        }
        pairs.push((u32::from(address), count as u32));
    }
    Ranges::new(pairs).map_err(Nat64Error::Mapping)
}

/// The gateway's figures since its maps were made.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Nat64Stats {
    /// Indexed by [`Counter`].
    pub counters: Vec<u64>,
    /// Indexed by [`Reason`].
    pub reasons: Vec<u64>,
    /// BIB entries that stand.
    pub bib: usize,
    /// Sessions that stand.
    pub sessions: usize,
}

impl Nat64Stats {
    /// One counter.
    pub fn counter(&self, c: Counter) -> u64 {
        self.counters.get(c as usize).copied().unwrap_or(0)
    }

    /// Drops of one reason.
    pub fn reason(&self, r: Reason) -> u64 {
        self.reasons.get(r as usize).copied().unwrap_or(0)
    }
}

type Table<K, V> = HashMap<MapData, Plain<K>, Plain<V>>;

/// The loaded program and its maps.
pub struct Nat64Dataplane {
    program: Ebpf,
    directory: PathBuf,
    settings: Settings,
    warnings: Vec<Nat64Warning>,
    adopted: bool,
    active: Array<MapData, u32>,
    entries: Array<MapData, Plain<Settings>>,
    counters: PerCpuArray<MapData, u64>,
    reasons: PerCpuArray<MapData, u64>,
    bib6: Table<Bib6, Bib4>,
    bib4: Table<Bib4, Bib6>,
    sessions: Table<SessionKey, Session>,
    /// External ports without a session at the last sweep: removed at the next if still so.
    idle: HashSet<Bib4>,
}

impl std::fmt::Debug for Nat64Dataplane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Nat64Dataplane")
            .field("directory", &self.directory)
            .field("adopted", &self.adopted)
            .finish_non_exhaustive()
    }
}

impl Nat64Dataplane {
    /// Loads the program with the maps that are pinned, or with new ones. Traffic of an earlier process's program goes on by
    /// its settings until [`Nat64Dataplane::attach`].
    pub fn open(config: &Nat64Config) -> Result<Self, Nat64Error> {
        let (settings, warnings) = config.settings()?;
        let directory = config.directory();
        fs::create_dir_all(&directory).map_err(|source| Nat64Error::Directory {
            path: directory.clone(),
            source,
        })?;
        let adopted = check_pins(&directory)?;
        let mut program = EbpfLoader::new()
            .default_map_pin_directory(&directory)
            .load(OBJECT)?;
        load_steps(&mut program)?;
        classifier(&mut program, PROGRAM).load()?;
        Ok(Self {
            settings,
            warnings,
            adopted,
            active: table(&mut program, "nat64_active")?,
            entries: table(&mut program, "nat64_settings")?,
            counters: table(&mut program, "nat64_counters")?,
            reasons: table(&mut program, "nat64_reasons")?,
            bib6: table(&mut program, "nat64_bib6")?,
            bib4: table(&mut program, "nat64_bib4")?,
            sessions: table(&mut program, "nat64_sessions")?,
            idle: HashSet::new(),
            program,
            directory,
        })
    }

    /// Whether maps of an earlier process were taken over.
    pub fn adopted(&self) -> bool {
        self.adopted
    }

    /// What is worth telling the operator.
    pub fn warnings(&self) -> &[Nat64Warning] {
        &self.warnings
    }

    /// Attaches to the uplink's ingress, or replaces the program there, and puts the settings in force.
    pub fn attach(&mut self, uplink: &str) -> Result<Mechanism, Nat64Error> {
        self.attach_by(uplink, None)
    }

    /// The same, by this mechanism only.
    pub fn attach_by(
        &mut self,
        uplink: &str,
        only: Option<Mechanism>,
    ) -> Result<Mechanism, Nat64Error> {
        let at = |source: io::Error| Nat64Error::Interface {
            interface: uplink.to_owned(),
            source,
        };
        let index = sys::interface_index(uplink).map_err(at)?;
        let mtu = sys::mtu(uplink).map_err(at)?;
        if mtu < kun_ebpf_abi::translate::MIN_MTU {
            return Err(Nat64Error::Mtu {
                interface: uplink.to_owned(),
                mtu,
            });
        }
        self.settings.uplink = index;
        self.settings.mtu = mtu;
        self.publish()?;
        let pin = self.pin("link", uplink);
        let by = hook::attach(
            classifier(&mut self.program, PROGRAM),
            uplink,
            TcAttachType::Ingress,
            &pin,
            only,
        )?;
        self.pin_steps(uplink)?;
        Ok(by)
    }

    /// Pins the steps in the place of an earlier process's, whose program is off the hook by now: without a pin or a process the
    /// kernel would empty the array.
    fn pin_steps(&self, uplink: &str) -> Result<(), Nat64Error> {
        let path = self.pin("steps", uplink);
        let fresh = self.pin("new_steps", uplink);
        let at = |path: &Path| {
            let path = path.to_owned();
            move |source| Nat64Error::Directory { path, source }
        };
        if fresh.exists() {
            fs::remove_file(&fresh).map_err(at(&fresh))?;
        }
        let steps = self.program.map(STEPS).ok_or_else(|| Nat64Error::Map {
            map: STEPS,
            source: MapError::InvalidName {
                name: STEPS.to_owned(),
            },
        })?;
        steps
            .pin(&fresh)
            .map_err(|source| Nat64Error::Pin { map: STEPS, source })?;
        fs::rename(&fresh, &path).map_err(at(&path))
    }

    fn pin(&self, what: &str, uplink: &str) -> PathBuf {
        self.directory.join(format!("{what}_{}", file_name(uplink)))
    }

    /// Takes the program off the uplink. The maps stay pinned.
    pub fn detach(&mut self, uplink: &str) {
        let pin = self.pin("link", uplink);
        hook::detach(PROGRAM, uplink, Direction::Ingress, &pin);
        let _ = fs::remove_file(self.pin("steps", uplink));
    }

    /// Writes the settings into the entry that is not in force, then names it: no packet sees half of them.
    fn publish(&mut self) -> Result<(), Nat64Error> {
        let of = |map| move |source| Nat64Error::Map { map, source };
        let active = self.active.get(&0, 0).map_err(of("nat64_active"))?;
        let current = self
            .entries
            .get(&(active & 1), 0)
            .map_err(of("nat64_settings"))?;
        if current.0 == self.settings {
            return Ok(());
        }
        let next = (active & 1) ^ 1;
        self.entries
            .set(next, Plain(self.settings), 0)
            .map_err(of("nat64_settings"))?;
        self.active.set(0, next, 0).map_err(of("nat64_active"))
    }

    /// Figures.
    pub fn stats(&self) -> Result<Nat64Stats, Nat64Error> {
        let of = |map| move |source| Nat64Error::Map { map, source };
        let sum = |map: &PerCpuArray<MapData, u64>, name, n: u32| {
            (0..n)
                .map(|i| Ok(map.get(&i, 0).map_err(of(name))?.iter().sum()))
                .collect::<Result<Vec<u64>, Nat64Error>>()
        };
        Ok(Nat64Stats {
            counters: sum(&self.counters, "nat64_counters", COUNTERS)?,
            reasons: sum(&self.reasons, "nat64_reasons", REASONS)?,
            bib: self.bib4.keys().count(),
            sessions: self.sessions.keys().count(),
        })
    }

    /// Removes sessions that are out of time at `now` (CLOCK_BOOTTIME nanoseconds, [`now`]) and the BIB entries that have had
    /// none since the last call. To be called every few seconds. How many sessions went.
    pub fn expire(&mut self, now: u64) -> Result<usize, Nat64Error> {
        let of = |map| move |source| Nat64Error::Map { map, source };
        let mut gone = Vec::new();
        let mut used = HashSet::new();
        // An entry that is replaced while the walk stands on it can be missed or seen twice; the next sweep sees it.
        for (key, session) in self.sessions.iter().flatten() {
            if session.0.expired(now) {
                gone.push(key);
            } else {
                used.insert(Bib4 {
                    port: key.0.port,
                    proto: key.0.proto as u8,
                    pad: 0,
                });
            }
        }
        for key in &gone {
            ignore_absent(self.sessions.remove(key)).map_err(of("nat64_sessions"))?;
        }
        let mut idle = HashSet::new();
        let stale: Vec<_> = self
            .bib4
            .iter()
            .flatten()
            .filter(|(key, _)| !used.contains(&key.0))
            .collect();
        for (key, inner) in stale {
            if !self.idle.contains(&key.0) {
                idle.insert(key.0);
                continue;
            }
            ignore_absent(self.bib6.remove(&inner)).map_err(of("nat64_bib6"))?;
            ignore_absent(self.bib4.remove(&key)).map_err(of("nat64_bib4"))?;
        }
        self.idle = idle;
        Ok(gone.len())
    }

    /// Removes the BIB entries of these inner hosts, and their sessions first: whoever gets an external port next must not have
    /// theirs. How many entries went.
    pub fn forget(&mut self, hosts: &HashSet<Addr>) -> Result<u64, Nat64Error> {
        let of = |map| move |source| Nat64Error::Map { map, source };
        let theirs: Vec<(Bib4, Bib6)> = self
            .bib4
            .iter()
            .flatten()
            .map(|(external, inner)| (external.0, inner.0))
            .filter(|(_, inner)| hosts.contains(&Addr(inner.addr)))
            .collect();
        if theirs.is_empty() {
            return Ok(0);
        }
        let ports: HashSet<(u16, u32)> = theirs
            .iter()
            .map(|(external, _)| (external.port, external.proto.into()))
            .collect();
        let sessions: Vec<Plain<SessionKey>> = self
            .sessions
            .keys()
            .flatten()
            .filter(|key| ports.contains(&(key.0.port, key.0.proto)))
            .collect();
        for key in &sessions {
            ignore_absent(self.sessions.remove(key)).map_err(of("nat64_sessions"))?;
        }
        for (external, inner) in &theirs {
            ignore_absent(self.bib6.remove(&Plain(*inner))).map_err(of("nat64_bib6"))?;
            ignore_absent(self.bib4.remove(&Plain(*external))).map_err(of("nat64_bib4"))?;
        }
        Ok(theirs.len() as u64)
    }

    /// Runs the program on a frame (link header included) without sending anything: for tests and the bench. What came out,
    /// the program's answer and how long it took.
    #[doc(hidden)]
    pub fn test_run(
        &mut self,
        frame: &[u8],
    ) -> Result<(Vec<u8>, i32, std::time::Duration), Nat64Error> {
        let mut out = vec![0; frame.len() + 256];
        let result = classifier(&mut self.program, PROGRAM).test_run(TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            ..TestRunOptions::new()
        })?;
        out.truncate(result.data_size_out as usize);
        Ok((out, result.return_value as i32, result.duration))
    }

    /// Instructions that the verifier went through for the program that took it most, where the kernel tells.
    #[doc(hidden)]
    pub fn verified_instructions(&mut self) -> Option<u32> {
        step::NAMES
            .iter()
            .filter_map(|name| {
                let info = classifier(&mut self.program, name).info().ok()?;
                info.verified_instruction_count()
            })
            .max()
    }

    /// Adds a BIB entry, for tests.
    #[doc(hidden)]
    pub fn seed(&mut self, inner: Bib6, external: Bib4) -> Result<(), Nat64Error> {
        let of = |map| move |source| Nat64Error::Map { map, source };
        self.bib6
            .insert(Plain(inner), Plain(external), 0)
            .map_err(of("nat64_bib6"))?;
        self.bib4
            .insert(Plain(external), Plain(inner), 0)
            .map_err(of("nat64_bib4"))
    }

    /// Removes all BIB entries but these, for tests.
    #[doc(hidden)]
    pub fn retain_bib(&mut self, keep: &[(Bib6, Bib4)]) -> Result<(), Nat64Error> {
        let of = |map| move |source| Nat64Error::Map { map, source };
        let all: Vec<_> = self.bib4.iter().flatten().collect();
        for (external, inner) in all {
            if !keep.contains(&(inner.0, external.0)) {
                ignore_absent(self.bib6.remove(&inner)).map_err(of("nat64_bib6"))?;
                ignore_absent(self.bib4.remove(&external)).map_err(of("nat64_bib4"))?;
            }
        }
        Ok(())
    }

    /// Puts settings in force without an interface, for test runs.
    #[doc(hidden)]
    pub fn configure(&mut self, uplink: u32, mtu: u32) -> Result<Settings, Nat64Error> {
        self.settings.uplink = uplink;
        self.settings.mtu = mtu;
        self.publish()?;
        Ok(self.settings)
    }
}

/// Now, as the program's clock counts.
pub fn now() -> u64 {
    let t = clock_gettime(ClockId::Boottime);
    t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
}

fn ignore_absent(r: Result<(), MapError>) -> Result<(), MapError> {
    match r {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(e)) if e.io_error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn classifier<'a>(program: &'a mut Ebpf, name: &str) -> &'a mut SchedClassifier {
    program
        .program_mut(name)
        .and_then(|p| p.try_into().ok())
        .expect("the object is built together with this crate and has its programs")
}

/// The map of the steps' programs. The kernel keeps its entries while a process holds it or a pin stands.
const STEPS: &str = "nat64_steps";

/// Loads the steps and puts them into their array.
fn load_steps(program: &mut Ebpf) -> Result<(), Nat64Error> {
    let of = |source| Nat64Error::Map { map: STEPS, source };
    let mut fds = Vec::with_capacity(step::NAMES.len());
    for name in step::NAMES {
        let one = classifier(program, name);
        one.load()?;
        fds.push(
            one.fd()?
                .try_clone()
                .map_err(|source| Nat64Error::Interface {
                    interface: name.to_owned(),
                    source,
                })?,
        );
    }
    let map = program.map_mut(STEPS).ok_or(MapError::InvalidName {
        name: STEPS.to_owned(),
    });
    let mut steps = ProgramArray::try_from(map.map_err(of)?).map_err(of)?;
    for (index, fd) in (0..).zip(&fds) {
        steps.set(index, fd, 0).map_err(of)?;
    }
    Ok(())
}

fn table<T: TryFrom<aya::maps::Map, Error = MapError>>(
    program: &mut Ebpf,
    map: &'static str,
) -> Result<T, Nat64Error> {
    let of = |source| Nat64Error::Map { map, source };
    let taken = program.take_map(map).ok_or(MapError::InvalidName {
        name: map.to_owned(),
    });
    T::try_from(taken.map_err(of)?).map_err(of)
}

/// Whether pins stand; refuses maps of another shape, which aya would take unseen.
fn check_pins(directory: &Path) -> Result<bool, Nat64Error> {
    fn size<T>() -> u32 {
        size_of::<T>() as u32
    }
    let shapes = [
        ("nat64_settings", 4, size::<Settings>(), 2),
        ("nat64_active", 4, 4, 1),
        ("nat64_counters", 4, 8, COUNTERS),
        ("nat64_reasons", 4, 8, REASONS),
        ("nat64_bib6", size::<Bib6>(), size::<Bib4>(), MAX_BIB),
        ("nat64_bib4", size::<Bib4>(), size::<Bib6>(), MAX_BIB),
        (
            "nat64_sessions",
            size::<SessionKey>(),
            size::<Session>(),
            MAX_SESSIONS,
        ),
        (
            "nat64_fragments",
            size::<FragmentKey>(),
            size::<Fragment>(),
            MAX_FRAGMENTS,
        ),
    ];
    let mut any = false;
    for (map, key, value, entries) in shapes {
        let path = directory.join(map);
        if !path.exists() {
            continue;
        }
        any = true;
        let info = MapData::from_pin(&path)
            .and_then(|m| m.info())
            .map_err(|source| Nat64Error::Map { map, source })?;
        if (info.key_size(), info.value_size(), info.max_entries()) != (key, value, entries) {
            return Err(Nat64Error::Foreign { path });
        }
    }
    Ok(any)
}
