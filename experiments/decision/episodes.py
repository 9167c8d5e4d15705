"""A policy in its environments: batched, one episode each, all in step."""

import contextlib
import warnings
from collections.abc import Callable, Iterator

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minrnn.mixers.base import state_map
from minrnn.models import DecisionModel

from .data import EPISODE, SCALE


@torch.inference_mode()
def rollout(
    model: DecisionModel,
    environment: str,
    mean: Tensor,
    std: Tensor,
    targets: np.ndarray,
    seed: int,
    context: int | None,
    padded: bool = False,
    watch: Callable[[list[gymnasium.Env]], object] = lambda envs: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (n,) and lengths (n,) of n episodes, one for each target return.

    After each step the return still wanted is what was wanted less the reward (Decision Transformer, section 4.1; its
    gym/decision_transformer/evaluation/evaluate_episodes.py).

    Args:
        environment: gymnasium's id.
        mean, std: (S,), of the observations that the model was trained on, on its device.
        targets: (n,) wanted returns.
        seed: the i-th episode begins as its environment does with seed + i.
        context: how many steps the policy looks back, which it reads anew at each; None: all, in the model's state.
        padded: before the episode's context-th step zeros stand on the left, as in the published code.
        watch: called with the n environments before each step and after the last; ended ones stay as they ended.
    """
    n, device = len(targets), mean.device
    policy = Stepwise(model, n) if context is None else Windowed(model, context, padded)
    returns, lengths = np.zeros(n), np.zeros(n, int)
    with _environments(environment, n) as envs:
        seen = np.stack([env.reset(seed=seed + i)[0] for i, env in enumerate(envs)])
        alive, wanted = np.arange(n), np.asarray(targets, np.float64)
        for time in range(EPISODE):
            watch(envs)
            states = (torch.as_tensor(seen, dtype=torch.float32, device=device) - mean) / std
            left = torch.as_tensor(wanted[:, None] / SCALE, dtype=torch.float32, device=device)
            actions = policy.act(left, states, time).cpu().numpy()
            steps = [envs[i].step(action) for i, action in zip(alive, actions, strict=True)]
            rewards = np.array([step[1] for step in steps])
            returns[alive] += rewards
            lengths[alive] += 1
            on = np.array([not (step[2] or step[3]) for step in steps])
            if not on.any():
                break
            seen, wanted, alive = np.stack([step[0] for step in steps])[on], (wanted - rewards)[on], alive[on]
            if not on.all():
                policy.keep(torch.as_tensor(np.flatnonzero(on), device=device))
        watch(envs)
    return returns, lengths


class Stepwise:
    """Looks back through the model's state: a step costs the same however long the episode is."""

    def __init__(self, model: DecisionModel, n: int):
        self.model, self.state, self.before = model, model.initial_state(n), None

    def act(self, wanted: Tensor, seen: Tensor, time: int) -> Tensor:
        self.before, self.state = self.model.step(wanted, seen, self.before, time, self.state)
        return self.before

    def keep(self, episodes: Tensor) -> None:
        self.before = self.before[episodes]
        self.state = state_map(lambda x: x[episodes], self.state)


class Windowed:
    """Reads the last `context` steps anew at each step."""

    def __init__(self, model: DecisionModel, context: int, padded: bool):
        self.model, self.context, self.padded = model, context, padded
        self.wanted = self.seen = self.done = None  # (n, steps so far but context at most, ...)

    def act(self, wanted: Tensor, seen: Tensor, time: int) -> Tensor:
        none = torch.zeros(len(seen), self.model.head.out_features, device=seen.device)
        self.wanted, self.seen, self.done = (
            now[:, None] if past is None else torch.cat([past, now[:, None]], 1)[:, -self.context :]
            for past, now in ((self.wanted, wanted), (self.seen, seen), (self.done, none))
        )
        K = self.seen.shape[1]
        times = torch.arange(time + 1 - K, time + 1, device=seen.device).expand(len(seen), K)
        inputs = (self.wanted, self.seen, self.done, times)
        if self.padded and self.context > K:
            pad = self.context - K
            inputs = tuple(F.pad(x, (0, 0, pad, 0) if x.dim() == 3 else (pad, 0)) for x in inputs)
        action = self.model(*inputs)[:, -1]
        self.done[:, -1] = action
        return action

    def keep(self, episodes: Tensor) -> None:
        self.wanted, self.seen, self.done = (x[episodes] for x in (self.wanted, self.seen, self.done))


@contextlib.contextmanager
def _environments(name: str, n: int) -> Iterator[list[gymnasium.Env]]:
    # Not gymnasium's vector environments: those go on with episodes that have ended.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # v4 on purpose: D4RL's physics, which v5 changed
        envs = [gymnasium.make(name, max_episode_steps=EPISODE, disable_env_checker=True) for _ in range(n)]
    try:
        yield envs
    finally:
        for env in envs:
            env.close()
