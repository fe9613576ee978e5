//! `cargo xtask ebpf`: the committed BPF objects, and the toolchain of those who edit the programs.
//!
//! What an object is made of and how it is compiled is `kun-ebpf-build`'s; this module installs the compiler's pieces and
//! writes or compares the committed files. Nobody who leaves the programs alone needs any of it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use kun_ebpf_build::{BPF_LINKER, Entry, Manifest, OBJECTS, RUST, Toolchain, cache_dir, digest};

/// The version of Debian's `rust-src` package (suite trixie-backports) that holds the sources of `core` of [`RUST`].
const RUST_SRC_DEB: &str = "1.95.0+dfsg1-2~bpo13+1";
/// Its SHA-256.
const RUST_SRC_SHA256: &str = "7b76db5b880a77f9e52975d2baa6209d2f76d2c9c2789515c3088cb960e2c83b";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("xtask is a folder of the repository")
        .to_owned()
}

/// Compiles the programs. `check`: compare with the committed objects and fail when they differ; else replace them.
pub(crate) fn ebpf(check: bool) -> Result<()> {
    let root = root();
    let prebuilt = root.join("ebpf/loader/prebuilt");
    let toolchain = Toolchain::locate()?;
    let target = cache_dir()
        .join("ebpf-target")
        .join(&digest(root.as_os_str().as_encoded_bytes())[..16]);
    let objects = toolchain.compile(&root, &target)?;
    let mut manifest = Manifest::default();
    for object in OBJECTS {
        manifest.0.insert(
            object.name.to_owned(),
            Entry {
                sources: object.sources(&root)?,
                object: digest(&objects[object.name]),
            },
        );
    }
    let listing = prebuilt.join("MANIFEST");
    if check {
        let committed = Manifest::read(&listing)?;
        for (name, bytes) in &objects {
            let path = prebuilt.join(format!("{name}.o"));
            let held = fs::read(&path).with_context(|| path.display().to_string())?;
            ensure!(
                held == *bytes,
                "{} is not what its sources compile to ({} and {} bytes); run `cargo xtask ebpf` and commit the result",
                path.display(),
                held.len(),
                bytes.len(),
            );
        }
        ensure!(
            committed == manifest,
            "{} is not that of the sources; run `cargo xtask ebpf` and commit the result",
            listing.display()
        );
        println!(
            "ebpf: {} objects are what their sources compile to",
            objects.len()
        );
        return Ok(());
    }
    fs::create_dir_all(&prebuilt)?;
    for (name, bytes) in &objects {
        let path = prebuilt.join(format!("{name}.o"));
        let changed = fs::read(&path).ok().as_deref() != Some(bytes);
        fs::write(&path, bytes).with_context(|| path.display().to_string())?;
        println!(
            "ebpf: {name}.o {} bytes{}",
            bytes.len(),
            if changed { "" } else { ", unchanged" }
        );
    }
    fs::write(&listing, manifest.render()).with_context(|| listing.display().to_string())?;
    Ok(())
}

/// Installs what [`ebpf`] needs into kun's cache, piece by piece, leaving alone what is there. Debian or Ubuntu; root only where packages lack.
pub(crate) fn install_toolchain() -> Result<()> {
    let expected = Toolchain::expected();
    if expected.linker.is_file() {
        println!("setup: bpf-linker is at {}", expected.linker.display());
    } else {
        let prefix = cache_dir().join("bpf-linker");
        println!(
            "setup: building bpf-linker {BPF_LINKER} into {} (about two minutes)",
            prefix.display()
        );
        run(Command::new("cargo")
            .args([
                "install",
                "bpf-linker",
                "--version",
                BPF_LINKER,
                "--locked",
                "--quiet",
                "--root",
            ])
            .arg(&prefix)
            .env_remove("CARGO_TARGET_DIR")
            .env("RUSTUP_TOOLCHAIN", RUST))?;
    }
    if expected.library.join("core/src/lib.rs").is_file() {
        println!(
            "setup: the source of Rust's core library is at {}",
            expected.library.display()
        );
    } else {
        println!(
            "setup: fetching Debian's rust-src {RUST_SRC_DEB} (45 MB) and unpacking it to {}",
            expected.library.display()
        );
        core_sources(&expected.library)?;
    }
    Toolchain::locate()?;
    println!("setup: the eBPF toolchain is complete");
    Ok(())
}

