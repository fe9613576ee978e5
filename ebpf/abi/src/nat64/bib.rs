//! Stateful exceptions: keys and values of the BIB and session tables, and the session states of RFC 6146 §3.5.
//!
//! Only flows that no port block covers come here: explicit local ports, ICMP identifiers, hosts outside the pod prefix.
//! All tables are bounded by the slice (at most 4096 ports a protocol) and by the maps' sizes; a full table refuses, it never
//! evicts. Time is CLOCK_BOOTTIME-like nanoseconds given by the caller.

/// An IPv6 transport address: key of `nat64_bib6`, value of `nat64_bib4`. Network order.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Bib6 {
    /// Address.
    pub addr: [u32; 4],
    /// Port or ICMP identifier, as a number.
    pub port: u16,
    /// [`proto`] of the table.
    pub proto: u8,
    /// Zero.
    pub pad: u8,
}

/// An external port of this gateway's slice: key of `nat64_bib4`, value of `nat64_bib6`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Bib4 {
    /// Port or ICMP identifier, as a number.
    pub port: u16,
    /// [`proto`] of the table.
    pub proto: u8,
    /// Zero.
    pub pad: u8,
}

/// Key of `nat64_sessions`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct SessionKey {
    /// The IPv4 host, network order.
    pub remote: u32,
    /// Its port, as a number; 0 for ICMP.
    pub remote_port: u16,
    /// External port or identifier, as a number.
    pub port: u16,
    /// [`proto`] of the table.
    pub proto: u32,
}

/// Value of `nat64_sessions`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Session {
    /// Nanoseconds until which it lives: those of the last packet that refreshed it, and its state's timeout.
    pub until: u64,
    /// [`State`] as a number.
    pub state: u32,
    /// Zero.
    pub pad: u32,
}

/// Key of `nat64_fragments`: the datagram that a fragment belongs to. IPv4 addresses stand in the last word, the rest zero.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct FragmentKey {
    /// Source, network order.
    pub src: [u32; 4],
    /// Destination, network order.
    pub dst: [u32; 4],
    /// Identification.
    pub id: u32,
    /// IP protocol of the family it came in.
    pub proto: u32,
}

/// Value of `nat64_fragments`: what the first fragment's ports said.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Fragment {
    /// IPv4 to IPv6: the new destination. IPv6 to IPv4: the new source in the last word.
    pub addr: [u32; 4],
    /// Nanoseconds at the first fragment.
    pub seen: u64,
}

/// The three BIBs.
pub mod proto {
    /// ICMP queries.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
}

/// Capacity of `nat64_bib6` and `nat64_bib4`: a slice's ports for three protocols.
pub const MAX_BIB: u32 = 3 << super::SLICE_BITS;
/// Capacity of `nat64_sessions`.
pub const MAX_SESSIONS: u32 = 65536;
/// Capacity of `nat64_fragments`.
pub const MAX_FRAGMENTS: u32 = 4096;
/// Ports tried for a new entry: at 80 % use of the slice one search in 1,200 fails.
pub const PORT_TRIES: u32 = 32;

const SECOND: u64 = 1_000_000_000;
/// UDP_DEFAULT (RFC 6146 §4).
pub const UDP_TIMEOUT: u64 = 300 * SECOND;
/// TCP_EST.
pub const TCP_ESTABLISHED_TIMEOUT: u64 = (2 * 3600 + 4 * 60) * SECOND;
/// TCP_TRANS.
pub const TCP_TRANSITORY_TIMEOUT: u64 = 240 * SECOND;
/// TCP_INCOMING_SYN.
pub const TCP_INCOMING_SYN_TIMEOUT: u64 = 6 * SECOND;
/// ICMP_DEFAULT.
pub const ICMP_TIMEOUT: u64 = 60 * SECOND;
/// FRAGMENT_MIN.
pub const FRAGMENT_TIMEOUT: u64 = 2 * SECOND;

/// States of a session. UDP and ICMP have one each; the others are RFC 6146 §3.5.2.2's for TCP (CLOSED = no entry).
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// A UDP session.
    Udp = 0,
    /// An ICMP query session.
    Icmp = 1,
    /// SYN seen from IPv4 only.
    V4Init = 2,
    /// SYN seen from IPv6 only.
    V6Init = 3,
    /// SYN seen from both.
    Established = 4,
    /// FIN from IPv4.
    V4Fin = 5,
    /// FIN from IPv6.
    V6Fin = 6,
    /// FIN from both.
    BothFin = 7,
    /// RST seen, or established and idle.
    Trans = 8,
}

