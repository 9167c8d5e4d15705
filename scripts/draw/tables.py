"""Tables from records alone, `python -m scripts.tables`. Needs no torch.

`results/tables/<table>.{csv,md,tex}` hold the runs of profile paper, `<table>_cpu.*` and `<table>_smoke.*` those of
the scaled profiles. A profile without any record has no file. The csv is long, one line a cell, in the units of
`results/paper.csv`; mean and standard deviation (of a sample) are over seeds that are done, whose ids it lists.
"""

from collections import Counter
from pathlib import Path

from experiments.grid import METRICS, TABLES, Metric, Table

from . import efficiency, grids
from .cells import PAPER, Entry, common_seeds, file_name, judged_by, load, machines, measured_tables, read_paper, scale
from .efficiency import tables as efficiency_tables
from .pages import write

COLUMNS = (
    *("row", "column", "metric", "n", "mean", "std", "best_mean", "best_std"),
    *("paper", "paper_confirmed", "run_ids"),
)
NOT_PAPERS = "A blank in the paper's column: the paper has no such row."


def plus_minus(entry: Entry, which: str, metric: Metric | None = None) -> str:
    metric, mean = metric or entry.metric, entry.mean(which, metric)
    return "" if mean is None else metric.format(mean, entry.std(which, metric))


def published(entry: Entry) -> str:
    if entry.paper is None:
        return ""
    return entry.metric.format(entry.paper.value, entry.paper.std) + ("" if entry.paper.confirmed else " †")


def measured(entry: Entry) -> str:
    """The last value, and the number of runs that gave none."""
    statuses = Counter(record["status"] for record in entry.others)
    troubles = ", ".join(f"{count} {status}" for status, count in sorted(statuses.items()))
    value = plus_minus(entry, "last")
    return f"{value} ({troubles})" if value and troubles else value or troubles


def parameters(entry: Entry) -> str:
    return f"{entry.done[0]['parameters']:,}" if entry.done else ""


def grid(table: str, profile: str, found: list[Entry]) -> grids.Grid:
    """Header and lines of a table. Our values are compared with published ones only at their scale."""
    shown = TABLES[table]
    if shown.wide:
        return wide_grid(shown, found)
    column, more = shown.column, shown.more
    units = dict.fromkeys(entry.metric.unit for entry in found)
    unit = f", {next(iter(units))}" if len(units) == 1 and any(units) else ""
    compared = profile in shown.published_scale
    header = ["model", *([column] if column else []), f"last{unit}", f"best{unit}", *(head for head, _, _ in more)]
    header += ["n", "parameters"]
    lines = []
    for entry in found:
        line = [entry.cell.row, *([entry.cell.column] if column else [])]
        line += [measured(entry), plus_minus(entry, "best")]
        line += [plus_minus(entry, which, METRICS[metric]) for _, metric, which in more]
        line += [str(len(entry.done) or ""), parameters(entry), published(entry)]
        if compared:
            known = entry.done and entry.paper
            line.append(f"{entry.mean(judged_by(entry)) - entry.paper.value:+.{entry.metric.digits}f}" if known else "")
        lines.append(line)
    header += [f"{shown.published}{unit}"] + ([f"ours - {shown.published}"] if compared else [])
    if not any(entry.paper for entry in found):
        kept = len(header) - 1 - compared
        return header[:kept], [line[:kept] for line in lines]
    return header, lines


def wide_grid(shown: Table, found: list[Entry]) -> grids.Grid:
    """A table with its rows side by side, and a line for last, best, more and the published value in each column."""
    rows = dict.fromkeys(entry.cell.row for entry in found)
    kinds = {"last": measured, "best": lambda entry: plus_minus(entry, "best")}
    kinds |= {
        head: lambda entry, which=which, metric=METRICS[metric]: plus_minus(entry, which, metric)
        for head, metric, which in shown.more
    }
    kinds |= {"n": lambda entry: str(len(entry.done) or ""), shown.published: published}
    if shown.column == "learning rate":  # which the best point decides
        kinds = {"best": kinds["best"]}
    lines = []
    for column in dict.fromkeys(entry.cell.column for entry in found):
        here = {entry.cell.row: entry for entry in found if entry.cell.column == column}
        for name, text in kinds.items():
            cells = [text(here[row]) if row in here else "" for row in rows]
            if any(cells):
                lines.append([column, name, *cells])
    return [shown.column, "", *rows], lines


