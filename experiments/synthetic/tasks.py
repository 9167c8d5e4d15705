"""The synthetic tasks: each a sampler of sequences and of what is to be answered, made on the device from a seed.

A sampler takes the data's settings, a batch size, a length n, a generator and its device, and returns inputs (B, T) and
targets (B, T), int64: at each step the class to be answered there, or IGNORE. The answer may come at the end, after the
symbol EMPTY, or at every step. Sizes and ids of the formal languages are those of the authors' public code (BorealisAI/
minRNNs ff52e9d, data/); where the benchmark that they come from (Delétang et al., arXiv 2207.02098) differs, its form
has a name of its own, with `_original`.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..config import SyntheticData

IGNORE = -100  # torch's cross entropy leaves such targets out
Sampler = Callable[[SyntheticData, int, int, torch.Generator], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Task:
    sample: Sampler
    inputs: Callable[[SyntheticData], int]  # the number of input ids
    classes: Callable[[SyntheticData], int]
    steps: Callable[[int], int]  # T of a length n


def _integers(high: int, shape: tuple[int, ...], generator: torch.Generator, low: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=generator, device=generator.device)


def _answer_at_the_end(symbols: Tensor, answer: Tensor, empty: int) -> tuple[Tensor, Tensor]:
    """The symbols (B, n) and EMPTY, at which the answer (B,) is due."""
    inputs = torch.nn.functional.pad(symbols, (0, 1), value=empty)
    targets = torch.full_like(inputs, IGNORE)
    targets[:, -1] = answer
    return inputs, targets


# --- formal languages ---------------------------------------------------------------------------------------


def parity(data: SyntheticData, batch: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Whether the number of ones is odd; with data.every of each prefix. For 1 0 1 1:

    input    1 0 1 1 2          input    1 0 1 1
    target   . . . . 1          target   1 1 0 1
    """
    bits = _integers(2, (batch, n), generator)
    if data.every:
        return bits, bits.cumsum(1) % 2
    return _answer_at_the_end(bits, bits.sum(1) % 2, 2)


