//! `cargo xtask vm`: a command under another kernel, with this machine's files visible and nothing it does to them kept.
//!
//! QEMU without hardware virtualisation boots a stock Debian kernel in about five seconds, User Mode Linux in three. The root is the
//! host's, read-only, under an overlay in memory; `--writable DIR` is the exception. The command starts in the caller's directory with
//! the caller's environment and no stdin; its output appears here, both streams on stdout, and its exit status is ours.
//! `--count-instructions` makes the guest's clock advance one nanosecond an instruction: times measured inside are instruction
//! counts, the same however busy the machine is.

mod guest;
mod initramfs;
mod kernels;
mod qemu;
mod uml;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::{command, setup};

/// What a guest needs of this machine, and what for.
pub(crate) const VM_PACKAGES: &[(&str, &str)] = &[
    ("busybox-static", "the guest's first steps"),
    (
        "debian-archive-keyring",
        "the signatures on other kernels' packages",
    ),
    ("kmod", "which modules a module needs"),
    ("qemu-system-x86", "the machine that other kernels run on"),
    ("xz-utils", "unpacking modules"),
];

/// What `--ebpf-tests` runs: binaries and, where not all, which of their tests. Every program loads in them and meets its packets; two
/// with real network stacks show that it attaches. The other such drive megabytes through them, minutes under emulation.
const EBPF_TESTS: &[(&str, &[&str])] = &[
    ("packets", &[]),
    ("differential", &[]),
    ("connect", &[]),
    (
        "datagrams",
        &[
            "a_socket_leaves_a_backend_that_is_gone_with_its_next_datagram",
            "without_an_endpoint_a_datagram_is_refused_at_once",
        ],
    ),
    ("nat64_cases", &[]),
    ("live", &["udp_between_pods_to_oneself_and_from_outside"]),
    ("nat64_live", &["udp_crosses_both_ways"]),
    (
        "bandwidth",
        &[
            "a_bucket_outlives_the_agent_that_filled_it",
            "packets_wait_for_their_time",
        ],
    ),
];
/// Generated cases of each property there: the thousands run on the machine itself.
const EBPF_CASES: u32 = 100;
/// All of them take a minute or two of two idle CPUs. Longer than this, something hangs.
const EBPF_TESTS_WITHIN: Duration = Duration::from_secs(600);

/// Counting takes half a minute.
const COUNT_WITHIN: Duration = Duration::from_secs(300);

/// Exit status of a command that outlived `--timeout`, as timeout(1) has it.
const TIMED_OUT: u8 = 124;

/// The kernels that are known to work here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Kernel {
    /// Debian 12's, the oldest that kun supports.
    #[value(name = "6.1")]
    V6_1,
    /// Debian 13's: tcx, netkit.
    #[value(name = "6.12")]
    V6_12,
    /// User Mode Linux 6.1: no BPF JIT, no BTF, one CPU; the fastest to boot.
    #[value(name = "uml")]
    Uml,
}

/// Flags of `vm`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Which kernel.
    #[arg(long, value_enum, default_value = "6.1")]
    kernel: Kernel,
    /// One CPU whose clock counts instructions (not on uml).
    #[arg(long)]
    count_instructions: bool,
    /// Modules to load before the command.
    #[arg(long, value_delimiter = ',')]
    modules: Vec<String>,
    /// A directory that the command may write to for good.
    #[arg(long)]
    writable: Option<PathBuf>,
    /// Memory of the guest, MiB.
    #[arg(long, default_value_t = 1024)]
    memory: u32,
    /// Seconds until the guest is stopped, with status 124.
    #[arg(long, default_value_t = 600)]
    timeout: u64,
    /// Instead of a command: the packet tests of the eBPF programs, each test binary in a guest.
    #[arg(long, conflicts_with = "command")]
    ebpf_tests: bool,
    /// The command and its arguments.
    #[arg(trailing_var_arg = true, required_unless_present = "ebpf_tests")]
    command: Vec<String>,
}

