//! What a real API server says of an object: taken, or refused. Dry runs, strict about unknown fields as `kubectl` is.

use anyhow::{Context, Result, bail};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::params::PostParams;
use kube::core::request::Request;
use kube::{Client, Config};
use kun_cluster::Resource;
use kun_harness::ControlPlane;
use serde_json::Value;

/// A client of the server.
#[derive(Clone)]
pub(crate) struct Server(Client);

/// What the server said; the words of a refusal.
pub(crate) type Verdict = Result<(), String>;

impl Server {
    pub(crate) async fn of(plane: &ControlPlane) -> Result<Self> {
        let kubeconfig = Kubeconfig::read_from(plane.kubeconfig())?;
        let options = KubeConfigOptions::default();
        let config = Config::from_custom_kubeconfig(kubeconfig, &options).await?;
        Ok(Self(Client::try_from(config)?))
    }

    /// Whether it would create it.
    pub(crate) async fn would_create(&self, object: &Value) -> Result<Verdict> {
        let request = requests(object)?.create(&dry(), serde_json::to_vec(object)?)?;
        self.verdict(request).await
    }

    /// Whether it would take it in place of the one that is there.
    pub(crate) async fn would_replace(&self, object: &Value) -> Result<Verdict> {
        let body = serde_json::to_vec(object)?;
        let request = requests(object)?.replace(name(object), &dry(), body)?;
        self.verdict(request).await
    }

    /// Whether it would take the status.
    pub(crate) async fn would_report(&self, object: &Value) -> Result<Verdict> {
        let body = serde_json::to_vec(object)?;
        let request =
            requests(object)?.replace_subresource("status", name(object), &dry(), body)?;
        self.verdict(request).await
    }

    /// Creates it, and gives what the server made of it.
    pub(crate) async fn create(&self, object: &Value) -> Result<Value> {
        let request = requests(object)?;
        let request = request.create(&PostParams::default(), serde_json::to_vec(object)?)?;
        Ok(self.0.request(request).await?)
    }

    pub(crate) async fn delete(&self, object: &Value) -> Result<()> {
        let request = requests(object)?.delete(name(object), &Default::default())?;
        self.0.request::<Value>(request).await?;
        Ok(())
    }

    async fn verdict(&self, mut request: http::Request<Vec<u8>>) -> Result<Verdict> {
        let strict = format!("{}&fieldValidation=Strict", request.uri());
        *request.uri_mut() = strict.parse()?;
        match self.0.request::<Value>(request).await {
            Ok(_) => Ok(Ok(())),
            // 422: validation. 400: it cannot even be decoded, such as an unknown field.
            Err(kube::Error::Api(status)) if matches!(status.code, 400 | 422) => {
                Ok(Err(status.message.clone()))
            }
            Err(error) => bail!("the server gave no verdict: {error:?}"),
        }
    }
}

fn dry() -> PostParams {
    PostParams {
        dry_run: true,
        ..PostParams::default()
    }
}

/// Requests for the kind of an object, in its namespace.
fn requests(object: &Value) -> Result<Request> {
    let kind = object["kind"].as_str().context("no kind")?;
    let definition = kun_cluster::crd::definition(kind).context("not ours")?;
    let resource: Resource = definition.resource;
    let namespace = object["metadata"]["namespace"].as_str();
    Ok(Request::new(resource.collection(namespace)))
}

pub(crate) fn name(object: &Value) -> &str {
    object["metadata"]["name"].as_str().unwrap_or_default()
}
