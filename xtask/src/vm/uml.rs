//! User Mode Linux: the guest's kernel is a process here, and this machine's root its hostfs.

use std::fs;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Result, ensure};

use super::kernels::Kernel;
use super::{Reaped, Run, Scratch, guest};

/// The guest's output is a file that it appends to; this is how late it may be shown.
const SHOW_EVERY: Duration = Duration::from_millis(100);

pub(super) fn run(run: &Run<'_>, kernel: &Kernel) -> Result<u8> {
    use std::os::unix::fs::PermissionsExt;
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    ensure!(
        !cpu.contains(" amx_tile"),
        "vm: this CPU has AMX, whose registers User Mode Linux before 6.13 has no room for: it dies at its first process; take --kernel 6.1"
    );
    let scratch = Scratch::new(&run.cache)?;
    let (init, status, output, console) = (
        scratch.file("init"),
        scratch.file("status"),
        scratch.file("output"),
        scratch.file("console"),
    );
    fs::write(
        &init,
        guest::uml_init(
            &kernel.modules,
            &kernel.version,
            &scratch.0,
            run.writable.as_deref(),
        ),
    )?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
    fs::write(
        scratch.file("command"),
        guest::uml_command(run.modules, run.command),
    )?;
    fs::write(&output, "")?;

    let mut uml = Command::new(&kernel.image);
    uml.arg(format!("mem={}M", run.memory))
        .arg("rootfstype=hostfs")
        .arg("rootflags=/")
        .arg("ro");
    uml.arg(format!("init={}", init.display()))
        .args(["con=null", "con0=null,fd:2", "quiet"]);
    let log = fs::File::create(&console)?;
    uml.stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    let mut machine = Reaped::spawn(&mut uml)?;
    let over = AtomicBool::new(false);
    let ended = std::thread::scope(|scope| {
        let shown = scope.spawn(|| follow(&output, &over));
        let ended = machine.wait(run.timeout);
        over.store(true, Ordering::Release);
        let _ = shown.join();
        ended
    })?;
    run.verdict(ended, &status, &console)
}

/// Copies what is appended to `file` to stdout, until it is over and all is shown.
fn follow(file: &Path, over: &AtomicBool) -> io::Result<()> {
    let mut from = 0;
    loop {
        let last = over.load(Ordering::Acquire);
        let mut file = fs::File::open(file)?;
        file.seek(SeekFrom::Start(from))?;
        let mut bytes = Vec::new();
        from += file.read_to_end(&mut bytes)? as u64;
        io::stdout().write_all(&bytes)?;
        io::stdout().flush()?;
        if last {
            return Ok(());
        }
        std::thread::sleep(SHOW_EVERY);
    }
}
