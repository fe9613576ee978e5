//! A QEMU machine without hardware virtualisation, the host's root shared by virtiofs.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::kernels::Kernel;
use super::{Reaped, Run, Scratch, guest, initramfs, mortal};

/// virtiofsd makes its socket in milliseconds.
const SHARE_WITHIN: Duration = Duration::from_secs(10);
/// CPUs of a guest that does not count: as many as this project's machines have.
const CPUS: u32 = 2;

pub(super) fn virtiofsd() -> Option<&'static Path> {
    ["/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd"]
        .into_iter()
        .map(Path::new)
        .find(|p| p.exists())
}

pub(super) fn run(run: &Run<'_>, kernel: &Kernel) -> Result<u8> {
    let scratch = Scratch::new(&run.cache)?;
    let init = guest::qemu_init(&kernel.modules, &kernel.version, run.writable.as_deref());
    let command = guest::qemu_command(run.modules, run.command);
    fs::write(
        scratch.file("initramfs"),
        initramfs::build(kernel, &init, &command)?,
    )?;
    let (status, console) = (scratch.file("status"), scratch.file("console"));

    let mut shares = vec![Share::new(&scratch, "host", Path::new("/"), "always")?];
    if let Some(writable) = &run.writable {
        shares.push(Share::new(&scratch, "rw", writable, "auto")?);
    }
    let mut qemu = mortal("qemu-system-x86_64".as_ref());
    qemu.args([
        "-M",
        "q35,usb=off,sata=off,smbus=off",
        "-nodefaults",
        "-no-user-config",
    ]);
    qemu.args(["-display", "none", "-no-reboot", "-net", "none"]);
    // QEMU 7.2's cmpxchg16b panics kernels from 6.12 on; a CPU without it is a CPU still.
    qemu.args(["-cpu", "max,-cx16"]);
    if run.count_instructions {
        qemu.args([
            "-accel",
            "tcg,thread=single",
            "-icount",
            "shift=0,sleep=off",
            "-smp",
            "1",
        ]);
    } else {
        qemu.args([
            "-accel",
            "tcg,thread=multi,tb-size=256",
            "-smp",
            &CPUS.to_string(),
        ]);
    }
    qemu.args(["-m", &run.memory.to_string()]);
    // vhost-user devices reach into the guest's memory.
    qemu.arg("-object").arg(format!(
        "memory-backend-memfd,id=mem,size={}M,share=on",
        run.memory
    ));
    qemu.args(["-numa", "node,memdev=mem"]);
    qemu.arg("-kernel")
        .arg(&kernel.image)
        .arg("-initrd")
        .arg(scratch.file("initramfs"));
    // The emulated TSC runs at the pace of the host's, which the guest misjudges when the host is busy: minutes pass in seconds. Where
    // instructions are counted it is the counter itself.
    let clock = match run.count_instructions {
        true => "tsc=reliable",
        false => "tsc=unstable clocksource=hpet",
    };
    qemu.arg("-append").arg(format!(
        "quiet console=ttyS0 panic=-1 mitigations=off audit=0 random.trust_cpu=on nokaslr {clock}"
    ));
    qemu.arg("-serial")
        .arg(format!("file:{}", console.display()));
    for share in &shares {
        qemu.args(share.arguments());
    }
    // The output port is this process's pipe, unless the caller has a file for it; the status port is a file.
    qemu.args(["-device", "virtio-serial-pci", "-chardev"]);
    let output = run.output.unwrap_or(Path::new("/dev/stdout"));
    qemu.arg(format!("file,id=output,path={}", output.display()));
    qemu.args(["-device", "virtserialport,chardev=output,name=output"]);
    qemu.arg("-chardev")
        .arg(format!("file,id=status,path={}", status.display()));
    qemu.args(["-device", "virtserialport,chardev=status,name=status"]);
    qemu.stdin(Stdio::null()).stdout(Stdio::piped());

    let mut machine = Reaped::spawn(&mut qemu)?;
    let mut output = machine
        .0
        .stdout
        .take()
        .context("vm: QEMU's output is piped")?;
    let shown = std::thread::spawn(move || io::copy(&mut output, &mut io::stdout()));
    let ended = machine.wait(run.timeout)?;
    let _ = shown.join();
    run.verdict(ended, &status, &console)
}

/// A directory shown to the guest, and the process that shows it.
struct Share {
    tag: &'static str,
    socket: PathBuf,
    _daemon: Reaped,
}

impl Share {
    fn new(scratch: &Scratch, tag: &'static str, directory: &Path, cache: &str) -> Result<Self> {
        let program =
            virtiofsd().context("vm: no virtiofsd; cargo xtask setup --vm installs it")?;
        let (socket, log) = (
            scratch.file(&format!("{tag}.sock")),
            scratch.file(&format!("{tag}.log")),
        );
        let mut daemon = mortal(program);
        daemon.arg(format!("--socket-path={}", socket.display()));
        daemon.arg("-o").arg(format!(
            "source={},cache={cache},sandbox=chroot",
            directory.display()
        ));
        let file = fs::File::create(&log)?;
        daemon
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file);
        let daemon = Reaped::spawn(&mut daemon)?;
        let end = Instant::now() + SHARE_WITHIN;
        while !socket.exists() {
            if Instant::now() >= end {
                let said = fs::read_to_string(&log).unwrap_or_default();
                bail!(
                    "vm: virtiofsd cannot share {}: {}; it needs root",
                    directory.display(),
                    said.trim()
                );
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(Self {
            tag,
            socket,
            _daemon: daemon,
        })
    }

    fn arguments(&self) -> [String; 4] {
        let Self { tag, socket, .. } = self;
        [
            "-chardev".to_owned(),
            format!("socket,id=c-{tag},path={}", socket.display()),
            "-device".to_owned(),
            format!("vhost-user-fs-pci,chardev=c-{tag},tag={tag}"),
        ]
    }
}
