//! A session against a peer that misbehaves on purpose, over loopback TCP.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use kun_bgp_core::{Attributes, Route, RouteSet, RouteSource};
use kun_config::{Advertise, Bgp, BgpPeer, Families};
use rustbgpd_wire::{
    Afi, Capability, Message, OpenMessage, Safi, UpdateMessage, decode_message, encode_message,
};

use crate::{Options, Registry, SessionStatus, Speaker};

const WITHIN: Duration = Duration::from_secs(20);

/// A speaker, and the socket of the peer that it dials.
struct Bench {
    _runtime: tokio::runtime::Runtime,
    speaker: Speaker,
    listener: TcpListener,
}

impl Bench {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let config = Bgp {
            enabled: true,
            asn: 64513,
            router_id: Some(Ipv4Addr::new(10, 0, 0, 2)),
            listen: None,
            peers: vec![BgpPeer {
                name: "peer".to_owned(),
                address: Ipv4Addr::LOCALHOST.into(),
                interface: None,
                asn: 64512,
                port: listener.local_addr().unwrap().port(),
                source: None,
                families: Families {
                    v4: true,
                    v6: false,
                },
                hold: Duration::from_secs(9),
                md5_file: None,
                gtsm: false,
            }],
            advertise: Advertise {
                blocks: true,
                vips: true,
                nat64: true,
                extra: Vec::new(),
            },
            graceful_restart: Duration::from_secs(60),
        };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let inside = runtime.enter();
        let options = Options {
            router_id: Ipv4Addr::UNSPECIFIED,
            restarted: false,
            seed: 7,
        };
        let speaker = Speaker::start(&config, options, &mut Registry::default()).unwrap();
        drop(inside);
        let route = Route {
            prefix: "10.1.0.64/26".parse().unwrap(),
            source: RouteSource::Extra,
            attributes: Attributes::default(),
        };
        let set = RouteSet::build(
            [route],
            Families {
                v4: true,
                v6: false,
            },
            &RouteSet::default(),
        );
        speaker.announce(BTreeMap::from([("peer".to_owned(), set)]));
        Self {
            _runtime: runtime,
            speaker,
            listener,
        }
    }

    fn accept(&self) -> Peer {
        let (stream, _) = self.listener.accept().unwrap();
        stream.set_read_timeout(Some(WITHIN)).unwrap();
        Peer { stream }
    }

    /// A peer that said all the right things, and read our route and End-of-RIB.
    fn established(&self) -> Peer {
        let mut peer = self.accept();
        assert!(matches!(peer.read(), Message::Open(_)));
        peer.send(&Message::Open(open()));
        assert_eq!(peer.read(), Message::Keepalive);
        peer.send(&Message::Keepalive);
        let Message::Update(update) = peer.read() else {
            panic!("no route")
        };
        assert_eq!(&update.nlri[..], &[26, 10, 1, 0, 64]);
        let Message::Update(end) = peer.read() else {
            panic!("no End-of-RIB")
        };
        assert!(
            end.withdrawn_routes.is_empty()
                && end.path_attributes.is_empty()
                && end.nlri.is_empty()
        );
        peer
    }

    fn status(&self) -> SessionStatus {
        self.speaker.status().remove(0)
    }

    fn wait(&self, what: &str, holds: impl Fn(&SessionStatus) -> bool) -> SessionStatus {
        let end = Instant::now() + WITHIN;
        loop {
            let status = self.status();
            if holds(&status) {
                return status;
            }
            assert!(Instant::now() < end, "{what}: {status:?}");
            std::thread::yield_now();
        }
    }
}

struct Peer {
    stream: TcpStream,
}

impl Peer {
    fn send(&mut self, message: &Message) {
        self.raw(&encode_message(message).unwrap());
    }

    fn raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    fn update(&mut self, attributes: &'static [u8], nlri: &'static [u8]) {
        self.send(&Message::Update(UpdateMessage {
            withdrawn_routes: bytes::Bytes::new(),
            path_attributes: bytes::Bytes::from_static(attributes),
            nlri: bytes::Bytes::from_static(nlri),
        }));
    }

    fn read(&mut self) -> Message {
        let mut header = [0; 19];
        self.stream.read_exact(&mut header).unwrap();
        let length = usize::from(u16::from_be_bytes([header[16], header[17]]));
        let mut whole = header.to_vec();
        whole.resize(length, 0);
        self.stream.read_exact(&mut whole[19..]).unwrap();
        decode_message(&mut whole.into(), 4096).unwrap()
    }

