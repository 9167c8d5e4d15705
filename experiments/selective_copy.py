"""Selective copying: Tables 1 and 2 of arXiv 2410.01201. `python -m experiments.selective_copy model=mingru seed=0`

A body of `length` tokens is noise but for `tokens` symbols at random places; as many markers follow, and at the k-th
the model is to say the k-th symbol. With length=8, tokens=2, vocab=16 (marker 0, symbols 1..14, noise 15):

    input    15 15  7 15 15 15  3 15 |  0  0
    target                           |  7  3

The loss and the accuracy (of single symbols; chance is 1/14) are those of the markers alone. Task, ids and settings
are the authors' (BorealisAI/minRNNs ff52e9d, data/selective_copy.py; the Mamba paper's task, arXiv 2312.00752, E.1).
"""

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minrnn.mixers import make
from minrnn.models import TokenModel

from . import engine, launch
from .config import SelectiveCopy, SelectiveCopyData
from .seeds import eval_seed, train_seed

MARKER = 0


def sequences(data: SelectiveCopyData, batch_size: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs (B, length + tokens) and targets (B, tokens), int64; a function of the seed on a kind of device."""
    generator = torch.Generator(device).manual_seed(seed)
    noise = data.vocab - 1
    symbols = torch.randint(1, noise, (batch_size, data.tokens), generator=generator, device=device)
    places = torch.rand(batch_size, data.length, generator=generator, device=device).topk(data.tokens).indices
    inputs = torch.full((batch_size, data.length + data.tokens), MARKER, device=device)
    inputs[:, : data.length] = noise
    inputs.scatter_(1, places.sort().values, symbols)
    return inputs, symbols


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, targets = batch
    logits, _ = model(inputs, last=targets.shape[1])
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def evaluate(
    cfg: SelectiveCopy, device: torch.device, model: nn.Module, split: str, length: int | None = None
) -> dict[str, float]:
    """Over the split's fixed sequences, of bodies of another length where one is given."""
    data = cfg.data if length is None else replace(cfg.data, length=length)
    total, right = torch.zeros((), device=device), torch.zeros((), device=device)
    for i in range(cfg.eval.iters):
        inputs, targets = sequences(data, cfg.eval.batch_size, eval_seed(split, i), device)
        logits, _ = model(inputs, last=cfg.data.tokens)
        total += F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        right += (logits.argmax(-1) == targets).float().mean()
    return {"loss": total.item() / cfg.eval.iters, "accuracy": right.item() / cfg.eval.iters}


def evaluate_lengths(cfg: SelectiveCopy, device: torch.device, model: nn.Module, split: str) -> dict[str, float]:
    """The accuracy at each of eval.lengths."""
    return {f"accuracy_at_{n}": evaluate(cfg, device, model, split, n)["accuracy"] for n in cfg.eval.lengths}


def model(cfg: SelectiveCopy) -> TokenModel:
    length, vocab = max(cfg.data.length, *cfg.eval.lengths, 0) + cfg.data.tokens, cfg.data.vocab
    return TokenModel(vocab, vocab, mixer=make(**cfg.model.mixer(length)), **cfg.model.backbone(length))


def task(cfg: SelectiveCopy, device: torch.device) -> engine.Task:
    return engine.Task(
        model=model(cfg).to(device),
        batch=lambda step: sequences(cfg.data, cfg.train.batch_size, train_seed(cfg.seed, step), device),
        loss=loss,
        evaluate=partial(evaluate, cfg, device),
        evaluate_last=partial(evaluate_lengths, cfg, device),
        tokens=cfg.train.batch_size * (cfg.data.length + cfg.data.tokens),
    )


def run(cfg: SelectiveCopy) -> str:
    return engine.execute(cfg, task)


if __name__ == "__main__":
    launch.main("selective_copy")
