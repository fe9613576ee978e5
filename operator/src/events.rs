//! Shortages as Events of the object that lacks something, where `kubectl describe` shows them. Governing: events.k8s.io/v1.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kun_cluster::Store;

use crate::plan::Shortage;

/// What signs them.
const CONTROLLER: &str = "kun.network/operator";

/// Events of one pass. A cluster that runs out of a pool lacks things by the thousand; the log and the metrics have them all.
const MOST: usize = 32;

/// Longest note that the API server takes.
const LONGEST: usize = 1024;

/// Events for what is told for the first time.
pub fn of<'a>(
    new: &'a BTreeSet<Shortage>,
    store: &'a Store,
    reporter: &'a str,
) -> impl Iterator<Item = Event> + 'a {
    let events = new.iter().filter_map(move |shortage| {
        let (regarding, reason) = regarding(shortage, store)?;
        let now = Timestamp::now();
        // Events about objects without a namespace lie in `default`.
        let namespace = regarding
            .namespace
            .clone()
            .unwrap_or_else(|| "default".to_owned());
        let mut note = shortage.to_string();
        note.truncate(note.floor_char_boundary(LONGEST));
        Some(Event {
            metadata: ObjectMeta {
                namespace: Some(namespace),
                name: Some(format!(
                    "{}.{:x}",
                    regarding.name.as_deref().unwrap_or_default(),
                    now.as_nanosecond()
                )),
                ..ObjectMeta::default()
            },
            event_time: Some(MicroTime(now)),
            action: Some("Assign".to_owned()),
            reason: Some(reason.to_owned()),
            note: Some(note),
            regarding: Some(regarding),
            reporting_controller: Some(CONTROLLER.to_owned()),
            // At most 128 characters.
            reporting_instance: Some(reporter.chars().take(128).collect()),
            type_: Some("Warning".to_owned()),
            ..Event::default()
        })
    });
    events.take(MOST)
}

fn regarding(shortage: &Shortage, store: &Store) -> Option<(ObjectReference, &'static str)> {
    let node = |name: &str| ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Node".to_owned()),
        name: Some(name.to_owned()),
        // What `kubectl describe node` looks for is the name here, since kubelets write it so.
        uid: Some(name.to_owned()),
        ..ObjectReference::default()
    };
    Some(match shortage {
        Shortage::Blocks { node: name, .. } => (node(name), "NoFreeBlock"),
        Shortage::Conflict { nodes, .. } => (node(&nodes[0]), "BlockConflict"),
        Shortage::Address { service, .. } => {
            let object = store.service(service)?;
            let reference = ObjectReference {
                api_version: Some("v1".to_owned()),
                kind: Some("Service".to_owned()),
                namespace: Some(service.namespace.to_string()),
                name: Some(service.name.to_string()),
                uid: Some(object.meta.uid.to_string()),
                ..ObjectReference::default()
            };
            (reference, "NoFreeAddress")
        }
    })
}
