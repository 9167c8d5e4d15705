"""Tables from records alone: `python -m scripts.tables`. Needs no torch.

`results/tables/<table>.{csv,md,tex}` hold the runs of profile paper, `<table>_cpu.*` and `<table>_smoke.*` those of
the scaled profiles. A profile without any record has no file. The csv is long, one line a cell, in the units of
`results/paper.csv`; mean and standard deviation (of a sample) are over seeds that are done, whose ids it lists.
"""

import argparse
import csv
import io
import math
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from experiments import files
from experiments.config import PROFILES, run_id
from experiments.records import MOST_BYTES, RecordError, read_records
from scripts import efficiency, efficiency_bench, efficiency_tables
from scripts.pages import renew, write
from scripts.plan import CELLS, CHOICE_SEED, METRICS, TABLES, Cell, Metric, Table

HALF = re.compile(r"^.*\| +b?float16 \|.*\n", re.MULTILINE)  # lines of 16 bits, left out of pages to stay readable
PAPER = Path(__file__).parent.parent / "results" / "paper.csv"
COLUMNS = (
    *("row", "column", "metric", "n", "mean", "std", "best_mean", "best_std"),
    *("paper", "paper_confirmed", "run_ids"),
)

NOT_PAPERS = "A blank in the paper's column: the paper has no such row."

Records = dict[str, dict[str, Any]]  # by run id


@dataclass(frozen=True)
class Published:
    value: float
    std: float | None
    confirmed: bool
    source: str


@dataclass
class Entry:
    """A cell and what was measured for it, in the table's unit."""

    cell: Cell
    done: list[dict[str, Any]] = field(default_factory=list)  # records, by seed
    others: list[dict[str, Any]] = field(default_factory=list)  # failed and diverged ones
    paper: Published | None = None

    @property
    def metric(self) -> Metric:
        return METRICS[self.cell.metric]

    def values(self, which: str, metric: Metric | None = None) -> list[float]:
        """By seed; empty where a record does not have this number."""
        metric = metric or self.metric
        values = [(record | record["metrics"][which]).get(metric.key) for record in self.done]
        return [] if None in values else [value * metric.scale for value in values]

    def mean(self, which: str = "last", metric: Metric | None = None) -> float | None:
        values = self.values(which, metric)
        return statistics.fmean(values) if values else None

    def std(self, which: str = "last", metric: Metric | None = None) -> float | None:
        """Of a sample (ddof = 1)."""
        values = self.values(which, metric)
        return statistics.stdev(values) if len(values) > 1 else None

    @property
    def seeds(self) -> list[int]:
        return [record["seed"] for record in self.done]

    def of_seeds(self, seeds: Iterable[int]) -> "Entry":
        """The same cell, of these seeds only."""
        return replace(self, done=[record for record in self.done if record["seed"] in seeds])


def load(results_dir: str | Path) -> Records:
    experiments = dict.fromkeys(cell.experiment for cell in CELLS)
    found = [record for name in experiments for record in read_records(results_dir, name)]
    files: dict[tuple[str, str], dict[str, Any]] = {}  # a record of each dataset
    for record in found:
        if "dataset_sha256" in record.get("facts", {}):
            name = record["config"]["data"]["dataset"]
            first = files.setdefault((record["profile"], name), record)
            if record["facts"]["dataset_sha256"] != first["facts"]["dataset_sha256"]:
                raise RecordError(
                    f"records {first['run_id']} and {record['run_id']} are of two files {name}: their scores are not "
                    "joined; remove those of one"
                )
    return {record["run_id"]: record for record in found}


PAPER_COLUMNS = ("table", "row", "column", "metric", "value", "std", "confirmed", "source")


