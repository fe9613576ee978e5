//! A crowd: many processes that ask for addresses at once, some of them killed again and again, and the audit of what each of them
//! was told. Whom they ask is the test's; what they ask for, and what must hold of the answers, is here.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// `64x10000`: so many processes, so many operations of each.
pub const SIZE: &str = "KUN_CROWD";

/// What a process has at once: more is given back first. Few, so that each slot has many owners in a large crowd.
pub const HELD: usize = 4;

/// One in so many processes is killed, and another goes on in its place.
const KILLED: usize = 4;

/// What a process is told: its n-th operation got it a slot, or what the n-th one got is given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Word {
    /// `allocated N SLOT GENERATION`
    Allocated(usize, u32, u64),
    /// `released N`
    Released(usize),
}

impl fmt::Display for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Allocated(n, slot, generation) => write!(f, "allocated {n} {slot} {generation}"),
            Self::Released(n) => write!(f, "released {n}"),
        }
    }
}

impl Word {
    /// `None`: something else, or a line that was cut off.
    fn parse(line: &str) -> Option<Self> {
        let line = line.strip_suffix('\n')?;
        let words: Vec<&str> = line.split(' ').collect();
        match words.as_slice() {
            ["allocated", n, slot, generation] => Some(Self::Allocated(
                n.parse().ok()?,
                slot.parse().ok()?,
                generation.parse().ok()?,
            )),
            ["released", n] => Some(Self::Released(n.parse().ok()?)),
            _ => None,
        }
    }
}

/// What one process said, in order.
#[derive(Debug, Clone, Default)]
pub struct Told {
    /// The first part of its containers' names.
    pub name: String,
    /// It was killed: what it did last it may not have said.
    pub killed: bool,
    /// Its words.
    pub words: Vec<Word>,
}

/// A crowd's size, its kills, and how long it may take.
#[derive(Debug, Clone, Copy)]
pub struct Crowd {
    /// Processes at once.
    pub members: usize,
    /// Operations of each; of one that is killed, with those of who goes on in its place.
    pub operations: usize,
    /// So often is each killed that is.
    pub kills: usize,
}

impl Crowd {
    /// This size, or the one that the environment asks for.
    pub fn sized(members: usize, operations: usize, kills: usize) -> Self {
        let asked = std::env::var(SIZE).ok().and_then(|text| {
            let (members, operations) = text.split_once('x')?;
            Some((members.parse().ok()?, operations.parse().ok()?))
        });
        let (members, operations) = asked.unwrap_or((members, operations));
        Self {
            members,
            operations,
            kills,
        }
    }

    /// Runs it: `start` makes the command of a process with this name and so many operations, which calls [`act`]; `moment` waits for the moment
    /// to kill the process with this id, for the n-th time.
    pub fn run(
        self,
        start: impl Fn(&str, usize) -> Command + Sync,
        moment: impl Fn(u32, usize) + Sync,
    ) -> Result<Vec<Told>> {
        let (start, moment) = (&start, &moment);
        let begin = Instant::now();
        let all = std::thread::scope(|scope| {
            let members: Vec<_> = (0..self.members)
                .map(|member| scope.spawn(move || self.member(member, start, moment)))
                .collect();
            let told = members.into_iter().map(|thread| {
                let told = thread.join();
                told.unwrap_or_else(|_| bail!("a thread of the crowd panicked"))
            });
            told.collect::<Result<Vec<_>>>()
        })?;
        let told = all.concat();
        let operations: usize = told.iter().map(|told| told.words.len()).sum();
        let kills = told.iter().filter(|told| told.killed).count();
        let took = begin.elapsed();
        println!(
            "{} processes, {operations} operations, {kills} kills in {took:.1?}: {:.0} operations a second",
            self.members,
            operations as f64 / took.as_secs_f64()
        );
        Ok(told)
    }

