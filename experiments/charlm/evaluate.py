"""The loss of a trained character model on the whole validation text, beside the loss that is stated for it.

    python -m experiments.charlm.evaluate model=transformer
    python -m experiments.charlm.evaluate run=<id> weights=last

Without `run`, the weights are those of `model` that come with the repository (results/weights/charlm-*).
"""

import dataclasses
import math
import sys
from dataclasses import dataclass
from functools import partial

import torch

from ..launch import command, settings_of
from . import model, read, sample, whole_loss


@dataclass
class Settings(sample.Choice):
    path: str = ""  # of the text, if it is not found automatically


parse = partial(settings_of, Settings, __doc__)


def main(arguments: list[str]) -> None:
    settings = parse(arguments)
    found = settings.chosen()
    cfg = found.cfg
    if settings.path:
        cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, path=settings.path))
    if cfg.data.path is None and cfg.data.sha256 is not None:
        raise ValueError(f"path: expected the text of sha256 {cfg.data.sha256}, got none")
    text = read(cfg, settings.device)
    if text.vocabulary != found.facts["vocabulary"]:
        raise ValueError(f"path: {found.file} was trained on another text: its characters differ")
    net = found.fill(model(cfg, len(text.vocabulary)).to(settings.device))
    with torch.inference_mode():
        loss = whole_loss(cfg, text.val, net)
    stated = found.stated["test_loss"]
    print(
        f"{loss:.4f} nats per character ({loss / math.log(2):.4f} bits) over the {len(text.val) - 1:,} of the "
        f"validation text; {stated:.4f} is stated of {found.file}"
    )


if __name__ == "__main__":
    command(main, sys.argv[1:], refusals=(ValueError,))
