//! What the files say now, against what they said before. Reads files; knows no watches and no time.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hasher};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::MAX_DEPTH;
use super::merge::Merged;
use super::watch::Wake;
use crate::Delta;
use kun_cluster_core::crd::broken_by_change;
use kun_cluster_core::{Interner, Manifest, parse_with};
use kun_config::Faults;

/// A mount is swapped once in a minute at most (the kubelet's sync); one that swaps faster than this is read again when it wakes us.
const MAX_SWAPS: usize = 3;

/// 100,000 Services with their slices in one file are 150 MB; a larger file is not a manifest.
const MAX_FILE: u64 = 256 << 20;

/// Files of one folder: ten times a manifest an object in the largest cluster that a folder makes sense for.
const MAX_FILES: usize = 200_000;

/// Faults told of one file.
const MAX_TOLD: usize = 10;

#[derive(Debug)]
pub(super) struct Scanner {
    root: PathBuf,
    folders: BTreeSet<PathBuf>,
    files: BTreeMap<PathBuf, File>,
    merged: Merged,
    /// Troubles of the walk itself: an unreadable folder.
    walk_troubles: Vec<String>,
    /// Folders were not readable in the last walk: what lies in them may never have been read.
    unread: bool,
    duplicates: Vec<String>,
    told: BTreeSet<String>,
    names: Interner,
}

/// One manifest file.
#[derive(Debug, Default)]
struct File {
    stat: Stat,
    hash: Option<u64>,
    /// As it was when it was last right.
    good: Manifest,
    /// It was right once.
    known: bool,
    troubles: Vec<String>,
}

/// When two are equal nothing was written between them, or within one tick of the file system's clock: those writes are named by
/// inotify.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Stat {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stat {
    fn of(meta: &std::fs::Metadata) -> Self {
        Self {
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.len(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        }
    }
}

impl Scanner {
    pub(super) fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            folders: BTreeSet::new(),
            files: BTreeMap::new(),
            merged: Merged::default(),
            walk_troubles: Vec::new(),
            unread: false,
            duplicates: Vec::new(),
            told: BTreeSet::new(),
            names: Interner::default(),
        }
    }

    /// The folders that were read, as paths to watch.
    pub(super) fn folders(&self) -> &BTreeSet<PathBuf> {
        &self.folders
    }

    /// Walks the folder and reads the files that may have changed; whether any object may have.
    pub(super) fn read_files(&mut self, wake: &Wake) -> bool {
        self.read_with(wake, &mut read_text)
    }

    /// A mount that is swapped (a folder's `..data`, or the root itself) while its files are read would show half of each version:
    /// then they are read once more.
    fn read_with(&mut self, wake: &Wake, read: &mut Read<'_>) -> bool {
        let mut changed = false;
        for _ in 0..=MAX_SWAPS {
            let root = leads(&self.root);
            let mounts = self.read_once(wake, read, &mut changed);
            let stands = |(data, to): (&PathBuf, &PathBuf)| {
                std::fs::read_link(data).is_ok_and(|now| now == *to)
            };
            if leads(&self.root) == root && mounts.iter().all(stands) {
                break;
            }
        }
        changed
    }

    /// Whether every file is as it was when it was read, so that what was read was all there at one moment. Those that somebody is
    /// writing were not read.
    pub(super) fn stands(&self, wake: &Wake) -> bool {
        let mut walk = Walk::default();
        if walk.enter(&self.root, 0).is_err() {
            // Its return is another change.
            return true;
        }
        let read = |path: &PathBuf| !wake.writing.contains(path) && !self.is_kept(&walk, path);
        let then = self.files.iter().filter(|(path, _)| read(path));
        let now = walk.files.iter().filter(|(path, _)| read(path));
        then.map(|(path, file)| (path, file.stat))
            .eq(now.map(|(path, stat)| (path, *stat)))
    }

    /// A file that stays in force though the walk cannot see it.
    fn is_kept(&self, walk: &Walk, path: &Path) -> bool {
        !walk.files.contains_key(path) && walk.is_below_unreadable(path)
    }

    /// One walk and one reading; the `..data` links that the walk met, and where they led when it came by.
    fn read_once(
        &mut self,
        wake: &Wake,
        read: &mut Read<'_>,
        changed: &mut bool,
    ) -> BTreeMap<PathBuf, PathBuf> {
        let mut walk = Walk::default();
        if let Err(error) = walk.enter(&self.root, 0) {
            // A root that is gone for a moment (a swap by two renames, an unmounted volume) takes nothing with it.
            self.walk_troubles = vec![format!(
                "{}: cannot be read ({error}); what was read before stays in force",
                self.root.display()
            )];
            self.unread = true;
            return BTreeMap::new();
        }
        let gone: Vec<PathBuf> = (self.files.keys())
            .filter(|path| !walk.files.contains_key(*path) && !walk.is_below_unreadable(path))
            .cloned()
            .collect();
        *changed |= !gone.is_empty();
        for path in gone {
            self.files.remove(&path);
        }
        for (path, stat) in &walk.files {
            let known = self.files.contains_key(path);
            if wake.writing.contains(path) {
                continue;
            }
            let file = self.files.entry(path.clone()).or_default();
            if known && file.stat == *stat && !wake.all && !wake.dirty.contains(path) {
                continue;
            }
            *changed |= file.read(path, *stat, &mut self.names, read);
        }
        self.folders = walk.folders;
        self.unread = !walk.unreadable.is_empty();
        self.walk_troubles = walk.troubles;
        walk.mounts
    }

    /// Whether every file was right at least once. Too deep a folder is none of ours and was none of an earlier life's.
    pub(super) fn knows_all(&self) -> bool {
        !self.unread && self.files.values().all(|file| file.known)
    }

    /// Puts the files together; what is different from last time.
    pub(super) fn merge(&mut self) -> Vec<Delta> {
        let (deltas, duplicates) = self
            .merged
            .update(self.files.values().map(|file| &file.good));
        self.duplicates = duplicates;
        deltas
    }

    /// Every trouble of the last scan.
    pub(super) fn troubles(&self) -> impl Iterator<Item = &String> {
        self.told.iter()
    }

    /// Troubles that were not there at the last call; one that went away and comes back is told again.
    pub(super) fn new_troubles(&mut self, watch: Option<String>) -> Vec<String> {
        let now: BTreeSet<String> = (self.walk_troubles.iter())
            .chain(self.files.values().flat_map(|f| &f.troubles))
            .chain(&self.duplicates)
            .cloned()
            .chain(watch)
            .collect();
        let new = now.difference(&self.told).cloned().collect();
        self.told = now;
        new
    }
}

