"""Synthetic tasks: every answer found again by brute force, sequences drawn as said, splits apart, models that know."""

import collections
import itertools
import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from experiments import config, launch, records, seeds, synthetic
from experiments.config import SYNTHETIC, SyntheticData
from experiments.synthetic.tasks import IGNORE, TASKS, group
from tests.test_experiments import SMALL

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs/synthetic"
CPU = torch.device("cpu")
RECALL = {"associative_recall": {"symbols": 40, "pairs": 3}, "induction_heads": {"symbols": 8}}
DATA = [SyntheticData(task, [16, 20], [16, 20], **RECALL.get(task, {})) for task in SYNTHETIC]
DATA += [SyntheticData("parity", every=True), SyntheticData("bucket_sort", symbols=5)]
tasks = pytest.mark.parametrize("data", DATA, ids=lambda data: f"{data.task}{'_every' * data.every}{data.symbols}")


def sample(data, batch, n, seed=0):
    return TASKS[data.task].sample(data, batch, n, torch.Generator().manual_seed(seed))


def compose(x, y):
    """First x, then y, both tuples of where each thing goes."""
    return tuple(y[i] for i in x)


def even(p):
    """By the cycles of a permutation."""
    seen, swaps = set(), 0
    for start in range(len(p)):
        length = 0
        while start not in seen:
            seen.add(start)
            start, length = p[start], length + 1
        swaps += max(0, length - 1)
    return swaps % 2 == 0


def permutations(name):
    everything = sorted(itertools.permutations(range(int(name[1]))))
    return [p for p in everything if name[0] == "s" or even(p)]


