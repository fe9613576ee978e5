//! The scripts that run inside a guest: to the overlay root, then to the command.

use std::fmt::Write as _;
use std::path::Path;

/// The end of every guest: the status is told, then the machine goes. The pause lets the last bytes leave their queue.
const GOODBYE: &str = "sync\nsleep 0.1\necho o >/proc/sysrq-trigger\nsleep 60\n";

/// First process of a QEMU guest, run by busybox from the initramfs.
pub(super) fn qemu_init(kernel_modules: &Path, version: &str, writable: Option<&Path>) -> String {
    let mut s = String::from(
        "#!/bin/busybox sh\n\
         B=/bin/busybox\n\
         fail() { echo \"vm: $*\" >/dev/console; $B poweroff -f; }\n\
         $B mount -t proc proc /proc; $B mount -t sysfs sys /sys; $B mount -t devtmpfs dev /dev\n\
         for f in /modules/*.ko; do $B insmod $f; done\n\
         $B mount -t virtiofs -o ro host /lower || fail 'the root is not shared'\n\
         $B mount -t tmpfs -o mode=755 up /up; $B mkdir /up/u /up/w\n\
         $B mount -t overlay -o lowerdir=/lower,upperdir=/up/u,workdir=/up/w root /new || fail 'no overlay'\n\
         for d in proc sys dev; do $B mount -o move /$d /new/$d; done\n",
    );
    let modules = quoted(&kernel_modules.display().to_string());
    let _ = write!(
        s,
        "$B mkdir -p /new/lib/modules/{version}\n\
         $B mount -o bind /lower{modules} /new/lib/modules/{version}\n"
    );
    s.push_str(
        "$B mount -t tmpfs run /new/run; $B mkdir -p /new/run/netns /new/dev/pts /new/dev/shm\n\
         $B mount -t devpts pts /new/dev/pts; $B mount -t tmpfs shm /new/dev/shm\n\
         $B mount -t cgroup2 cgroup2 /new/sys/fs/cgroup\n\
         $B mount -t bpf bpf /new/sys/fs/bpf\n\
         $B mount -t tracefs tracefs /new/sys/kernel/tracing\n",
    );
    if let Some(writable) = writable {
        let writable = quoted(&writable.display().to_string());
        let _ = writeln!(
            s,
            "$B mount -t virtiofs rw /new{writable} || fail 'the writable directory is not shared'"
        );
    }
    s.push_str("$B cp /command /new/run/command\nexec $B switch_root /new /bin/sh /run/command\n");
    s
}

/// The command of a QEMU guest: output and status leave by two virtio ports.
pub(super) fn qemu_command(modules: &[String], command: &[String]) -> String {
    let mut s = String::from(
        "for p in /sys/class/virtio-ports/*; do\n\
         \x20 case $(cat $p/name) in output) o=/dev/${p##*/};; status) r=/dev/${p##*/};; esac\n\
         done\n\
         exec >$o 2>&1 </dev/null\n",
    );
    s.push_str(&prologue(modules));
    let _ = write!(s, "{}\necho $? >$r\n{GOODBYE}", words(command));
    s
}

/// First process of a User Mode Linux guest, whose root is the host's, read-only. `scratch` is this run's directory.
pub(super) fn uml_init(
    kernel_modules: &Path,
    version: &str,
    scratch: &Path,
    writable: Option<&Path>,
) -> String {
    let modules = quoted(&kernel_modules.display().to_string());
    let scratch = quoted(&scratch.display().to_string());
    let mut s = format!(
        "#!/bin/sh\n\
         fail() {{ echo \"vm: $*\" >/dev/console; echo o >/proc/sysrq-trigger; sleep 60; }}\n\
         mount -t proc proc /proc; mount -t tmpfs up /mnt; mkdir /mnt/u /mnt/w /mnt/new /mnt/run\n\
         insmod {modules}/kernel/fs/overlayfs/overlay.ko\n\
         mount -t hostfs -o {scratch} scratch /mnt/run\n\
         mount -t overlay -o lowerdir=/,upperdir=/mnt/u,workdir=/mnt/w root /mnt/new && cd /mnt/new || fail 'no overlay'\n\
         mkdir -p lib/modules/{version}; mount -o bind {modules} lib/modules/{version}\n\
         mount -t proc proc proc; mount -t sysfs sys sys; mount -t tmpfs run run; mkdir -p run/netns run/vm\n\
         mount -o bind /mnt/run run/vm\n\
         mount -t devtmpfs dev dev; mkdir -p dev/pts dev/shm; mount -t devpts pts dev/pts; mount -t tmpfs shm dev/shm\n\
         mount -t cgroup2 cgroup2 sys/fs/cgroup; mount -t bpf bpf sys/fs/bpf\n"
    );
    if let Some(writable) = writable {
        let writable = quoted(&writable.display().to_string());
        let _ = writeln!(
            s,
            "mount -t hostfs -o {writable} rw /mnt/new{writable} || fail 'the writable directory is not shared'"
        );
    }
    s.push_str("exec chroot . /bin/sh /run/vm/command\n");
    s
}

/// The command of a User Mode Linux guest: output and status are files of the run's directory.
pub(super) fn uml_command(modules: &[String], command: &[String]) -> String {
    let prologue = prologue(modules);
    format!(
        "exec >>/run/vm/output 2>&1 </dev/null\n{prologue}{}\necho $? >/run/vm/status\n{GOODBYE}",
        words(command)
    )
}

/// The caller's environment and directory, loopback, modules.
fn prologue(modules: &[String]) -> String {
    let mut s = String::new();
    for (name, value) in std::env::vars() {
        let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        if plain && !name.starts_with(|c: char| c.is_ascii_digit()) && name != "PWD" {
            let _ = writeln!(s, "export {name}={}", quoted(&value));
        }
    }
    s.push_str("ip link set lo up\n");
    for module in modules {
        let module = quoted(module);
        let _ = writeln!(s, "modprobe {module} || echo vm: no module {module}");
    }
    if let Ok(directory) = std::env::current_dir() {
        let _ = writeln!(s, "cd {}", quoted(&directory.display().to_string()));
    }
    s
}

/// A command line for a POSIX shell.
pub(super) fn words(command: &[String]) -> String {
    command
        .iter()
        .map(|w| quoted(w))
        .collect::<Vec<_>>()
        .join(" ")
}

/// One word for a POSIX shell, whatever is in it.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_stays_one_word() {
        for word in ["plain", "two words", "it's", "$HOME `id` \"x\" \\ \n;", ""] {
            let script = format!("printf %s {}", quoted(word));
            let output = std::process::Command::new("sh")
                .args(["-c", &script])
                .output()
                .unwrap();
            assert_eq!(String::from_utf8_lossy(&output.stdout), word);
        }
    }
}