/// Which side a packet came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// IPv6.
    Six,
    /// IPv4.
    Four,
}

/// TCP flags that the state machine looks at: the flags octet of the header.
pub mod tcp {
    /// FIN.
    pub const FIN: u8 = 0x01;
    /// SYN.
    pub const SYN: u8 = 0x02;
    /// RST.
    pub const RST: u8 = 0x04;
}

impl State {
    /// From a stored number; an unknown one is transitory.
    #[inline(always)]
    pub const fn from_stored(n: u32) -> State {
        match n {
            0 => State::Udp,
            1 => State::Icmp,
            2 => State::V4Init,
            3 => State::V6Init,
            4 => State::Established,
            5 => State::V4Fin,
            6 => State::V6Fin,
            7 => State::BothFin,
            _ => State::Trans,
        }
    }

    /// How long a session in this state lives without a packet, nanoseconds.
    #[inline(always)]
    pub const fn timeout(self) -> u64 {
        match self {
            State::Udp => UDP_TIMEOUT,
            State::Icmp => ICMP_TIMEOUT,
            State::V4Init => TCP_INCOMING_SYN_TIMEOUT,
            State::Established | State::V4Fin | State::V6Fin => TCP_ESTABLISHED_TIMEOUT,
            State::V6Init | State::BothFin | State::Trans => TCP_TRANSITORY_TIMEOUT,
        }
    }

    /// The state of a TCP session after its first packet; `None`: such a packet opens none. A packet in mid-stream from the
    /// IPv6 side opens a transitory one (RFC 6146 leaves it to the implementation: after a restart the flow goes on).
    #[inline(always)]
    pub const fn tcp_open(side: Side, flags: u8) -> Option<State> {
        match side {
            Side::Six if flags & tcp::RST != 0 => None,
            Side::Six if flags & tcp::SYN != 0 => Some(State::V6Init),
            Side::Six => Some(State::Trans),
            Side::Four if flags & tcp::SYN != 0 && flags & tcp::RST == 0 => Some(State::V4Init),
            Side::Four => None,
        }
    }

    /// The state of a TCP session after a further packet, and whether that packet refreshes its timer.
    #[inline(always)]
    pub const fn tcp_next(self, side: Side, flags: u8) -> (State, bool) {
        let (syn, fin, rst) = (
            flags & tcp::SYN != 0,
            flags & tcp::FIN != 0,
            flags & tcp::RST != 0,
        );
        match (self, side) {
            (State::V4Init, Side::Six) if syn => (State::Established, true),
            (State::V4Init, _) => (State::V4Init, false),
            (State::V6Init, Side::Four) if syn => (State::Established, true),
            (State::V6Init, Side::Six) if syn => (State::V6Init, true),
            (State::V6Init, _) => (State::V6Init, false),
            (State::Established, Side::Four) if fin => (State::V4Fin, true),
            (State::Established, Side::Six) if fin => (State::V6Fin, true),
            (State::Established, _) if rst => (State::Trans, true),
            (State::Established, _) => (State::Established, true),
            (State::V4Fin, Side::Six) if fin => (State::BothFin, true),
            (State::V4Fin, _) => (State::V4Fin, true),
            (State::V6Fin, Side::Four) if fin => (State::BothFin, true),
            (State::V6Fin, _) => (State::V6Fin, true),
            (State::BothFin, _) => (State::BothFin, false),
            (State::Trans, _) if rst => (State::Trans, false),
            (State::Trans, _) => (State::Established, true),
            (s, _) => (s, true),
        }
    }
}

impl Session {
    /// Whether it has outlived its state's timeout.
    #[inline(always)]
    pub const fn expired(&self, now: u64) -> bool {
        now > self.until
    }
}

const _: () = {
    assert!(size_of::<Bib6>() == 20);
    assert!(size_of::<Bib4>() == 4);
    assert!(size_of::<SessionKey>() == 12);
    assert!(size_of::<Session>() == 16);
    assert!(size_of::<FragmentKey>() == 40);
    assert!(size_of::<Fragment>() == 24);
};
