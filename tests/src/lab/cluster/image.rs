//! The image that the lab's pods run, made on the spot: kun's own programs and the shared libraries that they are linked to.
//! No registry is asked, and nothing is compiled a second time: a pod runs the very binaries that were built.
//!
//! Written as one OCI image layout (image-spec 1.1, `image-layout.md`) in a tar archive with two images over one layer: what pods
//! run, and the pause container that holds a sandbox.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// What pods run.
pub const POD: &str = "localhost/kun:1";
/// What holds a sandbox.
pub const PAUSE: &str = "localhost/kun-pause:1";
/// Where the programs lie in it.
pub const PROGRAMS: &str = "/usr/bin";

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// Writes the archive.
pub fn write(programs: &[PathBuf], to: &Path) -> Result<()> {
    let mut archive = Archive::create(to)?;
    let layer = archive.blob(LAYER, &layer(programs)?)?;
    let pause = [format!("{PROGRAMS}/kun-lab"), "pause".to_owned()];
    let mut manifests = Vec::new();
    for (name, entrypoint) in [(POD, &pause[..1]), (PAUSE, &pause[..])] {
        let config = json!({
            "architecture": architecture(),
            "os": "linux",
            "config": {"Entrypoint": entrypoint, "Env": [format!("PATH={PROGRAMS}")]},
            // The layer is not compressed: its digest is its diff id.
            "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
        });
        let config = archive.blob(CONFIG, config.to_string().as_bytes())?;
        let manifest =
            json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [layer]});
        let mut manifest = archive.blob(MANIFEST, manifest.to_string().as_bytes())?;
        // containerd finds an image by the one, podman by the other.
        manifest["annotations"] = json!({
            "io.containerd.image.name": name,
            "org.opencontainers.image.ref.name": name,
        });
        manifests.push(manifest);
    }
    let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests});
    archive.file("index.json", index.to_string().as_bytes())?;
    archive.file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    archive.finish()
}

/// By GOARCH, as image configurations have it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// The root file system.
fn layer(programs: &[PathBuf]) -> Result<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    directory(&mut tar, "tmp/", 0o1777)?;
    for file in libraries(programs)? {
        let inside = file.strip_prefix("/").unwrap_or(&file).to_owned();
        add(&mut tar, &inside, &file)?;
    }
    // Without symbols they are half as large, three times over.
    let stripped = tempfile::tempdir().context("a directory for stripped programs")?;
    for program in programs {
        let name = program.file_name().context("a program has a name")?;
        let inside = Path::new(PROGRAMS.trim_start_matches('/')).join(name);
        let small = stripped.path().join(name);
        let (from, to) = (text(program)?, text(&small)?);
        kun_harness::run(["strip", "-o", to, from])?;
        add(&mut tar, &inside, &small)?;
    }
    tar.into_inner().context("the image's layer")
}

fn directory(tar: &mut tar::Builder<Vec<u8>>, name: &str, mode: u32) -> Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Directory);
    header.set_mode(mode);
    header.set_size(0);
    tar.append_data(&mut header, name, std::io::empty())
        .with_context(|| format!("the image's {name}"))
}

/// Without times and owners: the same programs give the same image.
fn add(tar: &mut tar::Builder<Vec<u8>>, inside: &Path, file: &Path) -> Result<()> {
    let bytes = fs::read(file).with_context(|| format!("reading {}", file.display()))?;
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o755);
    header.set_size(bytes.len() as u64);
    tar.append_data(&mut header, inside, bytes.as_slice())
        .with_context(|| format!("the image's /{}", inside.display()))
}

/// Every shared library of the programs, and the loader, at the paths at which this machine has them.
fn libraries(programs: &[PathBuf]) -> Result<BTreeSet<PathBuf>> {
    let mut found = BTreeSet::new();
    for program in programs {
        let path = text(program)?;
        let text = kun_harness::run(["ldd", path])?;
        // `libc.so.6 => /lib/…/libc.so.6 (0x…)`, or `/lib64/ld-linux-x86-64.so.2 (0x…)`.
        let paths = text
            .split_whitespace()
            .filter(|word| word.starts_with('/'))
            .map(PathBuf::from);
        found.extend(paths);
        ensure!(
            !text.contains("not found"),
            "{path}: a shared library of it is missing: {text}"
        );
    }
    Ok(found)
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is UTF-8")
}

struct Archive {
    tar: tar::Builder<BufWriter<File>>,
}

impl Archive {
    fn create(to: &Path) -> Result<Self> {
        let file = File::create(to).with_context(|| format!("writing {}", to.display()))?;
        Ok(Self {
            tar: tar::Builder::new(BufWriter::new(file)),
        })
    }

    fn file(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(bytes.len() as u64);
        self.tar
            .append_data(&mut header, name, bytes)
            .with_context(|| format!("the image archive's {name}"))
    }

    /// Adds it under its digest; its descriptor.
    fn blob(&mut self, media_type: &str, bytes: &[u8]) -> Result<Value> {
        let digest: String = Sha256::digest(bytes)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        self.file(&format!("blobs/sha256/{digest}"), bytes)?;
        Ok(
            json!({"mediaType": media_type, "digest": format!("sha256:{digest}"), "size": bytes.len()}),
        )
    }

    fn finish(self) -> Result<()> {
        let mut file = self.tar.into_inner().context("the image archive")?;
        file.flush().context("the image archive")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_descriptor_names_a_blob_of_its_size_and_digest() {
        let directory = tempfile::tempdir().unwrap();
        let archive = directory.path().join("image.tar");
        let me = std::env::current_exe().unwrap();
        write(std::slice::from_ref(&me), &archive).unwrap();
        let mut files = std::collections::BTreeMap::new();
        let mut tar = tar::Archive::new(File::open(&archive).unwrap());
        for entry in tar.entries().unwrap() {
            let mut entry = entry.unwrap();
            let name = entry.path().unwrap().display().to_string();
            let mut bytes = Vec::new();
            std::io::Read::read_to_end(&mut entry, &mut bytes).unwrap();
            files.insert(name, bytes);
        }
        let blob = |descriptor: &Value| {
            let digest = descriptor["digest"].as_str().unwrap();
            let bytes = &files[&format!("blobs/{}", digest.replace(':', "/"))];
            let real: String = Sha256::digest(bytes)
                .iter()
                .map(|b| format!("{b:02x}"))
                .collect();
            assert_eq!(digest, format!("sha256:{real}"));
            assert_eq!(descriptor["size"], bytes.len());
            bytes
        };
        let index: Value = serde_json::from_slice(&files["index.json"]).unwrap();
        let names: Vec<&str> = index["manifests"]
            .as_array()
            .unwrap()
            .iter()
            .map(|m| {
                m["annotations"]["io.containerd.image.name"]
                    .as_str()
                    .unwrap()
            })
            .collect();
        assert_eq!(names, [POD, PAUSE]);
        for manifest in index["manifests"].as_array().unwrap() {
            let manifest: Value = serde_json::from_slice(blob(manifest)).unwrap();
            blob(&manifest["config"]);
            let mut layer = tar::Archive::new(blob(&manifest["layers"][0]).as_slice());
            let inside: Vec<String> = layer
                .entries()
                .unwrap()
                .map(|e| e.unwrap().path().unwrap().display().to_string())
                .collect();
            let program = format!("usr/bin/{}", me.file_name().unwrap().display());
            assert!(inside.contains(&program), "{inside:?}");
            assert!(
                inside.iter().any(|name| name.contains("libc.so")),
                "{inside:?}"
            );
        }
    }
}
