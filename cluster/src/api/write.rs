//! Writing to the API server, for the operator: create, replace if unchanged, delete if unchanged, patch a status, leases, events.
//! Blocking; one call is one request, nothing is retried. Refuses to write over what it has not seen: a replace carries the
//! resourceVersion that it was computed from. Governing: the Kubernetes API conventions ("Concurrency Control and Consistency").

use std::path::Path;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::events::v1::Event as EventObject;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, Time};
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use kube::client::Body;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::access::{Access, runtime};
use super::{ApiError, body};
use crate::{ObjectName, Resource};

/// One call. The API server itself ends requests after 60 s; a leader that waits so long has lost its lease.
const CALL_WITHIN: Duration = Duration::from_secs(15);

/// An answer to a write is one object, which the server keeps below 3 MiB.
const MAX_ANSWER: usize = 8 << 20;

/// RFC 7386.
const MERGE: &str = "application/merge-patch+json";

/// Kubernetes' own, which knows the keys of lists.
const STRATEGIC: &str = "application/strategic-merge-patch+json";

/// Why a call failed. What it said of the server is the server's own word.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// 409: somebody changed the object since it was read; read it again and decide anew.
    #[error("{what}: changed since it was read: {said}")]
    Conflict {
        /// Verb, resource and name.
        what: String,
        /// The server's message.
        said: String,
    },
    /// 409 of a create.
    #[error("{what}: is there already")]
    Exists {
        /// Verb, resource and name.
        what: String,
    },
    /// 404: no such object, or no such kind.
    #[error("{what}: not there: {said}")]
    NotFound {
        /// Verb, resource and name.
        what: String,
        /// The server's message.
        said: String,
    },
    /// 403: a right is missing.
    #[error("no right to `{verb}` `{resource}`{}: {said}; grant it in the ClusterRole", in_group(.group))]
    Forbidden {
        /// The verb of the RBAC rule.
        verb: &'static str,
        /// The resource of the RBAC rule, `services/status`.
        resource: String,
        /// Its API group.
        group: &'static str,
        /// The server's message.
        said: String,
    },
    /// 401, also with credentials read anew.
    #[error("{what}: the API server does not know us: {said}")]
    Unauthorized {
        /// Verb, resource and name.
        what: String,
        /// The server's message.
        said: String,
    },
    /// 400, 422: the object breaks a rule.
    #[error("{what}: refused: {said}")]
    Invalid {
        /// Verb, resource and name.
        what: String,
        /// The server's message.
        said: String,
    },
    /// 410.
    #[error("{what}: gone: {said}")]
    Gone {
        /// Verb, resource and name.
        what: String,
        /// The server's message.
        said: String,
    },
    /// 429, 503: later.
    #[error("{what}: the API server is busy: {said}")]
    Busy {
        /// Verb, resource and name.
        what: String,
        /// The server's message.
        said: String,
        /// How long it asks to wait.
        retry_after: Option<Duration>,
    },
    /// Any other answer.
    #[error("{what}: answered {status}: {said}")]
    Server {
        /// Verb, resource and name.
        what: String,
        /// HTTP status.
        status: u16,
        /// The server's message.
        said: String,
    },
    /// No answer; a write may or may not have been done.
    #[error("{what}: no answer ({why}); it may have been done")]
    Unreachable {
        /// Verb, resource and name.
        what: String,
        /// What happened.
        why: String,
    },
    /// No client could be made.
    #[error(transparent)]
    Access(#[from] ApiError),
    /// An object without a name, or a body or an answer that is not what it should be.
    #[error("{what}: {wrong}")]
    Malformed {
        /// Verb, resource and name.
        what: String,
        /// What is wrong.
        wrong: String,
    },
}

fn in_group(group: &str) -> String {
    if group.is_empty() {
        String::new()
    } else {
        format!(" of {group}")
    }
}

/// The object that a delete means: not another that has come under its name meanwhile.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Expected {
    /// metadata.uid
    pub uid: Option<String>,
    /// metadata.resourceVersion
    pub resource_version: Option<String>,
}

/// A door for writes. Calls block, and panic inside a tokio runtime: give them a thread.
#[derive(Debug)]
pub struct Writer {
    runtime: tokio::runtime::Runtime,
    access: Access,
    client: std::sync::Mutex<Option<ClientBox>>,
    within: Duration,
}

