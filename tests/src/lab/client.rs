//! The client inside a pod: a process in the pod's namespace and cgroup that does, line by line, what it is asked.
//!
//! It must be a process, not a thread of the lab: the proxy acts on the cgroup of whoever calls `connect()`.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use hickory_proto::op::{Message, MessageType, OpCode, Query};
use hickory_proto::rr::{Name, RData, RecordType};
use kun_harness::{Cgroup, Netns};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, Socket, Type};

use super::server::{self, Hello};

/// As a resolver asks: a second and a third time, after as long.
const TRIES: u32 = 3;
const WITHIN: Duration = Duration::from_millis(1500);

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", tag = "do")]
pub enum Ask {
    /// Ask a DNS server.
    Resolve {
        /// The server, at port 53.
        server: IpAddr,
        /// The name, with its last dot.
        name: String,
        /// AAAA, else A.
        v6: bool,
        /// Over TCP, else UDP.
        tcp: bool,
    },
    /// GET / over a new connection.
    Fetch {
        /// Where.
        to: SocketAddr,
    },
    /// A datagram and its answer.
    Datagram {
        /// Where.
        to: SocketAddr,
    },
    /// An echo request.
    Ping {
        /// Whom.
        to: IpAddr,
    },
    /// Opens a connection that stays, under a number.
    Open {
        /// The number.
        id: u32,
        /// Where.
        to: SocketAddr,
    },
    /// A request over a connection that stands.
    Exchange {
        /// Its number.
        id: u32,
    },
    /// The IPv4 addresses of the namespace, loopback's aside.
    OwnV4,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", tag = "got")]
pub enum Told {
    /// Addresses, in the order of the answer.
    Addresses {
        /// The addresses.
        addresses: Vec<IpAddr>,
    },
    /// Who answered, and whom it saw.
    Hello(Hello),
    /// An echo reply, or a connection that stands.
    Done,
    /// It failed.
    Failed {
        /// Why.
        because: String,
    },
}

/// The loop inside the pod: a line in, a line out, until the input ends.
pub fn serve() -> Result<()> {
    let mut open = HashMap::new();
    let mut output = std::io::stdout().lock();
    for line in std::io::stdin().lock().lines() {
        let ask: Ask = serde_json::from_str(&line?).context("not a question of the lab's")?;
        let told = answer(&ask, &mut open).unwrap_or_else(|e| Told::Failed {
            because: format!("{e:#}"),
        });
        serde_json::to_writer(&mut output, &told)?;
        output.write_all(b"\n")?;
        output.flush()?;
    }
    Ok(())
}

fn answer(ask: &Ask, open: &mut HashMap<u32, TcpStream>) -> Result<Told> {
    match ask {
        Ask::Resolve {
            server,
            name,
            v6,
            tcp,
        } => {
            let addresses = resolve(*server, name, *v6, *tcp)?;
            Ok(Told::Addresses { addresses })
        }
        Ask::Fetch { to } => Ok(Told::Hello(server::fetch(*to, "lab", WITHIN)?)),
        Ask::Datagram { to } => datagram(*to).map(Told::Hello),
        Ask::Ping { to } => ping(*to).map(|()| Told::Done),
        Ask::Open { id, to } => {
            open.insert(*id, server::connect(*to, WITHIN)?);
            Ok(Told::Done)
        }
        Ask::Exchange { id } => {
            let stream = open.get_mut(id).context("no such connection")?;
            Ok(Told::Hello(server::exchange(stream, "lab")?))
        }
        Ask::OwnV4 => Ok(Told::Addresses {
            addresses: own_v4(&std::fs::read_to_string("/proc/self/net/fib_trie")?),
        }),
    }
}

/// The local addresses in the kernel's dump of its IPv4 routes: a leaf, then its kind.
fn own_v4(trie: &str) -> Vec<IpAddr> {
    let mut own = Vec::new();
    let mut leaf = None;
    for line in trie.lines().map(str::trim) {
        if let Some(address) = line.strip_prefix("|-- ") {
            leaf = address.parse::<std::net::Ipv4Addr>().ok();
        } else if line.contains("host LOCAL") {
            own.extend(leaf.filter(|a| !a.is_loopback()).map(IpAddr::V4));
        }
    }
    own.sort();
    own.dedup();
    own
}

fn udp_towards(to: SocketAddr) -> Result<UdpSocket> {
    let any: IpAddr = if to.is_ipv6() {
        Ipv6Addr::UNSPECIFIED.into()
    } else {
        std::net::Ipv4Addr::UNSPECIFIED.into()
    };
    let socket = UdpSocket::bind((any, 0))?;
    socket.set_read_timeout(Some(WITHIN))?;
    socket.connect(to)?;
    Ok(socket)
}

/// Sends until an answer comes, so many times.
fn ask_udp(to: SocketAddr, question: &[u8], tries: u32) -> Result<Vec<u8>> {
    let socket = udp_towards(to)?;
    let mut buffer = [0; 4096];
    let mut last = None;
    for _ in 0..tries {
        match socket.send(question).and_then(|_| socket.recv(&mut buffer)) {
            Ok(length) => return Ok(buffer[..length].to_vec()),
            Err(e) => last = Some(e),
        }
    }
    match last {
        Some(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
            bail!("{to}: no answer to {tries} datagrams")
        }
        Some(e) => Err(e).with_context(|| format!("{to}")),
        None => bail!("{to}: nothing was sent"),
    }
}

fn datagram(to: SocketAddr) -> Result<Hello> {
    serde_json::from_slice(&ask_udp(to, b"hello", 1)?).context("the answer is not one of the lab's")
}

fn resolve(server: IpAddr, name: &str, v6: bool, tcp: bool) -> Result<Vec<IpAddr>> {
    let mut query = Message::new(0x6b75, MessageType::Query, OpCode::Query);
    query.metadata.recursion_desired = true;
    let kind = if v6 { RecordType::AAAA } else { RecordType::A };
    query.add_query(Query::query(Name::from_ascii(name)?, kind));
    let question = query.to_vec()?;
    let to = SocketAddr::new(server, 53);
    let answer = if tcp {
        ask_tcp(to, &question)?
    } else {
        ask_udp(to, &question, TRIES)?
    };
    let answer = Message::from_vec(&answer).context("the answer is not DNS")?;
    let code = answer.metadata.response_code;
    anyhow::ensure!(
        code == hickory_proto::op::ResponseCode::NoError,
        "{name} {kind}: {code}"
    );
    Ok(answer
        .answers
        .iter()
        .filter_map(|record| match &record.data {
            RData::A(a) => Some(IpAddr::V4(a.0)),
            RData::AAAA(a) => Some(IpAddr::V6(a.0)),
            _ => None,
        })
        .collect())
}

/// RFC 1035 §4.2.2: two bytes of length, then the message.
fn ask_tcp(to: SocketAddr, question: &[u8]) -> Result<Vec<u8>> {
    use std::io::Read;
    let mut stream = server::connect(to, WITHIN)?;
    let mut framed = u16::try_from(question.len())?.to_be_bytes().to_vec();
    framed.extend(question);
    stream.write_all(&framed)?;
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut answer = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut answer)?;
    Ok(answer)
}