/// Fetches and unpacks `rust-src` with package lists of its own: the machine's own sources and packages stay as they are.
fn core_sources(library: &Path) -> Result<()> {
    let work = cache_dir().join("rust-src.part");
    if work.exists() {
        fs::remove_dir_all(&work)?;
    }
    for dir in ["lists/partial", "archives/partial", "sources", "tree"] {
        fs::create_dir_all(work.join(dir))?;
    }
    fs::write(
        work.join("sources/backports.sources"),
        format!(
            "Types: deb\nURIs: {}\nSuites: trixie-backports\nComponents: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n",
            debian_mirror()?
        ),
    )?;
    let apt = || {
        let mut apt = Command::new("apt-get");
        apt.current_dir(&work).arg("-qq");
        for (key, dir) in [
            ("Dir::Etc::sourceparts", "sources"),
            ("Dir::State::lists", "lists"),
            ("Dir::Cache::archives", "archives"),
        ] {
            apt.arg("-o")
                .arg(format!("{key}={}", work.join(dir).display()));
        }
        apt.args([
            "-o",
            "Dir::Etc::sourcelist=/dev/null",
            "-o",
            "Dir::Cache::pkgcache=",
            "-o",
            "Dir::Cache::srcpkgcache=",
        ]);
        // Unpacked by hand, so apt's own user need not reach the cache.
        apt.args(["-o", "APT::Sandbox::User=root"]);
        apt
    };
    run(apt().arg("update"))?;
    run(apt().args(["download", &format!("rust-src={RUST_SRC_DEB}")])).context(
        "Debian no longer offers this package; `apt-get install rustc-web cargo-web libstd-rust-web-dev-bpf` has a compiler with \
         a ready-made core, for which RUST and BPF_LINKER in ebpf/build must be changed",
    )?;
    let deb = fs::read_dir(&work)?
        .filter_map(|e| e.ok())
        .map(|e| e.path())
        .find(|p| p.extension().is_some_and(|e| e == "deb"))
        .context("apt-get download left no package")?;
    let sum = digest(&fs::read(&deb)?);
    ensure!(
        sum == RUST_SRC_SHA256,
        "{}: SHA-256 is {sum}, should be {RUST_SRC_SHA256}",
        deb.display()
    );
    run(Command::new("dpkg-deb")
        .arg("-x")
        .arg(&deb)
        .arg(work.join("tree")))?;
    let from = work.join(format!("tree/usr/src/rustc-{RUST}/library"));
    if library.exists() {
        fs::remove_dir_all(library)?;
    }
    // The last step makes it whole: an interrupted run leaves nothing that looks complete.
    fs::rename(&from, library).with_context(|| from.display().to_string())?;
    fs::remove_dir_all(&work)?;
    Ok(())
}

/// The Debian archive that this machine already uses; Ubuntu's holds no Debian packages.
fn debian_mirror() -> Result<String> {
    let listed = Command::new("apt-get")
        .args([
            "indextargets",
            "--format",
            "$(ORIGIN) $(REPO_URI)",
            "Created-By: Packages",
        ])
        .output()
        .context("apt-get")?;
    let text = String::from_utf8_lossy(&listed.stdout).into_owned();
    let found = text
        .lines()
        .filter_map(|l| l.strip_prefix("Debian "))
        .find(|uri| !uri.contains("security"));
    match found {
        Some(uri) => Ok(uri.to_owned()),
        None => bail!(
            "no Debian archive among apt's sources; run `apt-get update`, or put rust-src of Rust {RUST} in {} by hand",
            Toolchain::expected().library.display()
        ),
    }
}

fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("{command:?}"))?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}
