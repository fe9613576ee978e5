//! From the programs' sources to BPF objects, reproducibly: what an object is made of, the compiler that makes it, the manifest.
//!
//! Used by the loader's `build.rs` (take the committed object when its sources are unchanged, else compile) and by
//! `cargo xtask ebpf` (compile and commit). It refuses any other compiler than [`RUST`] and [`BPF_LINKER`]: another version
//! makes other bytes. It downloads nothing; `cargo xtask setup --ebpf` does that.

mod canonical;

use std::collections::BTreeMap;
use std::env;
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest, Sha256};

/// The Rust release whose compiler and `core` sources make the objects; also that of `rust-toolchain.toml`.
pub const RUST: &str = "1.95.0";
/// The last bpf-linker that links with rustc's own LLVM: it needs no LLVM of the system.
pub const BPF_LINKER: &str = "0.10.3";
/// The compilation target.
pub const TARGET: &str = "bpfel-unknown-none";

/// One object: a `[[bin]]` of `ebpf/programs`.
#[derive(Debug, Clone, Copy)]
pub struct Object {
    /// Name of the bin; the file is `prebuilt/{name}.o`.
    pub name: &'static str,
    /// Path prefixes (from the repository's root) of sources that do not reach this object.
    foreign: &'static [&'static str],
}

/// All objects.
pub const OBJECTS: [Object; 3] = [
    Object {
        name: "service",
        foreign: &[
            "ebpf/abi/src/bandwidth",
            "ebpf/abi/src/nat64",
            "ebpf/abi/src/translate",
            "ebpf/programs/src/bandwidth",
            "ebpf/programs/src/nat64",
        ],
    },
    Object {
        name: "nat64",
        foreign: &[
            "ebpf/abi/src/bandwidth",
            "ebpf/abi/src/service",
            "ebpf/programs/src/bandwidth",
            "ebpf/programs/src/service",
        ],
    },
    Object {
        name: "bandwidth",
        foreign: &[
            "ebpf/abi/src/nat64",
            "ebpf/abi/src/service",
            "ebpf/abi/src/translate",
            "ebpf/programs/src/nat64",
            "ebpf/programs/src/service",
        ],
    },
];

/// Why an object cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the sources or of the cache.
    #[error("{path}: {source}")]
    Io {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A piece of the toolchain is not installed.
    #[error("{what} not found at {path}; run `cargo xtask setup --ebpf`")]
    Missing {
        /// Which piece.
        what: &'static str,
        /// Where it was looked for.
        path: PathBuf,
    },
    /// The compiler is another release.
    #[error(
        "the eBPF programs need rustc {RUST}, `rustc --version` says {found:?}; run `cargo xtask setup --ebpf`"
    )]
    Compiler {
        /// What it says.
        found: String,
    },
    /// The programs do not compile.
    #[error("the eBPF programs do not compile:\n{stderr}")]
    Compile {
        /// The compiler's words.
        stderr: String,
    },
}

fn io_at(path: &Path) -> impl FnOnce(io::Error) -> Error + '_ {
    move |source| Error::Io {
        path: path.to_owned(),
        source,
    }
}

/// Where kun keeps what it downloads or builds once: `$KUN_CACHE`, else `$XDG_CACHE_HOME/kun`, else `~/.cache/kun`.
pub fn cache_dir() -> PathBuf {
    let from = |name: &str| {
        env::var_os(name)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    };
    from("KUN_CACHE")
        .or_else(|| from("XDG_CACHE_HOME").map(|d| d.join("kun")))
        .or_else(|| from("HOME").map(|d| d.join(".cache/kun")))
        .unwrap_or_else(|| PathBuf::from("/var/cache/kun"))
}

/// The installed toolchain.
#[derive(Debug, Clone)]
pub struct Toolchain {
    /// The `bpf-linker` program.
    pub linker: PathBuf,
    /// `library/` of the Rust sources.
    pub library: PathBuf,
}

impl Toolchain {
    /// Where the pieces belong, there or not.
    pub fn expected() -> Self {
        let cache = cache_dir();
        Toolchain {
            linker: cache.join("bpf-linker/bin/bpf-linker"),
            library: cache.join(format!("rust-src-{RUST}")),
        }
    }

