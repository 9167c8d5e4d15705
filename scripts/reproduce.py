"""Every run of the paper's tables, one process each, then tables, figures and report: `python -m scripts.reproduce`.

The same command goes on where it was stopped. Several may run at once on one results folder: each run is claimed, and
done once. A failed run is recorded, the rest goes on, and the next call tries it again. Needs no torch itself.
"""

import argparse
import re
import signal
import sys
from collections.abc import Iterable

from experiments import launch
from experiments.config import PROFILES, run_id
from experiments.grid import CHOICE_SEED, Run, efficiency, runs
from experiments.launch import UNFINISHED, compose
from scripts.draw import figures, report, tables
from scripts.planner import datasets
from scripts.planner.agenda import cores, has_gpu
from scripts.planner.processes import Planner
from scripts.planner.said import conclude, introduce, seconds


def main() -> int:
    arguments = parse()
    profile = arguments.profile or ("paper" if has_gpu() else "cpu")
    arguments.results_dir = arguments.results_dir or ("outputs/smoke" if profile == "smoke" else "results")
    if arguments.output_dir is None:  # each results folder has its own checkpoints
        arguments.output_dir = "outputs" if arguments.results_dir == "results" else f"{arguments.results_dir}/outputs"
    workers = arguments.workers or (1 if has_gpu() else cores())
    plan = selected(runs(profile, arguments.seeds), arguments.only)
    parts = list(efficiency.PARTS[profile])
    if arguments.only is not None:
        parts += efficiency.ASKED.get(profile, ())
        parts = [part for part in parts if _named((f"efficiency: {part}",), arguments.only)]
    if not plan and not parts:
        sys.exit(f"error: --only: no run of profile {profile} has {arguments.only!r} in its name; --list names all")
    places = [
        f"results_dir={launch.quoted(arguments.results_dir)}",
        f"output_dir={launch.quoted(arguments.output_dir)}",
    ]
    settings = [*places, f"logger={arguments.logger}", "progress=false"]
    settings += [] if has_gpu() else [f"threads={max(1, cores() // workers)}"]
    settings += arguments.overrides
    for run in plan if arguments.overrides else plan[:1]:
        check(run, settings)

    def command(run: Run, seconds: float | None) -> list[str]:
        more = [f"seed={run.seed}", *settings, *_budget(seconds)]
        return [sys.executable, "-m", f"experiments.{run.experiment}", *run.overrides, *more]

    def renew() -> None:
        tables.write_all(arguments.results_dir)
        report.write_all(arguments.results_dir)

    planner = Planner(
        plan, arguments.results_dir, arguments.output_dir, command,
        workers=workers, budget=arguments.budget, renew=renew,
    )  # fmt: skip
    introduce(planner, profile, arguments.seeds, arguments.budget)
    if parts:
        print(f"then efficiency, where this machine has no record of it: {', '.join(parts)}", flush=True)
    if arguments.list:
        return 0
    unmade = datasets.missing(planner)
    waiting = datasets.leave_without_data(planner, unmade)
    planned = planner.runs
    if unmade:  # making them keeps one core busy for minutes, and a GPU idle: after all that needs none of them
        planner.runs = [run for run in planned if not any(run in runs_of_it for runs_of_it in unmade.values())]
        planner.go()
        planner.runs = planned
        datasets.collect(planner, unmade)
        waiting += datasets.leave_without_data(planner)
    planner.go()
    if parts and planner.stopping:
        print("efficiency was not come to; the same command goes on with it", flush=True)
        parts = []
    measured = measure(planner, profile, parts, places) if parts else 0
    figures.write_all(arguments.results_dir)  # before the report, which shows the existing ones
    renew()
    why = "told to stop" if planner.signal else "out of budget" if planner.stopping else "not all runs could be done"
    counts = conclude(planner, profile, why)
    code = 1 if counts["failed"] or (planner.left() and not planner.stopping) else 0
    if planner.signal:
        code = 128 + planner.signal
    if measured:
        print("efficiency is not finished; the same command goes on with it")
        code = code or (0 if measured == UNFINISHED else 1)
    if waiting:
        print(f"{len(waiting)} more wait for data, see above")
    # The smoke profile has a run on a text that is at hand everywhere.
    return code or (1 if waiting and profile != "smoke" else 0)


def _budget(seconds: float | None) -> list[str]:
    return [] if seconds is None else [f"budget={max(1.0, seconds):.0f}"]


def measure(planner: Planner, profile: str, parts: list[str], places: list[str]) -> int:
    """Measures efficiency, alone on the machine, whatever the number of workers; returns the exit code."""
    code = planner.alone(efficiency.command(parts, profile, [*places, *_budget(planner.seconds)]))
    return UNFINISHED if planner.stopping and code == -signal.SIGTERM else code


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
    """The runs with `only` in a name; without `only`, all but those done only on request."""
    if only is not None:
        return [run for run in plan if _named(run.labels, only)]
    return [run for run in plan if not run.asked]


def _named(labels: Iterable[str], only: str) -> bool:
    return any(only.lower() in label.lower() for label in labels)


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"expected a number from 1 up, got {text!r}")
    return int(text)


def _seeds(text: str) -> int:
    count = _count(text)
    if count > CHOICE_SEED:  # and seeds from there on are others'
        raise argparse.ArgumentTypeError(f"expected 1 to {CHOICE_SEED}, got {text}")
    return count


def check(run: Run, settings: list[str]) -> None:
    """Checks that these overrides exist and do not change the runs' ids."""
    try:
        launch.check(run.experiment, [*run.overrides, *settings])
        config = compose(run.experiment, [*run.overrides, f"seed={run.seed}", *settings])
    except Exception as error:  # Hydra's and OmegaConf's have no common type but this
        sys.exit(f"error: {error}")
    if run_id(config) != run.run_id:
        sys.exit(f"error: {' '.join(settings)}: expected settings that change no result; these change the runs' ids")


if __name__ == "__main__":
    launch.command(main)
