//! Answers as tables that fit the terminal. Plain words, no colour: what is not as it should be is marked with `!`. A table whose
//! words would have to be broken is told row by row.

use comfy_table::{ContentArrangement, Table, presets};
use kun_config::types::SlotClass;
use kun_control::{BgpSession, BlockRow, Fact, PoolRow, SlotRow, Status, WhyStep};

/// Text for people, and whether all is as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Shown {
    pub(crate) text: String,
    pub(crate) good: bool,
}

/// `width` in columns; `None`: as wide as the terminal, or as the content where there is none.
fn table(width: Option<u16>, header: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Dynamic);
    if !header.is_empty() {
        table.set_header(header.iter().map(|h| h.to_uppercase()).collect::<Vec<_>>());
    }
    if let Some(width) = width {
        table.set_width(width);
    }
    table
}

fn lines(table: &Table) -> String {
    let mut text = String::new();
    for line in table.lines() {
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// Signs of a last column that can be broken at its spaces.
const LAST: usize = 20;

/// Space before what is told of a row beyond its first line.
const INDENT: &str = "      ";

/// A table, or its rows one after another where it is too narrow for one.
fn rows(width: Option<u16>, header: &[&str], rows: &[Vec<String>]) -> String {
    let mut all = table(width, header);
    all.add_rows(rows);
    let least: usize = (0..header.len())
        .map(|column| {
            let cells = rows.iter().map(|row| row[column].chars().count());
            let longest = cells.fold(header[column].chars().count(), usize::max);
            let last = column + 1 == header.len();
            2 + if last { longest.min(LAST) } else { longest }
        })
        .sum();
    match all.width().map(usize::from) {
        Some(width) if width < least => rows
            .iter()
            .map(|row| in_words(width, header, row))
            .collect(),
        Some(_) | None => lines(&all),
    }
}

/// A row as `HEADER cell  HEADER cell`. What has no header is a mark.
fn in_words(width: usize, header: &[&str], row: &[String]) -> String {
    let mut text = String::new();
    let mut line = String::new();
    let mut put = |word: &str, apart: &str, line: &mut String| {
        let more = line.chars().count() + apart.len() + word.chars().count();
        if more > width && !line.trim().is_empty() {
            text.push_str(line);
            text.push('\n');
            *line = INDENT.to_owned();
        } else if !line.trim().is_empty() {
            line.push_str(apart);
        }
        line.push_str(word);
    };
    for (name, cell) in header.iter().zip(row) {
        let mut words = cell.split_whitespace();
        let Some(first) = words.next() else {
            continue;
        };
        match name.is_empty() {
            true => put(first, " ", &mut line),
            false => put(&format!("{} {first}", name.to_uppercase()), "  ", &mut line),
        }
        words.for_each(|word| put(word, " ", &mut line));
    }
    text + &line + "\n"
}

fn mark(good: bool) -> &'static str {
    if good { "" } else { "!" }
}

/// `kunctl status`.
pub(crate) fn status(status: &Status, width: Option<u16>) -> Shown {
    let mut text = format!(
        "node {}, kun {}, up {}\n",
        status.node,
        status.version,
        span(status.uptime_secs)
    );
    let mut good = true;
    let sections: [(&str, &[Fact]); 5] = [
        ("cluster", &status.cluster),
        ("proxy", &status.proxy),
        ("ipam", &status.ipam),
        ("nat64", &status.nat64),
        ("kernel", &status.kernel),
    ];
    for (name, facts) in sections.into_iter().filter(|(_, facts)| !facts.is_empty()) {
        let mut table = table(width, &[]);
        for fact in facts {
            good &= fact.ok;
            table.add_row([mark(fact.ok), &fact.name, &fact.value]);
        }
        text.push_str(&format!("\n{name}\n{}", lines(&table)));
    }
    if !status.bgp.is_empty() {
        let mut table = table(
            width,
            &[
                "",
                "peer",
                "address",
                "state",
                "since",
                "announced",
                "last error",
            ],
        );
        for session in &status.bgp {
            let established = is_established(session);
            good &= established;
            table.add_row([
                mark(established).to_owned(),
                session.peer.clone(),
                session.address.to_string(),
                session.state.clone(),
                span(session.since_secs),
                session.announced.to_string(),
                session.last_error.clone().unwrap_or_default(),
            ]);
        }
        text.push_str(&format!("\nbgp\n{}", lines(&table)));
    }
    Shown { text, good }
}

fn is_established(session: &BgpSession) -> bool {
    session.state.eq_ignore_ascii_case("established")
}

/// `kunctl why`: one chain of reasons. A drop, or no reason at all, is not as it should be.
pub(crate) fn why(question: &str, steps: &[WhyStep], width: Option<u16>) -> Shown {
    let good = !steps.is_empty() && steps.iter().all(|step| step.what != "drop");
    let mut text = format!("{question}\n");
    if steps.is_empty() {
        text.push_str("no service, route or rule of kun has this destination\n");
        return Shown { text, good };
    }
    let mut table = table(width, &["", "what", "object", "why", "source"]);
    for step in steps {
        table.add_row([
            mark(step.what != "drop"),
            &step.what,
            &step.object,
            &step.detail,
            step.source.as_deref().unwrap_or(""),
        ]);
    }
    text.push_str(&lines(&table));
    Shown { text, good }
}

/// `kunctl ipam`. A slot that is quarantined is not as it should be.
pub(crate) fn ipam(
    pools: &[PoolRow],
    blocks: &[BlockRow],
    slots: &[SlotRow],
    width: Option<u16>,
) -> Shown {
    let mut text = String::new();
    if !pools.is_empty() {
        let header = [
            "pool",
            "ranges",
            "blocks",
            "wanted",
            "allocated",
            "cooling",
            "waiting",
            "quarantined",
            "free",
        ];
        let all = pools.iter().map(|pool| {
            let ranges: Vec<String> = pool.ranges.iter().map(ToString::to_string).collect();
            vec![
                class(pool.class).to_owned(),
                ranges.join(" "),
                pool.blocks.to_string(),
                match pool.wanted {
                    0 => "-".to_owned(),
                    wanted => wanted.to_string(),
                },
                pool.allocated.to_string(),
                pool.cooling.to_string(),
                pool.waiting.to_string(),
                pool.quarantined.to_string(),
                pool.free.to_string(),
            ]
        });
        text.push_str(&rows(width, &header, &all.collect::<Vec<_>>()));
        text.push('\n');
    }
    if !blocks.is_empty() {
        let header = [
            "block",
            "class",
            "phase",
            "epoch",
            "allocated",
            "cooling",
            "free",
        ];
        let all = blocks.iter().map(|block| {
            vec![
                block.block.to_string(),
                class(block.class).to_owned(),
                block.standing.clone(),
                block.epoch.to_string(),
                block.allocated.to_string(),
                block.cooling.to_string(),
                block.free.to_string(),
            ]
        });
        text.push_str(&rows(width, &header, &all.collect::<Vec<_>>()));
        text.push('\n');
    }
    let good = slots.iter().all(|row| row.state != "quarantined");
    if !slots.is_empty() {
        let header = [
            "",
            "slot",
            "class",
            "state",
            "age",
            "gen",
            "ipv6",
            "ipv4",
            "pod",
            "container",
            "free in",
            "why not yet",
        ];
        let all = slots.iter().map(|row| {
            vec![
                mark(row.state != "quarantined").to_owned(),
                row.slot.to_string(),
                class(row.slot.class()).to_owned(),
                row.state.clone(),
                row.age_secs.map(span).unwrap_or_default(),
                row.generation.to_string(),
                row.v6.to_string(),
                row.v4.map(|a| a.to_string()).unwrap_or_default(),
                pod(row),
                format!("{}/{}", shortened(&row.key.container_id), row.key.ifname),
                row.free_in_secs.map(span).unwrap_or_default(),
                row.why.join("; "),
            ]
        });
        text.push_str(&rows(width, &header, &all.collect::<Vec<_>>()));
        text.push('\n');
    }
    let of = |state: &str| slots.iter().filter(|row| row.state == state).count();
    let mut summary = format!("{} allocated, {} cooling", of("allocated"), of("cooling"));
    for (state, words) in [
        ("waiting", "not forgotten yet"),
        ("quarantined", "quarantined"),
    ] {
        if of(state) > 0 {
            summary.push_str(&format!(", {} {words}", of(state)));
        }
    }
    text.push_str(&summary);
    text.push('\n');
    Shown { text, good }
}

fn class(class: SlotClass) -> &'static str {
    match class {
        SlotClass::Dual => "dual",
        SlotClass::V6Only => "v6-only",
    }
}

