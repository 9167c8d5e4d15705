"""Every run of the paper's tables, one process each, then tables, figures and report: `python -m scripts.reproduce`.

The same command goes on where it was stopped. Several may run at once on one results folder: each run is claimed, and
done once. A failed run is recorded, the rest goes on, and the next call tries it again. Needs no torch itself.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments import data, files, launch, records
from experiments.config import PROFILES, run_id
from experiments.launch import UNFINISHED, compose
from scripts import efficiency, figures, report, tables
from scripts.plan import CHOICE_SEED, METRICS, Run, runs

LEAST = 5.0  # seconds: with less of the budget left no run is started
GRACE = 5.0  # seconds after the budget's end: a run that has not stopped by itself is told to
TRIES = 3  # of a run that stops before its end though nothing asked it to
LOOK = 2.0  # seconds between looks at runs that other processes have

Command = Callable[[Run, float | None], list[str]]


@dataclass
class Planner:
    """Goes through runs in order, `workers` at once.

    Attributes:
        command: gives the command of a run that is to stop after so many seconds (None: at its end). It exits 0 with a
            final record, 75 when it stopped before, with anything else when it failed.
        renew: called after every run that ended.
    """

    runs: list[Run]
    results_dir: str
    output_dir: str
    command: Command
    workers: int = 1
    budget: float | None = None
    renew: Callable[[], None] = lambda: None
    known: dict[str, dict[str, Any]] = field(default_factory=dict)  # records by run id
    signal: int | None = None  # that told this process to stop

    def __post_init__(self):
        self.deadline = None if self.budget is None else time.monotonic() + self.budget
        self.jobs: list[Job] = []
        self.tries: Counter[str] = Counter()
        for run in self.runs:
            self.read(run)
        self.before = dict(self.known)

    def read(self, run: Run) -> dict[str, Any] | None:
        record = records.read_record(records.record_path(self.results_dir, run.experiment, run.run_id))
        if record is not None:
            self.known[run.run_id] = record
        return record

    def folder(self, run: Run) -> Path:
        return records.work_dir(self.output_dir, run.experiment, run.run_id)

    def settled(self, run: Run) -> bool:
        """Whether it need not be tried: final, or failed since this call began."""
        record = self.known.get(run.run_id)
        # Another record than at first, not a later one: a clock may be ahead.
        return records.is_final(record) or (record is not None and record != self.before.get(run.run_id))

    def left(self) -> list[Run]:
        return [run for run in self.runs if not self.settled(run)]

    @property
    def seconds(self) -> float | None:
        """Left of the budget."""
        return None if self.deadline is None else self.deadline - time.monotonic()

    @property
    def stopping(self) -> bool:
        return self.signal is not None or (self.seconds is not None and self.seconds < LEAST)

    def go(self) -> None:
        queue, elsewhere, look = self.left(), [], 0.0
        bar = _Bar(self)
        with self._stop_signals(), bar:
            try:
                while self.jobs or (not self.stopping and (queue or elsewhere)):
                    for job in [job for job in self.jobs if job.process.poll() is not None]:
                        self.jobs.remove(job)
                        if not self._ended(job, bar):
                            elsewhere.append(job.run)
                    while queue and len(self.jobs) < self.workers and not self.stopping:
                        if not self._start(queue[0], bar):
                            elsewhere.append(queue[0])
                        queue.pop(0)
                    if not queue and time.monotonic() > look:
                        # Those that other processes have: done by now, or free because their process died.
                        queue, elsewhere, look = elsewhere, [], time.monotonic() + LOOK
                    if self.seconds is not None and self.seconds < -GRACE:
                        self._tell_jobs()
                    bar.show()
                    time.sleep(0.1)
            finally:
                self._tell_jobs()
                for job in self.jobs:
                    job.process.wait()
                    job.claim.close()

    def alone(self, command: list[str]) -> int:
        """Another process, which is told to stop as runs are; its exit code."""
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        self.jobs.append(Job(None, process, Path(), 0, contextlib.ExitStack()))
        with self._stop_signals():
            while process.poll() is None:
                if self.seconds is not None and self.seconds < -GRACE:
                    self._tell_jobs()
                time.sleep(0.1)
        self.jobs.clear()
        return process.returncode

    def _start(self, run: Run, bar: "_Bar") -> bool:
        """False where another process has the run."""
        if self.tries[run.run_id] >= TRIES:
            bar.say(f"{run.label}, seed {run.seed}: left, it stopped {TRIES} times before its end; see its log.txt")
            return True
        with contextlib.ExitStack() as stack:
            # Between planners this claim decides, at once; the run's own, against all others, is its process's.
            place = records.record_path(self.results_dir, run.experiment, run.run_id).parent
            if not stack.enter_context(files.claim(place, "planner")):
                return False
            with files.claim(place) as free:
                if not free:
                    return False
            self.read(run)
            if self.settled(run):
                bar.ended(run, "by another process")
                return True
            log = self.folder(run) / "log.txt"
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as file:
                # In a session of its own: what stops it is this process, by SIGTERM, once.
                process = subprocess.Popen(
                    self.command(run, self.seconds),
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                self.jobs.append(Job(run, process, log, file.tell(), stack.pop_all()))
            self.tries[run.run_id] += 1
        return True

    def _ended(self, job: "Job", bar: "_Bar") -> bool:
        """False where it is to be tried again: it stopped before its end, or another process had it."""
        run, code = job.run, job.process.returncode
        with job.claim:
            self.read(run)
            if not self.settled(run) and (code == UNFINISHED or (job.told and code == -signal.SIGTERM)):
                return False
            if not self.settled(run):
                self._record_failure(job)
        bar.ended(run)
        self.renew()
        return True

    def _record_failure(self, job: "Job") -> None:
        """For a process that died without a record."""
        run, code = job.run, job.process.returncode
        how = f"exit code {code}, without a record"
        if code < 0:
            how = f"killed by {signal.Signals(-code).name}"
            how += " (perhaps the system ran out of memory)" if -code == signal.SIGKILL else ""
        with job.log.open("rb") as file:
            file.seek(job.log_start)
            tail = "\n".join(file.read().decode(errors="replace").strip().splitlines()[-20:])
        record = {
            "schema_version": records.SCHEMA_VERSION,
            "run_id": run.run_id,
            "experiment": run.experiment,
            "profile": run.config["profile"],
            "config": run.config,
            "seed": run.seed,
            "status": "failed",
            "reason": f"{how}\n{tail}".strip(),
            "metrics": {},
            "started": job.started,
            "ended": time.time(),
        }
        records.write_json(records.record_path(self.results_dir, run.experiment, run.run_id), record)
        self.read(run)

    @contextlib.contextmanager
    def _stop_signals(self) -> Iterator[None]:
        def stop(number, frame):
            if self.signal is None and self.jobs:
                print("\nwaiting for the running runs' checkpoints", flush=True)
            self.signal = number
            self._tell_jobs()

        # One that is ignored (nohup, a shell's background) stays so.
        numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
        before = {number: signal.signal(number, stop) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _tell_jobs(self) -> None:
        for job in self.jobs:
            if not job.told and job.process.poll() is None:
                job.told = True
                job.process.terminate()

    def progress(self, run: Run) -> dict[str, Any]:
        """What the run last said of itself; empty where it has said nothing."""
        try:
            return json.loads((self.folder(run) / "progress.json").read_text())
        except (FileNotFoundError, ValueError):
            return {}

    def seconds_a_step(self) -> dict[tuple[str, str | None], float]:
        """By experiment and group of seeds, by experiment, and of all, from records of this kind of device."""
        device = "cuda" if has_gpu() else "cpu"
        times: dict[tuple[str, str | None], list[float]] = {}
        for run in self.runs:
            record = self.known.get(run.run_id)
            if record and record["status"] == "done" and record["hardware"]["device"] == device and record["steps"]:
                for key in ((run.experiment, run.group), (run.experiment, None), ("", None)):
                    times.setdefault(key, []).append(record["seconds"] / record["steps"])
        return {key: sum(values) / len(values) for key, values in times.items()}

    def predicted(self, run: Run, speeds: dict) -> float | None:
        """Seconds of the whole run: from other seeds, else from the experiment's other runs, else from any."""
        keys = ((run.experiment, run.group), (run.experiment, None), ("", None))
        speed = next((speeds[key] for key in keys if key in speeds), None)
        return None if speed is None else speed * run.config["train"]["steps"]

    def seconds_left(self) -> float | None:
        """Of all that is left, from records and from what the running ones say; None where nothing tells."""
        speeds, total, unknown, running = self.seconds_a_step(), 0.0, [], []
        for job in self.jobs:
            now = self.progress(job.run) if job.fresh(self.folder(job.run)) else {}
            if not now.get("steps_per_second"):
                unknown.append(job.run)
                continue
            total += now["seconds_left"]
            running.append(now["steps"] / now["steps_per_second"])
        busy = {job.run.run_id for job in self.jobs}
        unknown += [run for run in self.left() if run.run_id not in busy]
        for run in unknown:
            predicted = self.predicted(run, speeds)
            if predicted is None:
                if not running:
                    return None
                predicted = sum(running) / len(running)
            total += predicted
        return total / self.workers