impl File {
    /// Reads the file if its contents are new; whether its objects may be others now.
    fn read(&mut self, path: &Path, stat: Stat, names: &mut Interner, read: &mut Read<'_>) -> bool {
        self.stat = stat;
        let text = match read(path, stat.size) {
            Ok(text) => text,
            // Gone between the walk and now: the removal wakes the next scan.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return false,
            Err(error) => {
                self.hash = None;
                self.troubles = vec![format!(
                    "{}: cannot be read ({error}){}",
                    path.display(),
                    self.kept()
                )];
                return false;
            }
        };
        let mut hasher = DefaultHasher::new();
        hasher.write(text.as_bytes());
        let hash = hasher.finish();
        if self.hash == Some(hash) {
            return false;
        }
        self.hash = Some(hash);
        let parsed = parse_with(names, &path.to_string_lossy(), &text);
        match parsed.and_then(|manifest| self.allowed(manifest)) {
            Ok(manifest) => {
                self.troubles.clear();
                self.good = manifest;
                self.known = true;
                true
            }
            Err(faults) => {
                let kept = self.kept();
                let told = faults.0.iter().take(MAX_TOLD);
                self.troubles = told.map(|fault| format!("{fault}{kept}")).collect();
                if faults.0.len() > MAX_TOLD {
                    let more = faults.0.len() - MAX_TOLD;
                    self.troubles
                        .push(format!("{}: {more} faults more", path.display()));
                }
                false
            }
        }
    }

    /// What the file says now, if each object may become that of what it was: as the API server holds an update to its rules. An
    /// object that moves to another file is made anew there.
    fn allowed(&self, manifest: Manifest) -> Result<Manifest, Faults> {
        let was: BTreeMap<_, _> = self.good.objects.iter().map(|o| (o.key(), o)).collect();
        let faults = manifest.objects.iter().flat_map(|object| {
            let broken = (was.get(&object.key())).map(|was| broken_by_change(was, object));
            let broken = broken.unwrap_or_default().into_iter();
            broken.map(|broken| broken.fault(object))
        });
        let faults: Vec<_> = faults.collect();
        match faults.is_empty() {
            true => Ok(manifest),
            false => Err(Faults(faults)),
        }
    }

    fn kept(&self) -> String {
        match self.good.objects.len() + self.good.addresses.len() {
            0 => String::new(),
            n => format!(" (its {n} last good objects stay in force)"),
        }
    }
}

/// How a file of a size is read.
type Read<'r> = dyn FnMut(&Path, u64) -> io::Result<String> + 'r;

/// Where a path ends up, through all links.
fn leads(path: &Path) -> Option<PathBuf> {
    std::fs::canonicalize(path).ok()
}