fn pod(row: &SlotRow) -> String {
    match (row.pod.namespace.as_str(), row.pod.name.as_str()) {
        (_, "") => "-".to_owned(),
        ("", name) => name.to_owned(),
        (namespace, name) => format!("{namespace}/{name}"),
    }
}

/// As container tools show ids.
fn shortened(id: &str) -> String {
    id.chars().take(12).collect()
}

/// Two units are enough: `2d3h`, `4m10s`.
fn span(secs: u64) -> String {
    let (d, h, m, s) = (secs / 86_400, secs / 3600 % 24, secs / 60 % 60, secs % 60);
    match (d, h, m) {
        (0, 0, 0) => format!("{s}s"),
        (0, 0, _) => format!("{m}m{s}s"),
        (0, _, _) => format!("{h}h{m}m"),
        _ => format!("{d}d{h}h"),
    }
}

#[cfg(test)]
mod tests {
    use kun_config::types::Slot;
    use kun_control::{AttachmentKey, PodRef};

    use super::*;

    fn fact(name: &str, value: &str, ok: bool) -> Fact {
        Fact {
            name: name.to_owned(),
            value: value.to_owned(),
            ok,
        }
    }

    fn example() -> Status {
        Status {
            node: "node-a".to_owned(),
            version: "0.1.0".to_owned(),
            uptime_secs: 250,
            cluster: vec![fact("synced", "yes", true)],
            kernel: vec![fact(
                "bpffs",
                "not mounted: state does not outlive a restart of the agent, which then starts all flows anew",
                false,
            )],
            bgp: vec![BgpSession {
                peer: "tor".to_owned(),
                address: "fe80::1".parse().expect("an address"),
                state: "Established".to_owned(),
                since_secs: 3661,
                announced: 4,
                last_error: None,
            }],
            ..Status::default()
        }
    }

