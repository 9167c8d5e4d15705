"""Policies without their learners, and the episodes they play."""

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
from tqdm import tqdm

from ...seeds import QUARTER
from ..data import ENVIRONMENTS, normalized
from ..episodes import make

Episode = dict[str, np.ndarray]  # by KEYS, one row per step
Act = Callable[[np.ndarray, np.random.Generator], np.ndarray]  # (n, S) observations to (n, A) float32 actions

BATCH = 20  # episodes played at once for a file


class Policy:
    """A trained policy without its learner: only arrays, which a file can hold without code.

    Args:
        arrays: `mean`, `std`, `clip` for observations; `weight0`, `bias0` and so on for the layers; and for the
            deviation either `log_std` (A,), as in PPO, where hidden layers are tanh and actions clipped, or
            `weight_std`, `bias_std` of its layer, as in TQC and SAC, where hidden layers are ReLU and actions tanh.
    """

    def __init__(self, arrays: dict[str, np.ndarray]):
        self.arrays = arrays
        count = sum(name.removeprefix("weight").isdigit() for name in arrays)
        self.layers = [(arrays[f"weight{i}"], arrays[f"bias{i}"]) for i in range(count)]
        self.squashed = "weight_std" in arrays

    def __call__(self, observations: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        """Actions (n, A), float32, for observations (n, S); the mean actions without a generator."""
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
        """The current policy of a learner: PPO of stable_baselines3, or TQC of sbx."""
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
    """Adds each finished episode to `log`, as its environment saw it."""

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


def uniform(env: str) -> Act:
    actions = ENVIRONMENTS[env].sizes[1]
    return lambda observations, rng: rng.uniform(-1, 1, (len(observations), actions)).astype(np.float32)


def play(env: str, act: Act, count: int, rng: np.random.Generator) -> list[Episode]:
    """Plays `count` whole episodes, in parallel."""
    logs = [[] for _ in range(count)]
    envs = [Recorder(make(ENVIRONMENTS[env].id), log) for log in logs]
    # Seeds below QUARTER are not used to evaluate policies.
    seeds = rng.integers(QUARTER, size=count)
    observations = [env.reset(seed=int(seed))[0] for env, seed in zip(envs, seeds, strict=True)]
    while envs:
        steps = [env.step(action) for env, action in zip(envs, act(np.stack(observations), rng), strict=True)]
        on = [not (terminated or truncated) for _, _, terminated, truncated, _ in steps]
        envs = [env for env, goes in zip(envs, on, strict=True) if goes]
        observations = [step[0] for step, goes in zip(steps, on, strict=True) if goes]
    return [log[0] for log in logs]


def play_rows(env: str, act: Act, rows: int, rng: np.random.Generator, bar: tqdm) -> list[Episode]:
    """Episodes with at least `rows` rows in all, played in whole batches, as the first to end would be short ones."""
    found, count = [], 0
    while count < rows:
        for episode in play(env, act, BATCH, rng):
            if count < rows:
                found.append(episode)
                count += len(episode["rewards"])
        bar.update(min(count, rows) - bar.n)
    return found


def scores(env: str, episodes: list[Episode]) -> np.ndarray:
    """D4RL's scores (E,) of episodes."""
    return np.array([normalized(env, episode["rewards"].sum(dtype=np.float64)) for episode in episodes])


def summary(values: np.ndarray) -> dict[str, float]:
    return {"mean": float(values.mean()), "std": float(values.std()), "n": len(values)}


def generator(seed: int, purpose: str, number: int = 0) -> np.random.Generator:
    """A generator for one purpose, so that its data does not depend on what else is made."""
    return np.random.default_rng([seed, ("random", "screen", "look", "medium", "expert").index(purpose), number])
