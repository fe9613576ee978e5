//! What this kernel offers, found by trying; what lacks is named with what it costs.

use std::fmt;
use std::os::fd::AsFd;
use std::sync::OnceLock;

use aya::programs::{Program, ProgramError};

use crate::{Error, service, sys};

/// What differs between the kernels that we run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Features {
    /// Links on an interface's hooks (≥ 6.6).
    pub tcx: bool,
    /// bpf_set_retval (≥ 5.18).
    pub set_retval: bool,
}

/// A feature that this kernel lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Missing {
    /// Its name.
    pub feature: &'static str,
    /// The first kernel that has it.
    pub since: &'static str,
    /// What is done instead, and what that costs.
    pub cost: &'static str,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "no {} (kernel ≥ {}): {}",
            self.feature, self.since, self.cost
        )
    }
}

/// A process sees one kernel: it is asked once.
static PROBED: OnceLock<Features> = OnceLock::new();

impl Features {
    /// Tries each, once in a process, with the service object: it has a classifier and a connect hook.
    pub(crate) fn probe() -> Result<Self, Error> {
        if let Some(known) = PROBED.get() {
            return Ok(*known);
        }
        let found = Self::try_each(service::OBJECT, service::bytes())?;
        Ok(*PROBED.get_or_init(|| found))
    }

    fn try_each(object: &'static str, bytes: &[u8]) -> Result<Self, Error> {
        let mut ebpf = aya::EbpfLoader::new()
            .load(bytes)
            .map_err(|source| Error::Object {
                object,
                source: Box::new(source),
            })?;
        let mut features = Features {
            tcx: false,
            set_retval: true,
        };
        for (name, program) in ebpf.programs_mut() {
            let fault = |source: ProgramError| Error::Program {
                object,
                program: name.to_owned(),
                source: Box::new(source),
            };
            match program {
                Program::SchedClassifier(p) if !features.tcx => {
                    p.load().map_err(fault)?;
                    let fd = p.fd().map_err(fault)?.as_fd();
                    // No interface has this index. A kernel that knows tcx says so; another does not know the attach type.
                    let tried =
                        sys::link_create(fd, i32::MAX as u32, sys::attach_type::TCX_INGRESS, 0);
                    features.tcx = tried.is_err_and(|e| e.raw_os_error() == Some(libc::ENODEV));
                }
                // Loading fails if the helper is not there; if for another reason, loading it for use says which.
                Program::CgroupSockAddr(p) if name.starts_with("connect") => {
                    features.set_retval &= p.load().is_ok()
                }
                _ => {}
            }
        }
        Ok(features)
    }

    /// What lacks.
    pub fn missing(&self) -> Vec<Missing> {
        let mut missing = Vec::new();
        if !self.tcx {
            missing.push(Missing {
                feature: "tcx",
                since: "6.6",
                cost: "clsact filters on the uplinks too; they have no links, so a foreign `tc qdisc del` takes them away",
            });
        }
        if !self.set_retval {
            missing.push(Missing {
                feature: "bpf_set_retval",
                since: "5.18",
                cost: "a connect() without endpoint is refused by the loopback address instead of at once",
            });
        }
        missing
    }
}
