//! IP/ICMP translation (RFC 7915) with the stateful parts of NAT64 (RFC 6146): the one core for the kernel and for userspace.
//!
//! Owns the whole decision and rewrite of one packet, generic over where the packet lies ([`Packet`]) and where state is kept
//! ([`Tables`]). Offsets count from the network header. Header words are `u32`s as they lie in memory: addresses are compared
//! and copied without swapping, and the Internet checksum does not mind the byte order (RFC 1071 §2).
//!
//! Refuses: protocols other than TCP, UDP and ICMP; ICMP in fragments; ICMP errors about anything but a whole TCP, UDP or echo
//! packet of ours; addresses that must not cross (RFC 6052 §3.1, RFC 6146 §3.5).

mod buffer;
pub mod four;
mod hairpin;
pub mod icmp;
pub mod six;
mod state;
pub mod sum;

pub use buffer::Buffer;

use crate::nat64::bib::{Bib4, Bib6, Fragment, FragmentKey, Session, SessionKey};
use crate::nat64::{Counter, Settings};
use crate::reason::Reason;

/// What is to be done with the packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Not for the translator, untouched.
    Pass,
    /// For the translator, untouched, but its hop limit ends here: the stack routes it and answers with Time Exceeded.
    ToStack,
    /// Rewritten: to be sent out of the uplink, in the family it has now.
    Send,
    /// To be dropped; it may be half rewritten.
    Drop(Reason),
}

/// An IP packet that can be rewritten. `false` and `None` mean that it does not reach so far, or that memory is short.
pub trait Packet {
    /// Octets from the network header to the end.
    fn len(&self) -> u32;
    /// Payload octets of each segment of a super-packet; 0: it is none.
    fn segment(&self) -> u32;
    /// Reads words.
    fn load<const N: usize>(&self, at: u32, into: &mut [u32; N]) -> bool;
    /// Writes words.
    fn store<const N: usize>(&mut self, at: u32, words: &[u32; N]) -> bool;
    /// Writes 16 bits as they lie in memory.
    fn store_half(&mut self, at: u32, half: u16) -> bool;
    /// Reads one octet.
    fn octet(&self, at: u32) -> Option<u8>;
    /// Turns the 40 octets at the front into 20 (`false`) or 20 into 40 (`true`); what is there then is arbitrary.
    fn change_family(&mut self, to_six: bool) -> bool;
    /// Inserts (or removes, when negative) octets behind the network header proper: at 20 in IPv4, at 40 in IPv6.
    fn make_room(&mut self, by: i32) -> bool;
    /// Cuts the tail.
    fn trim(&mut self, len: u32) -> bool;
    /// Adds `delta` ([`sum::delta`]) to what the transport checksum at `at` covers. `pseudo`: the change is in the
    /// pseudo-header (matters when the card completes the checksum). `udp`: 0 stays 0, and never becomes 0.
    fn fix_checksum(&mut self, at: u32, delta: u32, pseudo: bool, udp: bool) -> bool;
    /// One's complement sum over octets `at..at+len`. `None`: longer than is summed here (9216), or beyond the end.
    fn sum(&self, at: u32, len: u32) -> Option<u32>;
    /// Leaves the values as they are. In the kernel, the verifier thereby forgets what it knew about them, and the paths that
    /// led here become one.
    fn forget<const N: usize>(&mut self, values: &mut [u32; N]);
}

/// The state of exceptions and fragments, the clock and the counters.
pub trait Tables {
    /// Nanoseconds that never go back.
    fn now(&self) -> u64;
    /// Any number.
    fn random(&mut self) -> u32;
    /// Counts one.
    fn count(&mut self, counter: Counter);
    /// External port of an IPv6 transport address.
    fn bib6(&self, key: &Bib6) -> Option<Bib4>;
    /// IPv6 transport address of an external port.
    fn bib4(&self, key: &Bib4) -> Option<Bib6>;
    /// Adds; `false`: it exists, or the table is full.
    fn bib6_add(&mut self, key: &Bib6, value: &Bib4) -> bool;
    /// Adds; `false`: it exists, or the table is full.
    fn bib4_add(&mut self, key: &Bib4, value: &Bib6) -> bool;
    /// Removes.
    fn bib4_remove(&mut self, key: &Bib4);
    /// A session.
    fn session(&self, key: &SessionKey) -> Option<Session>;
    /// Adds or replaces; `false`: the table is full.
    fn session_put(&mut self, key: &SessionKey, value: &Session) -> bool;
    /// What the first fragment told.
    fn fragment(&self, key: &FragmentKey) -> Option<Fragment>;
    /// Adds or replaces.
    fn fragment_put(&mut self, key: &FragmentKey, value: &Fragment);
}