    /// Finds it complete, or says what is missing.
    pub fn locate() -> Result<Self, Error> {
        let toolchain = Self::expected();
        if !toolchain.linker.is_file() {
            return Err(Error::Missing {
                what: "bpf-linker",
                path: toolchain.linker,
            });
        }
        if !toolchain.library.join("core/src/lib.rs").is_file() {
            return Err(Error::Missing {
                what: "the source of Rust's core library",
                path: toolchain.library,
            });
        }
        let version = Command::new(rustc())
            .arg("--version")
            .output()
            .map_err(io_at(Path::new("rustc")))?;
        let found = String::from_utf8_lossy(&version.stdout).trim().to_owned();
        if found.split(' ').nth(1) != Some(RUST) {
            return Err(Error::Compiler { found });
        }
        Ok(toolchain)
    }

    /// Compiles every object into `target` (a directory of its own: cargo locks it) and returns the files by name.
    pub fn compile(
        &self,
        root: &Path,
        target: &Path,
    ) -> Result<BTreeMap<&'static str, Vec<u8>>, Error> {
        let programs = root.join("ebpf/programs");
        let home = env::var_os("CARGO_HOME")
            .map(PathBuf::from)
            .or_else(|| env::var_os("HOME").map(|h| Path::new(&h).join(".cargo")))
            .unwrap_or_default();
        let mut flags = rust_flags();
        flags.push(format!("-Clinker={}", self.linker.display()));
        // Nothing of this machine may reach the object.
        for (from, to) in [(root, "kun"), (&home, "cargo"), (&self.library, "rust")] {
            flags.push(format!("--remap-path-prefix={}={to}", from.display()));
        }
        let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        // A build script's environment speaks of the host's build; none of it may reach this one.
        for (name, _) in env::vars_os() {
            let n = name.to_string_lossy();
            if n.starts_with("CARGO_PROFILE_")
                || n.starts_with("CARGO_FEATURE_")
                || n.starts_with("CARGO_CFG_")
            {
                cargo.env_remove(&name);
            }
        }
        let output = cargo
            .current_dir(&programs)
            .args([
                "build",
                "--release",
                "--locked",
                "--target",
                TARGET,
                "-Zbuild-std=core",
                "--bins",
            ])
            .arg("--target-dir")
            .arg(target)
            .env_remove("RUSTFLAGS")
            .env_remove("RUSTC_WRAPPER")
            .env_remove("RUSTC_WORKSPACE_WRAPPER")
            .env_remove("CARGO_BUILD_RUSTFLAGS")
            .env_remove("CARGO_MAKEFLAGS")
            .env_remove("MAKEFLAGS")
            .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"))
            .env("RUSTC_BOOTSTRAP", "1")
            .env("__CARGO_TESTS_ONLY_SRC_ROOT", &self.library)
            .output()
            .map_err(io_at(Path::new("cargo")))?;
        if !output.status.success() {
            return Err(Error::Compile {
                stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
            });
        }
        let mut objects = BTreeMap::new();
        for object in OBJECTS {
            let path = target.join(TARGET).join("release").join(object.name);
            let bytes = fs::read(&path).map_err(io_at(&path))?;
            objects.insert(object.name, canonical::canonical(bytes));
        }
        Ok(objects)
    }
}

fn rustc() -> std::ffi::OsString {
    env::var_os("RUSTC").unwrap_or_else(|| "rustc".into())
}

/// What decides about the bytes besides the sources and the compiler.
fn rust_flags() -> Vec<String> {
    // The architecture only chooses the layout of `pt_regs`, which no program of ours reads.
    [
        r#"--cfg=bpf_target_arch="x86_64""#,
        "-Ctarget-cpu=v3",
        "-Cdebuginfo=0",
        "-Zlocation-detail=none",
    ]
    .map(str::to_owned)
    .to_vec()
}

impl Object {
    /// SHA-256 over flags, compiler and every source file that can reach this object.
    pub fn sources(&self, root: &Path) -> Result<String, Error> {
        let mut hash = Sha256::new();
        hash.update(format!("{RUST} {BPF_LINKER} {TARGET} {:?}\n", rust_flags()));
        let mut files = Vec::new();
        for place in [
            "ebpf/abi/Cargo.toml",
            "ebpf/abi/src",
            "ebpf/programs/Cargo.toml",
            "ebpf/programs/Cargo.lock",
            "ebpf/programs/src",
        ] {
            collect(root, Path::new(place), &mut files)?;
        }
        files.sort();
        for file in files {
            let name = file.to_string_lossy();
            if self.foreign.iter().any(|prefix| name.starts_with(prefix)) {
                continue;
            }
            let path = root.join(&file);
            let text = fs::read(&path).map_err(io_at(&path))?;
            hash.update(format!("{name} {}\n", text.len()));
            hash.update(&text);
        }
        Ok(hex(&hash.finalize()))
    }
}

