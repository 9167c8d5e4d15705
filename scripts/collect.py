"""Makes locomotion data where D4RL's are out of reach: `python -m scripts.collect env=hopper level=medium-replay`.

    env=         hopper, walker2d, halfcheetah
    level=       random, medium, medium-replay, medium-expert; all: the three of one training
    seed=        of training, episodes and noise (0)
    steps=       rows of medium, and of the expert half of medium-expert, to the end of an episode (100000; random 5000)
    folder=      gets local/<env>-<level>.hdf5 ($MINRNN_DATA, else data)
    output_dir=  keeps the finished training, in collect/<env>-<seed>/ (outputs)
    threads=     of the processor (1)

The levels are made as D4RL made its own (arXiv 2004.07219, section 5), on gymnasium's physics: medium is what a policy
does whose score is that of D4RL's medium set; medium-replay all that it had learned from by then; medium-expert the
rows of medium, then what the best policy of the training does. But D4RL's learner is SAC everywhere, and here it is PPO
where that is faster and TQC (arXiv 2005.04269) elsewhere: their logs are no replay buffers of SAC, and a score on these
files is not one on D4RL's.
"""

import argparse
import importlib
import json
import os
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import mujoco
import numpy as np
import torch
from tqdm import tqdm

from experiments import data, files, machine, records
from experiments.decision.data import ENVIRONMENTS, KEYS, LEVELS, MAX_EP_LEN, normalized, read
from experiments.seeds import QUARTER, RUNS

from .tables import command

Episode = dict[str, np.ndarray]  # by KEYS, one row a step
Act = Callable[[np.ndarray, np.random.Generator], np.ndarray]  # (n, S) observations to (n, A) float32 actions

ROWS = {"random": 5_000, "medium": 100_000}  # of a file, and of each half of medium-expert
SCREEN, LOOK = 10, 50  # episodes: of each checkpoint, and of those that may be medium or expert
BATCH = 20  # episodes played at once for a file
CANDIDATES = 5  # for the expert
REPLAY = 200_000  # rows of medium-replay; of a longer log, episodes are left out evenly
NEAR = 4  # score: a medium policy may be so far away ...
EXPERT = 80  # ... and an expert should be as good; what is not is pointed out
# Where a learner comes from: sbx-rl is Stable-Baselines3 in JAX, with several times as many updates a second.
PACKAGES = {"PPO": ("stable-baselines3",), "TQC": ("sbx-rl", "stable-baselines3", "jax")}


@dataclass(frozen=True)
class Recipe:
    """How an environment's policies are trained.

    PPO's observations and rewards are normalised. It may stay at a poor policy: another seed helps.
    """

    medium: float  # mean score of D4RL's medium set, about
    learner: str  # PPO or TQC
    steps: int  # of training
    envs: int  # side by side
    settings: dict[str, Any]  # the learner's
    falls: bool = False  # the learning rate, linearly to zero
    checkpoints: int = 50


PPO = {
    "n_steps": 256,
    "batch_size": 128,
    "learning_rate": 1e-3,
    "policy_kwargs": {"optimizer_kwargs": {"fused": True}},
}
# An update for each step, 64 at once. SAC so, but for fewer random steps at first, stayed at 50.
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


class CollectError(RuntimeError):
    """The text says what is wrong and what to do."""


# -- policies and episodes


