"""The data of Long Range Arena's tasks: labelled sequences of bytes, or pairs of such, of different lengths.

All values lie one after another, an example is where in them its sequences begin, how long they are, and a label:

    values     4 8 5 1 9 9 2
    starts     [[0], [3]]
    lengths    [[3], [4]]
    labels     [7, 0]

and the batch of both, padded on the right to its longest, is

    inputs     [[[4, 8, 5, 0]], [[1, 9, 9, 2]]]
"""

import gzip
import importlib.util
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor

from .. import data
from ..config import LRA, LRAData
from ..data import DataError
from . import listops
from .listops import SEEDS

AAN_ROWS = {"train": 147_086, "val": 18_090, "test": 17_437}  # of Long Range Arena's files
SPLITS = ("train", "val", "test")


@dataclass(frozen=True, eq=False)
class Split:
    """N examples of P sequences.

    Attributes:
        starts, lengths: (N, P) int64, of each sequence in `Dataset.values`.
        labels: (N,) int64.
    """

    starts: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True, eq=False)
class Dataset:
    """All values, and the splits of the examples in them.

    Attributes:
        values: (all,) uint8, ids or pixels.
        splits: by "train", "val", "test".
        classes: how many.
        length: no sequence is longer.
        vocab: how many ids there are; None: the values are pixels.
    """

    values: np.ndarray
    splits: dict[str, Split]
    classes: int
    length: int
    vocab: int | None = None

    @property
    def parts(self) -> int:
        return self.splits["train"].starts.shape[1]

    @cached_property
    def sha256(self) -> str:
        """`checksum` of the arrays: what a model is trained and tested on."""
        splits = [self.splits[name] for name in SPLITS]
        arrays = [array for split in splits for array in (split.starts, split.lengths, split.labels)]
        return data.checksum(self.values, *arrays)

    @cached_property
    def scale(self) -> tuple[float, float]:
        """Mean and standard deviation of the training pixels, by which all are normalised.

        CIFAR-10's grey ones have 122.6 and 61.0 in S4's code, src/dataloaders/basic.py.
        """
        pixels = self.values[: self.splits["train"].lengths.sum()]
        return float(pixels.mean(dtype=np.float64)), float(pixels.std(dtype=np.float64))

    def facts(self) -> dict[str, float]:
        """Sizes, and the accuracy in test of always naming the most frequent class of training."""
        labels = {name: self.splits[name].labels for name in SPLITS}
        most = np.bincount(labels["train"]).argmax()
        return {name: len(labels[name]) for name in SPLITS} | {"majority": float((labels["test"] == most).mean())}


