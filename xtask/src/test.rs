//! `cargo xtask test`: everything CI runs, cheapest first, with the time of each step and one line that sums up.
//!
//! A skipped test is a hole: every skip must be expected by `tests/expected-skips.toml`, with its reason, else the run fails.

use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use crate::{build, command, ebpf, lab, peers, setup, tidy, vm};

/// Flags of `test`.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// One part alone: ebpf, cni, proxy, dns, nat64, bgp, cluster.
    #[arg(long)]
    only: Option<String>,
}

/// The crates of each part.
const PARTS: &[(&str, &[&str])] = &[
    ("ebpf", &["kun-ebpf-abi", "kun-ebpf-loader"]),
    ("cni", &["kun-cni-core", "kun-cni", "kun-conformance"]),
    ("proxy", &["kun-proxy-core", "kun-proxy", "kun-ebpf-loader"]),
    ("dns", &["kun-dns-core", "kun-dns", "kun-conformance"]),
    ("nat64", &["kun-ebpf-abi", "kun-ebpf-loader"]),
    ("bgp", &["kun-bgp-core", "kun-bgp"]),
    (
        "cluster",
        &[
            "kun-config",
            "kun-cluster-core",
            "kun-cluster",
            "kun-operator",
            "kun-tests",
        ],
    ),
];

/// What the steps counted.
#[derive(Default)]
struct Count {
    passed: u32,
    failed: u32,
    skipped: u32,
}

/// A skip that is expected: `test` and `because` are parts of what was recorded.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Expected {
    test: String,
    because: String,
    #[allow(dead_code, reason = "for the reader of the file")]
    reason: String,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct ExpectedFile {
    #[serde(default)]
    skip: Vec<Expected>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let packages = match &arguments.only {
        None => None,
        Some(part) => Some(crates_of(part)?),
    };
    let began = Instant::now();
    let mut count = Count::default();
    let whole = packages.is_none();
    let programs = matches!(arguments.only.as_deref(), None | Some("ebpf" | "nat64"));
    step(&mut count, "setup", |_| {
        setup::run(&setup::Arguments::default())?;
        match programs {
            true => vm::setup(),
            false => Ok(()),
        }
    })?;
    step(&mut count, "peers", |_| {
        peers::ensure(arguments.only.as_deref())
    })?;
    if whole {
        step(&mut count, "format", |_| {
            quiet(&mut command::cargo(&["fmt", "--all", "--check"]))
        })?;
        step(&mut count, "tidy", |_| tidy::run())?;
        step(&mut count, "clippy", |_| {
            quiet(&mut command::cargo(&[
                "clippy",
                "--workspace",
                "--all-targets",
                "--quiet",
                "--",
                "-D",
                "warnings",
            ]))
        })?;
        step(&mut count, "build", |_| lab::build())?;
    }
    if arguments.only.as_deref() == Some("cluster") {
        // The lab's scenarios run every program.
        step(&mut count, "build", |_| lab::build())?;
    }
    step(&mut count, "tests", |count| tests(packages, count))?;
    if whole || arguments.only.as_deref() == Some("ebpf") {
        step(&mut count, "ebpf toolchain", |_| ebpf::install_toolchain())?;
        step(&mut count, "ebpf --check", |_| ebpf::ebpf(true))?;
    }
    if programs {
        // The oldest kernel that is supported. This machine's own has had its turn.
        step(&mut count, "ebpf under 6.1", |count| {
            count.passed += vm::ebpf_tests(vm::Kernel::V6_1)?;
            Ok(())
        })?;
    }
    if whole {
        let name = ["--name".to_owned(), format!("test{}", std::process::id())];
        step(&mut count, "lab", |count| hold(&name, count))?;
        let mut words = name.to_vec();
        words.push("--control-plane".to_owned());
        step(&mut count, "lab on Kubernetes", |count| hold(&words, count))?;
    }
    println!("in {:.0} s", began.elapsed().as_secs_f64());
    println!(
        "{} passed, {} failed, {} skipped",
        count.passed, count.failed, count.skipped
    );
    Ok(())
}

/// A lab that comes up, holds and goes.
fn hold(words: &[String], count: &mut Count) -> Result<()> {
    let status = lab::program(words).status().context("running kun-lab")?;
    ensure!(status.success(), "the lab did not hold");
    count.passed += 1;
    Ok(())
}

fn crates_of(part: &str) -> Result<&'static [&'static str]> {
    PARTS
        .iter()
        .find(|(name, _)| *name == part)
        .map(|(_, crates)| *crates)
        .with_context(|| {
            let known: Vec<_> = PARTS.iter().map(|(name, _)| *name).collect();
            format!(
                "--only {part}: no such part; the parts are {}",
                known.join(", ")
            )
        })
}

/// One step, with its time; the first that fails ends the run, with the sum so far.
fn step(count: &mut Count, name: &str, work: impl FnOnce(&mut Count) -> Result<()>) -> Result<()> {
    println!("── {name}");
    let began = Instant::now();
    let done = work(count);
    let seconds = began.elapsed().as_secs_f64();
    match done {
        Ok(()) => println!("   {name}: {seconds:.1} s"),
        Err(e) => {
            println!("   {name}: FAILED after {seconds:.1} s: {e:#}");
            println!(
                "{} passed, {} failed, {} skipped",
                count.passed,
                count.failed.max(1),
                count.skipped
            );
            bail!("{name} failed");
        }
    }
    Ok(())
}

