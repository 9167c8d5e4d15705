"""The report from records alone, `python -m scripts.report`. Needs no torch.

`results/REPORT.md` has the paper's scale and profile cpu, `results/REPORT_smoke.md` profile smoke.
"""

from pathlib import Path

from experiments.grid import CELLS, METRICS, TABLES

from . import efficiency, grids, summary
from .cells import PAPER, Entry, Records, file_name, load, machines, measured_tables, read_paper
from .efficiency import tables as efficiency_tables
from .findings import blank, compared_with_paper, findings, times, troubles
from .pages import write
from .tables import caption, grid, notes

REPORTS = {"REPORT.md": ("paper", "cpu"), "REPORT_smoke.md": ("smoke",)}
PROFILE_NAMES = {"paper": "at the paper's scale", "cpu": "scaled down (profile cpu)", "smoke": "smoke test only"}
FIGURES = (
    (
        "{table}{suffix}",
        "Test accuracy: mean and standard deviation over seeds. Hollow markers are the paper's values, drawn at the "
        "paper's scale only († unconfirmed).",
    ),
    ("{table}_accuracy{suffix}", "Validation accuracy: mean over seeds. The band spans the lowest and highest seed."),
    (
        "{table}_steps{suffix}",
        "Score of evaluations during training: mean over seeds. The band spans the lowest and highest seed.",
    ),
    ("{table}_target{suffix}", "Score reached against score asked for. On the dashed line they are equal."),
    (
        "{table}_interquartile{suffix}",
        "Interquartile mean of the scores of the last weights, with a 95 % bootstrap interval, over the datasets that "
        "every model has with all its seeds.",
    ),
    (
        "{table}_lengths{suffix}",
        "Test accuracy against the length of the test: mean over seeds. The band spans the lowest and highest seed.",
    ),
    ("{table}_loss{suffix}", "Training loss: mean over seeds. The band spans the lowest and highest seed."),
)
RATES = "Best validation value of each model against its learning rate, on one seed."
LANGUAGE = (
    "Validation loss against steps and against training time without evaluations: mean over seeds. The band spans the "
    "lowest and highest seed. The vertical axis is cut."
)


def section(folder: Path, table: str, profile: str, found: list[Entry]) -> str:
    own_scale = profile != "paper" and profile in TABLES[table].published_scale
    parts = [
        f"## {TABLES[table].title}" + ("" if own_scale else f", {PROFILE_NAMES[profile]}"),
        caption(table, profile, found),
        grids.as_markdown(*grid(table, profile, found)),
        " ".join(notes(found)),
    ]
    said = findings(table, profile, found)
    said += compared_with_paper(found) if profile == "paper" else []
    said += blank(found)
    parts.append(_list(said))
    failures = troubles(found)
    if failures:
        parts.append("Failed or diverged:\n\n" + _list(failures))
    parts.append(figures(folder, table, profile, ""))
    parts.append(
        runs(profile, found) + f"\n\nAs data: [{file_name(table, profile)}.csv](tables/{file_name(table, profile)}.csv)"
    )
    return "\n\n".join(filter(None, parts))


def figures(folder: Path, table: str, profile: str, place: str) -> str:
    """The drawn figures of a table, each with its caption; `place` is put before their paths."""
    suffix, shown = "" if profile == "paper" else f"_{profile}", []
    for name, text in FIGURES:
        path = f"figures/{name.format(table=table, suffix=suffix)}.png"
        if (folder / path).exists():
            text = RATES if TABLES[table].column == "learning rate" else text
            text = LANGUAGE if METRICS["val_loss_nats"].key in _metrics(table) and "_loss" in path else text
            shown.append(f"![{TABLES[table].title}]({place}{path})\n\n*{text}*")
    return "\n\n".join(shown)


def _metrics(table: str) -> set[str]:
    return {METRICS[cell.metric].key for cell in CELLS if cell.table == table}


def runs(profile: str, found: list[Entry]) -> str:
    """The command of each row and its records, by seed."""
    lines, count = [], 0
    for entry in found:
        done = entry.done + entry.others
        count += len(done)
        links = [
            f"[{record['run_id']}](runs/{record['experiment']}/{record['run_id']}/record.json) (seed {record['seed']}, "
            f"{record['status']})"
            for record in sorted(done, key=lambda record: record["seed"])
        ]
        seed = next(iter(entry.cell.seeds or (0,)))
        lines.append(f"- {entry.label}: `{entry.cell.command(profile, seed)}`: {', '.join(links) or 'not run'}")
    return f"<details><summary>Commands and runs ({count})</summary>\n\n" + "\n".join(lines) + "\n\n</details>"


