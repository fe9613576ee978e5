//! The folder source against a real folder and real inotify.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use kun_cluster::folder::{FolderError, FolderSource, Following, parse_manifest};
use kun_cluster::{Delta, Event, Kind, ObjectName, Store};

/// Longer than any scan; a source that says nothing within it is stuck.
const WITHIN: Duration = Duration::from_secs(10);

/// A followed folder and what it made of itself so far.
struct Seen {
    store: Store,
    events: Receiver<Event>,
    following: Following,
}

impl Seen {
    fn follow(path: &Path) -> Self {
        let (sender, events) = channel();
        let following = FolderSource::open(path)
            .and_then(|source| source.spawn(move |event| sender.send(event).is_ok()))
            .expect("a folder");
        let mut seen = Self {
            store: Store::new(),
            events,
            following,
        };
        while seen.next() != Event::Synced {}
        seen
    }

    fn next(&mut self) -> Event {
        let event = self.events.recv_timeout(WITHIN).expect("an event in time");
        if let Event::Deltas(deltas) = &event {
            for delta in deltas.clone() {
                self.store.apply(delta);
            }
        }
        event
    }

    fn next_deltas(&mut self) -> Vec<String> {
        match self.next() {
            Event::Deltas(deltas) => deltas.iter().map(told).collect(),
            other => panic!("{other:?} where deltas were awaited"),
        }
    }

    fn next_trouble(&mut self) -> String {
        match self.next() {
            Event::Trouble(trouble) => trouble,
            other => panic!("{other:?} where trouble was awaited"),
        }
    }

    fn port_of(&self, name: &str) -> Option<u16> {
        let service = self.store.service(&ObjectName::new("default", name))?;
        Some(service.ports[0].port)
    }
}

fn told(delta: &Delta) -> String {
    match delta {
        Delta::Upsert(object) => format!("+{}", object.meta().name),
        Delta::Remove(_, name) => format!("-{name}"),
    }
}

fn service(name: &str, port: u16) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{ports: [{{port: {port}}}]}}\n---\n"
    )
}

fn write_atomically(path: &Path, text: &str) {
    let new = path.with_extension("new");
    fs::write(&new, text).expect("writable");
    fs::rename(&new, path).expect("renamed");
}

#[test]
fn the_first_snapshot_is_one_event_then_synced() {
    let dir = tempfile::tempdir().expect("a directory");
    fs::write(
        dir.path().join("a.yaml"),
        service("a", 1) + &service("b", 2),
    )
    .expect("writable");
    fs::create_dir(dir.path().join("below")).expect("writable");
    fs::write(
        dir.path().join("below/c.json"),
        r#"{"apiVersion":"v1","kind":"List","items":[{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"n"}}]}"#,
    )
    .expect("writable");
    fs::write(dir.path().join("notes.txt"), "not a manifest: [").expect("writable");
    fs::write(dir.path().join(".hidden.yaml"), "not a manifest: [").expect("writable");
    let mut source = FolderSource::open(dir.path()).expect("a folder");
    let Event::Deltas(deltas) = source.next_event() else {
        panic!("no snapshot")
    };
    let told: Vec<String> = deltas.iter().map(told).collect();
    assert_eq!(told, ["+default/a", "+default/b", "+n"]);
    assert_eq!(source.next_event(), Event::Synced);
}

#[test]
fn an_empty_folder_is_synced_at_once() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut source = FolderSource::open(dir.path()).expect("a folder");
    assert_eq!(source.next_event(), Event::Synced);
}

#[test]
fn a_missing_folder_is_named() {
    let error = FolderSource::open(Path::new("/nonexistent/manifests")).expect_err("there is none");
    assert!(matches!(error, FolderError::Unreadable { .. }));
    assert!(
        error
            .to_string()
            .starts_with("/nonexistent/manifests: the manifest folder cannot be read"),
        "{error}"
    );
}

