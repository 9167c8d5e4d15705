"""Records of runs: `results/runs/<experiment>/<run_id>/record.json`, written once, read by tables. Needs no torch."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 2
STATUSES = ("done", "failed", "diverged")
CURVE_POINTS = 500


class RecordError(ValueError):
    """A record that is not what it should be; the text names it and says what to do."""


def record_path(results_dir: str | Path, experiment: str, run_id: str) -> Path:
    return Path(results_dir) / "runs" / experiment / run_id / "record.json"


def work_dir(output_dir: str | Path, experiment: str, run_id: str) -> Path:
    """Where a run's checkpoints, log and progress are."""
    return Path(output_dir) / experiment / run_id


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all: written to a temporary name beside it, and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w") as file:
        json.dump(value, file, indent=1, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """Raises FileNotFoundError, and RecordError for what is no JSON object."""
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise RecordError(f"{path}: not a record ({error}); remove it to have the run done again") from error
    if not isinstance(found, dict):
        raise RecordError(
            f"{path}: expected a record, got a {type(found).__name__}; remove it to have the run done again"
        )
    return found


def read_record(path: Path) -> dict[str, Any] | None:
    """None where there is none. A record of another schema, or one that cannot be read, is a RecordError."""
    try:
        record = read_json(path)
    except FileNotFoundError:
        return None
    version = record.get("schema_version")
    if version != SCHEMA_VERSION:
        todo = "; `python -m scripts.migrate` renames its settings, the numbers stay" if version == 1 else ""
        raise RecordError(f"{path}: expected schema_version {SCHEMA_VERSION}, got {version}{todo}")
    return record


def read_records(results_dir: str | Path, experiment: str) -> list[dict[str, Any]]:
    """All of an experiment, in the order of their ids."""
    paths = sorted((Path(results_dir) / "runs" / experiment).glob("*/record.json"))
    return [record for path in paths if (record := read_record(path))]


def is_final(record: dict[str, Any] | None) -> bool:
    """Whether the run need not be tried again; a failed one may be."""
    return record is not None and record["status"] in ("done", "diverged")


def thin(points: list[list[float]], most: int = CURVE_POINTS) -> list[list[float]]:
    """At most so many of a curve's points, evenly spread, the last one among them."""
    if len(points) <= most:
        return points
    return [points[round((i + 1) * len(points) / most) - 1] for i in range(most)]


@contextlib.contextmanager
def claim(folder: Path, name: str = "lock") -> Iterator[bool]:
    """Whether this process has the run of this folder of records to itself.

    The system frees a claim with the process that held it, whatever ended that.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{name}").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
