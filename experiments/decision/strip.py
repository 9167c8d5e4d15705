"""One episode of a trained policy as a strip of frames, in a PNG; without OpenGL, which servers lack.

    python -m experiments.decision.strip target=80 seed=0 frames=12 path=strip.png
    python -m experiments.decision.strip run=<id>

Without `run`, the policy is that of `model` which comes with the repository (results/weights/decision-*).
The frames are spread evenly from the first moment to the last, or show each `every`-th step from the first one on.
Each shows MuJoCo's capsules from the side, and below them the step and how far the robot has come.
"""

import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Polygon
from torch import Tensor

from minrnn.models import DecisionModel

from .. import trained
from ..config import Decision, between
from ..launch import command, settings_of
from ..seeds import QUARTER, eval_seed
from . import data, model, normalization
from .episodes import rollout

WIDTH, METRE, NARROWEST = 14, 1.2, 0.5  # inches: a strip, at most for a metre, at least for a frame
ROUND = np.linspace(-math.pi / 2, math.pi / 2, 16)  # half a circle


@dataclass
class Settings(trained.Choice):
    target: float = 80  # the target score
    seed: int = 0  # which of the test episodes' starts
    frames: int = 12
    every: int = 0  # steps from frame to frame; 0: chosen so that the frames span the episode
    path: str = "strip.png"

    def __post_init__(self):
        between(self, "", None, None, "target")
        for key, low, high in (("seed", 0, QUARTER - 1), ("frames", 1, 100), ("every", 0, data.MAX_EP_LEN)):
            between(self, "", low, high, key)
        if Path(self.path).suffix not in (".png", ".pdf", ".svg"):
            raise ValueError(f"path: expected a name that ends in .png, .pdf or .svg, got {self.path!r}")


parse = partial(settings_of, Settings, __doc__)


@dataclass
class Policy:
    """Attributes:
    mean, std: (S,) float32, which normalise states.
    """

    cfg: Decision
    model: DecisionModel
    mean: Tensor
    std: Tensor

    @property
    def env(self) -> str:
        return data.split_name(self.cfg.data.dataset)[1]


def load(settings: Settings) -> Policy:
    """The policy that `run` (with its last weights) or `model` names."""
    found = settings.find("decision", "last")
    facts = found.facts if "state_mean" in found.facts else normalization(found)
    sizes = data.ENVIRONMENTS[data.split_name(found.cfg.data.dataset)[1]].sizes
    mean, std = (torch.as_tensor(facts[key]) for key in ("state_mean", "state_std"))
    return Policy(found.cfg, found.fill(model(found.cfg, *sizes)), mean, std)


def play(settings: Settings, policy: Policy) -> tuple[Any, np.ndarray, float]:
    """MuJoCo's model, the positions of its joints (steps + 1, joints), and the score of one episode."""
    environment = data.ENVIRONMENTS[policy.env]
    low, high = environment.reference
    simulated, positions = [], []

    def record(envs: list) -> None:
        simulated[:] = [envs[0].unwrapped.model]
        positions.append(envs[0].unwrapped.data.qpos.copy())

    returns, _ = rollout(
        policy.model, environment.id, policy.mean, policy.std,
        np.array([low + settings.target / 100 * (high - low)]), np.array([eval_seed("test", settings.seed)]),
        policy.cfg.eval.context_length, policy.cfg.data.padding == "left", record,
    )  # fmt: skip
    return simulated[0], np.stack(positions), data.normalized(policy.env, returns[0].item())


def chosen(steps: int, frames: int, every: int) -> np.ndarray:
    """The steps from 0 to `steps` that are shown; fewer than `frames` if the episode is too short."""
    if every:
        return np.arange(0, steps + 1, every)[:frames]
    return np.unique(np.linspace(0, steps, frames).round().astype(int))