    #[test]
    fn status_marks_what_is_wrong() {
        let shown = status(&example(), Some(80));
        assert!(!shown.good);
        assert_eq!(
            shown.text,
            "node node-a, kun 0.1.0, up 4m10s\n\n\
             cluster\n    synced  yes\n\n\
             kernel\n !  bpffs  not mounted: state does not outlive a restart of the agent, which\n\
             \x20          then starts all flows anew\n\n\
             bgp\n    PEER  ADDRESS  STATE        SINCE  ANNOUNCED  LAST ERROR\n\
             \x20   tor   fe80::1  Established  1h1m   4\n"
        );
    }

    #[test]
    fn a_session_that_is_down_is_wrong() {
        let mut down = example();
        down.kernel.clear();
        assert!(status(&down, Some(80)).good);
        down.bgp[0].state = "Active".to_owned();
        assert!(!status(&down, Some(80)).good);
    }

    #[test]
    fn no_line_is_wider_than_the_terminal() {
        for width in [40, 60, 80, 120] {
            for line in status(&example(), Some(width)).text.lines() {
                assert!(
                    line.chars().count() <= usize::from(width),
                    "{width}: {line}"
                );
            }
        }
    }

    #[test]
    fn a_drop_and_an_empty_chain_are_not_good() {
        let step = |what: &str| WhyStep {
            what: what.to_owned(),
            object: "default/web:http".to_owned(),
            detail: "10.96.0.1:80/tcp".to_owned(),
            source: Some("web.yaml:3".to_owned()),
        };
        assert!(why("tcp", &[step("service"), step("backend")], Some(80)).good);
        assert!(!why("tcp", &[step("service"), step("drop")], Some(80)).good);
        assert!(!why("tcp", &[], Some(80)).good);
        assert!(
            why("tcp", &[step("service")], Some(80))
                .text
                .contains("web.yaml:3")
        );
    }

    #[test]
    fn ipam_rows() {
        let row = SlotRow {
            slot: Slot(0x0a40_0001),
            state: "cooling".to_owned(),
            generation: 3,
            v6: "fd00::a40:1".parse().expect("an address"),
            v4: "10.64.0.1".parse().ok(),
            key: AttachmentKey {
                network: "kun".to_owned(),
                container_id: "0123456789abcdef".to_owned(),
                ifname: "eth0".to_owned(),
            },
            pod: PodRef {
                namespace: "shop".to_owned(),
                name: "web-1".to_owned(),
                uid: String::new(),
            },
            free_in_secs: Some(90),
            age_secs: Some(7),
            why: vec!["a-route".to_owned()],
        };
        let shown = ipam(&[], &[], std::slice::from_ref(&row), Some(200));
        assert!(shown.good);
        let words: Vec<&str> = shown
            .text
            .lines()
            .nth(1)
            .expect("a row")
            .split_whitespace()
            .collect();
        assert_eq!(
            words,
            [
                "10.64.0.1",
                "dual",
                "cooling",
                "7s",
                "3",
                "fd00::a40:1",
                "10.64.0.1",
                "shop/web-1",
                "0123456789ab/eth0",
                "1m30s",
                "a-route"
            ]
        );
        assert!(
            shown.text.ends_with("0 allocated, 1 cooling\n"),
            "{}",
            shown.text
        );
        let kept = SlotRow {
            state: "quarantined".to_owned(),
            ..row
        };
        // No word is broken where the table has no room.
        for width in [40, 60, 80] {
            let text = ipam(&[], &[], std::slice::from_ref(&kept), Some(width)).text;
            for word in ["!  SLOT 10.64.0.1", "IPV6 fd00::a40:1", "POD shop/web-1"] {
                assert!(text.contains(word), "{width}: {text}");
            }
            let longest = text.lines().map(|line| line.chars().count()).max();
            assert!(longest <= Some(width.into()), "{width}: {text}");
        }
        let shown = ipam(&[], &[], &[kept], Some(200));
        assert!(!shown.good, "somebody has to look at it");
        assert!(shown.text.ends_with(", 1 quarantined\n"), "{}", shown.text);
    }
}
