"""ListOps (Nangia and Bowman, arXiv 1804.06028) as Long Range Arena draws it (arXiv 2011.04006).

    [MAX 2 9 [MIN 4 7 ] 0 ]    is 9

An expression is a digit, or with a probability of 1/4 an operator of 2 to `data.arguments` expressions, as long as it
is less than `data.depth` deep; it is kept where it has more than `data.min_length` and fewer than `data.length` tokens.
MED is the median, rounded down, SM the sum modulo 10. (https://github.com/google-research/long-range-arena/blob/
cd31e5c6b8e5bceabd28de2d2afb23f7ae5d36d8/lra_benchmarks/data/listops.py.) Its files also have the parentheses of a
binary tree, which its models do not see (listops/input_pipeline.py there). A token is an operator with its bracket, a
closing bracket or a digit.

There they are all drawn in one sequence. Here each split has a seed of its own, so that more training examples leave
the others as they are; no expression is in two splits, or twice in one.
"""

import hashlib
import io
from array import array
from pathlib import Path
from random import Random

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from .. import files
from ..config import LRAData
from ..data import DataError, File, verified
from ..seeds import eval_seed, train_seed


def _median(values: list[int]) -> int:
    ordered, n = sorted(values), len(values)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) // 2


OPERATORS = {"[MIN": min, "[MAX": max, "[MED": _median, "[SM": lambda values: sum(values) % 10}
TOKENS = (*"0123456789", *OPERATORS, "]")
REDUCE = (*OPERATORS.values(),)
PROBABILITY = 0.25  # of an operator
SEEDS = {"test": eval_seed("test", 0), "val": eval_seed("val", 0), "train": train_seed(0, 0)}
ATTEMPTS = 100_000  # in a row without success, which a range with one expression in ten thousand would never need
KEYS = ("tokens", "lengths", "labels")


class _TooLong(Exception):
    pass


def expression(random: Random, depth: int, arguments: int, length: int) -> tuple[list[int], int] | None:
    """Ids in TOKENS, and the value; None for one of `length` tokens or more.

    All is drawn by random(), the only method whose numbers Python promises to keep.
    """
    tokens: list[int] = []

    def argument(level: int) -> int:
        if level < depth and random.random() <= PROBABILITY:
            return operation(level)
        tokens.append(int(10 * random.random()))
        return tokens[-1]

    def operation(level: int) -> int:
        if len(tokens) >= length:
            raise _TooLong
        operator = int(len(REDUCE) * random.random())
        tokens.append(10 + operator)
        count = 2 + int((arguments - 1) * random.random())
        values = [argument(level + 1) for _ in range(count)]
        tokens.append(len(TOKENS) - 1)
        return REDUCE[operator](values)

    try:
        value = argument(1)
    except _TooLong:
        return None
    return (tokens, value) if len(tokens) < length else None


def sizes(data: LRAData) -> dict[str, int]:
    """Expressions of each split, in the order in which they are drawn and stored."""
    return {split: data.train_size if split == "train" else data.eval_size for split in SEEDS}


def draw(data: LRAData, progress: bool = False) -> dict[str, np.ndarray]:
    """tokens (all,) uint8, lengths (N,) int64, labels (N,) int64, the splits one after another as in `sizes`.

    Raises DataError: there are not so many different expressions of such a length, or hardly any.
    """
    seen, tokens, lengths, labels = set(), bytearray(), array("q"), array("q")
    bar = tqdm(total=sum(sizes(data).values()), desc="ListOps", unit="", disable=not progress, dynamic_ncols=True)
    with bar:
        for split, size in sizes(data).items():
            random, failures = Random(SEEDS[split]), 0
            while size:
                found = expression(random, data.depth, data.arguments, data.length)
                if found is not None and len(found[0]) > data.min_length:
                    ids = bytes(found[0])
                    digest = hashlib.blake2b(ids, digest_size=16).digest()
                    if digest not in seen:
                        seen.add(digest)
                        tokens += ids
                        lengths.append(len(ids))
                        labels.append(found[1])
                        size, failures = size - 1, 0
                        bar.update()
                        continue
                failures += 1
                if failures == ATTEMPTS:
                    raise DataError(
                        f"data.min_length={data.min_length}, data.length={data.length}: of {ATTEMPTS:,} expressions of "
                        f"data.depth={data.depth} and data.arguments={data.arguments} none was so long and new, with "
                        f"{len(labels):,} of {sum(sizes(data).values()):,} drawn; expected lengths that are less rare"
                    )
    return {
        "tokens": np.frombuffer(bytes(tokens), np.uint8),
        "lengths": np.array(lengths, np.int64),
        "labels": np.array(labels, np.int64),
    }


def read(data: LRAData, folder: Path, progress: bool = False) -> dict[str, np.ndarray]:
    """What `draw` gives, drawn once: kept in the folder, with its checksum beside it.

    Raises DataError: as `draw`, or the file is damaged.
    """
    settings = (data.min_length, data.length, data.depth, data.arguments, data.train_size, data.eval_size)
    path = folder / f"listops-{'-'.join(map(str, settings))}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):  # who comes second reads what the first one drew
        if not path.exists():
            content = io.BytesIO()
            np.savez(content, **draw(data, progress))
            files.write(path, content.getvalue())
        verified(path, File(path.name, "", None, "ListOps"), "it is drawn anew")
    with np.load(path, allow_pickle=False) as found:
        return {key: found[key] for key in KEYS}