#[test]
fn changes_come_as_the_deltas_of_one_scan() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("a.yaml");
    fs::write(&file, service("a", 1) + &service("b", 2) + &service("c", 3)).expect("writable");
    let mut seen = Seen::follow(dir.path());
    write_atomically(
        &file,
        &(service("a", 1) + &service("b", 20) + &service("d", 4)),
    );
    assert_eq!(
        seen.next_deltas(),
        ["-default/c", "+default/b", "+default/d"]
    );
    assert_eq!(seen.port_of("b"), Some(20));
    fs::remove_file(&file).expect("removed");
    assert_eq!(
        seen.next_deltas(),
        ["-default/a", "-default/b", "-default/d"]
    );
}

#[test]
fn a_write_in_place_of_the_same_length_is_seen() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("a.yaml");
    fs::write(&file, service("a", 1000)).expect("writable");
    let mut seen = Seen::follow(dir.path());
    for port in 1001..1020 {
        fs::write(&file, service("a", port)).expect("writable");
        assert_eq!(seen.next_deltas(), ["+default/a"]);
        assert_eq!(seen.port_of("a"), Some(port));
    }
}

#[test]
fn a_file_that_is_being_written_is_read_when_closed() {
    use std::io::Write;
    let dir = tempfile::tempdir().expect("a directory");
    let mut seen = Seen::follow(dir.path());
    let mut file = fs::File::create(dir.path().join("a.yaml")).expect("writable");
    file.write_all(service("a", 1).as_bytes())
        .expect("writable");
    file.sync_all().expect("synced");
    // Another file wakes the source while the first is still open: its half must not be read.
    write_atomically(&dir.path().join("b.yaml"), &service("b", 2));
    assert_eq!(seen.next_deltas(), ["+default/b"]);
    file.write_all(service("c", 3).as_bytes())
        .expect("writable");
    drop(file);
    assert_eq!(seen.next_deltas(), ["+default/a", "+default/c"]);
}

#[test]
fn a_bad_file_keeps_its_last_good_objects_and_harms_no_other() {
    let dir = tempfile::tempdir().expect("a directory");
    let (a, b) = (dir.path().join("a.yaml"), dir.path().join("b.yaml"));
    fs::write(&a, service("a", 1)).expect("writable");
    fs::write(&b, service("b", 2)).expect("writable");
    let mut seen = Seen::follow(dir.path());
    write_atomically(&a, &service("a", 1).replace("port: 1", "port: 99999"));
    let trouble = seen.next_trouble();
    let place = format!(
        "{}:4:23: spec.ports[0].port: `99999` is not a port",
        a.display()
    );
    assert!(trouble.starts_with(&place), "{trouble}");
    assert!(
        trouble.ends_with("(its 1 last good objects stay in force)"),
        "{trouble}"
    );
    write_atomically(&b, &service("b", 20));
    assert_eq!(seen.next_deltas(), ["+default/b"]);
    assert_eq!((seen.port_of("a"), seen.port_of("b")), (Some(1), Some(20)));
    assert_eq!(seen.following.troubles().now(), [trouble]);
    write_atomically(&a, &service("a", 10));
    assert_eq!(seen.next_deltas(), ["+default/a"]);
    assert_eq!(seen.port_of("a"), Some(10));
    assert!(seen.following.troubles().now().is_empty());
}

#[test]
fn a_snapshot_with_a_file_that_was_never_right_is_partial_until_it_is_right_or_gone() {
    for mend in [true, false] {
        let dir = tempfile::tempdir().expect("a directory");
        let (a, b) = (dir.path().join("a.yaml"), dir.path().join("b.yaml"));
        fs::write(&a, "kind: [").expect("writable");
        fs::write(&b, service("b", 2)).expect("writable");
        let mut source = FolderSource::open(dir.path()).expect("a folder");
        assert!(matches!(source.next_event(), Event::Trouble(_)));
        assert!(matches!(source.next_event(), Event::Deltas(_)));
        assert_eq!(source.next_event(), Event::Partial);
        assert_eq!(source.next_event(), Event::Synced);
        // Another file's change does not make it whole.
        write_atomically(&b, &service("b", 3));
        assert!(matches!(source.next_event(), Event::Deltas(_)));
        if mend {
            write_atomically(&a, &service("a", 1));
            assert!(matches!(source.next_event(), Event::Deltas(_)));
        } else {
            fs::remove_file(&a).expect("it is there");
        }
        assert_eq!(source.next_event(), Event::Whole);
        // From now on there are last good objects.
        write_atomically(&b, "kind: [");
        assert!(matches!(source.next_event(), Event::Trouble(_)));
        write_atomically(&b, &service("b", 4));
        assert!(matches!(source.next_event(), Event::Deltas(_)));
    }
}

