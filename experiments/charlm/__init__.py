"""A character model of a text: the paper's language experiment. `python -m experiments.charlm model=mingru seed=0`

Data and protocol are nanoGPT's (https://github.com/karpathy/nanoGPT, data/shakespeare_char/prepare.py and train.py):
the vocabulary is the text's sorted characters, the first 90 % train, the rest validates. With the text "hello world"
and blocks of 4, a training sequence is

    input    h e l l
    target   e l l o

`val_loss` is nanoGPT's estimate, over random blocks of the validation text (the same ones at every step and in every
run). There is no third part: `test_loss`, at the end, covers the whole validation text in consecutive blocks, each
from an empty state. With `eval.whole`, `val_loss` covers the whole text too, and the estimate is `test_estimate`: at
the paper's scale an estimate reads 3.3 million characters, thirty times the text. All are nats per character.
"""

import dataclasses
import hashlib
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minrnn.mixers import make
from minrnn.models import TokenModel

from .. import data, engine, files
from ..config import TEXTS, CharLM
from ..seeds import eval_seed, train_seed

MOST_BYTES = 2**30  # of a text: all its characters are held in memory


class Text:
    """Characters as ids.

    Attributes:
        vocabulary: the characters, sorted; an id is a place in it.
        train, val: int64 ids on the device.
    """

    def __init__(self, text: str, device: torch.device | str):
        self.vocabulary = "".join(sorted(set(text)))
        self.ids = {character: i for i, character in enumerate(self.vocabulary)}
        everything = torch.tensor([self.ids[character] for character in text], device=device)
        cut = int(0.9 * len(text))
        self.train, self.val = everything[:cut], everything[cut:]

    def batch(self, part: Tensor, batch_size: int, block: int, seed: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (B, block): random blocks that depend only on the seed and the kind of device."""
        generator = torch.Generator(part.device).manual_seed(seed)
        starts = torch.randint(len(part) - block, (batch_size, 1), generator=generator, device=part.device)
        places = starts + torch.arange(block, device=part.device)
        return part[places], part[places + 1]


def read(cfg: CharLM, device: torch.device | str) -> Text:
    """The text of `data.path`, or else `data.text`.

    Raises DataError: the file is missing, does not match data.sha256, is not UTF-8, or is too short for a block in
    each part.
    """
    if cfg.data.path is None and cfg.data.text == "python_docs":
        path, content = "python_docs", data.python_docs().encode()
    else:
        path = data.find(cfg.data.text, cfg.progress) if cfg.data.path is None else cfg.data.path
        content = _bytes(path)
    if cfg.data.sha256 is not None:
        found = hashlib.sha256(content).hexdigest()
        if found != cfg.data.sha256:
            raise data.DataError(f"data.sha256: expected {cfg.data.sha256}, {path} has {found}: it is another text")
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise data.DataError(f"data.path: expected UTF-8, {path} is not ({error})") from error
    least = 10 * (cfg.data.block_size + 1)  # of which a tenth validates
    if len(text) < least:
        raise data.DataError(
            f"data.path: expected at least {least} characters for data.block_size={cfg.data.block_size}, "
            f"{path} has {len(text)}"
        )
    return Text(text, device)


def identify(cfg: CharLM) -> CharLM:
    """The configuration with the checksum of the text at data.path, as the text identifies a run, not its file's name.

    A text known by name keeps that name, wherever its file is. Raises DataError as `read` does.
    """
    settings, named = cfg.data, {file.sha256: name for name, file in data.FILES.items()}
    if settings.path is not None:
        found = hashlib.sha256(_bytes(settings.path)).hexdigest()
        if settings.sha256 not in (None, found):
            read(cfg, "cpu")  # raises the error
        settings = dataclasses.replace(settings, text=named.get(found, TEXTS[0]), sha256=found)
    if settings.sha256 in named:
        settings = dataclasses.replace(settings, text=named[settings.sha256], sha256=None)
    return dataclasses.replace(cfg, data=settings)


def _bytes(path: str | Path) -> bytes:
    try:
        return files.read(Path(path), data.DataError, MOST_BYTES)
    except FileNotFoundError as error:
        raise data.DataError(f"data.path: cannot read {path} ({error.strerror})") from error


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, targets = batch
    return F.cross_entropy(model(inputs)[0].flatten(0, 1), targets.flatten())


def metrics(cfg: CharLM, text: Text, model: nn.Module, split: str) -> dict[str, float]:
    if split == "test":
        more = {"estimate": estimated_loss(cfg, text, model)} if cfg.eval.whole else {}
        return {"loss": whole_loss(cfg, text.val, model)} | more
    return {"loss": whole_loss(cfg, text.val, model) if cfg.eval.whole else estimated_loss(cfg, text, model)}


def estimated_loss(cfg: CharLM, text: Text, model: nn.Module) -> float:
    """nanoGPT's estimate of the loss, over random blocks of the validation text, the same ones in every call."""
    total = 0.0
    for i in range(cfg.eval.iters):
        total += loss(model, text.batch(text.val, cfg.eval.batch_size, cfg.data.block_size, eval_seed("val", i))).item()
    return total / cfg.eval.iters


def whole_loss(cfg: CharLM, part: Tensor, model: nn.Module) -> float:
    """The mean loss over every character but the first, in consecutive blocks, the last one shorter."""
    block, total = cfg.data.block_size, 0.0
    most = max(1, 2**14 // block)  # sequences at a time
    count = (len(part) - 1) // block
    inputs, targets = part[: count * block].view(count, block), part[1 : count * block + 1].view(count, block)
    pieces = [*zip(inputs.split(most), targets.split(most), strict=True)]
    if count * block < len(part) - 1:
        pieces.append((part[None, count * block : -1], part[None, count * block + 1 :]))
    for piece in pieces:
        total += loss(model, piece).item() * piece[1].numel()
    return total / (len(part) - 1)


def model(cfg: CharLM, vocab: int) -> TokenModel:
    """The configured model for a vocabulary of `vocab` characters."""
    block = cfg.data.block_size
    return TokenModel(vocab, vocab, mixer=make(**cfg.model.mixer(block)), **cfg.model.backbone(block))


def task(cfg: CharLM, device: torch.device) -> engine.Task:
    if cfg.model.name == "attention" and not cfg.model.positions:
        raise ValueError("model: attention alone knows no order; model=transformer has positions")
    text = read(cfg, device)
    block = cfg.data.block_size
    return engine.Task(
        model=model(cfg, len(text.vocabulary)).to(device),
        batch=lambda step: text.batch(text.train, cfg.train.batch_size, block, train_seed(cfg.seed, step)),
        loss=loss,
        evaluate=partial(metrics, cfg, text),
        tokens=cfg.train.batch_size * block,
        select="loss",
        maximize=False,
        facts={"vocabulary": text.vocabulary, "characters": len(text.train) + len(text.val)},
    )


def run(cfg: CharLM) -> str:
    return engine.execute(identify(cfg), task)
