//! DNS and DNS64 from outside: questions over sockets to any server that resolves [`ZONE`] and makes AAAA records under [`PREF64`]
//! (RFC 1035, RFC 6147, RFC 6891, RFC 7766, RFC 8880). Answers are read by hickory-proto, which no subject here is made of.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RData, RecordType};

/// The zone that the subject must reach, for an authoritative server. TTLs are part of the cases.
pub const ZONE: &str = "\
$ORIGIN example.test.
$TTL 300
@ 90 IN SOA ns hostmaster 1 3600 600 86400 90
@ IN NS ns
ns IN A 127.0.0.1
v4 IN A 198.51.100.7
two IN A 198.51.100.7
two IN A 198.51.100.8
v6 IN AAAA 2001:db8:5::6
both IN A 198.51.100.9
both IN AAAA 2001:db8:5::9
mapped IN A 198.51.100.10
mapped IN AAAA ::ffff:198.51.100.10
mixed IN A 198.51.100.11
mixed IN AAAA ::ffff:198.51.100.11
mixed IN AAAA 2001:db8:5::b
text IN TXT \"no address\"
alias IN CNAME v4
alias2 IN CNAME alias
aliasv6 IN CNAME v6
short 20 IN A 198.51.100.12
";

/// The reverse zone of 198.51.100.0/24.
pub const REVERSE_ZONE: &str = "\
$ORIGIN 100.51.198.in-addr.arpa.
$TTL 300
@ IN SOA ns.example.test. hostmaster.example.test. 1 3600 600 86400 90
@ IN NS ns.example.test.
7 IN PTR v4.example.test.
";

/// A name with more addresses than any UDP answer holds; append to [`ZONE`].
pub fn many_addresses() -> String {
    (0..200)
        .map(|i| format!("many IN A 198.51.101.{i}\n"))
        .collect()
}

/// What the subject makes AAAA records under.
pub const PREF64: &str = "2001:db8:64::/96";

/// Under test.
#[derive(Debug, Clone, Copy)]
pub struct Subject {
    /// UDP and TCP.
    pub server: SocketAddr,
}

/// One case.
#[derive(Clone, Copy)]
pub struct Case {
    /// Its name, for ledgers and lists of deviations.
    pub name: &'static str,
    run: fn(&Subject) -> Result<()>,
}

impl Case {
    /// Runs it: what is wrong, if anything.
    pub fn run(&self, subject: &Subject) -> Result<()> {
        (self.run)(subject)
    }
}

const PATIENCE: Duration = Duration::from_secs(6);

impl Subject {
    /// One question as a stub asks it, without EDNS.
    pub fn ask(&self, name: &str, t: RecordType) -> Result<Message> {
        self.send(&question(name, t))
    }

    /// Sends a message over UDP and reads the answer.
    pub fn send(&self, m: &Message) -> Result<Message> {
        let answer = self.octets(&m.to_vec()?)?;
        let answer = Message::from_vec(&answer).context("the answer is malformed")?;
        ensure!(
            answer.metadata.id == m.metadata.id
                && answer.metadata.message_type == MessageType::Response,
            "not an answer to this message"
        );
        Ok(answer)
    }

    /// Sends octets over UDP.
    pub fn octets(&self, wire: &[u8]) -> Result<Vec<u8>> {
        let socket = UdpSocket::bind((self.server.ip(), 0))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.send_to(wire, self.server)?;
        let mut buffer = vec![0; 65_535];
        let (n, from) = socket.recv_from(&mut buffer).context("no answer")?;
        ensure!(from == self.server, "the answer comes from {from}");
        buffer.truncate(n);
        Ok(buffer)
    }

