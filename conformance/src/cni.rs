//! CNI: drives any plugin binary as a runtime does, by environment, stdin, stdout and exit code, in namespaces that the caller
//! makes. CNI specification 0.3.0 to 1.1.0, §2 and §5.
//!
//! What is judged comes from the specification's text; where plugins commonly differ from it, the case says what the
//! specification asks for and the peer's test lists the deviation by the case's name.

use std::collections::BTreeSet;
use std::io::Write;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

mod asked;

/// Versions that the suite can judge, oldest first.
const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// The plugin under test, and the machine it runs on.
pub struct Subject<'a> {
    /// The binary.
    pub program: PathBuf,
    /// CNI_PATH, where its delegates lie.
    pub path: PathBuf,
    /// The network configuration without `cniVersion`.
    pub network: Value,
    /// An address of the network that nobody else has.
    pub fixed: IpAddr,
    /// A new network namespace; it lives as long as the value.
    pub pod: &'a dyn Fn() -> Result<Box<dyn PodNetns>>,
    /// Runs the command on the node, with this stdin.
    pub on_node: &'a dyn Fn(Command, &[u8]) -> Result<Output>,
}

/// A pod's namespace.
pub trait PodNetns {
    /// What CNI_NETNS says.
    fn path(&self) -> PathBuf;
}

/// What one case came to.
#[derive(Debug)]
pub struct Verdict {
    /// The case.
    pub name: &'static str,
    /// Why it fails.
    pub result: Result<()>,
}

