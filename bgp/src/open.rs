//! What our OPEN says, what a peer's OPEN makes of the session, and NOTIFICATIONs in words.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use kun_config::BgpPeer;
use rustbgpd_fsm::{NegotiatedSession, PeerConfig};
use rustbgpd_wire::notification::{description, extract_shutdown_communication};
use rustbgpd_wire::{Afi, Capability, NotificationMessage, OpenMessage, Safi};

use crate::encode::{Context, NextHop};

/// Longest restart time that the capability can say (RFC 4724 §3: 12 bits).
const RESTART_TIME_MAX: u64 = 4095;

/// This speaker, the same towards every peer.
#[derive(Debug, Clone)]
pub(crate) struct Local {
    pub(crate) asn: u32,
    pub(crate) router_id: Ipv4Addr,
    /// Zero: no graceful restart.
    pub(crate) restart_time: Duration,
}

/// What the FSM is to negotiate with a peer.
pub(crate) fn fsm_config(local: &Local, peer: &BgpPeer) -> PeerConfig {
    let mut config = PeerConfig::new(local.asn, peer.asn, local.router_id);
    config.hold_time = peer.hold.as_secs().min(u64::from(u16::MAX)) as u16;
    if peer.families.v4 {
        config.families.push((Afi::Ipv4, Safi::Unicast));
    }
    if peer.families.v6 {
        config.families.push((Afi::Ipv6, Safi::Unicast));
    }
    config.disable_ipv4_unicast = !peer.families.v4;
    config.graceful_restart = !local.restart_time.is_zero();
    config.gr_restart_time = local.restart_time.as_secs().min(RESTART_TIME_MAX) as u16;
    config
}

/// The FSM's OPEN, made true. It always says that nothing restarted and nothing was preserved, upon which a peer flushes what it holds;
/// and it offers what this speaker does not do: Extended Message, Enhanced Route Refresh, and graceful NOTIFICATIONs (RFC 8538).
pub(crate) fn truthful(mut open: OpenMessage, restarted: bool, preserved: bool) -> OpenMessage {
    open.capabilities.retain(|c| {
        !matches!(
            c,
            Capability::ExtendedMessage | Capability::EnhancedRouteRefresh
        )
    });
    for capability in &mut open.capabilities {
        if let Capability::GracefulRestart {
            restart_state,
            notification,
            families,
            ..
        } = capability
        {
            *restart_state = restarted;
            *notification = false;
            for family in families {
                family.forwarding_preserved = preserved;
            }
        }
    }
    open
}

/// What the negotiation makes of every UPDATE, and what it keeps from being said.
pub(crate) fn context(
    local: &Local,
    negotiated: &NegotiatedSession,
    ours: IpAddr,
    addresses: &[(String, IpAddr)],
) -> (Context, Option<String>) {
    let ours = ours.to_canonical();
    let carries = |afi| {
        negotiated
            .negotiated_families
            .contains(&(afi, Safi::Unicast))
    };
    let interface = addresses
        .iter()
        .find(|(_, a)| *a == ours)
        .map(|(name, _)| name.as_str());
    let beside = |accept: fn(&IpAddr) -> bool| {
        let mut same = addresses
            .iter()
            .filter(|(name, _)| Some(name.as_str()) == interface);
        same.find(|(_, a)| accept(a)).map(|&(_, a)| a)
    };
    let v6 = match (ours, beside(is_global_v6)) {
        (IpAddr::V6(a), Some(IpAddr::V6(global))) if a.is_unicast_link_local() => {
            Some(NextHop::V6(global, Some(a)))
        }
        // RFC 2545 has no form for a link without global addresses; speakers that take one at all take it twice.
        (IpAddr::V6(a), _) if a.is_unicast_link_local() => Some(NextHop::V6(a, Some(a))),
        (IpAddr::V6(a), _) => Some(NextHop::V6(a, None)),
        (IpAddr::V4(_), Some(IpAddr::V6(global))) => Some(NextHop::V6(global, None)),
        _ => None,
    };
    let extended = negotiated
        .extended_nexthop_families
        .get(&(Afi::Ipv4, Safi::Unicast))
        == Some(&Afi::Ipv6);
    let v4 = match (ours, beside(IpAddr::is_ipv4)) {
        (IpAddr::V4(a), _) | (_, Some(IpAddr::V4(a))) => Some(NextHop::V4(a)),
        // RFC 8950 §4: only to a peer that said it takes an IPv6 next hop for IPv4.
        _ if extended => v6,
        _ => None,
    };
    let context = Context {
        asn: local.asn,
        internal: negotiated.peer_asn == local.asn,
        four_octet_as: negotiated.four_octet_as,
        v4: carries(Afi::Ipv4).then_some(v4).flatten(),
        v6: carries(Afi::Ipv6).then_some(v6).flatten(),
    };
    let on = interface.unwrap_or("the session's interface");
    let withheld = if carries(Afi::Ipv4) && context.v4.is_none() {
        Some(format!(
            "IPv4 routes are withheld: {on} has no IPv4 address, and the peer takes no IPv6 next hop for them (RFC 8950)"
        ))
    } else if carries(Afi::Ipv6) && context.v6.is_none() {
        Some(format!(
            "IPv6 routes are withheld: {on} has no IPv6 address"
        ))
    } else {
        None
    };
    (context, withheld)
}

