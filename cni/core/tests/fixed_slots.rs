//! Slots asked for by number or by range: only free ones, and a fixed address cools like any other, but for whom it was.

#![allow(missing_docs)]

use std::time::Duration;

use kun_cni_core::ipam::{
    BootId, BootTime, Choice, Claim, Command, Ipam, Key, Owner, Pod, Reply, Rules, Snapshot,
    Unavailable,
};
use kun_config::types::{BlockId, Slot, SlotClass};

const FIRST: u32 = 0x0a40_0000;

fn at(seconds: u64) -> BootTime {
    BootTime(Duration::from_secs(seconds))
}

fn owner(id: &str) -> Owner {
    Owner {
        key: Key {
            container_id: id.into(),
            ifname: "eth0".into(),
            network: "kun".into(),
        },
        pod: Pod::default(),
        delegated: false,
    }
}

fn ipam() -> Ipam {
    let (mut ipam, _) = Ipam::load(
        Snapshot::default(),
        Rules::time_alone(Duration::from_secs(30)),
        BootId(1),
        at(0),
    )
    .unwrap();
    let block = BlockId::new(Slot(FIRST)).expect("aligned");
    let _ = ipam.step(Command::SetBlocks([block].into()), at(0));
    ipam
}

fn fixed(ipam: &mut Ipam, id: &str, slot: u32, now: u64) -> Reply {
    let (owner, choice) = (owner(id), Choice::Slot(Slot(slot)));
    ipam.step(Command::AllocateOf { owner, choice }, at(now))
        .reply
}

fn within(ipam: &mut Ipam, id: &str, first: u32, last: u32, now: u64) -> Reply {
    let choice = Choice::Within {
        class: SlotClass::Dual,
        ranges: vec![(Slot(first), Slot(last))],
    };
    let owner = owner(id);
    ipam.step(Command::AllocateOf { owner, choice }, at(now))
        .reply
}

fn allocated(reply: Reply) -> (u32, u64) {
    match reply {
        Reply::Allocated(a) => (a.slot.0, a.generation),
        other => panic!("{other:?}"),
    }
}

