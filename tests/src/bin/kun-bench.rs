//! `kun-bench [PART] [--output json]`: runs the parts, prints a table for people or the rows as JSON.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::Parser;
use comfy_table::{CellAlignment, Table, presets::UTF8_BORDERS_ONLY};
use kun_tests::bench::{Context, PARTS, Row, cluster, counts};

/// Measures kun on this machine.
#[derive(Parser)]
struct Arguments {
    /// One part alone: ebpf, cni, proxy, dns, nat64, bgp, cluster.
    part: Option<String>,
    /// `table` or `json`.
    #[arg(long, default_value = "table", value_parser = ["table", "json"])]
    output: String,
    /// Count instructions instead: for a guest whose clock advances one nanosecond an instruction.
    #[arg(long)]
    instructions: bool,
    /// Only follow this source (`folder` or `api`) until it is synced, and say what that took: what the part `cluster` measures.
    #[arg(long, requires = "from", hide = true)]
    follow: Option<String>,
    /// The folder, or the kubeconfig.
    #[arg(long, hide = true)]
    from: Option<PathBuf>,
    /// Rows measured elsewhere, as JSON, that belong to the result.
    #[arg(long)]
    rows: Option<PathBuf>,
}

fn main() -> ExitCode {
    match measure(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("kun-bench: {e:#}");
            ExitCode::from(2)
        }
    }
}

/// Whether every budget holds and every part ran.
fn measure(arguments: &Arguments) -> Result<bool> {
    if let (Some(source), Some(path)) = (&arguments.follow, &arguments.from) {
        println!(
            "{}",
            serde_json::to_string(&cluster::follow(source, path)?)?
        );
        return Ok(true);
    }
    let names: Vec<&str> = PARTS.iter().map(|(name, _)| *name).collect();
    if let Some(part) = &arguments.part {
        anyhow::ensure!(
            names.contains(&part.as_str()),
            "{part}: no such part; the parts are {}",
            names.join(", ")
        );
    }
    let wanted = |name: &str| arguments.part.as_deref().is_none_or(|only| only == name);
    if arguments.instructions {
        let rows = counts::run(wanted)?;
        println!("{}", serde_json::to_string_pretty(&rows)?);
        return Ok(true);
    }
    let mut rows = Vec::new();
    let context = Context::new()?;
    let mut all_ran = true;
    for (name, run) in PARTS {
        if !wanted(name) {
            continue;
        }
        eprintln!("{name} …");
        match run(&context) {
            Ok(more) => rows.extend(more),
            Err(e) => {
                all_ran = false;
                eprintln!("{name}: {e:#}");
            }
        }
    }
    if let Some(file) = &arguments.rows {
        let text = std::fs::read(file).with_context(|| format!("reading {}", file.display()))?;
        let more: Vec<Row> =
            serde_json::from_slice(&text).with_context(|| file.display().to_string())?;
        rows.extend(more);
    }
    if arguments.output == "json" {
        println!("{}", serde_json::to_string_pretty(&rows)?);
    } else {
        println!("{}", table(&rows));
    }
    Ok(all_ran && rows.iter().all(|row| row.holds != Some(false)))
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_BORDERS_ONLY);
    table.set_header([
        "figure", "value", "unit", "budget", "holds", "peer", "peer's",
    ]);
    for row in rows {
        table.add_row([
            row.name.clone(),
            figure(row.value),
            row.unit.clone(),
            row.budget.map(figure).unwrap_or_default(),
            match row.holds {
                Some(true) => "yes".into(),
                Some(false) => "NO".into(),
                None => String::new(),
            },
            row.peer.clone().unwrap_or_default(),
            row.peer_value.map(figure).unwrap_or_default(),
        ]);
    }
    for column in [1, 3, 6] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// Three significant figures below a thousand, whole numbers above.
fn figure(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}
