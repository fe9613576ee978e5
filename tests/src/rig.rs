//! The two clusters that the contract is tried on, and the objects that are put into them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use kun_cluster::api::ApiSource;
use kun_cluster::api::write::{Expected, WriteError, Writer};
use kun_cluster::folder::FolderSource;
use kun_cluster::{Kind, ObjectName, Resource, Source};
use kun_harness::wait_for;
use serde_json::{Value, json};

/// A cluster that objects can be put into.
pub trait Rig {
    /// The source over it.
    fn source(&self) -> Result<Source>;
    /// Part of the origin of its objects.
    fn origin(&self) -> &'static str;
    /// Creates or changes objects, in order.
    fn put(&mut self, objects: &[Value]) -> Result<()>;
    /// Deletes an object and makes another of its name.
    fn replace(&mut self, object: &Value) -> Result<()>;
    /// Deletes an object.
    fn remove(&mut self, kind: &str, name: &ObjectName) -> Result<()>;
    /// Deletes a namespace with all that is in it.
    fn remove_namespace(&mut self, name: &str) -> Result<()>;
    /// Deletes everything that was put.
    fn clear(&mut self) -> Result<()>;
}

/// What a fresh API server has of its own.
pub fn is_of_the_server(name: &ObjectName) -> bool {
    let own = |text: &str| text == "default" || text.starts_with("kube-");
    own(&name.namespace) || name.namespace.is_empty() && own(&name.name)
}

fn key(object: &Value) -> (String, ObjectName) {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let meta = &object["metadata"];
    let name = ObjectName::new(&text(&meta["namespace"]), &text(&meta["name"]));
    (text(&object["kind"]), name)
}

/// A folder with one file an object.
#[derive(Debug)]
pub struct FolderRig {
    folder: tempfile::TempDir,
    put: BTreeMap<(String, ObjectName), PathBuf>,
}

impl FolderRig {
    /// An empty one.
    pub fn new() -> Result<Self> {
        Ok(Self {
            folder: tempfile::tempdir()?,
            put: BTreeMap::new(),
        })
    }
}

impl Rig for FolderRig {
    fn source(&self) -> Result<Source> {
        Ok(Source::Folder(Box::new(FolderSource::open(
            self.folder.path(),
        )?)))
    }

    fn origin(&self) -> &'static str {
        ".yaml:1"
    }

    fn put(&mut self, objects: &[Value]) -> Result<()> {
        for object in objects {
            let (kind, name) = key(object);
            let file = format!("{kind}-{}-{}.yaml", name.namespace, name.name);
            let path = self.folder.path().join(file);
            let new = self.folder.path().join(".new");
            std::fs::write(&new, object.to_string())?;
            std::fs::rename(&new, &path)?;
            self.put.insert((kind, name), path);
        }
        Ok(())
    }

    fn replace(&mut self, object: &Value) -> Result<()> {
        self.put(std::slice::from_ref(object))
    }

    fn remove(&mut self, kind: &str, name: &ObjectName) -> Result<()> {
        let path = self.put.remove(&(kind.to_owned(), name.clone()));
        Ok(std::fs::remove_file(path.context("was put")?)?)
    }

    fn remove_namespace(&mut self, name: &str) -> Result<()> {
        let inside = |key: &&(String, ObjectName)| {
            *key.1.namespace == *name || key.0 == "Namespace" && *key.1.name == *name
        };
        let keys: Vec<_> = self.put.keys().filter(inside).cloned().collect();
        for (kind, name) in keys {
            self.remove(&kind, &name)?;
        }
        Ok(())
    }

    fn clear(&mut self) -> Result<()> {
        for (_, path) in std::mem::take(&mut self.put) {
            std::fs::remove_file(path)?;
        }
        Ok(())
    }
}

/// A real API server.
#[derive(Debug)]
pub struct ServerRig {
    kubeconfig: PathBuf,
    writer: Writer,
    put: Vec<(String, ObjectName)>,
}

impl ServerRig {
    /// Where our kinds are not defined yet.
    pub fn new(kubeconfig: &Path) -> Result<Self> {
        let writer = Writer::open(Some(kubeconfig))?;
        define_kinds(&writer)?;
        Ok(Self {
            kubeconfig: kubeconfig.to_owned(),
            writer,
            put: Vec::new(),
        })
    }
}

/// Our kinds as an API server knows them that validates nothing: there, objects can be wrong.
pub fn define_kinds(writer: &Writer) -> Result<()> {
    const DEFINITIONS: Resource = Resource {
        kind: "CustomResourceDefinition",
        group: "apiextensions.k8s.io",
        version: "v1",
        plural: "customresourcedefinitions",
        namespaced: false,
    };
    for kind in [Kind::IpPool, Kind::IpamBlock] {
        let resource = Resource::of(kind);
        let mut version = json!({
            "name": resource.version, "served": true, "storage": true,
            "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": true, "properties": {
                "spec": {"type": "object", "x-kubernetes-preserve-unknown-fields": true, "properties": {"node": {"type": "string"}}}}}},
        });
        if kind == Kind::IpamBlock {
            version["selectableFields"] = json!([{"jsonPath": ".spec.node"}]);
        }
        let definition = json!({
            "metadata": {"name": format!("{}.{}", resource.plural, resource.group)},
            "spec": {
                "group": resource.group, "scope": "Cluster", "versions": [version],
                "names": {"kind": resource.kind, "plural": resource.plural, "singular": resource.kind.to_lowercase()},
            },
        });
        writer.create(DEFINITIONS, &definition)?;
        // Established within moments; until then the server does not know the kind.
        let within = Duration::from_secs(30);
        wait_for("the definition", within, || {
            writer.list(resource, None).ok()
        })?;
    }
    Ok(())
}