fn read_text(path: &Path, size: u64) -> io::Result<String> {
    if size > MAX_FILE {
        return Err(io::Error::other(format!(
            "{size} bytes, more than {MAX_FILE}"
        )));
    }
    std::fs::read_to_string(path)
}

#[derive(Default)]
struct Walk {
    files: BTreeMap<PathBuf, Stat>,
    folders: BTreeSet<PathBuf>,
    /// The `..data` link of each folder that has one, and where it led before anything below was looked at.
    mounts: BTreeMap<PathBuf, PathBuf>,
    unreadable: Vec<PathBuf>,
    troubles: Vec<String>,
}

impl Walk {
    fn enter(&mut self, path: &Path, depth: usize) -> io::Result<()> {
        let meta = std::fs::metadata(path)?;
        if !meta.is_dir() {
            self.files.insert(path.to_owned(), Stat::of(&meta));
            return Ok(());
        }
        let data = path.join("..data");
        if let Ok(to) = std::fs::read_link(&data) {
            self.mounts.insert(data, to);
        }
        let entries: Vec<_> = std::fs::read_dir(path)?.collect::<io::Result<_>>()?;
        self.folders.insert(path.to_owned());
        for entry in entries {
            let name = entry.file_name();
            if name.as_encoded_bytes().starts_with(b".") {
                continue;
            }
            let path = entry.path();
            // Follows links. A dangling one, or a file removed meanwhile, is no file.
            let Ok(meta) = std::fs::metadata(&path) else {
                continue;
            };
            if meta.is_dir() {
                self.enter_below(&path, depth + 1);
            } else if meta.is_file() && is_manifest(&path) {
                if self.files.len() == MAX_FILES {
                    self.troubles.push(format!(
                        "{}: more than {MAX_FILES} files; the rest is not read",
                        self.folders.len()
                    ));
                    return Ok(());
                }
                self.files.insert(path, Stat::of(&meta));
            }
        }
        Ok(())
    }

    fn enter_below(&mut self, path: &Path, depth: usize) {
        if depth > MAX_DEPTH {
            self.troubles.push(format!(
                "{}: deeper than {MAX_DEPTH} levels; not read",
                path.display()
            ));
            return;
        }
        if let Err(error) = self.enter(path, depth)
            && error.kind() != io::ErrorKind::NotFound
        {
            self.unreadable.push(path.to_owned());
            self.troubles.push(format!(
                "{}: cannot be read ({error}); what was read there before stays in force",
                path.display()
            ));
        }
    }

    fn is_below_unreadable(&self, path: &Path) -> bool {
        self.unreadable
            .iter()
            .any(|folder| path.starts_with(folder))
    }
}

fn is_manifest(path: &Path) -> bool {
    path.extension()
        .is_some_and(|e| e == "yaml" || e == "yml" || e == "json")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::{Delta, Object};

    /// A ConfigMap's mount with two Services whose ports are the version.
    fn version(mount: &Path, n: u16) {
        let below = mount.join(format!("..version{n}"));
        std::fs::create_dir(&below).unwrap();
        for name in ["a", "b"] {
            let text = format!(
                "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{ports: [{{port: {n}}}]}}\n"
            );
            std::fs::write(below.join(format!("{name}.yaml")), text).unwrap();
        }
    }

    fn swap(mount: &Path, n: u16) {
        symlink(format!("..version{n}"), mount.join("..new")).unwrap();
        std::fs::rename(mount.join("..new"), mount.join("..data")).unwrap();
    }

    fn ports(deltas: Vec<Delta>) -> Vec<u16> {
        let port = |delta| match delta {
            Delta::Upsert(Object::Service(service)) => service.ports[0].port,
            other => panic!("{other:?}"),
        };
        deltas.into_iter().map(port).collect()
    }

    /// Swapped between the first file and the second, at the root and in a sub-folder: never half of each version.
    #[test]
    fn a_mount_that_is_swapped_between_two_files_is_read_once_more() {
        for below in ["", "mounted"] {
            let root = tempfile::tempdir().unwrap();
            let mount = root.path().join(below);
            std::fs::create_dir_all(&mount).unwrap();
            version(&mount, 1);
            version(&mount, 2);
            swap(&mount, 1);
            for name in ["a.yaml", "b.yaml"] {
                symlink(format!("..data/{name}"), mount.join(name)).unwrap();
            }
            let mut scanner = Scanner::new(root.path());
            let mut read = 0;
            scanner.read_with(&Wake::everything(), &mut |path, size| {
                let text = read_text(path, size);
                read += 1;
                if read == 1 {
                    swap(&mount, 2);
                }
                text
            });
            assert_eq!(ports(scanner.merge()), [2, 2], "in {below:?}");
        }
    }
}
