//! What the API server holds of one kind, followed by `kubectl get --watch`: asking it again and again would cost a small machine
//! more than the cluster does.

use std::collections::BTreeMap;
use std::io::BufReader;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use serde_json::Value;

type Objects = BTreeMap<String, Value>;

/// A follower. It ends with its guard, and what it saw stays as it was when the API server goes away.
#[derive(Debug)]
pub struct Watch {
    kubectl: Child,
    objects: Arc<Mutex<Objects>>,
}

impl Watch {
    /// Follows every object of the kind.
    pub fn start(mut kubectl: Command, kind: &str) -> Result<Self> {
        kubectl
            .args(["get", kind, "--all-namespaces", "--watch"])
            .args(["--output-watch-events", "-o", "json"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut kubectl = kubectl.spawn().context("starting kubectl")?;
        let output = kubectl
            .stdout
            .take()
            .context("a piped child has an output")?;
        let objects = Arc::<Mutex<Objects>>::default();
        let seen = objects.clone();
        std::thread::spawn(move || {
            let events = serde_json::Deserializer::from_reader(BufReader::new(output));
            // Its output ends with it, in the midst of an event or not.
            for event in events.into_iter::<Value>().map_while(Result::ok) {
                take(
                    &event,
                    &mut seen.lock().unwrap_or_else(PoisonError::into_inner),
                );
            }
        });
        Ok(Self { kubectl, objects })
    }

    /// What there is now.
    pub fn objects(&self) -> Vec<Value> {
        let objects = self.objects.lock().unwrap_or_else(PoisonError::into_inner);
        objects.values().cloned().collect()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.kubectl.kill();
        let _ = self.kubectl.wait();
    }
}

fn take(event: &Value, objects: &mut Objects) {
    let object = &event["object"];
    let meta = &object["metadata"];
    let name = |field: &str| meta[field].as_str().unwrap_or_default();
    let key = format!("{}/{}", name("namespace"), name("name"));
    match event["type"].as_str() {
        Some("DELETED") => drop(objects.remove(&key)),
        Some("ADDED" | "MODIFIED") => drop(objects.insert(key, object.clone())),
        // Bookmarks and errors name no object.
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn events_add_up() {
        let mut objects = Objects::new();
        let event = |kind: &str, phase: &str| json!({"type": kind, "object": {"metadata": {"namespace": "n", "name": "p"}, "phase": phase}});
        take(&event("ADDED", "a"), &mut objects);
        take(&event("MODIFIED", "b"), &mut objects);
        take(&json!({"type": "BOOKMARK", "object": {}}), &mut objects);
        assert_eq!(objects["n/p"]["phase"], "b");
        take(&event("DELETED", "b"), &mut objects);
        assert!(objects.is_empty());
    }
}
