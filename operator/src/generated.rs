//! The operator's memory: two files in a sub-folder of the manifest folder, written whole and atomically, readable by people and
//! by every program that follows the folder. One operator at a time, by a lock on a file beside them.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File, TryLockError};
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use kun_cluster::crd::block_name;
use kun_cluster::folder::parse_manifest;
use kun_cluster::{Object, ObjectName};
use kun_config::Faults;
use kun_config::types::BlockId;

use crate::plan::{Assignments, Owner, owner_of};

/// The sub-folder.
pub const FOLDER: &str = "kun-generated";

const BLOCKS: &str = "ipam-blocks.yaml";
const ADDRESSES: &str = "service-addresses.yaml";

/// Why the files cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum GeneratedError {
    /// The manifest folder is a single file.
    #[error("{}: is a file; the operator writes into {FOLDER}/ below a folder: give a folder as cluster.folder", .0.display())]
    NotAFolder(PathBuf),
    /// Another operator holds the lock.
    #[error("{}: another kun-operator works on this folder; stop it first", .0.display())]
    Locked(PathBuf),
    /// The system refuses.
    #[error("{}: {what} failed ({source}); the operator needs to write there", path.display())]
    Io {
        /// File or folder.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// The system's word.
        source: io::Error,
    },
    /// Somebody edited a file and it is wrong now: going on would forget assignments.
    #[error(
        "{0}\nmend the file, or restore it: the operator does not overwrite what it cannot read"
    )]
    Faults(Faults),
    /// A file holds what the operator never writes there.
    #[error("{}: holds other objects than the operator's; move them to a file of their own", .0.display())]
    Foreign(PathBuf),
}

fn failed(path: &Path, what: &'static str) -> impl FnOnce(io::Error) -> GeneratedError {
    let path = path.to_owned();
    move |source| GeneratedError::Io { path, what, source }
}

/// The two files, held by this process alone.
#[derive(Debug)]
pub struct Generated {
    folder: PathBuf,
    held: Assignments,
    _lock: File,
}

impl Generated {
    /// Takes the lock and reads what was assigned before. Makes the sub-folder if it is not there.
    pub fn open(manifests: &Path) -> Result<Self, GeneratedError> {
        if manifests.is_file() {
            return Err(GeneratedError::NotAFolder(manifests.to_owned()));
        }
        let folder = manifests.join(FOLDER);
        fs::create_dir_all(&folder).map_err(failed(&folder, "making the folder"))?;
        // Begins with a dot, so that the folder source does not read it.
        let path = folder.join(".lock");
        let lock = File::create(&path).map_err(failed(&path, "making the lock file"))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(GeneratedError::Locked(path)),
            Err(TryLockError::Error(source)) => return Err(failed(&path, "locking")(source)),
        }
        let mut held = Assignments::default();
        read(&folder.join(BLOCKS), &mut held)?;
        read(&folder.join(ADDRESSES), &mut held)?;
        Ok(Self {
            folder,
            held,
            _lock: lock,
        })
    }

    /// What stands in the files.
    pub fn assignments(&self) -> &Assignments {
        &self.held
    }

    /// Makes the files say `wanted`; a file that already does is not touched. Durable when this returns.
    pub fn write(&mut self, wanted: &Assignments) -> Result<(), GeneratedError> {
        if wanted.blocks != self.held.blocks {
            self.replace(BLOCKS, &blocks_text(&wanted.blocks))?;
            self.held.blocks.clone_from(&wanted.blocks);
        }
        if wanted.addresses != self.held.addresses {
            self.replace(ADDRESSES, &addresses_text(&wanted.addresses))?;
            self.held.addresses.clone_from(&wanted.addresses);
        }
        Ok(())
    }

    fn replace(&self, name: &str, text: &str) -> Result<(), GeneratedError> {
        let (path, new) = (
            self.folder.join(name),
            self.folder.join(format!(".{name}.new")),
        );
        let mut file = File::create(&new).map_err(failed(&new, "writing"))?;
        file.write_all(text.as_bytes())
            .map_err(failed(&new, "writing"))?;
        file.sync_all().map_err(failed(&new, "syncing"))?;
        fs::rename(&new, &path).map_err(failed(&path, "replacing"))?;
        File::open(&self.folder)
            .and_then(|f| f.sync_all())
            .map_err(failed(&self.folder, "syncing"))
    }
}

fn read(path: &Path, held: &mut Assignments) -> Result<(), GeneratedError> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(path, "reading")(error)),
    };
    let manifest =
        parse_manifest(&path.to_string_lossy(), &text).map_err(GeneratedError::Faults)?;
    for object in manifest.objects {
        let Object::IpamBlock(block) = object else {
            return Err(GeneratedError::Foreign(path.to_owned()));
        };
        held.blocks.insert(block.block(), owner_of(&block));
    }
    for address in manifest.addresses {
        held.addresses.insert(address.meta.name, address.addresses);
    }
    Ok(())
}

const HEAD: &str =
    "# Written by kun-operator, and its memory: an assignment stays as long as it stands here.\n";

/// Names are written as JSON strings, which are YAML whatever is in them.
fn quoted(text: &str) -> serde_json::Value {
    serde_json::Value::from(text)
}

fn blocks_text(blocks: &BTreeMap<BlockId, Owner>) -> String {
    let mut text = HEAD.to_owned();
    for (block, owner) in blocks {
        let (first, name) = (block.first(), block_name(*block));
        // Writing to a String cannot fail.
        let _ = write!(
            text,
            "---\napiVersion: kun.network/v1alpha1\nkind: IPAMBlock\nmetadata:\n  name: {name}\nspec:\n  first: {first}\n  node: {}\n",
            quoted(&owner.node)
        );
    }
    text
}

fn addresses_text(addresses: &BTreeMap<ObjectName, Vec<IpAddr>>) -> String {
    let mut text = HEAD.to_owned();
    for (service, list) in addresses {
        let list: Vec<String> = list.iter().map(|a| format!("\"{a}\"")).collect();
        let _ = write!(
            text,
            "---\napiVersion: kun.network/v1alpha1\nkind: ServiceAddress\nmetadata:\n  namespace: {}\n  name: {}\nspec:\n  addresses: [{}]\n",
            quoted(&service.namespace),
            quoted(&service.name),
            list.join(", ")
        );
    }
    text
}
