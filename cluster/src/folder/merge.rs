//! Many files to one cluster: which of two equal names wins, which address a Service gets, and what is different from last time.
//! Pure.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use foldhash::fast::RandomState;

use crate::Manifest;
use crate::{Delta, Kind, Meta, Object, ObjectName, Service, ServiceType};

/// The cluster as it was last told.
#[derive(Debug, Default)]
pub(super) struct Merged(HashMap<Kind, HashMap<ObjectName, Object, RandomState>, RandomState>);

/// The cluster as the files say it, borrowed from them: a change of one file must not copy the names of all.
type View<'m> = HashMap<(Kind, &'m ObjectName), Cow<'m, Object>, RandomState>;

impl Merged {
    /// Takes over what the files say, in their order. Gives what is different, removals first and each half in order of kind and
    /// name, and a line for each object that stands in two files.
    pub(super) fn update<'m>(
        &mut self,
        files: impl Iterator<Item = &'m Manifest> + Clone,
    ) -> (Vec<Delta>, Vec<String>) {
        let mut duplicates = Vec::new();
        let known = self.0.values().map(HashMap::len).sum();
        let mut view = View::with_capacity_and_hasher(known, RandomState::default());
        for object in files.clone().flat_map(|manifest| &manifest.objects) {
            let kind = object.kind();
            let first = view
                .entry((kind, &object.meta().name))
                .or_insert(Cow::Borrowed(object));
            // Pointers: two files may say the very same.
            if !matches!(first, Cow::Borrowed(o) if std::ptr::eq(*o, object)) {
                duplicates.push(duplicate(&format!("{kind:?}"), object.meta(), first.meta()));
            }
        }
        give_addresses(&mut view, files, &mut duplicates);
        (self.replace(&view), duplicates)
    }

    fn replace(&mut self, view: &View<'_>) -> Vec<Delta> {
        let mut removed: Vec<(Kind, ObjectName)> = Vec::new();
        for (kind, objects) in &mut self.0 {
            objects.retain(|name, _| {
                let stays = view.contains_key(&(*kind, name));
                if !stays {
                    removed.push((*kind, name.clone()));
                }
                stays
            });
        }
        let mut upserts: Vec<(Kind, &ObjectName, &Object)> = Vec::new();
        for ((kind, name), object) in view {
            let known = self.0.get(kind).and_then(|objects| objects.get(*name));
            if known.is_some_and(|known| is_another(known.meta(), object.meta())) {
                removed.push((*kind, (*name).clone()));
            }
            if known != Some(object.as_ref()) {
                upserts.push((*kind, name, object));
            }
        }
        removed.sort();
        upserts.sort_by_key(|(kind, name, _)| (*kind, *name));
        for (kind, name, object) in &upserts {
            self.0
                .entry(*kind)
                .or_default()
                .insert((*name).clone(), (*object).clone());
        }
        let removed = removed
            .into_iter()
            .map(|(kind, name)| Delta::Remove(kind, name));
        removed
            .chain(
                upserts
                    .into_iter()
                    .map(|(_, _, object)| Delta::Upsert(object.clone())),
            )
            .collect()
    }
}

/// Whether another object stands under the name now. Manifests without uids are one object as long as the name is there.
fn is_another(before: &Meta, now: &Meta) -> bool {
    !before.uid.is_empty() && !now.uid.is_empty() && before.uid != now.uid
}

/// A ServiceAddress gives its Service the addresses that a status would; a status in the manifest itself goes first.
fn give_addresses<'m>(
    view: &mut View<'m>,
    files: impl Iterator<Item = &'m Manifest>,
    duplicates: &mut Vec<String>,
) {
    let mut first_of: HashMap<&ObjectName, &Meta, RandomState> = HashMap::default();
    for address in files.flat_map(|manifest| &manifest.addresses) {
        let name = &address.meta.name;
        if let Some(first) = first_of.get(name) {
            duplicates.push(duplicate("ServiceAddress", &address.meta, first));
            continue;
        }
        first_of.insert(name, &address.meta);
        let Some(found) = view.get_mut(&(Kind::Service, name)) else {
            continue;
        };
        let Object::Service(service) = found.as_ref() else {
            continue;
        };
        if service.kind == ServiceType::LoadBalancer && service.load_balancer_ips.is_empty() {
            let given = Service {
                load_balancer_ips: address.addresses.clone(),
                ..Service::clone(service)
            };
            *found = Cow::Owned(Object::Service(Arc::new(given)));
        }
    }
}

