"""All timing, one part per run: `python -m experiments.efficiency part=train`.

Layers by length, batch size and width (sweep.py) reproduce the paper's figures 1, 3 and 4 (arXiv 2410.01201), with two
baselines each: the paper's hand-written loop and torch's own layer. minGRU and minLSTM have three forms: fused, in log
space as in the paper, and as a loop. kernels.py measures scans alone and their precision, steps.py training steps of
whole models, policy.py a policy in use. A record's `points` hold, for each layer at each size:

    status    done, time-out, out of memory or failed, with the reason
    median, q1, q3, min    seconds per run, over n runs. The layers of a point take turns (scans run one after another)
              in a process that keeps freed memory, as this project's training does
    peak      bytes that a run allocates beyond weights and input: on a CPU the growth of the resident size of a
              separate process, which returns freed memory; on a GPU by torch's allocator
    operations, bytes, least    the least work (experiments/cost.py) and the least seconds that it takes here
    joules    per run, where the card counts them
    bytes, bandwidth    for a scan: the fewest bytes it must move, and bytes per second of a copy just before
    error, worst    relative to the loop in float64: of all states, and of the worst state
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .. import files, machine, processes, records
from ..config import Efficiency, run_id
from . import kernels, policy, steps, sweep
from .timer import Point

STARTED = time.monotonic()
PACKAGES = (
    *("numpy", "triton", "numba", "minGRU-pytorch", "mamba-ssm"),
    *("accelerated-scan", "fla-core", "gymnasium", "mujoco"),
)
PREPARE = {
    "parameters": sweep.prepare_count,
    "kernels": kernels.prepare,
    "precision": kernels.prepare_precision,
    "copying": steps.prepare_copying,
    "language": steps.prepare_language,
    "policy": policy.prepare,
}  # of a task; all others are of layers


def run(cfg: Efficiency) -> str:
    """Measures a part unless this machine has its record. Returns "done", "paused", "stopped" or "busy"."""
    device = processes.device_of(cfg)
    here = machine_name(device)
    if cfg.data.machine not in (None, here):
        raise ValueError(f"data.machine: expected none, it is found; got {cfg.data.machine!r}, this is {here!r}")
    cfg.data.machine = here
    config = dataclasses.asdict(cfg)
    name = run_id(config)
    path = records.record_path(cfg.results_dir, cfg.experiment, name)
    with files.claim(path.parent) as mine:
        if records.is_final(records.read_record(path)):
            print(f"efficiency {cfg.data.part} {name}: done already, see {path}", flush=True)
            return "done"
        if not mine:
            print(f"efficiency {name}: another process is at it (it holds {path.parent / '.lock'})", flush=True)
            return "busy"
        folder = records.work_dir(cfg.output_dir, cfg.experiment, name)
        made_with = machine.made_with(device.type, *PACKAGES)
        record = records.header(config, **made_with) | {"status": "done", "reason": None}
        with processes.stop_signals() as stop:
            found = measure(cfg, device, Kept(folder, made_with), lambda: _why_stop(cfg, stop))
        if isinstance(found, str):
            print(f"efficiency {name}: {found}; the same command goes on from there", flush=True)
            return "paused" if found == OUT else "stopped"
        records.write_json(path, record | found | {"ended": time.time()})
        Kept(folder).path.unlink(missing_ok=True)  # a record that is removed is measured anew
        done = sum(point["status"] == "done" for point in found["points"])
        print(
            f"efficiency {cfg.data.part} {name}: {done} of {len(found['points'])} points in "
            f"{found['seconds']:.0f} s, see {path}",
            flush=True,
        )
    return "done"


OUT = "out of budget"


def _why_stop(cfg: Efficiency, stop: Any) -> str | None:
    if stop.is_set:
        return "told to stop"
    return OUT if cfg.budget is not None and time.monotonic() - STARTED > cfg.budget else None


def machine_name(device: torch.device) -> str:
    """The name of the machine that the measurements belong to."""
    return machine.name(machine.hardware(device.type))


class Kept:
    """The kept points of an unfinished part. Points of another commit or other versions are dropped."""

    def __init__(self, folder: Path, made_with: dict[str, Any] | None = None):
        self.path, self.made_with = folder / "points.json", made_with
        self.points: list[Point] = []
        self.seconds, self.began = 0.0, time.monotonic()
        found = json.loads(self.path.read_text()) if self.path.exists() else {}
        if found.get("made_with") == made_with and found:
            self.points, self.seconds = found["points"], found["seconds"]

    def taken(self) -> float:
        """The seconds that all processes have spent on the part."""
        return self.seconds + time.monotonic() - self.began

    def add(self, points: list[Point]) -> None:
        self.points += points
        seconds = self.taken()
        records.write_json(self.path, {"made_with": self.made_with, "seconds": seconds, "points": self.points})


def measure(cfg: Efficiency, device: torch.device, kept: Kept, why_stop: Callable[[], str | None]) -> Any:
    """The measured part of the record; or, if it stopped early, the reason, with the points so far kept."""
    if (reason := why_stop()) is not None:
        return reason
    machine.keep_freed_memory()  # as every training process of this project does
    torch.manual_seed(cfg.seed)
    with contextlib.ExitStack() as stack:
        cases, facts = PREPARE.get(cfg.data.task, sweep.prepare)(cfg.data, device, stack)
        left = [
            (said, points) for said, points in cases if not any(said.items() <= point.items() for point in kept.points)
        ]
        bar = tqdm(
            total=len(cases), initial=len(cases) - len(left), desc=f"efficiency {cfg.data.part}", unit="point",
            disable=None if cfg.progress else True, dynamic_ncols=True,
        )  # fmt: skip
        stack.enter_context(bar)
        for said, points in left:
            if (reason := why_stop()) is not None:
                return reason
            bar.set_postfix_str(", ".join(f"{key} {value}" for key, value in said.items()))
            kept.add(points(kept.points))
            bar.update()
    return {"points": kept.points, **facts, "seconds": kept.taken()}