    fn member(
        self,
        member: usize,
        start: impl Fn(&str, usize) -> Command,
        moment: impl Fn(u32, usize),
    ) -> Result<Vec<Told>> {
        let kills = if member % KILLED == KILLED - 1 {
            self.kills
        } else {
            0
        };
        let mut lives = Vec::new();
        let mut left = self.operations;
        for life in 0..=kills {
            // Not all at the same time.
            let until = (left / (kills - life + 1))
                .saturating_sub(member % 7)
                .max(1);
            let name = format!("{member}.{life}");
            let mut child = start(&name, left)
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::inherit())
                .spawn()?;
            let mut out = BufReader::new(child.stdout.take().context("its output is a pipe")?);
            let mut told = Told {
                name,
                ..Told::default()
            };
            let mut line = String::new();
            while out.read_line(&mut line)? > 0 {
                told.words.extend(Word::parse(&line));
                line.clear();
                if life < kills && !told.killed && told.words.len() >= until {
                    moment(child.id(), life);
                    child.kill()?;
                    told.killed = true;
                }
            }
            let status = child.wait()?;
            ensure!(
                told.killed || status.success(),
                "process {}: {status}",
                told.name
            );
            left = left.saturating_sub(told.words.len());
            lives.push(told);
        }
        Ok(lives)
    }
}

/// What a process of the crowd does: so many times it takes something or gives something back, and says so once it has the answer.
pub fn act(
    operations: usize,
    mut allocate: impl FnMut(usize) -> (u32, u64),
    mut release: impl FnMut(usize),
) {
    let mut out = std::io::stdout();
    let mut held = VecDeque::new();
    for n in 0..operations {
        // Every third operation gives something back, and so does each that would have too much.
        let gives = n % 3 == 2 || held.len() == HELD;
        let word = match gives.then(|| held.pop_front()).flatten() {
            Some(oldest) => {
                release(oldest);
                Word::Released(oldest)
            }
            None => {
                let (slot, generation) = allocate(n);
                held.push_back(n);
                Word::Allocated(n, slot, generation)
            }
        };
        // In front of it may stand what the test's runner wrote.
        write!(out, "\n{word}\n").expect("somebody reads");
        out.flush().expect("somebody reads");
    }
}

/// What was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// Slots that were told.
    pub allocations: usize,
    /// Different ones.
    pub slots: usize,
    /// Allocations that stand at the end.
    pub live: usize,
}

/// Whether what stands in the store at the end (container → slot, generation) is what everybody was told, and nothing was anybody's before it
/// was given back.
pub fn audit(told: &[Told], live: &BTreeMap<String, (u32, u64)>) -> Result<Found> {
    let slots: BTreeSet<u32> = live.values().map(|(slot, _)| *slot).collect();
    ensure!(slots.len() == live.len(), "one slot is two containers'");
    // Slot → generation → whether it was given back, as far as was said.
    let mut owners: BTreeMap<u32, BTreeMap<u64, bool>> = BTreeMap::new();
    let mut generations = BTreeSet::new();
    let mut explained = BTreeSet::new();
    for one in told {
        let mut has: BTreeMap<usize, (u32, u64)> = BTreeMap::new();
        let mut next = 0;
        for word in &one.words {
            match *word {
                Word::Allocated(n, slot, generation) => {
                    ensure!(
                        generations.insert(generation),
                        "generation {generation} was told twice"
                    );
                    has.insert(n, (slot, generation));
                    owners.entry(slot).or_default().insert(generation, false);
                }
                Word::Released(n) => {
                    let (slot, generation) = has.remove(&n).context("given back twice")?;
                    owners.entry(slot).or_default().insert(generation, true);
                }
            }
            next += 1;
        }
        let oldest = has.keys().next().copied();
        for (n, (slot, generation)) in has {
            let container = format!("{}-{n}", one.name);
            let stored = live.get(&container);
            // What was on its way when it was killed may have been the release of the oldest.
            let gone = one.killed && Some(n) == oldest && stored.is_none();
            ensure!(
                stored == Some(&(slot, generation)) || gone,
                "{container} was told slot {slot}, generation {generation}, the store has {stored:?}"
            );
            if gone {
                owners.entry(slot).or_default().insert(generation, true);
            }
            explained.insert(container);
        }
        if one.killed {
            // Or it was an allocation.
            explained.insert(format!("{}-{next}", one.name));
        }
    }
    if let Some(container) = live
        .keys()
        .find(|container| !explained.contains(*container))
    {
        bail!("{container} has a slot, and nobody asked for it or it was given back");
    }
    for (slot, generation) in live.values() {
        let owners = owners.entry(*slot).or_default();
        owners.entry(*generation).or_insert(false);
    }
    for (slot, owners) in &owners {
        let mut before = owners.iter().rev().skip(1);
        if let Some((generation, _)) = before.find(|(_, back)| !**back) {
            bail!("slot {slot} was given on, and generation {generation} has not given it back");
        }
    }
    Ok(Found {
        allocations: generations.len(),
        slots: owners.len(),
        live: live.len(),
    })
}

