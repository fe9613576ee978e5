//! Cases about what runtimes ask for beyond the plain verbs: versions, arguments, addresses, and what CHECK must let pass.

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{Subject, addresses, ip_in, newest};

/// A plugin that says its version takes milliseconds; one that waits for its stdin to end never does.
const AT_ONCE: Duration = Duration::from_secs(20);

/// §2 VERSION: "cniVersion: The value of cniVersion specified on input".
pub(super) fn version_repeats(s: &Subject<'_>) -> Result<()> {
    for version in ["1.0.0", "0.4.0"] {
        let stdin = json!({"cniVersion": version}).to_string();
        let answer = s
            .raw(&[("CNI_COMMAND", "VERSION")], stdin.as_bytes())?
            .result()?;
        ensure!(answer["cniVersion"] == version, "{version}: {answer}");
    }
    Ok(())
}

/// Callers leave stdin open.
pub(super) fn version_does_not_wait(s: &Subject<'_>) -> Result<()> {
    let mut child = Command::new(&s.program)
        .env_clear()
        .env("CNI_COMMAND", "VERSION")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("starting the plugin")?;
    let stdin = child.stdin.take();
    let stdout = child.stdout.take().context("stdout is a pipe")?;
    let (tell, told) = std::sync::mpsc::channel();
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        let read = std::io::BufReader::new(stdout).read_to_string(&mut text);
        // Whoever waits may have given up.
        let _ = tell.send(read.map(|_| text));
    });
    let begin = Instant::now();
    let answer = told.recv_timeout(AT_ONCE);
    drop(stdin);
    let status = child.wait()?;
    let _ = reader.join();
    let text = answer.with_context(|| format!("no answer in {:?}", begin.elapsed()))??;
    ensure!(status.success(), "{status}");
    let value: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
    ensure!(value["supportedVersions"].is_array(), "{text}");
    Ok(())
}

/// CHECK came with 0.4.0, GC and STATUS with 1.1.0: what is older has no such verb.
pub(super) fn verbs_by_version(s: &Subject<'_>) -> Result<()> {
    let newest = newest(s)?;
    for (verb, first) in [("CHECK", "0.4.0"), ("STATUS", "1.1.0"), ("GC", "1.1.0")] {
        // Older plugins do not know the word.
        if newest < first {
            continue;
        }
        for version in s.versions("0.3.0")? {
            if version >= first {
                continue;
            }
            let a = s.attachment("verbs")?;
            s.verb(verb, &a, &s.network(version))?
                .error(Some(1))
                .with_context(|| format!("{verb} of {version}"))?;
        }
    }
    Ok(())
}

/// §2 DEL completes to the fullest extent possible: no argument changes what it does.
pub(super) fn del_whatever_the_arguments(s: &Subject<'_>) -> Result<()> {
    let network = s.network(newest(s)?);
    let a = s.attachment("args")?;
    s.add(&a, &network)?;
    let netns = a.netns.path();
    let (netns, path) = (netns.to_string_lossy(), s.path.to_string_lossy());
    let del = s.raw(
        &[
            ("CNI_COMMAND", "DEL"),
            ("CNI_CONTAINERID", &a.id),
            ("CNI_NETNS", &netns),
            ("CNI_IFNAME", a.ifname),
            ("CNI_PATH", &path),
            ("CNI_ARGS", "UnknownToAll=1"),
        ],
        network.to_string().as_bytes(),
    );
    let verdict = del.and_then(super::Answer::empty);
    s.del(&a, &network)?;
    verdict
}

/// Convention `ips`: the address that the runtime asks for, and no other pod's.
pub(super) fn fixed_address(s: &Subject<'_>) -> Result<()> {
    let mut network = s.network(newest(s)?);
    network["runtimeConfig"]["ips"] = json!([s.fixed.to_string()]);
    let (a, b) = (s.attachment("fixed")?, s.attachment("same")?);
    let result = s.add(&a, &network)?;
    let given = addresses(&result)?;
    let again = s.verb("ADD", &b, &network)?.error(None);
    s.del(&a, &network)?;
    s.del(&b, &network)?;
    ensure!(given.contains(&s.fixed), "{given:?}");
    again
        .context("the same address for a second pod")
        .map(|_| ())
}

/// §2 CHECK: a later plugin of the chain may have changed resources such as routes; what is not in `prevResult` is not missed.
pub(super) fn check_lets_a_route_go(s: &Subject<'_>) -> Result<()> {
    let mut network = s.network(newest(s)?);
    let a = s.attachment("route")?;
    let mut result = s.add(&a, &network)?;
    let family = if s.fixed.is_ipv4() { "-4" } else { "-6" };
    let taken = ip_in(&a.netns.path(), &format!("{family} route del default"));
    if let Some(routes) = result["routes"].as_array_mut() {
        let default = if s.fixed.is_ipv4() {
            "0.0.0.0/0"
        } else {
            "::/0"
        };
        routes.retain(|route| route["dst"] != default);
    }
    network["prevResult"] = result;
    let verdict = s.verb("CHECK", &a, &network)?.empty();
    s.del(&a, &network)?;
    // A plugin without a default route has nothing to take away.
    taken.ok();
    verdict
}

/// Conventions: the runtime's and the configuration's DNS reach the result.
pub(super) fn dns_is_told(s: &Subject<'_>) -> Result<()> {
    let mut network = s.network(newest(s)?);
    network["dns"] = json!({"nameservers": ["192.0.2.53"], "search": ["conformance"]});
    let a = s.attachment("dns")?;
    let result = s.add(&a, &network)?;
    s.del(&a, &network)?;
    ensure!(
        result["dns"]["nameservers"] == json!(["192.0.2.53"])
            && result["dns"]["search"] == json!(["conformance"]),
        "{}",
        result["dns"]
    );
    Ok(())
}