fn resource(kind: &str) -> Result<Resource> {
    let kinds = [
        Kind::Service,
        Kind::EndpointSlice,
        Kind::Node,
        Kind::Pod,
        Kind::Namespace,
        Kind::Lease,
        Kind::IpPool,
        Kind::IpamBlock,
    ];
    let found = kinds.map(Resource::of).into_iter().find(|r| r.kind == kind);
    found.with_context(|| format!("no kind {kind}"))
}

impl ServerRig {
    fn put_one(&mut self, object: &Value) -> Result<()> {
        let (kind, name) = key(object);
        let resource = resource(&kind)?;
        let mut object = object.clone();
        // The server gives it, and a create that brings one is refused for some kinds.
        object["metadata"]
            .as_object_mut()
            .context("metadata")?
            .remove("uid");
        if kind == "Pod" {
            object["spec"]["containers"] = json!([{"name": "c", "image": "nothing"}]);
            object["spec"]["automountServiceAccountToken"] = json!(false);
            // No kubelet here would end it.
            object["spec"]["terminationGracePeriodSeconds"] = json!(0);
            let account = ObjectName::new(&name.namespace, "default");
            let accounts = Resource {
                kind: "ServiceAccount",
                group: "",
                version: "v1",
                plural: "serviceaccounts",
                namespaced: true,
            };
            let within = Duration::from_secs(30);
            wait_for("the ServiceAccount", within, || {
                self.writer.get(accounts, &account).ok()
            })?;
        }
        match self.writer.create(resource, &object) {
            Ok(_) => self.put.push((kind, name)),
            Err(WriteError::Exists { .. }) => {
                let patch = json!({"spec": object["spec"], "endpoints": object["endpoints"]});
                self.writer.patch(resource, &name, &patch)?;
            }
            Err(error) => bail!(error),
        }
        Ok(())
    }

    fn gone(&self, resource: Resource, name: &ObjectName) -> Result<()> {
        let within = Duration::from_secs(60);
        wait_for("its end", within, || {
            match self.writer.get(resource, name) {
                Err(WriteError::NotFound { .. }) => Some(()),
                _ => None,
            }
        })?;
        Ok(())
    }

    fn delete(&self, kind: &str, name: &ObjectName) -> Result<()> {
        let resource = resource(kind)?;
        match self.writer.delete(resource, name, &Expected::default()) {
            Ok(()) | Err(WriteError::NotFound { .. }) => {}
            Err(error) => bail!(error),
        }
        self.gone(resource, name)
    }
}

impl Rig for ServerRig {
    fn source(&self) -> Result<Source> {
        Ok(Source::Api(Box::new(ApiSource::open(Some(
            &self.kubeconfig,
        ))?)))
    }

    fn origin(&self) -> &'static str {
        "resourceVersion "
    }

    fn put(&mut self, objects: &[Value]) -> Result<()> {
        objects.iter().try_for_each(|object| self.put_one(object))
    }

    fn replace(&mut self, object: &Value) -> Result<()> {
        let (kind, name) = key(object);
        self.remove(&kind, &name)?;
        self.put_one(object)
    }

    fn remove(&mut self, kind: &str, name: &ObjectName) -> Result<()> {
        self.put.retain(|put| put.0 != kind || put.1 != *name);
        self.delete(kind, name)
    }

    fn remove_namespace(&mut self, name: &str) -> Result<()> {
        self.put.retain(|(_, put)| *put.namespace != *name);
        self.remove("Namespace", &ObjectName::new("", name))
    }

    fn clear(&mut self) -> Result<()> {
        while let Some((kind, name)) = self.put.pop() {
            self.delete(&kind, &name)?;
        }
        Ok(())
    }
}

/// A Namespace.
pub fn namespace(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
}

/// A Service of one port.
pub fn service(namespace: &str, name: &str, port: u16) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": namespace, "name": name},
        "spec": {"ports": [{"name": "http", "port": port, "protocol": "TCP"}]},
    })
}

/// `name-x`, a slice of the service with so many endpoints.
pub fn slice(namespace: &str, name: &str, endpoints: u8) -> Value {
    let endpoint = |i| json!({"addresses": [format!("10.64.0.{i}")], "conditions": {"ready": true}, "nodeName": "a", "zone": "z1"});
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"namespace": namespace, "name": format!("{name}-x"), "labels": {"kubernetes.io/service-name": name}},
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        "endpoints": (1..=endpoints).map(endpoint).collect::<Vec<_>>(),
    })
}

/// A Node in zone z1.
pub fn node(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": "z1"}}})
}

/// The same with a uid, which only a folder takes from us.
pub fn node_with_uid(name: &str, uid: &str) -> Value {
    let mut node = node(name);
    node["metadata"]["uid"] = json!(uid);
    node
}

/// A Pod on a node.
pub fn pod(namespace: &str, name: &str, node: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": namespace, "name": name},
        "spec": {"nodeName": node},
    })
}

/// A Lease.
pub fn lease(namespace: &str, name: &str, holder: &str) -> Value {
    json!({
        "apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"namespace": namespace, "name": name},
        "spec": {"holderIdentity": holder, "leaseDurationSeconds": 15, "renewTime": "2026-01-01T00:00:00.000000Z"},
    })
}

/// An IPPool.
pub fn pool(name: &str, pods: &str) -> Value {
    json!({"apiVersion": "kun.network/v1alpha1", "kind": "IPPool", "metadata": {"name": name}, "spec": {"pods": [pods]}})
}

/// An IPAMBlock.
pub fn block(name: &str, first: &str, node: &str, epoch: u32) -> Value {
    json!({
        "apiVersion": "kun.network/v1alpha1", "kind": "IPAMBlock", "metadata": {"name": name},
        "spec": {"first": first, "node": node, "epoch": epoch},
    })
}