def read_paper(path: Path = PAPER) -> dict[tuple[str, str, str, str], Published]:
    """The published values by table, row, column and metric.

    Raises RecordError: the file lacks something, or a line is not what it should be; the text names both.
    """
    try:
        lines = list(csv.DictReader(io.StringIO(files.read(path, RecordError, MOST_BYTES).decode()), strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RecordError(f"{path}: expected a table of published values ({error}); `git checkout` it") from error
    found: dict[tuple[str, str, str, str], Published] = {}
    for number, line in enumerate(lines, 2):
        key = tuple(line.get(column) for column in PAPER_COLUMNS[:4])
        problem = None if set(line) == set(PAPER_COLUMNS) and None not in line.values() else f"columns {PAPER_COLUMNS}"
        problem = problem or (None if line["confirmed"] in ("yes", "no") else "confirmed as yes or no")
        problem = problem or (None if line["source"].strip() else "a source")
        problem = problem or (f"{key} once" if key in found else None)
        try:
            value, std = float(line["value"] or "nan"), float(line["std"] or 0)
        except (KeyError, TypeError, ValueError):
            value = std = math.nan
        if problem or not (math.isfinite(value) and math.isfinite(std)):
            text = problem or "value and std as finite numbers"
            raise RecordError(f"{path}, line {number}: expected {text}, got {','.join(map(str, line.values()))!r:.100}")
        found[key] = Published(value, std if line["std"] else None, line["confirmed"] == "yes", line["source"])
    if not found:
        raise RecordError(f"{path}: expected a table of published values, it has none; `git checkout` it")
    return found


def entries(table: str, profile: str, records: Records, paper: dict) -> list[Entry]:
    """The cells of a table in its order, each with its runs of all seeds."""
    seeds = sorted({record["seed"] for record in records.values()})
    found = []
    for cell in CELLS:
        if cell.table != table or profile not in cell.profiles:
            continue
        entry = Entry(cell, paper=paper.get((table, cell.row, cell.column, cell.metric)))
        for seed in cell.seeds or (seed for seed in seeds if seed < CHOICE_SEED):
            record = records.get(run_id({**cell.config(profile), "seed": seed}))
            if record is not None:
                (entry.done if record["status"] == "done" else entry.others).append(record)
        found.append(entry)
    return found


def common_seeds(found: list[Entry]) -> list[int]:
    """Those that every entry with a record has: what rows are compared over."""
    seeds = [set(entry.seeds) for entry in found if entry.done]
    return sorted(set.intersection(*seeds)) if seeds else []


# -- what a reader sees


def plus_minus(entry: Entry, which: str, metric: Metric | None = None) -> str:
    metric = metric or entry.metric
    if not entry.values(which, metric):
        return ""
    mean, std = metric.format(entry.mean(which, metric)), entry.std(which, metric)
    return mean if std is None else f"{mean} ± {metric.format(std)}"


def published(entry: Entry) -> str:
    if entry.paper is None:
        return ""
    text = entry.metric.format(entry.paper.value)
    if entry.paper.std is not None:
        text += f" ± {entry.metric.format(entry.paper.std)}"
    return text if entry.paper.confirmed else text + " †"


def measured(entry: Entry) -> str:
    """The last value, and how many runs gave none."""
    statuses = Counter(record["status"] for record in entry.others)
    troubles = ", ".join(f"{count} {status}" for status, count in sorted(statuses.items()))
    value = plus_minus(entry, "last")
    return f"{value} ({troubles})" if value and troubles else value or troubles


def seconds_a_step(done: list[dict[str, Any]]) -> float:
    """Of training a character model, without its evaluations: mean over seeds."""
    config = done[0]["config"]
    tokens = config["train"]["batch_size"] * config["data"]["block_size"]
    return statistics.fmean(tokens / record["tokens_per_second"] for record in done)


def parameters(entry: Entry) -> str:
    return f"{entry.done[0]['parameters']:,}" if entry.done else ""


def grid(table: str, profile: str, found: list[Entry]) -> tuple[list[str], list[list[str]]]:
    """Header and lines. Ours is compared with a published value only at its scale."""
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


def wide_grid(shown: Table, found: list[Entry]) -> tuple[list[str], list[list[str]]]:
    """Rows side by side; a line for each column of the table and each of last, best, more and the published value."""
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


def judged_by(entry: Entry) -> str:
    """Published losses are those of the best point, accuracies of the last."""
    return "last" if entry.metric.higher_is_better else "best"


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


def scale(table: str, found: list[Entry]) -> list[tuple[str, str, str]]:
    """The settings that make a run large or small: name, ours, the paper's."""
    ours = [record["config"] for entry in found for record in (*entry.done, *entry.others)]
    theirs = [entry.cell.paper_scale() for entry in found]
    return [(name, _values(key, ours), _values(key, theirs)) for key, name in TABLES[table].settings]


def _seeds(seeds: list[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}" if seeds else "no seed"


def _values(key: str, configs: list[dict[str, Any]]) -> str:
    section, name = key.split(".")
    return " or ".join(f"{value:,}" for value in sorted({config[section][name] for config in configs}))


def machines(records: list[dict[str, Any]]) -> list[str]:
    """Each once, in order of its name."""
    hardware = [record["hardware"] for record in records if record.get("hardware")]
    return sorted({h["gpu"] if "gpu" in h else f"{h['cpu']} ({_cores(h)})" for h in hardware}) or ["unknown"]


def _cores(hardware: dict[str, Any]) -> str:
    threads = hardware.get("threads")
    said = "" if threads is None else f", {threads} thread{'s' if threads > 1 else ''} per run"
    return f"{hardware['cores']} cores{said}"


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


def markdown_grid(header: list[str], lines: list[list[str]], left: tuple[int, ...] = (0,)) -> str:
    """Aligned in the source too: to the right, where numbers stand, but for the columns `left`."""
    widths = [max(2, *(len(line[i]) for line in (header, *lines))) for i in range(len(header))]
    pad = [str.ljust if i in left else str.rjust for i in range(len(header))]
    rule = ["-" * width if i in left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]

    def line(cells):
        return "| " + " | ".join(f(cell, width) for f, cell, width in zip(pad, cells, widths, strict=True)) + " |"

    return "\n".join([line(header), line(rule), *map(line, lines)])


def markdown(table: str, profile: str, found: list[Entry]) -> str:
    parts = [caption(table, profile, found), markdown_grid(*grid(table, profile, found)), " ".join(notes(found))]
    return "\n\n".join(filter(None, parts)) + "\n"


def latex(table: str, profile: str, found: list[Entry]) -> str:
    header, lines = grid(table, profile, found)
    rows = [" & ".join(map(_escape, line)) + r" \\" for line in (header, *lines)]
    text = _escape(" ".join([caption(table, profile, found), *notes(found)]))
    return "\n".join(
        [
            "% needs \\usepackage{booktabs}",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{text}}}",
            rf"\label{{tab:{file_name(table, profile)}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            r"\toprule",
            rows[0],
            r"\midrule",
            *rows[1:],
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _escape(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {char: "\\" + char for char in "&%$#_{}"} | {"±": r"$\pm$", "†": r"$^\dagger$"}
    return re.sub(r"(?<![\w.])-(?=\d)", "$-$", "".join(special.get(char, char) for char in text))


def long(found: list[Entry]) -> str:
    """The csv's text. Numbers are not rounded to what the reader's table shows."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for entry in found:
        more = [(head, metric) for head, metric, _ in TABLES[entry.cell.table].more]
        for column, name in ((entry.cell.column, entry.cell.metric), *more):
            numbers = [f(which, METRICS[name]) for which in ("last", "best") for f in (entry.mean, entry.std)]
            line = [entry.cell.row, column, name, len(entry.done)]
            line += ["" if number is None else f"{number:.10g}" for number in numbers]
            paper = entry.paper if name == entry.cell.metric else None
            line += [f"{paper.value:g}", "yes" if paper.confirmed else "no"] if paper else ["", ""]
            writer.writerow([*line, " ".join(record["run_id"] for record in entry.done)])
    return out.getvalue()


# -- files


def file_name(table: str, profile: str) -> str:
    return table if profile == "paper" else f"{table}_{profile}"


def measured_tables(records: Records, paper: Path = PAPER) -> Iterator[tuple[str, str, list[Entry]]]:
    """(table, profile, its cells) of each that has any record."""
    values = read_paper(paper)
    for table in TABLES:
        for profile in sorted({record["profile"] for record in records.values()}, key=PROFILES.index, reverse=True):
            found = entries(table, profile, records, values)
            if any(entry.done or entry.others for entry in found):
                yield table, profile, found


def write_all(results_dir: str | Path, paper: Path = PAPER) -> list[Path]:
    """Returns the files for reading (md)."""
    written = []
    for table, profile, found in measured_tables(load(results_dir), paper):
        path = Path(results_dir) / "tables" / f"{file_name(table, profile)}.md"
        write(path, markdown(table, profile, found))
        write(path.with_suffix(".csv"), long(found))
        write(path.with_suffix(".tex"), latex(table, profile, found))
        written.append(path)
    return written + write_efficiency(results_dir, paper)


def write_efficiency(results_dir: str | Path, paper: Path = PAPER) -> list[Path]:
    """The paper's claims and each part, for reading; as csv layers by size, and each other part."""
    written, values = [], read_paper(paper)
    for (profile, machine), parts in efficiency.load(results_dir).items():
        ending = efficiency.slug(profile, machine)
        folder = Path(results_dir) / "tables"
        others = {name: part for name, part in parts.items() if part.kind in efficiency_bench.GRIDS}
        if layers := {name: part for name, part in parts.items() if name not in others}:
            write(folder / f"efficiency_{ending}.csv", efficiency_tables.long(layers))
        for name, part in others.items():
            write(folder / f"efficiency_{name}_{ending}.csv", efficiency_tables.long({name: part}))
        for name, text in efficiency_texts(parts, values).items():
            path = folder / f"efficiency_{name}_{ending}.md"
            write(path, text)
            written.append(path)
    return written


def efficiency_texts(parts: dict[str, efficiency.Part], values: dict) -> dict[str, str]:
    texts = {"claims": efficiency_claims(parts, values)} if "train" in parts else {}
    for name, part in parts.items():
        texts[name] = f"{efficiency_tables.caption(part)}\n\n{markdown_grid(*efficiency_tables.grid(part))}\n"
    return texts


def efficiency_claims(parts: dict[str, efficiency.Part], values: dict) -> str:
    found = {row: value.value for (table, row, _, _), value in values.items() if table == "efficiency"}
    table = markdown_grid(*efficiency_tables.claims_grid(parts, found))
    return f"{efficiency_tables.CLAIMED} {parts['train'].machine}.\n\n{table}\n"


def blocks(results_dir: str | Path, paper: Path = PAPER) -> dict[str, str]:
    """What the pages show, by the names of their marks: every file for reading."""
    found, values = {}, read_paper(paper)
    for table, profile, cells in measured_tables(load(results_dir), paper):
        found[f"table:{file_name(table, profile)}"] = markdown(table, profile, cells)
    for key, parts in efficiency.load(results_dir).items():
        for name, text in efficiency_texts(parts, values).items():
            found[f"table:efficiency_{name}_{efficiency.slug(*key)}"] = HALF.sub("", text)
    return found


def results_dir_argument(description: str) -> str:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--results-dir", default="results", help="holds runs/; files are written here (results)")
    return parser.parse_args().results_dir


def command(main: Callable[[], int | None]) -> None:
    """Ends the process; what is wrong with a record is said in one line."""
    try:
        sys.exit(main())
    except RecordError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def main() -> None:
    """Pages show the tables of their own results folder."""
    results_dir = results_dir_argument(__doc__.splitlines()[0])
    for path in write_all(results_dir):
        print(path)
    if results_dir == "results":
        for name, text in blocks(results_dir).items():
            renew(name, text)


if __name__ == "__main__":
    command(main)
