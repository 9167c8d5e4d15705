"""Records of runs: `results/runs/<experiment>/<run_id>/record.json`, written once, read by tables. Needs no torch."""

import json
import re
import time
from pathlib import Path
from typing import Any

from . import config, files

SCHEMA_VERSION = 2
STATUSES = ("done", "failed", "diverged")
CURVE_POINTS = 500
MOST_BYTES = 64 * 2**20  # of a record
NUMBERS = re.compile(r"\[\n([^\[\]{}\"]*)\]")  # a list of them, with an indent; a string has no line end in it


class RecordError(files.Refusal, ValueError):
    """An invalid record; the text names it and says what to do."""


def record_path(results_dir: str | Path, experiment: str, run_id: str) -> Path:
    return Path(results_dir) / "runs" / experiment / run_id / "record.json"


def work_dir(output_dir: str | Path, experiment: str, run_id: str) -> Path:
    """The folder of a run's checkpoints, log and progress."""
    return Path(output_dir) / experiment / run_id


def header(settings: dict[str, Any], **made_with: Any) -> dict[str, Any]:
    """The first entries of every record: its run's settings, and how and when it was made."""
    first = {"schema_version": SCHEMA_VERSION, "run_id": config.run_id(settings)}
    first |= {key: settings[key] for key in ("experiment", "profile")} | {"config": settings, "seed": settings["seed"]}
    return first | made_with | {"started": time.time()}


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically; lists of numbers, such as a curve's point, take one line, for readable diffs."""
    text = json.dumps(value, indent=1, allow_nan=False)
    files.write(path, NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text) + "\n")


def read_json(path: Path, again: str = "remove it to have the run done again") -> dict[str, Any]:
    """The JSON object in a file. Raises FileNotFoundError, and RecordError if it is not one of finite numbers."""
    try:
        found = json.loads(files.read(path, RecordError, MOST_BYTES).decode(), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(f"{path}: not a record ({error}); {again}") from error
    if not isinstance(found, dict):
        raise RecordError(f"{path}: expected a record, got a {type(found).__name__}; {again}")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"expected finite numbers, got {constant}")


def read_record(path: Path) -> dict[str, Any] | None:
    """The record in a file, or None where there is no file.

    Raises RecordError: it cannot be read, has another schema, lacks something, or does not match its folder or the
    hash of its settings.
    """
    try:
        record = read_json(path)
    except FileNotFoundError:
        return None
    version = record.get("schema_version")
    if version != SCHEMA_VERSION:
        todo = "; `python -m scripts.migrate` renames its settings, the numbers stay" if version == 1 else ""
        raise RecordError(f"{path}: expected schema_version {SCHEMA_VERSION}, got {version!r}{todo}")
    problem = _problem(path, record)
    if problem:
        raise RecordError(f"{path}: {problem}; remove it to have the run done again")
    return record


def _problem(path: Path, record: dict[str, Any]) -> str | None:
    measured = record.get("experiment") == "efficiency"  # it has points instead of a seed and metrics
    kinds = {"run_id": str, "experiment": str, "profile": str, "config": dict}
    kinds |= {} if measured else {"seed": int, "metrics": dict}
    for key, kind in kinds.items():
        if not isinstance(record.get(key), kind) or isinstance(record[key], bool):
            return f"expected {key} as {kind.__name__}, got {record.get(key)!r:.60}"
    if record.get("status") not in STATUSES:
        return f"expected a status of {STATUSES}, got {record.get('status')!r:.60}"
    if not measured and not isinstance(record.get("ended"), int | float):
        return f"expected ended as a number, got {record.get('ended')!r:.60}"
    place = (path.parent.parent.name, path.parent.name)
    if place != (record["experiment"], record["run_id"]):
        return f"the record of {record['experiment']} {record['run_id']} lies in the folder of {'/'.join(place)}"
    try:
        found = config.run_id(record["config"])
    except (KeyError, TypeError, AttributeError) as error:
        return f"expected the settings of a run, got what lacks {error}"
    if found != record["run_id"] or record.get("seed", record["config"]["seed"]) != record["config"]["seed"]:
        return f"its settings are those of run {found} (or a default has changed)"
    if record["status"] == "done" and not measured:
        for which in ("last", "best"):
            values = record["metrics"].get(which)
            if not isinstance(values, dict) or not all(type(value) in (int, float) for value in values.values()):
                return f"expected metrics.{which} as numbers by name, got {values!r:.60}"
    return None


def read_records(results_dir: str | Path, experiment: str) -> list[dict[str, Any]]:
    """All records of an experiment, in the order of their ids."""
    paths = sorted((Path(results_dir) / "runs" / experiment).glob("*/record.json"))
    return [record for path in paths if (record := read_record(path))]


def is_final(record: dict[str, Any] | None) -> bool:
    """Whether the run need not be tried again; a failed one may be."""
    return record is not None and record["status"] in ("done", "diverged")


def thin(points: list[list[float]], most: int = CURVE_POINTS) -> list[list[float]]:
    """At most `most` of a curve's points, evenly spread, the last one included."""
    if len(points) <= most:
        return points
    return [points[round((i + 1) * len(points) / most) - 1] for i in range(most)]
