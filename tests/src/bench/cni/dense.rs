//! Figures of the part `dense`, the densest node in use: the real agent's memory, and an ADD there.

use kun_cluster::crd::block_name;

use super::*;

/// Attachments on the densest node in use.
const DENSE: usize = 2500;
/// The interfaces of a namespace slow its own down: so many attachments share one.
const A_NAMESPACE: usize = 50;
/// Of the first and of the last attachments so many are timed.
const TIMED: usize = 100;
/// So long the agent is watched while nobody asks anything of it: all that it does again and again falls into it.
const AT_REST: Duration = Duration::from_secs(30);
/// A starting agent loads its programs and reads the cluster.
const AGENT_STARTS_WITHIN: Duration = Duration::from_secs(60);

/// The real agent with the densest node's attachments: its memory, and an ADD there.
pub fn run(context: &Context) -> Result<Vec<Row>> {
    let dir = context.scratch().join("dense");
    std::fs::create_dir_all(dir.join("manifests"))?;
    let cgroup = kun_harness::Cgroup::new()?;
    let bpffs = kun_harness::BpfFs::new()?;
    let mut manifests = String::from(
        "apiVersion: v1\nkind: Node\nmetadata: {name: bench}\nstatus: {addresses: [{type: InternalIP, address: 192.0.2.2}]}\n",
    );
    for block in blocks(64) {
        manifests += &format!(
            "---\napiVersion: kun.network/v1alpha1\nkind: IPAMBlock\nmetadata: {{name: {}}}\nspec: {{first: {}, node: bench}}\n",
            block_name(block),
            block.first()
        );
    }
    std::fs::write(dir.join("manifests/blocks.yaml"), manifests)?;
    let file = dir.join("kun.yaml");
    let socket = dir.join("agent.sock");
    let text = json!({
        "node": {"name": "bench"},
        "cluster": {"folder": dir.join("manifests")},
        "ipam": {"podPrefix": "fd00:64::/96", "v4Pools": ["10.64.0.0/16"], "defaultClass": "dual", "mtu": 1500},
        "proxy": {"cgroupRoot": cgroup.path()},
        "agent": {
            "stateDir": dir.join("state"), "socket": socket, "bpffsRoot": bpffs.path(),
            "metrics": "[::1]:9466", "log": "warn",
        },
    });
    std::fs::write(&file, text.to_string())?;
    let node = Netns::new("bench-dense")?;
    node.forward()?;
    let mut command = Command::new(context.program("kun-proxy")?);
    command.arg("--config").arg(&file).stderr(Stdio::null());
    let mut agent = node.spawn(command)?;
    kun_harness::wait_for("the agent with its blocks", AGENT_STARTS_WITHIN, || {
        if !agent.is_running() {
            return Some(false);
        }
        let capacity = Request::Capacity { class: None };
        match kun_control::ask(&socket, &capacity) {
            Ok(Response::Capacity { free, .. }) => (free as usize >= DENSE).then_some(true),
            Ok(_) | Err(_) => None,
        }
    })?
    .then_some(())
    .context("kun-proxy ended")?;
    let empty = resident(agent.pid())?;

    let plugin = Plugin {
        name: "kun-cni".to_owned(),
        program: context.program("kun-cni")?,
        network: json!({
            "cniVersion": "1.0.0", "name": "kun", "type": "kun-cni", "kunConfig": file,
        }),
        node,
        _agent: None,
    };
    let pods: Vec<Netns> = (0..DENSE.div_ceil(A_NAMESPACE))
        .map(|_| Netns::new("bench-pods"))
        .collect::<Result<_>>()?;
    let mut adds = Vec::new();
    for i in 0..DENSE {
        let pod = &pods[i / A_NAMESPACE];
        let took = plugin
            .node
            .run(|| plugin.one("ADD", pod, &format!("p{i}x")))?;
        adds.push(took);
    }
    let full = resident(agent.pid())?;
    let before = cpu(agent.pid())?;
    std::thread::sleep(AT_REST);
    let at_rest = (cpu(agent.pid())?.saturating_sub(before)).as_secs_f64() / AT_REST.as_secs_f64();
    let last = Figures {
        adds: adds.split_off(DENSE - TIMED),
        ..Figures::default()
    };
    adds.truncate(TIMED);
    let first = Figures {
        adds,
        ..Figures::default()
    };
    Ok(vec![
        Row::new(format!("cni/agent-memory@{DENSE}"), full, "MB"),
        Row::new("cni/agent-memory@0", empty, "MB"),
        Row::new(
            format!("cni/agent-cpu-at-rest@{DENSE}"),
            at_rest * 100.0,
            "% of a core",
        ),
        Row::new(
            format!("cni/add-p50-with-agent-of-{TIMED}"),
            first.percentile(50),
            "ms",
        ),
        Row::new(
            format!("cni/add-p50-with-agent-of-{DENSE}"),
            last.percentile(50),
            "ms",
        ),
    ])
}

/// CPU time that a process has used, from its /proc/PID/stat (proc(5): utime, stime, in ticks of 10 ms).
fn cpu(pid: u32) -> Result<Duration> {
    ticks(&std::fs::read_to_string(format!("/proc/{pid}/stat"))?, 11)
}

/// Resident memory of a process, in MB.
fn resident(pid: u32) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kilobytes: f64 = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse().ok())
        .context("VmRSS")?;
    Ok(kilobytes / 1024.0)
}
