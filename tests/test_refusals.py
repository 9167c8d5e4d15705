"""What is wrong is said in one line that names it, and nothing is left behind where nothing was run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from experiments import charlm, checkpoints, config, files, grid, launch, records
from experiments.decision import data as decision_data
from scripts.draw import cells
from tests.test_decision_data import NAME, save, steps
from tests.test_scripts import make_record, put

ROOT = Path(__file__).parent.parent
WRONG = {
    "train.grad_clip=-1": "train.grad_clip: expected more than 0, got -1.0",
    "train.grad_clip=0": "train.grad_clip: expected more than 0",
    "train.min_lr=-1": "train.min_lr: expected 0 or more",
    "train.min_lr=inf": "train.min_lr: expected 0 or more, got inf",
    "train.min_lr=1": "train.min_lr: expected at most learning_rate=0.001, got 1.0",
    "train.weight_decay=-1": "train.weight_decay: expected 0 or more",
    "train.warmup_steps=-5": "train.warmup_steps: expected 0 or more",
    "train.patience=0": "train.patience: expected more than 0",
    "train.beta2=1": "train.beta2: expected less than 1",
    "train.learning_rate=nan": "train.learning_rate: expected more than 0, got nan",
    "train.learning_rate=inf": "train.learning_rate: expected more than 0, got inf",
    "train.precision=fp8": "train.precision: expected one of",
    "model.dropout=2": "model.dropout: expected 0 to 1",
    "model.mlp=-1": "model.mlp: expected 0 or more",
    "model.mlp=nan": "model.mlp: expected 0 or more, got nan",
    "model.expansion=0": "model.expansion: expected more than 0",
    "model.norm=layr": "model.norm: expected one of ('rms', 'layer'), got 'layr'; the nearest is layer",
    "results_dir=": "results_dir: expected a folder, got nothing",
    "output_dir=": "output_dir: expected a folder, got nothing",
    "threads=0": "threads: expected 1 to 1024, got 0",
    "threads=100000": "threads: expected 1 to 1024, got 100000",
    "device=mps": "device: expected auto, cpu, cuda",
    "budget=nan": "budget: expected seconds from 0 up, got nan",
    "checkpoint_every=-1": "checkpoint_every: expected 0 or more",
    "wandb.mode=foo": "wandb.mode: expected one of",
    "micro_batches=0": "micro_batches: expected a divisor",
    "seed=-1": "seed: expected 0 to",
}


def resolved(setting):
    from experiments.launch import check

    check("selective_copy", ["profile=smoke", "model=mingru", setting])


@pytest.mark.parametrize("setting", WRONG)
def test_a_setting_out_of_range_is_named(setting):
    with pytest.raises(Exception) as caught:
        resolved(setting)
    text = f"{caught.value}: {caught.value.__cause__}"
    assert WRONG[setting] in text, text


def call(folder, experiment, *settings):
    """Exit code, lines and what is left of an experiment's command."""
    places = [f"results_dir={folder / 'results'}", f"output_dir={folder / 'outputs'}", "logger=none", "progress=false"]
    command = [sys.executable, "-m", f"experiments.{experiment}", "profile=smoke", *places, *settings]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    left = [path for name in ("results", "outputs") for path in (folder / name).rglob("*") if path.is_file()]
    return done.returncode, (done.stdout + done.stderr).strip().splitlines(), left


def test_a_refused_run_leaves_one_line_and_nothing_else(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "text").write_text("to be or not to be " * 100)
    for settings, line in (
        ((f"data.path={tmp_path / 'pipe'}",), f"error: {tmp_path / 'pipe'}: expected a file, got a pipe"),
        (("data.path=/dev/zero",), "error: /dev/zero: expected a file, got a device"),
        ((f"data.path={tmp_path / 'text'}", "model=transformer", "model.heads=7"), "error: heads: expected a divisor"),
    ):
        code, lines, left = call(tmp_path, "charlm", *settings)
        assert code not in (0, None) and len(lines) == 1 and lines[0].startswith(line), lines
        assert left == [], left