/// Families that are configured and that the peer does not speak.
pub(crate) fn missing_family(peer: &BgpPeer, negotiated: &NegotiatedSession) -> Option<String> {
    let lacks = |on: bool, afi| {
        on && !negotiated
            .negotiated_families
            .contains(&(afi, Safi::Unicast))
    };
    if lacks(peer.families.v4, Afi::Ipv4) {
        Some("the peer does not speak IPv4 unicast on this session".to_owned())
    } else if lacks(peer.families.v6, Afi::Ipv6) {
        Some("the peer does not speak IPv6 unicast on this session".to_owned())
    } else {
        None
    }
}

fn is_global_v6(address: &IpAddr) -> bool {
    matches!(address, IpAddr::V6(a) if !a.is_unicast_link_local() && *a != Ipv6Addr::LOCALHOST)
}

/// `Cease / Administrative Shutdown (6/2): maintenance`.
pub(crate) fn in_words(n: &NotificationMessage) -> String {
    let what = description(n.code, n.subcode);
    let numbers = format!("({}/{})", n.code.as_u8(), n.subcode);
    let code = n.code.to_string();
    let mut words = if what == code {
        format!("{code} {numbers}")
    } else {
        format!("{code} / {what} {numbers}")
    };
    if let Ok(Some(said)) = extract_shutdown_communication(n) {
        // RFC 9003 §4: shown to operators, so nothing that moves a terminal's cursor.
        let said: String = said.chars().filter(|c| !c.is_control()).collect();
        if !said.is_empty() {
            words.push_str(": ");
            words.push_str(&said);
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use rustbgpd_fsm::{Action, Event, Session};
    use rustbgpd_wire::NotificationCode;
    use rustbgpd_wire::notification::encode_shutdown_communication;

    fn local() -> Local {
        Local {
            asn: 4_200_000_001,
            router_id: Ipv4Addr::new(10, 0, 0, 1),
            restart_time: Duration::from_secs(120),
        }
    }

    fn peer() -> BgpPeer {
        BgpPeer {
            name: "tor".to_owned(),
            address: "192.0.2.1".parse().expect("an address"),
            interface: None,
            asn: 64512,
            port: 179,
            source: None,
            families: kun_config::Families { v4: true, v6: true },
            hold: Duration::from_secs(9),
            md5_file: None,
            gtsm: false,
        }
    }

    fn open() -> OpenMessage {
        let mut fsm = Session::new(fsm_config(&local(), &peer()));
        fsm.handle_event(Event::ManualStart);
        let actions = fsm.handle_event(Event::TcpConnectionConfirmed);
        actions
            .into_iter()
            .find_map(|a| match a {
                Action::SendOpen(open) => Some(open),
                _ => None,
            })
            .expect("an OPEN")
    }

    #[test]
    fn the_open_says_what_was_preserved() {
        for (restarted, preserved) in [(false, false), (true, true), (false, true)] {
            let open = truthful(open(), restarted, preserved);
            let found = open.capabilities.iter().find_map(|c| match c {
                Capability::GracefulRestart {
                    restart_state,
                    notification,
                    restart_time,
                    families,
                } => Some((
                    *restart_state,
                    *notification,
                    *restart_time,
                    families.clone(),
                )),
                _ => None,
            });
            let (restart, notification, time, families) =
                found.expect("graceful restart is offered");
            assert_eq!((restart, notification, time), (restarted, false, 120));
            assert_eq!(families.len(), 2);
            assert!(families.iter().all(|f| f.forwarding_preserved == preserved));
        }
    }

    #[test]
    fn the_open_offers_nothing_that_is_not_done() {
        let open = truthful(open(), false, false);
        assert!(!open.capabilities.contains(&Capability::ExtendedMessage));
        assert!(
            !open
                .capabilities
                .contains(&Capability::EnhancedRouteRefresh)
        );
        assert!(open.capabilities.contains(&Capability::RouteRefresh));
        assert!(
            open.capabilities
                .contains(&Capability::FourOctetAs { asn: 4_200_000_001 })
        );
        assert_eq!((open.hold_time, open.my_as), (9, 23456));
    }

    #[test]
    fn next_hops_are_the_sessions_own_addresses() {
        let ip = |s: &str| s.parse::<IpAddr>().expect("an address");
        let v4 = |s: &str| NextHop::V4(s.parse().expect("an address"));
        let v6 = |s: &str, l: Option<&str>| {
            NextHop::V6(
                s.parse().expect("an address"),
                l.map(|l| l.parse().expect("an address")),
            )
        };
        let all = vec![
            ("lo".to_owned(), ip("127.0.0.1")),
            ("other".to_owned(), ip("203.0.113.9")),
            ("up".to_owned(), ip("192.0.2.7")),
            ("up".to_owned(), ip("fe80::7")),
            ("up".to_owned(), ip("2001:db8::7")),
        ];
        let v4_only: Vec<_> = all.iter().filter(|(_, a)| a.is_ipv4()).cloned().collect();
        let v6_only: Vec<_> = all
            .iter()
            .filter(|(n, a)| n != "up" || a.is_ipv6())
            .cloned()
            .collect();
        let bare: Vec<_> = all
            .iter()
            .filter(|(_, a)| *a == ip("fe80::7"))
            .cloned()
            .collect();
        let mut plain = NegotiatedSession::default();
        plain.negotiated_families = vec![(Afi::Ipv4, Safi::Unicast), (Afi::Ipv6, Safi::Unicast)];
        let mut extended = plain.clone();
        extended
            .extended_nexthop_families
            .insert((Afi::Ipv4, Safi::Unicast), Afi::Ipv6);
        let table = [
            (
                &plain,
                "192.0.2.7",
                &all,
                Some(v4("192.0.2.7")),
                Some(v6("2001:db8::7", None)),
            ),
            (
                &plain,
                "2001:db8::7",
                &all,
                Some(v4("192.0.2.7")),
                Some(v6("2001:db8::7", None)),
            ),
            (
                &plain,
                "fe80::7",
                &all,
                Some(v4("192.0.2.7")),
                Some(v6("2001:db8::7", Some("fe80::7"))),
            ),
            (&plain, "192.0.2.7", &v4_only, Some(v4("192.0.2.7")), None),
            (
                &plain,
                "2001:db8::7",
                &v6_only,
                None,
                Some(v6("2001:db8::7", None)),
            ),
            (
                &extended,
                "2001:db8::7",
                &v6_only,
                Some(v6("2001:db8::7", None)),
                Some(v6("2001:db8::7", None)),
            ),
            (
                &extended,
                "2001:db8::7",
                &all,
                Some(v4("192.0.2.7")),
                Some(v6("2001:db8::7", None)),
            ),
            (
                &plain,
                "fe80::7",
                &bare,
                None,
                Some(v6("fe80::7", Some("fe80::7"))),
            ),
        ];
        for (negotiated, ours, addresses, want_v4, want_v6) in table {
            let (context, withheld) = context(&local(), negotiated, ip(ours), addresses);
            assert_eq!((context.v4, context.v6), (want_v4, want_v6), "{ours}");
            assert_eq!(
                withheld.is_some(),
                want_v4.is_none() || want_v6.is_none(),
                "{ours}: {withheld:?}"
            );
        }
    }

    #[test]
    fn notifications_read_as_words() {
        let n = |code, subcode, data| {
            in_words(&NotificationMessage::new(
                NotificationCode::from_u8(code),
                subcode,
                data,
            ))
        };
        assert_eq!(
            n(2, 2, Bytes::new()),
            "OPEN Message Error / Bad Peer AS (2/2)"
        );
        assert_eq!(n(4, 0, Bytes::new()), "Hold Timer Expired (4/0)");
        assert_eq!(
            n(6, 2, encode_shutdown_communication("rack 7\u{1b}[2J down")),
            "Cease / Administrative Shutdown (6/2): rack 7[2J down"
        );
        assert_eq!(
            n(6, 2, Bytes::from_static(&[9, b'x'])),
            "Cease / Administrative Shutdown (6/2)"
        );
    }
}