def caption(table: str, profile: str, found: list[Entry]) -> str:
    shown = TABLES[table]
    own = profile in shown.published_scale
    records = [record for entry in found for record in (*entry.done, *entry.others)]
    labels = " and ".join(dict.fromkeys(entry.metric.label for entry in found))
    seeds = sorted({record["seed"] for record in records})
    text = f"{TABLES[table].caption} {labels[0].upper()}{labels[1:]}: mean ± sample standard deviation (ddof = 1) over "
    text += f"n runs ({_seeds(seeds)}), after the last step (last) and at the step with the best validation (best). "
    if len({len(entry.done) for entry in found if entry.done}) > 1:
        shared = common_seeds(found)
        text += f"Rows differ in n; they share {_seeds(shared)}. "
    if any(record["config"]["eval"].get("whole") for record in records):
        patience = sorted(
            {record["config"]["train"]["patience"] for record in records if record["config"]["eval"]["whole"]}
        )
        text += "Validation uses the whole validation text, and training ends after "
        text += f"{' or '.join(map(str, patience))} evaluations without a lower loss. "
    sizes = scale(table, found)
    if own:
        listed = ", ".join(f"{name} {ours}" for name, ours, _ in sizes)
        text += f"{'The paper' if shown.published == 'paper' else shown.published}'s scale: {listed}. "
    else:
        listed = ", ".join(f"{name} {ours} (paper: {theirs})" for name, ours, theirs in sizes)
        text += f"Scaled down (profile {profile}): {listed}. "
        text += "The paper's values are from the paper's own scale. " if any(entry.paper for entry in found) else ""
    return text + f"Run on {'; '.join(machines(records))}."


def _seeds(seeds: list[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}" if seeds else "no seed"


def notes(found: list[Entry]) -> list[str]:
    said = []
    if any(entry.paper and not entry.paper.confirmed for entry in found):
        said.append("† Unconfirmed: recalled, and not found in any source we could reach.")
    if any(entry.paper and "translation" in entry.paper.source for entry in found):
        said.append("The paper's values come from a translation of it.")
    if any(entry.paper is None for entry in found) and any(entry.paper for entry in found):
        whose = TABLES[found[0].cell.table].published
        said.append(f"A blank in the column {whose}: {whose} states no value." if whose != "paper" else NOT_PAPERS)
    return said


def markdown(table: str, profile: str, found: list[Entry]) -> str:
    parts = [caption(table, profile, found), grids.as_markdown(*grid(table, profile, found)), " ".join(notes(found))]
    return "\n\n".join(filter(None, parts)) + "\n"


def latex(table: str, profile: str, found: list[Entry]) -> str:
    text = " ".join([caption(table, profile, found), *notes(found)])
    return grids.as_latex(*grid(table, profile, found), text, file_name(table, profile))


def long(found: list[Entry]) -> str:
    """The csv's text. Numbers are not rounded to what the reader's table shows."""
    lines = []
    for entry in found:
        more = [(head, metric) for head, metric, _ in TABLES[entry.cell.table].more]
        for column, name in ((entry.cell.column, entry.cell.metric), *more):
            numbers = [f(which, METRICS[name]) for which in ("last", "best") for f in (entry.mean, entry.std)]
            line = [entry.cell.row, column, name, len(entry.done), *map(grids.number, numbers)]
            paper = entry.paper if name == entry.cell.metric else None
            line += [f"{paper.value:g}", "yes" if paper.confirmed else "no"] if paper else ["", ""]
            lines.append([*line, " ".join(record["run_id"] for record in entry.done)])
    return grids.as_csv(COLUMNS, lines)


def write_all(results_dir: str | Path, paper: Path = PAPER) -> list[Path]:
    """Writes all tables and returns the files for reading (md)."""
    written = []
    for table, profile, found in measured_tables(load(results_dir), paper):
        path = Path(results_dir) / "tables" / f"{file_name(table, profile)}.md"
        write(path, markdown(table, profile, found))
        write(path.with_suffix(".csv"), long(found))
        write(path.with_suffix(".tex"), latex(table, profile, found))
        written.append(path)
    return written + efficiency_tables.write_all(results_dir, read_paper(paper))


def blocks(results_dir: str | Path, paper: Path = PAPER) -> dict[str, str]:
    """The blocks of the pages, by the names of their marks: every file for reading."""
    found = {
        f"table:{file_name(table, profile)}": markdown(table, profile, cells)
        for table, profile, cells in measured_tables(load(results_dir), paper)
    }
    return found | efficiency_tables.blocks(efficiency.load(results_dir), read_paper(paper))
