//! From addresses that are asked for to slots: an IPv4 address is a slot, an IPv6 address ends in one, so that a request for both
//! must be for the two of one slot.

use std::net::{IpAddr, Ipv6Addr};

use kun_config::types::{PodPrefix, Slot, SlotClass};

use crate::spec::{AddressRange, ConfigError, Wishes};

/// Which slots would do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// Any of the class.
    Any,
    /// This one.
    Slot(Slot),
    /// One out of these, first and last included.
    Within(Vec<(Slot, Slot)>),
}

/// The class that is asked for, `None` for the default one, and the slots.
pub fn wanted(
    wishes: &Wishes,
    prefix: PodPrefix,
) -> Result<(Option<SlotClass>, Wanted), ConfigError> {
    let class = wishes.ipv4.map(|v4| match v4 {
        true => SlotClass::Dual,
        false => SlotClass::V6Only,
    });
    if !wishes.ips.is_empty() {
        let slot = slot(&wishes.ips, prefix)?;
        return match class {
            Some(class) if class != slot.class() => Err(wrong(
                "ips",
                &shown(&wishes.ips),
                match class {
                    SlotClass::Dual => {
                        "the pod asks for IPv4: its addresses end in an IPv4 address of the pool"
                    }
                    SlotClass::V6Only => {
                        "the pod asks for no IPv4: its address ends in one of 240.0.0.0/4"
                    }
                },
            )),
            Some(_) | None => Ok((Some(slot.class()), Wanted::Slot(slot))),
        };
    }
    let mut found: Option<Vec<(Slot, Slot)>> = None;
    let mut dual = false;
    for set in &wishes.ranges {
        dual |= set.iter().any(|range| range.first.is_ipv4());
        let ranges: Vec<_> = set
            .iter()
            .filter_map(|range| slots(range, prefix))
            .collect();
        if ranges.is_empty() {
            return Err(wrong(
                "ipRanges",
                &shown(&set.iter().map(|r| r.first).collect::<Vec<_>>()),
                "IPv6 ranges lie under ipam.podPrefix",
            ));
        }
        found = Some(match found {
            None => ranges,
            Some(before) => both(&before, &ranges),
        });
    }
    let Some(ranges) = found else {
        return Ok((class, Wanted::Any));
    };
    if ranges.is_empty() {
        return Err(wrong(
            "ipRanges",
            "the sets",
            "an IPv6 address ends in its IPv4 address: the sets must have slots in common",
        ));
    }
    if dual && class == Some(SlotClass::V6Only) {
        return Err(wrong(
            "ipRanges",
            "a set of IPv4",
            "the pod asks for no IPv4",
        ));
    }
    let class = if dual { Some(SlotClass::Dual) } else { class };
    Ok((class, Wanted::Within(ranges)))
}

/// The one slot of these addresses.
fn slot(ips: &[IpAddr], prefix: PodPrefix) -> Result<Slot, ConfigError> {
    let mut found: Option<Slot> = None;
    for ip in ips {
        let slot = match ip {
            IpAddr::V4(v4) => match Slot::from(*v4) {
                slot if slot.class() == SlotClass::Dual => slot,
                _ => {
                    return Err(wrong(
                        "ips",
                        &ip.to_string(),
                        "240.0.0.0/4 numbers pods without IPv4: ask for the IPv6 address",
                    ));
                }
            },
            IpAddr::V6(v6) => prefix.slot(*v6).ok_or_else(|| {
                wrong(
                    "ips",
                    &ip.to_string(),
                    "an IPv6 address lies under ipam.podPrefix",
                )
            })?,
        };
        match found {
            Some(other) if other != slot => {
                return Err(wrong(
                    "ips",
                    &shown(ips),
                    "a pod's IPv6 address ends in its IPv4 address",
                ));
            }
            Some(_) | None => found = Some(slot),
        }
    }
    found.ok_or_else(|| wrong("ips", "nothing", "it is an address"))
}

/// The slots of a range, as far as it has any.
fn slots(range: &AddressRange, prefix: PodPrefix) -> Option<(Slot, Slot)> {
    match (range.first, range.last) {
        (IpAddr::V4(first), IpAddr::V4(last)) => Some((first.into(), last.into())),
        (IpAddr::V6(first), IpAddr::V6(last)) => {
            let begin = u128::from(prefix.net().addr());
            let (first, last) = (u128::from(first), u128::from(last));
            let end = begin | u128::from(u32::MAX);
            let cut = |address: u128| prefix.slot(Ipv6Addr::from(address));
            (first <= end && last >= begin)
                .then(|| Some((cut(first.max(begin))?, cut(last.min(end))?)))?
        }
        _ => None,
    }
}

