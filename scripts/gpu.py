"""`make gpu`: the most out of a GPU that is borrowed for minutes. `python -m scripts.gpu --budget 8m --out DIR`

In this order, until the budget ends: kernel tests, kernel benchmark, efficiency, then the most wanted unfinished runs
of profile paper. All that is worth keeping lies in DIR as a few small files: state.tar.gz (records, what unfinished
runs go on from), logs, summary.md. A later call with that state.tar.gz in its DIR (or
`--state FILE`) goes on from there, and one in the same checkout does even without it. What comes before the runs is
not done again for sources with which it passed, and takes a third of the budget each at most.

    python -m scripts.gpu --bring-home DIR      copies the records from DIR into results/

`--dry-run` does all of it without a GPU, in minutes: kernels in Triton's interpreter, profile smoke.
"""

import argparse
import contextlib
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from experiments import files, records
from experiments.grid import efficiency
from experiments.launch import UNFINISHED, command
from scripts.planner.agenda import has_gpu
from scripts.planner.said import duration, seconds

RESERVE = 20.0  # seconds of the budget, to stop and to pack
WORK = Path("outputs/gpu")
KEPT = ("done.json", "points.json")
PARTS = {"tests": "kernel tests", "bench": "kernel benchmark", "efficiency": "efficiency"}