def even_pairs(data: SyntheticData, batch: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Whether the number of unequal neighbours is odd, that is, whether the first and the last differ.

    input    0 1 1 2
    target   . . . 1
    """
    bits = _integers(2, (batch, n), generator)
    return _answer_at_the_end(bits, bits[:, 0] ^ bits[:, -1], 2)


def cycle_navigation(data: SyntheticData, batch: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Where one stands on a ring of five after the moves 0 (back), 1 (stay), 2 (forward), from 0.

    input    2 2 0 1 2 3
    target   . . . . . 2
    """
    moves = _integers(3, (batch, n), generator)
    return _answer_at_the_end(moves, (moves - 1).sum(1) % 5, 3)


def _counts(symbols: Tensor, number: int) -> Tensor:
    counts = symbols.new_zeros(symbols.shape[0], number)
    return counts.scatter_add_(1, symbols, torch.ones_like(symbols))


def majority(data: SyntheticData, batch: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The most frequent of 63 symbols; the largest of those that tie.

    input    5 9 5 9 2 63
    target   . . . . . 9
    """
    symbols = _integers(63, (batch, n), generator)
    ranked = _counts(symbols, 63) * 64 + torch.arange(63, device=symbols.device)
    return _answer_at_the_end(symbols, ranked.argmax(1), 63)


def majority_count(data: SyntheticData, batch: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """How often the most frequent of 63 symbols comes (62 where it is more).

    input    5 9 5 9 2 63
    target   . . . . . 2
    """
    symbols = _integers(63, (batch, n), generator)
    return _answer_at_the_end(symbols, _counts(symbols, 63).amax(1).clamp(max=62), 63)


def bucket_sort(data: SyntheticData, batch: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The symbols in ascending order: ten of them, or five in the original benchmark (data.symbols).

    input    3 1 3 0 10 10 10 10
    target   . . . . 0  1  3  3
    """
    symbols = _integers(data.symbols, (batch, n), generator)
    inputs = torch.nn.functional.pad(symbols, (0, n), value=data.symbols)
    return inputs, torch.cat([torch.full_like(symbols, IGNORE), symbols.sort(1).values], 1)


def missing_duplicate(data: SyntheticData, batch: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The next symbol of a copy of the first n, cut off after m: nine symbols, m from 0 to n - 1, one for a batch.

    input    4 0 7 4 9
    target   . . . . 0
    """
    symbols = _integers(9, (batch, n), generator)
    m = int(_integers(n, (1,), generator))
    return _answer_at_the_end(torch.cat([symbols, symbols[:, :m]], 1), symbols[:, m], 9)


def missing_duplicate_original(
    data: SyntheticData, batch: int, n: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The bit that is masked (2) in a string of n // 2 bits written twice; 3 pads an odd n, 4 is EMPTY.

    input    1 0 1 1 2 1 3 4
    target   . . . . . . . 0
    """
    half = _integers(2, (batch, n // 2), generator)
    symbols = half.repeat(1, 2)
    place = _integers(symbols.shape[1], (batch, 1), generator)
    answer = symbols.gather(1, place)[:, 0]
    symbols = symbols.scatter(1, place, 2)
    return _answer_at_the_end(torch.nn.functional.pad(symbols, (0, n % 2), value=3), answer, 4)


# --- state tracking -----------------------------------------------------------------------------------------


def modular_arithmetic(data: SyntheticData, batch: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The value modulo five of n numbers 0 to 4 joined by + (5), - (6) and * (7), which binds tighter. For 3 + 2 * 4:

    input    3 5 2 7 4 8
    target   . . . . . 1
    """
    numbers, signs = _integers(5, (batch, n), generator), _integers(3, (batch, n - 1), generator)
    inputs = numbers.new_empty(batch, 2 * n - 1)
    inputs[:, ::2], inputs[:, 1::2] = numbers, signs + 5
    total, term = torch.zeros_like(numbers[:, 0]), numbers[:, 0]
    for number, sign in zip(numbers.unbind(1)[1:], signs.unbind(1), strict=True):
        times = sign == 2
        total = torch.where(times, total, total + term) % 5
        term = torch.where(times, term * number, torch.where(sign == 0, number, -number)) % 5
    return _answer_at_the_end(inputs, (total + term) % 5, 8)


@cache
def group(name: str) -> Tensor:
    """The table (G, G) of a group: the element that first x and then y give. Element 0 is the identity.

    S3 and S5 are all permutations of 3 and 5 things, A5 the even ones of 5, in lexicographic order; Z60 is addition.
    """
    if name == "z60":
        elements = torch.arange(60)
        return (elements[:, None] + elements) % 60
    size = int(name[1])
    permutations = list(itertools.permutations(range(size)))
    if name[0] == "a":
        permutations = [p for p in permutations if sum(a > b for a, b in itertools.combinations(p, 2)) % 2 == 0]
    place = {p: i for i, p in enumerate(permutations)}
    return torch.tensor([[place[tuple(y[i] for i in x)] for y in permutations] for x in permutations])


def word_problem(data: SyntheticData, batch: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The product of each prefix of n elements of a group (arXiv 2404.08819; github.com/jopetty/word-problem). For Z60:

    input    59 2 30
    target   59 1 31
    """
    table = group(data.task).to(generator.device)
    elements = _integers(len(table), (batch, n), generator)
    if data.task == "z60":
        return elements, elements.cumsum(1) % 60
    products = elements.clone()
    distance = 1
    while distance < n:  # the product is associative, so prefixes double
        products = torch.cat([products[:, :distance], table[products[:, :-distance], products[:, distance:]]], 1)
        distance *= 2
    return elements, products


# --- recall -------------------------------------------------------------------------------------------------


def associative_recall(data: SyntheticData, batch: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Multi-query associative recall (zoology, arXiv 2312.04927; github.com/HazyResearch/zoology d88d6f5).

    First data.pairs different keys (1 to V / 2 - 1), each followed by its value (V / 2 to V - 1, all different). Then
    each key once more, in an order and at distances that are drawn, at which its value is due; 0 stands between.
    Near places are drawn a little more often: the p-th of the places has weight p^-0.99. With V = 8, 2 pairs:

    input    3 6 1 4 0 0 1 0 3 0
    target   . . . . . . 4 . 6 .
    """
    half, pairs = data.symbols // 2, data.pairs
    noise = torch.rand(batch, data.symbols - 1, generator=generator, device=generator.device)
    keys, values = noise[:, : half - 1].topk(pairs).indices + 1, noise[:, half - 1 :].topk(pairs).indices + half
    inputs = keys.new_zeros(batch, n)
    inputs[:, : 2 * pairs : 2], inputs[:, 1 : 2 * pairs : 2] = keys, values
    places = (n - 2 * pairs) // 2
    weight = -0.99 * torch.arange(1, places + 1, device=generator.device).log()
    noise = torch.rand(batch, places, generator=generator, device=generator.device)
    drawn = (weight - (-noise.log()).log()).topk(pairs).indices  # without replacement, by Gumbel's trick
    at = 2 * pairs + 2 * drawn
    inputs.scatter_(1, at, keys)
    return inputs, torch.full_like(inputs, IGNORE).scatter_(1, at, values)


def induction_heads(data: SyntheticData, batch: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The symbol that followed the special one, V - 1, before (arXiv 2312.00752, E.1). With V = 8:

    input    2 5 7 3 6 1 7
    target   . . . . . . 3
    """
    special = data.symbols - 1
    inputs = _integers(special, (batch, n), generator)
    place = _integers(n - 2, (batch, 1), generator)
    inputs.scatter_(1, place, special)
    inputs[:, -1] = special
    targets = torch.full_like(inputs, IGNORE)
    targets[:, -1:] = inputs.gather(1, place + 1)
    return inputs, targets


def _number(count: int) -> Callable[[SyntheticData], int]:
    return lambda data: count


def _one_more(n: int) -> int:
    return n + 1


def _same(n: int) -> int:
    return n


TASKS = {
    "parity": Task(parity, lambda data: 2 if data.every else 3, _number(2), _one_more),
    "even_pairs": Task(even_pairs, _number(3), _number(2), _one_more),
    "cycle_navigation": Task(cycle_navigation, _number(4), _number(5), _one_more),
    "majority": Task(majority, _number(64), _number(63), _one_more),
    "majority_count": Task(majority_count, _number(64), _number(63), _one_more),
    "bucket_sort": Task(bucket_sort, lambda data: data.symbols + 1, lambda data: data.symbols, lambda n: 2 * n),
    "missing_duplicate": Task(missing_duplicate, _number(10), _number(9), lambda n: 2 * n),
    "missing_duplicate_original": Task(missing_duplicate_original, _number(5), _number(2), _one_more),
    "modular_arithmetic": Task(modular_arithmetic, _number(9), _number(5), lambda n: 2 * n),
    **{
        name: Task(word_problem, *(_number(size),) * 2, _same)
        for name, size in (("s3", 6), ("s5", math.factorial(5)), ("a5", 60), ("z60", 60))
    },
    "associative_recall": Task(associative_recall, lambda data: data.symbols, lambda data: data.symbols, _same),
    "induction_heads": Task(induction_heads, lambda data: data.symbols, lambda data: data.symbols - 1, _same),
}