fn duplicate(kind: &str, here: &Meta, first: &Meta) -> String {
    format!(
        "{}: {kind} {} is also in {}, which wins; remove one of them",
        here.origin, here.name, first.origin
    )
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::net::IpAddr;

    use proptest::prelude::*;

    use super::*;
    use crate::folder::parse_manifest;

    /// A file's text: LoadBalancer services of few names, in two versions, and addresses for them.
    fn file() -> impl Strategy<Value = String> {
        let service = (0_u8..3, 1_u8..3).prop_map(|(name, port)| {
            format!("---\n{{apiVersion: v1, kind: Service, metadata: {{name: s{name}}}, spec: {{type: LoadBalancer, ports: [{{port: {port}}}]}}}}\n")
        });
        let address = (0_u8..3, 1_u8..3).prop_map(|(name, last)| {
            format!("---\n{{apiVersion: kun.network/v1alpha1, kind: ServiceAddress, metadata: {{name: s{name}}}, spec: {{addresses: [192.0.2.{last}]}}}}\n")
        });
        let namespace = (0_u8..3).prop_map(|name| {
            format!("---\n{{apiVersion: v1, kind: Namespace, metadata: {{name: n{name}}}}}\n")
        });
        prop::collection::vec(prop_oneof![service, address, namespace], 0..5)
            .prop_map(|docs| docs.concat())
    }

    /// Name to port and address, read naively: the first object and the first address of a name.
    fn naive(files: &[Manifest]) -> BTreeMap<String, Option<(u16, Vec<IpAddr>)>> {
        let mut all = BTreeMap::new();
        for object in files.iter().flat_map(|f| &f.objects) {
            let name = object.meta().name.clone();
            let first = files
                .iter()
                .flat_map(|f| &f.addresses)
                .find(|a| a.meta.name == name);
            let ips = first.map(|a| a.addresses.clone()).unwrap_or_default();
            all.entry(name.to_string()).or_insert(match object {
                Object::Service(service) => Some((service.ports[0].port, ips)),
                _ => None,
            });
        }
        all
    }

    proptest! {
        #[test]
        fn the_deltas_add_up_to_what_the_files_say(steps in prop::collection::vec(prop::collection::vec(file(), 0..4), 1..5)) {
            let (mut merged, mut told) = (Merged::default(), BTreeMap::new());
            for texts in steps {
                let parsed = texts.iter().enumerate().map(|(i, text)| parse_manifest(&format!("{i}.yaml"), text).expect("good"));
                let files: Vec<Manifest> = parsed.collect();
                let (deltas, duplicates) = merged.update(files.iter());
                for delta in deltas {
                    match delta {
                        Delta::Upsert(object) => {
                            let port_and_ips = match &object {
                                Object::Service(s) => Some((s.ports[0].port, s.load_balancer_ips.clone())),
                                _ => None,
                            };
                            told.insert(object.meta().name.to_string(), port_and_ips);
                        }
                        Delta::Remove(_, name) => prop_assert!(told.remove(&name.to_string()).is_some(), "{name} removed twice"),
                    }
                }
                let said = naive(&files);
                prop_assert_eq!(&told, &said);
                let objects: usize = files.iter().map(|f| f.objects.len()).sum();
                let addresses: usize = files.iter().map(|f| f.addresses.len()).sum();
                let mut names: Vec<_> = files.iter().flat_map(|f| &f.addresses).map(|a| &a.meta.name).collect();
                names.sort();
                names.dedup();
                prop_assert_eq!(duplicates.len(), objects - said.len() + addresses - names.len());
                let (again, _) = merged.update(files.iter());
                prop_assert!(again.is_empty(), "the same files made {:?}", again);
            }
        }
    }
}
