"""Long Range Arena: what is drawn and read is what its rules say, no split sees another, no model sees padding."""

import gzip
import hashlib
import importlib.machinery
import importlib.util
import re
import statistics
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from experiments import config, launch, lra, records
from experiments import data as files
from experiments.config import LRAData
from experiments.data import DataError
from experiments.lra import data, listops
from minrnn.mixers import make
from minrnn.models import ClassifierModel

MODELS = sorted(path.stem for path in (Path(__file__).parent.parent / "configs/lra/model").glob("*.yaml"))
SMALL = LRAData(length=32, min_length=6, depth=5, arguments=4, train_size=300, eval_size=60)


def resolve(tmp_path, *overrides):
    places = (f"results_dir={tmp_path}/results", f"output_dir={tmp_path}/outputs")
    common = ("profile=smoke", "logger=none", "progress=false", "threads=1", "device=cpu")
    return launch.resolve("lra", [*common, *places, *overrides])


def sequences(dataset, name):
    """A split's, as a list of tuples of bytes."""
    split, values = dataset.splits[name], dataset.values.tobytes()
    return [
        tuple(values[start : start + length] for start, length in zip(*rows, strict=True))
        for rows in zip(split.starts.tolist(), split.lengths.tolist(), strict=True)
    ]


# -- ListOps


def parse(words):
    """The value of an expression in print, by the definition, and how deep it is."""
    word = words.pop(0)
    if word.isdigit():
        return int(word), 1
    found = []
    while words[0] != "]":
        found.append(parse(words))
    words.pop(0)
    values = [value for value, _ in found]
    assert len(values) >= 2
    reduced = {"[MIN": min, "[MAX": max, "[MED": statistics.median, "[SM": lambda x: int(str(sum(x))[-1])}[word](values)
    return int(reduced), 1 + max(depth for _, depth in found)


def test_the_test_s_own_evaluator():
    assert parse("[MAX 2 9 [MIN 4 7 ] 0 ]".split()) == (9, 3)
    assert parse("[SM 9 [MED 1 8 4 9 ] [MED 3 4 ] ]".split()) == (8, 3)  # 9 + 6 + 3


def test_answers_are_those_of_the_expressions_in_print():
    for depth, arguments, length in ((10, 10, 2000), (4, 3, 60), (2, 7, 10)):
        random, deepest = Random(7), 0
        for _ in range(400):
            found = listops.expression(random, depth, arguments, length)
            if found is None:
                continue
            tokens, value = found
            words = [listops.TOKENS[token] for token in tokens]
            assert len(tokens) < length and "".join(words).count("[") == words.count("]")
            answer, reached = parse(words)
            assert words == [] and answer == value and reached <= depth
            deepest = max(deepest, reached)
        assert deepest == depth


def close(found, expected):
    """Counts of draws with these probabilities, within five standard deviations."""
    total = sum(found.values())
    assert set(found) == set(expected)
    for key, probability in expected.items():
        sigma = (total * probability * (1 - probability)) ** 0.5
        assert abs(found[key] - total * probability) < 5 * sigma, (key, found, expected)


def test_operators_arguments_and_digits_are_drawn_as_published():
    random = Random(3)
    drawn = [listops.expression(random, 2, 4, 100)[0] for _ in range(20_000)]
    large = [tokens for tokens in drawn if len(tokens) > 1]
    close(Counter(len(tokens) > 1 for tokens in drawn), {True: 0.25, False: 0.75})
    close(Counter(listops.TOKENS[tokens[0]] for tokens in large), dict.fromkeys(("[MIN", "[MAX", "[MED", "[SM"), 0.25))
    close(Counter(len(tokens) - 2 for tokens in large), dict.fromkeys((2, 3, 4), 1 / 3))
    close(Counter(digit for tokens in large for digit in tokens[1:-1]), dict.fromkeys(range(10), 0.1))


