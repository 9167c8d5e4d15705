"""Decision RNNs: offline reinforcement learning as a sequence model. `python -m experiments.decision model=mingru`

Decision Transformer's protocol (arXiv 2106.01345; github.com/kzl/decision-transformer, gym/experiment.py) around any
mixer: from the return that is still wanted, the state, and the steps before, the model is to say what was done. With
a context of 2 and three tokens a step, a window of an episode is

    input     R1 s1 a1 R2 s2 a2
    target       a1       a2

and the loss the mean square over the actions. `val_score` and `test_score` are the mean score of whole episodes in the
environment, asked for the environment's target, in percent of an expert (D4RL's normalisation); val's and test's begin
from different seeds. At the end test also asks for TARGETS: `test_score_at_40` is what was got where 40 was asked for.

Others report the last evaluation in training, or the best: the best is chosen by the episodes that it is reported by,
which is worth 3.65 points on average over D4RL's nine sets for one and the same runs (CORL's README). Here the last is
`last.test_score`; what others call best is `best.val_score`; and the weights of that point, on episodes that did not
choose them, give `best.test_score`.
"""

from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from minrnn.mixers import make
from minrnn.models import DecisionModel

from .. import engine
from ..config import Decision
from ..seeds import eval_seed, train_seed
from . import data
from .episodes import rollout

TARGETS = (20, 40, 60, 80, 100)  # scores


def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Mean square over the real steps of a batch of windows."""
    wanted, states, actions, times, mask = batch
    return (model(wanted, states, actions, times) - actions)[mask].square().mean()


def evaluate(cfg: Decision, dataset: data.Dataset, model: DecisionModel, split: str) -> dict[str, float]:
    environment = data.ENVIRONMENTS[dataset.env]
    low, high = environment.reference
    wanted = {"": environment.targets[0]}
    if split == "test":
        wanted |= {f"_at_{score}": low + score / 100 * (high - low) for score in TARGETS}
    episodes = cfg.eval.batch_size
    mean, std = (torch.as_tensor(x, device=model.head.weight.device) for x in (dataset.mean, dataset.std))
    found = []
    for i in range(cfg.eval.batches):
        found.append(
            rollout(
                model, environment.id, mean, std, np.repeat([*wanted.values()], episodes),
                eval_seed(split, i * len(wanted) * episodes), cfg.eval.context, cfg.data.padding == "left",
            )
        )  # fmt: skip
    returns, lengths = (np.concatenate([pair[j].reshape(len(wanted), -1) for pair in found], 1) for j in (0, 1))
    means = [r.mean().item() for r in returns]
    scores = {f"score{name}": data.normalized(dataset.env, m) for name, m in zip(wanted, means, strict=True)}
    return scores | {"return": returns[0].mean().item(), "length": lengths[0].mean().item()}


def model(cfg: Decision, state_size: int, action_size: int) -> DecisionModel:
    return DecisionModel(
        state_size, action_size, mixer=make(**cfg.model.mixer(cfg.data.context * cfg.data.tokens)),
        steps=data.EPISODE, tokens=cfg.data.tokens, time_std=cfg.data.time_std, **cfg.model.decision(),
    )  # fmt: skip


def task(cfg: Decision, device: torch.device) -> engine.Task:
    if cfg.model.name == "attention" and (cfg.data.padding == "left" or cfg.eval.context is None):
        raise ValueError(
            "data.padding, eval.context: attention here has no mask and was trained on data.context steps; "
            "expected right padding and a context"
        )
    dataset = data.read(data.find(cfg.data.dataset, cfg.progress), cfg.data.dataset)
    windows = data.Windows(dataset, cfg.data.context, device)

    def batch(step: int) -> tuple[Tensor, ...]:
        found = windows.batch(cfg.train.batch_size, train_seed(cfg.seed, step))
        return windows.left_padded(found) if cfg.data.padding == "left" else found

    return engine.Task(
        model=model(cfg, dataset.observations.shape[1], dataset.actions.shape[1]).to(device),
        batch=batch,
        loss=loss,
        evaluate=partial(evaluate, cfg, dataset),
        tokens=cfg.train.batch_size * cfg.data.context * cfg.data.tokens,
        select="score",
        facts={"dataset_sha256": dataset.sha256, "dataset": dataset.metadata},
    )


def run(cfg: Decision) -> str:
    return engine.execute(cfg, task)