RUN = grid.runs("smoke", 1, [cell for cell in grid.CELLS if cell.row == "GRU" and cell.experiment == "selective_copy"])[
    0
]
DAMAGES = {
    "NaN": (lambda r: r["metrics"]["last"].update(val_loss=float("nan")), "expected finite numbers, got NaN"),
    "status": (lambda r: r.update(status="foo"), "expected a status of .*, got 'foo'"),
    "another run": (lambda r: r.update(run_id="0123456789ab"), "lies in the folder of"),
    "other settings": (lambda r: r["config"]["train"].update(steps=7), "its settings are those of run"),
    "another seed": (lambda r: r.update(seed=5), "its settings are those of run"),
    "no settings": (lambda r: r.pop("config"), "expected config as dict, got None"),
    "empty settings": (lambda r: r.update(config={"seed": 0}), "expected the settings of a run, got what lacks"),
    "no end": (lambda r: r.update(ended="soon"), "expected ended as a number, got 'soon'"),
    "words for numbers": (lambda r: r["metrics"]["best"].update(val_loss="low"), "expected metrics.best as numbers"),
    "no metrics": (lambda r: r.update(metrics={}), "expected metrics.last as numbers"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_record_that_is_not_what_it_says_is_refused(tmp_path, damage):
    change, match = DAMAGES[damage]
    record = json.loads(json.dumps(make_record(RUN, 0.5)))
    change(record)
    path = records.record_path(tmp_path, "selective_copy", RUN.run_id)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(record))
    with pytest.raises(records.RecordError, match=f"{path}: .*{match}"):
        cells.load(tmp_path)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[]", b"null", b"{", b'{"a": 1}', b"[" * 100_000, b""])
def test_what_is_no_record_is_refused(tmp_path, content):
    path = records.record_path(tmp_path, "selective_copy", RUN.run_id)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(records.RecordError, match=str(path)):
        records.read_record(path)


def test_a_record_that_is_no_file_is_refused(tmp_path):
    path = records.record_path(tmp_path, "selective_copy", RUN.run_id)
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    with pytest.raises(records.RecordError, match="expected a file, got a pipe"):
        records.read_record(path)


def test_a_record_in_its_place_is_read(tmp_path):
    put(tmp_path, make_record(RUN, 0.5))
    assert [*cells.load(tmp_path)] == [RUN.run_id] == [config.run_id(RUN.config)]


def test_a_claim_changes_nothing_through_a_link_and_leaves_no_empty_folder(tmp_path):
    target = tmp_path / "target"
    target.write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").symlink_to(target)
    with pytest.raises(OSError), files.claim(tmp_path / "run"):
        pass
    assert target.read_text() == "kept"
    with files.claim(tmp_path / "other") as mine, files.claim(tmp_path / "other") as again:
        assert mine and not again
    assert not (tmp_path / "other").exists()
    with files.claim(tmp_path / "third") as mine:
        (tmp_path / "third/record.json").touch()
    assert sorted(path.name for path in (tmp_path / "third").iterdir()) == [".lock", "record.json"]


def test_a_run_that_is_done_needs_to_write_nothing(tmp_path):
    settings = ("model.layers=1", "train.steps=2", "eval.interval=1")
    code, lines, _ = call(tmp_path, "selective_copy", *settings)
    assert code == 0 and "done in" in lines[-1]
    (path,) = (tmp_path / "results").rglob("record.json")
    (path.parent / ".lock").unlink()
    (path.parent / ".lock").mkdir()  # which cannot be claimed
    code, lines, _ = call(tmp_path, "selective_copy", *settings)
    assert code == 0 and "done already" in lines[-1]


def test_a_full_disk_ends_no_run(tmp_path, monkeypatch):
    from experiments import checkpoints, selective_copy
    from experiments.launch import resolve

    def full(*_):
        raise OSError(28, "No space left on device")

    places = [f"results_dir={tmp_path / 'results'}", f"output_dir={tmp_path / 'outputs'}", "logger=none"]
    settings = ["profile=smoke", "model.layers=1", "train.steps=4", "checkpoint_every=0", "progress=false", *places]
    monkeypatch.setattr(checkpoints, "save", full)
    with pytest.warns(UserWarning, match="no checkpoint at step .* No space left on device.*; the run goes on"):
        assert selective_copy.run(resolve("selective_copy", settings)) == "done"
    with pytest.raises(OSError, match="No space left"):  # to stop it needs one
        selective_copy.run(resolve("selective_copy", [*settings, "seed=1", "budget=0"]))
    done = [r["seed"] for r in records.read_records(tmp_path / "results", "selective_copy") if r["status"] == "done"]
    assert done == [0]


def test_what_could_not_be_written_leaves_no_temporary_file(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        records.write_json(tmp_path / "record.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


PATHS = ("a b", "é(1)", "a=b,c", "it's", "x&y[1]{2}", "back\\slash", "end\\", "a\\'b", "d${x}", "#h;|", "~x", "null")


@pytest.mark.parametrize("path", PATHS)
def test_a_path_is_what_the_shell_gave(path):
    setting = f"data.path={launch.quoted(path)}"
    assert launch.compose("charlm", [setting])["data"]["path"] == path
    assert launch.resolve("charlm", [setting]).data.path == path
    bare = f"data.path={path}"
    assert launch._quote_paths(bare) == (bare if path == "null" else setting)  # which is Hydra's None


def test_a_run_in_a_folder_with_a_name_of_ordinary_people(tmp_path):
    folder = tmp_path / "thesis (1), it's é=[new] & old"
    folder.mkdir()
    for name in ("minrnn", "experiments", "configs"):
        (folder / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "experiments.selective_copy", "profile=smoke", "train.steps=2", "model.layers=1"]
    command += ["logger=none", "progress=false", f"results_dir={folder / 'results'}", "output_dir=outputs, mine"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert list((folder / "results").rglob("record.json")) and (folder / "outputs, mine").is_dir()


GOOD = "charlm,minGRU,loss,val_loss_nats,1.5,,yes,somewhere\n"
HEAD = "table,row,column,metric,value,std,confirmed,source\n"


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "it has none"),
        (HEAD, "it has none"),
        (HEAD + GOOD.replace("1.5", "nan"), "line 2: expected value and std as finite numbers"),
        (HEAD + GOOD.replace("1.5", ""), "line 2: expected value and std as finite numbers"),
        (HEAD + GOOD + GOOD, "line 3: expected .* once"),
        (HEAD + GOOD.replace("yes", "perhaps"), "line 2: expected confirmed as yes or no"),
        (HEAD + GOOD.replace("somewhere", ""), "line 2: expected a source"),
        (HEAD + "charlm,minGRU\n", "line 2: expected columns"),
        (HEAD.replace("value", "number") + GOOD, "line 2: expected columns"),
        ("\0" * 100, "paper.csv"),
    ],
)
def test_a_damaged_table_of_published_values_is_refused(tmp_path, content, match):
    path = tmp_path / "paper.csv"
    path.write_text(content)
    with pytest.raises(records.RecordError, match=match):
        cells.read_paper(path)
    path.write_text(HEAD + GOOD)
    assert len(cells.read_paper(path)) == 1


SETTINGS = {
    "charlm": "model=mingru", "selective_copy": "model=s4", "decision": "model=transformer", "lra": "model=mamba",
    "efficiency": None,
}  # fmt: skip
NONSENSE = ("-1", "0", "nan", "inf", "-inf", "many", "[1]", "1.5", "true", "{a: 1}", "1e400", "9" * 20, "''", "a b",
            "null", "-5", "é", "${nowhere}", "a=b", "(", "'")  # fmt: skip


def test_a_setting_drawn_at_random_is_taken_or_named_in_one_line():
    random, outcomes = Random(0), []
    for _ in range(100):
        experiment = random.choice([*SETTINGS])
        given = ["profile=smoke", *filter(None, [SETTINGS[experiment]])]
        key = random.choice(launch._keys(launch.compose(experiment, given)))
        setting = f"{key}={random.choice(NONSENSE)}"
        try:
            launch.check(experiment, [*given, setting])
            outcomes.append(None)
        except (ValueError, HydraException, OmegaConfBaseException) as error:
            text = launch.in_one_line(error)
            assert key.split(".")[-1] in text and "\n" not in text, (experiment, setting, text)
            outcomes.append(text)
    assert 50 < sum(outcome is not None for outcome in outcomes) < 100


def test_a_second_interrupt_ends_in_one_line(tmp_path):
    program = """
from experiments import launch, selective_copy
def interrupt(*arguments):
    raise KeyboardInterrupt
selective_copy.evaluate = interrupt
launch.main("selective_copy")
"""
    places = [f"results_dir={tmp_path / 'results'}", f"output_dir={tmp_path / 'outputs'}", "logger=none"]
    command = [sys.executable, "-c", program, "profile=smoke", *places, "progress=false"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "interrupted; the same command goes on from the last checkpoint\n"
    assert not [*(tmp_path / "results").rglob("*.json")]


# -- damages drawn at random


def _a_record(folder):
    run = next(run for run in grid.runs("cpu", 1) if run.experiment == "charlm")
    put(folder, make_record(run, 0.9))
    path = records.record_path(folder, run.experiment, run.run_id)
    return path, lambda: cells.load(folder)


def _a_checkpoint(folder):
    """Renamed to what its damaged content sums up to, so that it is opened."""
    state = {"state": {"step": 3}, "model": {"weight": torch.randn(5, 4)}}
    path = checkpoints.save(folder / "run", 3, state, {"run_id": "a"})

    def open_it():
        for found in (folder / "run").iterdir():
            if found.is_file():
                found.rename(found.with_name(f"000000003-{checkpoints._checksum(found)}.pt"))
        checkpoints.clean(folder / "run")
        checkpoints.load(folder / "run", "cpu", {"run_id": "a"}, 10)

    return path, open_it


def _published_values(folder):
    path = folder / "paper.csv"
    path.write_bytes(cells.PAPER.read_bytes())
    return path, lambda: cells.read_paper(path)


def _a_text(folder):
    path = folder / "text.txt"
    path.write_text("to be or not to bé " * 500)
    cfg = launch.resolve("charlm", ["profile=smoke", f"data.path='{path}'"])
    return path, lambda: charlm.read(cfg, "cpu")


def _a_dataset(folder):
    path = save(folder / "a.hdf5", steps((3, 1, 9, 7), tail=2), {"algorithm": "none"})
    return path, lambda: decision_data.read(path, NAME)


def _flipped(content, random):
    content = bytearray(content)
    for _ in range(random.choice((1, 8, 64))):
        content[random.randrange(len(content))] = random.randrange(256)
    return bytes(content)


CONTENTS = {
    "cut off": lambda content, random: content[: random.randrange(len(content))],
    "bytes changed": _flipped,
    "a hole of zeros": lambda content, random: content[:100] + bytes(random.randrange(1, 4000)) + content[100:],
    "a stretch lost": lambda content, random: content[:50] + content[random.randrange(50, len(content)) :],
    "twice": lambda content, random: content * 2,
    "noise": lambda content, random: random.randbytes(1000),
}
PLACES = {
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to nothing": lambda path: path.symlink_to(path.with_name("gone")),
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_a_damage_drawn_at_random_is_survived_or_named_in_one_line(tmp_path):
    random, outcomes = Random(1), []
    makers = (_a_record, _a_checkpoint, _published_values, _a_text, _a_dataset)
    for i in range(150):
        folder = tmp_path / str(i)
        folder.mkdir()
        path, open_it = makers[i % len(makers)](folder)
        damage = random.choice([*CONTENTS, *PLACES])
        if damage in CONTENTS:
            path.write_bytes(CONTENTS[damage](path.read_bytes(), random))
        else:
            path.unlink()
            PLACES[damage](path)
        try:
            open_it()
            outcomes.append(None)
        except (files.Refusal, OSError) as error:
            text = str(error)
            assert "\n" not in text and (str(folder) in text or "data." in text), (damage, path, text)
            outcomes.append(text)
        except Exception as error:
            raise AssertionError(f"{path.name}, {damage}: {type(error).__name__}: {error}") from error
    assert 75 < sum(outcome is not None for outcome in outcomes) < 150