def test_splits_of_listops_are_disjoint_and_fixed(tmp_path):
    dataset = data.expressions(SMALL, tmp_path)
    found = {name: sequences(dataset, name) for name in data.SPLITS}
    assert {name: len(rows) for name, rows in found.items()} == {"train": 300, "val": 60, "test": 60}
    assert len(set(sum(found.values(), []))) == 420
    for name in data.SPLITS:
        for (ids,), label in zip(found[name], dataset.splits[name].labels.tolist(), strict=True):
            assert 6 < len(ids) < 32 and parse([listops.TOKENS[i] for i in ids]) == (label, pytest.approx(3, abs=2))
    more = data.expressions(LRAData(**asdict(SMALL) | {"train_size": 350}), tmp_path)
    assert {name: sequences(more, name)[:300] for name in data.SPLITS} == found and more.sha256 != dataset.sha256
    assert data.expressions(SMALL, tmp_path / "elsewhere").sha256 == dataset.sha256


def test_an_expression_that_was_drawn_for_test_is_left_out_of_training(tmp_path):
    """There are 400 of the form [OP a b ], and of 300 that are drawn at random many would come twice."""
    few = LRAData(length=5, min_length=3, depth=2, arguments=2, train_size=150, eval_size=75)
    dataset = data.expressions(few, tmp_path)
    assert len({row for name in data.SPLITS for row in sequences(dataset, name)}) == 300


def test_expressions_are_drawn_once(tmp_path, monkeypatch):
    first = listops.read(SMALL, tmp_path)
    monkeypatch.delattr(listops, "draw")
    again = listops.read(SMALL, tmp_path)
    assert [*first] == [*again] and all(np.array_equal(first[key], again[key]) for key in first)


def test_damaged_expressions_are_refused_in_one_line(tmp_path):
    listops.read(SMALL, tmp_path)
    (path,) = tmp_path.glob("*.npz")
    content, random = path.read_bytes(), Random(0)
    for _ in range(20):
        i = random.randrange(len(content))
        for damaged in (content[:i], content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :]):
            path.write_bytes(damaged)
            with pytest.raises(DataError, match=f"^{path}: expected sha256 .*; remove both, and it is drawn anew$"):
                listops.read(SMALL, tmp_path)


@pytest.mark.parametrize(
    ("settings", "match"),
    (
        (("data.task=listop",), "data.task: expected one of .*'retrieval'.*, got 'listop'; the nearest is listops"),
        (("task=image", "data.dataset=mnist"), "data.dataset: expected one of .*'local/digits'.*, got 'mnist'"),
        (("data.dataset=local/digits",), "data.dataset: expected one of .None,., got 'local/digits'"),
        (("data.min_length=31",), "data.min_length, data.length: expected .* between them from 4 to .*, got 31 and 32"),
        (("data.depth=3", "data.arguments=2", "data.min_length=10"), ".*from 4 to 10, the longest .*, got 10 and 32"),
        (("data.length=4", "data.min_length=0"), "data.min_length, data.length: .*, got 0 and 4"),
        (("data.length=0",), "data.length: expected more than 0, got 0"),
        (("data.min_length=-1",), "data.min_length: expected 0 or more, got -1"),
        (("data.depth=1",), "data.depth: expected 2 to 100, got 1"),
        (("data.arguments=101",), "data.arguments: expected 2 to 100, got 101"),
        (("data.train_size=0",), "data.train_size: expected more than 0, got 0"),
        (("eval.batch_size=0",), "eval.batch_size: expected more than 0, got 0"),
        (("data.size=9",), "data.size: no such setting"),
    ),
)
def test_a_setting_that_cannot_be_is_refused_in_one_line(settings, match):
    with pytest.raises(Exception) as found:
        launch.check("lra", ["profile=smoke", *settings])
    assert re.match(match, text := launch.in_one_line(found.value)) and "\n" not in text


@pytest.mark.parametrize(
    "settings",
    (
        dict(length=5, min_length=3, depth=2, arguments=2, train_size=500, eval_size=1),  # there are 400 different
        dict(length=54, min_length=52, depth=4, arguments=3),  # all of three arguments, to the last depth
    ),
)
def test_lengths_that_cannot_be_drawn_are_refused(monkeypatch, settings):
    monkeypatch.setattr(listops, "ATTEMPTS", 300)
    with pytest.raises(DataError, match=r"^data.min_length=\d+, data.length=\d+: of 300 expressions .*less rare$"):
        listops.draw(LRAData(**settings))


# -- images