def sources() -> str:
    """A hash of the code here; git may be absent."""
    files = sorted(path for folder in ("minrnn", "experiments", "tests") for path in Path(folder).rglob("*.py"))
    files += sorted(Path("configs/efficiency").rglob("*.yaml"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


class Session:
    def __init__(self, out: Path, budget: float, state: Path | None, dry_run: bool):
        self.out, self.dry_run = out, dry_run
        self.deadline = time.monotonic() + budget - min(RESERVE, budget / 4)
        self.share = budget / 3  # of a part
        self.lines: list[str] = []
        self.process: subprocess.Popen | None = None
        self.told = False
        out.mkdir(parents=True, exist_ok=True)
        WORK.mkdir(parents=True, exist_ok=True)
        self.claim = files.claim(WORK, "session")
        if not self.claim.__enter__():
            sys.exit(f"error: another process works in {WORK}")
        state = state or out / "state.tar.gz"
        if state.exists():  # otherwise the files of a killed call serve
            for path in WORK.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
            with tarfile.open(state) as archive:
                archive.extractall(WORK, filter="data")
            self.say(f"goes on from {state}")
        self.done = json.loads((WORK / "done.json").read_text()) if (WORK / "done.json").exists() else {}
        self.sources = sources()
        signal.signal(signal.SIGTERM, self.stop)
        signal.signal(signal.SIGINT, self.stop)

    def stop(self, number, frame) -> None:
        self.told = True
        if self.process is not None:
            self.process.terminate()

    def say(self, text: str) -> None:
        print(text, flush=True)
        self.lines.append(text)

    @property
    def left(self) -> float:
        return 0.0 if self.told else self.deadline - time.monotonic()

    def call(self, name: str, command: list[str], most: float) -> int | None:
        """The exit code, or None where the time was over first. The output goes to DIR/<name>.log, its end is shown."""
        log = self.out / f"{name}.log"
        with log.open("ab") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
            try:
                code = self.process.wait(timeout=max(1.0, min(most, self.left)))
            except subprocess.TimeoutExpired:
                self.process.terminate()
                try:
                    self.process.wait(timeout=RESERVE / 2)
                except subprocess.TimeoutExpired:
                    self.process.kill()
                    self.process.wait()
                code = None
        self.process = None
        tail = log.read_text(errors="replace").strip().splitlines()[-3:]
        print("\n".join(f"    {line}" for line in tail), flush=True)
        return code

    def part(self, name: str, command: list[str]) -> None:
        """Runs a part once for the same sources; a failure is reported and does not stop the rest."""
        if self.left <= 0:
            return
        if self.done.get(name) == self.sources:
            self.say(f"{PARTS[name]}: passed before, with the same sources")
            return
        began, code = time.monotonic(), self.call(name, command, self.share)
        took = duration(time.monotonic() - began)
        if code == 0:
            self.done[name] = self.sources
            records.write_json(WORK / "done.json", self.done)
            self.say(f"{PARTS[name]}: passed in {took}")
        else:
            what = "not finished" if code in (None, UNFINISHED) else f"FAILED ({code})"
            self.say(f"{PARTS[name]}: {what} after {took}, see {name}.log")
        self.pack()

    def go(self, seeds: int, overrides: list[str]) -> int:
        python, profile = sys.executable, "smoke" if self.dry_run else "paper"
        # One process: several would share the card, and a notebook's machine has two cores.
        tests = ["tests/test_scan.py", "tests/test_rnn.py", *(() if self.dry_run else ("tests/test_triton.py",))]
        chosen = ["-k", "triton and linear"] if self.dry_run else []
        self.part("tests", [python, "-m", "pytest", "--maxfail=20", *tests, *chosen])
        # Each ends between two sizes, the longest of which takes a minute or two.
        places = [f"results_dir={WORK / 'results'}", f"output_dir={WORK / 'runs'}", f"budget={self.share / 2:.0f}"]
        kernels = ("precision",) if self.dry_run else efficiency.BENCH
        self.part("bench", efficiency.command(kernels, profile, places))
        self.part("efficiency", efficiency.command(efficiency.PARTS[profile], profile, places))
        if self.left > 10:
            planner = [python, "-m", "scripts.reproduce", "--profile", profile]
            planner += ["--seeds", str(seeds), "--budget", f"{self.left:.0f}s"]
            planner += ["--results-dir", str(WORK / "results"), "--output-dir", str(WORK / "runs"), *overrides]
            self.deadline += RESERVE / 2  # it stops by itself, and then says what it has
            self.call("runs", planner, self.left)
        for record in self.records():
            if record["experiment"] == "efficiency":
                continue
            settings = record["config"]["model"]
            model = f"{settings['wrapping']} {settings['inner']}" if "inner" in settings else settings["name"]
            self.say(f"run {record['run_id']}, {model}, seed {record['seed']}: {record['status']}")
        self.pack()
        size = (self.out / "state.tar.gz").stat().st_size / 2**20
        print(f"{self.out / 'state.tar.gz'}: {size:.1f} MiB; the same command with it there goes on from here")
        return 0

    def records(self) -> list[dict]:
        return [records.read_record(path) for path in sorted((WORK / "results" / "runs").glob("*/*/record.json"))]

    def pack(self) -> None:
        """Writes state.tar.gz, atomically, and summary.md."""
        finished = {record["run_id"] for record in self.records() if records.is_final(record)}
        temporary = self.out / ".state.tar.gz"
        with tarfile.open(temporary, "w:gz", compresslevel=1) as archive:
            for path in sorted(path for path in WORK.rglob("*") if path.is_file()):
                place = path.relative_to(WORK)
                kept = place.parts[0] == "results" or place.suffix == ".pt" or place.name in KEPT
                if kept and not (place.suffix == ".pt" and path.parent.name in finished) and path.name[0] != ".":
                    with contextlib.suppress(FileNotFoundError):  # a run that still ends drops its older checkpoint
                        archive.add(path, place)
        temporary.replace(self.out / "state.tar.gz")
        (self.out / "summary.md").write_text("\n".join(f"- {line}" for line in self.lines) + "\n")


def bring_home(out: Path) -> None:
    """Copies records into results/; final ones that are there already stay."""
    results, copied = Path("results"), 0
    with tarfile.open(out / "state.tar.gz") as archive:
        for member in archive.getmembers():
            place = Path(member.name)
            if place.name != "record.json":
                continue
            target = results / place.relative_to("results")
            if records.is_final(records.read_record(target)):
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.extractfile(member).read())
            copied += 1
    print(f"{copied} files into {results}/; now: make tables figures report")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=seconds, default=480.0, help="90s, 8m, 2h (8m)")
    parser.add_argument(
        "--out", type=Path, default=Path("gpu-out"), help="where everything worth keeping goes (gpu-out)"
    )
    parser.add_argument("--state", type=Path, help="state.tar.gz of an earlier call, if not in --out")
    parser.add_argument("--seeds", type=int, default=3, help="of each run (3)")
    parser.add_argument("--dry-run", action="store_true", help="all of it on a CPU, at the smallest size")
    parser.add_argument("--bring-home", type=Path, metavar="DIR", help="copy what DIR holds into results/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run: micro_batches=1 compile=true")
    arguments = parser.parse_args()
    if arguments.bring_home:
        bring_home(arguments.bring_home)
        return 0
    if not has_gpu() and not arguments.dry_run:
        sys.exit("error: no CUDA GPU here (nvidia-smi lists none, or torch is its CPU build); --dry-run does without")
    session = Session(arguments.out, arguments.budget, arguments.state, arguments.dry_run)
    return session.go(arguments.seeds, arguments.overrides)


if __name__ == "__main__":
    command(main)
