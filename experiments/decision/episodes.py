"""Plays a policy in a batch of environments, one episode each, in parallel."""

import contextlib
import warnings
from collections.abc import Callable, Iterator

import gymnasium
import mujoco
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minrnn.mixers.base import state_map
from minrnn.models import DecisionModel

from .data import MAX_EP_LEN, SCALE


@torch.inference_mode()
def rollout(
    model: DecisionModel,
    env_id: str,
    state_mean: Tensor,
    state_std: Tensor,
    target_returns: np.ndarray,
    seeds: np.ndarray,
    context_length: int | None,
    left_padding: bool = False,
    callback: Callable[[list[gymnasium.Env]], object] = lambda envs: None,
) -> tuple[np.ndarray, np.ndarray]:
    """The returns (n,) and lengths (n,) of n episodes, one for each target return.

    After each step the reward is subtracted from the return-to-go (Decision Transformer, section 4.1;
    https://github.com/kzl/decision-transformer/blob/e2d82e68f330c00f763507b3b01d774740bee53f/gym/
    decision_transformer/evaluation/evaluate_episodes.py).

    Args:
        env_id: gymnasium's.
        state_mean, state_std: (S,), of the observations that the model was trained on, on its device.
        target_returns: (n,).
        seeds: (n,), with which the environments are reset.
        context_length: how many last steps the policy reads anew at each step; None: all, through the model's state.
        left_padding: pad with zeros on the left until the episode has context_length steps, as in the published code.
        callback: called with the n environments before each step and after the last; ended ones keep their last state.
    """
    n, device = len(target_returns), state_mean.device
    policy = Carried(model, n) if context_length is None else Window(model, context_length, left_padding)
    returns, lengths = np.zeros(n), np.zeros(n, int)
    with _environments(env_id, n) as envs:
        observations = np.stack([env.reset(seed=int(seed))[0] for env, seed in zip(envs, seeds, strict=True)])
        running, returns_to_go = np.arange(n), np.asarray(target_returns, np.float64)
        for timestep in range(MAX_EP_LEN):
            callback(envs)
            states = (torch.as_tensor(observations, dtype=torch.float32, device=device) - state_mean) / state_std
            scaled = torch.as_tensor(returns_to_go[:, None] / SCALE, dtype=torch.float32, device=device)
            actions = policy.act(scaled, states, timestep).cpu().numpy()
            steps = [envs[i].step(action) for i, action in zip(running, actions, strict=True)]
            observations, rewards, terminated, truncated = (np.array(x) for x in (*zip(*steps, strict=True),)[:4])
            returns[running] += rewards
            lengths[running] += 1
            on = ~(terminated | truncated)
            if not on.any():
                break
            observations, returns_to_go, running = observations[on], (returns_to_go - rewards)[on], running[on]
            if not on.all():
                policy.keep(torch.as_tensor(np.flatnonzero(on), device=device))
        callback(envs)
    return returns, lengths


class Carried:
    """Carries the model's state: a step costs the same however long the episode is."""

    def __init__(self, model: DecisionModel, n: int):
        self.model, self.hidden, self.actions = model, model.initial_state(n), None

    def act(self, returns_to_go: Tensor, states: Tensor, timestep: int) -> Tensor:
        """Actions (n, A) for returns-to-go (n, 1) and states (n, S)."""
        self.actions, self.hidden = self.model.step(returns_to_go, states, self.actions, timestep, self.hidden)
        return self.actions

    def keep(self, episodes: Tensor) -> None:
        self.actions = self.actions[episodes]
        self.hidden = state_map(lambda x: x[episodes], self.hidden)


class Window:
    """Reads the last `context_length` steps anew at each step."""

    def __init__(self, model: DecisionModel, context_length: int, left_padding: bool):
        self.model, self.context_length, self.left_padding = model, context_length, left_padding
        self.past: tuple[Tensor, ...] = ()  # returns-to-go, states, actions: (n, steps so far, at most K, ...)

    def act(self, returns_to_go: Tensor, states: Tensor, timestep: int) -> Tensor:
        now = [x[:, None] for x in (returns_to_go, states, states.new_zeros(len(states), self.model.act_dim))]
        if self.past:
            now = [torch.cat(pair, 1)[:, -self.context_length :] for pair in zip(self.past, now, strict=True)]
        self.past = tuple(now)
        K = now[1].shape[1]
        timesteps = torch.arange(timestep + 1 - K, timestep + 1, device=states.device).expand(len(states), K)
        inputs = (*now, timesteps)
        if self.left_padding and self.context_length > K:
            pad = self.context_length - K
            inputs = tuple(F.pad(x, (0, 0, pad, 0) if x.dim() == 3 else (pad, 0)) for x in inputs)
        actions = self.model(*inputs)[:, -1]
        self.past[2][:, -1] = actions
        return actions

    def keep(self, episodes: Tensor) -> None:
        self.past = tuple(x[episodes] for x in self.past)


def make(env_id: str) -> gymnasium.Env:
    """The environment in version 4, D4RL's physics, which version 5 changed; without the warnings about its age."""

    def warn(text: str) -> None:
        if "settotalmass" not in text:  # gymnasium's HalfCheetah has it; MuJoCo 4 warns each time, and logs to a file
            warnings.warn(text, stacklevel=2)

    previous = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(warn)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is out of date", DeprecationWarning)
            return gymnasium.make(env_id, max_episode_steps=MAX_EP_LEN, disable_env_checker=True)
    finally:
        mujoco.set_mju_user_warning(previous)


@contextlib.contextmanager
def _environments(env_id: str, n: int) -> Iterator[list[gymnasium.Env]]:
    # Gymnasium's vector environments do not serve: they go on after an episode has ended.
    envs = [make(env_id) for _ in range(n)]
    try:
        yield envs
    finally:
        for env in envs:
            env.close()
