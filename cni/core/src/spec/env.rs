//! The environment (CNI §2 Parameters): which verb, and for which attachment.

use std::collections::BTreeMap;
use std::path::PathBuf;

/// IFNAMSIZ without its closing zero.
pub(crate) const MAX_IFNAME: usize = 15;

/// Longest container id and network name of an attachment that is made: both stand in the tag of its interfaces (`crate::tag`), which
/// the kernel keeps in 255 bytes. By its tag an interface is known as kun's, put right, reclaimed, and the store rebuilt; one that
/// is cut off tells nobody whose it is. Runtimes' ids have 64. What was made under a longer one can still be removed.
pub(crate) const MAX_IDENTIFIER: usize = 96;

/// What the runtime asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Invocation {
    /// ADD, with the namespace.
    Add(Attachment, PathBuf),
    /// DEL; the namespace may be gone.
    Del(Attachment, Option<PathBuf>),
    /// CHECK, with the namespace.
    Check(Attachment, PathBuf),
    /// STATUS
    Status,
    /// GC
    Gc,
    /// VERSION
    Version,
}

/// Which attachment, and what came with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// CNI_CONTAINERID
    pub container_id: String,
    /// CNI_IFNAME
    pub ifname: String,
    /// CNI_ARGS
    pub args: BTreeMap<String, String>,
}

/// What is wrong with the environment. Code 4 (CNI §5), whichever it is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EnvError {
    /// Variables that the verb requires are not set, or empty. All of them are named.
    #[error("required for {verb} and not set: {}", names.join(", "))]
    Missing {
        /// The verb.
        verb: &'static str,
        /// The variables.
        names: Vec<&'static str>,
    },
    /// Started by a person.
    #[error(
        "CNI_COMMAND is not set; a container runtime sets it to ADD, DEL, CHECK, GC, STATUS or VERSION"
    )]
    NoCommand,
    /// Not a verb.
    #[error("CNI_COMMAND `{0}` is unknown; it is ADD, DEL, CHECK, GC, STATUS or VERSION")]
    UnknownCommand(String),
    /// A container id that the specification forbids.
    #[error(
        "CNI_CONTAINERID `{0}` is invalid; it begins with a letter or digit, then letters, digits, `_`, `.` and `-`"
    )]
    ContainerId(String),
    /// A container id that no interface's tag has room for.
    #[error(
        "CNI_CONTAINERID has {0} bytes; it has at most {MAX_IDENTIFIER}: it stands in the aliases of the container's interfaces, beside the network's name"
    )]
    LongContainerId(usize),
    /// An interface name that the kernel forbids.
    #[error(
        "CNI_IFNAME `{0}` is invalid; an interface name has 1 to 15 bytes, is not `.` or `..`, and has no `/`, `:` or space"
    )]
    Ifname(String),
    /// A pair without `=`.
    #[error("CNI_ARGS: `{0}` is not KEY=VALUE; pairs are separated by `;`")]
    Args(String),
}

/// Reads the environment; `get` gives a variable, `None` where unset.
pub fn parse<'a>(get: impl Fn(&'static str) -> Option<&'a str>) -> Result<Invocation, EnvError> {
    let set = |name| get(name).filter(|value| !value.is_empty());
    let command = set("CNI_COMMAND").ok_or(EnvError::NoCommand)?;
    // GC alone requires CNI_PATH (§2); Go's skeleton asks it of ADD, CHECK and STATUS too, the specification does not.
    let (verb, required): (_, &[&'static str]) = match command {
        "ADD" => ("ADD", &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]),
        "CHECK" => ("CHECK", &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]),
        "DEL" => ("DEL", &["CNI_CONTAINERID", "CNI_IFNAME"]),
        "GC" => ("GC", &["CNI_PATH"]),
        "STATUS" => ("STATUS", &[]),
        "VERSION" => ("VERSION", &[]),
        other => return Err(EnvError::UnknownCommand(other.to_owned())),
    };
    let names: Vec<_> = required
        .iter()
        .copied()
        .filter(|name| set(name).is_none())
        .collect();
    if !names.is_empty() {
        return Err(EnvError::Missing { verb, names });
    }
    let attachment = || {
        let args = args(set("CNI_ARGS").unwrap_or_default());
        let container_id = container_id(set("CNI_CONTAINERID").unwrap_or_default())?;
        if verb == "ADD" && container_id.len() > MAX_IDENTIFIER {
            return Err(EnvError::LongContainerId(container_id.len()));
        }
        Ok(Attachment {
            container_id,
            ifname: ifname(set("CNI_IFNAME").unwrap_or_default())?,
            args: match verb {
                // It must work, and no argument changes what it does.
                "DEL" => args.unwrap_or_default(),
                _ => args?,
            },
        })
    };
    let netns = set("CNI_NETNS").map(PathBuf::from);
    Ok(match verb {
        "VERSION" => Invocation::Version,
        "STATUS" => Invocation::Status,
        "GC" => Invocation::Gc,
        "DEL" => Invocation::Del(attachment()?, netns),
        "CHECK" => Invocation::Check(attachment()?, netns.unwrap_or_default()),
        _ => Invocation::Add(attachment()?, netns.unwrap_or_default()),
    })
}

/// Container ids and network names share their rule (§2, §1).
pub(super) fn is_identifier(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'))
}

fn container_id(text: &str) -> Result<String, EnvError> {
    is_identifier(text)
        .then(|| text.to_owned())
        .ok_or_else(|| EnvError::ContainerId(text.to_owned()))
}

pub(super) fn is_ifname(text: &str) -> bool {
    (1..=MAX_IFNAME).contains(&text.len())
        && text != "."
        && text != ".."
        && !text.contains(|c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control())
}

