//! What `kunctl why` is asked about: the words of the command line to a protocol, a client and a destination; names to addresses.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use kun_cluster::{Event, Kind, ObjectName, Service, Source, SourceError, Store, Wanted};
use kun_config::ClusterSource;

/// A person waits: an API server that is there lists its Services in a second or two.
const SNAPSHOT_WITHIN: Duration = Duration::from_secs(10);

/// A question before names are resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Question {
    pub(crate) source: Option<IpAddr>,
    pub(crate) destination: Destination,
    pub(crate) port: u16,
}

/// Where to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Destination {
    Address(IpAddr),
    Name(String),
}

/// What is wrong with the words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum QuestionError {
    #[error("no port: give `<destination> <port>`, `host:port`, or `[v6]:port`")]
    NoPort,
    #[error("`{0}` is an IPv6 address without a port: write `{0} <port>` or `[{0}]:<port>`")]
    Unbracketed(String),
    #[error("`{0}` is not a port: write a number from 1 to 65535")]
    Port(String),
    #[error("`{0}` is not an address: the client is given by its address, before the destination")]
    Source(String),
    #[error("too many words after `{0}`: give `[source] <destination> <port>`")]
    TooMany(String),
}

/// Reads `[source] <destination> <port>` or `[source] <destination:port>`.
pub(crate) fn question(words: &[String]) -> Result<Question, QuestionError> {
    let Some((last, before)) = words.split_last() else {
        return Err(QuestionError::NoPort);
    };
    let alone = last.parse::<u64>().is_ok();
    let (source, destination, port) = match before {
        [] if alone => return Err(QuestionError::NoPort),
        [] => (None, last, None),
        [destination] if alone => (None, destination, Some(last)),
        [source] => (Some(source), last, None),
        [source, destination] if alone => (Some(source), destination, Some(last)),
        [_, _] if last.parse::<SocketAddr>().is_err() => {
            return Err(QuestionError::Port(last.clone()));
        }
        [.., word] => return Err(QuestionError::TooMany(word.clone())),
    };
    let (destination, port) = match port {
        Some(port) => (host(destination), self::port(port)?),
        None => host_and_port(destination)?,
    };
    let source = source
        .map(|s| s.parse().map_err(|_| QuestionError::Source(s.clone())))
        .transpose()?;
    Ok(Question {
        source,
        destination,
        port,
    })
}

fn port(text: &str) -> Result<u16, QuestionError> {
    let port = text.parse().ok().filter(|port| *port != 0);
    port.ok_or_else(|| QuestionError::Port(text.to_owned()))
}

fn host(text: &str) -> Destination {
    let bare = text
        .strip_prefix('[')
        .and_then(|t| t.strip_suffix(']'))
        .unwrap_or(text);
    match bare.parse() {
        Ok(address) => Destination::Address(address),
        Err(_) => Destination::Name(text.to_owned()),
    }
}

fn host_and_port(text: &str) -> Result<(Destination, u16), QuestionError> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Err(match address {
            IpAddr::V4(_) => QuestionError::NoPort,
            IpAddr::V6(_) => QuestionError::Unbracketed(text.to_owned()),
        });
    }
    let (name, number) = text.rsplit_once(':').ok_or(QuestionError::NoPort)?;
    Ok((host(name), port(number)?))
}

/// Why a name has no address.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ResolveError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error("the cluster's Services cannot be read: {0}; ask by address instead")]
    Silent(String),
    #[error("Service {0} has no cluster address (headless): ask about one of its endpoints")]
    Headless(ObjectName),
    #[error(
        "`{name}` is no Service in {place}, and the system's resolver does not know it ({source})"
    )]
    Unknown {
        name: String,
        place: String,
        source: std::io::Error,
    },
}

/// The addresses of a name: of a Service of the cluster (`web`, `web.shop`, `shop/web`, `web.shop.svc.cluster.local`), else whatever the
/// system's resolver says.
pub(crate) fn resolve(
    name: &str,
    cluster: Option<&ClusterSource>,
) -> Result<Vec<IpAddr>, ResolveError> {
    if let Some(cluster) = cluster {
        let store = snapshot(cluster)?;
        if let Some(service) = candidates(name).find_map(|name| store.service(&name).cloned()) {
            return addresses(&service)
                .ok_or_else(|| ResolveError::Headless(service.meta.name.clone()));
        }
    }
    let place = match cluster {
        None => "a cluster (none is configured)".to_owned(),
        Some(ClusterSource::Folder(folder)) => folder.display().to_string(),
        Some(ClusterSource::Kubernetes { .. }) => "the API server".to_owned(),
    };
    let found = (name, 0)
        .to_socket_addrs()
        .map_err(|source| ResolveError::Unknown {
            name: name.to_owned(),
            place,
            source,
        })?;
    let mut addresses: Vec<IpAddr> = found.map(|a| a.ip()).collect();
    addresses.dedup();
    Ok(addresses)
}

