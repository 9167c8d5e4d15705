"""The order of the runs that are left, and how long they will take. Needs no torch."""

import importlib.metadata
import json
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from experiments import records
from experiments.grid import Run


@dataclass
class Agenda:
    """The runs in order, and what is known about them.

    Attributes:
        workers: number of runs at once.
        known: records by run id.
    """

    runs: list[Run]
    results_dir: str
    output_dir: str
    workers: int = field(default=1, kw_only=True)
    known: dict[str, dict[str, Any]] = field(default_factory=dict, kw_only=True)

    def __post_init__(self):
        for run in self.runs:
            self.read(run)
        self.before = dict(self.known)

    def place(self, run: Run) -> Path:
        return records.record_path(self.results_dir, run.experiment, run.run_id)

    def folder(self, run: Run) -> Path:
        return records.work_dir(self.output_dir, run.experiment, run.run_id)

    def read(self, run: Run) -> None:
        record = records.read_record(self.place(run))
        if record is not None:
            self.known[run.run_id] = record

    def settled(self, run: Run) -> bool:
        """Whether the run need not be tried: it is final, or failed since this call began."""
        record = self.known.get(run.run_id)
        # The record is compared with the first one, not by time, as a clock may be ahead.
        return records.is_final(record) or (record is not None and record != self.before.get(run.run_id))

    def left(self) -> list[Run]:
        return [run for run in self.runs if not self.settled(run)]

    def progress(self, run: Run) -> dict[str, Any]:
        """The last progress.json of the run; empty where there is none."""
        try:
            return json.loads((self.folder(run) / "progress.json").read_text())
        except (FileNotFoundError, ValueError):
            return {}

    def running(self) -> dict[str, dict[str, Any]]:
        """The progress of the runs that run now, by run id."""
        return {}

    def seconds_a_step(self) -> dict[tuple[str, str | None], float]:
        """Seconds per step by experiment and group of seeds, by experiment, and overall, on this kind of device."""
        device = "cuda" if has_gpu() else "cpu"
        times: dict[tuple[str, str | None], list[float]] = {}
        for run in self.runs:
            record = self.known.get(run.run_id)
            if record and record["status"] == "done" and record["hardware"]["device"] == device and record["steps"]:
                for key in _alike(run):
                    times.setdefault(key, []).append(record["seconds"] / record["steps"])
        return {key: sum(values) / len(values) for key, values in times.items()}

    def predicted(self, run: Run, speeds: dict) -> float | None:
        """The seconds of a whole run, by the speed of other seeds, else of the experiment's other runs, else of any."""
        speed = next((speeds[key] for key in _alike(run) if key in speeds), None)
        return None if speed is None else speed * run.config["train"]["steps"]

    def seconds_left(self) -> float | None:
        """The seconds of all runs that are left, from records and from progress; None where neither tells."""
        speeds, running = self.seconds_a_step(), self.running()
        told = {name: now for name, now in running.items() if now.get("steps_per_second")}
        total, whole = sum(now["seconds_left"] for now in told.values()), None
        if told:
            whole = sum(now["steps"] / now["steps_per_second"] for now in told.values()) / len(told)
        for run in self.left():
            if run.run_id not in told:
                predicted = self.predicted(run, speeds) or whole
                if predicted is None:
                    return None
                total += predicted
        return total / self.workers


def _alike(run: Run) -> tuple[tuple[str, str | None], ...]:
    """The groups whose speed predicts a run's, the most similar first."""
    return (run.experiment, run.group), (run.experiment, None), ("", None)


# -- this machine


@cache
def has_gpu() -> bool:
    """Whether a run would find a CUDA GPU. Asking torch would take seconds."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or shutil.which("nvidia-smi") is None:
        return False
    if "+cpu" in importlib.metadata.version("torch"):
        return False
    return b"GPU" in subprocess.run(["nvidia-smi", "-L"], capture_output=True).stdout


def cores() -> int:
    """The number of cores that this process may use, within a container's share."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = Path("/sys/fs/cgroup/cpu.max")
    if share.exists():
        quota, period = share.read_text().split()
        if quota != "max":
            count = min(count, max(1, int(quota) // int(period)))
    return count
