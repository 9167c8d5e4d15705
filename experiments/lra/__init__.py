"""Long Range Arena: Tables 5 and 6 of arXiv 2410.01201. `python -m experiments.lra task=listops model=minlstm`

A sequence is to be classified, from the mean of what a model makes of its steps (`minrnn.models.ClassifierModel`).

    listops      the value of an expression of digits and operators, 10 classes
    image        what a picture shows, read pixel by pixel, 10 classes: CIFAR-10 in grey, or local/digits
    retrieval    of two texts, read byte by byte, whether one paper cites the other: AAN; or, with
                 local/pydoc_pairs, whether both excerpts are of one topic of Python's help texts

val_accuracy, val_loss, test_accuracy and test_loss are of all examples of their split. `facts.dataset` has the splits'
sizes and the accuracy of always naming the most frequent class.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minrnn.mixers import make
from minrnn.models import ClassifierModel

from .. import engine
from ..config import LRA
from ..seeds import train_seed
from . import data


def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    inputs, lengths, labels = batch
    return F.cross_entropy(model(inputs, lengths), labels)


def evaluate(cfg: LRA, splits: dict[str, data.Sequences], model: nn.Module, split: str) -> dict[str, float]:
    """Loss and accuracy over every example of the split."""
    examples, total, right = splits[split], 0.0, 0
    for inputs, lengths, labels in examples.all(cfg.eval.batch_size):
        logits = model(inputs, lengths).float()
        total += F.cross_entropy(logits, labels, reduction="sum").item()
        right += (logits.argmax(-1) == labels).sum().item()
    return {"loss": total / len(examples), "accuracy": right / len(examples)}


def model(cfg: LRA, dataset: data.Dataset) -> ClassifierModel:
    length = dataset.length
    return ClassifierModel(
        dataset.vocab, dataset.classes, parts=dataset.parts, mixer=make(**cfg.model.mixer(length)),
        **cfg.model.classifier(length),
    )  # fmt: skip


def task(cfg: LRA, device: torch.device) -> engine.Task:
    dataset = data.read(cfg)
    values = torch.tensor(dataset.values, device=device)
    splits = {name: data.Sequences(dataset, name, values) for name in data.SPLITS}
    steps = dataset.splits["train"].lengths.sum(1).mean()  # of an example
    return engine.Task(
        model=model(cfg, dataset).to(device),
        batch=lambda step: splits["train"].batch(cfg.train.batch_size, train_seed(cfg.seed, step)),
        loss=loss,
        evaluate=partial(evaluate, cfg, splits),
        tokens=round(cfg.train.batch_size * steps),
        facts={"dataset_sha256": dataset.sha256, "dataset": dataset.facts()},
    )


def run(cfg: LRA) -> str:
    return engine.execute(cfg, task)