/// One run of a guest.
struct Run<'a> {
    kernel: Kernel,
    count_instructions: bool,
    modules: &'a [String],
    writable: Option<PathBuf>,
    memory: u32,
    timeout: Duration,
    command: &'a [String],
    /// Where its output goes instead of stdout; QEMU alone.
    output: Option<&'a Path>,
    cache: PathBuf,
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    setup()?;
    if arguments.ebpf_tests {
        return ebpf_tests(arguments.kernel).map(|_| ExitCode::SUCCESS);
    }
    let writable = arguments
        .writable
        .as_deref()
        .map(std::fs::canonicalize)
        .transpose();
    let run = Run {
        kernel: arguments.kernel,
        count_instructions: arguments.count_instructions,
        modules: &arguments.modules,
        writable: writable.context("vm: --writable")?,
        memory: arguments.memory,
        timeout: Duration::from_secs(arguments.timeout),
        command: &arguments.command,
        output: None,
        cache: cache()?,
    };
    run.go().map(ExitCode::from)
}

/// Installs the emulator; kernels come with their first use.
pub(crate) fn setup() -> Result<()> {
    setup::packages(VM_PACKAGES)?;
    if qemu::virtiofsd().is_none() {
        // Debian 12 ships it inside QEMU's package, later releases beside it.
        setup::packages(&[("virtiofsd", "shows this machine's files to the guest")])?;
    }
    Ok(())
}

/// The packet tests of the loader's crate, under `kernel`, in one guest; how many there were. The programs are loaded and run
/// there: what the verifier or a missing feature refuses fails a test, and so does a test that skips.
pub(crate) fn ebpf_tests(kernel: Kernel) -> Result<u32> {
    let binaries = test_binaries("kun-ebpf-loader")?;
    // Every binary runs, whatever the one before said.
    let mut script = String::from("status=0\n");
    let mut tests = 0;
    for (wanted, only) in EBPF_TESTS {
        let of_name = |b: &&PathBuf| {
            let file = b.file_name().unwrap_or_default().to_string_lossy();
            file.rsplit_once('-')
                .is_some_and(|(name, _)| name == *wanted)
        };
        let binary = binaries.iter().find(of_name);
        let binary =
            binary.with_context(|| format!("vm: kun-ebpf-loader has no tests `{wanted}`"))?;
        let mut words = vec![binary.display().to_string()];
        if !only.is_empty() {
            words.push("--exact".to_owned());
            words.extend(only.iter().map(|&test| test.to_owned()));
        }
        tests += listed(&words, only)?;
        let _ = writeln!(
            script,
            "echo '── {wanted}'; {} || status=1",
            guest::words(&words)
        );
    }
    script.push_str(
        "if [ -s $KUN_SKIPS ]; then echo skipped:; cat $KUN_SKIPS; status=1; fi\nexit $status\n",
    );
    let cases = format!("KUN_CASES={EBPF_CASES}");
    let command = [
        "env",
        &cases,
        "KUN_SKIPS=/run/kun-skips",
        "sh",
        "-c",
        &script,
    ]
    .map(str::to_owned);
    let modules = ["veth", "cls_bpf", "sch_ingress", "sch_fq"].map(str::to_owned);
    let run = Run {
        kernel,
        count_instructions: false,
        modules: &modules,
        writable: None,
        memory: 1536,
        timeout: EBPF_TESTS_WITHIN,
        command: &command,
        output: None,
        cache: cache()?,
    };
    let status = run.go()?;
    ensure!(
        status == 0,
        "vm: packet tests failed under {kernel:?} (status {status})"
    );
    Ok(tests)
}

/// Runs a command under 6.1 where the clock counts instructions; what it says goes to a file.
pub(crate) fn count_instructions(command: &[String], output: &Path) -> Result<()> {
    let run = Run {
        kernel: Kernel::V6_1,
        count_instructions: true,
        modules: &[],
        writable: None,
        memory: 1536,
        timeout: COUNT_WITHIN,
        command,
        output: Some(output),
        cache: cache()?,
    };
    let status = run.go()?;
    let said = || std::fs::read_to_string(output).unwrap_or_default();
    ensure!(
        status == 0,
        "vm: {} (status {status}): {}",
        command.join(" "),
        said().trim()
    );
    Ok(())
}

/// How many tests a command line would run; a name in it that is no test's is an error, not nothing.
fn listed(words: &[String], only: &[&str]) -> Result<u32> {
    let output = Command::new(&words[0])
        .args(&words[1..])
        .args(["--list", "--format", "terse"])
        .output()
        .with_context(|| format!("vm: running {}", words[0]))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let tests: Vec<&str> = text
        .lines()
        .filter_map(|l| l.strip_suffix(": test"))
        .collect();
    for name in only {
        ensure!(
            tests.contains(name),
            "vm: {} has no test `{name}`",
            words[0]
        );
    }
    ensure!(!tests.is_empty(), "vm: {} has no tests", words[0]);
    Ok(u32::try_from(tests.len())?)
}

