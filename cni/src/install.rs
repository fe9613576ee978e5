//! Puts the plugin, its `kun.yaml` and the network configuration list on a host, and takes them away again.
//!
//! A host may lose power, and an installer may be killed, between any two steps: each name holds the old file or the new one, whole,
//! and a runtime that sees a new list finds everything that the list names. Hence one order: plugin, `kun.yaml`, list; and away in
//! reverse. A file is written under a name that no runtime reads, synced, closed (a file that is open for writing cannot be executed:
//! ETXTBSY), renamed, and its directory is synced before the next file is begun. Whoever executes the old plugin keeps it.
//!
//! Other plugins' files are left alone. Governing: CNI 1.1.0 §1; libcni reads `*.conflist`, `*.conf` and `*.json` of its directory in
//! the order of their names, and a runtime takes the first.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// The plugin's name in its directory, and its `type` in a list.
pub const PLUGIN: &str = "kun-cni";

/// The list's name unless another is given.
pub const LIST: &str = "10-kun.conflist";

/// `kun.yaml` as the plugin reads it, below the directory of the lists: one level down, where no runtime looks for lists.
const CONFIG: &str = "kun/kun.yaml";

/// What is being written has the name of what it will be, a dot before it and this behind: libcni's extensions do not match.
const UNFINISHED: &str = ".kun-new";

/// A list of a long chain has a few kilobytes.
const MAX_LIST: u64 = 1 << 20;

/// How long an installer waits for another one, which has a few files to write.
const LOCKED_WITHIN: Duration = Duration::from_secs(10);

/// Why the host is not as it should be. What stood before still stands.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// The system refuses.
    #[error("{}: {what} failed ({source})", path.display())]
    Io {
        /// File or directory.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// The system's word.
        source: io::Error,
    },
    /// Another installer is at work and does not end.
    #[error("{}: another installer holds this directory since {LOCKED_WITHIN:?}; stop it", .0.display())]
    Busy(PathBuf),
    /// Somebody else's file has our name.
    #[error("{}: is not kun's: none of its plugins has `\"type\": \"{PLUGIN}\"`; move it away, or give the list another --name", .0.display())]
    Foreign(PathBuf),
    /// The list cannot be used.
    #[error("{}: {wrong}; {right}", path.display())]
    List {
        /// As given.
        path: PathBuf,
        /// What is wrong.
        wrong: String,
        /// What would be right.
        right: String,
    },
    /// The name of the list.
    #[error(
        "`{0}` is no name for a list: one file name that ends in `.conflist` and begins with no dot"
    )]
    Name(String),
}

fn failed(path: &Path, what: &'static str) -> impl FnOnce(io::Error) -> InstallError {
    let path = path.to_owned();
    move |source| InstallError::Io { path, what, source }
}

/// A file as it is to stand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    path: PathBuf,
    bytes: Vec<u8>,
    mode: u32,
}

impl Wanted {
    /// The plugin, executable, in `bin_dir`.
    pub fn plugin(bin_dir: &Path, executable: &Path) -> Result<Self, InstallError> {
        Ok(Self {
            path: bin_dir.join(PLUGIN),
            bytes: fs::read(executable).map_err(failed(executable, "reading"))?,
            mode: 0o755,
        })
    }

    /// Where it stands.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it holds.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    fn unfinished(&self) -> PathBuf {
        let mut name = std::ffi::OsString::from(".");
        name.push(self.path.file_name().unwrap_or_default());
        name.push(UNFINISHED);
        self.path.with_file_name(name)
    }

    fn directory(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new("/"))
    }

    /// Whether it stands already. A link is replaced: what it points to is not ours to write.
    fn stands(&self) -> Result<bool, InstallError> {
        let meta = match fs::symlink_metadata(&self.path) {
            Ok(meta) => meta,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(failed(&self.path, "looking")(e)),
        };
        let alike = meta.is_file()
            && meta.len() == self.bytes.len() as u64
            && meta.permissions().mode() & 0o7777 == self.mode;
        Ok(alike && fs::read(&self.path).map_err(failed(&self.path, "reading"))? == self.bytes)
    }
}

/// The list and the `kun.yaml` that it names, for a runtime that reads `conf_dir`.
#[derive(Debug, Clone)]
pub struct Lists {
    conf_dir: PathBuf,
    name: String,
}

impl Lists {
    /// `name` decides before or after which other lists the runtime sees this one.
    pub fn new(conf_dir: &Path, name: &str) -> Result<Self, InstallError> {
        let plain = name.ends_with(".conflist") && !name.starts_with('.') && !name.contains('/');
        if !plain {
            return Err(InstallError::Name(name.to_owned()));
        }
        Ok(Self {
            conf_dir: conf_dir.to_owned(),
            name: name.to_owned(),
        })
    }

