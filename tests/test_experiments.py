"""The engine's promises: a run is what its settings say, survives what happens to it, and is done once."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from experiments import checkpoints, config, engine, files, launch, records, seeds, selective_copy
from minrnn.mixers import make
from minrnn.models import TokenModel, parameter_groups

ROOT = Path(__file__).parent.parent
MODELS = sorted(path.stem for path in (ROOT / "configs/selective_copy/model").glob("*.yaml"))
SMALL = ("profile=smoke", "model.layers=1", "logger=none", "progress=false", "threads=1", "device=cpu")


def command(tmp_path, *overrides):
    places = (f"results_dir={tmp_path}/results", f"output_dir={tmp_path}/outputs")
    return [sys.executable, "-m", "experiments.selective_copy", *SMALL, *places, *overrides]


def call(tmp_path, *overrides, code=0, **options):
    done = subprocess.run(command(tmp_path, *overrides), cwd=ROOT, capture_output=True, text=True, **options)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def resolve(tmp_path, *overrides):
    places = (f"results_dir={tmp_path}/results", f"output_dir={tmp_path}/outputs")
    return launch.resolve("selective_copy", [*SMALL, *places, *overrides])


def run(tmp_path, *overrides):
    """In this process; the outcome and the record."""
    cfg = resolve(tmp_path, *overrides)
    outcome = selective_copy.run(cfg)
    return outcome, record_of(tmp_path, cfg)


def record_of(tmp_path, cfg):
    return records.read_record(records.record_path(tmp_path / "results", "selective_copy", config.run_id(asdict(cfg))))


def numbers(record):
    """All that must not depend on how the run was interrupted."""
    curves = {name: [[step, value] for step, _, value in points] for name, points in record["curves"].items()}
    settings = {key: record["config"][key] for key in (*config.SECTIONS, "seed")}
    return {key: record[key] for key in ("run_id", "metrics", "steps", "parameters")} | settings | {"curves": curves}


# The run that is not interrupted, and how to have a long one checkpoint often.
LONG = ("train.steps=400", "eval.interval=100", "checkpoint_every=0")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    call(folder, *LONG)
    return record_of(folder, resolve(folder, *LONG))


def work_dir(tmp_path, record):
    return tmp_path / "outputs" / "selective_copy" / record["run_id"]


def test_a_killed_run_ends_with_the_numbers_of_one_that_was_not(tmp_path, whole):
    cfg = resolve(tmp_path, *LONG)
    folder = work_dir(tmp_path, whole)
    for _ in range(2):
        before = {path.name for path in folder.glob("*.pt")}
        process = subprocess.Popen(command(tmp_path, *LONG), cwd=ROOT, stdout=subprocess.DEVNULL)
        while not {path.name for path in folder.glob("*.pt")} - before:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.005)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert record_of(tmp_path, cfg) is None
    assert "done in" in call(tmp_path, *LONG)
    assert numbers(record_of(tmp_path, cfg)) == numbers(whole)


def test_a_truncated_checkpoint_is_passed_over(tmp_path, whole):
    cfg = resolve(tmp_path, *LONG, "budget=0")
    for _ in range(2):  # out of budget at once: a checkpoint each
        assert selective_copy.run(cfg) == "paused"
    older, newest = sorted(work_dir(tmp_path, whole).glob("*.pt"))
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=f"{newest}: the checkpoint is damaged .* using the one before it"):
        assert selective_copy.run(cfg) == "paused"
    # It is set aside: two whole ones are kept.
    assert [int(path.name[:9]) for path in sorted(work_dir(tmp_path, whole).glob("*.pt"))] == [1, 2]
    assert selective_copy.run(resolve(tmp_path, *LONG)) == "done"
    assert numbers(record_of(tmp_path, cfg)) == numbers(whole)


def state_at(step):
    return {"state": {"step": step}}


def test_a_checkpoint_of_another_run_of_other_data_or_of_a_later_step_is_refused(tmp_path):
    mine = {"run_id": "a", "dataset_sha256": "one"}
    checkpoints.save(tmp_path, 50, state_at(50), mine)
    assert checkpoints.load(tmp_path, "cpu", mine, 50)["state"] == {"step": 50}
    for other, steps, match in (
        ({"run_id": "b"}, 50, "of run_id 'b', got one of 'a'"),
        (mine | {"dataset_sha256": "two"}, 50, "of dataset_sha256 'two', got one of 'one'"),
        (mine, 49, "expected a step up to 49, got 50"),
    ):
        with pytest.raises(checkpoints.CheckpointError, match=f"{match}; remove {tmp_path} to have the run begin anew"):
            checkpoints.load(tmp_path, "cpu", other, steps)


def test_damaged_checkpoints_do_not_push_out_whole_ones(tmp_path):
    for step in (200, 300):
        path = checkpoints.save(tmp_path, step, state_at(step), {"run_id": "a"})
        path.write_bytes(path.read_bytes()[:-1])
    (tmp_path / ".writing-123").write_bytes(b"half")
    with pytest.warns(UserWarning, match="is damaged"):
        checkpoints.clean(tmp_path)
    assert checkpoints.load(tmp_path, "cpu", {"run_id": "a"}) is None
    checkpoints.save(tmp_path, 50, state_at(50), {"run_id": "a"})
    assert checkpoints.load(tmp_path, "cpu", {"run_id": "a"})["state"] == {"step": 50}
    assert not list(tmp_path.glob(".writing-*"))


def test_a_checkpoint_executes_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    path = checkpoints.save(tmp_path, 1, {"model": Evil()}, {"run_id": "a"})
    with pytest.raises(checkpoints.CheckpointError, match="expected tensors and plain values .*remove"):
        checkpoints.load(tmp_path, "cpu", {"run_id": "a"})
    assert path.exists() and not (tmp_path / "executed").exists()


def test_only_the_last_two_checkpoints_stay(tmp_path):
    for step in (5, 10, 15):
        checkpoints.save(tmp_path, step, state_at(step), {"run_id": "a"})
    assert [int(path.name[:9]) for path in sorted(tmp_path.iterdir())] == [10, 15]
    assert checkpoints.load(tmp_path, "cpu", {"run_id": "a"})["state"] == {"step": 15}


def test_a_run_that_is_told_to_stop_goes_on_later(tmp_path, whole):
    process = subprocess.Popen(command(tmp_path, *LONG), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while not list(work_dir(tmp_path, whole).glob("*.pt")):
        time.sleep(0.01)
    process.terminate()
    text, _ = process.communicate()
    assert process.returncode == launch.UNFINISHED
    assert "told to stop at step" in text and "the same command goes on" in text
    call(tmp_path, *LONG)
    assert numbers(record_of(tmp_path, resolve(tmp_path, *LONG))) == numbers(whole)


def test_a_sweep_that_is_told_to_stop_stops(tmp_path, whole):
    sweep = command(tmp_path, *LONG, "seed=0,1,2", "-m")
    process = subprocess.Popen(sweep, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while not list(work_dir(tmp_path, whole).glob("*.pt")):
        time.sleep(0.01)
    process.terminate()
    text, _ = process.communicate()
    assert process.returncode == launch.UNFINISHED and text.count("told to stop") == 1
    assert list((tmp_path / "outputs" / "selective_copy").iterdir()) == [work_dir(tmp_path, whole)]


def test_two_workers_do_every_run_once(tmp_path):
    overrides = ("-m", "seed=0,1,2", "model=mingru,minlstm", "train.steps=60")
    workers = [
        subprocess.Popen(command(tmp_path, *overrides), cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    texts = [worker.communicate()[0] for worker in workers]
    assert all(worker.returncode in (0, launch.UNFINISHED) for worker in workers)
    done = [line.split()[1] for text in texts for line in text.splitlines() if ": done in" in line]
    assert len(done) == len(set(done)) == 6
    written = records.read_records(tmp_path / "results", "selective_copy")
    assert {record["run_id"] for record in written} == {name.strip(":") for name in done}
    # A sweep given again has nothing left to do.
    assert call(tmp_path, *overrides).count("done already") == 6


def test_a_run_that_another_process_has_is_left_to_it(tmp_path):
    cfg = resolve(tmp_path)
    with files.claim(records.record_path(cfg.results_dir, "selective_copy", config.run_id(asdict(cfg))).parent) as mine:
        assert mine
        assert "another process is at it" in call(tmp_path, code=launch.UNFINISHED)
    assert run(tmp_path)[0] == "done"


def test_a_run_that_reaches_nan_is_recorded_as_diverged(tmp_path):
    outcome, record = run(tmp_path, "train.learning_rate=1e30", "train.grad_clip=null")
    assert outcome == record["status"] == "diverged"
    assert record["reason"].startswith(("train_loss was nan at step", "train_loss was inf at step"))
    assert record["metrics"] == {} and 0 < record["steps"] < 20
    assert run(tmp_path, "train.learning_rate=1e30", "train.grad_clip=null")[0] == "diverged"  # final: not tried again


def test_an_evaluation_that_is_not_finite_is_a_divergence(tmp_path, monkeypatch):
    monkeypatch.setattr(selective_copy, "evaluate", lambda *a: {"accuracy": 0.0, "loss": math.nan})
    outcome, record = run(tmp_path)
    assert outcome == "diverged" and record["reason"] == "val_loss was nan at step 10"


def test_an_interrupted_run_is_no_failure(tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(selective_copy, "evaluate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert record_of(tmp_path, resolve(tmp_path)) is None


def test_without_git_a_run_is_done_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    _, record = run(tmp_path)
    assert record["git"] == {"commit": None, "clean": False}


def test_a_run_that_fails_is_recorded_with_its_reason(tmp_path, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(selective_copy, "evaluate", broken)
    with pytest.raises(RuntimeError, match="no such luck"):
        run(tmp_path)
    record = record_of(tmp_path, resolve(tmp_path))
    assert record["status"] == "failed" and record["reason"] == "RuntimeError: no such luck"
    monkeypatch.undo()
    assert run(tmp_path)[0] == "done"  # tried again, and the record replaced


def test_a_record_holds_what_makes_its_numbers_checkable(tmp_path):
    _, record = run(tmp_path, "model.layers=2")
    assert record["schema_version"] == 2 and record["status"] == "done" and record["reason"] is None
    assert record["config"]["model"].items() >= {"name": "mingru", "dim": 64, "layers": 2, "expansion": 6}.items()
    assert set(record["metrics"]["last"]) == {"step", "val_accuracy", "val_loss", "test_accuracy", "test_loss"}
    assert record["metrics"]["last"]["step"] == record["steps"] == 20
    best = max(record["curves"]["val_accuracy"], key=lambda point: point[2])
    assert record["metrics"]["best"]["val_accuracy"] == best[2]
    assert record["metrics"]["best"]["step"] == best[0]
    assert record["tokens_per_second"] > 0 and record["peak_memory"] > 1e6 and record["seconds"] > 0
    assert record["hardware"]["device"] == "cpu" and record["versions"]["torch"] == torch.__version__
    assert record["parameters"] == 152_256 - 2 * 64  # FACTS 1.5, less a norm per layer that the authors never use


def test_last_and_best_are_those_of_different_weights(tmp_path, monkeypatch):
    """The best step's weights are the ones tested as best."""
    values = iter([0.9, 0.1])
    seen = {}

    def evaluate(cfg, device, model, split):
        weight = model.head.weight.sum().item()
        accuracy = next(values) if split == "val" else 0.5
        seen.setdefault(split, []).append(weight)
        return {"accuracy": accuracy, "loss": 0.0, "weight": weight}

    monkeypatch.setattr(selective_copy, "evaluate", evaluate)
    _, record = run(tmp_path)
    last, best = record["metrics"]["last"], record["metrics"]["best"]
    assert (best["step"], last["step"]) == (10, 20)
    assert best["test_weight"] == seen["val"][0] == best["val_weight"]
    assert last["test_weight"] == seen["val"][1] != best["test_weight"]