class Policy:
    """A trained policy without its learner: numbers only, which a file can hold without code.

    Args:
        arrays: `mean`, `std`, `clip` of observations; `weight0`, `bias0` and so on, of the layers; and `log_std` (A,),
            or `weight_std`, `bias_std` of the layer that gives it. With the latter, TQC's form (and SAC's), hidden
            layers are ReLU and actions tanh; with the former, PPO's, hidden layers are tanh and actions clipped.
    """

    def __init__(self, arrays: dict[str, np.ndarray]):
        self.arrays = arrays
        count = sum(name.removeprefix("weight").isdigit() for name in arrays)
        self.layers = [(arrays[f"weight{i}"], arrays[f"bias{i}"]) for i in range(count)]
        self.squashed = "weight_std" in arrays

    def __call__(self, observations: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        """(n, A) float32 for (n, S); without a generator the mean action."""
        a = self.arrays
        x = np.clip((observations - a["mean"]) / a["std"], -a["clip"], a["clip"]).astype(np.float32)
        for weight, bias in self.layers[:-1]:
            x = x @ weight.T + bias
            x = np.maximum(x, 0) if self.squashed else np.tanh(x)
        weight, bias = self.layers[-1]
        action = x @ weight.T + bias
        if rng is not None:
            log_std = np.clip(x @ a["weight_std"].T + a["bias_std"], -20, 2) if self.squashed else a["log_std"]
            action = action + np.exp(log_std) * rng.standard_normal(action.shape, np.float32)
        return np.tanh(action) if self.squashed else np.clip(action, -1, 1)

    def mean(self, observations: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return self(observations, None)

    @classmethod
    def of(cls, learner: Any) -> "Policy":
        """What a learner would do now: PPO of stable_baselines3, TQC of sbx."""
        normalization = learner.get_vec_normalize_env()
        arrays = {"mean": np.zeros(1), "std": np.ones(1), "clip": np.array(np.inf)}
        if normalization is not None:
            of = normalization.obs_rms
            arrays = {"mean": of.mean, "std": np.sqrt(of.var + normalization.epsilon)}
            arrays["clip"] = np.array(normalization.clip_obs)
        policy = learner.policy
        if hasattr(policy, "actor_state"):
            params = policy.actor_state.params["params"]
            dense = [params[f"Dense_{i}"] for i in range(len(params))]  # hidden layers, mean, logarithm of deviation
            *layers, log_std = [(layer["kernel"].T, layer["bias"]) for layer in dense]
            arrays |= {"weight_std": log_std[0], "bias_std": log_std[1]}
        else:
            linear = [layer for layer in policy.mlp_extractor.policy_net if isinstance(layer, torch.nn.Linear)]
            layers = [(x.weight.detach().numpy(), x.bias.detach().numpy()) for x in (*linear, policy.action_net)]
            arrays["log_std"] = policy.log_std.detach().numpy()
        for i, (weight, bias) in enumerate(layers):
            arrays |= {f"weight{i}": weight, f"bias{i}": bias}
        return cls({name: np.array(x) for name, x in arrays.items()})


class Recorder(gymnasium.Wrapper):
    """Adds to `log` each episode that has ended, as its environment saw it."""

    def __init__(self, env: gymnasium.Env, log: list[Episode]):
        super().__init__(env)
        self.log = log

    def reset(self, **options):
        self.observation, _ = self.env.reset(**options)
        self.rows = []
        return self.observation, {}

    def step(self, action):
        next_observation, reward, terminated, truncated, _ = self.env.step(action)
        self.rows.append((self.observation, action, reward, next_observation))
        self.observation = next_observation
        if terminated or truncated:
            names = ("observations", "actions", "rewards", "next_observations")
            columns = zip(names, zip(*self.rows, strict=True), strict=True)
            episode = {name: np.array(column, np.float32) for name, column in columns}
            last = np.arange(len(self.rows)) == len(self.rows) - 1
            self.log.append(episode | {"terminals": last & terminated, "timeouts": last & (not terminated)})
        return next_observation, reward, terminated, truncated, {}


def environment(env: str, log: list[Episode]) -> Recorder:
    def warn(text: str) -> None:
        if "settotalmass" not in text:  # in gymnasium's HalfCheetah; MuJoCo 4 says so of each, and writes a file of it
            warnings.warn(text, stacklevel=2)

    previous = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(warn)
    try:
        with warnings.catch_warnings():
            # D4RL's scores belong to the environments before v5.
            warnings.filterwarnings("ignore", ".*is out of date", DeprecationWarning)
            made = gymnasium.make(ENVIRONMENTS[env].id, max_episode_steps=MAX_EP_LEN, disable_env_checker=True)
    finally:
        mujoco.set_mju_user_warning(previous)
    return Recorder(made, log)


def play(env: str, act: Act, count: int, rng: np.random.Generator) -> list[Episode]:
    """Whole episodes, in step with each other."""
    logs = [[] for _ in range(count)]
    envs = [environment(env, log) for log in logs]
    # Below QUARTER, and so none that a policy is evaluated with.
    seeds = rng.integers(QUARTER, size=count)
    observations = [env.reset(seed=int(seed))[0] for env, seed in zip(envs, seeds, strict=True)]
    while envs:
        steps = [env.step(action) for env, action in zip(envs, act(np.stack(observations), rng), strict=True)]
        on = [not (terminated or truncated) for _, _, terminated, truncated, _ in steps]
        envs = [env for env, goes in zip(envs, on, strict=True) if goes]
        observations = [step[0] for step, goes in zip(steps, on, strict=True) if goes]
    return [log[0] for log in logs]


def play_rows(env: str, act: Act, rows: int, rng: np.random.Generator, bar: tqdm) -> list[Episode]:
    """As many episodes as it takes. Whole batches are played: the first to end would be the short ones."""
    found, count = [], 0
    while count < rows:
        for episode in play(env, act, BATCH, rng):
            if count < rows:
                found.append(episode)
                count += len(episode["rewards"])
        bar.update(min(count, rows) - bar.n)
    return found


def scores(env: str, episodes: list[Episode]) -> np.ndarray:
    """(E,), D4RL's."""
    return np.array([normalized(env, episode["rewards"].sum(dtype=np.float64)) for episode in episodes])


def summary(values: np.ndarray) -> dict[str, float]:
    return {"mean": float(values.mean()), "std": float(values.std()), "n": len(values)}


# -- training


@dataclass
class Checkpoint:
    step: int
    episodes: int  # that had ended by then
    policy: Policy
    score: float  # of SCREEN episodes


def train(env: str, seed: int, bar: tqdm) -> tuple[list[Checkpoint], list[Episode]]:
    """Checkpoints in order, and the log: each episode that the learner saw to its end, in the order of their ends."""
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    recipe, log, checkpoints = RECIPES[env], [], []
    learner = learner_class(recipe.learner)
    envs = DummyVecEnv([lambda: environment(env, log)] * recipe.envs)
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


def choose(glances: list[float], look: Callable[[int], float], medium: float) -> tuple[int, int]:
    """The checkpoints of level medium and expert: the first that is NEAR medium, else the nearest; and the best.

    Ten episodes say which they may be. To take their word for it would be to take luck for skill, so those few are
    judged by `look`, which gives a checkpoint's score over more.
    """
    order = sorted(range(len(glances)), key=lambda i: abs(glances[i] - medium))
    may_be = sorted(i for i in order if abs(glances[i] - medium) <= 3 * NEAR) or order[:1]
    found: dict[int, float] = {}
    for i in may_be:
        found[i] = look(i)
        if abs(found[i] - medium) <= NEAR:
            break
    chosen = min(found, key=lambda i: abs(found[i] - medium))
    for i in sorted(order, key=lambda i: -glances[i])[:CANDIDATES]:
        found[i] = found[i] if i in found else look(i)
    return chosen, max(found, key=found.__getitem__)


def thin(episodes: list[Episode], rows: int) -> list[Episode]:
    """About so many rows at most: every episode has the same chance whatever its length, evenly over the training."""
    share = min(1, rows / sum(len(episode["rewards"]) for episode in episodes))
    return [episode for i, episode in enumerate(episodes) if int((i + 1) * share) > int(i * share)]


def generator(seed: int, purpose: str, number: int = 0) -> np.random.Generator:
    """One of its own for each purpose, so that what is made does not depend on what else is."""
    return np.random.default_rng([seed, ("random", "screen", "look", "medium", "expert").index(purpose), number])


@dataclass
class Training:
    """What is kept of a finished one.

    Attributes:
        policies: of level medium and expert.
        log: up to the medium one.
        facts: what is said of it in a file's metadata; in JSON's types.
    """

    policies: dict[str, Policy]
    log: list[Episode]
    facts: dict[str, Any]


def trained(env: str, seed: int, folder: Path) -> Training:
    """The finished training of a folder, or one done now and kept there.

    Raises CollectError: another process is at it, or what is there is of other settings or versions or cannot be read.
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
    """All that a training depends on."""
    recipe = RECIPES[env]
    versions = machine.versions("gymnasium", "mujoco", "numpy", *PACKAGES[recipe.learner])
    return {"environment": ENVIRONMENTS[env].id, "seed": seed, "recipe": asdict(recipe), "versions": versions}


def _train(env: str, seed: int, folder: Path) -> None:
    recipe, began = RECIPES[env], time.monotonic()
    with _bar(recipe.steps, f"{env}, {recipe.learner}") as bar:
        checkpoints, log = train(env, seed, bar)
    seconds = time.monotonic() - began
    judged: dict[int, np.ndarray] = {}
    with _bar(None, "looking at policies", unit=" policies") as bar:

        def look(i: int) -> float:
            judged[i] = scores(env, play(env, checkpoints[i].policy, LOOK, generator(seed, "look", i)))
            bar.update()
            bar.set_postfix_str(f"score {judged[i].mean():.1f}")
            return judged[i].mean()

        glances = [checkpoint.score for checkpoint in checkpoints]
        chosen = dict(zip(("medium", "expert"), choose(glances, look, recipe.medium), strict=True))
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
    records.write_json(folder / "training.json", facts)  # last: with it the training is whole


def _load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def _split(rows: Episode) -> list[Episode]:
    ends = np.flatnonzero(rows["terminals"] | rows["timeouts"]) + 1
    parts = {key: np.split(rows[key], ends[:-1]) for key in KEYS}
    return [dict(zip(KEYS, values, strict=True)) for values in zip(*parts.values(), strict=True)]


def _bar(total: int | None, what: str, unit: str = " steps") -> tqdm:
    return tqdm(total=total, desc=what, unit=unit, unit_scale=True, dynamic_ncols=True, disable=None)


# -- files


def write(path: Path, env: str, episodes: list[Episode], facts: dict[str, Any]) -> None:
    """Whole or not at all; and only what experiments can read stands under its name."""
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
            group.attrs[key] = str(value) if isinstance(value, str) else value  # h5py takes no class of torch's


def collect(settings: "Settings") -> None:
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
    if settings.threads == 1:  # JAX reads it when it is loaded; its threads are slower beside other work
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    (settings.folder / "local").mkdir(parents=True, exist_ok=True)  # what cannot be written is better known at once

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
        with _bar(rows, f"{env}, {which}") as bar:
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


PARTS = {"random": ("random",), "medium": ("medium",), "medium-expert": ("medium", "expert")}


def uniform(env: str) -> Act:
    actions = ENVIRONMENTS[env].sizes[1]
    return lambda observations, rng: rng.uniform(-1, 1, (len(observations), actions)).astype(np.float32)


def describe(settings: "Settings", level: str, episodes: list[Episode], training: Training | None) -> dict[str, Any]:
    """A file's metadata."""
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
        **machine.commit("scripts", "experiments"),
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


# -- the command line


@dataclass
class Settings:
    env: str = ""
    level: str = ""
    seed: int = 0
    steps: int | None = None
    folder: Path = field(default_factory=lambda: data.folders()[0])
    output_dir: Path = Path("outputs")
    threads: int = 1


def parse(arguments: list[str]) -> Settings:
    """Raises ValueError: the text says which argument, and what was expected."""
    settings, known = Settings(), [f.name for f in fields(Settings)]
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise ValueError(f"expected key=value of {', '.join(known)}, got {argument!r}")
        if key not in known:
            raise ValueError(f"{key}: no such setting; the nearest is {files.nearest(key, known)}")
        if key in ("seed", "steps", "threads"):
            low, high = {"seed": (0, RUNS - 1), "steps": (1, 10**7), "threads": (1, 1024)}[key]
            if not value.isdecimal() or not low <= int(value) <= high:
                raise ValueError(f"{key}: expected a whole number from {low} to {high}, got {value!r}")
            value = int(value)
        setattr(settings, key, Path(value) if key in ("folder", "output_dir") else value)
    for key, choices in (("env", list(RECIPES)), ("level", ["random", *LEVELS, "all"])):
        value = getattr(settings, key)
        if value not in choices:
            hint = f"got {value!r}; the nearest is {files.nearest(value, choices)}" if value else "got none"
            raise ValueError(f"{key}: expected one of {', '.join(choices)}, {hint}")
    if settings.level == "medium-replay" and settings.steps:
        raise ValueError("steps: expected none for medium-replay, which is as long as its training was")
    return settings


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.collect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", metavar="key=value")
    arguments = parser.parse_args().settings
    try:
        settings = parse(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        collect(settings)
    except (CollectError, data.DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    command(main)
