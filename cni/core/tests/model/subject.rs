//! The slot machine as it is, and with known bugs of the field put back in: each has freed, leaked or doubled addresses somewhere.

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use kun_cni_core::ipam::{
    BootId, BootTime, Command, Effect, Ipam, Key, Needs, Reply, Rules, SlotState, Snapshot,
};

/// A bug, and where it was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Mutant {
    /// The cooldown is in memory only: a restart of the daemon ends it (amazon-vpc-cni-k8s#1127).
    RamOnlyCooldown,
    /// A cooled slot leaves one list in one transaction and enters the other in the next; a crash between loses it (UCloud's uk8s).
    TwoTransactionExit,
    /// What was seen before a slot was used again is believed of its next release.
    NoSequenceCheck,
    /// A release is told and not stored (calico cni-plugin#908: a failed ADD leaves half an allocation).
    HalfRollback,
    /// What pod status does not name is freed; status lags behind ADD (antrea#8239, calico#5044).
    StatusGc,
    /// A DEL frees whatever its key has, of whichever generation.
    NoGenerationCheck,
    /// The address is told before it is stored.
    ReplyBeforeDurable,
    /// The store's boot is not looked at: pods outlive their kernel, and timers run on from another clock (plugins#252).
    NoBootCheck,
    /// A block that another node had is used at once.
    WarmBlock,
    /// Time decides alone (all peers with a cooldown).
    TimeAlone,
    /// Evidence decides alone.
    EvidenceAlone,
    /// The row of a free slot is deleted, and its generation with it.
    GenerationLost,
}

pub(crate) const MUTANTS: [Mutant; 12] = [
    Mutant::RamOnlyCooldown,
    Mutant::TwoTransactionExit,
    Mutant::NoSequenceCheck,
    Mutant::HalfRollback,
    Mutant::StatusGc,
    Mutant::NoGenerationCheck,
    Mutant::ReplyBeforeDurable,
    Mutant::NoBootCheck,
    Mutant::WarmBlock,
    Mutant::TimeAlone,
    Mutant::EvidenceAlone,
    Mutant::GenerationLost,
];

/// What the model drives: `None` is the real thing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Subject {
    pub(crate) ipam: Ipam,
    mutant: Option<Mutant>,
    /// Effects that a mutant stores too late.
    late: Vec<Effect>,
}

/// Slots of a block in the model.
pub(crate) const SLOTS: u32 = 2;

/// In ticks of one second.
pub(crate) const COOLDOWN: u64 = 2;

/// In ticks too.
pub(crate) const QUARANTINE_AFTER: u64 = 2;

fn rules(mutant: Option<Mutant>) -> Rules {
    let cooldown = match mutant {
        Some(Mutant::EvidenceAlone) => 0,
        _ => COOLDOWN,
    };
    let needs = match mutant {
        Some(Mutant::TimeAlone) => Needs::NONE,
        _ => Needs::FOLDER,
    };
    let quarantine_after = Duration::from_secs(QUARANTINE_AFTER);
    Rules {
        slots_per_block: SLOTS,
        ..Rules::new(Duration::from_secs(cooldown), quarantine_after, needs)
    }
}

impl Subject {
    /// What a process finds in a store, and what it stores at once.
    pub(crate) fn load(
        mutant: Option<Mutant>,
        mut store: Snapshot,
        boot: BootId,
        now: BootTime,
    ) -> (Self, Vec<Effect>) {
        match mutant {
            Some(Mutant::RamOnlyCooldown) => {
                for record in store.records.values_mut() {
                    if let SlotState::Cooling { .. } = record.state {
                        record.state = SlotState::Free;
                    }
                }
            }
            Some(Mutant::NoBootCheck) => store.boot = Some(boot),
            Some(Mutant::GenerationLost) => {
                store
                    .records
                    .retain(|_, record| record.state != SlotState::Free);
            }
            _ => {}
        }
        let (ipam, effects) = Ipam::load(store, rules(mutant), boot, now).expect("sound");
        let subject = Self {
            ipam,
            mutant,
            late: Vec::new(),
        };
        (subject, effects)
    }

    /// A word for what is stored too late, which only a mutant does; it tells apart more than it need.
    pub(crate) fn owes(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.late.hash(&mut hasher);
        hasher.finish()
    }

    pub(crate) fn mutant(&self) -> Option<Mutant> {
        self.mutant
    }

    /// A reply, and the transactions before it. `alive`: what the runtime's status names.
    pub(crate) fn step(
        &mut self,
        command: Command,
        now: BootTime,
        alive: &BTreeSet<Key>,
    ) -> (Reply, Vec<Vec<Effect>>) {
        let command = self.twisted(command);
        let releases = matches!(command, Command::Release { .. });
        let ticks = command == Command::Tick;
        let step = self.ipam.step(command, now);
        let mut effects = step.effects;
        match self.mutant {
            Some(Mutant::TwoTransactionExit) => {
                // First off the cooling list, then onto the free one.
                let mut first = effects.clone();
                let mut exits = false;
                for effect in &mut first {
                    if let Effect::PutSlot(record) = effect
                        && record.state == SlotState::Free
                    {
                        exits = true;
                        record.state = SlotState::Allocated {
                            owner: super::owner(90 + (record.slot.0 % 8) as u8),
                            since: now,
                        };
                    }
                }
                if exits {
                    return (step.reply, vec![first, effects]);
                }
            }
            Some(Mutant::HalfRollback) if releases => effects.clear(),
            Some(Mutant::ReplyBeforeDurable) => {
                let before = std::mem::replace(&mut self.late, effects);
                return (step.reply, vec![before]);
            }
            Some(Mutant::StatusGc) if ticks => {
                let gone: Vec<Key> = self
                    .ipam
                    .live()
                    .map(|a| a.owner.key)
                    .filter(|key| !alive.contains(key))
                    .collect();
                for key in gone {
                    let generation = None;
                    let step = self.ipam.step(Command::Release { key, generation }, now);
                    effects.extend(step.effects);
                }
            }
            _ => {}
        }
        (step.reply, vec![effects])
    }

    fn twisted(&self, command: Command) -> Command {
        match (self.mutant, command) {
            (Some(Mutant::NoGenerationCheck), Command::Release { key, .. }) => Command::Release {
                key,
                generation: None,
            },
            (
                Some(Mutant::NoSequenceCheck),
                Command::Observe {
                    mut looks,
                    watermark,
                },
            ) => {
                for look in &mut looks {
                    if let Some(record) = self.ipam.record(look.slot) {
                        look.sequence = record.sequence;
                    }
                }
                Command::Observe { looks, watermark }
            }
            (Some(Mutant::WarmBlock), Command::SetClaims(claims)) => {
                Command::SetBlocks(claims.into_keys().collect())
            }
            (_, command) => command,
        }
    }
}
