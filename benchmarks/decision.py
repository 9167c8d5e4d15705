"""A decision model in use: a training step, one more step of an episode, and environments that wait for it."""

import importlib.util
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch

from experiments.config import Train
from experiments.engine import Trainer
from experiments.machine import keep_freed_memory
from experiments.measure import seconds, summary
from minrnn.mixers import make
from minrnn.models import DecisionModel

# Decision Transformer's sizes on Hopper.
STATE, ACTION, DIM, LAYERS, CONTEXT, BATCH = 11, 3, 128, 3, 20, 64
CONTEXTS = (1, 5, 20, 50, 100, 200, 500)
EPISODES = 60  # at once


def models() -> dict[str, Callable[[], DecisionModel]]:
    def build(mixer, **settings):
        return lambda: DecisionModel(STATE, ACTION, DIM, LAYERS, mixer, **settings)

    paper = {"mlp": 2, "activation": "geglu"}
    published = {"mlp": 4, "norm": "layer", "bias": True, "init": "dt"}
    return {
        "minrnn": build(make("mingru", expansion=1), **paper),
        "minLSTM": build(make("minlstm", expansion=1), **paper),
        "Transformer": build(make("attention", heads=1, bias=True), activation="relu", **published),
        "Mamba": build(make("ssm", inner="s6", wrapping="mamba"), **published),
    }


def windows(batch: int, context: int, device: str) -> tuple[torch.Tensor, ...]:
    draw = [torch.randn(batch, context, size, device=device) for size in (1, STATE, ACTION)]
    return *draw, torch.arange(context, device=device).expand(batch, context)


def training_step(net: DecisionModel, device: str) -> Callable[[], None]:
    trainer = Trainer(net, Train(learning_rate=1e-4, weight_decay=1e-4, grad_clip=0.25))
    inputs = windows(BATCH, CONTEXT, device)
    return lambda: trainer.step(0, lambda model, part: (model(*part) - part[2]).square().mean(), [inputs])


def decision(device: str) -> list[dict]:
    """Rows of three kinds: "training", "policy" at a context, "environment"."""
    keep_freed_memory()
    rows = [{"kind": "training", "shape": (BATCH, CONTEXT), "dtype": "float32"}]
    for name, build in models().items():
        rows[0][name] = summary(seconds(training_step(build().to(device), device), device, at_least=4.0))
    nets = {name: build().to(device).eval() for name, build in models().items() if name in ("minrnn", "Transformer")}
    with torch.inference_mode():
        for context in CONTEXTS:
            rows.append({"kind": "policy", "shape": (EPISODES, context), "dtype": "float32"})
            rows[-1] |= {name: policy_step(net, context, device) for name, net in nets.items()}
    if importlib.util.find_spec("mujoco") and device == "cpu":
        rows.append({"kind": "environment", "shape": (EPISODES,), "dtype": "float32"} | environment(nets))
    else:
        print("environment: left out, it takes gymnasium and mujoco, on a CPU")
    for row in rows:
        shown = {name: f"{t['min_ms']:.2f} / {t['median_ms']:.2f} ms" for name, t in row.items() if type(t) is dict}
        print(f"{row['kind']} {tuple(row['shape'])}: {shown}", flush=True)
    return rows


def policy_step(net: DecisionModel, context: int, device: str) -> dict[str, float]:
    """Of EPISODES episodes: the context-th step by the state; for attention, all steps so far read anew."""
    inputs = windows(EPISODES, context, device)
    if net.backbone.mixers[0].__class__.__name__ == "Attention":
        return summary(seconds(lambda: net(*inputs), device, at_least=0.5, runs=(5, 200)))
    state, before = net.initial_state(EPISODES), None
    for t in range(context):
        before, state = net.step(inputs[0][:, t], inputs[1][:, t], before, t, state)
    last = inputs[0][:, -1], inputs[1][:, -1], before, context - 1
    return summary(seconds(lambda: net.step(*last, state), device, at_least=0.5, runs=(5, 200)))


def environment(nets: dict[str, DecisionModel]) -> dict[str, dict]:
    """ms of a step of EPISODES Hoppers, on one thread: the bare ones with random actions, and with a policy."""
    import gymnasium

    warnings.filterwarnings("ignore", ".*is out of date", DeprecationWarning)

    def run(act: Callable[[np.ndarray, int], np.ndarray], steps: int = 300) -> dict[str, float]:
        envs = [gymnasium.make("Hopper-v4", disable_env_checker=True) for _ in range(EPISODES)]
        states, taken = np.stack([env.reset(seed=i)[0] for i, env in enumerate(envs)]), []
        for t in range(steps):
            begin = time.perf_counter()
            for i, (env, action) in enumerate(zip(envs, act(states, t), strict=True)):
                states[i], _, terminated, truncated, _ = env.step(action)
                if terminated or truncated:
                    states[i], _ = env.reset()
            taken.append(time.perf_counter() - begin)
        return summary(taken)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    actions = np.random.default_rng(0).uniform(-1, 1, (300, EPISODES, ACTION)).astype(np.float32)
    found = {"bare": run(lambda states, t: actions[t])}
    returns_to_go = torch.ones(EPISODES, 1)
    with torch.inference_mode():
        net = nets["minrnn"]
        carried = [None, net.initial_state(EPISODES)]

        def recurrent(states, t):
            carried[:] = net.step(
                returns_to_go, torch.as_tensor(states, dtype=torch.float32), carried[0], t, carried[1]
            )
            return carried[0].numpy()

        found["minrnn"] = run(recurrent)
        past = list(windows(EPISODES, CONTEXT, "cpu"))

        def window(states, t):
            past[1] = torch.cat([past[1][:, 1:], torch.as_tensor(states, dtype=torch.float32)[:, None]], 1)
            action = nets["Transformer"](*past)[:, -1]
            past[2] = torch.cat([past[2][:, 1:], action[:, None]], 1)
            return action.numpy()

        found["Transformer"] = run(window)
    torch.set_num_threads(threads)
    return found