    fn list(&self) -> PathBuf {
        self.conf_dir.join(&self.name)
    }

    fn config(&self) -> PathBuf {
        self.conf_dir.join(CONFIG)
    }

    /// Both files, in the order in which they are placed. `list` is a list that somebody wrote; without it: kun alone.
    pub fn wanted(&self, config: &str, list: Option<&Path>) -> Result<[Wanted; 2], InstallError> {
        let text = match list {
            Some(path) => self.read(path)?,
            None => self.plain(),
        };
        let file = |path, text: &str| Wanted {
            path,
            bytes: text.as_bytes().to_vec(),
            mode: 0o644,
        };
        Ok([file(self.config(), config), file(self.list(), &text)])
    }

    fn plain(&self) -> String {
        // A runtime that knows `cniVersions` takes the newest that it speaks (§1). One that does not would refuse a result of 1.1.0 once
        // the pod's interfaces stand: Debian 12's containerd and podman.
        let list = json!({
            "cniVersion": "1.0.0",
            "cniVersions": ["1.0.0", "1.1.0"],
            "name": "kun",
            "plugins": [{
                "type": PLUGIN,
                "kunConfig": self.config(),
                // All that kun-cni acts on; a runtime hands over nothing that is not named here.
                "capabilities": {
                    "bandwidth": true, "dns": true, "io.kubernetes.cri.pod-annotations": true, "ipRanges": true, "ips": true,
                    "mac": true, "portMappings": true,
                },
            }],
        });
        format!("{list:#}\n")
    }

    /// A list of somebody's own, with further plugins perhaps. The runtime would find a wrong one at the first pod.
    fn read(&self, path: &Path) -> Result<String, InstallError> {
        let text = read_list(path)?;
        let refused = |wrong: String, right: String| InstallError::List {
            path: path.to_owned(),
            wrong,
            right,
        };
        let list: Value = serde_json::from_str(&text).map_err(|e| {
            refused(
                format!("not JSON ({e})"),
                "it is one network configuration list (CNI §1)".to_owned(),
            )
        })?;
        let Some(ours) = plugins(&list).find(|p| p["type"] == PLUGIN) else {
            return Err(refused(
                format!("no plugin has the type `{PLUGIN}`"),
                format!("give `plugins` one entry with `\"type\": \"{PLUGIN}\"`"),
            ));
        };
        let config = self.config();
        if ours["kunConfig"].as_str().map(Path::new) != Some(&config) {
            return Err(refused(
                format!("kunConfig is {}", ours["kunConfig"]),
                format!("kun.yaml is placed at {}: write that", config.display()),
            ));
        }
        Ok(text)
    }

    /// Lists that the runtime sees before this one, and takes instead.
    pub fn before(&self) -> Vec<PathBuf> {
        let known = |p: &PathBuf| {
            p.extension()
                .is_some_and(|e| e == "conflist" || e == "conf" || e == "json")
        };
        let mut files: Vec<PathBuf> = fs::read_dir(&self.conf_dir)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .filter(|p| known(p) && p.file_name() < Some(self.name.as_ref()))
            .collect();
        files.sort();
        files
    }

    /// Whether a file of our name may be replaced or removed.
    fn is_ours(path: &Path) -> bool {
        read_list(path)
            .ok()
            .and_then(|text| serde_json::from_str::<Value>(&text).ok())
            .is_some_and(|list| plugins(&list).any(|p| p["type"] == PLUGIN))
    }
}

fn read_list(path: &Path) -> Result<String, InstallError> {
    let mut text = String::new();
    File::open(path)
        .and_then(|file| file.take(MAX_LIST).read_to_string(&mut text))
        .map_err(failed(path, "reading"))?;
    Ok(text)
}

fn plugins(list: &Value) -> impl Iterator<Item = &Value> {
    list["plugins"].as_array().into_iter().flatten()
}

