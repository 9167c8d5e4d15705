"""Makes HDF5 files in D4RL's schema from policies whose scores match D4RL's levels."""

import json
import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from ... import data, machine
from ...config import THREADS, between, one_of
from ...seeds import RUNS
from ..data import ENVIRONMENTS, KEYS, LEVELS, read
from .policies import Episode, generator, play_rows, scores, summary, uniform
from .training import NEAR, PACKAGES, RECIPES, Training, progress, thin, trained

ROWS = {"random": 5_000, "medium": 100_000}  # of a file, and of each half of medium-expert
REPLAY = 200_000  # rows of medium-replay; a longer log is thinned evenly
EXPERT = 80  # score that an expert should reach; a lower one is reported
PARTS = {"random": ("random",), "medium": ("medium",), "medium-expert": ("medium", "expert")}


@dataclass
class Settings:
    env: str = ""
    level: str = ""
    seed: int = 0
    steps: int = 0  # 0: as ROWS says
    folder: Path = field(default_factory=lambda: data.folders()[0])
    output_dir: Path = Path("outputs")
    threads: int = 1

    def __post_init__(self):
        one_of(self, "", "env", (*RECIPES,))
        one_of(self, "", "level", ("random", *LEVELS, "all"))
        for name, low, high in (("seed", 0, RUNS - 1), ("steps", 0, 10**7), ("threads", 1, THREADS)):
            between(self, "", low, high, name)
        if self.level == "medium-replay" and self.steps:
            raise ValueError("steps: expected none for medium-replay, which is as long as its training was")


def collect(settings: Settings) -> None:
    env, seed = settings.env, settings.seed
    paths = {}
    for level in LEVELS if settings.level == "all" else (settings.level,):
        path = settings.folder / "local" / f"{env}-{level}.hdf5"
        if path.exists():
            print(f"{path}: is there already; remove it to have it made anew")
        else:
            paths[level] = path
    if not paths:
        return
    torch.set_num_threads(settings.threads)
    if settings.threads == 1:  # set before JAX is loaded; its threads are slower beside other work
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    (settings.folder / "local").mkdir(parents=True, exist_ok=True)  # an unwritable folder should fail at once

    training = None
    if settings.level != "random":
        recipe = RECIPES[env]
        folder = settings.output_dir / "collect" / f"{env}-{seed}"
        if not (folder / "training.json").exists():
            print(f"{env}, seed {seed}: {recipe.learner}, {recipe.steps:,} steps of training", flush=True)
        training = trained(env, seed, folder)
        for level, target in (("medium", recipe.medium), ("expert", EXPERT)):
            score = training.facts[level]["score"]["mean"]
            print(f"{env}, seed {seed}: the {level} policy's score is {score:.1f}", end="")
            short = target - score if level == "expert" else abs(target - score) - NEAR
            print(f"; expected {target:g}" if short > 0 else "", flush=True)

    @cache
    def played(which: str) -> list[Episode]:
        act = uniform(env) if which == "random" else training.policies[which]
        rows = settings.steps or ROWS["random" if which == "random" else "medium"]
        with progress(rows, f"{env}, {which}") as bar:
            return play_rows(env, act, rows, generator(seed, which), bar)

    for level, path in paths.items():
        if level == "medium-replay":
            episodes = thin(training.log, REPLAY)
        else:
            episodes = [episode for which in PARTS[level] for episode in played(which)]
        facts = describe(settings, level, episodes, training)
        write(path, env, episodes, facts)
        print(
            f"{path}: {facts['rows']:,} rows, {facts['episodes']:,} episodes, "
            f"score {facts['score']['mean']:.1f} ± {facts['score']['std']:.1f}, {path.stat().st_size / 1e6:.1f} MB",
            flush=True,
        )


def describe(settings: Settings, level: str, episodes: list[Episode], training: Training | None) -> dict[str, Any]:
    """The metadata of a file."""
    facts = {
        "source": "local (minrnn scripts.collect); not D4RL's",
        "environment": ENVIRONMENTS[settings.env].id,
        "level": level,
        "seed": settings.seed,
        "rows": sum(len(episode["rewards"]) for episode in episodes),
        "episodes": len(episodes),
        "score": summary(scores(settings.env, episodes)),
        "learner": "none: actions are uniform",
        "versions": training.facts["versions"] if training else machine.versions("gymnasium", "mujoco", "numpy"),
        **machine.commit("experiments"),
    }
    if training is not None:
        recipe = training.facts["recipe"]
        facts |= {
            "learner": f"{PACKAGES[recipe['learner']][0]} {recipe['learner']}",
            "learner_settings": json.dumps(recipe["settings"]),
            "training_steps": recipe["steps"],
            "training_seconds": training.facts["seconds"],
            "policies": {level: training.facts[level] for level in ("medium", "expert")},
        }
    if level == "medium-replay":
        rows = sum(len(episode["rewards"]) for episode in training.log)
        facts["replay"] = (
            f"{len(episodes)} episodes, evenly over the training, of the {len(training.log)} ({rows} rows) "
            "that had ended before the medium policy; those still running then are left out"
        )
    return facts


def write(path: Path, env: str, episodes: list[Episode], facts: dict[str, Any]) -> None:
    """Writes a file atomically, after a check that experiments can read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with h5py.File(part, "w") as file:
            for key in KEYS:
                rows = np.concatenate([episode[key] for episode in episodes])
                file.create_dataset(key, data=rows, compression="gzip", shuffle=True)
            _describe(file.create_group("metadata"), facts)
        read(part, f"local/{env}-{LEVELS[0]}")  # the level is not checked
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _describe(group: h5py.Group, facts: dict[str, Any]) -> None:
    for key, value in facts.items():
        if isinstance(value, dict):
            _describe(group.create_group(key), value)
        elif value is not None:
            group.attrs[key] = str(value) if isinstance(value, str) else value  # h5py takes no subclass of str