struct ClientBox(Client);

impl std::fmt::Debug for ClientBox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Client")
    }
}

/// What a call is about, for errors.
struct Call {
    verb: &'static str,
    resource: Resource,
    sub: &'static str,
    name: String,
}

impl Call {
    fn what(&self) -> String {
        let slash = if self.sub.is_empty() { "" } else { "/" };
        format!(
            "{} {}{slash}{} {}",
            self.verb, self.resource.plural, self.sub, self.name
        )
    }
}

impl Writer {
    /// With a kubeconfig, or the ServiceAccount of the pod. Asks no server yet.
    pub fn open(kubeconfig: Option<&Path>) -> Result<Self, ApiError> {
        Ok(Self {
            runtime: runtime()?,
            access: Access::open(kubeconfig)?,
            client: std::sync::Mutex::new(None),
            within: CALL_WITHIN,
        })
    }

    /// Gives up on a call after this: for a leader, whose calls must end before its lease does.
    pub fn within(mut self, limit: Duration) -> Self {
        self.within = limit;
        self
    }

    /// An object as it is now.
    pub fn get(&self, resource: Resource, name: &ObjectName) -> Result<Value, WriteError> {
        let call = call("get", resource, "", name);
        self.call(&call, "GET", &resource.item(name), None)
    }

    /// All objects, of one namespace if one is given; for small collections, one answer.
    pub fn list(&self, resource: Resource, namespace: Option<&str>) -> Result<Value, WriteError> {
        let name = ObjectName::new(namespace.unwrap_or_default(), "*");
        let call = call("list", resource, "", &name);
        self.call(&call, "GET", &resource.collection(namespace), None)
    }

    /// Makes an object; `metadata` in the body names it. [`WriteError::Exists`] when it is there.
    pub fn create(&self, resource: Resource, object: &impl Serialize) -> Result<Value, WriteError> {
        let (name, body) = named("create", resource, object)?;
        let call = call("create", resource, "", &name);
        let path = resource.collection(Some(&name.namespace));
        self.call(&call, "POST", &path, Some(("application/json", &body)))
    }

    /// Replaces an object that has not changed since its `metadata.resourceVersion`; else [`WriteError::Conflict`].
    pub fn replace(
        &self,
        resource: Resource,
        object: &impl Serialize,
    ) -> Result<Value, WriteError> {
        self.put(resource, "", object)
    }

    /// The same for the status subresource.
    pub fn replace_status(
        &self,
        resource: Resource,
        object: &impl Serialize,
    ) -> Result<Value, WriteError> {
        self.put(resource, "status", object)
    }

    fn put(
        &self,
        resource: Resource,
        sub: &'static str,
        object: &impl Serialize,
    ) -> Result<Value, WriteError> {
        let (name, body) = named("update", resource, object)?;
        let call = call("update", resource, sub, &name);
        let version = &body["metadata"]["resourceVersion"];
        if version.as_str().is_none_or(str::is_empty) {
            return Err(WriteError::Malformed {
                what: call.what(),
                wrong: "metadata.resourceVersion is missing; a replace says what it replaces"
                    .to_owned(),
            });
        }
        let path = with_sub(resource.item(&name), sub);
        self.call(&call, "PUT", &path, Some(("application/json", &body)))
    }

    /// Deletes the object that is meant; another one under its name is a [`WriteError::Conflict`].
    pub fn delete(
        &self,
        resource: Resource,
        name: &ObjectName,
        expected: &Expected,
    ) -> Result<(), WriteError> {
        let call = call("delete", resource, "", name);
        let mut preconditions = serde_json::Map::new();
        if let Some(uid) = &expected.uid {
            preconditions.insert("uid".to_owned(), json!(uid));
        }
        if let Some(version) = &expected.resource_version {
            preconditions.insert("resourceVersion".to_owned(), json!(version));
        }
        let body =
            json!({"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": preconditions});
        self.call::<Value>(
            &call,
            "DELETE",
            &resource.item(name),
            Some(("application/json", &body)),
        )
        .map(drop)
    }

    /// JSON merge patch (RFC 7386) of an object. With `metadata.resourceVersion` in it, only if unchanged.
    pub fn patch(
        &self,
        resource: Resource,
        name: &ObjectName,
        patch: &Value,
    ) -> Result<Value, WriteError> {
        self.merge(resource, "", name, MERGE, patch)
    }

