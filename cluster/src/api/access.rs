//! How the API server is reached: a kubeconfig, or the ServiceAccount of the pod. Knows no kind and no protocol above HTTP.
//!
//! Everything that may change on disk (kubeconfig, token, certificates) is read anew when a client is made, and a client is made
//! anew when the server no longer knows us (401). Token files are re-read by `kube` once a minute besides.

use std::path::{Path, PathBuf};
use std::time::Duration;

use kube::config::{InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::{Client, Config};

use super::ApiError;

/// TCP and TLS together. An API server that is there answers in milliseconds; a busy one in seconds.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);

/// A plugin that asks a person, or a network that is gone, must not hold the watches for ever.
const LOGIN_WITHIN: Duration = Duration::from_secs(60);

/// The way to the API server.
#[derive(Debug, Clone)]
pub(crate) struct Access {
    kubeconfig: Option<PathBuf>,
    connect_within: Duration,
}

impl Access {
    /// Finds that the configuration is whole. Asks no server.
    pub(crate) fn open(kubeconfig: Option<&Path>) -> Result<Self, ApiError> {
        let access = Self {
            kubeconfig: kubeconfig.map(Path::to_owned),
            connect_within: CONNECT_WITHIN,
        };
        // On a thread of its own: who opens a source may be inside a runtime, where another cannot be waited for.
        let read = || runtime()?.block_on(access.config()).map(drop);
        std::thread::scope(|scope| {
            let reading = scope.spawn(read);
            reading
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })?;
        Ok(access)
    }

    /// Where the server is, for messages.
    pub(crate) fn origin(&self) -> String {
        match &self.kubeconfig {
            Some(path) => path.display().to_string(),
            None => "the pod's ServiceAccount".to_owned(),
        }
    }

    /// Less patience than usual; never more.
    pub(crate) fn connect_within(mut self, within: Duration) -> Self {
        self.connect_within = within.min(CONNECT_WITHIN);
        self
    }

    async fn config(&self) -> Result<Config, ApiError> {
        let mut config = match &self.kubeconfig {
            Some(path) => {
                let wrong = |source| ApiError::Kubeconfig {
                    path: path.clone(),
                    source: Box::new(source),
                };
                let read = Kubeconfig::read_from(path).map_err(wrong)?;
                Config::from_custom_kubeconfig(read, &KubeConfigOptions::default())
                    .await
                    .map_err(wrong)?
            }
            None => Config::incluster().map_err(|source| ApiError::InCluster {
                source: Box::new(source),
            })?,
        };
        config.connect_timeout = Some(self.connect_within);
        // How long to wait for whom is decided above, by who knows what was asked.
        config.read_timeout = None;
        // So is when to ask again: a retry below would hide answers from the back-off.
        config.default_retry = false;
        Ok(config)
    }

    /// A client with everything as it is on disk now.
    pub(crate) async fn client(&self) -> Result<Client, ApiError> {
        let config = self.config().await?;
        let origin = self.origin();
        let runtime = tokio::runtime::Handle::current();
        // Blocking: it may execute a credential plugin.
        let made = tokio::task::spawn_blocking(move || {
            let _inside = runtime.enter();
            Client::try_from(config)
        });
        match tokio::time::timeout(LOGIN_WITHIN, made).await {
            Ok(Ok(made)) => made.map_err(|source| ApiError::Credentials {
                origin,
                source: Box::new(source),
            }),
            Ok(Err(_)) | Err(_) => Err(ApiError::Login {
                origin,
                within: LOGIN_WITHIN,
            }),
        }
    }
}

/// A runtime on the calling thread, for one program's watches or one writer.
pub(crate) fn runtime() -> Result<tokio::runtime::Runtime, ApiError> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(ApiError::Thread)
}

/// A parser's error without the picture that it paints below.
pub(super) fn one_line(error: &KubeconfigError) -> String {
    let text = error.to_string();
    text.lines().next().unwrap_or_default().to_owned()
}

/// What is missing, for a person.
pub(super) fn kubeconfig_wants(error: &KubeconfigError) -> &'static str {
    match error {
        KubeconfigError::CurrentContextNotSet | KubeconfigError::LoadContext(_) => {
            "set `current-context` to one of its contexts"
        }
        KubeconfigError::LoadClusterOfContext(_) | KubeconfigError::MissingClusterUrl => {
            "give the context a cluster with a `server`"
        }
        KubeconfigError::ParseClusterUrl(_) => "write `server: https://host:port`",
        KubeconfigError::ReadConfig(..) => "mount it there, or set cluster.kubernetes.kubeconfig",
        KubeconfigError::LoadCertificateAuthority(_) | KubeconfigError::ParseCertificates(_) => {
            "give the cluster its certificate authority"
        }
        KubeconfigError::LoadClientCertificate(_) | KubeconfigError::LoadClientKey(_) => {
            "give the user its certificate and key"
        }
        _ => "write a kubeconfig as kubectl reads it",
    }
}

/// The same for a pod.
pub(super) fn pod_wants(error: &InClusterError) -> &'static str {
    match error {
        InClusterError::ReadEnvironmentVariable(_) => {
            "this is no pod (KUBERNETES_SERVICE_HOST is not set): set cluster.kubernetes.kubeconfig"
        }
        InClusterError::ReadDefaultNamespace(_) | InClusterError::ReadCertificateBundle(_) => {
            "the pod needs a ServiceAccount with automountServiceAccountToken"
        }
        _ => "the pod's environment is not what a kubelet makes",
    }
}
