//! A classifier at an interface's ingress or egress: by a pinned tcx link, or as a clsact filter where the kernel has no tcx
//! (before 6.6). Either way the program stays when the process goes, and attaching again replaces it without a gap.

use std::fs;
use std::io;
use std::path::Path;

use aya::programs::links::{FdLink, LinkError, PinnedLink};
use aya::programs::tc::{
    NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle, qdisc_add_clsact,
};
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, TcAttachType};

use crate::filters::{self, Mark};
use crate::object::Direction;

/// The clsact filter that is ours: priority and handle.
const PRIORITY: u16 = 0x6b;
const HANDLE: u16 = 0x6b;

/// By which mechanism a classifier is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mechanism {
    /// A tcx link, pinned (Linux 6.6).
    Tcx,
    /// A filter of the clsact queueing discipline.
    Clsact,
}

/// What went wrong at attaching.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// The kernel refused.
    #[error("attaching to {interface}: {source}")]
    Attach {
        /// Interface.
        interface: String,
        /// What aya says.
        source: ProgramError,
    },
    /// The link's pin.
    #[error("{path}: {source}")]
    Pin {
        /// Pin.
        path: String,
        /// What aya says.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Attaches, or replaces what an earlier process attached. `pin`: where the link stands. Tries tcx, then clsact, unless told.
pub(crate) fn attach(
    program: &mut SchedClassifier,
    interface: &str,
    direction: TcAttachType,
    pin: &Path,
    only: Option<Mechanism>,
) -> Result<Mechanism, HookError> {
    if only != Some(Mechanism::Clsact) {
        match tcx(program, interface, direction, pin) {
            Ok(()) => return Ok(Mechanism::Tcx),
            Err(e) if only.is_some() || !no_tcx(&e) => return Err(e),
            Err(_) => {}
        }
    }
    let handle = TcHandle::new(0, HANDLE);
    clsact(program, interface, direction, PRIORITY, handle).map_err(|source| {
        HookError::Attach {
            interface: interface.to_owned(),
            source,
        }
    })?;
    Ok(Mechanism::Clsact)
}

/// Whether the kernel does not know tcx: it then answers EINVAL to the attach type.
fn no_tcx(e: &HookError) -> bool {
    matches!(
        e,
        HookError::Attach { source: ProgramError::SyscallError(s), .. }
            if s.io_error.raw_os_error() == Some(libc::EINVAL)
    )
}

fn tcx(
    program: &mut SchedClassifier,
    interface: &str,
    direction: TcAttachType,
    pin: &Path,
) -> Result<(), HookError> {
    let at_pin = |source: Box<dyn std::error::Error + Send + Sync>| HookError::Pin {
        path: pin.display().to_string(),
        source,
    };
    match PinnedLink::from_pin(pin) {
        Ok(old) => {
            let link =
                SchedClassifierLink::try_from(FdLink::from(old)).map_err(|e| at_pin(e.into()))?;
            match program.attach_to_link(link) {
                // The pin holds the link; ours is one more handle on it, which may go.
                Ok(_) => return Ok(()),
                // Its interface is gone and another has the name now.
                Err(ProgramError::SyscallError(s))
                    if s.io_error.raw_os_error() == Some(libc::ENOLINK) =>
                {
                    fs::remove_file(pin).map_err(|e| at_pin(e.into()))?;
                }
                Err(source) => {
                    return Err(HookError::Attach {
                        interface: interface.to_owned(),
                        source,
                    });
                }
            }
        }
        Err(LinkError::SyscallError(s)) if s.io_error.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(at_pin(e.into())),
    }
    let failed = |source| HookError::Attach {
        interface: interface.to_owned(),
        source,
    };
    let id = program
        .attach_with_options(
            interface,
            direction,
            TcAttachOptions::TcxOrder(LinkOrder::default()),
        )
        .map_err(failed)?;
    let link = program.take_link(id).map_err(failed)?;
    let link = FdLink::try_from(link).map_err(|e| at_pin(e.into()))?;
    link.pin(pin).map_err(|e| at_pin(e.into()))?;
    Ok(())
}

/// Makes or replaces the clsact filter of this priority and handle. It stays when this process goes, until the interface does.
pub(crate) fn clsact(
    program: &mut SchedClassifier,
    interface: &str,
    direction: TcAttachType,
    priority: u16,
    handle: TcHandle,
) -> Result<(), ProgramError> {
    match qdisc_add_clsact(interface) {
        Ok(()) => {}
        Err(e) if exists(&e) => {}
        Err(e) => return Err(e.into()),
    }
    let options = TcAttachOptions::Netlink(NlOptions {
        priority,
        handle,
        classid: None,
    });
    let id = match program.attach_with_options(interface, direction, options) {
        Ok(id) => id,
        Err(ProgramError::TcError(e)) if exists(&e) => {
            let old = SchedClassifierLink::attached(interface, direction, priority, handle, None)
                .map_err(TcError::IoError)?;
            program.attach_to_link(old)?
        }
        Err(e) => return Err(e),
    };
    // Dropping the link would remove the filter: it is to stay when this process goes.
    std::mem::forget(program.take_link(id)?);
    Ok(())
}

fn exists(e: &TcError) -> bool {
    match e {
        TcError::NetlinkError(n) => n.raw_os_error() == Some(libc::EEXIST),
        TcError::IoError(e) => e.raw_os_error() == Some(libc::EEXIST),
        _ => false,
    }
}

/// Removes what [`attach`] made; an interface or pin that is gone is no error.
pub(crate) fn detach(program: &str, interface: &str, direction: Direction, pin: &Path) {
    let _ = fs::remove_file(pin);
    let mark = Mark {
        priority: PRIORITY,
        handle: HANDLE,
        program,
    };
    if let Err(error) = filters::remove(interface, direction, &mark) {
        tracing::warn!(interface, program, %error, "a filter stays");
    }
}
