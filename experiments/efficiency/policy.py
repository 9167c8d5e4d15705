"""Times a decision model in use: a training step, one more step of an episode, and environments with a policy.

Sizes are Decision Transformer's on Hopper. Models are first checked against themselves in float64 on plain loops, and
steps against the whole window; a wrong one stops the measurement.
"""

import contextlib
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minrnn.mixers import make
from minrnn.models import DecisionModel

from .. import measure
from ..config import EfficiencyData, Train
from ..engine import Trainer
from ..measure import Call, summary
from .steps import LAYERS, NEAR, check
from .timer import Case, Point, Timer, sizes

STATE, ACTION = 11, 3
CONTEXT, BATCH = 20, 64  # of training
STEPS = 300  # of the environments
USED = ("minGRU", "Transformer")


def models(width: int) -> dict[str, Callable[[], DecisionModel]]:
    def build(mixer, **settings):
        return lambda: DecisionModel(STATE, ACTION, width, LAYERS, mixer, **settings)

    paper = {"mlp": 2, "activation": "geglu"}
    published = {"mlp": 4, "norm": "layer", "bias": True, "init": "dt"}
    return {
        "minGRU": build(make("mingru", expansion=1), **paper),
        "minLSTM": build(make("minlstm", expansion=1), **paper),
        "Transformer": build(make("attention", heads=1, bias=True), activation="relu", **published),
        "Mamba": build(make("ssm", inner="s6", wrapping="mamba"), **published),
    }


def windows(batch: int, context: int, device: torch.device | str) -> list[Tensor]:
    """Random returns-to-go, states, actions and timesteps, each (B, T, ...)."""
    drawn = [torch.randn(batch, context, size, device=device) for size in (1, STATE, ACTION)]
    return [*drawn, torch.arange(context, device=device).expand(batch, context)]


def prepare(
    data: EfficiencyData, device: torch.device, stack: contextlib.ExitStack
) -> tuple[list[Case], dict[str, Any]]:
    """The cases, of three kinds: "training", "policy" at each context, "environment"."""
    (width,), (episodes,), dtype = data.widths, data.batch_sizes, {"dtype": "float32"}
    built = models(width)
    errors = {name: check(name, build, windows(2, CONTEXT, "cpu"), device) for name, build in built.items()}
    nets = {name: built[name]().to(device).eval() for name in USED}
    check_steps(nets["minGRU"], device)
    training = {"kind": "training", "batch": BATCH, "length": CONTEXT, "width": width, **dtype}

    def train(before: list[Point]) -> list[Point]:
        builds = {name: partial(training_step, build, device) for name, build in built.items()}
        return Timer(data, device, training).measure(builds)

    def act(said: Point, before: list[Point]) -> list[Point]:
        builds = {name: partial(policy_step, net, said["batch"], said["length"], device) for name, net in nets.items()}
        return Timer(data, device, said).measure(builds)

    cases = [(training, train)]
    for size in sizes(data):
        said = {"kind": "policy", **size, **dtype}
        cases.append((said, partial(act, said)))
    if device.type == "cpu":
        said = {"kind": "environment", "batch": episodes, "length": CONTEXT, "width": width, **dtype}
        cases.append((said, partial(environments, data, device, said, nets)))
    return cases, {"errors": errors, **dtype}


@torch.inference_mode()
def check_steps(net: DecisionModel, device: torch.device) -> None:
    """Raises ArithmeticError: the output of the last of many steps differs from that of the whole window."""
    returns_to_go, states, actions, _ = inputs = windows(2, CONTEXT, device)
    state, before = net.initial_state(2), None
    for t in range(CONTEXT):
        last, state = net.step(returns_to_go[:, t], states[:, t], before, t, state)
        before = actions[:, t]
    measure.check("a step of minGRU's policy", last, net(*inputs)[:, -1], NEAR[device.type])


def training_step(build: Callable[[], DecisionModel], device: torch.device) -> Call:
    trainer = Trainer(build().to(device), Train(learning_rate=1e-4, weight_decay=1e-4, grad_clip=0.25))
    inputs = windows(BATCH, CONTEXT, device)
    return lambda: trainer.step(0, lambda model, part: (model(*part) - part[2]).square().mean(), [inputs])


@torch.inference_mode()
def policy_step(net: DecisionModel, episodes: int, context: int, device: torch.device) -> Call:
    """A run of the context-th step from the state; attention reads all steps so far anew."""
    inputs = windows(episodes, context, device)
    if type(net.backbone.mixers[0]).__name__ == "Attention":
        return torch.inference_mode()(lambda: net(*inputs))
    state, before = net.initial_state(episodes), None
    for t in range(context - 1):
        before, state = net.step(inputs[0][:, t], inputs[1][:, t], before, t, state)
    last = inputs[0][:, -1], inputs[1][:, -1], before, context - 1
    return torch.inference_mode()(lambda: net.step(*last, state))


def environments(
    data: EfficiencyData, device: torch.device, said: Point, nets: dict[str, DecisionModel], before: list[Point]
) -> list[Point]:
    """Times a step of Hopper environments on one thread, with random actions and with each policy."""
    timer, threads = Timer(data, device, said), torch.get_num_threads()
    episodes = said["batch"]
    actions = np.random.default_rng(0).uniform(-1, 1, (STEPS, episodes, ACTION)).astype(np.float32)
    policies = {
        "bare": lambda states, t: actions[t],
        "minGRU": recurrent(nets["minGRU"], episodes),
        "Transformer": windowed(nets["Transformer"], episodes),
    }
    torch.set_num_threads(1)
    try:
        for name, policy in policies.items():
            taken = timer.attempt(name, partial(hop, policy, episodes))
            if taken is not None:
                timer.note(name, "done", **summary(taken))
    finally:
        torch.set_num_threads(threads)
    return timer.points


Policy = Callable[[np.ndarray, int], np.ndarray]  # from states and the step's number to actions


def recurrent(net: DecisionModel, episodes: int) -> Policy:
    returns_to_go, carried = torch.ones(episodes, 1), [None, net.initial_state(episodes)]

    @torch.inference_mode()
    def act(states: np.ndarray, t: int) -> np.ndarray:
        carried[:] = net.step(returns_to_go, torch.as_tensor(states, dtype=torch.float32), carried[0], t, carried[1])
        return carried[0].numpy()

    return act


def windowed(net: DecisionModel, episodes: int) -> Policy:
    past = windows(episodes, CONTEXT, "cpu")

    @torch.inference_mode()
    def act(states: np.ndarray, t: int) -> np.ndarray:
        past[1] = torch.cat([past[1][:, 1:], torch.as_tensor(states, dtype=torch.float32)[:, None]], 1)
        action = net(*past)[:, -1]
        past[2] = torch.cat([past[2][:, 1:], action[:, None]], 1)
        return action.numpy()

    return act


def hop(act: Policy, episodes: int) -> list[float]:
    """The seconds of each step of `episodes` Hoppers, including the policy."""
    from ..decision.episodes import make  # imports gymnasium

    envs = [make("Hopper-v4") for _ in range(episodes)]
    states, taken = np.stack([env.reset(seed=i)[0] for i, env in enumerate(envs)]), []
    for t in range(STEPS):
        begin = time.perf_counter()
        for i, (env, action) in enumerate(zip(envs, act(states, t), strict=True)):
            states[i], _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                states[i], _ = env.reset()
        taken.append(time.perf_counter() - begin)
    return taken
