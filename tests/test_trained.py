"""Weights that come with the repository: what was exported is what is loaded, and nothing else is."""

import hashlib
import json
import pickle
import re

import pytest
import safetensors.torch
import torch

from experiments import charlm, launch, trained
from experiments.charlm import evaluate, sample
from experiments.config import run_id
from scripts import weights


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders of a run that learned digits in turn, and of its exported weights; the run's id."""
    folder = tmp_path_factory.mktemp("weights")
    (folder / "text.txt").write_text("0123456789" * 300)
    places = [f"results_dir={folder}/results", f"output_dir={folder}/outputs"]
    settings = ["profile=smoke", "model=mingru", f"data.path={folder / 'text.txt'}", "train.steps=150"]
    settings = [*settings, "eval.interval=50", "logger=none", "progress=false", "threads=1", "device=cpu", *places]
    cfg = launch.resolve("charlm", settings)
    assert charlm.run(cfg) == "done"
    run = run_id(charlm.dataclasses.asdict(charlm.identify(cfg)))
    weights.main(["charlm", f"run={run}", *places])
    return places, run


@pytest.fixture
def copy(places, tmp_path):
    """A copy of the exported folder, and the arguments with which it is found."""
    folder = trained.Path(places[0][0].partition("=")[2]) / "weights/charlm-mingru"
    (tmp_path / "weights").mkdir()
    new = tmp_path / "weights" / folder.name
    new.mkdir()
    for file in folder.iterdir():
        (new / file.name).write_bytes(file.read_bytes())
    return new, [f"results_dir={tmp_path}", "prompt=3", "tokens=20", "temperature=0"]


def test_what_comes_with_the_repository_writes_what_the_run_writes(places, capsys):
    where, run = places
    for which in ([], [f"run={run}"]):
        sample.main([*where, *which, "prompt=34567", "tokens=30", "temperature=0"])
        assert capsys.readouterr().out == "34567" + "8901234567" * 3 + "\n"


def test_the_stated_loss_is_found_again(places, capsys):
    where, run = places
    card = (trained.Path(where[0].partition("=")[2]) / "weights/charlm-mingru/README.md").read_text()
    stated = re.search(r"Loss (\d\.\d{4}) nats", card)[1]
    with pytest.raises(ValueError, match="path: expected the text of sha256 [0-9a-f]{64}, got none"):
        evaluate.main([*where])
    evaluate.main([*where, f"path={trained.Path(where[0].partition('=')[2]).parent / 'text.txt'}"])
    first = capsys.readouterr().out
    assert first.startswith(f"{stated} nats per character") and f"{stated} is stated of" in first
    evaluate.main([*where, f"run={run}"])
    found = re.findall(r"\d\.\d{4}", capsys.readouterr().out)
    assert found[0] == found[2]


def reseal(folder, content):
    """As one who changes the file and its checksum."""
    (folder / "model.safetensors").write_bytes(content)
    config = json.loads((folder / "config.json").read_text())
    config["sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))


class Executed:
    def __reduce__(self):
        return (pytest.fail, ("code of the file was executed",))


def flipped(folder):
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def changed(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def other_seed(folder):
    config = json.loads((folder / "config.json").read_text())
    changed(folder, config=config["config"] | {"seed": 7})


@pytest.mark.parametrize(
    ("damage", "words"),
    (
        (flipped, "model.safetensors: expected sha256 [0-9a-f]{64}, got [0-9a-f]{64}; get it anew"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors: expected sha256"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: missing"),
        (lambda f: reseal(f, pickle.dumps(Executed())), "model.safetensors: not a safetensors file"),
        (lambda f: reseal(f, b"version https://git-lfs.github.com/spec/v1\n"), "model.safetensors: not a safetensors"),
        (lambda f: reseal(f, safetensors.torch.save({"a": torch.ones(2)})), "safetensors: not the weights of this mo"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: not a record"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json: expected a record, got a list"),
        (lambda f: changed(f, config={"experiment": "charlm"}), "config.json: expected a run's settings"),
        (lambda f: changed(f, metrics=None), "config.json: expected a run's settings"),
        (other_seed, "config.json: expected the settings of charlm"),
        (lambda f: f.rename(f.with_name("charlm-other")), "model: no weights of 'mingru' .*expected one of other"),
    ),
)  # fmt: skip
def test_what_is_damaged_or_foreign_is_refused_by_name(copy, damage, words):
    folder, options = copy
    damage(folder)
    with pytest.raises(ValueError, match=words):
        sample.main(options)


@pytest.mark.parametrize(
    ("given", "words"),
    (
        (["copying", "run=x"], "expected one of charlm, decision first, got 'copying'"),
        (["charlm"], "run: expected a run's id"),
        (["charlm", "runs=x"], "runs=x: no such setting; the nearest is run="),
    ),
)
def test_what_cannot_be_exported_is_said(given, words):
    with pytest.raises(ValueError, match=words):
        weights.main(given)
