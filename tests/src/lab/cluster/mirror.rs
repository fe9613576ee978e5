//! Services, EndpointSlices and Pods of the API server, copied into the manifest folder as they change, for programs that read
//! nothing else.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Result;
use serde_json::Value;

use super::super::folder::Folder;
use super::Cluster;
use super::watch::Watch;

const KINDS: [(&str, &str, &str); 3] = [
    ("services", "v1", "Service"),
    ("endpointslices", "discovery.k8s.io/v1", "EndpointSlice"),
    ("pods", "v1", "Pod"),
];

/// Copies until it drops.
#[derive(Debug)]
pub struct Mirror {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Mirror {
    /// Begins.
    pub fn start(cluster: &Cluster, folder: &Folder) -> Result<Self> {
        let mut watches = Vec::new();
        for (kind, _, _) in KINDS {
            watches.push(cluster.watch(kind)?);
        }
        let stop = Arc::new(AtomicBool::new(false));
        let (told, folder) = (stop.clone(), folder.clone());
        let thread = std::thread::spawn(move || {
            let mut last = vec![Vec::new(); watches.len()];
            while !told.load(Ordering::Relaxed) {
                copy(&watches, &folder, &mut last);
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

fn copy(watches: &[Watch], folder: &Folder, last: &mut [Vec<Value>]) {
    for ((watch, last), (kind, version, name)) in watches.iter().zip(last).zip(KINDS) {
        let mut now = watch.objects();
        for object in &mut now {
            object["apiVersion"] = Value::from(version);
            object["kind"] = Value::from(name);
            object["metadata"]["managedFields"] = Value::Null;
        }
        if now != *last && folder.write(&format!("{kind}.yaml"), &now).is_ok() {
            *last = now;
        }
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