def test_patience_stops_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(selective_copy, "evaluate", lambda *a: {"accuracy": 0.5, "loss": 1.0})
    _, record = run(tmp_path, "train.patience=3", "train.steps=200")
    assert record["steps"] == 40 and record["metrics"]["best"]["step"] == 10


# Settings


def leaves(values, prefix=""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def other(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return {"constant": "cosine", "fp32": "bf16", "s6": "s4", "mamba": "h3", "all": "matrices"}.get(
            value, value + "x"
        )
    return 0.125 if value is None else value * 2 + 1 if value else 3


def test_every_setting_changes_the_id_and_no_place_does():
    for model in ("mingru", "minlstm", "gru", "mamba_s6"):
        base = launch.compose("selective_copy", [f"model={model}"])
        name = config.run_id(base)
        seen = {name}
        for key, value in leaves(base):
            changed = json.loads(json.dumps(base))
            *path, last = key.split(".")
            section = changed
            for part in path:
                section = section[part]
            if key in ("experiment", "model.name"):
                continue
            section[last] = other(value)
            if key == "seed" or path and path[0] in config.SECTIONS:
                assert config.run_id(changed) not in seen, key
                seen.add(config.run_id(changed))
            else:
                assert config.run_id(changed) == name, key
            assert (config.group_id(changed) == config.group_id(base)) == (
                key == "seed" or config.run_id(changed) == name
            )


def test_ids_stay_what_they_were():
    """Records are found by their ids: whoever changes a default or the hash loses them."""
    assert config.run_id(launch.compose("selective_copy", ["profile=paper"])) == "6e720dfafade"
    for record in records.read_records(ROOT / "results", "selective_copy"):
        assert config.run_id(record["config"]) == record["run_id"]


def test_equal_settings_have_one_id():
    assert config.run_id(launch.compose("selective_copy", ["model.expansion=6"])) == config.run_id(
        launch.compose("selective_copy", ["model.expansion=6.0"])
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    (
        (["model.layrs=1"], "model.layrs: no such setting; the nearest is model.layers"),
        (["trian.learning_rate=1"], "trian.learning_rate: no such setting; the nearest is train.learning_rate"),
        (["+train.extra=1"], "train.extra: no such setting"),
        (["train.steps=0"], "train.steps: expected more than 0, got 0"),
        (["train.precision=fp8"], "train.precision: expected one of .*fp32.*, got 'fp8'"),
        (["data.tokens=5000"], "data.tokens: expected 1 to data.length=64, got 5000"),
        (["eval.lengths=[64,8]"], r"eval.lengths: expected data.tokens=16 or more each, got \[64, 8\]"),
        (["micro_batches=3"], "micro_batches: expected a divisor of train.batch_size=64, got 3"),
        (["model=mamba_s6", "model.inner=s5"], "model.inner: expected one of .*'s6'.*, got 's5'"),
        (["model=mamba_s6", "model.expansion=2"], "model.expansion: no such setting"),
        (["model.gate_layers=3"], "model.gate_layers: expected one of .1, 2., got 3"),
        (["model.attention_at=3"], "model.attention_at: expected 0 to 2, got 3"),
        (["model.attention_at=-1"], "model.attention_at: expected 0 to 2, got -1"),
        (["model.attention_heads=2"], "model.attention_heads: expected null without attention_at, got 2"),
        (["model.attention_at=0", "model.attention_heads=0"], "model.attention_heads: expected more than 0, got 0"),
        (["model.name=gru2"], "model.name: chosen by model="),
        (["model.name=gru"], "model.name: chosen by model="),
        (["seed=-1"], "seed: expected 0 to 2047, got -1"),
        (["train.steps=600000"], "train.steps: expected at most 524288, got 600000"),
        (["seed=1,2"], "seed=1,2: several values are a sweep, which needs -m"),
        (["~train.grad_clip"], "~train.grad_clip: a setting cannot be taken away"),
    ),
)
def test_wrong_settings_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        launch.check("selective_copy", overrides)


def test_hydras_own_options_stand_anywhere(tmp_path):
    for order in (["seed=1", "--cfg", "job"], ["--cfg", "job", "seed=1"], ["--cfg", "job"]):
        done = subprocess.run(
            [sys.executable, "-m", "experiments.selective_copy", *order], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0 and "experiment: selective_copy" in done.stdout, done.stderr
    text = call(tmp_path, "seed", code=launch.WRONG)
    assert "seed" in text and "Traceback" not in text


def test_a_launchers_process_says_that_a_run_is_not_done(tmp_path):
    call(tmp_path, "-m", "launcher=joblib", "seed=0,1", "budget=0", "train.steps=400", code=1, timeout=300)


def test_a_wrong_command_ends_with_one_line(tmp_path):
    for wrong, near in {
        "model=mingruu": "mingru", "profile=papers": "paper", "optimizer=public": "public_code",
        "train.lr=1e-3": "train.learning_rate", "eval.every=3": "eval.interval", "train.schedule=cos": "cosine",
    }.items():  # fmt: skip
        (line,) = call(tmp_path, wrong, code=launch.WRONG).strip().splitlines()
        assert line.startswith("error: ") and line.endswith(f"the nearest is {near}"), line
    text = call(tmp_path, "train.steps=many", code=launch.WRONG)
    assert "'many'" in text and "train.steps" in text and "Traceback" not in text


@pytest.mark.parametrize("profile", config.PROFILES)
@pytest.mark.parametrize("model", MODELS)
def test_every_configuration_makes_a_model(model, profile):
    cfg = launch.resolve("selective_copy", [f"model={model}", f"profile={profile}"])
    assert cfg.profile == profile
    task = selective_copy.task(cfg, torch.device("cpu"))
    logits, _ = task.model(torch.zeros(2, 5, dtype=torch.long), last=3)
    assert logits.shape == (2, 3, cfg.data.vocab) and logits.isfinite().all()


@pytest.mark.parametrize("launcher", ("joblib", "submitit_local"))
def test_launchers(tmp_path, launcher):
    call(tmp_path, "-m", f"launcher={launcher}", "seed=0,1", timeout=300)
    done = records.read_records(tmp_path / "results", "selective_copy")
    assert sorted(record["seed"] for record in done) == [0, 1]
    assert {record["status"] for record in done} == {"done"}


# The task


def test_the_task_is_the_one_in_the_docstring():
    data = config.SelectiveCopyData(length=50, tokens=7, vocab=16)
    inputs, targets = selective_copy.sequences(data, 200, 3, torch.device("cpu"))
    assert inputs.shape == (200, 57) and targets.shape == (200, 7)
    for row, symbols in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert [x for x in row[:50] if x != 15] == symbols
        assert row[50:] == [0] * 7
    assert targets.min() == 1 and targets.max() == 14
    places = (inputs[:, :50] != 15).float().mean(0)
    assert (places - 7 / 50).abs().max() < 0.1  # every place is as likely


def test_splits_and_steps_draw_from_disjoint_seeds():
    assert seeds.train_seed(0, 5) != seeds.train_seed(1, 5) != seeds.train_seed(1, 6)
    first, last = seeds.train_seed(0, 0), seeds.train_seed(seeds.RUNS - 1, seeds.STEPS - 1)
    assert first == 0 and last < seeds.QUARTER
    assert seeds.QUARTER <= seeds.noise_seed(seeds.RUNS - 1, seeds.STEPS - 1, 7) < 2 * seeds.QUARTER
    assert seeds.eval_seed("val", 10**6) < seeds.eval_seed("test", 0) < 2**32 - 10**6
    with pytest.raises(ValueError, match="seed: expected 0 to 2047, got 2048"):
        seeds.train_seed(2048, 0)
    with pytest.raises(ValueError, match="train.steps: expected at most"):
        seeds.train_seed(0, 1 << 19)


def test_accuracy_and_loss_are_those_of_a_model_that_knows():
    cfg = launch.resolve("selective_copy", ["profile=smoke"])

    class Knows(torch.nn.Module):
        def forward(self, inputs, last):
            symbols = inputs[:, :-last][inputs[:, :-last] != 15].view(len(inputs), last)
            return torch.nn.functional.one_hot(symbols, 16).float() * 30, None

    values = selective_copy.evaluate(cfg, torch.device("cpu"), Knows(), "test")
    assert values["accuracy"] == 1 and values["loss"] < 1e-6
    longer = selective_copy.evaluate(cfg, torch.device("cpu"), Knows(), "test", 50)
    assert longer["accuracy"] == 1 and longer["loss"] < 1e-6


def test_the_last_weights_are_tested_at_further_lengths(tmp_path):
    _, record = run(tmp_path, "eval.lengths=[16,40]")
    last, best = record["metrics"]["last"], record["metrics"]["best"]
    assert last["test_accuracy_at_16"] == last["test_accuracy"]
    assert 0 <= last["test_accuracy_at_40"] <= 1 and "test_accuracy_at_40" not in best


# Training


def test_parameters_are_the_authors():
    """FACTS 1.5, less the norm per layer that the authors create and never use."""
    for name, counts in {"mingru": (77_184, 152_256, 227_328), "minlstm": (102_144, 202_176, 302_208)}.items():
        for layers, count in enumerate(counts, 1):
            model = TokenModel(16, 16, 64, layers, make(name))
            assert sum(p.numel() for p in model.parameters()) == count - 64 * layers


def test_weights_of_gates_and_candidates_do_not_decay():
    model = TokenModel(16, 16, 64, 2, make("minlstm"))
    groups = {group["weight_decay"]: group["params"] for group in parameter_groups(model, 1e-3, 0.05)}
    kept = {id(p) for p in groups[0.0]}
    names = {name for name, p in model.named_parameters() if id(p) in kept}
    assert names == {f"backbone.mixers.{i}.rnn.{kind}_ih_l0" for i in (0, 1) for kind in ("weight", "bias")}
    assert len(groups[0.0]) + len(groups[0.05]) == len(list(model.parameters()))


def test_forget_bias_is_three_in_the_authors_form():
    cfg = launch.resolve("selective_copy", ["model=minlstm_unnormalized"])
    model = selective_copy.task(cfg, torch.device("cpu")).model
    forget, rest = model.backbone.mixers[0].rnn.bias_ih_l0.split([384, 768])
    assert 2.8 < forget.min() and forget.max() < 3.2 and rest.abs().max() < 0.2
    assert not model.backbone.mixers[0].rnn.normalize_gates


def test_learning_rate_follows_its_schedule():
    train = config.Train(steps=110, learning_rate=2.0, schedule="cosine", warmup_steps=10, min_lr=0.2)
    rates = [train.learning_rate * engine.lr_factor(train, step) for step in range(111)]
    assert rates[:10] == pytest.approx([2 * (i + 1) / 11 for i in range(10)])
    assert rates[10] == 2 and rates[60] == pytest.approx(1.1) and rates[110] == pytest.approx(0.2)
    assert engine.lr_factor(config.Train(warmup_steps=0), 12345) == 1


def test_micro_batches_and_processes_make_the_same_step(tmp_path):
    """Up to rounding: the same run in one piece, in two, and on two processes by torchrun."""
    steps = ("train.steps=6", "eval.interval=3", "train.batch_size=8")
    (tmp_path / "one").mkdir()
    _, one = run(tmp_path / "one", *steps)
    _, parts = run(tmp_path / "parts", *steps, "micro_batches=2")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    processes = command(tmp_path / "two", *steps, "micro_batches=2")[1:]
    done = subprocess.run(torchrun + processes, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    two = record_of(tmp_path / "two", resolve(tmp_path, *steps))
    assert two["hardware"]["processes"] == 2 and one["run_id"] == parts["run_id"] == two["run_id"]
    for other_run in (parts, two):
        for name, points in one["curves"].items():
            assert [p[2] for p in other_run["curves"][name]] == pytest.approx([p[2] for p in points], rel=1e-4), name


@pytest.mark.parametrize("precision", ("bf16", "fp16"))
def test_training_in_sixteen_bits_follows_float32(tmp_path, precision):
    steps = ("train.steps=60", "train.batch_size=32")
    _, wide = run(tmp_path, *steps)
    outcome, narrow = run(tmp_path, *steps, f"train.precision={precision}")
    assert outcome == "done" and narrow["run_id"] != wide["run_id"]
    a, b = (record["metrics"]["last"]["val_loss"] for record in (wide, narrow))
    assert a != b and abs(a - b) < 0.03


def test_training_learns(tmp_path):
    """One symbol among four in a short body is learned in seconds; chance is 1/2."""
    task = ("data.length=4", "data.tokens=1", "data.vocab=4")
    _, record = run(tmp_path, *task, "train.steps=150", "train.batch_size=32", "eval.interval=50")
    assert record["metrics"]["last"]["test_accuracy"] > 0.95
    losses = [value for _, _, value in record["curves"]["train_loss"]]
    assert losses[-1] < 0.2 < 0.6 < losses[0]


def test_wandb_offline_holds_curves_and_summary(tmp_path):
    wandb = pytest.importorskip("wandb")
    text = call(tmp_path, "logger=wandb", env=os.environ | {"WANDB_SILENT": "true"}, timeout=300)
    assert "done in" in text
    (folder,) = (tmp_path / "outputs" / "wandb").glob("offline-run-*")
    (stored,) = folder.glob("*.wandb")
    content = stored.read_bytes()
    for key in (b"val_accuracy", b"train_loss", b"best/test_accuracy"):
        assert key in content, (key, wandb.__version__)


# Records


def test_curves_are_thinned_evenly_and_keep_their_end():
    points = [[step, 0.0, math.sqrt(step)] for step in range(1, 12_346)]
    thin = records.thin(points)
    assert len(thin) == records.CURVE_POINTS and thin[-1] == points[-1]
    gaps = [b[0] - a[0] for a, b in zip(thin, thin[1:], strict=False)]
    assert max(gaps) - min(gaps) <= 1
    assert records.thin(points[:7]) == points[:7]


def test_a_record_that_cannot_be_read_is_named(tmp_path):
    path = records.record_path(tmp_path, "selective_copy", "0" * 12)
    assert records.read_record(path) is None
    path.parent.mkdir(parents=True)
    path.write_text('{"schema_version": 1, "stat')
    with pytest.raises(ValueError, match=f"{path}: not a record .* remove it"):
        records.read_record(path)
    path.write_text('{"schema_version": 99}')
    with pytest.raises(ValueError, match="expected schema_version 2, got 99"):
        records.read_record(path)
