"""Trains policies, once for each environment and seed, and keeps the finished training in a folder."""

import importlib
import json
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ... import files, machine, records
from ..data import ENVIRONMENTS, KEYS
from ..episodes import make
from .policies import Episode, Policy, Recorder, generator, play, scores, summary

SCREEN, LOOK = 10, 50  # episodes for each checkpoint, and for candidates for medium or expert
CANDIDATES = 5  # for the expert
NEAR = 4  # score: the largest distance of a medium policy from the target
# The packages of each learner; sbx-rl is Stable-Baselines3 in JAX, with several times as many updates per second.
PACKAGES = {"PPO": ("stable-baselines3",), "TQC": ("sbx-rl", "stable-baselines3", "jax")}


@dataclass(frozen=True)
class Recipe:
    """How an environment's policies are trained.

    PPO's observations and rewards are normalised. PPO may get stuck at a poor policy; another seed helps.
    """

    medium: float  # approximate mean score of D4RL's medium set
    learner: str  # PPO or TQC
    steps: int  # of training
    envs: int  # side by side
    settings: dict[str, Any]  # the learner's
    falls: bool = False  # the learning rate falls linearly to zero
    checkpoints: int = 50


PPO = {
    "n_steps": 256,
    "batch_size": 128,
    "learning_rate": 1e-3,
    "policy_kwargs": {"optimizer_kwargs": {"fused": True}},
}
# One update per step, in groups of 64. SAC with these settings, but fewer random steps at first, stayed at 50.
TQC = {
    "learning_starts": 10_000,
    "train_freq": 8,
    "gradient_steps": 64,
    "batch_size": 128,
    "learning_rate": 6e-4,
    "policy_delay": 2,
    "policy_kwargs": {"net_arch": [128, 128]},
}
RECIPES = {
    "hopper": Recipe(44.3, "PPO", 600_000, 8, PPO),
    "walker2d": Recipe(62.0, "PPO", 800_000, 8, PPO, falls=True),
    "halfcheetah": Recipe(42.7, "TQC", 800_000, 8, TQC),
}


class CollectError(files.Refusal, RuntimeError):
    """A training or its folder cannot be used; the text says what is wrong and what to do."""


@dataclass
class Checkpoint:
    step: int
    episodes: int  # that had ended by then
    policy: Policy
    score: float  # of SCREEN episodes


def train(env: str, seed: int, bar: tqdm) -> tuple[list[Checkpoint], list[Episode]]:
    """Trains a policy; its checkpoints in order, and the log of the finished episodes in the order of their ends."""
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    recipe, log, checkpoints = RECIPES[env], [], []
    learner = learner_class(recipe.learner)
    envs = DummyVecEnv([lambda: Recorder(make(ENVIRONMENTS[env].id), log)] * recipe.envs)
    settings = dict(recipe.settings)
    if recipe.learner == "PPO":
        envs = VecNormalize(envs)
    if recipe.falls:
        rate = settings["learning_rate"]
        settings["learning_rate"] = lambda left: left * rate
    learner = learner("MlpPolicy", envs, seed=seed, device="cpu", **settings)

    def look(*_) -> bool:
        step, count = learner.num_timesteps, len(checkpoints) + 1
        bar.update(step - bar.n)
        if step >= count * recipe.steps // recipe.checkpoints:
            policy = Policy.of(learner)
            score = scores(env, play(env, policy, SCREEN, generator(seed, "screen", count))).mean()
            checkpoints.append(Checkpoint(step, len(log), policy, score))
            bar.set_postfix_str(f"score {score:.1f}")
        return True

    learner.learn(recipe.steps, callback=look)
    envs.close()
    return checkpoints, log


def learner_class(name: str) -> type:
    package = PACKAGES[name][0].removesuffix("-rl").replace("-", "_")
    try:
        return getattr(importlib.import_module(package), name)
    except ModuleNotFoundError as error:
        raise CollectError(
            f"{name} is that of {PACKAGES[name][0]}, which is not installed ({error}): "
            f"{Path(sys.executable).with_name('pip')} install {PACKAGES[name][0]}"
        ) from error


def choose(quick_scores: list[float], look: Callable[[int], float], medium: float) -> tuple[int, int]:
    """The checkpoints of level medium and expert: the first within NEAR of medium, else the nearest; and the best.

    `quick_scores`, the scores over SCREEN episodes, select candidates. Choosing by these few would reward luck, so
    `look` scores each candidate over more episodes.
    """
    order = sorted(range(len(quick_scores)), key=lambda i: abs(quick_scores[i] - medium))
    may_be = sorted(i for i in order if abs(quick_scores[i] - medium) <= 3 * NEAR) or order[:1]
    found: dict[int, float] = {}
    for i in may_be:
        found[i] = look(i)
        if abs(found[i] - medium) <= NEAR:
            break
    chosen = min(found, key=lambda i: abs(found[i] - medium))
    for i in sorted(order, key=lambda i: -quick_scores[i])[:CANDIDATES]:
        found[i] = found[i] if i in found else look(i)
    return chosen, max(found, key=found.__getitem__)