type Case = fn(&Subject<'_>) -> Result<()>;

/// Every case, by name.
pub const CASES: &[(&str, Case)] = &[
    ("version_lists_what_is_supported", version),
    ("result_in_the_configurations_version", result_versions),
    (
        "interface_stands_after_add_and_is_gone_after_del",
        lifecycle,
    ),
    ("add_refuses_an_interface_that_exists", existing_interface),
    ("del_succeeds_again", del_twice),
    ("del_succeeds_for_an_unknown_container", del_unknown),
    ("del_succeeds_without_a_namespace", del_without_netns),
    ("check_holds_after_add_and_says_nothing", check_holds),
    ("check_sees_a_lost_address", check_sees_loss),
    ("missing_variables_are_all_named", missing_variables),
    ("an_error_tells_its_version", error_version),
    ("an_unknown_command_is_refused", unknown_command),
    ("invalid_names_are_refused", invalid_names),
    ("an_unsupported_version_is_code_1", unsupported_version),
    ("what_is_not_json_is_code_6", not_json),
    ("two_pods_have_two_addresses", two_pods),
    ("parallel_adds_have_distinct_addresses", parallel),
    ("add_passes_the_previous_result_through", chained),
    ("status_succeeds_when_ready", status),
    ("gc_keeps_the_valid_and_frees_the_rest", gc),
    ("a_failed_add_leaves_nothing", failed_add),
    ("version_repeats_the_callers", asked::version_repeats),
    (
        "version_does_not_wait_for_an_open_stdin",
        asked::version_does_not_wait,
    ),
    ("verbs_are_of_their_version", asked::verbs_by_version),
    (
        "del_succeeds_whatever_the_arguments",
        asked::del_whatever_the_arguments,
    ),
    ("a_fixed_address_is_one_pods", asked::fixed_address),
    (
        "check_does_not_miss_what_left_the_result",
        asked::check_lets_a_route_go,
    ),
    ("the_configurations_dns_is_told", asked::dns_is_told),
];

/// Runs every case.
pub fn run(subject: &Subject<'_>) -> Vec<Verdict> {
    CASES
        .iter()
        .map(|(name, case)| Verdict {
            name,
            result: case(subject),
        })
        .collect()
}

/// One pod and its attachment's parameters.
struct Attachment {
    netns: Box<dyn PodNetns>,
    id: String,
    ifname: &'static str,
}

/// What libcni would make of an output.
#[derive(Debug)]
enum Answer {
    Success(Option<Value>),
    Error(Value),
}

impl Answer {
    fn success(self) -> Result<Option<Value>> {
        match self {
            Answer::Success(value) => Ok(value),
            Answer::Error(e) => bail!("failed: {e}"),
        }
    }

    fn empty(self) -> Result<()> {
        match self.success()? {
            None => Ok(()),
            Some(value) => bail!("stdout must be empty, was {value}"),
        }
    }

    fn result(self) -> Result<Value> {
        self.success()?.context("no result on stdout")
    }

    /// An error result with this code (§5).
    fn error(self, code: Option<u64>) -> Result<Value> {
        let Answer::Error(error) = self else {
            bail!("succeeded: {self:?}")
        };
        let told = error["code"].as_u64().context("`code` is not a number")?;
        ensure!(error["msg"].is_string(), "`msg` is not text: {error}");
        if let Some(code) = code {
            ensure!(told == code, "code {told}, not {code}: {error}");
        }
        Ok(error)
    }
}

impl Subject<'_> {
    fn attachment(&self, id: &str) -> Result<Attachment> {
        Ok(Attachment {
            netns: (self.pod)()?,
            id: format!("{id}-{}", std::process::id()),
            ifname: "eth0",
        })
    }

    fn network(&self, version: &str) -> Value {
        let mut network = self.network.clone();
        network["cniVersion"] = version.into();
        network
    }

    fn supports(&self) -> Result<Vec<String>> {
        let versions = self
            .raw(&[("CNI_COMMAND", "VERSION")], b"{\"cniVersion\":\"1.0.0\"}")?
            .result()?;
        let list = versions["supportedVersions"]
            .as_array()
            .context("`supportedVersions` is not a list")?;
        list.iter()
            .map(|v| Ok(v.as_str().context("a version is text")?.to_owned()))
            .collect()
    }

    /// Those of [`VERSIONS`] that the subject speaks and `since` allows.
    fn versions(&self, since: &str) -> Result<Vec<&'static str>> {
        let supported = self.supports()?;
        Ok(VERSIONS
            .into_iter()
            .filter(|v| *v >= since && supported.iter().any(|s| s == v))
            .collect())
    }

    fn raw(&self, variables: &[(&str, &str)], stdin: &[u8]) -> Result<Answer> {
        let mut command = Command::new(&self.program);
        command
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .envs(variables.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let output = (self.on_node)(command, stdin)?;
        let stdout = String::from_utf8(output.stdout).context("stdout is not UTF-8")?;
        let value = match stdout.trim() {
            "" => None,
            text => Some(
                serde_json::from_str(text)
                    .with_context(|| format!("stdout is not one JSON value: {text}"))?,
            ),
        };
        if output.status.success() {
            return Ok(Answer::Success(value));
        }
        value.map(Answer::Error).with_context(|| {
            format!(
                "{} without an error result on stdout: {}",
                output.status,
                String::from_utf8_lossy(&output.stderr)
            )
        })
    }

    fn verb(&self, verb: &str, a: &Attachment, network: &Value) -> Result<Answer> {
        let netns = a.netns.path();
        self.raw(
            &[
                ("CNI_COMMAND", verb),
                ("CNI_CONTAINERID", &a.id),
                ("CNI_NETNS", &netns.to_string_lossy()),
                ("CNI_IFNAME", a.ifname),
                ("CNI_PATH", &self.path.to_string_lossy()),
                ("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAME=conformance"),
            ],
            network.to_string().as_bytes(),
        )
    }

    fn add(&self, a: &Attachment, network: &Value) -> Result<Value> {
        self.verb("ADD", a, network)?.result()
    }

    fn del(&self, a: &Attachment, network: &Value) -> Result<()> {
        self.verb("DEL", a, network)?.empty()
    }
}