fn ifname(text: &str) -> Result<String, EnvError> {
    is_ifname(text)
        .then(|| text.to_owned())
        .ok_or_else(|| EnvError::Ifname(text.to_owned()))
}

fn args(text: &str) -> Result<BTreeMap<String, String>, EnvError> {
    text.split(';')
        .filter(|pair| !pair.is_empty())
        .map(|pair| {
            pair.split_once('=')
                .filter(|(key, _)| !key.is_empty())
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .ok_or_else(|| EnvError::Args(pair.to_owned()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(vars: &[(&'static str, &'static str)]) -> Result<Invocation, EnvError> {
        let vars: BTreeMap<_, _> = vars.iter().copied().collect();
        parse(|name| vars.get(name).copied())
    }

    const ALL: [(&str, &str); 5] = [
        ("CNI_CONTAINERID", "c1"),
        ("CNI_NETNS", "/run/netns/x"),
        ("CNI_IFNAME", "eth0"),
        ("CNI_PATH", "/opt/cni/bin"),
        ("CNI_ARGS", "K8S_POD_NAME=a;IgnoreUnknown=1"),
    ];

    fn command_without(command: &'static str, left_out: &[&str]) -> Result<Invocation, EnvError> {
        let mut vars: Vec<_> = ALL
            .iter()
            .copied()
            .filter(|(name, _)| !left_out.contains(name))
            .collect();
        vars.push(("CNI_COMMAND", command));
        with(&vars)
    }

    #[test]
    fn every_verb_names_every_variable_it_misses() {
        let table: [(&str, &[&str]); 6] = [
            ("ADD", &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]),
            ("CHECK", &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]),
            ("DEL", &["CNI_CONTAINERID", "CNI_IFNAME"]),
            ("GC", &["CNI_PATH"]),
            ("STATUS", &[]),
            ("VERSION", &[]),
        ];
        let every: Vec<&str> = ALL.iter().map(|(name, _)| *name).collect();
        for (command, required) in table {
            assert!(command_without(command, &[]).is_ok(), "{command}");
            match command_without(command, &every) {
                Err(EnvError::Missing { verb, names }) => {
                    assert_eq!((verb, names.as_slice()), (command, required));
                }
                Ok(_) => assert!(required.is_empty(), "{command}"),
                Err(other) => panic!("{command}: {other}"),
            }
        }
    }

    #[test]
    fn an_empty_variable_is_a_missing_one() {
        assert_eq!(
            with(&[
                ("CNI_COMMAND", "DEL"),
                ("CNI_CONTAINERID", ""),
                ("CNI_IFNAME", "eth0")
            ]),
            Err(EnvError::Missing {
                verb: "DEL",
                names: vec!["CNI_CONTAINERID"]
            })
        );
        assert_eq!(with(&[("CNI_COMMAND", "")]), Err(EnvError::NoCommand));
        assert_eq!(
            with(&[("CNI_COMMAND", "add")]),
            Err(EnvError::UnknownCommand("add".into()))
        );
    }

    #[test]
    fn del_lives_without_a_namespace() {
        match command_without("DEL", &["CNI_NETNS"]).unwrap() {
            Invocation::Del(a, None) => assert_eq!(a.container_id, "c1"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn names_are_judged_as_the_specification_and_the_kernel_do() {
        for good in ["a", "0", "c-1_2.3", "A"] {
            assert!(is_identifier(good), "{good}");
        }
        for bad in ["", "-a", ".a", "_a", "a b", "a/b", "ä", "a:b"] {
            assert!(!is_identifier(bad), "{bad}");
        }
        for good in ["eth0", "e", "a-b_c.d", "abcdefghijklmno"] {
            assert!(is_ifname(good), "{good}");
        }
        for bad in [
            "",
            ".",
            "..",
            "a/b",
            "a:b",
            "a b",
            "a\tb",
            "abcdefghijklmnop",
        ] {
            assert!(!is_ifname(bad), "{bad}");
        }
    }

    #[test]
    fn del_does_not_fail_for_its_arguments() {
        let vars = |command| {
            [
                ("CNI_COMMAND", command),
                ("CNI_CONTAINERID", "c"),
                ("CNI_IFNAME", "eth0"),
                ("CNI_NETNS", "/run/netns/x"),
                ("CNI_ARGS", "A"),
            ]
        };
        assert!(with(&vars("DEL")).is_ok());
        assert_eq!(with(&vars("ADD")), Err(EnvError::Args("A".into())));
    }

    #[test]
    fn a_container_id_that_no_tag_has_room_for_is_refused_where_one_is_made() {
        let id = |length: usize| -> &'static str { Box::leak("c".repeat(length).into_boxed_str()) };
        let with_id = |verb, id| {
            with(&[
                ("CNI_COMMAND", verb),
                ("CNI_CONTAINERID", id),
                ("CNI_IFNAME", "eth0"),
                ("CNI_NETNS", "/run/netns/x"),
            ])
        };
        assert!(with_id("ADD", id(MAX_IDENTIFIER)).is_ok());
        let long = id(MAX_IDENTIFIER + 1);
        let error = with_id("ADD", long).unwrap_err();
        assert_eq!(error, EnvError::LongContainerId(97));
        for verb in ["DEL", "CHECK"] {
            assert!(with_id(verb, long).is_ok(), "{verb}");
        }
    }

    #[test]
    fn args_are_pairs() {
        assert_eq!(args("").unwrap().len(), 0);
        assert_eq!(args("A=1;B=x=y;").unwrap()["B"], "x=y");
        assert_eq!(args("A=1;B"), Err(EnvError::Args("B".into())));
        assert_eq!(args("=1"), Err(EnvError::Args("=1".into())));
    }
}