def thin(episodes: list[Episode], rows: int) -> list[Episode]:
    """Episodes of about `rows` rows at most, spread evenly over the training, whatever their lengths."""
    share = min(1, rows / sum(len(episode["rewards"]) for episode in episodes))
    return [episode for i, episode in enumerate(episodes) if int((i + 1) * share) > int(i * share)]


@dataclass
class Training:
    """A finished training, as it is kept.

    Attributes:
        policies: those of level medium and expert.
        log: the episodes up to the medium policy.
        facts: the training's entries in a file's metadata; JSON types.
    """

    policies: dict[str, Policy]
    log: list[Episode]
    facts: dict[str, Any]


def trained(env: str, seed: int, folder: Path) -> Training:
    """The finished training in a folder, or a new one that is then kept there.

    Raises CollectError: another process is training there, or the kept training has other settings or versions or
    cannot be read.
    """
    with files.claim(folder) as free:
        if not free:
            raise CollectError(f"{folder}: another process trains there; wait for it, or give another output_dir")
        if not (folder / "training.json").exists():
            _train(env, seed, folder)
    try:
        facts = json.loads((folder / "training.json").read_text())
        policies = {level: Policy(_load(folder / f"{level}.npz")) for level in ("medium", "expert")}
        log = _split(_load(folder / "log.npz"))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise CollectError(f"{folder}: cannot be read ({error}); remove it to have it trained anew") from error
    for key, now in _settings(env, seed).items():
        if facts[key] != now:
            raise CollectError(
                f"{folder}: was trained with other {key} (expected {now}, got {facts[key]}); "
                "remove it to have it trained anew, or give another output_dir"
            )
    return Training(policies, log, facts)


def _settings(env: str, seed: int) -> dict[str, Any]:
    """All settings that a training depends on."""
    recipe = RECIPES[env]
    versions = machine.versions("gymnasium", "mujoco", "numpy", *PACKAGES[recipe.learner])
    return {"environment": ENVIRONMENTS[env].id, "seed": seed, "recipe": asdict(recipe), "versions": versions}


def _train(env: str, seed: int, folder: Path) -> None:
    recipe, began = RECIPES[env], time.monotonic()
    with progress(recipe.steps, f"{env}, {recipe.learner}") as bar:
        checkpoints, log = train(env, seed, bar)
    seconds = time.monotonic() - began
    judged: dict[int, np.ndarray] = {}
    with progress(None, "looking at policies", unit=" policies") as bar:

        def look(i: int) -> float:
            judged[i] = scores(env, play(env, checkpoints[i].policy, LOOK, generator(seed, "look", i)))
            bar.update()
            bar.set_postfix_str(f"score {judged[i].mean():.1f}")
            return judged[i].mean()

        quick_scores = [checkpoint.score for checkpoint in checkpoints]
        chosen = dict(zip(("medium", "expert"), choose(quick_scores, look, recipe.medium), strict=True))
    facts = _settings(env, seed) | {"seconds": round(seconds, 1), "score_of_d4rl_medium": recipe.medium}
    facts["checkpoints"] = [[c.step, round(float(c.score), 2)] for c in checkpoints]
    for level, i in chosen.items():
        policy = checkpoints[i].policy
        mean_action = play(env, policy.mean, LOOK, generator(seed, "look", i))
        facts[level] = {"step": checkpoints[i].step, "score": summary(judged[i])}
        facts[level]["score_of_mean_action"] = summary(scores(env, mean_action))
        np.savez(folder / f"{level}.npz", **policy.arrays)
    episodes = log[: checkpoints[chosen["medium"]].episodes]
    np.savez(folder / "log.npz", **{key: np.concatenate([episode[key] for episode in episodes]) for key in KEYS})
    records.write_json(folder / "training.json", facts)  # last, as its presence marks the training as complete


def _load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def _split(rows: Episode) -> list[Episode]:
    ends = np.flatnonzero(rows["terminals"] | rows["timeouts"]) + 1
    parts = {key: np.split(rows[key], ends[:-1]) for key in KEYS}
    return [dict(zip(KEYS, values, strict=True)) for values in zip(*parts.values(), strict=True)]


def progress(total: int | None, what: str, unit: str = " steps") -> tqdm:
    return tqdm(total=total, desc=what, unit=unit, unit_scale=True, dynamic_ncols=True, disable=None)