/// An echo request on an ICMP socket; the kernel chooses the identifier.
fn ping(to: IpAddr) -> Result<()> {
    let (domain, protocol, kind) = match to {
        IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4, 8),
        IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6, 128),
    };
    let socket = Socket::new(domain, Type::DGRAM, Some(protocol)).context("an ICMP socket")?;
    socket.set_read_timeout(Some(WITHIN))?;
    socket.connect(&SocketAddr::new(to, 0).into())?;
    for sequence in 1..=TRIES as u8 {
        let request = [kind, 0, 0, 0, 0, 0, 0, sequence, b'k', b'u', b'n'];
        socket.send(&request)?;
        let mut reply = [0; 64];
        match std::io::Read::read(&mut &socket, &mut reply) {
            Ok(length) if length >= 11 && reply[8..11] == *b"kun" => return Ok(()),
            Ok(_) => bail!("{to}: an answer that is no echo reply"),
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e).with_context(|| format!("{to}")),
        }
    }
    bail!("{to}: no answer to {TRIES} echo requests")
}

/// The lab's end of a client.
#[derive(Debug)]
pub struct Client {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Client {
    /// Starts `kun-lab client` in the namespace and, where given, the cgroup.
    pub fn start(command: Command, netns: &Netns, cgroup: Option<&Cgroup>) -> Result<Self> {
        let command = match cgroup {
            Some(cgroup) => cgroup.wrap(&command),
            None => command,
        };
        netns.run(move || Self::spawn(command))
    }

    /// Starts what gets a client to run where it belongs.
    pub fn spawn(mut command: Command) -> Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("starting a client")?;
        let input = child.stdin.take().context("a piped child has an input")?;
        let output = BufReader::new(child.stdout.take().context("a piped child has an output")?);
        Ok(Self {
            child,
            input,
            output,
        })
    }

    /// Asks, and waits for what came of it.
    pub fn ask(&mut self, ask: &Ask) -> Result<Told> {
        let mut line = serde_json::to_vec(ask)?;
        line.push(b'\n');
        self.input.write_all(&line).context("the client is gone")?;
        let mut answer = String::new();
        anyhow::ensure!(
            self.output.read_line(&mut answer)? > 0,
            "the client is gone"
        );
        serde_json::from_str(&answer).context("the client's answer")
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_addresses_are_told_from_networks_and_broadcasts() {
        let trie = "Main:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 0.0.0.0\n        /0 universe UNICAST\n     |-- 10.64.0.2\n        \
                    /32 host LOCAL\n     |-- 127.0.0.1\n        /32 host LOCAL\n     |-- 127.255.255.255\n        \
                    /32 link BROADCAST\nLocal:\n     |-- 10.64.0.2\n        /32 host LOCAL\n";
        assert_eq!(own_v4(trie), ["10.64.0.2".parse::<IpAddr>().unwrap()]);
    }
}