/// Spins until this process is the one that has the lock of some file, and not one of those that wait for it; or until the deadline.
pub fn has_a_lock(pid: u32, deadline: Duration) {
    let end = Instant::now() + deadline;
    let pid = pid.to_string();
    // The moment lasts for less than a millisecond.
    while Instant::now() < end {
        let locks = std::fs::read_to_string("/proc/locks").unwrap_or_default();
        let has = locks.lines().any(|line| {
            let mut words = line.split_whitespace().skip(1);
            words.next() == Some("FLOCK") && words.nth(2) == Some(&*pid)
        });
        if has {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(name: &str, killed: bool, words: &[Word]) -> Told {
        Told {
            name: name.to_owned(),
            killed,
            words: words.to_vec(),
        }
    }

    fn live(all: &[(&str, u32, u64)]) -> BTreeMap<String, (u32, u64)> {
        all.iter()
            .map(|(container, slot, generation)| ((*container).to_owned(), (*slot, *generation)))
            .collect()
    }

    use Word::{Allocated, Released};

    #[test]
    fn the_audit_finds_each_kind_of_lie() {
        let one = told("0", false, &[Allocated(0, 7, 1), Released(0)]);
        let other = told("1", false, &[Allocated(0, 7, 2)]);
        let stands = live(&[("1-0", 7, 2)]);
        assert_eq!(
            audit(&[one.clone(), other.clone()], &stands).unwrap(),
            Found {
                allocations: 2,
                slots: 1,
                live: 1
            }
        );
        let wrong = |told: &[Told], live: &BTreeMap<_, _>, why: &str| {
            let error = audit(told, live).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        };
        let both = [one.clone(), other.clone()];
        wrong(&both, &live(&[]), "the store has None");
        wrong(&both, &live(&[("1-0", 8, 2)]), "the store has Some");
        wrong(
            &both,
            &live(&[("1-0", 7, 2), ("2-0", 7, 3)]),
            "two containers'",
        );
        wrong(&both, &live(&[("1-0", 7, 2), ("0-0", 8, 1)]), "given back");
        let same = told("1", false, &[Allocated(0, 8, 1)]);
        wrong(&[one.clone(), same], &live(&[]), "told twice");
        // The first owner never gave it back, and has another by now.
        let early = told("0", true, &[Allocated(0, 8, 1), Allocated(1, 7, 2)]);
        let on = told("1", false, &[Allocated(0, 8, 3), Released(0)]);
        wrong(
            &[early.clone(), on.clone()],
            &live(&[("0-0", 8, 1), ("0-1", 7, 2)]),
            "given on",
        );
        // Killed while it gave back.
        audit(&[early, on], &live(&[("0-1", 7, 2)])).unwrap();
    }

    #[test]
    fn a_line_that_was_cut_off_says_nothing() {
        for word in [Allocated(3, 4, 5), Released(6)] {
            assert_eq!(Word::parse(&format!("{word}\n")), Some(word));
            assert_eq!(Word::parse(&word.to_string()), None);
        }
        assert_eq!(Word::parse("running 1 test\n"), None);
    }
}