def put(monkeypatch, folder, name, content):
    """A file where data are looked for, as an entry of a table."""
    monkeypatch.setenv("MINRNN_DATA", str(folder))
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return files.File(name, "https://example.org/archive", hashlib.sha256(content).hexdigest(), "the data")


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Six files of 20 images each: labels and planes of red, green and blue."""
    random = np.random.default_rng(0)
    rows = random.integers(0, 256, (6, 20, 3073), dtype=np.uint8)
    rows[..., 0] %= 10
    names = [file.name for file in files.CIFAR10]
    entries = [put(monkeypatch, tmp_path, name, part.tobytes()) for name, part in zip(names, rows, strict=True)]
    monkeypatch.setattr(files, "CIFAR10", entries)
    return rows.reshape(-1, 3073)


def test_images_of_cifar10_are_read_in_grey_row_by_row(tmp_path, cifar):
    dataset = data.read(resolve(tmp_path, "task=image"))
    assert (dataset.classes, dataset.length, dataset.vocab, dataset.parts) == (10, 1024, None, 1)
    rows = {"train": cifar[:90], "val": cifar[90:100], "test": cifar[100:]}
    weights = (0.2989, 0.5870, 0.1140)
    for name, part in rows.items():
        assert dataset.splits[name].labels.tolist() == part[:, 0].tolist()
        for row, (pixels,) in zip(part, sequences(dataset, name), strict=True):
            planes = row[1:].reshape(3, 32, 32).tolist()
            for y, x in ((0, 0), (0, 31), (17, 5), (31, 31)):
                exact = sum(w * plane[y][x] / 255 for w, plane in zip(weights, planes, strict=True)) * 255.5
                assert pixels[32 * y + x] == int(exact) or abs(exact - round(exact)) < 1e-3  # rounding of float32


def test_grey_is_tensorflow_s():
    """By hand: 255.5 times the weighted mean over 255, cut off."""
    pixels = np.array([[255, 255, 0, 0, 10], [255, 0, 255, 0, 20], [255, 0, 0, 255, 30]], np.uint8)
    assert data.grey(pixels[None]).tolist() == [[255, 76, 149, 29, 18]]


def test_pixels_are_normalised_by_those_of_training(tmp_path, cifar):
    dataset = data.read(resolve(tmp_path, "task=image"))
    inputs, lengths, labels = data.Sequences(dataset, "test", torch.tensor(dataset.values)).of(torch.tensor([2, 7]))
    train = np.array([[*row[0]] for row in sequences(dataset, "train")], float)
    test = np.array([[*row[0]] for row in sequences(dataset, "test")], float)
    expected = (test[[2, 7]] - train.mean()) / train.std()
    assert inputs.dtype == torch.float32 and inputs.shape == (2, 1, 1024) and lengths.tolist() == [[1024], [1024]]
    assert np.abs(inputs[:, 0].numpy() - expected).max() < 1e-5
    assert labels.tolist() == cifar[[102, 107], 0].tolist()


def test_a_file_of_cifar10_that_is_missing_truncated_or_another_is_refused(tmp_path, cifar):
    cfg, path = resolve(tmp_path, "task=image"), tmp_path / "cifar-10-batches-bin/data_batch_3.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(
        DataError, match=f"^{path}: expected sha256 .*, got .*{len(content) - 1} bytes.*; remove it, and"
    ):
        data.read(cfg)
    path.write_bytes(content[:-1] + b"x")
    with pytest.raises(DataError, match=f"^{path}: expected sha256 .*, got .*; remove it, and get it anew$"):
        data.read(cfg)
    path.unlink()
    with pytest.raises(DataError, match=f"^the data: there is no {path} nor .*; put it there from https://example.org"):
        data.read(cfg)
    path.mkdir()
    with pytest.raises(DataError, match=f"^{path}: expected a file, got a folder$"):
        data.read(cfg)


@pytest.fixture
def digits(tmp_path, monkeypatch):
    """57 images that all differ, in scikit-learn's form, which is not installed."""
    random = np.random.default_rng(1)
    table = np.c_[random.integers(0, 17, (57, 64)), np.arange(57) % 10]
    content = gzip.compress("\n".join(",".join(map(str, row)) for row in table.tolist()).encode())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(files.LRA, "digits", put(monkeypatch, tmp_path, "digits.csv.gz", content))
    return table


