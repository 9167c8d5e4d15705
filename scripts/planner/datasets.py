"""Finds the runs that wait for data, and makes the data that can be made here. Needs no torch."""

import subprocess
import sys
from collections.abc import Iterable

from experiments import data
from experiments.grid import Run

from .processes import Planner


def needed(planner: Planner) -> dict[str, list[Run]]:
    """The runs that are left and need a file, by that file."""
    found: dict[str, list[Run]] = {}
    for run in planner.left():
        settings = run.config["data"]
        name = settings.get("dataset", settings.get("text"))
        if name in data.FILES or "dataset" in settings:
            found.setdefault(name, []).append(run)
    return found


def missing(planner: Planner) -> dict[str, list[Run]]:
    """The missing local datasets, and the runs that need them."""
    found = needed(planner).items()
    return {name: of for name, of in found if name.startswith("local/") and data.locate(f"{name}.hdf5") is None}


def making(dataset: str) -> list[str]:
    """The command that makes a local dataset, without the interpreter."""
    env, _, level = dataset.removeprefix("local/").partition("-")
    return ["-m", "scripts.collect", f"env={env}", f"level={level}"]


def collect(planner: Planner, names: Iterable[str]) -> None:
    """Makes local datasets, or says why not."""
    for name in names:
        if data.locate(f"{name}.hdf5") is None and not planner.stopping:
            print(f"{name} is not here, and is made now (one training makes all of an environment)", flush=True)
            command = [sys.executable, *making(name), f"folder={data.FOLDER}"]
            try:
                code = subprocess.run(command, timeout=planner.seconds).returncode
            except subprocess.TimeoutExpired:
                code = "out of time"
            if code:
                print(f"{name} could not be made ({code})", flush=True)


def leave_without_data(planner: Planner, later: Iterable[str] = ()) -> list[Run]:
    """Leaves out and returns the runs whose file cannot be had or differs from the records'; reports each file once.

    Runs whose files are to be made `later` stay.
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
    """Checks a local dataset against the records', as machines make their own and scores on two must not be mixed."""
    path = data.locate(f"{dataset}.hdf5")
    if path is None:
        raise data.DataError(f"{dataset} is not here: python {' '.join(making(dataset))} makes it")
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
