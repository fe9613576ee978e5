//! A store whose bytes went bad on the disk: at any place it is read as it was written, or refused as damaged with what to do; never
//! with a panic, never as something else.

#![allow(missing_docs)]

use std::fs;
use std::panic::catch_unwind;
use std::path::Path;
use std::time::Duration;

use kun_cni::rebuild::rebuild;
use kun_cni::store::{FILE, Store, StoreError};
use kun_cni_core::ipam::{BootId, BootTime, Command, Ipam, Key, Owner, Pod, Rules, Snapshot};
use kun_config::types::{BlockId, Slot, SlotClass};

const FIRST: Slot = Slot(0x0a40_0000);

/// A store with 40 attachments, half of them gone.
fn write(directory: &Path) -> Snapshot {
    let store = Store::open(directory, Duration::ZERO).unwrap();
    let now = BootTime(Duration::from_secs(1));
    let rules = Rules::time_alone(Duration::from_secs(30));
    let (mut ipam, effects) = Ipam::load(Snapshot::default(), rules, BootId(1), now).unwrap();
    store.commit(&effects).unwrap();
    let mut act = |command| store.commit(&ipam.step(command, now).effects).unwrap();
    act(Command::SetBlocks(
        [BlockId::new(FIRST).expect("aligned")].into(),
    ));
    for n in 0..40 {
        let key = Key {
            container_id: format!("container-{n}"),
            ifname: "eth0".into(),
            network: "kun".into(),
        };
        let owner = Owner {
            key: key.clone(),
            pod: Pod::default(),
            delegated: false,
        };
        let class = SlotClass::Dual;
        act(Command::Allocate { owner, class });
        if n % 2 == 0 {
            let generation = None;
            act(Command::Release { key, generation });
        }
    }
    store.load().unwrap()
}

/// What is found in a directory with these bytes as the store.
fn read(directory: &Path, bytes: &[u8]) -> Result<Snapshot, StoreError> {
    fs::write(directory.join(FILE), bytes).unwrap();
    let opened = catch_unwind(|| Store::open(directory, Duration::ZERO)?.load());
    opened.unwrap_or_else(|_| panic!("it panics"))
}

/// Whether there was a damaged file to keep or none: what was given out after the last time is below what is given out now.
#[test]
fn generations_grow_from_one_rebuilt_store_to_the_next() {
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().join("state");
    fs::create_dir(&state).unwrap();
    let text = format!(
        "node: {{name: n}}\nipam: {{v4Pools: [10.64.0.0/16]}}\nagent: {{stateDir: {}}}\n",
        state.display()
    );
    let config = kun_config::parse("kun.yaml", &text).unwrap();
    let results = directory.path().join("results");
    let mut floor = 0;
    let file = state.join(FILE);
    for what in ["gone", "gone again", "damaged", "and gone"] {
        match what {
            "gone" => {}
            "damaged" => fs::write(&file, b"not a store").unwrap(),
            _ => fs::remove_file(&file).unwrap(),
        }
        rebuild(&config, &results).unwrap();
        let store = Store::open(&state, Duration::ZERO).unwrap();
        let now = store.load().unwrap().floor;
        assert!(now > floor, "{what}: {now:#x} after {floor:#x}");
        floor = now;
    }
}

#[test]
fn bytes_that_went_bad_are_noticed_or_do_no_harm() {
    let directory = tempfile::tempdir().unwrap();
    let written = write(directory.path());
    let good = fs::read(directory.path().join(FILE)).unwrap();
    assert_eq!(read(directory.path(), &good).unwrap(), written);
    let (mut refused, mut harmless) = (0, 0);
    let mut judge = |what: &str, bytes: &[u8]| match read(directory.path(), bytes) {
        Ok(snapshot) => {
            assert_eq!(snapshot, written, "{what}: read as something else");
            harmless += 1;
        }
        Err(StoreError::Damaged { .. }) => refused += 1,
        Err(other) => panic!("{what}: {other}"),
    };
    // All of the head; after it some bytes of every page, at places that move.
    let places = (0..320).chain((320..good.len()).step_by(1021));
    for (n, place) in places.enumerate() {
        let mut bytes = good.clone();
        bytes[place] ^= [0x01, 0x80, 0xff, 0x5a][n % 4];
        judge(&format!("byte {place}"), &bytes);
    }
    for length in (0..good.len()).step_by(8191) {
        judge(&format!("cut to {length}"), &good[..length]);
    }
    println!("{} bytes: {refused}, {harmless}", good.len());
    assert!(refused > 50 && harmless > 0, "{refused}, {harmless}");
}