def test_digits_are_split_once_and_for_all(tmp_path, digits):
    cfg = resolve(tmp_path, "task=image", "data.dataset=local/digits")
    dataset = data.read(cfg)
    assert (dataset.classes, dataset.length, dataset.vocab) == (10, 64, None)
    found = {}
    for name in data.SPLITS:
        labels = dataset.splits[name].labels.tolist()
        found[name] = [(*row[0], label) for row, label in zip(sequences(dataset, name), labels, strict=True)]
    assert {name: len(rows) for name, rows in found.items()} == {"train": 47, "val": 5, "test": 5}
    rows = [tuple(row) for row in digits.tolist()]
    assert sorted(sum(found.values(), [])) == sorted(rows)  # each once
    assert sum(found.values(), []) != rows and data.read(cfg).sha256 == dataset.sha256


def test_digits_of_an_installed_scikit_learn_are_taken(tmp_path, digits, monkeypatch):
    own = tmp_path / "sklearn/datasets/data/digits.csv.gz"
    own.parent.mkdir(parents=True)
    (tmp_path / "digits.csv.gz").rename(own)
    spec = importlib.machinery.ModuleSpec("sklearn", None, origin=str(tmp_path / "sklearn/__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert data.digits().length == 64
    own.write_bytes(own.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"^{own}: expected sha256 .*; remove it, and install scikit-learn anew$"):
        data.digits()


def test_digits_that_cannot_be_had_are_refused(tmp_path, digits, monkeypatch):
    path = tmp_path / "digits.csv.gz"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        DataError, match=f"^{path}: expected sha256 .*; or `pip install scikit-learn`, which brings it$"
    ):
        data.digits()
    path.unlink()

    def refuse(file, folder, progress):
        raise DataError("digits.csv.gz: cannot be fetched")

    monkeypatch.setattr(files, "fetch", refuse)
    with pytest.raises(
        DataError, match="^digits.csv.gz: cannot be fetched; or `pip install scikit-learn`, which brings"
    ):
        data.digits()


# -- retrieval


AAN_LINES = {
    "train": [b"1.0\tA1\tB1\ta text\tanother", b"0.0\tA1\tC1\ta text\t", b'1.0\t"D\tE\t"quoted\tlonger than ten bytes'],
    "val": [b"0.0\tV1\tV2\tsome\tmore", b"1.0\tV3\tV4\tx\ty"],
    "test": [b"1.0\tT1\tT2\t\xc3\xa9t\xc3\xa9\tsummer"],
}


@pytest.fixture
def aan(tmp_path, monkeypatch):
    entries = {}
    for name, lines in AAN_LINES.items():
        entries[name] = put(monkeypatch, tmp_path, files.AAN[name].name, b"\n".join(lines) + b"\n")
        monkeypatch.setitem(data.AAN_ROWS, name, len(lines))
    monkeypatch.setattr(files, "AAN", entries)
    return resolve(tmp_path, "task=retrieval", "data.length=10")


def test_pairs_of_aan_are_read_byte_by_byte(aan):
    dataset = data.read(aan)
    assert (dataset.classes, dataset.length, dataset.vocab, dataset.parts) == (2, 10, 256, 2)
    assert {name: sequences(dataset, name) for name in data.SPLITS} == {
        "train": [(b"a text", b"another"), (b"a text", b" "), (b'"quoted', b"longer tha")],
        "val": [(b"some", b"more"), (b"x", b"y")],
        "test": [("été".encode(), b"summer")],
    }
    assert [dataset.splits[name].labels.tolist() for name in data.SPLITS] == [[1, 0, 1], [0, 1], [1]]
    assert len(dataset.values) < sum(len(text) for rows in AAN_LINES.values() for text in rows)  # one text, once


@pytest.mark.parametrize(
    ("content", "match"),
    (
        (
            b"0.0\tV1\tV2\tsome\tmore\n1.0\tV3\tV4\tx",
            "line 2: expected 0.0 or 1.0, two ids .*, got 4 fields, .*get it anew$",
        ),
        (b"0.5\tV1\tV2\tsome\tmore\n", "line 1: .*, got 5 fields, the first b'0.5'; get it anew$"),
        (b"\xff\x00" * 50, "line 1: .*, got 1 fields, the first .*; get it anew$"),
        (b"0.0\tV1\tV2\tsome\tmore\n", "expected 2 lines, got 1; get it anew$"),
        (b"", "expected 2 lines, got 0; get it anew$"),
    ),
)
def test_a_damaged_file_of_aan_is_refused(tmp_path, aan, monkeypatch, content, match):
    monkeypatch.setitem(files.AAN, "val", put(monkeypatch, tmp_path, files.AAN["val"].name, content))
    with pytest.raises(DataError, match=f"^{tmp_path}/aan/new_aan_pairs.eval.tsv: {match}"):
        data.read(aan)


def test_a_file_of_aan_that_changed_or_is_missing_is_refused(tmp_path, aan, monkeypatch):
    path = tmp_path / "aan/new_aan_pairs.test.tsv"
    unknown = files.File(files.AAN["test"].name, "https://example.org/archive", None, "AAN")
    monkeypatch.setitem(files.AAN, "test", unknown)
    data.read(aan)  # keeps the checksum
    path.write_bytes(path.read_bytes().replace(b"summer", b"winter"))
    with pytest.raises(
        DataError, match=f"^{path}: expected sha256 .* as .*sha256 says, .*; remove both, and get it anew"
    ):
        data.read(aan)
    path.unlink()
    with pytest.raises(DataError, match=f"^AAN: there is no {path} nor .*; put it there from https://example.org"):
        data.read(aan)


def test_pairs_of_python_s_topics(tmp_path):
    length = 100
    dataset = data.read(
        resolve(
            tmp_path, "task=retrieval", "data.dataset=local/pydoc_pairs", f"data.length={length}",
            "data.train_size=600", "data.eval_size=200",
        )
    )  # fmt: skip
    topics = [text.encode() for text in files.python_topics()]

    def of(excerpt):
        """The topic that has it, and no other has."""
        (found,) = [i for i, text in enumerate(topics) if excerpt in text]
        return found

    seen = {}
    for name in data.SPLITS:
        pairs, labels = sequences(dataset, name), dataset.splits[name].labels.tolist()
        assert len(pairs) == (600 if name == "train" else 200) and {len(text) for pair in pairs for text in pair} == {
            length
        }
        assert abs(sum(labels) / len(labels) - 0.5) < 5 * (0.25 / len(labels)) ** 0.5
        for (start, other), pair, label in zip(dataset.splits[name].starts.tolist(), pairs, labels, strict=True):
            first, second = map(of, pair)
            assert (first == second) == label
            assert abs(start - other) >= length or not label  # beside one another
        seen[name] = {of(text) for pair in pairs for text in pair}
    assert min(map(len, seen.values())) > 4
    assert not seen["train"] & seen["val"] and not seen["train"] & seen["test"] and not seen["val"] & seen["test"]


def test_excerpts_that_are_too_long_are_refused(tmp_path):
    settings = ("task=retrieval", "data.dataset=local/pydoc_pairs", "data.length=9000")
    with pytest.raises(
        DataError, match="^data.length: expected less than 9000, .* twice as many bytes, and 12 are needed"
    ):
        data.read(resolve(tmp_path, *settings))


# -- batches


def test_batches_are_padded_on_the_right_to_their_longest(tmp_path):
    dataset = data.expressions(SMALL, tmp_path)
    split = data.Sequences(dataset, "val", torch.tensor(dataset.values))
    expected = [
        ([*ids], label)
        for (ids,), label in zip(sequences(dataset, "val"), dataset.splits["val"].labels.tolist(), strict=True)
    ]

    def rows(batch):
        inputs, lengths, labels = batch
        assert inputs.dtype == lengths.dtype == labels.dtype == torch.int64
        assert inputs.shape == (len(labels), 1, lengths.max()) and lengths.shape == (len(labels), 1)
        found = []
        for ids, n, label in zip(inputs[:, 0].tolist(), lengths[:, 0].tolist(), labels.tolist(), strict=True):
            assert not any(ids[n:])
            found.append((ids[:n], label))
        return found

    assert rows(split.of(torch.tensor([4, 0, 59]))) == [expected[i] for i in (4, 0, 59)]
    drawn = rows(split.batch(40, seed=5))
    assert drawn == rows(split.batch(40, seed=5)) != rows(split.batch(40, seed=6))
    assert all(row in expected for row in drawn)
    everything = [row for batch in split.all(7) for row in rows(batch)]
    assert sorted(everything) == sorted(expected)
    assert [len(ids) for ids, _ in everything] == sorted(len(ids) for ids, _ in expected)


# -- models


def classifier(name, parts, vocab=15):
    cfg = launch.resolve("lra", ["profile=smoke", f"model={name}", "model.layers=2"]).model
    settings = cfg.classifier(32)
    torch.manual_seed(1)
    return ClassifierModel(vocab, 3, parts=parts, mixer=make(**cfg.mixer(32)), **settings)


def inputs_of(vocab, *shape):
    return torch.randint(vocab, shape) if vocab else torch.randn(shape)


@pytest.mark.parametrize(("parts", "vocab"), ((1, 15), (2, None)))
@pytest.mark.parametrize("name", MODELS)
def test_no_model_sees_padding(name, parts, vocab):
    """Neither what it says nor what it learns depends on what the padding is, or how much there is."""
    model = classifier(name, parts, vocab)
    lengths = torch.tensor([[3, 11, 7, 1], [9, 2, 11, 5]]).T[:, :parts]
    inputs, padding = inputs_of(vocab, 4, parts, 11), inputs_of(vocab, 4, parts, 20)
    real = torch.arange(20) < lengths[..., None]
    longer = torch.where(real, F.pad(inputs, (0, 9)), padding)
    results = []
    for given in (inputs, longer):
        model.zero_grad()
        logits = model(given, lengths)
        F.cross_entropy(logits, torch.tensor([0, 1, 2, 1])).backward()
        results.append([logits, *(p.grad for p in model.parameters())])
    for one, other in zip(*results, strict=True):
        assert (one - other).abs().max() <= 1e-6 * (1 + one.abs().max())
    changed = longer.clone()
    changed[1, 0, 10] = (changed[1, 0, 10] + 1) % 15 if vocab else 3.0  # the last real step of the second example
    moved = (model(changed, lengths) - results[0][0]).abs().amax(1) > 1e-4
    assert moved.tolist() == [False, True, False, False]


@pytest.mark.parametrize("parts", (1, 2))
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_its_backbone_step_by_step_and_its_head(name, parts):
    model = classifier(name, parts)
    inputs, lengths = torch.randint(15, (3, parts, 8)), torch.tensor([[8, 5, 1], [2, 8, 3]]).T[:, :parts]
    expected = []
    with torch.no_grad():
        for example, counts in zip(inputs, lengths, strict=True):
            read = []
            for ids, count in zip(example, counts.tolist(), strict=True):
                state, total = model.backbone.initial_state(1), 0
                for t in range(count):
                    x = model.embedding.weight[ids[t]] + (model.positions.weight[t] if model.positions else 0)
                    x, state = model.backbone.step(x[None], state)
                    total = total + x[0]
                read.append(total / count)
            if parts == 1:
                expected.append(model.head.weight @ read[0] + model.head.bias)
            else:
                first, second = model.head[0], model.head[2]
                features = torch.cat((read[0], read[1], read[0] * read[1], read[0] - read[1]))
                hidden = (first.weight @ features + first.bias).clamp(min=0)
                expected.append(second.weight @ hidden + second.bias)
        assert (model(inputs, lengths) - torch.stack(expected)).abs().max() < 1e-5


def test_more_steps_than_positions_are_refused():
    model = classifier("transformer", 1)
    with pytest.raises(ValueError, match="inputs: expected at most 32 steps, the number of learned positions, got 33"):
        model(torch.zeros(1, 1, 33, dtype=torch.long), torch.tensor([[33]]))


def test_a_classifier_of_three_parts_or_a_tied_one_is_refused():
    with pytest.raises(ValueError, match="parts: expected 1 or 2, got 3"):
        ClassifierModel(5, 2, 8, 1, make("mingru"), parts=3)
    with pytest.raises(ValueError, match="model.tied: expected false"):
        config.MinGRU(tied=True).classifier(10)


def test_an_evaluation_is_of_every_example(tmp_path):
    cfg = resolve(tmp_path, "model=minlstm", "eval.batch_size=7")
    dataset = data.expressions(SMALL, tmp_path)
    splits = {name: data.Sequences(dataset, name, torch.tensor(dataset.values)) for name in data.SPLITS}
    model, losses, right = lra.model(cfg, dataset), [], []
    with torch.no_grad():
        for (ids,), label in zip(sequences(dataset, "val"), dataset.splits["val"].labels.tolist(), strict=True):
            chances = model(torch.tensor([[[*ids]]]), torch.tensor([[len(ids)]]))[0].double().softmax(0)
            losses.append(-chances[label].log().item())
            right.append(chances.argmax().item() == label)
        found = lra.evaluate(cfg, splits, model, "val")
    assert found["accuracy"] == statistics.fmean(right)
    assert found["loss"] == pytest.approx(statistics.fmean(losses), rel=1e-5)


# -- runs


PAPER = {  # layers, dim, batch size, length
    "listops": (8, 128, 32, 2000),
    "retrieval": (6, 128, 64, 4000),
    "image": (6, 512, 64, 1024),
}


@pytest.mark.parametrize("task", PAPER)
def test_profile_paper_is_the_paper_s(task):
    cfg = launch.resolve("lra", ["profile=paper", "model=minlstm", f"task={task}"])
    model, train = cfg.model, cfg.train
    assert (model.layers, model.dim, train.batch_size, cfg.data.length) == PAPER[task]
    assert (model.conv, bool(model.mlp)) == (4, True)
    assert (train.steps, train.warmup_steps, train.schedule, train.min_lr) == (250_000, 25_000, "cosine", 0)
    assert (train.learning_rate, train.weight_decay) == (1e-3, 0.05)
    drawn = cfg.data
    assert (drawn.min_length, drawn.depth, drawn.arguments) == (500, 10, 10)
    assert (drawn.train_size, drawn.eval_size) == (96_000, 2_000)


@pytest.mark.parametrize("task", PAPER)
@pytest.mark.parametrize("profile", config.PROFILES)
@pytest.mark.parametrize("name", MODELS)
def test_every_configuration_makes_a_model(name, profile, task):
    cfg = launch.resolve("lra", [f"model={name}", f"profile={profile}", f"task={task}"])
    parts, vocab = (2, 256) if task == "retrieval" else (1, None if task == "image" else 15)
    empty = data.Split(np.zeros((1, parts), int), np.ones((1, parts), int), np.zeros(1, int))
    dataset = data.Dataset(np.zeros(9, np.uint8), {"train": empty}, 10, cfg.data.length, vocab)
    with torch.device("meta"):
        model = lra.model(cfg, dataset)
    last = model.head if parts == 1 else model.head[-1]
    assert len(model.backbone.mixers) == cfg.model.layers and last.out_features == 10


RUNS = {
    "listops": (),
    "image": ("data.dataset=local/digits",),
    "retrieval": ("data.dataset=local/pydoc_pairs",),
}


@pytest.mark.parametrize("task", RUNS)
def test_a_run_leaves_its_numbers(tmp_path, digits, task):
    cfg = resolve(tmp_path, "model=minlstm", f"task={task}", *RUNS[task])
    assert lra.run(cfg) == "done"
    name = config.run_id(asdict(cfg))
    record = records.read_record(records.record_path(tmp_path / "results", "lra", name))
    last = record["metrics"]["last"]
    assert set(last) == {"step", *(f"{split}_{key}" for split in ("val", "test") for key in ("loss", "accuracy"))}
    assert all(0 <= last[key] <= 1 for key in last if key.endswith("accuracy"))
    facts = record["facts"]
    assert facts["dataset_sha256"] == data.read(cfg).sha256
    sizes = {"train": 47, "val": 5, "test": 5} if task == "image" else {"train": 100, "val": 20, "test": 20}
    assert {key: facts["dataset"][key] for key in sizes} == sizes and 0 <= facts["dataset"]["majority"] < 1
    assert records.read_record(records.record_path(tmp_path / "results", "lra", name))["config"]["data"]["task"] == task
    assert lra.run(cfg) == "done"


def test_a_model_learns_to_reckon(tmp_path):
    """The value of one operator and two digits, where it has seen most of the 400 but not those that are asked for."""
    cfg = resolve(
        tmp_path, "model=minlstm", "data.length=5", "data.min_length=3", "data.depth=2", "data.arguments=2",
        "data.train_size=300", "data.eval_size=50", "model.dim=32", "model.layers=2", "train.steps=400",
        "train.batch_size=64", "train.learning_rate=1e-2", "eval.interval=400",
    )  # fmt: skip
    assert lra.run(cfg) == "done"
    record = records.read_record(records.record_path(tmp_path / "results", "lra", config.run_id(asdict(cfg))))
    assert record["metrics"]["last"]["test_accuracy"] > 0.45 > 2 * record["facts"]["dataset"]["majority"]
