//! A Kubernetes namespace for one test.

use anyhow::Result;

use super::ControlPlane;
use crate::names;

/// Deleted on drop, by the controllers, in their own time: nobody else has its name.
#[derive(Debug)]
pub struct Namespace<'a> {
    plane: &'a ControlPlane,
    name: String,
}

impl<'a> Namespace<'a> {
    pub(super) fn new(plane: &'a ControlPlane, what: &str) -> Result<Self> {
        let namespace = Self {
            plane,
            name: names::unique(what),
        };
        plane.kubectl(&["create", "namespace", &namespace.name], "")?;
        // Pods are refused until it is there.
        namespace.kubectl(
            &[
                "wait",
                "--for=create",
                "serviceaccount/default",
                "--timeout=60s",
            ],
            "",
        )?;
        Ok(namespace)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// `kubectl` in this namespace, as the administrator.
    pub fn kubectl(&self, words: &[&str], stdin: &str) -> Result<String> {
        let mut all = vec!["--namespace", &self.name];
        all.extend(words);
        self.plane.kubectl(&all, stdin)
    }
}

impl Drop for Namespace<'_> {
    fn drop(&mut self) {
        let delete = ["delete", "namespace", &self.name, "--wait=false"];
        let _ = self.plane.kubectl(&delete, "");
        // No kubelet confirms their end, and the namespace would wait for it for ever. From now on nobody makes new ones.
        let pods = ["delete", "pods", "--all", "--force", "--grace-period=0"];
        let _ = self.kubectl(&pods, "");
    }
}