#[test]
fn the_first_file_wins_and_the_other_takes_over_when_it_goes() {
    let dir = tempfile::tempdir().expect("a directory");
    let (a, b) = (dir.path().join("a.yaml"), dir.path().join("b.yaml"));
    fs::write(&b, service("x", 2)).expect("writable");
    let mut seen = Seen::follow(dir.path());
    write_atomically(&a, &service("x", 1));
    let trouble = seen.next_trouble();
    assert!(
        trouble.contains("Service default/x is also in")
            && trouble.starts_with(&*b.to_string_lossy()),
        "{trouble}"
    );
    assert_eq!(seen.next_deltas(), ["+default/x"]);
    assert_eq!(seen.port_of("x"), Some(1));
    fs::remove_file(&a).expect("removed");
    assert_eq!(seen.next_deltas(), ["+default/x"]);
    assert_eq!(seen.port_of("x"), Some(2));
}

#[test]
fn a_mounted_configmap_swaps_as_one_change() {
    let dir = tempfile::tempdir().expect("a directory");
    let root = dir.path();
    let version = |n: u16| {
        let below = root.join(format!("..version{n}"));
        fs::create_dir(&below).expect("writable");
        fs::write(below.join("a.yaml"), service("a", n)).expect("writable");
        fs::write(below.join("b.yaml"), service("b", n)).expect("writable");
    };
    version(1);
    symlink("..version1", root.join("..data")).expect("linked");
    symlink("..data/a.yaml", root.join("a.yaml")).expect("linked");
    symlink("..data/b.yaml", root.join("b.yaml")).expect("linked");
    let mut seen = Seen::follow(root);
    assert_eq!(seen.port_of("a"), Some(1));
    version(2);
    symlink("..version2", root.join("..data_tmp")).expect("linked");
    fs::rename(root.join("..data_tmp"), root.join("..data")).expect("renamed");
    assert_eq!(seen.next_deltas(), ["+default/a", "+default/b"]);
    assert_eq!((seen.port_of("a"), seen.port_of("b")), (Some(2), Some(2)));
}

#[test]
fn the_root_may_be_a_link_that_is_swapped() {
    let dir = tempfile::tempdir().expect("a directory");
    for n in [1, 2] {
        let below = dir.path().join(format!("v{n}"));
        fs::create_dir(&below).expect("writable");
        fs::write(below.join("a.yaml"), service("a", n)).expect("writable");
    }
    let root = dir.path().join("manifests");
    symlink("v1", &root).expect("linked");
    let mut seen = Seen::follow(&root);
    symlink("v2", dir.path().join("next")).expect("linked");
    fs::rename(dir.path().join("next"), &root).expect("renamed");
    assert_eq!(seen.next_deltas(), ["+default/a"]);
    assert_eq!(seen.port_of("a"), Some(2));
    // The new folder is watched, not the old one.
    write_atomically(&dir.path().join("v2/a.yaml"), &service("a", 3));
    assert_eq!(seen.next_deltas(), ["+default/a"]);
}

#[test]
fn a_root_that_vanishes_takes_nothing_with_it() {
    let dir = tempfile::tempdir().expect("a directory");
    let root = dir.path().join("manifests");
    fs::create_dir(&root).expect("writable");
    fs::write(root.join("a.yaml"), service("a", 1)).expect("writable");
    let mut seen = Seen::follow(&root);
    fs::rename(&root, dir.path().join("away")).expect("renamed");
    assert!(seen.next_trouble().contains("stays in force"));
    fs::write(dir.path().join("away/a.yaml"), service("a", 2)).expect("writable");
    fs::rename(dir.path().join("away"), &root).expect("renamed");
    assert_eq!(seen.next_deltas(), ["+default/a"]);
    assert_eq!(seen.port_of("a"), Some(2));
}

