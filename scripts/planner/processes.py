"""Does runs as processes, several at once, which stop at a checkpoint when told to. Needs no torch."""

import contextlib
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments import files, records
from experiments.grid import Run
from experiments.launch import UNFINISHED

from .agenda import Agenda
from .said import Bar

LEAST = 5.0  # seconds: with less of the budget left no run is started
GRACE = 5.0  # seconds after the budget's end: a run that has not stopped by itself is told to
TRIES = 3  # of a run that stops before its end though nothing asked it to
LOOK = 2.0  # seconds between looks at runs that other processes have


@dataclass
class Planner(Agenda):
    """Goes through runs in order, `workers` at once.

    Attributes:
        command: gives the command of a run and the seconds after which it stops (None: at its end). It exits with 0 for
            a final record, 75 if it stopped before, and anything else if it failed.
        renew: called after every run that ended.
        signal: the signal that told this process to stop.
    """

    command: Callable[[Run, float | None], list[str]]
    budget: float | None = field(default=None, kw_only=True)
    renew: Callable[[], None] = field(default=lambda: None, kw_only=True)
    signal: int | None = None

    def __post_init__(self):
        super().__post_init__()
        self.deadline = None if self.budget is None else time.monotonic() + self.budget
        self.jobs: list[Job] = []
        self.tries: Counter[str] = Counter()

    @property
    def seconds(self) -> float | None:
        """The seconds left of the budget."""
        return None if self.deadline is None else self.deadline - time.monotonic()

    @property
    def stopping(self) -> bool:
        return self.signal is not None or (self.seconds is not None and self.seconds < LEAST)

    def running(self) -> dict[str, dict[str, Any]]:
        return {job.run.run_id: self.progress(job.run) for job in self.jobs if job.fresh(self.folder(job.run))}

    def go(self) -> None:
        queue, elsewhere, look = self.left(), [], 0.0
        bar = Bar(self)
        with self._stop_signals(), contextlib.closing(bar.bar):
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
                        # Runs of other processes may be done by now, or free because their process died.
                        queue, elsewhere, look = elsewhere, [], time.monotonic() + LOOK
                    self._keep_to_the_budget()
                    bar.show()
                    time.sleep(0.1)
            finally:
                self._tell_jobs()
                for job in self.jobs:
                    job.process.wait()
                    job.claim.close()

    def alone(self, command: list[str]) -> int:
        """Runs another process, which is told to stop as runs are, and returns its exit code."""
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        self.jobs.append(Job(None, process, Path(), 0, contextlib.ExitStack()))
        with self._stop_signals():
            while process.poll() is None:
                self._keep_to_the_budget()
                time.sleep(0.1)
        self.jobs.clear()
        return process.returncode

    def _start(self, run: Run, bar: Bar) -> bool:
        """Starts a run and returns True; False where another process has it."""
        if self.tries[run.run_id] >= TRIES:
            bar.say(f"{run.label}, seed {run.seed}: left, it stopped {TRIES} times before its end; see its log.txt")
            return True
        with contextlib.ExitStack() as stack:
            # This claim decides between planners at once; the run's process then claims the run against all others.
            place = self.place(run).parent
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
                # In its own session, so that only this process stops it, by SIGTERM, once.
                process = subprocess.Popen(
                    self.command(run, self.seconds), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                    start_new_session=True,
                )  # fmt: skip
                self.jobs.append(Job(run, process, log, file.tell(), stack.pop_all()))
            self.tries[run.run_id] += 1
        return True

    def _ended(self, job: "Job", bar: Bar) -> bool:
        """Whether the run is settled; False if it stopped early or another process had it, to be tried again."""
        run, code = job.run, job.process.returncode
        with job.claim:
            self.read(run)
            if not self.settled(run):
                if code == UNFINISHED or (job.told and code == -signal.SIGTERM):
                    return False
                failure = records.header(run.config) | {"status": "failed", "reason": job.reason(), "metrics": {}}
                records.write_json(self.place(run), failure | {"started": job.started, "ended": time.time()})
                self.read(run)
        bar.ended(run)
        self.renew()
        return True

    @contextlib.contextmanager
    def _stop_signals(self) -> Iterator[None]:
        def stop(number, frame):
            if self.signal is None and self.jobs:
                print("\nwaiting for the running runs' checkpoints", flush=True)
            self.signal = number
            self._tell_jobs()

        # Ignored signals (nohup, a shell's background) stay ignored.
        numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
        before = {number: signal.signal(number, stop) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _keep_to_the_budget(self) -> None:
        if self.seconds is not None and self.seconds < -GRACE:
            self._tell_jobs()

    def _tell_jobs(self) -> None:
        for job in self.jobs:
            if not job.told and job.process.poll() is None:
                job.told = True
                job.process.terminate()


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
        """Whether progress.json is from this process, not from an earlier one."""
        path = folder / "progress.json"
        return path.exists() and path.stat().st_mtime >= self.started

    def reason(self) -> str:
        """The reason why the process died, where it left no record."""
        code = self.process.returncode
        how = f"exit code {code}, without a record"
        if code < 0:
            how = f"killed by {signal.Signals(-code).name}"
            how += " (perhaps the system ran out of memory)" if -code == signal.SIGKILL else ""
        with self.log.open("rb") as file:
            file.seek(self.log_start)
            tail = "\n".join(file.read().decode(errors="replace").strip().splitlines()[-20:])
        return f"{how}\n{tail}".strip()