fn candidates(name: &str) -> impl Iterator<Item = ObjectName> {
    let slashed = name
        .split_once('/')
        .map(|(namespace, name)| ObjectName::new(namespace, name));
    let name = name.trim_end_matches('.');
    let name = name.split_once(".svc").map_or(name, |(name, _)| name);
    let dotted = name
        .split_once('.')
        .map(|(name, namespace)| ObjectName::new(namespace, name));
    [slashed, dotted, Some(ObjectName::new("default", name))]
        .into_iter()
        .flatten()
}

fn addresses(service: &Service) -> Option<Vec<IpAddr>> {
    Some(service.cluster_ips.clone()).filter(|ips| !ips.is_empty())
}

/// The Services as they are now.
fn snapshot(cluster: &ClusterSource) -> Result<Store, ResolveError> {
    let (sender, events) = sync_channel(1);
    let wanted = Wanted::new().all([Kind::Service]);
    let following =
        Source::open(cluster)?.follow(wanted, move |event| sender.send(event).is_ok())?;
    let until = Instant::now() + SNAPSHOT_WITHIN;
    let mut store = Store::new();
    let mut troubles = Vec::new();
    loop {
        let left = until.saturating_duration_since(Instant::now());
        match events.recv_timeout(left) {
            Ok(Event::Deltas(deltas)) => deltas
                .into_iter()
                .for_each(|delta| drop(store.apply(delta))),
            Ok(Event::Synced) => return Ok(store),
            Ok(Event::Trouble(trouble)) => {
                eprintln!("kunctl: {trouble}");
                troubles.push(trouble);
            }
            Ok(Event::Partial | Event::Whole | Event::Reached(..)) => {}
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                troubles.extend(following.troubles().now());
                let why = troubles.pop();
                return Err(ResolveError::Silent(
                    why.unwrap_or_else(|| format!("nothing within {SNAPSHOT_WITHIN:?}")),
                ));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(words: &str) -> Result<Question, QuestionError> {
        let words: Vec<String> = words.split_whitespace().map(str::to_owned).collect();
        question(&words)
    }

    fn to(destination: &str, port: u16) -> Question {
        Question {
            source: None,
            destination: host(destination),
            port,
        }
    }

    #[test]
    fn forms_of_the_question() {
        for (words, want) in [
            ("10.96.0.1 443", to("10.96.0.1", 443)),
            ("10.96.0.1:443", to("10.96.0.1", 443)),
            ("fd00::1 443", to("fd00::1", 443)),
            ("[fd00::1]:443", to("fd00::1", 443)),
            ("[fd00::1] 443", to("fd00::1", 443)),
            ("web 80", to("web", 80)),
            ("web.shop:80", to("web.shop", 80)),
            ("shop/web 80", to("shop/web", 80)),
        ] {
            assert_eq!(ask(words), Ok(want.clone()), "{words}");
            let source = "fd00::9".parse().ok();
            assert_eq!(
                ask(&format!("fd00::9 {words}")),
                Ok(Question { source, ..want }),
                "with a client: {words}"
            );
        }
    }

    #[test]
    fn wrong_words_are_told_apart() {
        for (words, want) in [
            ("", QuestionError::NoPort),
            ("80", QuestionError::NoPort),
            ("web", QuestionError::NoPort),
            ("10.0.0.1", QuestionError::NoPort),
            ("fd00::1", QuestionError::Unbracketed("fd00::1".to_owned())),
            ("web 0", QuestionError::Port("0".to_owned())),
            ("web 70000", QuestionError::Port("70000".to_owned())),
            ("web:http", QuestionError::Port("http".to_owned())),
            ("fd00::9 web http", QuestionError::Port("http".to_owned())),
            ("client web 80", QuestionError::Source("client".to_owned())),
            ("fd00::9 web x 80", QuestionError::TooMany("x".to_owned())),
        ] {
            assert_eq!(ask(words), Err(want), "{words:?}");
        }
    }

    #[test]
    fn a_service_is_found_by_each_of_its_names() {
        let dir = tempfile::tempdir().expect("a directory");
        let manifest = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\nspec: {clusterIPs: [fd00::1, 10.96.0.1]}\n---\n\
                        apiVersion: v1\nkind: Service\nmetadata: {name: bare}\nspec: {clusterIP: None}\n";
        std::fs::write(dir.path().join("a.yaml"), manifest).expect("writable");
        let want: Vec<IpAddr> = vec![
            "fd00::1".parse().expect("v6"),
            "10.96.0.1".parse().expect("v4"),
        ];
        for name in [
            "shop/web",
            "web.shop",
            "web.shop.svc",
            "web.shop.svc.cluster.local.",
        ] {
            assert_eq!(
                resolve(name, Some(&ClusterSource::Folder(dir.path().to_owned()))).expect("found"),
                want,
                "{name}"
            );
        }
        let headless = resolve("bare", Some(&ClusterSource::Folder(dir.path().to_owned())))
            .expect_err("headless")
            .to_string();
        assert_eq!(
            headless,
            "Service default/bare has no cluster address (headless): ask about one of its endpoints"
        );
        let unknown = resolve(
            "nobody.invalid",
            Some(&ClusterSource::Folder(dir.path().to_owned())),
        )
        .expect_err("unknown")
        .to_string();
        assert!(
            unknown.starts_with("`nobody.invalid` is no Service in "),
            "{unknown}"
        );
    }
}