/// What the steps of a translation tell each other about a packet. The steps are programs of their own, and this lies in a
/// map, so that the kernel's verifier goes through each step once and not once for each way through the steps before it.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Work {
    /// The network header; IPv4 in the first five words.
    pub header: [u32; 10],
    /// The first words of the transport header: two, but four of TCP.
    pub l4: [u32; 4],
    /// Where the transport header begins; in [`seal`], where ICMP begins.
    pub at: u32,
    /// Octets from there.
    pub len: u32,
    /// Sum of the pseudo-header that the ICMP checksum covers.
    pub pseudo: u32,
    /// Protocol, in IPv4's numbers.
    pub proto: u32,
    /// ICMP type.
    pub kind: u32,
    /// 1: a fragment, or one that is whole but says so (RFC 6946).
    pub fragmented: u32,
    /// Bits of the fragment field: the IPv6 header's, or IPv4's flags and offset.
    pub fragment: u32,
    /// Identification, as it lies in memory in IPv6, as a number in IPv4.
    pub id: u32,
    /// IPv6 end.
    pub inner: [u32; 4],
    /// Its port or identifier.
    pub inner_port: u32,
    /// External address, as a number.
    pub external: u32,
    /// Its port or identifier.
    pub external_port: u32,
    /// The far end's port; 0 of ICMP.
    pub remote_port: u32,
}

/// What comes after a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Nothing.
    Done(Verdict),
    /// The next step.
    Next,
    /// The step that no block covers the flow for: [`six::map_exception`] or [`four::map_exception`].
    Exception,
    /// The steps for ICMP errors: [`icmp::verify`], then [`icmp::to_four`] or [`icmp::to_six`].
    Error,
    /// The packet does not fit: [`icmp::too_big`].
    TooBig,
    /// The ICMP checksum is still to be computed: [`icmp::seal`].
    Seal,
}

impl Step {
    /// A step's result as one.
    #[inline(always)]
    pub fn of(result: Result<Step, Reason>) -> Step {
        match result {
            Ok(step) => step,
            Err(reason) => Step::Done(Verdict::Drop(reason)),
        }
    }
}

/// Protocol numbers of IPv4, but for the two of IPv6 that differ.
pub(crate) mod number {
    pub(crate) const ICMP4: u32 = 1;
    pub(crate) const TCP: u32 = 6;
    pub(crate) const UDP: u32 = 17;
    pub(crate) const HOP_BY_HOP: u32 = 0;
    pub(crate) const ROUTING: u32 = 43;
    pub(crate) const FRAGMENT: u32 = 44;
    pub(crate) const ICMP6: u32 = 58;
    pub(crate) const DESTINATION: u32 = 60;
}

/// Length of an IPv6 header.
pub(crate) const SIX: u32 = 40;
/// Length of an IPv4 header without options.
pub(crate) const FOUR: u32 = 20;
/// Smallest MTU of IPv6 (RFC 8200 §5).
pub const MIN_MTU: u32 = 1280;

/// Translates an IPv6 packet that is under Pref64; [`Verdict::Pass`] for any other.
pub fn six_to_four<P: Packet, T: Tables>(p: &mut P, t: &mut T, s: &Settings) -> Verdict {
    let mut w = Work::default();
    let mut step = Step::of(six::parse(p, t, s, &mut w));
    if step == Step::Error {
        step = Step::of(icmp::verify(p, &w));
        if step == Step::Next {
            step = Step::of(icmp::to_four(p, t, s, &mut w));
        }
        if step == Step::Seal {
            step = Step::of(icmp::seal(p, &w));
        }
        return step.verdict();
    }
    if step == Step::Next {
        step = Step::of(six::map(s, &mut w));
    }
    if step == Step::Exception {
        step = Step::of(six::map_exception(t, s, &mut w));
    }
    if step == Step::Next {
        step = Step::of(six::write(p, t, s, &w));
    }
    step.verdict()
}