/// What is in a range of each.
fn both(one: &[(Slot, Slot)], other: &[(Slot, Slot)]) -> Vec<(Slot, Slot)> {
    one.iter()
        .flat_map(|a| other.iter().map(move |b| (a.0.max(b.0), a.1.min(b.1))))
        .filter(|(first, last)| first <= last)
        .collect()
}

fn shown(ips: &[IpAddr]) -> String {
    let all: Vec<String> = ips.iter().map(ToString::to_string).collect();
    all.join(", ")
}

fn wrong(field: &str, what: &str, right: &'static str) -> ConfigError {
    ConfigError::Field {
        field: field.to_owned(),
        wrong: format!("{what} cannot be had"),
        right,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefix() -> PodPrefix {
        PodPrefix::new("fd00:64::/96".parse().unwrap()).unwrap()
    }

    fn of(ips: &[&str], ipv4: Option<bool>) -> Result<(Option<SlotClass>, Wanted), String> {
        let wishes = Wishes {
            ipv4,
            ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
            ..Wishes::default()
        };
        wanted(&wishes, prefix()).map_err(|e| e.to_string())
    }

    fn within(sets: &[&[(&str, &str)]]) -> Result<(Option<SlotClass>, Wanted), String> {
        let wishes = Wishes {
            ranges: sets
                .iter()
                .map(|set| {
                    set.iter()
                        .map(|(first, last)| AddressRange {
                            first: first.parse().unwrap(),
                            last: last.parse().unwrap(),
                        })
                        .collect()
                })
                .collect(),
            ..Wishes::default()
        };
        wanted(&wishes, prefix()).map_err(|e| e.to_string())
    }

    #[test]
    fn addresses_are_one_slot_or_refused() {
        let dual = Ok((Some(SlotClass::Dual), Wanted::Slot(Slot(0x0a40_0009))));
        assert_eq!(of(&["10.64.0.9"], None), dual);
        assert_eq!(of(&["fd00:64::a40:9"], None), dual);
        assert_eq!(of(&["fd00:64::a40:9", "10.64.0.9"], Some(true)), dual);
        assert_eq!(
            of(&["fd00:64::f000:1"], Some(false)),
            Ok((Some(SlotClass::V6Only), Wanted::Slot(Slot(0xf000_0001))))
        );
        assert_eq!(of(&[], None), Ok((None, Wanted::Any)));
        for (ips, ipv4, right) in [
            (
                &["10.64.0.9", "fd00:64::a40:8"][..],
                None,
                "ends in its IPv4 address",
            ),
            (&["fd00:65::1"], None, "lies under ipam.podPrefix"),
            (&["240.0.0.1"], None, "ask for the IPv6 address"),
            (&["10.64.0.9"], Some(false), "the pod asks for no IPv4"),
            (&["fd00:64::f000:1"], Some(true), "the pod asks for IPv4"),
        ] {
            let error = of(ips, ipv4).unwrap_err();
            assert!(error.contains(right), "{error}");
        }
    }

    #[test]
    fn ranges_are_cut_to_what_both_families_allow() {
        assert_eq!(
            within(&[&[("10.64.0.8", "10.64.0.15")]]),
            Ok((
                Some(SlotClass::Dual),
                Wanted::Within(vec![(Slot(0x0a40_0008), Slot(0x0a40_000f))])
            ))
        );
        assert_eq!(
            within(&[
                &[("10.64.0.8", "10.64.0.15")],
                &[("fd00:64::a40:c", "fd00:64::a40:ff")]
            ]),
            Ok((
                Some(SlotClass::Dual),
                Wanted::Within(vec![(Slot(0x0a40_000c), Slot(0x0a40_000f))])
            ))
        );
        // A wider IPv6 range is cut to the prefix.
        assert_eq!(
            within(&[&[("fd00::", "fd00:ff::")]]),
            Ok((None, Wanted::Within(vec![(Slot(0), Slot(u32::MAX))])))
        );
        let error = within(&[&[("fd01::", "fd01::1")]]).unwrap_err();
        assert!(error.contains("under ipam.podPrefix"), "{error}");
        let error = within(&[
            &[("10.64.0.8", "10.64.0.15")],
            &[("fd00:64::1", "fd00:64::2")],
        ]);
        assert!(error.unwrap_err().contains("slots in common"));
    }
}