def made_with(records: list[dict]) -> str:
    versions = {}
    for record in records:
        for name, version in (record.get("versions") or {}).items():
            if version is not None:
                versions.setdefault(name, set()).add(version)
    commits = {(record.get("git") or {}).get("commit") or "unknown" for record in records}
    dirty = sum(not (record.get("git") or {}).get("clean") for record in records)
    hours = sum(record.get("seconds") or 0 for record in records) / 3600
    listed = ", ".join(f"{name} {' and '.join(sorted(found))}" for name, found in sorted(versions.items()))
    return (
        f"{len(records)} runs, {hours:.1f} hours in all, on {'; '.join(machines(records))}. "
        f"{listed or 'Versions unknown'}. Commits: {', '.join(f'`{commit[:10]}`' for commit in sorted(commits))}"
        + (f"; {dirty} runs from a working tree with changes not committed" if dirty else "")
        + "."
    )


def page(results_dir: str | Path, profiles: tuple[str, ...], records: Records, paper: Path) -> str | None:
    """The report of these profiles, or None where they have no record."""
    chosen = {name: record for name, record in records.items() if record["profile"] in profiles}
    sections = list(measured_tables(chosen, paper))
    shown = {r["run_id"]: r for _, _, found in sections for entry in found for r in (*entry.done, *entry.others)}
    measured = {key: parts for key, parts in efficiency.load(results_dir).items() if key[0] in profiles}
    if not shown and not measured:
        return None
    shown |= {part.record["run_id"]: part.record for parts in measured.values() for part in parts.values()}
    parts = [
        "# Results",
        "`make report` writes this page from the records in `runs/`. Fixed rules turn their numbers into verdicts.",
        made_with(list(shown.values())),
    ]
    parts += [section(Path(results_dir), *table) for table in sections]
    parts += [efficiency_section(Path(results_dir), *key, found, paper) for key, found in measured.items()]
    return "\n\n".join(parts) + "\n"


def efficiency_section(folder: Path, profile: str, machine: str, parts: dict[str, efficiency.Part], paper: Path) -> str:
    ending = efficiency.slug(profile, machine)
    said = [f"## Efficiency on {machine}" + ("" if profile != "smoke" else f", {PROFILE_NAMES[profile]}")]
    if "train" in parts:
        said.append(efficiency_tables.claims(parts, read_paper(paper)))
    found = efficiency.findings(parts) if profile != "smoke" else []
    said.append(_list(found + efficiency.left_out(parts)))
    said.append(efficiency_figures(folder, ending, parts, ""))
    said += map(efficiency_tables.markdown, parts.values())
    records = [
        f"[{part.record['run_id']}](runs/efficiency/{part.record['run_id']}/record.json)" for part in parts.values()
    ]
    said.append(f"Records: {', '.join(records)}. As data: {as_data(parts, ending)}")
    return "\n\n".join(filter(None, said))


def efficiency_figures(folder: Path, ending: str, parts: dict[str, efficiency.Part], place: str) -> str:
    shown = []
    for name, (part, text) in efficiency.FIGURES.items():
        path = f"figures/efficiency_{name}_{ending}.png"
        if part in parts and (folder / path).exists():
            shown.append(f"![{text}]({place}{path})\n\n*{text} {efficiency_tables.caption(parts[part])}*")
    return "\n\n".join(shown)


def blocks(results_dir: str | Path, paper: Path = PAPER) -> dict[str, str]:
    """The blocks of the pages, by the names of their marks; pages in docs/ find figures in ../results."""
    folder, place = Path(results_dir), f"../{results_dir}/"
    records = load(folder)
    found = {"found:times": _list(times(records))} | summary.blocks(folder, paper)
    for table, profile, cells in measured_tables(records, paper):
        name = file_name(table, profile)
        found[f"found:{name}"] = _list(findings(table, profile, cells))
        found[f"figure:{name}"] = figures(folder, table, profile, place)
    for key, parts in efficiency.load(folder).items():
        name = f"efficiency_{efficiency.slug(*key)}"
        found[f"found:{name}"] = _list(efficiency.findings(parts))
        found[f"figure:{name}"] = efficiency_figures(folder, efficiency.slug(*key), parts, place)
    return found


def _list(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def as_data(parts: dict[str, efficiency.Part], ending: str) -> str:
    files = [name for name, part in parts.items() if part.kind in efficiency_tables.bench.GRIDS]
    files = ([""] if len(files) < len(parts) else []) + files
    return ", ".join(f"[{name or 'csv'}](tables/efficiency_{name and name + '_'}{ending}.csv)" for name in files)


def write_all(results_dir: str | Path, paper: Path = PAPER) -> list[Path]:
    records, written = load(results_dir), []
    for name, profiles in REPORTS.items():
        content = page(results_dir, profiles, records, paper)
        if content is not None:
            path = Path(results_dir) / name
            write(path, content)
            written.append(path)
    return written