#[test]
fn a_new_sub_folder_is_followed() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut seen = Seen::follow(dir.path());
    let below = dir.path().join("below");
    fs::create_dir(&below).expect("writable");
    fs::write(below.join("a.yaml"), service("a", 1)).expect("writable");
    assert_eq!(seen.next_deltas(), ["+default/a"]);
    write_atomically(&below.join("a.yaml"), &service("a", 2));
    assert_eq!(seen.next_deltas(), ["+default/a"]);
    fs::remove_dir_all(&below).expect("removed");
    assert_eq!(seen.next_deltas(), ["-default/a"]);
}

#[test]
fn a_single_file_is_a_source_too() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("app.yaml");
    fs::write(&file, service("a", 1)).expect("writable");
    let mut seen = Seen::follow(&file);
    write_atomically(&file, &service("a", 2));
    assert_eq!(seen.next_deltas(), ["+default/a"]);
}

#[test]
fn a_service_address_stands_in_for_a_status() {
    let balancer = "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {type: LoadBalancer, ports: [{port: 80}]}\n";
    let address = "apiVersion: kun.network/v1alpha1\nkind: ServiceAddress\nmetadata: {name: web}\nspec: {addresses: [192.0.2.1]}\n";
    let dir = tempfile::tempdir().expect("a directory");
    fs::write(dir.path().join("web.yaml"), balancer).expect("writable");
    let mut seen = Seen::follow(dir.path());
    let web = ObjectName::new("default", "web");
    write_atomically(&dir.path().join("addresses.yaml"), address);
    assert_eq!(seen.next_deltas(), ["+default/web"]);
    let service = seen.store.service(&web).expect("there");
    assert_eq!(
        service.load_balancer_ips,
        ["192.0.2.1".parse::<std::net::IpAddr>().expect("an address")]
    );
    let status = format!("{balancer}status: {{loadBalancer: {{ingress: [{{ip: 192.0.2.9}}]}}}}\n");
    write_atomically(&dir.path().join("web.yaml"), &status);
    assert_eq!(seen.next_deltas(), ["+default/web"]);
    let service = seen.store.service(&web).expect("there");
    assert_eq!(
        service.load_balancer_ips,
        ["192.0.2.9".parse::<std::net::IpAddr>().expect("an address")]
    );
}

#[test]
fn kinds_of_others_are_counted_not_refused() {
    let text =
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: x}\nspec: {anything: [1]}\n";
    let manifest = parse_manifest("x.yaml", text).expect("fine");
    assert_eq!((manifest.objects.len(), manifest.ignored), (0, 1));
    assert_eq!(Store::new().counts()[0], (Kind::Service, 0));
}

#[test]
fn a_change_that_an_api_server_would_refuse_is_refused_here() {
    let block = |node: &str, epoch: u32| {
        format!(
            "apiVersion: kun.network/v1alpha1\nkind: IPAMBlock\nmetadata: {{name: block-10-64-0-0}}\nspec: {{first: 10.64.0.0, node: {node}, epoch: {epoch}}}\n"
        )
    };
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("block.yaml");
    write_atomically(&path, &block("a", 1));
    let mut seen = Seen::follow(dir.path());
    let owner = |seen: &Seen| {
        let blocks: Vec<String> = seen.store.blocks().map(|b| b.node().to_string()).collect();
        blocks.join(" ")
    };
    assert_eq!(owner(&seen), "a");

    write_atomically(&path, &block("b", 1));
    assert_eq!(
        seen.next_trouble(),
        format!(
            "{}:1:1: spec.epoch: another owner in the same epoch; write a higher epoch with each new owner (its 1 last good objects stay in force)",
            path.display()
        )
    );
    assert_eq!(owner(&seen), "a");

    write_atomically(&path, &block("b", 2));
    assert_eq!(seen.next_deltas(), ["+block-10-64-0-0"]);
    assert_eq!(owner(&seen), "b");
}