/// What an installer does, one after the other; it may die before any of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step<'a> {
    /// What an installer that was killed had begun goes.
    Clear(&'a Path),
    /// The new file stands whole under its unfinished name, on the disk.
    Write(&'a Wanted),
    /// It has its name.
    Publish(&'a Wanted),
    /// The name is gone.
    Remove(&'a Path),
    /// The names in a directory are on the disk.
    Sync(&'a Path),
}

impl Step<'_> {
    fn apply(self) -> Result<(), InstallError> {
        match self {
            Self::Clear(path) | Self::Remove(path) => match fs::remove_file(path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed(path, "removing")(e)),
                _ => Ok(()),
            },
            Self::Write(file) => {
                let path = file.unfinished();
                let mut unfinished = OpenOptions::new()
                    .write(true)
                    .create_new(true)
                    .mode(file.mode)
                    .open(&path)
                    .map_err(failed(&path, "making"))?;
                unfinished
                    .write_all(&file.bytes)
                    .map_err(failed(&path, "writing"))?;
                // What `open` gave is what the umask left of it.
                unfinished
                    .set_permissions(fs::Permissions::from_mode(file.mode))
                    .map_err(failed(&path, "setting the mode of"))?;
                unfinished.sync_all().map_err(failed(&path, "syncing"))
            }
            Self::Publish(file) => {
                fs::rename(file.unfinished(), &file.path).map_err(failed(&file.path, "replacing"))
            }
            Self::Sync(directory) => File::open(directory)
                .and_then(|d| d.sync_all())
                .map_err(failed(directory, "syncing")),
        }
    }
}

/// Makes `files` stand, in their order; what stands already is not touched. `before` hears of each step ahead of it. Returns what
/// was written.
pub fn install(
    files: &[Wanted],
    mut before: impl FnMut(Step<'_>),
) -> Result<Vec<&Path>, InstallError> {
    let mut take = |step: Step<'_>| {
        before(step);
        step.apply()
    };
    let mut written = Vec::new();
    for file in files {
        let directory = file.directory();
        make(directory)?;
        let _held = lock(directory)?;
        let unfinished = file.unfinished();
        if unfinished.symlink_metadata().is_ok() {
            take(Step::Clear(&unfinished))?;
        }
        if file.stands()? {
            continue;
        }
        let is_list = file.path.extension().is_some_and(|e| e == "conflist");
        if is_list && file.path.exists() && !Lists::is_ours(&file.path) {
            return Err(InstallError::Foreign(file.path.clone()));
        }
        take(Step::Write(file))?;
        take(Step::Publish(file))?;
        take(Step::Sync(directory))?;
        written.push(file.path.as_path());
    }
    Ok(written)
}

/// Takes away what [`install`] placed: the list first, so that no runtime calls a plugin that is gone. Pods that are still attached
/// could not be deleted without the plugin: give `bin_dir` only when none is.
pub fn uninstall(
    lists: Option<&Lists>,
    bin_dir: Option<&Path>,
    mut before: impl FnMut(Step<'_>),
) -> Result<Vec<PathBuf>, InstallError> {
    let mut removed = Vec::new();
    if let Some(lists) = lists {
        let list = lists.list();
        if list.symlink_metadata().is_ok() && !Lists::is_ours(&list) {
            return Err(InstallError::Foreign(list));
        }
        removed.extend(remove(list, &mut before)?);
        removed.extend(remove(lists.config(), &mut before)?);
        // Empty now, unless somebody keeps a file of their own in it.
        let _ = fs::remove_dir(lists.conf_dir.join("kun"));
    }
    if let Some(directory) = bin_dir {
        removed.extend(remove(directory.join(PLUGIN), &mut before)?);
    }
    Ok(removed)
}

fn remove(
    path: PathBuf,
    before: &mut impl FnMut(Step<'_>),
) -> Result<Option<PathBuf>, InstallError> {
    let file = Wanted {
        path,
        bytes: Vec::new(),
        mode: 0,
    };
    let directory = file.directory();
    if !directory.is_dir() {
        return Ok(None);
    }
    let _held = lock(directory)?;
    let mut there = false;
    for path in [file.unfinished(), file.path.clone()] {
        if path.symlink_metadata().is_ok() {
            before(Step::Remove(&path));
            Step::Remove(&path).apply()?;
            there = true;
        }
    }
    if there {
        before(Step::Sync(directory));
        Step::Sync(directory).apply()?;
    }
    Ok(there.then_some(file.path))
}

/// A directory that is not there is made, and stays.
fn make(directory: &Path) -> Result<(), InstallError> {
    if directory.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(directory).map_err(failed(directory, "making the directory"))?;
    let parent = directory.parent().unwrap_or(Path::new("/"));
    Step::Sync(parent).apply()
}

/// Two installers, an old one that ends and a new one that begins, take turns. The lock is the directory's own, so that no file of
/// it lies about, and goes with the process.
fn lock(directory: &Path) -> Result<File, InstallError> {
    let held = File::open(directory).map_err(failed(directory, "opening"))?;
    let end = Instant::now() + LOCKED_WITHIN;
    loop {
        match held.try_lock() {
            Ok(()) => return Ok(held),
            Err(TryLockError::WouldBlock) if Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(TryLockError::WouldBlock) => return Err(InstallError::Busy(directory.to_owned())),
            Err(TryLockError::Error(e)) => return Err(failed(directory, "locking")(e)),
        }
    }
}