    /// JSON merge patch of the status subresource: `{"status": …}`.
    pub fn patch_status(
        &self,
        resource: Resource,
        name: &ObjectName,
        patch: &Value,
    ) -> Result<Value, WriteError> {
        self.merge(resource, "status", name, MERGE, patch)
    }

    /// Strategic merge patch of the status subresource, of Kubernetes' own kinds alone: lists are merged by their key, so that one
    /// condition is changed and the others, which are others' to write, stay what they are.
    pub fn patch_conditions(
        &self,
        resource: Resource,
        name: &ObjectName,
        conditions: &[Value],
    ) -> Result<Value, WriteError> {
        let patch = json!({"status": {"conditions": conditions}});
        self.merge(resource, "status", name, STRATEGIC, &patch)
    }

    /// The newest revision that there is of a resource. Asks for one object, and reads the list's own.
    pub fn head(&self, resource: Resource) -> Result<Option<u64>, WriteError> {
        let call = call("list", resource, "", &ObjectName::new("", "*"));
        let path = format!("{}?limit=1", resource.collection(None));
        let list: Value = self.call(&call, "GET", &path, None)?;
        let version = list["metadata"]["resourceVersion"].as_str();
        Ok(version.and_then(|v| v.parse().ok()))
    }

    fn merge(
        &self,
        resource: Resource,
        sub: &'static str,
        name: &ObjectName,
        how: &str,
        patch: &Value,
    ) -> Result<Value, WriteError> {
        let call = call("patch", resource, sub, name);
        let path = with_sub(resource.item(name), sub);
        self.call(&call, "PATCH", &path, Some((how, patch)))
    }