fn ip_in(netns: &Path, words: &str) -> Result<String> {
    let out = Command::new("nsenter")
        .arg(format!("--net={}", netns.display()))
        .arg("ip")
        .args(words.split_whitespace())
        .output()
        .context("running nsenter")?;
    ensure!(
        out.status.success(),
        "ip {words}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

fn addresses(result: &Value) -> Result<Vec<IpAddr>> {
    let ips = result["ips"].as_array().context("`ips` is not a list")?;
    ips.iter()
        .map(|ip| {
            let text = ip["address"].as_str().context("an address is text")?;
            let (ip, length) = text.split_once('/').context("an address has a length")?;
            let length: u8 = length.parse()?;
            let ip: IpAddr = ip.parse()?;
            ensure!(length <= if ip.is_ipv4() { 32 } else { 128 }, "{text}");
            Ok(ip)
        })
        .collect()
}

fn version(s: &Subject<'_>) -> Result<()> {
    let answer = s
        .raw(&[("CNI_COMMAND", "VERSION")], b"{\"cniVersion\":\"1.1.0\"}")?
        .result()?;
    ensure!(answer["cniVersion"].is_string(), "no `cniVersion`");
    let known = s.supports()?;
    ensure!(
        known.iter().any(|v| VERSIONS.contains(&v.as_str())),
        "speaks none of {VERSIONS:?}: {known:?}"
    );
    Ok(())
}

/// §5: the result is of the configuration's version, whatever the newest is.
fn result_versions(s: &Subject<'_>) -> Result<()> {
    for version in s.versions("0.3.0")? {
        let network = s.network(version);
        let a = s.attachment("version")?;
        let result = s.add(&a, &network)?;
        s.del(&a, &network)?;
        judge_result(&result, version, &a).with_context(|| format!("{version}: {result}"))?;
    }
    Ok(())
}

fn judge_result(result: &Value, version: &str, a: &Attachment) -> Result<()> {
    ensure!(result["cniVersion"] == version, "cniVersion");
    let interfaces = result["interfaces"].as_array().context("no interfaces")?;
    let netns = a.netns.path();
    ensure!(
        interfaces.iter().any(|i| i["name"] == a.ifname
            && i["sandbox"].as_str().map(Path::new) == Some(netns.as_path())),
        "CNI_IFNAME in CNI_NETNS is not among the interfaces"
    );
    for interface in interfaces {
        let told = interface.get("mtu").is_some();
        ensure!(!told || version >= "1.1.0", "`mtu` came with 1.1.0");
    }
    ensure!(!addresses(result)?.is_empty(), "no address");
    for ip in result["ips"].as_array().into_iter().flatten() {
        if let Some(index) = ip.get("interface") {
            let index = index.as_u64().context("`interface` is not a number")?;
            ensure!((index as usize) < interfaces.len(), "`interface` {index}");
        }
        let family = ip.get("version").and_then(Value::as_str);
        let v6 = ip["address"]
            .as_str()
            .is_some_and(|text| text.contains(':'));
        match family {
            Some(told) => {
                ensure!(version < "1.0.0", "`ips[].version` went with 1.0.0");
                ensure!(told == if v6 { "6" } else { "4" }, "`ips[].version` {told}");
            }
            None => ensure!(version >= "1.0.0", "`ips[].version` is needed before 1.0.0"),
        }
    }
    Ok(())
}

fn newest(s: &Subject<'_>) -> Result<&'static str> {
    s.versions("0.3.0")?.pop().context("no version")
}

fn lifecycle(s: &Subject<'_>) -> Result<()> {
    let network = s.network(newest(s)?);
    let a = s.attachment("life")?;
    let result = s.add(&a, &network)?;
    let shown = ip_in(&a.netns.path(), "-o addr show")?;
    for address in addresses(&result)? {
        ensure!(
            shown.contains(&format!(" {address}/")),
            "{address} is on no interface: {shown}"
        );
    }
    ensure!(
        ip_in(&a.netns.path(), "-o link show up")?.contains(a.ifname),
        "{} is not up",
        a.ifname
    );
    s.del(&a, &network)?;
    let left = ip_in(&a.netns.path(), "-o link show")?;
    ensure!(!left.contains(a.ifname), "left after DEL: {left}");
    Ok(())
}

/// §2 ADD: "If an interface of the requested name already exists in the container, the CNI plugin MUST return with an error."
fn existing_interface(s: &Subject<'_>) -> Result<()> {
    let network = s.network(newest(s)?);
    let a = s.attachment("exists")?;
    let result = s.add(&a, &network)?;
    s.verb("ADD", &a, &network)?.error(None)?;
    // And the one that stands keeps its addresses.
    let shown = ip_in(&a.netns.path(), "-o addr show")?;
    for address in addresses(&result)? {
        ensure!(shown.contains(&format!(" {address}/")), "{address} is lost");
    }
    s.del(&a, &network)
}

fn del_twice(s: &Subject<'_>) -> Result<()> {
    let network = s.network(newest(s)?);
    let a = s.attachment("twice")?;
    s.add(&a, &network)?;
    s.del(&a, &network)?;
    s.del(&a, &network)
}

fn del_unknown(s: &Subject<'_>) -> Result<()> {
    let network = s.network(newest(s)?);
    s.del(&s.attachment("unknown")?, &network)
}

fn del_without_netns(s: &Subject<'_>) -> Result<()> {
    let network = s.network(newest(s)?);
    let a = s.attachment("nonetns")?;
    s.add(&a, &network)?;
    s.raw(
        &[
            ("CNI_COMMAND", "DEL"),
            ("CNI_CONTAINERID", &a.id),
            ("CNI_IFNAME", a.ifname),
            ("CNI_PATH", &s.path.to_string_lossy()),
        ],
        network.to_string().as_bytes(),
    )?
    .empty()?;
    // Again, as a runtime does once the namespace can be named: what the first could not reach goes now.
    s.del(&a, &network)
}

fn check_holds(s: &Subject<'_>) -> Result<()> {
    for version in s.versions("0.4.0")? {
        let mut network = s.network(version);
        let a = s.attachment("check")?;
        let result = s.add(&a, &network)?;
        network["prevResult"] = result;
        let verdict = s.verb("CHECK", &a, &network)?.empty();
        s.del(&a, &network)?;
        verdict.with_context(|| version)?;
    }
    Ok(())
}

fn check_sees_loss(s: &Subject<'_>) -> Result<()> {
    let mut network = s.network(newest(s)?);
    let a = s.attachment("loss")?;
    network["prevResult"] = s.add(&a, &network)?;
    ip_in(&a.netns.path(), &format!("addr flush dev {}", a.ifname))?;
    let verdict = s.verb("CHECK", &a, &network)?.error(None);
    s.del(&a, &network)?;
    verdict.map(|_| ())
}

fn missing_variables(s: &Subject<'_>) -> Result<()> {
    let network = s.network(newest(s)?).to_string();
    for (verb, required) in [
        ("ADD", &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"][..]),
        ("DEL", &["CNI_CONTAINERID", "CNI_IFNAME"][..]),
    ] {
        let error = s
            .raw(&[("CNI_COMMAND", verb)], network.as_bytes())?
            .error(Some(4))?;
        let text = error.to_string();
        for name in required {
            ensure!(text.contains(name), "{verb}: {name} is not named: {text}");
        }
    }
    Ok(())
}

/// §5 Error: `cniVersion` is the version in use.
fn error_version(s: &Subject<'_>) -> Result<()> {
    let version = newest(s)?;
    let network = s.network(version).to_string();
    let error = s
        .raw(&[("CNI_COMMAND", "ADD")], network.as_bytes())?
        .error(Some(4))?;
    ensure!(error["cniVersion"] == version, "no `cniVersion`: {error}");
    Ok(())
}

fn unknown_command(s: &Subject<'_>) -> Result<()> {
    let network = s.network(newest(s)?).to_string();
    let path = s.path.to_string_lossy().into_owned();
    let variables = [
        ("CNI_COMMAND", "FROB"),
        ("CNI_CONTAINERID", "c"),
        ("CNI_NETNS", "/run/netns/none"),
        ("CNI_IFNAME", "eth0"),
        ("CNI_PATH", path.as_str()),
    ];
    s.raw(&variables, network.as_bytes())?.error(Some(4))?;
    Ok(())
}

fn invalid_names(s: &Subject<'_>) -> Result<()> {
    let network = s.network(newest(s)?).to_string();
    let path = s.path.to_string_lossy().into_owned();
    for (id, ifname) in [
        ("-c", "eth0"),
        ("a/b", "eth0"),
        ("c", ".."),
        ("c", "a/b"),
        ("c", "a:b"),
        ("c", "abcdefghijklmnop"),
    ] {
        let variables = [
            ("CNI_COMMAND", "ADD"),
            ("CNI_CONTAINERID", id),
            ("CNI_NETNS", "/run/netns/none"),
            ("CNI_IFNAME", ifname),
            ("CNI_PATH", path.as_str()),
        ];
        s.raw(&variables, network.as_bytes())?
            .error(Some(4))
            .with_context(|| format!("{id} {ifname}"))?;
    }
    Ok(())
}

fn unsupported_version(s: &Subject<'_>) -> Result<()> {
    let a = s.attachment("future")?;
    s.verb("ADD", &a, &s.network("99.0.0"))?.error(Some(1))?;
    Ok(())
}

fn not_json(s: &Subject<'_>) -> Result<()> {
    let a = s.attachment("garbage")?;
    let netns = a.netns.path();
    let (netns, path) = (netns.to_string_lossy(), s.path.to_string_lossy());
    let variables = [
        ("CNI_COMMAND", "ADD"),
        ("CNI_CONTAINERID", a.id.as_str()),
        ("CNI_NETNS", &netns),
        ("CNI_IFNAME", a.ifname),
        ("CNI_PATH", &path),
    ];
    s.raw(&variables, b"{\"cniVersion\":")?.error(Some(6))?;
    Ok(())
}

fn two_pods(s: &Subject<'_>) -> Result<()> {
    let network = s.network(newest(s)?);
    let (a, b) = (s.attachment("one")?, s.attachment("two")?);
    let of_a: BTreeSet<_> = addresses(&s.add(&a, &network)?)?.into_iter().collect();
    let of_b: BTreeSet<_> = addresses(&s.add(&b, &network)?)?.into_iter().collect();
    ensure!(of_a.is_disjoint(&of_b), "{of_a:?} and {of_b:?}");
    s.del(&a, &network)?;
    s.del(&b, &network)
}

fn parallel(s: &Subject<'_>) -> Result<()> {
    const PODS: usize = 8;
    let network = s.network(newest(s)?);
    let pods: Vec<Attachment> = (0..PODS)
        .map(|i| s.attachment(&format!("par{i}")))
        .collect::<Result<_>>()?;
    // The shell starts all of them before it waits for any.
    // Several subjects may be judged at once in one process.
    static SUBJECTS: AtomicU32 = AtomicU32::new(0);
    let number = SUBJECTS.fetch_add(1, Ordering::Relaxed);
    let dir = std::env::temp_dir().join(format!("kun-conformance-{}-{number}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    let stdin = dir.join("network.json");
    std::fs::write(&stdin, network.to_string())?;
    let mut script = String::new();
    for (i, a) in pods.iter().enumerate() {
        let line = format!(
            "CNI_COMMAND=ADD CNI_CONTAINERID={} CNI_NETNS={} CNI_IFNAME={} CNI_PATH={} {} <{} >{}/{i} &\n",
            a.id,
            a.netns.path().display(),
            a.ifname,
            s.path.display(),
            s.program.display(),
            stdin.display(),
            dir.display(),
        );
        script.push_str(&line);
    }
    script.push_str("wait\n");
    let mut shell = Command::new("/bin/sh");
    shell
        .args(["-c", &script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    (s.on_node)(shell, b"")?;
    let mut all = BTreeSet::new();
    let mut told = 0;
    for i in 0..PODS {
        let text = std::fs::read_to_string(dir.join(i.to_string()))?;
        let result: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
        let addresses = addresses(&result).with_context(|| text.clone())?;
        told += addresses.len();
        all.extend(addresses);
    }
    std::fs::remove_dir_all(&dir)?;
    for a in &pods {
        s.del(a, &network)?;
    }
    ensure!(
        told >= PODS && all.len() == told,
        "{told} told, {} distinct",
        all.len()
    );
    Ok(())
}

/// §5: "Plugins provided a `prevResult` key as part of their request configuration must output it as their result, with any
/// possible modifications made by that plugin included."
fn chained(s: &Subject<'_>) -> Result<()> {
    let mut network = s.network(newest(s)?);
    let a = s.attachment("chain")?;
    network["prevResult"] = json!({
        "cniVersion": network["cniVersion"],
        "interfaces": [{"name": "before0", "sandbox": "/run/netns/other"}],
        "ips": [{"address": "192.0.2.77/32", "interface": 0}],
        "dns": {"nameservers": ["192.0.2.53"]},
    });
    let answer = s.add(&a, &network);
    s.del(&a, &network)?;
    let result = answer?;
    let text = result.to_string();
    for kept in ["before0", "192.0.2.77/32", "192.0.2.53"] {
        ensure!(text.contains(kept), "{kept} is lost: {text}");
    }
    ensure!(addresses(&result)?.len() >= 2, "no address of its own");
    Ok(())
}

fn status(s: &Subject<'_>) -> Result<()> {
    ensure!(newest(s)? >= "1.1.0", "speaks no 1.1.0");
    let network = s.network("1.1.0").to_string();
    let path = s.path.to_string_lossy().into_owned();
    let variables = [("CNI_COMMAND", "STATUS"), ("CNI_PATH", path.as_str())];
    s.raw(&variables, network.as_bytes())?.empty()
}

fn gc(s: &Subject<'_>) -> Result<()> {
    ensure!(newest(s)? >= "1.1.0", "speaks no 1.1.0");
    let mut network = s.network("1.1.0");
    let (stays, goes) = (s.attachment("stays")?, s.attachment("goes")?);
    let result = s.add(&stays, &network)?;
    s.add(&goes, &network)?;
    let path = s.path.to_string_lossy().into_owned();
    let variables = [("CNI_COMMAND", "GC"), ("CNI_PATH", path.as_str())];
    let mut collect = network.clone();
    collect["cni.dev/valid-attachments"] =
        json!([{"containerID": stays.id, "ifname": stays.ifname}]);
    let answer = s
        .raw(&variables, collect.to_string().as_bytes())
        .and_then(Answer::empty);
    network["prevResult"] = result;
    let check = s.verb("CHECK", &stays, &network)?.empty();
    let left = ip_in(&goes.netns.path(), "-o link show")?;
    s.del(&stays, &network)?;
    s.del(&goes, &network)?;
    answer.context("GC")?;
    check.context("the valid attachment")?;
    ensure!(
        !left.contains(goes.ifname),
        "the stale attachment stands: {left}"
    );
    Ok(())
}

fn failed_add(s: &Subject<'_>) -> Result<()> {
    let network = s.network(newest(s)?);
    let mut a = s.attachment("fails")?;
    // In the way of any interface of the pod.
    ip_in(&a.netns.path(), &format!("link add {} type veth", a.ifname))?;
    let before = ip_in(&a.netns.path(), "-o link show")?;
    s.verb("ADD", &a, &network)?.error(None)?;
    let after = ip_in(&a.netns.path(), "-o link show")?;
    ensure!(
        before.lines().count() == after.lines().count(),
        "left behind: {after}"
    );
    ip_in(&a.netns.path(), &format!("link del {}", a.ifname))?;
    a.ifname = "eth0";
    s.add(&a, &network)?;
    s.del(&a, &network)
}

/// Writes the stdin of a spawned command and gathers its output: what `on_node` does inside the node's namespace.
pub fn feed(mut command: Command, stdin: &[u8]) -> Result<Output> {
    let mut child = command.spawn().context("starting the plugin")?;
    if let Some(mut input) = child.stdin.take() {
        match input.write_all(stdin) {
            // A plugin may answer without reading.
            Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => return Err(e.into()),
            Ok(()) | Err(_) => {}
        }
    }
    Ok(child.wait_with_output()?)
}