    /// Sends messages over one TCP connection and reads as many answers.
    pub fn tcp(&self, messages: &[Message]) -> Result<Vec<Message>> {
        let mut stream = TcpStream::connect_timeout(&self.server, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        for m in messages {
            let wire = m.to_vec()?;
            stream.write_all(&[&(wire.len() as u16).to_be_bytes()[..], &wire].concat())?;
        }
        let mut out = Vec::new();
        for _ in messages {
            let mut len = [0; 2];
            stream.read_exact(&mut len).context("no answer over TCP")?;
            let mut wire = vec![0; usize::from(u16::from_be_bytes(len))];
            stream.read_exact(&mut wire)?;
            out.push(Message::from_vec(&wire)?);
        }
        Ok(out)
    }
}

/// A question with RD.
pub fn question(name: &str, t: RecordType) -> Message {
    let mut m = Message::new(0x6b75, MessageType::Query, OpCode::Query);
    m.metadata.recursion_desired = true;
    m.add_query(Query::query(
        Name::from_ascii(name).expect("a name of ours"),
        t,
    ));
    m
}

/// The AAAA records of an answer.
pub fn quads(m: &Message) -> Vec<Ipv6Addr> {
    let mut all: Vec<Ipv6Addr> = m
        .answers
        .iter()
        .filter_map(|r| {
            if let RData::AAAA(a) = &r.data {
                Some(a.0)
            } else {
                None
            }
        })
        .collect();
    all.sort();
    all
}

fn made(v4: &str) -> Ipv6Addr {
    let v4: Ipv4Addr = v4.parse().expect("an address of ours");
    let prefix: Ipv6Addr = "2001:db8:64::".parse().expect("an address of ours");
    Ipv6Addr::from(u128::from(prefix) | u128::from(u32::from(v4)))
}

fn expect(s: &Subject, name: &str, code: ResponseCode, want: &[Ipv6Addr]) -> Result<Message> {
    let m = s.ask(name, RecordType::AAAA)?;
    ensure!(
        m.metadata.response_code == code,
        "{name}: {} where {code} was expected",
        m.metadata.response_code
    );
    ensure!(
        quads(&m) == want,
        "{name}: {:?} where {want:?} was expected",
        quads(&m)
    );
    Ok(m)
}

/// Every case.
pub const CASES: &[Case] = &[
    Case {
        name: "a_only_is_synthesised",
        run: |s| {
            expect(
                s,
                "v4.example.test.",
                ResponseCode::NoError,
                &[made("198.51.100.7")],
            )?;
            expect(
                s,
                "two.example.test.",
                ResponseCode::NoError,
                &[made("198.51.100.7"), made("198.51.100.8")],
            )
            .map(drop)
        },
    },
    Case {
        name: "native_aaaa_is_kept",
        run: |s| {
            let native = |t: &str| t.parse::<Ipv6Addr>().expect("an address of ours");
            expect(
                s,
                "v6.example.test.",
                ResponseCode::NoError,
                &[native("2001:db8:5::6")],
            )?;
            expect(
                s,
                "both.example.test.",
                ResponseCode::NoError,
                &[native("2001:db8:5::9")],
            )
            .map(drop)
        },
    },
    Case {
        name: "excluded_aaaa_counts_as_absent",
        run: |s| {
            expect(
                s,
                "mapped.example.test.",
                ResponseCode::NoError,
                &[made("198.51.100.10")],
            )
            .map(drop)
        },
    },
    Case {
        name: "excluded_aaaa_is_left_out_of_a_mixed_set",
        run: |s| {
            expect(
                s,
                "mixed.example.test.",
                ResponseCode::NoError,
                &["2001:db8:5::b".parse()?],
            )
            .map(drop)
        },
    },
    Case {
        name: "the_alias_chain_is_kept",
        run: |s| {
            let m = expect(
                s,
                "alias2.example.test.",
                ResponseCode::NoError,
                &[made("198.51.100.7")],
            )?;
            let aliases = m
                .answers
                .iter()
                .filter(|r| r.record_type() == RecordType::CNAME)
                .count();
            ensure!(aliases == 2, "{aliases} aliases where 2 were expected");
            let last = m.answers.last().context("no answer")?;
            ensure!(
                last.name.to_string() == "v4.example.test.",
                "the AAAA belongs to {}",
                last.name
            );
            expect(
                s,
                "aliasv6.example.test.",
                ResponseCode::NoError,
                &["2001:db8:5::6".parse()?],
            )
            .map(drop)
        },
    },
    Case {
        name: "nxdomain_passes",
        run: |s| expect(s, "none.example.test.", ResponseCode::NXDomain, &[]).map(drop),
    },
    Case {
        name: "no_addresses_at_all_is_nodata",
        run: |s| {
            let m = expect(s, "text.example.test.", ResponseCode::NoError, &[])?;
            ensure!(
                m.authorities
                    .iter()
                    .any(|r| r.record_type() == RecordType::SOA),
                "no SOA in a denial (RFC 2308 §3)"
            );
            Ok(())
        },
    },
    Case {
        name: "the_ttl_is_at_most_the_soas",
        run: |s| {
            let ttl = |name| -> Result<u32> {
                Ok(s.ask(name, RecordType::AAAA)?
                    .answers
                    .last()
                    .context("no answer")?
                    .ttl)
            };
            let (long, short) = (ttl("v4.example.test.")?, ttl("short.example.test.")?);
            ensure!(
                (1..=90).contains(&long),
                "v4: {long} s where the SOA says 90"
            );
            ensure!(
                (1..=20).contains(&short),
                "short: {short} s where the A record says 20"
            );
            Ok(())
        },
    },
    Case {
        name: "the_reverse_name_leads_to_in_addr_arpa",
        run: |s| {
            let m = s.ask(
                "7.0.4.6.3.3.6.c.0.0.0.0.0.0.0.0.0.0.0.0.4.6.0.0.8.b.d.0.1.0.0.2.ip6.arpa.",
                RecordType::PTR,
            )?;
            let names: Vec<String> = m
                .answers
                .iter()
                .filter(|r| r.record_type() == RecordType::PTR)
                .map(|r| r.data.to_string())
                .collect();
            ensure!(
                names == ["v4.example.test."],
                "{names:?}, {}",
                m.metadata.response_code
            );
            Ok(())
        },
    },
    Case {
        name: "cd_with_do_never_synthesises",
        run: |s| {
            let mut m = question("v4.example.test.", RecordType::AAAA);
            m.metadata.checking_disabled = true;
            let mut edns = Edns::new();
            edns.set_max_payload(1232).set_dnssec_ok(true);
            m.edns = Some(edns);
            let answer = s.send(&m)?;
            ensure!(quads(&answer).is_empty(), "{:?}", quads(&answer));
            Ok(())
        },
    },
    Case {
        name: "ipv4only_arpa_tells_the_prefix",
        run: |s| {
            expect(
                s,
                "ipv4only.arpa.",
                ResponseCode::NoError,
                &[made("192.0.0.170"), made("192.0.0.171")],
            )
            .map(drop)
        },
    },
    Case {
        name: "other_types_are_left_alone",
        run: |s| {
            let a = s.ask("v4.example.test.", RecordType::A)?;
            ensure!(
                a.answers.len() == 1 && a.answers[0].data.to_string() == "198.51.100.7",
                "{:?}",
                a.answers
            );
            let txt = s.ask("text.example.test.", RecordType::TXT)?;
            ensure!(txt.answers.len() == 1, "{:?}", txt.answers);
            Ok(())
        },
    },
    Case {
        name: "letter_case_comes_back",
        run: |s| {
            let m = s.ask("V4.eXample.TEST.", RecordType::A)?;
            let name = m.queries.first().context("no question")?.name().to_string();
            ensure!(name == "V4.eXample.TEST.", "{name}");
            ensure!(m.answers.len() == 1, "{:?}", m.answers);
            Ok(())
        },
    },
    Case {
        name: "long_answers_are_truncated_and_whole_over_tcp",
        run: |s| {
            let q = question("many.example.test.", RecordType::A);
            let wire = s.octets(&q.to_vec()?)?;
            ensure!(
                wire.len() <= 512 && wire[2] & 2 != 0,
                "{} octets without TC",
                wire.len()
            );
            let whole = s.tcp(&[q])?;
            ensure!(
                whole[0].answers.len() == 200,
                "{} answers over TCP",
                whole[0].answers.len()
            );
            Ok(())
        },
    },
    Case {
        name: "tcp_takes_several_questions",
        run: |s| {
            let names = ["v4.example.test.", "v6.example.test.", "none.example.test."];
            let mut messages: Vec<Message> = names
                .iter()
                .map(|n| question(n, RecordType::AAAA))
                .collect();
            messages
                .iter_mut()
                .zip(1..)
                .for_each(|(m, id)| m.metadata.id = id);
            let mut ids: Vec<u16> = s.tcp(&messages)?.iter().map(|m| m.metadata.id).collect();
            ids.sort();
            ensure!(ids == [1, 2, 3], "{ids:?}");
            Ok(())
        },
    },
    Case {
        name: "edns_answers_edns",
        run: |s| {
            let mut m = question("v4.example.test.", RecordType::A);
            ensure!(
                s.send(&m)?.edns.is_none(),
                "OPT where none was sent (RFC 6891 §6.1.1)"
            );
            m.edns = Some(Edns::new());
            ensure!(s.send(&m)?.edns.is_some(), "no OPT");
            let mut wire = question("v4.example.test.", RecordType::A).to_vec()?;
            wire[11] = 1;
            wire.extend_from_slice(&[0, 0, 41, 4, 208, 0, 1, 0, 0, 0, 0]);
            let answer = Message::from_vec(&s.octets(&wire)?)?;
            ensure!(
                answer.metadata.response_code.low() == 0
                    && answer.edns.as_ref().is_some_and(|e| e.rcode_high() == 1),
                "version 1 is not refused by BADVERS: {answer}"
            );
            Ok(())
        },
    },
    Case {
        name: "unknown_opcodes_are_not_implemented",
        run: |s| {
            let mut wire = question("v4.example.test.", RecordType::A).to_vec()?;
            wire[2] |= 2 << 3;
            let answer = s.octets(&wire)?;
            ensure!(answer[3] & 15 == 4, "code {}", answer[3] & 15);
            Ok(())
        },
    },
    Case {
        name: "two_questions_are_malformed",
        run: |s| {
            let mut wire = question("v4.example.test.", RecordType::A).to_vec()?;
            let copy = wire[12..].to_vec();
            wire.extend_from_slice(&copy);
            wire[5] = 2;
            let answer = s.octets(&wire)?;
            ensure!(answer[3] & 15 == 1, "code {} (RFC 9619)", answer[3] & 15);
            Ok(())
        },
    },
];

/// Names on which two servers of the same zone and prefix must agree, for comparing a subject with a peer.
pub const NAMES: &[&str] = &[
    "v4",
    "two",
    "v6",
    "both",
    "text",
    "alias",
    "alias2",
    "aliasv6",
    "short",
    "none",
    "a.b.c.none",
    "ns",
    "",
    "many",
];
