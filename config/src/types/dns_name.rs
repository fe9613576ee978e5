//! A DNS name in the one form that compares by bytes: uncompressed wire format, lower case (RFC 1035 §3.1, RFC 4343).

use std::fmt;

/// A name: at most 255 octets, labels of at most 63, ASCII letters in lower case.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DnsName(Box<[u8]>);

/// Why a text or an octet string is no name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// A label of no octets that is not the root.
    #[error("empty label")]
    EmptyLabel,
    /// A label above 63 octets.
    #[error("label longer than 63 octets")]
    LongLabel,
    /// More than 255 octets in all.
    #[error("name longer than 255 octets")]
    LongName,
    /// A backslash without one character or three digits up to 255 behind it.
    #[error("bad escape")]
    BadEscape,
    /// Octets that do not end with the root label, or a label type other than plain.
    #[error("not a name in wire format")]
    BadWire,
}

impl DnsName {
    /// The root.
    pub fn root() -> Self {
        Self(Box::new([0]))
    }

    /// From presentation format; the dot at the end may be missing. `\.` and `\123` are understood.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        if text == "." || text.is_empty() {
            return Ok(Self::root());
        }
        let mut wire = vec![0u8];
        let mut label_at = 0;
        let mut bytes = text.bytes().peekable();
        while let Some(b) = bytes.next() {
            let octet = match b {
                b'.' => {
                    if wire[label_at] == 0 {
                        return Err(NameError::EmptyLabel);
                    }
                    label_at = wire.len();
                    wire.push(0);
                    continue;
                }
                b'\\' => match bytes.next().ok_or(NameError::BadEscape)? {
                    d @ b'0'..=b'9' => {
                        let mut value = u16::from(d - b'0');
                        for _ in 0..2 {
                            let d = bytes
                                .next()
                                .filter(u8::is_ascii_digit)
                                .ok_or(NameError::BadEscape)?;
                            value = value * 10 + u16::from(d - b'0');
                        }
                        u8::try_from(value).map_err(|_| NameError::BadEscape)?
                    }
                    other => other,
                },
                other => other,
            };
            if wire[label_at] == 63 {
                return Err(NameError::LongLabel);
            }
            wire[label_at] += 1;
            wire.push(octet.to_ascii_lowercase());
        }
        if wire[label_at] != 0 {
            wire.push(0);
        }
        if wire.len() > 255 {
            return Err(NameError::LongName);
        }
        Ok(Self(wire.into()))
    }

    /// From uncompressed wire format, which must end exactly at the root label.
    pub fn from_wire(wire: &[u8]) -> Result<Self, NameError> {
        if wire.len() > 255 {
            return Err(NameError::LongName);
        }
        let mut at = 0;
        loop {
            match wire.get(at) {
                Some(0) if at + 1 == wire.len() => break,
                Some(&n @ 1..=63) => at += 1 + usize::from(n),
                _ => return Err(NameError::BadWire),
            }
        }
        Ok(Self(wire.to_ascii_lowercase().into()))
    }

    /// Wire format: length octets and labels, the root's zero at the end.
    pub fn wire(&self) -> &[u8] {
        &self.0
    }

    /// Labels from the left, without the root.
    pub fn labels(&self) -> impl Iterator<Item = &[u8]> {
        let mut rest = &self.0[..];
        std::iter::from_fn(move || {
            let (&n, tail) = rest.split_first()?;
            if n == 0 {
                return None;
            }
            let (label, tail) = tail.split_at(usize::from(n));
            rest = tail;
            Some(label)
        })
    }

    /// Number of labels without the root.
    pub fn label_count(&self) -> usize {
        self.labels().count()
    }

    /// Whether this name is `zone` or below it.
    pub fn is_within(&self, zone: &DnsName) -> bool {
        wire_is_within(&self.0, &zone.0)
    }

    /// `relative` (labels without a root octet) put in front; `None` above 255 octets.
    pub fn prepend(&self, relative: &[u8]) -> Option<Self> {
        let mut wire = Vec::with_capacity(relative.len() + self.0.len());
        wire.extend_from_slice(relative);
        wire.extend_from_slice(&self.0);
        Self::from_wire(&wire).ok()
    }
}

/// Whether the lower-case wire name `name` is `zone` or below it.
pub fn wire_is_within(name: &[u8], zone: &[u8]) -> bool {
    if !name.ends_with(zone) {
        return false;
    }
    // The tail must begin at a label: "ample.org" is no suffix of "example.org".
    let tail = name.len() - zone.len();
    let mut at = 0;
    while at < tail {
        at += 1 + usize::from(name[at]);
    }
    at == tail
}

impl fmt::Display for DnsName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.len() == 1 {
            return f.write_str(".");
        }
        for label in self.labels() {
            for &b in label {
                match b {
                    b'.' | b'\\' | b'"' | b';' | b'(' | b')' | b'@' | b'$' => {
                        write!(f, "\\{}", char::from(b))?
                    }
                    0x21..=0x7e => write!(f, "{}", char::from(b))?,
                    _ => write!(f, "\\{b:03}")?,
                }
            }
            f.write_str(".")?;
        }
        Ok(())
    }
}

impl fmt::Debug for DnsName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DnsName({self})")
    }
}

impl std::str::FromStr for DnsName {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        Self::parse(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_wire_agree() {
        let n = DnsName::parse("WWW.Example.org").unwrap();
        assert_eq!(n.wire(), b"\x03www\x07example\x03org\0");
        assert_eq!(n.to_string(), "www.example.org.");
        assert_eq!(
            DnsName::from_wire(b"\x03WWW\x07example\x03org\0").unwrap(),
            n
        );
        assert_eq!(
            DnsName::parse(r"a\.b.c\032d.").unwrap().to_string(),
            r"a\.b.c\032d."
        );
        assert_eq!(DnsName::parse(".").unwrap().to_string(), ".");
    }

    #[test]
    fn refuses_what_is_no_name() {
        assert_eq!(DnsName::parse("a..b"), Err(NameError::EmptyLabel));
        assert_eq!(DnsName::parse(&"a".repeat(64)), Err(NameError::LongLabel));
        assert_eq!(
            DnsName::parse(&"abcdefg.".repeat(32)),
            Err(NameError::LongName)
        );
        assert_eq!(DnsName::parse(r"a\30"), Err(NameError::BadEscape));
        assert_eq!(DnsName::from_wire(b"\xc0\x0c"), Err(NameError::BadWire));
        assert_eq!(DnsName::from_wire(b"\x01a"), Err(NameError::BadWire));
    }

    #[test]
    fn within_compares_labels_not_characters() {
        let zone = DnsName::parse("ample.org").unwrap();
        assert!(!DnsName::parse("example.org").unwrap().is_within(&zone));
        assert!(DnsName::parse("x.ample.org").unwrap().is_within(&zone));
        assert!(zone.is_within(&DnsName::root()));
        assert!(!DnsName::root().is_within(&zone));
    }
}