/// Builds a crate's tests and says where they are.
fn test_binaries(package: &str) -> Result<Vec<PathBuf>> {
    let output = command::cargo(&["test", "--no-run", "--message-format=json", "-p", package])
        .stderr(Stdio::inherit())
        .output()
        .context("running cargo test --no-run")?;
    ensure!(
        output.status.success(),
        "cargo test --no-run -p {package}: {}",
        output.status
    );
    let mut binaries = Vec::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let message: serde_json::Value =
            serde_json::from_str(line).context("cargo's messages are JSON")?;
        if message["profile"]["test"] == true
            && let Some(path) = message["executable"].as_str()
        {
            binaries.push(PathBuf::from(path));
        }
    }
    Ok(binaries)
}

impl Run<'_> {
    fn go(&self) -> Result<u8> {
        ensure!(
            cfg!(target_arch = "x86_64"),
            "vm: guests are amd64, and this machine is not"
        );
        match self.kernel {
            Kernel::Uml => {
                ensure!(
                    !self.count_instructions,
                    "vm: User Mode Linux cannot count instructions; take --kernel 6.1"
                );
                uml::run(self, &kernels::user_mode_linux(&self.cache)?)
            }
            Kernel::V6_1 => qemu::run(self, &kernels::kernel(&self.cache, "bookworm")?),
            Kernel::V6_12 => qemu::run(self, &kernels::kernel(&self.cache, "trixie")?),
        }
    }

    /// What the guest said of the command, or how its machine ended.
    fn verdict(&self, machine: Option<ExitStatus>, status: &Path, console: &Path) -> Result<u8> {
        let Some(machine) = machine else {
            eprintln!("vm: stopped after {} s", self.timeout.as_secs());
            return Ok(TIMED_OUT);
        };
        let said = std::fs::read_to_string(status).unwrap_or_default();
        if let Ok(code) = said.trim().parse::<u8>() {
            return Ok(code);
        }
        let console = std::fs::read(console).unwrap_or_default();
        let console = String::from_utf8_lossy(&console);
        let last: Vec<&str> = console.lines().rev().take(15).collect();
        for line in last.iter().rev() {
            eprintln!("vm: console: {line}");
        }
        bail!("vm: the guest ended without a status ({machine})")
    }
}

/// Where kernels stay between runs.
fn cache() -> Result<PathBuf> {
    let set = |name| {
        std::env::var_os(name)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    };
    let cache = set("KUN_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").map(|c| c.join("kun")))
        .or_else(|| set("HOME").map(|h| h.join(".cache/kun")))
        .context("vm: no place for kernels; set KUN_CACHE")?
        .join("vm");
    std::fs::create_dir_all(&cache).with_context(|| format!("vm: making {}", cache.display()))?;
    std::fs::canonicalize(&cache).with_context(|| format!("vm: {}", cache.display()))
}

/// A command whose process the kernel ends when ours dies, however that comes.
fn mortal(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]).arg(program);
    command
}

/// A child that does not outlive us.
struct Reaped(Child);

impl Reaped {
    fn spawn(command: &mut Command) -> Result<Self> {
        let what = command::describe(command);
        command
            .spawn()
            .map(Self)
            .with_context(|| format!("vm: starting {what}"))
    }

    /// `None`: still running at the deadline, and killed.
    fn wait(&mut self, within: Duration) -> Result<Option<ExitStatus>> {
        let end = Instant::now() + within;
        loop {
            if let Some(status) = self.0.try_wait()? {
                return Ok(Some(status));
            }
            if Instant::now() >= end {
                self.0.kill()?;
                self.0.wait()?;
                return Ok(None);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Reaped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A directory of this run, removed on drop.
struct Scratch(PathBuf);

impl Scratch {
    fn new(cache: &Path) -> Result<Self> {
        let path = cache.join(format!("run-{}", std::process::id()));
        std::fs::create_dir_all(&path).with_context(|| format!("vm: making {}", path.display()))?;
        Ok(Self(path))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