    /// The NOTIFICATION that ends it, past keepalives.
    fn notification(&mut self) -> (u8, u8) {
        loop {
            match self.read() {
                Message::Notification(n) => return (n.code.as_u8(), n.subcode),
                Message::Keepalive => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

fn open() -> OpenMessage {
    OpenMessage {
        version: 4,
        my_as: 64512,
        hold_time: 9,
        bgp_identifier: Ipv4Addr::new(10, 0, 0, 1),
        capabilities: vec![
            Capability::MultiProtocol {
                afi: Afi::Ipv4,
                safi: Safi::Unicast,
            },
            Capability::FourOctetAs { asn: 64512 },
        ],
    }
}

/// ORIGIN IGP, AS_PATH 64512, NEXT_HOP 127.0.0.1.
const SOUND: &[u8] = &[
    0x40, 1, 1, 0, 0x40, 2, 6, 2, 1, 0, 0, 0xfc, 0, 0x40, 3, 4, 127, 0, 0, 1,
];
/// The same with an ORIGIN of two octets.
const LONG_ORIGIN: &[u8] = &[
    0x40, 1, 2, 0, 0, 0x40, 2, 6, 2, 1, 0, 0, 0xfc, 0, 0x40, 3, 4, 127, 0, 0, 1,
];

#[test]
fn malformed_attributes_are_survived_and_counted() {
    let bench = Bench::new();
    let mut peer = bench.established();
    peer.update(SOUND, &[24, 198, 51, 100]);
    bench.wait("one route ignored", |s| s.ignored == 1 && s.malformed == 0);
    peer.update(LONG_ORIGIN, &[24, 198, 51, 100]);
    let status = bench.wait("the malformed one counted", |s| s.malformed == 1);
    assert_eq!((status.state, status.last_error), ("Established", None));
}

#[test]
fn what_cannot_be_parsed_ends_the_session_in_words() {
    // Bytes on the established session, the NOTIFICATION they deserve, and the words for it.
    let bad_length = [&[0xff; 16][..], &[0, 23, 2, 0, 9, 0, 0]].concat();
    let bad_marker = [&[0xfe; 16][..], &[0, 19, 4]].concat();
    let bad_type = [&[0xff; 16][..], &[0, 19, 9]].concat();
    let bad_prefix = [&[0xff; 16][..], &[0, 25, 2, 0, 0, 0, 0, 33, 10]].concat();
    let table = [
        (bad_marker, (1, 1), "Connection Not Synchronized (1/1)"),
        (bad_type, (1, 3), "Bad Message Type (1/3)"),
        (bad_length, (3, 1), "Malformed Attribute List (3/1)"),
        (bad_prefix, (3, 10), "Invalid Network Field (3/10)"),
    ];
    for (bytes, notification, words) in table {
        let bench = Bench::new();
        let mut peer = bench.established();
        peer.raw(&bytes);
        assert_eq!(peer.notification(), notification, "{words}");
        bench.wait(words, |s| {
            s.state != "Established" && s.last_error.as_ref().is_some_and(|e| e.contains(words))
        });
    }
}

#[test]
fn an_unacceptable_open_is_refused_with_its_reason() {
    type Spoil = fn(&mut OpenMessage);
    let table: [(Spoil, (u8, u8)); 3] = [
        (|o| o.hold_time = 1, (2, 6)),
        (|o| o.bgp_identifier = Ipv4Addr::UNSPECIFIED, (2, 3)),
        (
            |o| o.capabilities[1] = Capability::FourOctetAs { asn: 64999 },
            (2, 2),
        ),
    ];
    for (spoil, notification) in table {
        let bench = Bench::new();
        let mut peer = bench.accept();
        assert!(matches!(peer.read(), Message::Open(_)));
        let mut open = open();
        spoil(&mut open);
        peer.send(&Message::Open(open));
        assert_eq!(peer.notification(), notification);
    }
}

#[test]
fn a_peer_that_closes_is_dialled_again_and_told_everything_again() {
    let bench = Bench::new();
    drop(bench.established());
    bench.wait("the loss", |s| {
        s.last_error.as_deref() == Some("the peer closed the connection")
    });
    let _again = bench.established();
    assert_eq!(
        bench
            .wait("the session", |s| s.state == "Established")
            .announced,
        1
    );
}

#[test]
fn a_route_refresh_is_answered_with_every_route() {
    let bench = Bench::new();
    let mut peer = bench.established();
    // ROUTE-REFRESH, IPv4 unicast (RFC 2918 §3).
    peer.raw(&[&[0xff; 16][..], &[0, 23, 5, 0, 1, 0, 1]].concat());
    loop {
        match peer.read() {
            Message::Keepalive => {}
            Message::Update(update) => {
                assert_eq!(&update.nlri[..], &[26, 10, 1, 0, 64]);
                break;
            }
            other => panic!("{other:?}"),
        }
    }
}

/// A peer that asks and asks without reading makes nobody write its table as often.
#[test]
fn a_flood_of_route_refreshes_is_answered_together() {
    let bench = Bench::new();
    let mut peer = bench.established();
    let refresh = [&[0xff; 16][..], &[0, 23, 5, 0, 1, 0, 1]].concat();
    let mut flood = refresh.repeat(1000);
    // An OPEN has no place here: it ends the session, and with it the answers.
    flood.extend_from_slice(&encode_message(&Message::Open(open())).unwrap());
    peer.stream.write_all(&flood).unwrap();
    let mut answers = 0;
    loop {
        match peer.read() {
            Message::Update(_) => answers += 1,
            Message::Notification(_) => break,
            _ => {}
        }
    }
    assert!(answers < 100, "{answers} times the table");
}