/// Runs it, and shows what it said only when it fails.
fn quiet(command: &mut Command) -> Result<()> {
    let what = command::describe(command);
    let output = command
        .output()
        .with_context(|| format!("running {what}"))?;
    if !output.status.success() {
        std::io::stdout().write_all(&output.stdout)?;
        std::io::stdout().write_all(&output.stderr)?;
        bail!("{what}: {}", output.status);
    }
    Ok(())
}

fn tests(packages: Option<&[&str]>, count: &mut Count) -> Result<()> {
    let target = command::target();
    std::fs::create_dir_all(&target)?;
    let skips = target.join("kun-skips");
    let _ = std::fs::remove_file(&skips);
    let mut cargo = command::cargo(&["test", "--no-fail-fast"]);
    match packages {
        None => {
            cargo.arg("--workspace");
        }
        Some(packages) => {
            cargo.args(packages.iter().flat_map(|package| ["-p", package]));
        }
    }
    cargo.env("KUN_SKIPS", &skips);
    if packages.is_none_or(|packages| packages.contains(&"kun-cni")) {
        cargo.env("KUN_CNI_AS_SHIPPED", build::plugin_for_tests()?);
    }
    let status = stream(&mut cargo, &target.join("kun-test.log"), count)?;
    let unexpected = unexpected_skips(&skips, count)?;
    ensure!(
        status.success() && count.failed == 0,
        "{} tests failed",
        count.failed
    );
    ensure!(
        unexpected.is_empty(),
        "skips that tests/expected-skips.toml does not expect:\n{}",
        unexpected.join("\n")
    );
    Ok(())
}

/// Runs the tests; one line for each binary, everything into the log, and failures in full.
fn stream(command: &mut Command, log: &std::path::Path, count: &mut Count) -> Result<ExitStatus> {
    let (reader, writer) = std::io::pipe()?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer)
        .spawn()
        .context("running cargo test")?;
    // The parent's copies of the pipe's end live in `command` until they are replaced.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut log =
        std::fs::File::create(log).with_context(|| format!("writing {}", log.display()))?;
    let live = std::io::stdout().is_terminal();
    let mut binary = String::new();
    let mut began = Instant::now();
    let mut failing = false;
    for line in BufReader::new(reader).lines() {
        let line = line?;
        writeln!(log, "{line}")?;
        let text = line.trim_start();
        if let Some(rest) = text
            .strip_prefix("Running ")
            .or_else(|| text.strip_prefix("Doc-tests "))
        {
            binary = name_of(rest);
            began = Instant::now();
            failing = false;
        } else if let Some((passed, failed, ignored)) = result_of(text) {
            count.passed += passed;
            count.failed += failed;
            count.skipped += ignored;
            if passed + failed + ignored > 0 {
                let seconds = began.elapsed().as_secs_f64();
                println!("   {binary:<40} {passed:>4} passed {failed:>3} failed {seconds:>7.1} s");
            }
            failing = false;
        } else if text == "failures:" || text.starts_with("error") {
            failing = true;
        }
        if failing {
            println!("{line}");
        } else if live && text.starts_with("test ") && text.ends_with(" ... FAILED") {
            println!("   {text}");
        }
    }
    child.wait().context("waiting for cargo test")
}

/// `unittests src/lib.rs (target/debug/deps/kun_cni-0123)` → `kun_cni unittests src/lib.rs`.
fn name_of(running: &str) -> String {
    let (what, path) = running.split_once(" (").unwrap_or((running, ""));
    let file = path
        .rsplit('/')
        .next()
        .unwrap_or_default()
        .trim_end_matches(')');
    let binary = file.rsplit_once('-').map_or(file, |(name, _hash)| name);
    let what = what.trim_start_matches("unittests ");
    format!("{binary} {what}").trim().to_owned()
}

/// `test result: ok. 7 passed; 0 failed; 0 ignored; …` → (7, 0, 0).
fn result_of(line: &str) -> Option<(u32, u32, u32)> {
    let rest = line.strip_prefix("test result: ")?;
    let number = |word: &str| -> Option<u32> {
        let before = rest.split(word).next()?;
        before.trim_end().rsplit(' ').next()?.parse().ok()
    };
    Some((number(" passed")?, number(" failed")?, number(" ignored")?))
}

/// Moves recorded skips from passed to skipped; gives those that nobody expects.
fn unexpected_skips(recorded: &std::path::Path, count: &mut Count) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(recorded).unwrap_or_default();
    let file = command::root().join("tests/expected-skips.toml");
    let expected =
        std::fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
    let expected: ExpectedFile =
        toml::from_str(&expected).with_context(|| format!("{}", file.display()))?;
    let mut unexpected = Vec::new();
    for line in text.lines() {
        let (test, because) = line.split_once('\t').unwrap_or((line, ""));
        count.skipped += 1;
        count.passed = count.passed.saturating_sub(1);
        println!("   skipped: {test}, because {because}");
        if !expected
            .skip
            .iter()
            .any(|e| test.contains(&e.test) && because.contains(&e.because))
        {
            unexpected.push(format!("   {test}, because {because}"));
        }
    }
    Ok(unexpected)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargos_lines_are_read() {
        assert_eq!(
            result_of(
                "test result: FAILED. 7 passed; 2 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.12s"
            ),
            Some((7, 2, 1))
        );
        assert_eq!(result_of("test wait::tests::x ... ok"), None);
        assert_eq!(
            name_of("unittests src/lib.rs (target/debug/deps/kun_cni-0123ab)"),
            "kun_cni src/lib.rs"
        );
        assert_eq!(name_of("kun_cni"), "kun_cni");
    }

    #[test]
    fn a_part_that_does_not_exist_names_those_that_do() {
        let error = crates_of("cnj").unwrap_err().to_string();
        assert!(error.contains("cni, proxy"), "{error}");
    }
}