fn collect(root: &Path, place: &Path, files: &mut Vec<PathBuf>) -> Result<(), Error> {
    let path = root.join(place);
    if path.is_dir() {
        for entry in fs::read_dir(&path).map_err(io_at(&path))? {
            let entry = entry.map_err(io_at(&path))?;
            collect(root, &place.join(entry.file_name()), files)?;
        }
    } else {
        files.push(place.to_owned());
    }
    Ok(())
}

/// SHA-256 in hexadecimal.
pub fn digest(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut s, b| {
        let _ = write!(s, "{b:02x}");
        s
    })
}

/// `prebuilt/MANIFEST`: which sources each committed object was made from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Manifest(pub BTreeMap<String, Entry>);

/// One object in the manifest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Entry {
    /// [`Object::sources`] when it was made.
    pub sources: String,
    /// [`digest`] of the object.
    pub object: String,
}

impl Manifest {
    /// Reads it; a file that is not there is an empty manifest.
    pub fn read(path: &Path) -> Result<Self, Error> {
        match fs::read_to_string(path) {
            Ok(text) => Ok(Self::parse(&text)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(e) => Err(io_at(path)(e)),
        }
    }

    /// Unknown lines are passed over: an entry that is not understood is an object that is rebuilt.
    fn parse(text: &str) -> Self {
        let mut manifest = Self::default();
        let mut name = String::new();
        for line in text.lines().map(str::trim) {
            if let Some(section) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
                name = section.to_owned();
            } else if let Some((key, value)) = line.split_once('=') {
                let entry = manifest.0.entry(name.clone()).or_default();
                match key.trim() {
                    "sources" => entry.sources = value.trim().to_owned(),
                    "object" => entry.object = value.trim().to_owned(),
                    _ => {}
                }
            }
        }
        manifest
    }

    /// As written to the file.
    pub fn render(&self) -> String {
        let mut text = String::from(
            "# Made by `cargo xtask ebpf`: SHA-256 of each object's sources (with flags and compiler) and of the object.\n",
        );
        for (name, entry) in &self.0 {
            let _ = write!(
                text,
                "\n[{name}]\nsources = {}\n\nobject = {}\n",
                entry.sources, entry.object
            );
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
    }

    #[test]
    fn manifest_survives_a_round_trip() {
        let mut manifest = Manifest::default();
        for name in ["nat64", "service"] {
            manifest.0.insert(
                name.to_owned(),
                Entry {
                    sources: digest(name.as_bytes()),
                    object: digest(b"object"),
                },
            );
        }
        assert_eq!(Manifest::parse(&manifest.render()), manifest);
    }

    #[test]
    fn an_object_is_made_of_its_own_sources_alone() {
        let dir = env::temp_dir().join(format!("kun-ebpf-build-{}", std::process::id()));
        let put = |path: &str, text: &str| {
            let path = dir.join(path);
            fs::create_dir_all(path.parent().expect("inside dir")).expect("temporary directory");
            fs::write(path, text).expect("temporary file");
        };
        for file in [
            "ebpf/abi/Cargo.toml",
            "ebpf/programs/Cargo.toml",
            "ebpf/programs/Cargo.lock",
        ] {
            put(file, "");
        }
        put("ebpf/abi/src/lib.rs", "shared");
        put("ebpf/programs/src/nat64/main.rs", "one");
        put("ebpf/programs/src/service/main.rs", "one");
        let sums = || OBJECTS.map(|o| o.sources(&dir).expect("sources"));
        let before = sums();
        put("ebpf/programs/src/nat64/main.rs", "two");
        let after = sums();
        put("ebpf/abi/src/lib.rs", "other");
        let last = sums();
        fs::remove_dir_all(&dir).expect("temporary directory");
        assert_eq!(before[0], after[0], "service does not hold nat64's source");
        assert_ne!(before[1], after[1]);
        assert!(
            last[0] != after[0] && last[1] != after[1],
            "both hold the shared source"
        );
    }

    #[test]
    fn the_compiler_is_the_workspaces() {
        let text =
            fs::read_to_string(root().join("rust-toolchain.toml")).expect("rust-toolchain.toml");
        assert!(text.contains(&format!("\"{RUST}\"")), "{text}");
    }
}
