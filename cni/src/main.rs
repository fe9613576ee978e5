//! The program that a container runtime executes: environment and stdin in, one JSON object on stdout out. By hand, and from the
//! image of the node agent, it also puts itself on a host (`install`).

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{Read, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{anyhow, bail};
use kun_cni::install::{LIST, Lists, Wanted, install, uninstall};
use kun_cni::plugin::{self, Outcome};
use kun_cni_core::spec::{Code, DEFAULT_KUN_CONFIG, Failure, Invocation, parse_environment};
use kun_config::Config;
use rustix::event::{PollFd, PollFlags};

/// One byte more than a network configuration may have: the parser refuses it by its length.
const MAX_STDIN: u64 = (1 << 20) + 1;

/// `kun.yaml` with every comment has a few kilobytes.
const MAX_CONFIG: u64 = 1 << 20;

/// How long VERSION waits for the next bytes of a caller who leaves stdin open.
const PATIENCE: Duration = Duration::from_millis(200);

/// What VERSION reads at most: its input is `{"cniVersion": "1.1.0"}`, or a whole network configuration.
const MAX_AT_HAND: usize = 1 << 20;

const USAGE: &str = "usage: kun-cni --check-config [--config PATH] | --version | --help
       kun-cni install [--bin-dir DIR] [--conf-dir DIR [--config PATH] [--conflist PATH] [--name NAME]]
       kun-cni uninstall [--bin-dir DIR] [--conf-dir DIR [--name NAME]]
Without arguments it is a CNI plugin: a container runtime executes it with CNI_COMMAND set.
  --bin-dir   where the runtime looks for plugins, as /opt/cni/bin: this very program is placed there
  --conf-dir  where it looks for network configuration lists, as /etc/cni/net.d: kun.yaml and the list are placed there, after the plugin
  --config    the kun.yaml to place (/etc/kun/kun.yaml)
  --conflist  the list to place; without it: kun alone
  --name      the list's name there (10-kun.conflist)";

/// As shipped the plugin is linked against musl, which starts at once and allocates slowly.
#[global_allocator]
static ALLOCATOR: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if !arguments.is_empty() {
        return match person(&arguments) {
            Ok(text) if text.is_empty() => ExitCode::SUCCESS,
            Ok(text) => {
                println!("{text}");
                ExitCode::SUCCESS
            }
            Err(e) => {
                // Every error tells its source itself.
                eprintln!("{e}");
                ExitCode::FAILURE
            }
        };
    }
    let (text, code) = match invoked() {
        Outcome::Success(Some(value)) => (value.to_string(), ExitCode::SUCCESS),
        Outcome::Success(None) => return ExitCode::SUCCESS,
        Outcome::Failure(value) => (value.to_string(), ExitCode::FAILURE),
    };
    // Nobody left to tell: the runtime sees the exit code.
    if writeln!(std::io::stdout(), "{text}").is_err() {
        return ExitCode::FAILURE;
    }
    code
}

/// As a plugin.
fn invoked() -> Outcome {
    let variables: Vec<(String, String)> = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect();
    let invocation = match parse_environment(|name| {
        variables
            .iter()
            .find(|(n, _)| n == name)
            .map(|(_, value)| value.as_str())
    }) {
        Ok(invocation) => invocation,
        // Only for the version in which the error is told.
        Err(e) => return plugin::refused(e.into(), &stdin_at_hand()),
    };
    if invocation == Invocation::Version {
        return plugin::run(&invocation, &stdin_at_hand(), |_| Err(String::new()));
    }
    let mut stdin = Vec::new();
    if let Err(e) = std::io::stdin().take(MAX_STDIN).read_to_end(&mut stdin) {
        return plugin::refused(Failure::new(Code::Io, format!("stdin: {e}")), &[]);
    }
    plugin::run(&invocation, &stdin, |path| {
        load(path).map_err(|e| format!("{e:#}"))
    })
}

/// What a caller writes who may leave stdin open: up to its end, to one whole JSON value, or to a moment's silence.
fn stdin_at_hand() -> Vec<u8> {
    let mut read = Vec::new();
    let mut chunk = [0; 4096];
    let stdin = std::io::stdin();
    let patience = rustix::time::Timespec {
        tv_sec: 0,
        tv_nsec: PATIENCE.subsec_nanos().into(),
    };
    while read.len() < MAX_AT_HAND {
        let mut ready = [PollFd::new(&stdin, PollFlags::IN)];
        match rustix::event::poll(&mut ready, Some(&patience)) {
            Ok(1..) => {}
            Ok(_) | Err(_) => break,
        }
        match rustix::io::read(&stdin, &mut chunk) {
            Ok(length @ 1..) => read.extend_from_slice(&chunk[..length]),
            Ok(_) | Err(_) => break,
        }
        if serde_json::from_slice::<serde::de::IgnoredAny>(&read).is_ok() {
            break;
        }
    }
    read
}