    /// A lease; `None`: there is none.
    pub fn lease(&self, name: &ObjectName) -> Result<Option<Lease>, WriteError> {
        let call = call("get", Resource::LEASES, "", name);
        match self.call(&call, "GET", &Resource::LEASES.item(name), None) {
            Ok(lease) => Ok(Some(lease)),
            Err(WriteError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Makes a lease.
    pub fn create_lease(&self, lease: &Lease) -> Result<Lease, WriteError> {
        let made = self.create(Resource::LEASES, lease)?;
        typed("create leases", made)
    }

    /// Replaces a lease that has not changed since it was read.
    pub fn update_lease(&self, lease: &Lease) -> Result<Lease, WriteError> {
        let made = self.replace(Resource::LEASES, lease)?;
        typed("update leases", made)
    }

    /// Records an event. Events are for people: a failure is worth a log line, never a retry.
    pub fn record(&self, event: &EventObject) -> Result<(), WriteError> {
        self.create(Resource::EVENTS, event).map(drop)
    }

    fn call<T: DeserializeOwned>(
        &self,
        call: &Call,
        method: &str,
        path: &str,
        body: Option<(&str, &Value)>,
    ) -> Result<T, WriteError> {
        let answer = match self.send(call, method, path, body) {
            // Tokens rotate: once more with what is on disk now.
            Err(WriteError::Unauthorized { .. }) => {
                self.forget_client();
                self.send(call, method, path, body)?
            }
            answer => answer?,
        };
        serde_json::from_slice(&answer).map_err(|error| WriteError::Malformed {
            what: call.what(),
            wrong: format!("the answer is not what was asked for ({error})"),
        })
    }

    fn forget_client(&self) {
        *self.client_slot() = None;
    }

    fn client_slot(&self) -> std::sync::MutexGuard<'_, Option<ClientBox>> {
        // A client is put in whole or not at all.
        self.client
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn send(
        &self,
        call: &Call,
        method: &str,
        path: &str,
        body: Option<(&str, &Value)>,
    ) -> Result<Vec<u8>, WriteError> {
        let mut request = http::Request::builder().method(method).uri(path);
        let bytes = match body {
            Some((kind, value)) => {
                request = request.header("content-type", kind);
                value.to_string().into_bytes()
            }
            None => Vec::new(),
        };
        let request = request
            .header("accept", "application/json")
            .body(Body::from(bytes))
            .map_err(|error| WriteError::Malformed {
                what: call.what(),
                wrong: error.to_string(),
            })?;
        let unreachable = |why: String| WriteError::Unreachable {
            what: call.what(),
            why,
        };
        let exchange = async {
            let known = self.client_slot().as_ref().map(|c| c.0.clone());
            let client = match known {
                Some(client) => client,
                None => {
                    let client = self.access.client().await?;
                    *self.client_slot() = Some(ClientBox(client.clone()));
                    client
                }
            };
            let answer = client
                .send(request)
                .await
                .map_err(|error| unreachable(body::chain(&error)))?;
            let (head, stream) = answer.into_parts();
            let text = body::collect(stream, MAX_ANSWER)
                .await
                .map_err(unreachable)?;
            Ok::<_, WriteError>((head, text))
        };
        let within = async { tokio::time::timeout(self.within, exchange).await };
        let (head, text) = self
            .runtime
            .block_on(within)
            .map_err(|_| unreachable(format!("nothing within {:?}", self.within)))??;
        if head.status.is_success() {
            return Ok(text);
        }
        let retry_after = body::retry_after(&head.headers);
        Err(refusal(call, head.status.as_u16(), &text, retry_after))
    }
}

/// The time of day, for people to read in an object; nothing here is ever compared with it.
pub fn time() -> String {
    text(&Time(Timestamp::now()))
}

/// The same, of a Lease.
pub fn micro_time() -> String {
    text(&MicroTime(Timestamp::now()))
}

/// As the type is written.
fn text(time: &impl Serialize) -> String {
    let value = serde_json::to_value(time).unwrap_or_default();
    value.as_str().unwrap_or_default().to_owned()
}

fn call(verb: &'static str, resource: Resource, sub: &'static str, name: &ObjectName) -> Call {
    Call {
        verb,
        resource,
        sub,
        name: name.to_string(),
    }
}

fn with_sub(path: String, sub: &str) -> String {
    if sub.is_empty() {
        path
    } else {
        format!("{path}/{sub}")
    }
}

/// The body with `apiVersion` and `kind`, and the name in it.
fn named(
    verb: &'static str,
    resource: Resource,
    object: &impl Serialize,
) -> Result<(ObjectName, Value), WriteError> {
    let malformed = |wrong: String| WriteError::Malformed {
        what: format!("{verb} {}", resource.plural),
        wrong,
    };
    let mut body = serde_json::to_value(object).map_err(|error| malformed(error.to_string()))?;
    let Some(fields) = body.as_object_mut() else {
        return Err(malformed("the object is no mapping".to_owned()));
    };
    fields.insert("apiVersion".to_owned(), json!(resource.api_version()));
    fields.insert("kind".to_owned(), json!(resource.kind));
    let meta = &body["metadata"];
    let name = meta["name"].as_str().unwrap_or_default();
    let generated = verb == "create" && meta["generateName"].is_string();
    if name.is_empty() && !generated {
        return Err(malformed("metadata.name is missing".to_owned()));
    }
    let namespace = meta["namespace"].as_str().unwrap_or_default();
    if resource.namespaced && namespace.is_empty() {
        return Err(malformed("metadata.namespace is missing".to_owned()));
    }
    Ok((ObjectName::new(namespace, name), body))
}

fn typed<T: DeserializeOwned>(what: &str, value: Value) -> Result<T, WriteError> {
    serde_json::from_value(value).map_err(|error| WriteError::Malformed {
        what: what.to_owned(),
        wrong: format!("the answer is not what was asked for ({error})"),
    })
}

/// What a status other than 2xx means for the caller.
fn refusal(call: &Call, status: u16, text: &[u8], retry_after: Option<Duration>) -> WriteError {
    let said: Value = serde_json::from_slice(text).unwrap_or_default();
    let reason = said["reason"].as_str().unwrap_or_default();
    let said = said["message"].as_str().unwrap_or_default().to_owned();
    let what = call.what();
    match status {
        400 | 422 => WriteError::Invalid { what, said },
        401 => WriteError::Unauthorized { what, said },
        403 => WriteError::Forbidden {
            verb: call.verb,
            resource: with_sub(call.resource.plural.to_owned(), call.sub),
            group: call.resource.group,
            said,
        },
        404 => WriteError::NotFound { what, said },
        409 if reason == "AlreadyExists" => WriteError::Exists { what },
        409 => WriteError::Conflict { what, said },
        410 => WriteError::Gone { what, said },
        429 | 503 => WriteError::Busy {
            what,
            said,
            retry_after,
        },
        status => WriteError::Server { what, status, said },
    }
}
