"""Records as cells of tables: measured values beside published ones. Needs no torch."""

import csv
import io
import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from experiments import files
from experiments.config import PROFILES, run_id
from experiments.grid import CELLS, CHOICE_SEED, METRICS, TABLES, Cell, Metric
from experiments.records import MOST_BYTES, RecordError, read_records

PAPER = Path(__file__).parents[2] / "results/paper.csv"

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

    @property
    def label(self) -> str:
        return TABLES[self.cell.table].label(self.cell)

    def values(self, which: str, metric: Metric | None = None) -> list[float]:
        """The values by seed; empty where a record does not have this number."""
        metric = metric or self.metric
        values = [(record | record["metrics"][which]).get(metric.key) for record in self.done]
        return [] if None in values else [value * metric.scale for value in values]

    def mean(self, which: str = "last", metric: Metric | None = None) -> float | None:
        values = self.values(which, metric)
        return statistics.fmean(values) if values else None

    def std(self, which: str = "last", metric: Metric | None = None) -> float | None:
        """The standard deviation of the sample (ddof = 1)."""
        values = self.values(which, metric)
        return statistics.stdev(values) if len(values) > 1 else None

    @property
    def seeds(self) -> list[int]:
        return [record["seed"] for record in self.done]

    def of_seeds(self, seeds: Iterable[int]) -> "Entry":
        """The same cell with these seeds only."""
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
    """The seeds that every entry with a record has; rows are compared over these."""
    seeds = [set(entry.seeds) for entry in found if entry.done]
    return sorted(set.intersection(*seeds)) if seeds else []


def file_name(table: str, profile: str) -> str:
    return table if profile == "paper" else f"{table}_{profile}"


def measured_tables(records: Records, paper: Path = PAPER) -> Iterator[tuple[str, str, list[Entry]]]:
    """Yields (table, profile, its cells) for each that has any record."""
    values = read_paper(paper)
    for table in TABLES:
        for profile in sorted({record["profile"] for record in records.values()}, key=PROFILES.index, reverse=True):
            found = entries(table, profile, records, values)
            if any(entry.done or entry.others for entry in found):
                yield table, profile, found


def seconds_a_step(done: list[dict[str, Any]]) -> float:
    """The training seconds per step of a character model, without evaluations: mean over seeds."""
    config = done[0]["config"]
    tokens = config["train"]["batch_size"] * config["data"]["block_size"]
    return statistics.fmean(tokens / record["tokens_per_second"] for record in done)


def judged_by(entry: Entry) -> str:
    """Whether "best" or "last" compares with the published value: losses are published at the best point."""
    return "last" if entry.metric.higher_is_better else "best"


def scale(table: str, found: list[Entry]) -> list[tuple[str, str, str]]:
    """The settings that make a run large or small: name, ours, the paper's."""
    ours = [record["config"] for entry in found for record in (*entry.done, *entry.others)]
    theirs = [entry.cell.paper_scale() for entry in found]
    return [(name, _values(key, ours), _values(key, theirs)) for key, name in TABLES[table].settings]


def _values(key: str, configs: list[dict[str, Any]]) -> str:
    section, name = key.split(".")
    return " or ".join(f"{value:,}" for value in sorted({config[section][name] for config in configs}))


def machines(records: list[dict[str, Any]]) -> list[str]:
    """The distinct machines of the records, by name."""
    hardware = [record["hardware"] for record in records if record.get("hardware")]
    return sorted({h["gpu"] if "gpu" in h else f"{h['cpu']} ({_cores(h)})" for h in hardware}) or ["unknown"]


def _cores(hardware: dict[str, Any]) -> str:
    threads = hardware.get("threads")
    said = "" if threads is None else f", {threads} thread{'s' if threads > 1 else ''} per run"
    return f"{hardware['cores']} cores{said}"