def expected(data, x):
    """{step: answer} of a row of inputs, from the task's statement alone."""
    task, last = data.task, len(x) - 1
    if task == "parity" and data.every:
        return {t: x[: t + 1].count(1) % 2 for t in range(len(x))}
    if task == "parity":
        return {last: x.count(1) % 2}
    if task == "even_pairs":
        word = x[:-1]
        return {last: sum(a != b for a, b in itertools.pairwise(word)) % 2}
    if task == "cycle_navigation":
        place = 0
        for move in x[:-1]:
            place += {0: -1, 1: 0, 2: 1}[move]
        return {last: place % 5}
    if task in ("majority", "majority_count"):
        counts = collections.Counter(x[:-1])
        most = max(counts.values())
        largest = max(symbol for symbol, count in counts.items() if count == most)
        return {last: largest if task == "majority" else most}
    if task == "bucket_sort":
        n = len(x) // 2
        return {n + i: symbol for i, symbol in enumerate(sorted(x[:n]))}
    if task == "missing_duplicate":
        # The word is as long as makes what follows it its own beginning; the batch's n is known to the caller.
        word, copy = x[: data.lengths[0]], x[data.lengths[0] : -1]
        assert word[: len(copy)] == copy
        return {last: word[len(copy)]}
    if task == "missing_duplicate_original":
        word = [symbol for symbol in x[:-1] if symbol != 3]
        half = len(word) // 2
        place = word.index(2)
        return {last: word[(place + half) % len(word)]}
    if task == "modular_arithmetic":
        text = "".join("+-*"[symbol - 5] if symbol in (5, 6, 7) else str(symbol) for symbol in x[:-1])
        return {last: eval(text) % 5}
    if task == "z60":
        return {t: sum(x[: t + 1]) % 60 for t in range(len(x))}
    if task in ("s3", "s5", "a5"):
        elements, answers = permutations(task), {}
        product = tuple(range(int(task[1])))
        for t, element in enumerate(x):
            product = compose(product, elements[element])
            answers[t] = elements.index(product)
        return answers
    if task == "associative_recall":
        pairs, rest = x[: 2 * data.pairs], x[2 * data.pairs :]
        values = dict(zip(pairs[::2], pairs[1::2], strict=True))
        assert len(values) == data.pairs == len(set(values.values()))
        assert all(0 < key < data.symbols // 2 <= value < data.symbols for key, value in values.items())
        assert sorted(symbol for symbol in rest if symbol) == sorted(values)
        assert all(symbol == 0 for symbol in rest[1::2])
        return {2 * data.pairs + i: values[symbol] for i, symbol in enumerate(rest) if symbol}
    if task == "induction_heads":
        special = data.symbols - 1
        assert x.count(special) == 2 and x[-1] == special
        return {last: x[x.index(special) + 1]}
    raise AssertionError(task)


@tasks
def test_answers_are_those_of_brute_force(data):
    for n in (16, 17, 18, 20):
        data.lengths = [n, n]
        for seed in range(5):
            inputs, targets = sample(data, 8, n, seed)
            assert inputs.shape == targets.shape and inputs.shape[1] <= TASKS[data.task].steps(n)
            assert 0 <= inputs.min() and inputs.max() < TASKS[data.task].inputs(data)
            for x, y in zip(inputs.tolist(), targets.tolist(), strict=True):
                found = {t: answer for t, answer in enumerate(y) if answer != IGNORE}
                assert found == expected(data, x)
                assert max(found.values()) < TASKS[data.task].classes(data)


@tasks
def test_shortest_lengths_can_be_drawn(data):
    least = 4 * data.pairs if data.task == "associative_recall" else SYNTHETIC[data.task]
    data.lengths = [least, least]
    inputs, targets = sample(data, 4, least)
    for x, y in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert {t: answer for t, answer in enumerate(y) if answer != IGNORE} == expected(data, x)
    with pytest.raises(ValueError, match=f"data.lengths: expected ascending numbers from {least} up for {data.task}"):
        SyntheticData(**asdict(data) | {"lengths": [least - 1, least]})


def examples(function):
    """Pairs of an `input` and a `target` line of a docstring, side by side where there are two."""
    lines = function.__doc__.splitlines()
    for first, second in itertools.pairwise(lines):
        if first.strip().startswith("input"):
            columns = zip(re.split(r"input", first)[1:], re.split(r"target", second)[1:], strict=True)
            yield from ((a.split(), b.split()) for a, b in columns)


@pytest.mark.parametrize("data", [data for data in DATA if data.task not in ("s3", "s5", "a5")], ids=lambda d: d.task)
def test_the_docstrings_example_is_right(data):
    found = list(examples(TASKS[data.task].sample))
    assert found
    shape = {"associative_recall": {"symbols": 8, "pairs": 2}, "induction_heads": {"symbols": 8}}.get(data.task, {})
    for inputs, targets in found:
        x = [int(symbol) for symbol in inputs]
        every = data.task == "parity" and "." not in targets
        n = {"missing_duplicate": 3}.get(data.task, 20)
        given = SyntheticData(**asdict(data) | {"lengths": [n, n], "every": every} | shape)
        answers = {t: int(symbol) for t, symbol in enumerate(targets) if symbol != "."}
        assert len(x) == len(targets) and answers == expected(given, x)


@pytest.mark.parametrize("name, order", [("s3", 6), ("s5", 120), ("a5", 60), ("z60", 60)])
def test_groups_are_groups(name, order):
    table = group(name)
    everything = torch.arange(order)
    assert table.shape == (order, order)
    assert torch.equal(table[0], everything) and torch.equal(table[:, 0], everything)
    assert all(torch.equal(row.sort().values, everything) for row in (*table, *table.T))
    for x, y, z in torch.randint(order, (500, 3), generator=torch.Generator().manual_seed(0)).tolist():
        assert table[table[x, y], z] == table[x, table[y, z]]
    assert torch.equal(table, table.T) == (name == "z60")


def test_lengths_are_uniform_within_their_bounds():
    cfg = launch.resolve("synthetic", ["task=parity"])
    lengths = collections.Counter(
        synthetic.sequences(cfg, (3, 7), 1, seeds.train_seed(0, step), CPU)[0].shape[1] - 1 for step in range(2000)
    )
    assert sorted(lengths) == [3, 4, 5, 6, 7]
    assert all(abs(count - 400) < 5 * (2000 * 0.2 * 0.8) ** 0.5 for count in lengths.values())


@tasks
def test_symbols_are_drawn_evenly(data):
    """Each input symbol of the part that is drawn, by a chi-square far beyond any chance."""
    inputs, _ = sample(data, 4000, 16)
    if data.task == "associative_recall":
        drawn, sizes = [inputs[:, :6:2] - 1, inputs[:, 1:6:2] - 20], [19, 20]
    elif data.task == "induction_heads":
        drawn, sizes = [inputs[inputs != 7]], [7]
    elif data.task == "modular_arithmetic":
        drawn, sizes = [inputs[:, :-1:2], inputs[:, 1:-1:2] - 5], [5, 3]
    elif data.task == "missing_duplicate_original":
        drawn, sizes = [inputs[inputs < 2]], [2]
    else:
        sizes = {
            "parity": 2,
            "even_pairs": 2,
            "cycle_navigation": 3,
            "missing_duplicate": 9,
            "bucket_sort": data.symbols,
        }
        sizes |= {"majority": 63, "majority_count": 63, "s3": 6, "a5": 60, "z60": 60, "s5": 120}
        drawn, sizes = [inputs[:, :16]], [sizes[data.task]]
    for part, size in zip(drawn, sizes, strict=True):
        counts = part.flatten().bincount(minlength=size).double()
        assert len(counts) == size
        mean = counts.sum() / size
        assert ((counts - mean) ** 2 / mean).sum() < size + 6 * (2 * size) ** 0.5


def test_places_of_a_recall_are_zoologys():
    """Without replacement, weight p^-0.99: the first place's share, found again by numpy's own sampler."""
    import numpy as np

    data = SyntheticData("associative_recall", [64, 64], [64, 64], symbols=64, pairs=4)
    inputs, _ = sample(data, 20_000, 64)
    share = (inputs[:, 8::2] != 0).double().mean(0)
    weight = np.arange(1, 29) ** -0.99
    generator = np.random.default_rng(0)
    drawn = [generator.choice(28, 4, replace=False, p=weight / weight.sum()) for _ in range(20_000)]
    reference = np.bincount(np.concatenate(drawn), minlength=28) / 20_000
    torch.testing.assert_close(share, torch.tensor(reference), atol=0.02, rtol=0)


def test_training_validation_and_test_share_no_sequence():
    cfg = launch.resolve("synthetic", ["task=prefix_parity"])
    rows = {}
    for name, drawn in (
        ("train", [seeds.train_seed(seed, step) for seed in (0, 1) for step in range(50)]),
        ("val", [seeds.eval_seed("val", i) for i in range(50)]),
        ("test", [seeds.eval_seed("test", i) for i in range(50)]),
    ):
        rows[name] = {tuple(x) for s in drawn for x in synthetic.sequences(cfg, (64, 64), 16, s, CPU)[0].tolist()}
    assert len(rows["train"]) == 1600 and len(rows["val"]) == len(rows["test"]) == 800
    assert not (rows["train"] & rows["val"] or rows["train"] & rows["test"] or rows["val"] & rows["test"])


class Knows(torch.nn.Module):
    """Right at every marked position but a share of them, where it says the next class."""

    def __init__(self, cfg, wrong):
        super().__init__()
        self.cfg, self.wrong, self.classes = cfg, wrong, TASKS[cfg.data.task].classes(cfg.data)

    def forward(self, inputs, marked):
        answers = torch.tensor([a for x in inputs.tolist() for _, a in sorted(expected(self.cfg.data, x).items())])
        off = torch.arange(len(answers)) % 4 < self.wrong
        logits = torch.nn.functional.one_hot((answers + off) % self.classes, self.classes).float()
        return 100 * logits, None


def test_accuracy_and_exact_are_those_of_a_model_that_knows():
    settings = ["task=z60", "profile=smoke", "data.test_lengths=[4,4]", "eval.lengths=[8,40]", "eval.batch_size=6"]
    cfg = launch.resolve("synthetic", settings)
    right = synthetic.evaluate(cfg, CPU, Knows(cfg, 0), "test")
    assert right == {"loss": 0.0, "accuracy": 1.0, "exact": 1.0}
    some = synthetic.evaluate(cfg, CPU, Knows(cfg, 1), "test")
    assert some["accuracy"] == 0.75 and some["exact"] == 0.0 and some["loss"] > 1
    at = synthetic.evaluate_lengths(cfg, CPU, Knows(cfg, 0), "test")
    assert at == {"accuracy_at_8": 1.0, "exact_at_8": 1.0, "accuracy_at_40": 1.0, "exact_at_40": 1.0}


def run(tmp_path, *overrides):
    places = (f"results_dir={tmp_path}/results", f"output_dir={tmp_path}/outputs")
    cfg = launch.resolve("synthetic", [*SMALL, *places, *overrides])
    outcome = synthetic.run(cfg)
    path = records.record_path(tmp_path / "results", "synthetic", config.run_id(asdict(cfg)))
    return outcome, json.loads(path.read_text())


@pytest.mark.parametrize("task", sorted(path.stem for path in (CONFIGS / "task").glob("*.yaml")))
def test_every_task_runs(tmp_path, task):
    outcome, record = run(tmp_path, f"task={task}")
    assert outcome == "done" and 0 <= record["metrics"]["last"]["test_accuracy"] <= 1


CHOICES = [f"task={path.stem}" for path in sorted(CONFIGS.glob("task/*.yaml"))]
CHOICES += [f"model={path.stem}" for path in sorted(CONFIGS.glob("model/*.yaml"))]


@pytest.mark.parametrize("profile", ["cpu", "paper"])
@pytest.mark.parametrize("choice", CHOICES)
def test_every_configuration_makes_a_model(choice, profile):
    cfg = launch.resolve("synthetic", [choice, f"profile={profile}"])
    with torch.device("meta"):
        synthetic.model(cfg)


def test_a_target_ends_a_run(tmp_path):
    settings = ("task=even_pairs", "data.lengths=[2,3]", "data.test_lengths=[2,3]", "train.learning_rate=1e-2")
    outcome, record = run(tmp_path, *settings, "train.target=0.7", "train.steps=400", "eval.interval=20")
    curve = record["curves"]["val_accuracy"]
    assert outcome == "done" and record["steps"] < 400
    assert curve[-1][2] >= 0.7 and all(value < 0.7 for _, _, value in curve[:-1])


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["data.task=pairty"], "data.task: expected one of .*'pairty'; the nearest is parity"),
        (["task=prity"], "task: expected one of .*'prity'; the nearest is parity"),
        (["data.lengths=[0,4]"], r"data.lengths: expected ascending numbers from 1 up for parity, got \[0, 4\]"),
        (["data.lengths=[9,4]"], r"data.lengths: expected ascending numbers .*got \[9, 4\]"),
        (["data.lengths=[4]"], r"data.lengths: expected the shortest and the longest, got \[4\]"),
        (["eval.lengths=[64,0]"], r"eval.lengths: expected ascending numbers from 1 up"),
        (["task=recall_4", "data.pairs=17"], "data.lengths: expected ascending numbers from 68 up"),
        (["task=recall_4", "data.symbols=9"], "data.symbols: expected 10 or more for associative_recall, got 9"),
        (["task=s5", "data.every=true"], "data.every: expected false, only parity has both forms"),
        (["data.pairs=0"], "data.pairs: expected more than 0, got 0"),
    ],
)
def test_wrong_settings_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        launch.check("synthetic", overrides)
