//! `kun.yaml` from disk, and `--check-config`.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use kun_config::{Config, Faults};

/// Past this a configuration is some other file: the reference with every comment is a fiftieth of it.
const MAX_BYTES: u64 = 1 << 20;

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file cannot be read.
    #[error("{}: cannot be read ({source}); give the path of kun.yaml with --config", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's word.
        source: io::Error,
    },
    /// The file is too large to be one of ours.
    #[error("{}: {bytes} bytes; kun.yaml has at most {MAX_BYTES}", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// The file is wrong: one line a fault.
    #[error("{0}")]
    Faults(#[from] Faults),
}

/// Reads and validates `path`. The node's name, where the file gives none, is `NODE_NAME` from the environment (the downward API
/// of a DaemonSet), else the host name.
pub fn load(path: &Path) -> Result<Config, LoadError> {
    load_with_text(path).map(|(config, _)| config)
}

/// The same, with the text, for who hands it on: what is on the disk a moment later may be another.
pub fn load_with_text(path: &Path) -> Result<(Config, String), LoadError> {
    let unread = |source| LoadError::Read {
        path: path.to_owned(),
        source,
    };
    let bytes = std::fs::metadata(path).map_err(unread)?.len();
    if bytes > MAX_BYTES {
        return Err(LoadError::TooLarge {
            path: path.to_owned(),
            bytes,
        });
    }
    let text = std::fs::read_to_string(path).map_err(unread)?;
    let config = kun_config::parse_on(&path.to_string_lossy(), &text, &host_name())?;
    Ok((config, text))
}

/// `--check-config`: prints `ok`, or one line a fault on stderr and exit code 1; warnings go to stderr and change nothing.
pub fn check_config(path: &Path) -> ExitCode {
    match load(path) {
        Ok(config) => {
            for warning in &config.warnings.0 {
                eprintln!("warning: {warning}");
            }
            println!("ok");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn host_name() -> String {
    match std::env::var("NODE_NAME") {
        Ok(name) if !name.is_empty() => name,
        // Kubernetes names nodes in lower case, whatever the host calls itself.
        _ => rustix::system::uname()
            .nodename()
            .to_string_lossy()
            .to_lowercase(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_file_is_named() {
        let error = load(Path::new("/nonexistent/kun.yaml")).expect_err("there is none");
        assert!(
            error
                .to_string()
                .starts_with("/nonexistent/kun.yaml: cannot be read"),
            "{error}"
        );
    }

    #[test]
    fn faults_carry_the_path_and_all_of_them() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("kun.yaml");
        std::fs::write(&path, "node: {nam: a}\nproxy: {maxFlows: many}\n").expect("writable");
        let text = load(&path).expect_err("two faults").to_string();
        assert_eq!(text.lines().count(), 2, "{text}");
        assert!(
            text.lines()
                .all(|l| l.starts_with(&*path.to_string_lossy())),
            "{text}"
        );
    }
}