fn because(reply: Reply) -> Unavailable {
    match reply {
        Reply::Unavailable { because, .. } => because,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_fixed_slot_is_had_once_and_again_only_after_its_cooldown() {
    let mut ipam = ipam();
    assert_eq!(
        allocated(fixed(&mut ipam, "a", FIRST + 9, 0)),
        (FIRST + 9, 1)
    );
    // The same ADD again.
    assert_eq!(
        allocated(fixed(&mut ipam, "a", FIRST + 9, 1)),
        (FIRST + 9, 1)
    );
    assert_eq!(
        because(fixed(&mut ipam, "b", FIRST + 9, 1)),
        Unavailable::Allocated(owner("a"))
    );
    assert_eq!(
        because(fixed(&mut ipam, "a", FIRST + 8, 1)),
        Unavailable::HasAnother(Slot(FIRST + 9))
    );
    assert_eq!(
        because(fixed(&mut ipam, "b", FIRST + 64, 1)),
        Unavailable::NotOurs
    );
    let _ = ipam.step(
        Command::Release {
            key: owner("a").key,
            generation: None,
        },
        at(10),
    );
    assert_eq!(
        because(fixed(&mut ipam, "b", FIRST + 9, 15)),
        Unavailable::Cooling(Duration::from_secs(25))
    );
    assert_eq!(
        allocated(fixed(&mut ipam, "b", FIRST + 9, 40)),
        (FIRST + 9, 2)
    );
    assert_eq!(ipam.counts(SlotClass::Dual), (1, 0, 63));
}

/// A container that is started again, or whose network is set up anew, asks for what it had; nobody else can be meant there.
#[test]
fn an_attachment_has_its_own_address_back_at_once_and_no_other_one_that_cools() {
    let mut ipam = ipam();
    let release = |ipam: &mut Ipam, id: &str, generation: Option<u64>, now: u64| {
        let key = owner(id).key;
        ipam.step(Command::Release { key, generation }, at(now))
            .reply
    };
    assert_eq!(allocated(fixed(&mut ipam, "a", FIRST + 9, 0)).1, 1);
    assert_eq!(allocated(fixed(&mut ipam, "b", FIRST + 8, 0)).1, 2);
    let _ = release(&mut ipam, "a", None, 1);
    let _ = release(&mut ipam, "b", None, 1);
    assert!(matches!(
        because(fixed(&mut ipam, "a", FIRST + 8, 2)),
        Unavailable::Cooling(_)
    ));
    assert_eq!(
        allocated(fixed(&mut ipam, "a", FIRST + 9, 2)),
        (FIRST + 9, 3)
    );
    assert_eq!(ipam.counts(SlotClass::Dual), (1, 1, 62));
    // A DEL that meant the time before comes late.
    assert_eq!(release(&mut ipam, "a", Some(1), 3), Reply::NothingToRelease);
    // Its next release cools anew, from then on.
    let _ = release(&mut ipam, "a", None, 20);
    assert_eq!(
        because(fixed(&mut ipam, "b", FIRST + 9, 45)),
        Unavailable::Cooling(Duration::from_secs(5))
    );
    // Without asking for it, it gets another, as anybody.
    let command = Command::Allocate {
        owner: owner("a"),
        class: SlotClass::Dual,
    };
    assert_eq!(allocated(ipam.step(command, at(51)).reply).0, FIRST);
    assert_eq!(ipam.counts(SlotClass::Dual), (1, 0, 63));
}

/// Whom this node knows to have had an address last need not be the last: another node had the block meanwhile, and its pods the
/// address.
#[test]
fn an_address_of_a_block_that_was_elsewhere_cools_for_its_last_owner_too() {
    let mut ipam = ipam();
    let block = BlockId::new(Slot(FIRST)).expect("aligned");
    let _ = fixed(&mut ipam, "a", FIRST + 9, 0);
    let key = owner("a").key;
    let generation = None;
    let _ = ipam.step(Command::Release { key, generation }, at(1));
    let _ = ipam.step(Command::SetClaims([].into()), at(2));
    let epoch = Claim::FIRST.epoch + 2;
    let again = Claim {
        epoch,
        ..Claim::FIRST
    };
    let _ = ipam.step(Command::SetClaims([(block, again)].into()), at(3));
    assert_eq!(
        because(fixed(&mut ipam, "a", FIRST + 9, 4)),
        Unavailable::Cooling(Duration::from_secs(29))
    );
    assert_eq!(allocated(fixed(&mut ipam, "a", FIRST + 9, 33)).1, 2);
}

#[test]
fn a_range_gives_fresh_slots_first_then_cooled_ones_and_nothing_beside_it() {
    let mut ipam = ipam();
    assert_eq!(
        allocated(within(&mut ipam, "a", FIRST + 4, FIRST + 5, 0)).0,
        FIRST + 4
    );
    assert_eq!(
        allocated(within(&mut ipam, "b", FIRST + 4, FIRST + 5, 0)).0,
        FIRST + 5
    );
    assert!(matches!(
        within(&mut ipam, "c", FIRST + 4, FIRST + 5, 0),
        Reply::Exhausted { .. }
    ));
    let _ = ipam.step(
        Command::Release {
            key: owner("b").key,
            generation: None,
        },
        at(0),
    );
    assert_eq!(
        allocated(within(&mut ipam, "c", FIRST + 4, FIRST + 5, 30)),
        (FIRST + 5, 3)
    );
    // An attachment outside the range keeps what it has, and is told so.
    assert_eq!(
        because(within(&mut ipam, "c", FIRST + 6, FIRST + 7, 30)),
        Unavailable::HasAnother(Slot(FIRST + 5))
    );
    // The ordinary way never meets a slot that was taken out of its turn.
    let mut seen = std::collections::BTreeSet::new();
    for i in 0..62 {
        let (owner, class) = (owner(&format!("n{i}")), SlotClass::Dual);
        let reply = ipam.step(Command::Allocate { owner, class }, at(60)).reply;
        assert!(seen.insert(allocated(reply).0));
    }
    assert!(!seen.contains(&(FIRST + 4)) && !seen.contains(&(FIRST + 5)));
}