class Sequences:
    """A split on a device.

    Args:
        values: those of the dataset, on the device.
    """

    def __init__(self, dataset: Dataset, name: str, values: Tensor):
        split = dataset.splits[name]
        self.values, self.scale = values, None if dataset.vocab else dataset.scale
        self.lengths = torch.from_numpy(split.lengths)  # here too, so that the longest is known without the device
        self.starts, self.on_device, self.labels = (
            torch.as_tensor(array, device=values.device) for array in (split.starts, split.lengths, split.labels)
        )

    def __len__(self) -> int:
        return len(self.labels)

    def of(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Examples by number, int64 (B,) on the CPU, padded with 0 to the longest of them.

        Returns:
            (B, P, T) int64 ids or float32 normalised pixels, (B, P) int64 lengths, (B,) int64 labels.
        """
        longest, rows = int(self.lengths[rows].max()), rows.to(self.values.device)
        starts, lengths = self.starts[rows], self.on_device[rows]
        steps = torch.arange(longest, device=rows.device)
        real = steps < lengths[..., None]
        inputs = self.values[torch.where(real, starts[..., None] + steps, 0)]
        if self.scale:
            mean, std = self.scale
            inputs = (inputs.float() - mean) / std
        return torch.where(real, inputs if self.scale else inputs.long(), 0), lengths, self.labels[rows]

    def batch(self, batch_size: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Examples drawn uniformly, a function of the seed."""
        return self.of(torch.randint(len(self), (batch_size,), generator=torch.Generator().manual_seed(seed)))

    def all(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Every example once, those of like lengths together, so that little is padded."""
        for rows in self.lengths.amax(1).argsort(stable=True).split(batch_size):
            yield self.of(rows)


def read(cfg: LRA) -> Dataset:
    """The data of `data.task` and `data.dataset`. Raises DataError: they cannot be had, or are damaged."""
    settings, progress = cfg.data, cfg.progress
    if settings.task == "listops":
        return expressions(settings, Path(cfg.output_dir) / "lra", progress)
    if settings.task == "image":
        return cifar10() if settings.dataset is None else digits(progress)
    return aan(settings.length) if settings.dataset is None else topic_pairs(settings)


# -- ListOps


def expressions(settings: LRAData, folder: Path, progress: bool = False) -> Dataset:
    """ListOps, kept in the folder; see `listops.read`."""
    found = listops.read(settings, folder, progress)
    lengths, labels = found["lengths"], found["labels"]
    starts = np.cumsum(lengths) - lengths
    splits, begin = {}, 0
    for name, size in listops.sizes(settings).items():
        rows = slice(begin, begin + size)
        splits[name] = Split(starts[rows, None], lengths[rows, None], labels[rows])
        begin += size
    return Dataset(found["tokens"], splits, classes=10, length=settings.length, vocab=len(listops.TOKENS))


# -- images, pixel by pixel


def images(pixels: np.ndarray, labels: np.ndarray, sizes: dict[str, int]) -> Dataset:
    """A dataset of pixels (N, P) uint8 and labels (N,), which hold the splits one after another."""
    N, P = pixels.shape
    starts, splits, begin = np.arange(N)[:, None] * P, {}, 0
    for name in SPLITS:
        rows = slice(begin, begin + sizes[name])
        splits[name] = Split(starts[rows], np.full((sizes[name], 1), P), labels[rows].astype(np.int64))
        begin += sizes[name]
    return Dataset(pixels.reshape(-1), splits, classes=10, length=P)


def cifar10() -> Dataset:
    """CIFAR-10 in grey. The last tenth of the training files validates; in Long Range Arena they are in another order.

    Raises DataError: a file is missing, or is not what it should be.
    """
    rows = [np.frombuffer(data.unpacked(file).read_bytes(), np.uint8).reshape(-1, 3073) for file in data.CIFAR10]
    pixels = np.concatenate([grey(part[:, 1:].reshape(-1, 3, 1024)) for part in rows])
    labels = np.concatenate([part[:, 0] for part in rows])
    test = len(rows[-1])
    tenth = (len(labels) - test) // 10
    return images(pixels, labels, {"train": len(labels) - test - tenth, "val": tenth, "test": test})


def grey(pixels: np.ndarray) -> np.ndarray:
    """(N, P) uint8 of red, green and blue (N, 3, P) uint8, as tf.image.rgb_to_grayscale in Long Range Arena."""
    parts = pixels.astype(np.float32) / np.float32(255)
    total = sum(np.float32(weight) * parts[:, i] for i, weight in enumerate((0.2989, 0.5870, 0.1140)))
    return (total * np.float32(255.5)).astype(np.uint8)


def digits(progress: bool = False) -> Dataset:
    """UCI's digits, 8 x 8 pixels from 0 to 16, as scikit-learn has them: an installed one's file, or fetched.

    A tenth validates, a tenth tests. Raises DataError: the file cannot be had, or is damaged.
    """
    package = importlib.util.find_spec("sklearn")
    if package is not None and package.origin is not None:
        own = Path(package.origin).parent / "datasets/data/digits.csv.gz"
        path = data.verified(own, data.LRA["digits"], "install scikit-learn anew")
    else:
        try:
            path = data.find("digits", progress)
        except DataError as error:
            raise DataError(f"{error}; or `pip install scikit-learn`, which brings it") from error
    table = np.loadtxt(io.BytesIO(gzip.decompress(path.read_bytes())), dtype=np.uint8, delimiter=",")
    table = table[in_random_order(len(table))]
    tenth = len(table) // 10
    sizes = {"train": len(table) - 2 * tenth, "val": tenth, "test": tenth}
    return images(np.ascontiguousarray(table[:, :-1]), table[:, -1], sizes)


def in_random_order(count: int) -> list[int]:
    """0 to count - 1, always in the same order."""
    random = Random(SEEDS["train"])
    keys = [random.random() for _ in range(count)]
    return sorted(range(count), key=keys.__getitem__)


# -- retrieval: pairs of texts, byte by byte


def aan(length: int) -> Dataset:
    """Pairs of papers, the first `length` bytes of each; does one cite the other?

    Raises DataError: a file is missing, or is not what it should be.
    """
    numbers: dict[bytes, int] = {}  # of documents, each of which is in many pairs
    pairs, labels = {}, {}
    for name, file in data.AAN.items():
        path, rows, truths = data.unpacked(file), [], []
        with path.open("rb") as lines:
            for i, line in enumerate(lines, 1):
                fields = line.rstrip(b"\r\n").split(b"\t")
                if len(fields) != 5 or fields[0] not in (b"0.0", b"1.0"):
                    raise DataError(
                        f"{path}: line {i}: expected 0.0 or 1.0, two ids and two texts, with tabs between, "
                        f"got {len(fields)} fields, the first {fields[0][:20]!r}; get it anew"
                    )
                texts = [text[:length] or b" " for text in fields[3:]]  # one step at least
                rows.append([numbers.setdefault(text, len(numbers)) for text in texts])
                truths.append(fields[0] == b"1.0")
        if len(rows) != AAN_ROWS[name]:
            raise DataError(f"{path}: expected {AAN_ROWS[name]:,} lines, got {len(rows):,}; get it anew")
        pairs[name], labels[name] = np.array(rows), np.array(truths, np.int64)
    lengths = np.array([len(text) for text in numbers])
    starts = np.cumsum(lengths) - lengths
    splits = {name: Split(starts[pairs[name]], lengths[pairs[name]], labels[name]) for name in SPLITS}
    return Dataset(np.frombuffer(b"".join(numbers), np.uint8), splits, classes=2, length=length, vocab=256)


def topic_pairs(settings: LRAData) -> Dataset:
    """Pairs of excerpts of Python's help texts, of `data.length` bytes; are they of one topic?

    Each split has topics of its own, no excerpt overlaps the other of its pair, and half of the pairs are of one topic.

    Raises DataError: there are too few topics of twice the length.
    """
    length = settings.length
    texts = [text for text in map(str.encode, data.python_topics()) if len(text) >= 2 * length]
    part = len(texts) // 6
    if part < 2:
        raise DataError(
            f"data.length: expected less than {length}, {len(texts)} of Python's topics have twice as many bytes, "
            "and 12 are needed, 2 to test and 2 to validate"
        )
    texts = [texts[i] for i in in_random_order(len(texts))]
    places = np.cumsum([0, *map(len, texts)])
    topics = {"test": range(part), "val": range(part, 2 * part), "train": range(2 * part, len(texts))}
    splits = {}
    for name in SPLITS:
        random, starts, labels = Random(SEEDS[name]), [], []
        for _ in range(settings.train_size if name == "train" else settings.eval_size):
            labels.append(random.random() < 0.5)
            starts.append([places[i] + at for i, at in _excerpts(random, topics[name], texts, length, labels[-1])])
        lengths = np.full((len(labels), 2), length)
        splits[name] = Split(np.array(starts), lengths, np.array(labels, np.int64))
    return Dataset(np.frombuffer(b"".join(texts), np.uint8), splits, classes=2, length=length, vocab=256)


def _excerpts(random: Random, topics: range, texts: list[bytes], length: int, same: bool) -> list[tuple[int, int]]:
    """Two topics, each with a place in it."""
    first = int(len(topics) * random.random())
    if same:
        room = len(texts[topics[first]]) - 2 * length + 1
        low, high = sorted(int(room * random.random()) for _ in range(2))
        pair = [(topics[first], low), (topics[first], high + length)]
        return pair if random.random() < 0.5 else pair[::-1]
    second = (first + 1 + int((len(topics) - 1) * random.random())) % len(topics)
    return [(topics[i], int((len(texts[topics[i]]) - length + 1) * random.random())) for i in (first, second)]