/// Translates an IPv4 packet to the pool; [`Verdict::Pass`] for any other.
pub fn four_to_six<P: Packet, T: Tables>(p: &mut P, t: &mut T, s: &Settings) -> Verdict {
    let mut w = Work::default();
    let mut step = Step::of(four::parse(p, t, s, &mut w));
    if step == Step::Error {
        step = Step::of(icmp::verify(p, &w));
        if step == Step::Next {
            step = Step::of(icmp::to_six(p, t, s, &mut w));
        }
        if step == Step::Seal {
            step = Step::of(icmp::seal(p, &w));
        }
        return step.verdict();
    }
    if step == Step::Next {
        step = Step::of(four::map(s, &mut w));
    }
    if step == Step::Exception {
        step = Step::of(four::map_exception(t, &mut w));
    }
    if step == Step::Next {
        step = Step::of(four::write(p, t, s, &w));
    }
    if step == Step::TooBig {
        step = Step::of(icmp::too_big(p, t, s, &mut w));
    }
    if step == Step::Seal {
        step = Step::of(icmp::seal(p, &w));
    }
    step.verdict()
}

impl Step {
    /// The verdict of the last step; a chain that ends early is a malformed packet's.
    fn verdict(self) -> Verdict {
        match self {
            Step::Done(v) => v,
            _ => Verdict::Drop(Reason::Malformed),
        }
    }
}

/// The packet reaches so far, or is malformed.
#[inline(always)]
pub(crate) fn need(ok: bool) -> Result<(), Reason> {
    if ok { Ok(()) } else { Err(Reason::Malformed) }
}

/// A pair of ports as one word in memory.
#[inline(always)]
pub(crate) const fn ports(source: u16, destination: u16) -> u32 {
    ((source as u32) << 16 | destination as u32).to_be()
}

/// Whether an IPv4 address (as a number) may be translated at all.
#[inline(always)]
pub(crate) fn may_cross(v4: u32, s: &Settings) -> bool {
    let first = v4 >> 24;
    let unicast = first != 0 && first != 127 && first < 224;
    unicast && (s.well_known == 0 || crate::nat64::is_global(v4))
}

/// IPv4 header without options; `tos` and the addresses as they are, the rest as numbers. The checksum is filled in.
#[inline(always)]
pub(crate) fn header4(
    tos: u32,
    total: u32,
    id_and_flags: u32,
    ttl: u32,
    proto: u32,
    src: u32,
    dst: u32,
) -> [u32; 5] {
    let mut h = [
        (0x4500_0000 | tos << 16 | total).to_be(),
        id_and_flags.to_be(),
        (ttl << 24 | proto << 16).to_be(),
        src,
        dst,
    ];
    // The checksum is the low half of the third word, as memory has it.
    let check = !sum::fold(sum::of(&h));
    h[2] |= (u32::from(u16::from_be(check))).to_be();
    h
}

/// IPv6 header; addresses as they are, the rest as numbers. Flow label 0.
#[inline(always)]
pub(crate) fn header6(
    class: u32,
    payload: u32,
    next: u32,
    hop: u32,
    src: [u32; 4],
    dst: [u32; 4],
) -> [u32; 10] {
    [
        (0x6000_0000 | class << 20).to_be(),
        (payload << 16 | next << 8 | hop).to_be(),
        src[0],
        src[1],
        src[2],
        src[3],
        dst[0],
        dst[1],
        dst[2],
        dst[3],
    ]
}

/// Pref64 ∥ IPv4 address as it lies in memory.
#[inline(always)]
pub(crate) fn under_pref64(s: &Settings, v4: u32) -> [u32; 4] {
    [s.pref64[0], s.pref64[1], s.pref64[2], v4]
}

/// Sum over the pseudo-header's part that ICMPv6 has and ICMPv4 has not: length and next header.
#[inline(always)]
pub(crate) fn pseudo_icmp6(len: u32) -> u32 {
    sum::add(len.to_be(), number::ICMP6.to_be())
}

const SYN: u32 = 0x02;
/// Kind and length of the MSS option.
const MSS: u32 = 0x0204;

/// Lowers the MSS of a SYN to what fits both sides (mtu − 60), if it is above. `word3` is the fourth word of the TCP header.
/// The option is looked for in the first place only, where every stack that is known puts it: a walk over all options
/// multiplies the paths that the verifier goes.
#[inline(always)]
pub(crate) fn clamp_mss<P: Packet>(p: &mut P, at: u32, word3: u32, mtu: u32) -> Result<(), Reason> {
    let w = u32::from_be(word3);
    if (w >> 16) & SYN == 0 || w >> 28 < 6 {
        return Ok(());
    }
    let mut option = [0u32; 1];
    need(p.load(at + 20, &mut option))?;
    let old = u32::from_be(option[0]);
    let limit = mtu.wrapping_sub(60);
    if old >> 16 == MSS && old & 0xffff > limit {
        let new = (MSS << 16 | limit).to_be();
        need(p.store(at + 20, &[new]))?;
        need(p.fix_checksum(at + 16, sum::delta(new, option[0]), false, false))?;
    }
    Ok(())
}
