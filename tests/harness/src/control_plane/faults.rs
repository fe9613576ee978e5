//! What a test does to a control plane of its own: kill, freeze, restart, change over, forget.
//!
//! All of it takes `&mut self`: the shared server is handed out by `&` and cannot be broken.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::ControlPlane;

/// A process of the control plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// kube-apiserver.
    ApiServer,
    /// The second kube-apiserver, once [`ControlPlane::add_api_server`] has made it.
    SecondApiServer,
    /// etcd.
    Etcd,
    /// kube-controller-manager.
    Controllers,
    /// kube-scheduler, where it was asked for.
    Scheduler,
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Self::ApiServer => "kube-apiserver",
            Self::SecondApiServer => "kube-apiserver-2",
            Self::Etcd => "etcd",
            Self::Controllers => "kube-controller-manager",
            Self::Scheduler => "kube-scheduler",
        }
    }
}

/// How to reach a second API server.
#[derive(Debug, Clone)]
pub struct ApiServer {
    /// `https://…`
    pub server: String,
    /// An administrator's kubeconfig.
    pub kubeconfig: PathBuf,
}

/// A copy of etcd's data. It can be restored once: it becomes the data.
#[derive(Debug)]
pub struct Backup(PathBuf);

fn copy(from: &Path, to: &Path) -> Result<()> {
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let to = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            std::fs::create_dir(&to)?;
            copy(&entry.path(), &to)?;
        } else {
            std::fs::copy(entry.path(), &to)?;
        }
    }
    Ok(())
}

impl ControlPlane {
    /// SIGKILL; returns when it is gone. Connections are reset, its port is free, etcd's data stays.
    pub fn kill(&mut self, part: Part) -> Result<()> {
        self.ask(&format!("kill {}", part.name()))?;
        self.ready.pids.remove(part.name());
        Ok(())
    }

    /// SIGTERM; returns when it has ended in its own way.
    pub fn terminate(&mut self, part: Part) -> Result<()> {
        self.ask(&format!("terminate {}", part.name()))?;
        self.ready.pids.remove(part.name());
        Ok(())
    }

    /// Starts it again, on the same port, with further flags for this run; returns when it is ready.
    pub fn start(&mut self, part: Part, flags: &[&str]) -> Result<()> {
        let words: Vec<&str> = std::iter::once(part.name())
            .chain(flags.iter().copied())
            .collect();
        let answer = self.ask(&format!("start {}", words.join(" ")))?;
        self.ready.pids.insert(part.name().to_owned(), answer.pid);
        Ok(())
    }

    /// SIGSTOP: connections stay open and nothing answers. A dropped control plane ends all the same.
    pub fn freeze(&mut self, part: Part) -> Result<()> {
        self.ask(&format!("freeze {}", part.name())).map(drop)
    }

    /// SIGCONT.
    pub fn thaw(&mut self, part: Part) -> Result<()> {
        self.ask(&format!("thaw {}", part.name())).map(drop)
    }

    /// A second API server over the same etcd, on another port. One: a second shows all that a third would.
    pub fn add_api_server(&mut self, flags: &[&str]) -> Result<ApiServer> {
        let words: Vec<&str> = std::iter::once(Part::ApiServer.name())
            .chain(flags.iter().copied())
            .collect();
        let answer = self.ask(&format!("add {}", words.join(" ")))?;
        self.ready
            .pids
            .insert(Part::SecondApiServer.name().to_owned(), answer.pid);
        Ok(ApiServer {
            server: answer.server,
            kubeconfig: answer.kubeconfig,
        })
    }

    /// etcd forgets what was before now; gives the revision. The API server still serves what its watch cache holds: kill and start
    /// it as well ([`ControlPlane::forget`]), and every older resourceVersion is answered 410 Gone.
    pub fn compact(&mut self) -> Result<i64> {
        Ok(self.ask("compact")?.revision)
    }

    /// Kill, compaction, start: whoever resumes a watch from before gets 410 Gone.
    pub fn forget(&mut self) -> Result<()> {
        self.kill(Part::ApiServer)?;
        self.compact()?;
        self.start(Part::ApiServer, &[])
    }

    /// A copy of etcd's data as it is now. etcd stands still meanwhile, so that it is of one moment, as after a loss of power.
    pub fn back_up(&mut self) -> Result<Backup> {
        self.freeze(Part::Etcd)?;
        let backup = self.dir.join("backup");
        let copied = std::fs::create_dir(&backup)
            .map_err(Into::into)
            .and_then(|()| copy(&self.data(), &backup));
        self.thaw(Part::Etcd)?;
        copied.with_context(|| backup.display().to_string())?;
        Ok(Backup(backup))
    }

    /// Everything ends, and comes back on what was backed up: as whoever restores a backup does it, on the same ports. Revisions go on from
    /// where the backup ended.
    pub fn restore(&mut self, backup: Backup) -> Result<()> {
        for part in [Part::Controllers, Part::ApiServer, Part::Etcd] {
            self.kill(part)?;
        }
        let data = self.data();
        std::fs::remove_dir_all(&data).with_context(|| data.display().to_string())?;
        std::fs::rename(&backup.0, &data).with_context(|| backup.0.display().to_string())?;
        for part in [Part::Etcd, Part::ApiServer, Part::Controllers] {
            self.start(part, &[])?;
        }
        Ok(())
    }

    fn data(&self) -> PathBuf {
        self.dir.join("etcd")
    }

    /// The process id of a part that runs, to see what it spends.
    pub fn pid(&self, part: Part) -> Result<u32> {
        let pid = self.ready.pids.get(part.name());
        pid.copied()
            .with_context(|| format!("{} does not run", part.name()))
    }
}
