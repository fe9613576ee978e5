//! Puts the BPF objects where `include_bytes_aligned!` finds them: the committed ones when their sources are unchanged, else
//! freshly compiled ones. Without the toolchain a changed source is an error that says what to install.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use kun_ebpf_build::{Error, Manifest, OBJECTS, Toolchain, digest};

fn main() {
    if let Err(e) = place() {
        println!(
            "cargo::error={}",
            e.to_string().replace('\n', "\ncargo::error=")
        );
    }
}

fn place() -> Result<(), Error> {
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let root = here
        .join("../..")
        .canonicalize()
        .unwrap_or_else(|_| here.join("../.."));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    for watched in [
        "ebpf/abi",
        "ebpf/programs/src",
        "ebpf/programs/Cargo.toml",
        "ebpf/programs/Cargo.lock",
        "ebpf/loader/prebuilt",
    ] {
        println!("cargo::rerun-if-changed={}", root.join(watched).display());
    }
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| Error::Io { path, source }
    };
    let prebuilt = here.join("prebuilt");
    let manifest = Manifest::read(&prebuilt.join("MANIFEST"))?;
    let mut fresh = None;
    for object in OBJECTS {
        let file = format!("{}.o", object.name);
        let entry = manifest.0.get(object.name).cloned().unwrap_or_default();
        let held = fs::read(prebuilt.join(&file)).unwrap_or_default();
        let bytes = if entry.sources == object.sources(&root)? && entry.object == digest(&held) {
            held
        } else {
            println!(
                "cargo::warning=prebuilt/{file} is older than its sources and was compiled anew; `cargo xtask ebpf` renews it"
            );
            if fresh.is_none() {
                fresh = Some(Toolchain::locate()?.compile(&root, &out.join("bpf"))?);
            }
            fresh
                .as_ref()
                .map(|o| o[object.name].clone())
                .unwrap_or_default()
        };
        let path = out.join(&file);
        fs::write(&path, bytes).map_err(io(&path))?;
    }
    Ok(())
}
