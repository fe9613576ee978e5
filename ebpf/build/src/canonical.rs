//! Makes an object's bytes independent of where it was compiled.
//!
//! The only trace of a place that is left are the mangled names of functions inside the object: they hold a hash of the path
//! that cargo found the crate at. Nothing refers to those names (calls are relocated by symbol, programs are found by their
//! unmangled names), so they become `local.N`. ELF64, little-endian, one string table for sections and symbols, as LLVM
//! writes it; anything else is returned as it is.

use std::collections::HashMap;

const SYMTAB: u32 = 2;
const SECTION_HEADER: usize = 64;
const SYMBOL: usize = 24;

/// The object with local names in place of mangled ones.
pub(crate) fn canonical(object: Vec<u8>) -> Vec<u8> {
    rewritten(&object).unwrap_or(object)
}

/// `None`: not what we expect, or nothing to do.
fn rewritten(object: &[u8]) -> Option<Vec<u8>> {
    let number = |at: usize, octets: usize| -> Option<usize> {
        let mut word = [0u8; 8];
        word[..octets].copy_from_slice(object.get(at..at.checked_add(octets)?)?);
        usize::try_from(u64::from_le_bytes(word)).ok()
    };
    if object.get(..6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let (headers, count, names) = (number(0x28, 8)?, number(0x3c, 2)?, number(0x3e, 2)?);
    let header = |section: usize| headers + section * SECTION_HEADER;
    let (table, size) = (
        number(header(names) + 24, 8)?,
        number(header(names) + 32, 8)?,
    );
    let name_at = |offset: usize| -> Option<&[u8]> {
        let name = object.get(table..table.checked_add(size)?)?.get(offset..)?;
        name.split(|b| *b == 0).next()
    };

    // Where each name is referred to, and what it becomes.
    let mut references = Vec::new();
    for section in 0..count {
        references.push((
            header(section),
            name_at(number(header(section), 4)?)?.to_vec(),
        ));
        if number(header(section) + 4, 4)? != SYMTAB as usize {
            continue;
        }
        if number(header(section) + 40, 4)? != names {
            return None;
        }
        let (start, length) = (
            number(header(section) + 24, 8)?,
            number(header(section) + 32, 8)?,
        );
        for (index, symbol) in (start..start.checked_add(length)?)
            .step_by(SYMBOL)
            .enumerate()
        {
            let name = name_at(number(symbol, 4)?)?;
            let mangled = name.starts_with(b"_R") || name.starts_with(b"_ZN");
            let name = if mangled {
                format!("local.{index}").into_bytes()
            } else {
                name.to_vec()
            };
            references.push((symbol, name));
        }
    }
    // Longest first: a name that another one ends with is found in that one, as LLVM does it.
    let mut unique: Vec<&[u8]> = references.iter().map(|(_, name)| &name[..]).collect();
    unique.sort_by(|a, b| b.len().cmp(&a.len()).then(a.cmp(b)));
    unique.dedup();
    let mut strings = vec![0u8];
    let mut offsets = HashMap::new();
    for name in unique {
        let ended: Vec<u8> = name.iter().copied().chain([0]).collect();
        let offset = match strings.windows(ended.len()).position(|w| w == ended) {
            Some(offset) => offset,
            None => {
                strings.extend(&ended);
                strings.len() - ended.len()
            }
        };
        offsets.insert(name, u32::try_from(offset).ok()?);
    }
    let mut out = object.to_vec();
    for (at, name) in &references {
        out.get_mut(*at..at + 4)?
            .copy_from_slice(&offsets[&name[..]].to_le_bytes());
    }
    // The table keeps its place and size: it must not have grown, and it has not, mangled names being long.
    if strings.len() > size {
        return None;
    }
    strings.resize(size, 0);
    out.get_mut(table..table + size)?.copy_from_slice(&strings);
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_object_is_left_alone() {
        for odd in [&b""[..], b"\x7fELF\x02\x01", &[0x7f; 200]] {
            assert_eq!(canonical(odd.to_vec()), odd);
        }
    }

    #[test]
    fn a_committed_object_is_canonical_and_names_no_place() {
        for name in ["service.o", "nat64.o"] {
            let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("../loader/prebuilt")
                .join(name);
            let object = std::fs::read(&path).expect("a committed object");
            assert!(
                rewritten(&object).is_some(),
                "{name} is an object that we understand"
            );
            assert_eq!(canonical(object.clone()), object);
            let holds = |what: &[u8]| object.windows(what.len()).any(|w| w == what);
            assert!(
                !holds(b"_RNv") && !holds(b"_ZN"),
                "{name} has mangled names"
            );
            assert!(holds(b"license"), "{name} keeps its section names");
        }
    }
}
