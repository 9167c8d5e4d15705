"""Reports on the runs to a person at a terminal. Needs no torch."""

import argparse
import re
import shlex
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments import records
from experiments.grid import METRICS, TABLES, Run
from scripts.draw import cells, grids, tables

from .agenda import Agenda


class Bar:
    """Shows one bar over all runs, and a line for every run that ended."""

    def __init__(self, agenda: Agenda):
        self.agenda, self.shown = agenda, 0.0
        speeds = agenda.seconds_a_step()
        self.weights = {r.run_id: agenda.predicted(r, speeds) or r.config["train"]["steps"] for r in agenda.runs}
        self.bar = tqdm(
            total=sum(self.weights.values()),
            disable=not sys.stdout.isatty(),
            file=sys.stdout,
            dynamic_ncols=True,
            bar_format="{percentage:3.0f} %|{bar}| {desc} [{elapsed}{postfix}]",
        )

    def show(self) -> None:
        if self.bar.disable or time.monotonic() - self.shown < 1:
            return
        self.shown = time.monotonic()
        agenda, done, states, running = self.agenda, 0.0, [], self.agenda.running()
        for run in agenda.runs:
            now = {} if agenda.settled(run) else agenda.progress(run)
            part = 1.0 if agenda.settled(run) else now["step"] / now["steps"] if now else 0.0
            done += self.weights[run.run_id] * part
            if now := running.get(run.run_id):
                states.append(f"{run.label} s{run.seed} {now['step']}/{now['steps']} loss {now['loss']:.3f}")
        left = agenda.seconds_left()
        self.bar.n = min(done, self.bar.total)
        self.bar.set_description_str(f"{self._done()} runs", refresh=False)
        foretold = "time left unknown" if left is None else f"about {duration(left)} left"
        self.bar.set_postfix_str("; ".join([foretold, *states]), refresh=True)

    def _done(self) -> str:
        return f"{len(self.agenda.runs) - len(self.agenda.left())}/{len(self.agenda.runs)}"

    def ended(self, run: Run, how: str = "") -> None:
        record = self.agenda.known[run.run_id]
        self.say(f"[{self._done()}] {run.label}, seed {run.seed}: {outcome(run, record)} {how}".rstrip())

    def say(self, text: str) -> None:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def outcome(run: Run, record: dict[str, Any]) -> str:
    if record["status"] != "done":
        return f"{record['status']}, {record['reason'].splitlines()[0]}"
    metric = METRICS[run.cells[0].metric]
    value = metric.format(record["metrics"]["last"][metric.key] * metric.scale)
    return f"done, {metric.label} {value} {metric.unit}".rstrip() + f", {duration(record['seconds'])}"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def seconds(text: str) -> float:
    """The seconds that an argument gives."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if not match or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"expected a time such as 90s, 20m or 2h, got {text!r}")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def introduce(agenda: Agenda, profile: str, seeds: int, budget: float | None) -> None:
    """Prints what is done, what is left, and about how long that takes."""
    left = {run.run_id for run in agenda.left()}
    groups: dict[str, list[Run]] = {}
    for run in agenda.runs:
        groups.setdefault(run.group, []).append(run)
    numbers = "seed 0" if seeds == 1 else f"seeds 0 to {seeds - 1}"
    print(f"profile {profile}, {numbers}, {agenda.workers} at once, results in {agenda.results_dir}/")
    width = max((len(run.label) for run in agenda.runs), default=0)
    speeds = agenda.seconds_a_step()
    for of_group in groups.values():
        waiting = [run for run in of_group if run.run_id in left]
        text = f"{len(of_group) - len(waiting)} of {len(of_group)} done"
        failed = [run for run in waiting if run.run_id in agenda.known]
        text += f", {len(failed)} failed before" if failed else ""
        predicted = agenda.predicted(of_group[0], speeds) if waiting else None
        text += f", about {duration(predicted)} each" if predicted else ""
        print(f"  {of_group[0].label:{width}}  {text}")
    total = agenda.seconds_left() if left else None
    time_left = f", about {duration(total)}" if total else ""
    limit = f", {duration(budget)} of budget" if budget else ""
    count = len(agenda.runs)
    print(f"{count - len(left)} of {count} runs done, {len(left)} left{time_left}{limit}", flush=True)


def conclude(agenda: Agenda, profile: str, why_left: str) -> Counter[str]:
    """Prints the tables and what failed; returns how many runs have each status."""
    results = Path(agenda.results_dir)
    for table, of_profile, found in cells.measured_tables(cells.load(results)):
        if of_profile == profile:
            grid = grids.as_markdown(*tables.grid(table, profile, found))
            print(f"\n{TABLES[table].title}, profile {profile}\n\n{grid}")
    left = agenda.left()
    settled = [(run, agenda.known[run.run_id]) for run in agenda.runs if agenda.settled(run)]
    counts = Counter(record["status"] for _, record in settled)
    print("\n" + ", ".join(f"{counts[status]} {status}" for status in records.STATUSES) + f", {len(left)} left")
    for run, record in settled:
        if record["status"] != "done":
            log = agenda.folder(run) / "log.txt"
            print(f"  {run.label}, seed {run.seed}: {outcome(run, record)} (record {run.run_id}, log {log})")
    for part in ("REPORT_smoke.md" if profile == "smoke" else "REPORT.md", "tables", "figures", "runs"):
        if (results / part).exists():
            print(f"  {results / part}")
    if left:
        again = shlex.join(["python", "-m", "scripts.reproduce", *sys.argv[1:]])
        print(f"{why_left}; the same command goes on from here: {again}")
    return counts
