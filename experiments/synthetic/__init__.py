"""Synthetic tasks: formal languages, state tracking, recall. `python -m experiments.synthetic task=parity model=mingru`

tasks.py has the tasks, each with an example. All sequences of a batch have the same length, drawn from
`data.lengths` in training and from `data.test_lengths` in validation and test, whose batches are fixed. Loss and
accuracy are those of the marked positions alone; `exact` is the share of sequences that have all of them right. At
each of `eval.lengths` the last weights are tested on their own, as `accuracy_at_<length>` and `exact_at_<length>`.
"""

import random
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minrnn.mixers import make
from minrnn.models import TokenModel

from .. import engine
from ..config import Synthetic
from ..seeds import eval_seed, train_seed
from .tasks import IGNORE, TASKS

AT_ONCE = 1 << 18  # input ids in a part of a test at one length, or one sequence
EACH = 1 << 16  # the first test length has its evaluation batches from here on, the second from twice this, and so on


def sequences(cfg: Synthetic, lengths: tuple[int, int], batch_size: int, seed: int, device) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T) of a length within these bounds; a function of the seed on a kind of device."""
    n = random.Random(seed).randint(*lengths)
    return TASKS[cfg.data.task].sample(cfg.data, batch_size, n, torch.Generator(device).manual_seed(seed))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, targets = batch
    marked = targets != IGNORE
    return F.cross_entropy(model(inputs, marked=marked)[0], targets[marked])


def evaluate(cfg: Synthetic, device: torch.device, model: nn.Module, split: str) -> dict[str, float]:
    """The numbers of an evaluation over the split's fixed batches."""
    batches = (
        sequences(cfg, cfg.data.test_lengths, cfg.eval.batch_size, eval_seed(split, i), device)
        for i in range(cfg.eval.iters)
    )
    return mean([answers(model, batch) for batch in batches])


def evaluate_lengths(cfg: Synthetic, device: torch.device, model: nn.Module, split: str) -> dict[str, float]:
    """The numbers at each of eval.lengths, over one evaluation batch, in parts that fit into memory."""
    found = {}
    for i, n in enumerate(cfg.eval.lengths):
        part = max(1, min(cfg.eval.batch_size, AT_ONCE // n))
        seeds = range(EACH * (i + 1), EACH * (i + 1) + -(-cfg.eval.batch_size // part))
        batches = (sequences(cfg, (n, n), part, eval_seed(split, seed), device) for seed in seeds)
        values = mean([answers(model, batch) for batch in batches])
        found |= {f"{key}_at_{n}": values[key] for key in ("accuracy", "exact")}
    return found


def answers(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, float]:
    """The loss, and the shares of positions and of sequences that are right."""
    inputs, targets = batch
    marked = targets != IGNORE
    logits = model(inputs, marked=marked)[0].float()
    right = logits.argmax(-1) == targets[marked]
    exact = torch.ones_like(marked).masked_scatter(marked, right).all(1)
    values = {"loss": F.cross_entropy(logits, targets[marked]), "accuracy": right.float().mean()}
    return {key: value.item() for key, value in (values | {"exact": exact.float().mean()}).items()}


def mean(values: list[dict[str, float]]) -> dict[str, float]:
    return {key: sum(value[key] for value in values) / len(values) for key in values[0]}


def model(cfg: Synthetic) -> TokenModel:
    task = TASKS[cfg.data.task]
    longest = task.steps(max(cfg.data.lengths[1], cfg.data.test_lengths[1], *cfg.eval.lengths))
    vocabularies = task.inputs(cfg.data), task.classes(cfg.data)
    return TokenModel(*vocabularies, mixer=make(**cfg.model.mixer(longest)), **cfg.model.backbone(longest))


def task(cfg: Synthetic, device: torch.device) -> engine.Task:
    low, high = cfg.data.lengths
    return engine.Task(
        model=model(cfg).to(device),
        batch=lambda step: sequences(cfg, (low, high), cfg.train.batch_size, train_seed(cfg.seed, step), device),
        loss=loss,
        evaluate=partial(evaluate, cfg, device),
        evaluate_last=partial(evaluate_lengths, cfg, device),
        tokens=cfg.train.batch_size * TASKS[cfg.data.task].steps((low + high) // 2),
    )


def run(cfg: Synthetic) -> str:
    return engine.execute(cfg, task)
