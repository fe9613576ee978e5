//! `kunctl ipam release`: finds the slot of an address, says what it is, asks twice, and lets it go with the generation that was
//! shown.
//!
//! On a terminal it asks whether, and then for the address once more. Elsewhere it wants `--yes` and `--generation`, which takes
//! a look at `kunctl ipam` first. What a live pod has goes only with `--force` and the generation, and the agent looks again.

use std::io::{BufRead, IsTerminal, Write};
use std::net::IpAddr;

use kun_control::SlotRow;

/// What the command line says.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wish {
    pub(crate) address: IpAddr,
    pub(crate) generation: Option<u64>,
    pub(crate) yes: bool,
    pub(crate) force: bool,
}

/// Why nothing is let go.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum ReleaseError {
    #[error("{0} is free, or no slot of this node: `kunctl ipam` shows those that are not")]
    NotHeld(IpAddr),
    #[error(
        "{address} has generation {is}, not {meant}: it was used again since; look at `kunctl ipam` once more"
    )]
    Generation {
        address: IpAddr,
        is: u64,
        meant: u64,
    },
    #[error("--force needs --generation {0}, so that you force what you saw")]
    ForceBlind(u64),
    #[error("without a terminal to ask at, give --yes and --generation {0}")]
    NotAsked(u64),
    #[error("nothing was changed")]
    No,
}

/// The row of the address, if all is said that has to be said.
pub(crate) fn agreed(
    wish: Wish,
    rows: &[SlotRow],
    ask: impl FnMut(&str) -> Option<String>,
) -> Result<&SlotRow, ReleaseError> {
    let address = wish.address;
    let row = rows
        .iter()
        .find(|row| IpAddr::V6(row.v6) == address || row.v4.map(IpAddr::V4) == Some(address))
        .ok_or(ReleaseError::NotHeld(address))?;
    match wish.generation {
        Some(meant) if meant != row.generation => {
            return Err(ReleaseError::Generation {
                address,
                is: row.generation,
                meant,
            });
        }
        None if wish.force => return Err(ReleaseError::ForceBlind(row.generation)),
        Some(_) | None => {}
    }
    match (wish.yes, wish.generation) {
        (true, Some(_)) => Ok(row),
        _ => twice(address, row, ask),
    }
}

fn twice(
    address: IpAddr,
    row: &SlotRow,
    mut ask: impl FnMut(&str) -> Option<String>,
) -> Result<&SlotRow, ReleaseError> {
    let whose = match (row.pod.namespace.as_str(), row.pod.name.as_str()) {
        (_, "") => format!("container {}", row.key.container_id),
        (namespace, name) => format!("pod {namespace}/{name}"),
    };
    let effect = match row.state.as_str() {
        "allocated" => "It begins to cool; whoever still sends from it loses its place.",
        _ => "It is used again once it has rested, whoever still knows it.",
    };
    let why: String = row.why.iter().map(|line| format!("  {line}\n")).collect();
    let first = format!(
        "{address} is {}, generation {}, of {whose}.\n{why}{effect}\nLet it go? [y/N] ",
        row.state, row.generation
    );
    let answer = ask(&first).ok_or(ReleaseError::NotAsked(row.generation))?;
    if !matches!(answer.trim(), "y" | "Y" | "yes") {
        return Err(ReleaseError::No);
    }
    let answer = ask("Write the address once more: ").unwrap_or_default();
    match answer.trim().parse::<IpAddr>() {
        Ok(again) if again == address => Ok(row),
        Ok(_) | Err(_) => Err(ReleaseError::No),
    }
}

/// One line from the terminal; `None` where there is none.
pub(crate) fn from_terminal(question: &str) -> Option<String> {
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        return None;
    }
    let mut out = std::io::stderr();
    write!(out, "{question}").and_then(|()| out.flush()).ok()?;
    let mut line = String::new();
    stdin.lock().read_line(&mut line).ok()?;
    Some(line)
}

#[cfg(test)]
mod tests {
    use kun_config::types::Slot;
    use kun_control::{AttachmentKey, PodRef};

    use super::*;

    fn row() -> SlotRow {
        SlotRow {
            slot: Slot(0x0a40_0001),
            state: "quarantined".to_owned(),
            generation: 7,
            v6: "fd00::a40:1".parse().expect("an address"),
            v4: "10.64.0.1".parse().ok(),
            key: AttachmentKey {
                network: "kun".to_owned(),
                container_id: "c1".to_owned(),
                ifname: "eth0".to_owned(),
            },
            pod: PodRef::default(),
            free_in_secs: None,
            age_secs: None,
            why: vec!["EndpointSlice shop/web has 10.64.0.1".to_owned()],
        }
    }

    fn run(
        address: &str,
        generation: Option<u64>,
        yes: bool,
        force: bool,
        answers: &[&str],
    ) -> (Result<u64, ReleaseError>, Vec<String>) {
        let wish = Wish {
            address: address.parse().expect("an address"),
            generation,
            yes,
            force,
        };
        let mut asked = Vec::new();
        let mut answers = answers.iter();
        let rows = [row()];
        let agreed = agreed(wish, &rows, |question| {
            asked.push(question.to_owned());
            answers.next().map(|a| (*a).to_owned())
        });
        (agreed.map(|row| row.generation), asked)
    }

    #[test]
    fn it_asks_twice() {
        let (agreed, asked) = run("10.64.0.1", None, false, false, &["y\n", "10.64.0.1\n"]);
        assert_eq!(agreed, Ok(7));
        assert_eq!(asked.len(), 2);
        assert!(asked[0].contains("EndpointSlice shop/web has 10.64.0.1"));
        for answers in [&["n\n"][..], &["y\n", "10.64.0.2\n"], &["y\n", "yes\n"]] {
            let (agreed, _) = run("fd00::a40:1", None, false, false, answers);
            assert_eq!(agreed, Err(ReleaseError::No), "{answers:?}");
        }
    }

    #[test]
    fn without_a_terminal_it_wants_the_generation_that_was_seen() {
        for (generation, yes, force, want) in [
            (Some(7), true, false, Ok(7)),
            (Some(7), true, true, Ok(7)),
            (None, true, false, Err(ReleaseError::NotAsked(7))),
            (Some(7), false, false, Err(ReleaseError::NotAsked(7))),
            (None, true, true, Err(ReleaseError::ForceBlind(7))),
        ] {
            assert_eq!(run("10.64.0.1", generation, yes, force, &[]).0, want);
        }
        let (agreed, _) = run("10.64.0.1", Some(6), true, false, &[]);
        assert!(matches!(
            agreed,
            Err(ReleaseError::Generation {
                is: 7,
                meant: 6,
                ..
            })
        ));
        let (agreed, _) = run("10.64.0.9", Some(7), true, false, &[]);
        assert!(matches!(agreed, Err(ReleaseError::NotHeld(_))));
    }
}
