//! The lab's own ground: a folder of manifests, and pods that the lab starts as a container runtime does. It also plays the
//! controllers that turn them into Pods and EndpointSlices.

use anyhow::{Context, Result};
use kun_harness::Process;
use serde_json::Value;

use super::expand::{self, Endpoint, PodPlan};
use super::pod::{Pod, Workload};
use super::{Ground, Lab};

impl Lab {
    pub(super) fn start_pod(&mut self, plan: PodPlan) -> Result<()> {
        let number = self.started;
        self.started += 1;
        let workload = match plan.labels.get("k8s-app").map(String::as_str) {
            Some("kube-dns") if plan.namespace == "kube-system" => Workload::Dns,
            _ => Workload::Server,
        };
        let node = self.node(plan.node.name)?;
        let netns = self.topology.machine(plan.node);
        let pod = Pod::start(
            &self.name,
            &self.places,
            number,
            plan,
            node,
            netns,
            workload,
        )?;
        self.pods.push(pod);
        Ok(())
    }

    /// Writes pods and EndpointSlices as they are now: a pod is ready while its process runs.
    pub fn publish(&mut self) -> Result<()> {
        if !matches!(self.ground, Ground::Played) {
            return Ok(());
        }
        let running: Vec<bool> = self
            .pods
            .iter_mut()
            .map(|pod| {
                let process = pod.body.as_mut().and_then(|body| body.process.as_mut());
                process.is_some_and(Process::is_running)
            })
            .collect();
        let endpoints: Vec<Endpoint<'_>> = self
            .pods
            .iter()
            .zip(running)
            .map(|(pod, ready)| Endpoint {
                pod: &pod.plan,
                addresses: &pod.addresses,
                ready,
            })
            .collect();
        let slices: Vec<Value> = self
            .services
            .iter()
            .flat_map(|service| expand::endpoint_slices(service, &endpoints))
            .collect();
        let pods: Vec<Value> = self
            .pods
            .iter()
            .map(|pod| expand::pod_json(&pod.plan, &pod.addresses))
            .collect();
        self.folder.write("pods.yaml", &pods)?;
        self.folder.write("endpointslices.yaml", &slices)
    }

    /// `kill -9` of a pod's process; its EndpointSlices do not know yet.
    pub fn kill_in_pod(&mut self, name: &str) -> Result<()> {
        let (_, body) = self.pod_mut(name)?.body_mut()?;
        body.process = None;
        Ok(())
    }

    /// Starts again what a pod runs, and waits until it answers.
    pub fn restart_in_pod(&mut self, name: &str) -> Result<()> {
        let index = self.index_of(name)?;
        let pod = &mut self.pods[index];
        pod.start_process()?;
        pod.wait_ready(self.topology.machine(pod.plan.node))
    }

    /// Adds a pod to a lab that stands, as a controller would.
    pub fn add_pod(&mut self, plan: PodPlan) -> Result<()> {
        self.start_pod(plan)?;
        let last = self.pods.last_mut().context("a pod was added")?;
        last.wait_ready(self.topology.machine(last.plan.node))
    }

    /// Takes a pod away, as a runtime does: its process, `kun-cni` DEL, its namespace.
    pub fn remove_pod(&mut self, name: &str) -> Result<()> {
        let index = self.index_of(name)?;
        let mut pod = self.pods.remove(index);
        let node = self.node(pod.plan.node.name)?;
        let (plan, body) = pod.body_mut()?;
        body.process = None;
        node.cni(self.topology.machine(plan.node), "DEL", &body.attachment)
            .map(drop)
    }

    fn index_of(&self, name: &str) -> Result<usize> {
        self.pods
            .iter()
            .position(|pod| pod.plan.name == name)
            .with_context(|| format!("{name}: no such pod"))
    }

    fn pod_mut(&mut self, name: &str) -> Result<&mut Pod> {
        let index = self.index_of(name)?;
        Ok(&mut self.pods[index])
    }
}