def capsules(simulated: mujoco.MjModel, positions: np.ndarray) -> np.ndarray:
    """x and z in metres (F, C, 2, 2) of both ends of each capsule's axis; a sphere's ends coincide.

    Kinematics computes them from the joints, as MuJoCo's own positions lag behind after a step.
    """
    moment, solid = mujoco.MjData(simulated), solids(simulated)
    lengths = np.where(simulated.geom_type == mujoco.mjtGeom.mjGEOM_CAPSULE, simulated.geom_size[:, 1], 0)[solid]
    found = []
    for qpos in positions:
        moment.qpos[:] = qpos
        mujoco.mj_kinematics(simulated, moment)
        centres, axes = moment.geom_xpos[solid], moment.geom_xmat[solid].reshape(-1, 3, 3)[:, :, 2]
        ends = centres[:, None] + lengths[:, None, None] * np.array([-1, 1])[:, None] * axes[:, None]
        found.append(ends[..., [0, 2]])
    return np.stack(found)


def solids(simulated: mujoco.MjModel) -> np.ndarray:
    """The indices of the capsules and spheres, of which these robots are made."""
    return np.flatnonzero(np.isin(simulated.geom_type, (mujoco.mjtGeom.mjGEOM_CAPSULE, mujoco.mjtGeom.mjGEOM_SPHERE)))


def outline(ends: np.ndarray, radius: float) -> np.ndarray:
    """The outline (M, 2) of a capsule whose axis goes from ends[0] to ends[1]."""
    along = math.atan2(*(ends[1] - ends[0])[::-1])
    return np.concatenate(
        [
            end + radius * np.stack([np.cos(angle), np.sin(angle)], 1)
            for end, angle in ((ends[1], along + ROUND), (ends[0], along + math.pi + ROUND))
        ]
    )


def figure(simulated: mujoco.MjModel, positions: np.ndarray, steps: np.ndarray, title: str) -> Figure:
    """A figure with a frame for each of the (F,) steps, side by side."""
    solid = solids(simulated)
    ends, radii = capsules(simulated, positions[steps]), simulated.geom_size[solid, 0]
    left, right = (ends[..., 0] - radii[:, None]).min((1, 2)), (ends[..., 0] + radii[:, None]).max((1, 2))
    pitch, top = 1.1 * (right - left).max(), 1.1 * (ends[..., 1] + radii[:, None]).max()
    metre = max(min(METRE, WIDTH / (len(steps) * pitch)), NARROWEST / pitch)
    wide, high, above, below = len(steps) * pitch, 1.05 * top, 0.35 / metre, 0.4 / metre  # in metres too
    slack = max(0, 0.075 * len(title) / metre - wide) / 2
    fig = Figure(figsize=((wide + 2 * slack) * metre, (above + high + below) * metre), dpi=150)
    ax = fig.add_axes((0, below / (above + high + below), 1, high / (above + high + below)))
    ax.set(xlim=(-slack, wide + slack), ylim=(top - high, top))  # feet sink into the ground a little
    ax.axhline(0, color="#888888", linewidth=1, zorder=0)
    for i, step in enumerate(steps):
        middle = (i + 0.5) * pitch
        shift = np.array([middle - (left[i] + right[i]) / 2, 0])
        for pair, radius, colour in zip(ends[i], radii, simulated.geom_rgba[solid], strict=True):
            ax.add_patch(Polygon(outline(pair + shift, radius), facecolor=colour, edgecolor="black", linewidth=0.5))
        way = round(positions[step, 0] - positions[0, 0], 1) + 0  # no -0.0
        label = f"step {step}\n{way:.1f} m"
        ax.annotate(label, (middle, 0), (0, -7), textcoords="offset points", ha="center", va="top", fontsize=7)
    ax.axis("off")
    fig.suptitle(title, fontsize=9)
    return fig


def main(arguments: list[str]) -> None:
    settings = parse(arguments)
    torch.set_num_threads(1)  # one episode's matrices are too small to share
    policy = load(settings)
    simulated, positions, score = play(settings, policy)
    title = (
        f"{policy.cfg.model.name} on {policy.cfg.data.dataset}: asked for a score of {settings.target:g}, "
        f"got {score:.1f} in {len(positions) - 1} steps"
    )
    steps = chosen(len(positions) - 1, settings.frames, settings.every)
    figure(simulated, positions, steps, title).savefig(settings.path)
    print(f"{settings.path}: {title}")


if __name__ == "__main__":
    command(main, sys.argv[1:], refusals=(ValueError, OSError))