/// By hand.
fn person(arguments: &[String]) -> anyhow::Result<String> {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let path = match arguments.as_slice() {
        ["--version"] => return Ok(format!("kun-cni {}", env!("CARGO_PKG_VERSION"))),
        ["--help" | "-h"] => return Ok(USAGE.to_owned()),
        ["--check-config"] => PathBuf::from(DEFAULT_KUN_CONFIG),
        ["--check-config", "--config", path] | ["--config", path, "--check-config"] => {
            PathBuf::from(path)
        }
        [verb @ ("install" | "uninstall"), flags @ ..] => return place(verb, flags),
        other => bail!("{}: unknown\n{USAGE}", other.join(" ")),
    };
    load(&path)?;
    Ok("ok".to_owned())
}

/// `install` and `uninstall`; what was done, one line a file.
fn place(verb: &str, flags: &[&str]) -> anyhow::Result<String> {
    let mut given: BTreeMap<&str, &str> = BTreeMap::new();
    let known: &[&str] = match verb {
        "install" => &[
            "--bin-dir",
            "--conf-dir",
            "--config",
            "--conflist",
            "--name",
        ],
        _ => &["--bin-dir", "--conf-dir", "--name"],
    };
    // `--flag value` and `--flag=value` alike.
    let words: Vec<&str> = flags
        .iter()
        .flat_map(|word| match word.split_once('=') {
            Some((flag, value)) if flag.starts_with("--") => vec![flag, value],
            _ => vec![*word],
        })
        .collect();
    for pair in words.chunks(2) {
        match *pair {
            [flag, value] if known.contains(&flag) => {
                if given.insert(flag, value).is_some() {
                    bail!("{flag}: given twice\n{USAGE}");
                }
            }
            [flag] if known.contains(&flag) => bail!("{flag}: without a value\n{USAGE}"),
            [flag, ..] => bail!("{flag}: unknown\n{USAGE}"),
            [] => {}
        }
    }
    let path = |flag| given.get(flag).map(Path::new);
    if path("--bin-dir").is_none() && path("--conf-dir").is_none() {
        bail!("give --bin-dir, --conf-dir or both\n{USAGE}");
    }
    if path("--conf-dir").is_none()
        && let Some(flag) = ["--config", "--conflist", "--name"]
            .iter()
            .find(|f| given.contains_key(*f))
    {
        bail!("{flag}: means nothing without --conf-dir\n{USAGE}");
    }
    let name = given.get("--name").copied().unwrap_or(LIST);
    let lists = path("--conf-dir")
        .map(|dir| Lists::new(dir, name))
        .transpose()?;
    let mut done = String::new();
    if verb == "uninstall" {
        for path in uninstall(lists.as_ref(), path("--bin-dir"), |_| {})? {
            let _ = writeln!(done, "removed {}", path.display());
        }
        return Ok(done.trim_end().to_owned());
    }
    let mut wanted = Vec::new();
    if let Some(dir) = path("--bin-dir") {
        wanted.push(Wanted::plugin(dir, &std::env::current_exe()?)?);
    }
    if let Some(lists) = &lists {
        let config = path("--config").unwrap_or(Path::new(DEFAULT_KUN_CONFIG));
        // A wrong one would be found by every pod.
        load(config)?;
        wanted.extend(lists.wanted(&read(config)?, path("--conflist"))?);
        for other in lists.before() {
            let _ = writeln!(
                done,
                "warning: {}: its name comes first, so the runtime takes it; remove it, or give this list a --name before it",
                other.display()
            );
        }
    }
    for path in install(&wanted, |_| {})? {
        let _ = writeln!(done, "placed {}", path.display());
    }
    Ok(done.trim_end().to_owned())
}

fn read(path: &Path) -> anyhow::Result<String> {
    let mut text = String::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(MAX_CONFIG).read_to_string(&mut text))
        .map_err(|e| {
            anyhow!(
                "{}: cannot be read ({e}); `kunConfig` in the network configuration, or --config by hand, names kun.yaml",
                path.display()
            )
        })?;
    Ok(text)
}

fn load(path: &Path) -> anyhow::Result<Config> {
    let text = read(path)?;
    let host = match std::env::var("NODE_NAME") {
        Ok(name) if !name.is_empty() => name,
        Ok(_) | Err(_) => rustix::system::uname()
            .nodename()
            .to_string_lossy()
            .to_lowercase(),
    };
    Ok(kun_config::parse_on(&path.to_string_lossy(), &text, &host)?)
}