@dataclass
class Job:
    run: Run | None  # None: another process
    process: subprocess.Popen
    log: Path
    log_start: int
    claim: contextlib.ExitStack
    started: float = field(default_factory=time.time)
    told: bool = False  # to stop

    def fresh(self, folder: Path) -> bool:
        """Whether progress.json is of this process, not of an earlier one."""
        path = folder / "progress.json"
        return path.exists() and path.stat().st_mtime >= self.started


class _Bar:
    """One bar over all runs for a person at a terminal, and a line for every run that ended."""

    def __init__(self, planner: Planner):
        self.planner, self.shown = planner, 0.0
        speeds = planner.seconds_a_step()
        self.weights = {
            run.run_id: planner.predicted(run, speeds) or run.config["train"]["steps"] for run in planner.runs
        }
        self.bar = tqdm(
            total=sum(self.weights.values()),
            disable=not sys.stdout.isatty(),
            file=sys.stdout,
            dynamic_ncols=True,
            bar_format="{percentage:3.0f} %|{bar}| {desc} [{elapsed}{postfix}]",
        )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.bar.close()

    def show(self) -> None:
        if self.bar.disable or time.monotonic() - self.shown < 1:
            return
        self.shown = time.monotonic()
        planner, done, states = self.planner, 0.0, []
        running = {job.run.run_id for job in planner.jobs}
        for run in planner.runs:
            now = {} if planner.settled(run) else planner.progress(run)
            part = 1.0 if planner.settled(run) else now["step"] / now["steps"] if now else 0.0
            done += self.weights[run.run_id] * part
            if now and run.run_id in running:
                states.append(f"{run.label} s{run.seed} {now['step']}/{now['steps']} loss {now['loss']:.3f}")
        left = planner.seconds_left()
        self.bar.n = min(done, self.bar.total)
        self.bar.set_description_str(
            f"{len(planner.runs) - len(planner.left())}/{len(planner.runs)} runs", refresh=False
        )
        self.bar.set_postfix_str(
            "; ".join([f"about {duration(left)} left" if left is not None else "time left unknown", *states]),
            refresh=True,
        )

    def ended(self, run: Run, how: str = "") -> None:
        planner = self.planner
        record, number = planner.known[run.run_id], len(planner.runs) - len(planner.left())
        self.say(f"[{number}/{len(planner.runs)}] {run.label}, seed {run.seed}: {outcome(run, record)} {how}".rstrip())

    def say(self, text: str) -> None:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def outcome(run: Run, record: dict[str, Any]) -> str:
    if record["status"] != "done":
        return f"{record['status']}, {record['reason'].splitlines()[0]}"
    cell = run.cells[0]
    metric = METRICS[cell.metric]
    value = metric.format(record["metrics"]["last"][metric.key] * metric.scale)
    return f"done, {metric.label} {value} {metric.unit}".rstrip() + f", {duration(record['seconds'])}"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


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
    """That this process may use, of a container's share too."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = Path("/sys/fs/cgroup/cpu.max")
    if share.exists():
        quota, period = share.read_text().split()
        if quota != "max":
            count = min(count, max(1, int(quota) // int(period)))
    return count


# -- the command line


def main() -> int:
    arguments = parse()
    profile = arguments.profile or ("paper" if has_gpu() else "cpu")
    arguments.results_dir = arguments.results_dir or ("outputs/smoke" if profile == "smoke" else "results")
    if arguments.output_dir is None:  # a checkpoint of one folder's run is not another's
        arguments.output_dir = "outputs" if arguments.results_dir == "results" else f"{arguments.results_dir}/outputs"
    workers = arguments.workers or (1 if has_gpu() else cores())
    plan = selected(runs(profile, arguments.seeds), arguments.only)
    parts = list(efficiency.PARTS[profile])
    if arguments.only is not None:
        parts += efficiency.ASKED.get(profile, ())
        parts = [part for part in parts if _named((f"efficiency: {part}",), arguments.only)]
    if not plan and not parts:
        sys.exit(f"error: --only: no run of profile {profile} has {arguments.only!r} in its name; --list names all")
    settings = [
        f"results_dir={launch.quoted(arguments.results_dir)}",
        f"output_dir={launch.quoted(arguments.output_dir)}",
        f"logger={arguments.logger}",
        "progress=false",
        *([] if has_gpu() else [f"threads={max(1, cores() // workers)}"]),
        *arguments.overrides,
    ]
    for run in plan if arguments.overrides else plan[:1]:
        check(run, settings)

    def command(run: Run, seconds: float | None) -> list[str]:
        budget = [] if seconds is None else [f"budget={max(1.0, seconds):.0f}"]
        return [
            *(sys.executable, "-m", f"experiments.{run.experiment}"),
            *(*run.overrides, f"seed={run.seed}", *settings, *budget),
        ]

    def renew() -> None:
        tables.write_all(arguments.results_dir)
        report.write_all(arguments.results_dir)

    planner = Planner(plan, arguments.results_dir, arguments.output_dir, command, workers, arguments.budget, renew)
    introduce(planner, profile, arguments)
    if parts:
        print(f"then efficiency, where this machine has no record of it: {', '.join(parts)}", flush=True)
    if arguments.list:
        return 0
    unmade = missing(planner)
    waiting = leave_without_data(planner, unmade)
    planned = planner.runs
    if unmade:  # making them keeps one core busy for minutes, and a GPU idle: after all that needs none of them
        planner.runs = [run for run in planned if not any(run in runs_of_it for runs_of_it in unmade.values())]
        planner.go()
        planner.runs = planned
        collect(planner, unmade)
        waiting += leave_without_data(planner)
    planner.go()
    if parts and planner.stopping:
        print("efficiency was not come to; the same command goes on with it", flush=True)
        parts = []
    measured = measure(planner, profile, parts) if parts else 0
    tables.write_all(arguments.results_dir)
    figures.write_all(arguments.results_dir)
    report.write_all(arguments.results_dir)
    code = conclude(planner, profile, arguments)
    if measured:
        print("efficiency is not finished; the same command goes on with it")
        code = code or (0 if measured == UNFINISHED else 1)
    if waiting:
        print(f"{len(waiting)} more wait for data, see above")
    # The smoke profile has a run on a text that is at hand everywhere.
    return code or (1 if waiting and profile != "smoke" else 0)


def measure(planner: Planner, profile: str, parts: list[str]) -> int:
    """Efficiency, alone on the machine; its exit code. The number of processes at once is not its."""
    command = [sys.executable, "-m", "experiments.efficiency", "-m", f"part={','.join(parts)}", f"profile={profile}"]
    command += [f"results_dir={launch.quoted(planner.results_dir)}", f"output_dir={launch.quoted(planner.output_dir)}"]
    command += [] if planner.seconds is None else [f"budget={max(1.0, planner.seconds):.0f}"]
    code = planner.alone(command)
    return UNFINISHED if planner.stopping and code == -signal.SIGTERM else code


def needed(planner: Planner) -> dict[str, list[Run]]:
    """The runs that are left by the file that they need, those that need one."""
    found: dict[str, list[Run]] = {}
    for run in planner.left():
        settings = run.config["data"]
        name = settings.get("dataset", settings.get("text"))
        if name in data.FILES or "dataset" in settings:
            found.setdefault(name, []).append(run)
    return found


def missing(planner: Planner) -> dict[str, list[Run]]:
    """The local datasets that are nowhere, and the runs that need them."""
    found = needed(planner).items()
    return {name: of for name, of in found if name.startswith("local/") and data.locate(f"{name}.hdf5") is None}


def collect(planner: Planner, names: Iterable[str]) -> None:
    """Makes local datasets, or says why not."""
    for name in names:
        if data.locate(f"{name}.hdf5") is None and not planner.stopping:
            env, _, level = name.removeprefix("local/").partition("-")
            print(f"{name} is not here, and is made now (one training makes all of an environment)", flush=True)
            command = [sys.executable, "-m", "scripts.collect", f"env={env}", f"level={level}", f"folder={data.FOLDER}"]
            try:
                code = subprocess.run(command, timeout=planner.seconds).returncode
            except subprocess.TimeoutExpired:
                code = "out of time"
            if code:
                print(f"{name} could not be made ({code})", flush=True)


def leave_without_data(planner: Planner, later: Iterable[str] = ()) -> list[Run]:
    """The runs whose file is nowhere and cannot be fetched, or is not that of the records: said once, and left out.

    Not those of the files that are to be made `later`.
    """
    waiting = []
    for name, runs_of_it in needed(planner).items():
        if name in later:
            continue
        try:
            if name.startswith("local/"):
                same_as_before(planner, name)
            else:
                data.find(name)
        except data.DataError as error:
            print(f"{len(runs_of_it)} runs wait for data: {error}", flush=True)
            waiting += runs_of_it
    planner.runs = [run for run in planner.runs if run not in waiting]
    return waiting


def same_as_before(planner: Planner, dataset: str) -> None:
    """A local dataset is made anew on each machine; scores on two of one name are not joined in one table."""
    path = data.locate(f"{dataset}.hdf5")
    if path is None:
        env, _, level = dataset.removeprefix("local/").partition("-")
        raise data.DataError(f"{dataset} is not here: python -m scripts.collect env={env} level={level} makes it")
    before = {
        record["facts"]["dataset_sha256"]: record["run_id"]
        for record in planner.known.values()
        if record["config"]["data"].get("dataset") == dataset and "dataset_sha256" in record.get("facts", {})
    }
    if not before:
        return
    from experiments.decision.data import dataset_checksum  # brings torch, which nothing else here needs

    found = dataset_checksum(path, dataset)
    for checksum, run in before.items():
        if checksum != found:
            raise data.DataError(
                f"{path} does not hold the arrays of record {run} (sha256 {checksum[:12]}, got {found[:12]}); to do "
                f"them all on this one, give another results folder, or remove the records of {dataset}"
            )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.reproduce",
        description="Does every run of the paper's tables that is not done, and renews tables, figures and report.",
    )
    parser.add_argument("--profile", choices=PROFILES, help="scale (paper on a GPU, cpu elsewhere)")
    parser.add_argument("--seeds", type=_seeds, default=1, help="how many: 0, 1, ... (1)")
    parser.add_argument("--budget", type=seconds, help="stop cleanly after this time: 90s, 20m, 2h (none)")
    parser.add_argument("--workers", type=_count, help="runs at once (one a CPU core; on a GPU 1)")
    parser.add_argument(
        "--results-dir", help="records, tables, figures, report (results; outputs/smoke for profile smoke)"
    )
    parser.add_argument(
        "--output-dir", help="checkpoints and logs (outputs; of other results than results: their own outputs)"
    )
    parser.add_argument("--logger", choices=("none", "wandb"), default="none", help="of each run (none)")
    parser.add_argument("--only", metavar="TEXT", help='runs whose name has this in it: charlm, "minGRU, layers 3"')
    parser.add_argument("--list", action="store_true", help="say what is done and what is left, and end")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value",
        help="for every run; settings that change no result only: wandb.mode=online compile=true micro_batches=1",
    )  # fmt: skip
    return parser.parse_args()


def selected(plan: list[Run], only: str | None) -> list[Run]:
    """Those with `only` in a name; without it all but those that nobody does unless asked."""
    if only is not None:
        return [run for run in plan if _named(run.labels, only)]
    return [run for run in plan if not run.asked]


def _named(labels: Iterable[str], only: str | None) -> bool:
    return only is None or any(only.lower() in label.lower() for label in labels)


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"expected a number from 1 up, got {text!r}")
    return int(text)


def _seeds(text: str) -> int:
    count = _count(text)
    if count > CHOICE_SEED:  # and seeds from there on are others'
        raise argparse.ArgumentTypeError(f"expected 1 to {CHOICE_SEED}, got {text}")
    return count


def seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if not match or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"expected a time such as 90s, 20m or 2h, got {text!r}")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def check(run: Run, settings: list[str]) -> None:
    """That these overrides exist and leave the runs what they are."""
    try:
        launch.check(run.experiment, [*run.overrides, *settings])
        config = compose(run.experiment, [*run.overrides, f"seed={run.seed}", *settings])
    except Exception as error:  # Hydra's and OmegaConf's have no common type but this
        sys.exit(f"error: {error}")
    if run_id(config) != run.run_id:
        sys.exit(f"error: {' '.join(settings)}: expected settings that change no result; these change the runs' ids")


def introduce(planner: Planner, profile: str, arguments: argparse.Namespace) -> None:
    left = {run.run_id for run in planner.left()}
    groups: dict[str, list[Run]] = {}
    for run in planner.runs:
        groups.setdefault(run.group, []).append(run)
    seeds = "seed 0" if arguments.seeds == 1 else f"seeds 0 to {arguments.seeds - 1}"
    print(f"profile {profile}, {seeds}, {planner.workers} at once, results in {planner.results_dir}/")
    width = max((len(run.label) for run in planner.runs), default=0)
    speeds = planner.seconds_a_step()
    for of_group in groups.values():
        waiting = [run for run in of_group if run.run_id in left]
        text = f"{len(of_group) - len(waiting)} of {len(of_group)} done"
        failed = [run for run in waiting if run.run_id in planner.known]
        text += f", {len(failed)} failed before" if failed else ""
        predicted = planner.predicted(of_group[0], speeds) if waiting else None
        text += f", about {duration(predicted)} each" if predicted else ""
        print(f"  {of_group[0].label:{width}}  {text}")
    total = planner.seconds_left() if left else None
    time_left = f", about {duration(total)}" if total else ""
    limit = f", {duration(planner.budget)} of budget" if planner.budget else ""
    print(
        f"{len(planner.runs) - len(left)} of {len(planner.runs)} runs done, {len(left)} left{time_left}{limit}",
        flush=True,
    )


def conclude(planner: Planner, profile: str, arguments: argparse.Namespace) -> int:
    results = Path(planner.results_dir)
    for table, of_profile, found in tables.measured_tables(tables.load(results)):
        if of_profile == profile:
            grid = tables.markdown_grid(*tables.grid(table, profile, found))
            print(f"\n{tables.TABLES[table].title}, profile {profile}\n\n{grid}")
    left = planner.left()
    settled = [(run, planner.known[run.run_id]) for run in planner.runs if planner.settled(run)]
    counts = Counter(record["status"] for _, record in settled)
    print("\n" + ", ".join(f"{counts[status]} {status}" for status in records.STATUSES) + f", {len(left)} left")
    for run, record in settled:
        if record["status"] != "done":
            log = planner.folder(run) / "log.txt"
            print(f"  {run.label}, seed {run.seed}: {outcome(run, record)} (record {run.run_id}, log {log})")
    for part in ("REPORT_smoke.md" if profile == "smoke" else "REPORT.md", "tables", "figures", "runs"):
        if (results / part).exists():
            print(f"  {results / part}")
    if left:
        why = (
            "told to stop" if planner.signal else "out of budget" if planner.stopping else "not all runs could be done"
        )
        again = shlex.join(["python", "-m", "scripts.reproduce", *sys.argv[1:]])
        print(f"{why}; the same command goes on from here: {again}")
    if planner.signal:
        return 128 + planner.signal
    return 1 if counts["failed"] or (left and not planner.stopping) else 0


if __name__ == "__main__":
    tables.command(main)
