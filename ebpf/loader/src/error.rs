//! What can go wrong between the agent and the kernel.

use std::io;
use std::path::PathBuf;

/// A fault of the dataplane; `Display` is one line for a person.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no bpffs to pin in.
    #[error("{path} is not on a bpffs; `mount -t bpf bpf {path}` makes one")]
    NotBpffs {
        /// `agent.bpffsRoot`.
        path: PathBuf,
    },
    /// A file or directory.
    #[error("{path}: {source}")]
    Path {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A pinned map is of another layout: made by a program that shares the pin path and not the ABI.
    #[error(
        "{path}: pinned map has type {found_type}, key {found_key} and value {found_value} bytes, flags {found_flags:#x}; \
         this version wants {want_type}, {want_key}, {want_value}, {want_flags:#x}; remove it to start empty"
    )]
    Layout {
        /// The pin.
        path: PathBuf,
        /// `enum bpf_map_type`.
        found_type: u32,
        /// Bytes.
        found_key: u32,
        /// Bytes.
        found_value: u32,
        /// Flags of its creation.
        found_flags: u32,
        /// As above, wanted.
        want_type: u32,
        /// As above, wanted.
        want_key: u32,
        /// As above, wanted.
        want_value: u32,
        /// As above, wanted.
        want_flags: u32,
    },
    /// The object does not load: no privilege, no memory, or a map that the kernel refuses.
    #[error(
        "{object}.o: {source}; it needs root (CAP_BPF, CAP_NET_ADMIN) and a kernel of 5.15 or later"
    )]
    Object {
        /// Which.
        object: &'static str,
        /// What aya said.
        source: Box<aya::EbpfError>,
    },
    /// The verifier refuses a program.
    #[error("{object}.o: program {program}: {source}")]
    Program {
        /// Which object.
        object: &'static str,
        /// Which program.
        program: String,
        /// What aya said.
        source: Box<aya::programs::ProgramError>,
    },
    /// The object lacks what this loader expects of it: it was built from other sources.
    #[error("{object}.o holds no {kind} {name}")]
    Absent {
        /// Which object.
        object: &'static str,
        /// "map" or "program".
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// A program cannot be attached.
    #[error("cannot attach {program} to {target}: {source}")]
    Attach {
        /// Which.
        program: String,
        /// An interface's name or a cgroup's path.
        target: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A filter of ours cannot be taken off an interface.
    #[error("cannot take the filter {program} off {interface}: {source}")]
    Detach {
        /// Its program.
        program: String,
        /// The interface.
        interface: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A map operation.
    #[error("map {map}: {operation}: {source}")]
    Map {
        /// Which.
        map: &'static str,
        /// What was tried.
        operation: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// An index behind the end of an array.
    #[error(
        "map {map}: index {index} of {capacity}; raise the limit in `proxy` and remove the pins"
    )]
    Capacity {
        /// Which.
        map: &'static str,
        /// The first index that does not fit.
        index: u64,
        /// Entries.
        capacity: u64,
    },
}
