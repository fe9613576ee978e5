//! Where maps and links are pinned, and whether what is pinned there can be taken over.
//!
//! `<bpffs_root>/v{ABI}/<object>/maps/<map>` and `…/links/<program>[:<interface>]`. The ABI version is in the path, so another
//! version finds nothing and starts empty; what it replaces it removes once it serves itself. bpffs refuses dots in names; an interface's dot is written `%2E`.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use kun_ebpf_abi::ABI_VERSION;

use crate::Error;
use crate::sys;

const BPF_FS_MAGIC: u64 = 0xcafe_4a11;

/// What a map must be like.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MapSpec {
    pub(crate) name: &'static str,
    pub(crate) map_type: u32,
    pub(crate) key: usize,
    pub(crate) value: usize,
    pub(crate) flags: u32,
    /// Capacity when it is made; an adopted map keeps its own.
    pub(crate) max_entries: u32,
}

/// A map that was adopted with another capacity than the configuration asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptCapacity {
    /// Which.
    pub map: String,
    /// What it has.
    pub has: u32,
    /// What was asked for.
    pub wanted: u32,
}

/// Removes what agents of other ABI versions have pinned below `root`: their links detach, their maps are freed. Gives the
/// versions. For when this version's programs do all that theirs did. One that is killed meanwhile leaves a version's directory,
/// which goes last, to the next.
pub fn remove_other_versions(root: &Path) -> Result<Vec<u32>, Error> {
    let at = |path: &Path| {
        let path = path.to_owned();
        move |source| Error::Path { path, source }
    };
    let entries = match fs::read_dir(root) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(at(root)(e)),
    };
    let mut removed = Vec::new();
    for entry in entries {
        let entry = entry.map_err(at(root))?;
        let name = entry.file_name();
        let version = name.to_str().and_then(|name| name.strip_prefix('v'));
        // Anything else there is not ours.
        let Some(version) = version.and_then(|digits| digits.parse().ok()) else {
            continue;
        };
        if version != ABI_VERSION {
            let path = entry.path();
            fs::remove_dir_all(&path).map_err(at(&path))?;
            removed.push(version);
        }
    }
    removed.sort_unstable();
    Ok(removed)
}

/// The directories of one object.
#[derive(Debug, Clone)]
pub(crate) struct Pins {
    dir: PathBuf,
}

impl Pins {
    /// Makes the directories, on a bpffs.
    pub(crate) fn open(root: &Path, object: &str, mount: bool) -> Result<Self, Error> {
        let at = |path: &Path| {
            let path = path.to_owned();
            move |source| Error::Path { path, source }
        };
        if !is_bpffs(root) {
            if !mount {
                return Err(Error::NotBpffs {
                    path: root.to_owned(),
                });
            }
            fs::create_dir_all(root).map_err(at(root))?;
            rustix::mount::mount("bpf", root, "bpf", rustix::mount::MountFlags::empty(), None)
                .map_err(|e| at(root)(e.into()))?;
        }
        let pins = Pins {
            dir: Self::directory(root, object),
        };
        for dir in [pins.dir.join("maps"), pins.links()] {
            fs::create_dir_all(&dir).map_err(at(&dir))?;
        }
        Ok(pins)
    }

    /// Removes everything that an object has pinned below `root`: its links detach, its maps are freed.
    pub(crate) fn remove(root: &Path, object: &str) -> Result<(), Error> {
        let dir = Self::directory(root, object);
        match fs::remove_dir_all(&dir) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(Error::Path { path: dir, source })
            }
            _ => {
                // The version's own directory goes with its last object; another object still being there is no fault.
                let _ = fs::remove_dir(root.join(format!("v{ABI_VERSION}")));
                Ok(())
            }
        }
    }

    fn directory(root: &Path, object: &str) -> PathBuf {
        root.join(format!("v{ABI_VERSION}")).join(object)
    }

    pub(crate) fn map(&self, name: &str) -> PathBuf {
        self.dir.join("maps").join(name)
    }

    pub(crate) fn links(&self) -> PathBuf {
        self.dir.join("links")
    }

    /// `interface`: `None` for a cgroup's.
    pub(crate) fn link(&self, program: &str, interface: Option<&str>) -> PathBuf {
        self.links().join(match interface {
            Some(interface) => format!("{program}:{}", file_name(interface)),
            None => program.to_owned(),
        })
    }

    /// The pinned links: path, program, interface.
    pub(crate) fn pinned_links(&self) -> Result<Vec<(PathBuf, String, Option<String>)>, Error> {
        let dir = self.links();
        let fault = |source| Error::Path {
            path: dir.clone(),
            source,
        };
        let mut found = Vec::new();
        for entry in fs::read_dir(&dir).map_err(fault)? {
            let entry = entry.map_err(fault)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let (program, interface) = match name.split_once(':') {
                Some((program, interface)) => (
                    program.to_owned(),
                    Some(interface.replace("%2E", ".").replace("%25", "%")),
                ),
                None => (name, None),
            };
            found.push((entry.path(), program, interface));
        }
        found.sort();
        Ok(found)
    }

    /// Looks at the pinned maps before they are used: a layout that does not match is an error, a capacity that does not is
    /// told. Returns how many there are.
    pub(crate) fn check(&self, specs: &[MapSpec]) -> Result<(u32, Vec<KeptCapacity>), Error> {
        let mut adopted = 0;
        let mut kept = Vec::new();
        for spec in specs {
            let path = self.map(spec.name);
            let fault = |source| Error::Path {
                path: path.clone(),
                source,
            };
            let Some(fd) = sys::obj_get(&path).map_err(fault)? else {
                continue;
            };
            let found = sys::map_info(fd.as_fd()).map_err(fault)?;
            if (
                found.map_type,
                found.key_size as usize,
                found.value_size as usize,
                found.map_flags,
            ) != (spec.map_type, spec.key, spec.value, spec.flags)
            {
                return Err(Error::Layout {
                    path,
                    found_type: found.map_type,
                    found_key: found.key_size,
                    found_value: found.value_size,
                    found_flags: found.map_flags,
                    want_type: spec.map_type,
                    want_key: spec.key as u32,
                    want_value: spec.value as u32,
                    want_flags: spec.flags,
                });
            }
            adopted += 1;
            if found.max_entries != spec.max_entries {
                kept.push(KeptCapacity {
                    map: spec.name.to_owned(),
                    has: found.max_entries,
                    wanted: spec.max_entries,
                });
            }
        }
        Ok((adopted, kept))
    }
}

/// An interface's name as part of a file's: bpffs takes no dots (`bond0.100`).
pub(crate) fn file_name(interface: &str) -> String {
    interface.replace('%', "%25").replace('.', "%2E")
}

fn is_bpffs(path: &Path) -> bool {
    rustix::fs::statfs(path).is_ok_and(|s| s.f_type as u64 & 0xffff_ffff == BPF_FS_MAGIC)
}
