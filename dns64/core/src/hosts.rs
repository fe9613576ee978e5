//! The `hosts` plugin's table: hosts(5) text and inline entries.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use kun_config::corefile::Hosts as Spec;
use kun_config::types::{DnsName, wire_is_within};

use crate::wire::reverse_address;

/// Entries read from one file: far above any hosts file kept by hand, and a bound on memory.
const MAX_ENTRIES: usize = 1_000_000;

/// Names and addresses.
#[derive(Debug, Default, Clone)]
pub struct Hosts {
    v4: HashMap<DnsName, Vec<Ipv4Addr>>,
    v6: HashMap<DnsName, Vec<Ipv6Addr>>,
    reverse: HashMap<IpAddr, Vec<DnsName>>,
}

/// What the table knows about a name.
#[derive(Debug, PartialEq, Eq)]
pub enum Entry<'a> {
    /// Addresses; one list may be empty.
    Addresses(&'a [Ipv4Addr], &'a [Ipv6Addr]),
    /// Names of a reverse name.
    Names(&'a [DnsName]),
}

impl Hosts {
    /// Reads hosts(5) `text` and the inline entries of `spec`; lines that are none are left out, as every reader of that file does.
    pub fn new(text: &str, spec: &Spec) -> Self {
        let mut table = Self::default();
        for (address, names) in &spec.inline {
            for name in names {
                table.add(*address, name.clone(), spec);
            }
        }
        let mut entries = 0;
        for line in text.lines() {
            let mut words = line
                .split('#')
                .next()
                .unwrap_or_default()
                .split_whitespace();
            // An IPv6 zone (`fe80::1%lo0`) has no place in a record.
            let Some(address) = words.next().and_then(|w| w.parse().ok()) else {
                continue;
            };
            for name in words.filter_map(|w| DnsName::parse(w).ok()) {
                entries += 1;
                if entries > MAX_ENTRIES {
                    return table;
                }
                table.add(address, name, spec);
            }
        }
        table
    }

    fn add(&mut self, address: IpAddr, name: DnsName, spec: &Spec) {
        if !spec.no_reverse {
            let names = self.reverse.entry(address).or_default();
            if !names.contains(&name) {
                names.push(name.clone());
            }
        }
        if !spec.zones.iter().any(|z| name.is_within(z)) {
            return;
        }
        match address {
            IpAddr::V4(a) => push(self.v4.entry(name).or_default(), a),
            IpAddr::V6(a) => push(self.v6.entry(name).or_default(), a),
        }
    }

    /// What is known about `name` (lower-case wire form) within the zones of `spec`.
    pub fn get(&self, name: &[u8], spec: &Spec) -> Option<Entry<'_>> {
        if !spec.zones.iter().any(|z| wire_is_within(name, z.wire())) {
            return None;
        }
        if let Some(address) = reverse_address(name) {
            return self.reverse.get(&address).map(|n| Entry::Names(n));
        }
        let key = DnsName::from_wire(name).ok()?;
        let (v4, v6) = (self.v4.get(&key), self.v6.get(&key));
        if v4.is_none() && v6.is_none() {
            return None;
        }
        Some(Entry::Addresses(
            v4.map_or(&[], |v| v),
            v6.map_or(&[], |v| v),
        ))
    }
}

fn push<T: PartialEq>(list: &mut Vec<T>, item: T) {
    if !list.contains(&item) {
        list.push(item);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kun_config::corefile::{Alone, Plugin, parse};

    #[test]
    fn table() {
        let c = parse(
            "t",
            "example.org 2.0.192.in-addr.arpa {\nhosts /x {\n192.0.2.9 inline.example.org\n}\n}",
            &Alone,
        )
        .unwrap();
        let Plugin::Hosts(spec) = &c.servers[0].plugins[0] else {
            panic!()
        };
        let text = "192.0.2.1 A.example.org b.example.org # c.example.org\n2001:db8::1 a.example.org\nnonsense\n192.0.2.2 other.net\n";
        let t = Hosts::new(text, spec);
        let get = |n: &str| t.get(DnsName::parse(n).unwrap().wire(), spec);
        let (v4, v6): (Ipv4Addr, Ipv6Addr) =
            ("192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap());
        assert_eq!(get("a.example.org"), Some(Entry::Addresses(&[v4], &[v6])));
        assert_eq!(get("b.example.org"), Some(Entry::Addresses(&[v4], &[])));
        assert_eq!(get("c.example.org"), None, "behind a comment");
        assert_eq!(get("other.net"), None, "outside the zones");
        assert!(get("inline.example.org").is_some());
        let names = [
            DnsName::parse("a.example.org").unwrap(),
            DnsName::parse("b.example.org").unwrap(),
        ];
        assert_eq!(get("1.2.0.192.in-addr.arpa"), Some(Entry::Names(&names)));
    }
}
