"""The efficiency experiment: what is timed is right, what cannot be done is noted, and words follow from numbers."""

import copy
import csv
import dataclasses
import json
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from experiments import cost, efficiency, launch, machine, records
from experiments.efficiency import layers, memory, sweep, timer
from experiments.grid import efficiency as wanted
from scripts.draw import cells, figures, report
from scripts.draw import efficiency as shown
from scripts.draw.efficiency import figures as efficiency_figures
from scripts.draw.efficiency import tables as page
from scripts.planner import processes

CPU = torch.device("cpu")
ANYTHING = cost.Machine("some", 1e9, 1e9, 1e-6)


def resolve(tmp_path, *overrides):
    places = (f"results_dir={tmp_path}/results", f"output_dir={tmp_path}/outputs")
    return launch.resolve("efficiency", ["profile=smoke", "progress=false", "device=cpu", *places, *overrides])


def record_of(results):
    (path,) = (results / "runs/efficiency").glob("*/record.json")
    return json.loads(path.read_text())


# -- the layers


@pytest.mark.parametrize("name", layers.available("cpu"))
def test_each_layer_is_what_it_is_held_to(name):
    torch.manual_seed(0)
    layer = layers.LAYERS[name]
    net, x = layer.build(32), torch.randn(2, 48, 32)
    assert layers.check(name, layer, net, x) < layer.tolerance[0]
    other = layer.build(32)  # other weights than those it is held to
    with pytest.raises(ArithmeticError, match="of the result in float64"):
        layers.check(name, dataclasses.replace(layer, exact=lambda _: layer.exact(other)), net, x)


@pytest.mark.parametrize("name", [name for name, layer in layers.LAYERS.items() if layer.step and name != "mamba-ssm"])
def test_a_step_goes_on_where_reading_ended(name):
    torch.manual_seed(0)
    layer = layers.LAYERS[name]
    net, x = layer.build(32), torch.randn(3, 9, 32)
    with torch.inference_mode():
        _, state = layer.read(net, x[:, :-1])
        assert torch.allclose(layer.step(net, x[:, -1], state)[0], layer.read(net, x)[0][:, -1], atol=1e-5)


@pytest.mark.parametrize("loop, cls", [(layers.LoopGRU, torch.nn.GRU), (layers.LoopLSTM, torch.nn.LSTM)])
def test_the_loops_are_torchs_layers(loop, cls):
    torch.manual_seed(0)
    ours, theirs = (kind(8, 8, batch_first=True, dtype=torch.float64) for kind in (loop, cls))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    assert torch.allclose(ours(x)[0], theirs(x)[0], atol=1e-12)


def test_a_training_run_takes_every_gradient():
    layer = layers.LAYERS["GRU, torch"]
    net, x = layer.build(8), torch.randn(2, 5, 8)
    expected = torch.autograd.grad(net(x.clone().requires_grad_())[0].square().sum(), list(net.parameters()))
    found = sweep.work("train", layer, net, x)()
    assert found[0].shape == x.shape
    for a, b in zip(found[1:], expected, strict=True):
        assert torch.allclose(a, b)


# -- memory


@pytest.mark.skipif(not memory.supported(), reason="peak memory is read in Linux's /proc")
def test_peaks_are_those_counted_by_hand():
    """Forward in float32: minGRU holds both projections and the output, 3 times the input."""
    with memory.Peaks() as peaks:
        for length in (4096, 16384):
            status, value = peaks("minGRU", "forward", "float32", 1, 60.0, 128, 4, length)
            assert status == "done" and value == pytest.approx(3 * 4 * length * 128 * 4, rel=0.05)
        said = peaks("GRU, loop", "train", "float32", 1, 1.0, 16, 1, 10**6)
        assert said == ("time-out", "a run took more than 1 s")
        status, value = peaks("minGRU", "forward", "float32", 1, 60.0, 128, 2**14, 2**20)
        assert status == "out of memory" and value.startswith("tried to allocate ")
        status, value = peaks("minGRU", "forward", "nonsense", 1, 60.0, 128, 1, 1)
        assert status == "failed" and "nonsense" in value
        assert peaks("minGRU", "forward", "float32", 1, 60.0, 128, 4, 64)[0] == "done"  # it goes on


# -- what is measured


NOW = [0.0]


class Sleeper(torch.nn.Module):
    """Takes `seconds` for each token, by the clock of these tests; what it gives is right."""

    def __init__(self, seconds):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.seconds = seconds

    def forward(self, x):
        NOW[0] += self.seconds * x.shape[1]
        return x * self.weight, None


def stub(seconds=1e-6, exact=lambda x: x, fail=False):
    def build(dim):
        if fail:
            raise RuntimeError("it does not run here")
        return Sleeper(seconds)

    return layers.Layer(build, lambda net, x: net(x), lambda net, x, s: (x, s), lambda net: exact)


def measure(tmp_path, monkeypatch, found, *overrides, why_stop=lambda: None, commit="a"):
    monkeypatch.setattr(sweep, "available", lambda device: found)
    monkeypatch.setattr(cost, "here", lambda device, dtype: ANYTHING)
    monkeypatch.setattr(efficiency.time, "perf_counter", lambda: NOW[0])
    cfg = resolve(tmp_path, "part=forward", "data.lengths=[50,100,200]", *overrides)
    return efficiency.measure(cfg, CPU, efficiency.Kept(tmp_path / "work", {"commit": commit}), why_stop)


def statuses(found):
    return {(point["layer"], point["length"]): point["status"] for point in found["points"]}


def test_what_cannot_be_done_is_noted_and_the_rest_goes_on(tmp_path, monkeypatch):
    class Later(Sleeper):
        def forward(self, x):
            if x.shape[1] == 100:
                raise RuntimeError("not this long")
            return super().forward(x)

    kinds = {
        "quick": stub(),
        "slow": stub(1e-3),
        "wrong": stub(exact=lambda x: 2 * x),
        "absent": stub(fail=True),
        "short": dataclasses.replace(stub(), build=lambda dim: Later(1e-6)),
        "full": stub(),
    }

    def read(net, x):
        if x.shape[1] > 50:
            raise torch.OutOfMemoryError("no room\nmore text")
        return net(x)

    kinds["full"] = dataclasses.replace(kinds["full"], read=read)
    found = measure(tmp_path, monkeypatch, kinds, "data.limit=0.08", "data.seconds=1")
    assert statuses(found) == {
        **{("quick", n): "done" for n in (50, 100, 200)},
        ("slow", 50): "done", ("slow", 100): "time-out", ("slow", 200): "time-out",
        ("short", 50): "done", ("short", 100): "failed", ("short", 200): "failed",
        ("full", 50): "done", ("full", 100): "out of memory", ("full", 200): "out of memory",
    }  # fmt: skip
    reasons = {(point["layer"], point["length"]): point["reason"] for point in found["points"]}
    errors = found["errors"]
    first = next(point for point in found["points"] if (point["layer"], point["length"]) == ("slow", 50))
    said = "a run of a shorter one, 50, took 0.05 s, so it would take more than 0.08"
    assert reasons["slow", 100] == reasons["slow", 200] == said
    found = measure(tmp_path / "b", monkeypatch, {"slow": stub(1e-3)}, "data.limit=0.03")
    reasons |= {(point["layer"], point["length"]): point["reason"] for point in found["points"]}
    assert reasons["slow", 50] == "a run took 0.05 s, more than 0.03"
    assert reasons["short", 100] == "RuntimeError: not this long" and reasons["full", 100] == "no room"
    assert "off by" in errors["wrong"] and "it does not run here" in errors["absent"] and errors["quick"] < 1e-6
    assert [first[key] for key in ("min", "q1", "median", "q3")] == pytest.approx([0.05] * 4) and first["n"] == 10


def test_our_own_layers_being_wrong_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(ArithmeticError, match="minGRU: off by"):
        measure(tmp_path, monkeypatch, {"minGRU": stub(exact=lambda x: 2 * x)})


def test_runs_go_on_until_they_agree_or_time_is_up():
    data = resolve(None).data
    data = dataclasses.replace(data, least=5, seconds=1.0, spread=0.03)
    bench = timer.Timer(data, CPU, {})
    assert not bench.enough([0.01] * 4) and not bench.enough([0.01] * 9) and bench.enough([0.01] * 10)
    assert not bench.enough([0.01, 0.02] * 20) and bench.enough([0.01, 0.02] * 40)
    assert bench.enough([0.3] * 5)
    assert not bench.enough([1e-4] * 100) and bench.enough([1e-4] * 600) and bench.enough([1e-5] * 1000)


def test_a_measurement_that_was_stopped_goes_on(tmp_path, monkeypatch):
    told = iter([None, None, "told to stop"])
    found = measure(tmp_path, monkeypatch, {"quick": stub()}, why_stop=lambda: next(told))
    assert found == "told to stop"
    first = json.loads((tmp_path / "work/points.json").read_text())
    found = measure(tmp_path, monkeypatch, {"quick": stub()})
    assert [point["length"] for point in first["points"]] == [50] and found["points"][0] == first["points"][0]
    assert [point["length"] for point in found["points"]] == [50, 100, 200] and found["seconds"] > first["seconds"]


def test_a_measurement_of_another_commit_is_not_gone_on_with(tmp_path, monkeypatch):
    told = iter([None, None, "told to stop"])
    measure(tmp_path, monkeypatch, {"quick": stub(1e-4)}, why_stop=lambda: next(told))
    found = measure(tmp_path, monkeypatch, {"quick": stub(1e-6)}, commit="b")
    assert [point["median"] for point in found["points"]] == pytest.approx([50e-6, 100e-6, 200e-6])


def test_a_failure_among_the_timed_runs_is_noted_unless_the_device_is_lost(tmp_path, monkeypatch):
    calls, error = [], torch.OutOfMemoryError("no room any more")

    def read(net, x):
        calls.append(len(x))
        if len(calls) > 6 + 2:  # the check's, warm-ups, and some
            raise error
        return net(x)

    kinds = {"late": dataclasses.replace(stub(), read=read), "quick": stub()}
    found = measure(tmp_path, monkeypatch, kinds, "data.least=20")
    assert statuses(found) == {
        **{("quick", n): "done" for n in (50, 100, 200)},
        **{("late", n): "out of memory" for n in (50, 100, 200)},
    }
    calls.clear()
    error = ConnectionError("the card has fallen off the bus")
    monkeypatch.setattr(timer, "DEVICE_LOST", ConnectionError)
    with pytest.raises(ConnectionError):
        measure(tmp_path / "b", monkeypatch, kinds, "data.least=20")


def test_only_training_is_timed_in_training_mode():
    layer, seen = layers.LAYERS["GRU, torch"], []
    net, x = layer.build(8), torch.randn(2, 5, 8)
    net.register_forward_hook(lambda module, *_: seen.append(module.training))
    for task in ("train", "forward", "context", "step"):
        sweep.work(task, layer, net, x)()
    assert seen == [True, False, False, False, False, False]


def test_steps_without_a_gradient_are_held_to_the_output_alone():
    """As mamba-ssm's are."""
    layer = layers.LAYERS["GRU, torch"]
    net, x = layer.build(8), torch.randn(2, 5, 8)
    bare = dataclasses.replace(layer, exact=lambda net: torch.no_grad()(layer.exact(net)))
    assert layers.check("GRU", bare, net, x) < 1e-6


def test_a_machine_is_found_not_given(tmp_path):
    with pytest.raises(ValueError, match="data.machine: expected none, it is found; got 'T4', this is"):
        efficiency.run(resolve(tmp_path, "part=parameters", "data.machine=T4"))


def test_a_machine_is_named_with_its_instruction_set():
    facts = machine.hardware("cpu")
    assert machine.name(facts).endswith(f", {facts['threads']} threads ({torch.backends.cpu.get_cpu_capability()})")
    assert machine.name(facts | {"gpu": "Tesla T4"}) == "Tesla T4"


def test_layers_that_are_not_here_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"data.layers: expected some of \['quick'\] .*, got 'GRU'"):
        measure(tmp_path, monkeypatch, {"quick": stub()}, "data.layers=[GRU]")


@pytest.mark.parametrize(
    "setting, said",
    [
        ("data.task=trian", "data.task: expected one of .*'trian'"),
        ("data.lengths=[]", "data.lengths: expected numbers from 1 up, got"),
        ("data.widths=[0]", "data.widths: expected numbers from 1 up, got"),
        ("data.limit=0", "data.limit: expected more than 0"),
        ("data.dtype=int8", "data.dtype: expected one of .*'int8'"),
    ],
)
def test_unusable_settings_are_named(setting, said):
    with pytest.raises(Exception, match=said):
        resolve(".", setting)
    with pytest.raises(ValueError, match="no such setting; the nearest is data.limit"):
        launch.check("efficiency", ["data.limt=3"])


def test_a_part_is_done_once_for_a_machine(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cost, "here", lambda *_: ANYTHING)
    settings = ("part=step", "data.layers=[minGRU,'GRU, torch',attention]", "threads=1")
    assert efficiency.run(resolve(tmp_path, *settings)) == "done"
    record = record_of(tmp_path / "results")
    assert statuses(record).keys() == {(n, t) for n in ("minGRU", "GRU, torch", "attention") for t in (16, 32)}
    assert set(statuses(record).values()) == {"done"} and record["git"]["commit"]
    assert efficiency.run(resolve(tmp_path, *settings)) == "done"
    assert "done already" in capsys.readouterr().out and record_of(tmp_path / "results") == record
    monkeypatch.setattr(efficiency, "machine_name", lambda device: "another")
    assert efficiency.run(resolve(tmp_path, *settings)) == "done"
    assert len(list((tmp_path / "results/runs/efficiency").glob("*/record.json"))) == 2


def test_what_must_be_done_is_counted_but_for_loops(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "here", lambda *_: ANYTHING)
    names = ["minGRU", "GRU, torch", "GRU, loop"]
    cfg = resolve(tmp_path, "part=forward", "threads=1", f"data.layers={json.dumps(names)}")
    points = efficiency.measure(cfg, CPU, efficiency.Kept(tmp_path), lambda: None)["points"]
    found = {p["layer"]: p for p in points if p["length"] == 32}
    tokens, width = 2 * 32, 16
    assert found["minGRU"]["operations"] == 2 * tokens * width * 2 * width
    assert found["GRU, torch"]["operations"] == 2 * 2 * tokens * width * 3 * width and "least" not in found["GRU, loop"]
    assert found["minGRU"]["least"] >= max(found["minGRU"]["operations"], found["minGRU"]["bytes"]) / 1e9


def test_the_budget_ends_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cost, "here", lambda *_: ANYTHING)
    assert efficiency.run(resolve(tmp_path, "part=forward", "data.layers=[minGRU]", "budget=0.001")) == "paused"
    assert "out of budget" in capsys.readouterr().out
    assert not list((tmp_path / "results").rglob("record.json"))


def test_parameters_are_those_of_the_formula_and_biases():
    found = {(p["layer"], p["expansion"]): p["parameters"] for p in sweep.parameters([10])}
    for a in sweep.EXPANSIONS:
        units = 10 * a
        assert found["minGRU", a] == 2 * units * (10 + 1) and found["minLSTM", a] == 3 * units * (10 + 1)
        assert found["GRU", a] == 3 * units * (10 + units + 2) and found["LSTM", a] == 4 * units * (10 + units + 2)


# -- what is said of it


MACHINE = "Some CPU, 2 threads (AVX512)"


def point(layer, length, median, peak=None, **changes):
    spread = {"q1": median, "q3": median, "min": median, "n": 5, "peak": peak}
    size = {"width": 8, "batch": 64, "length": length}
    return {"layer": layer, **size, "status": "done", "reason": None, "median": median, **spread, **changes}


def part(tmp_path, name, points, machine=MACHINE, **changes):
    config = launch.compose("efficiency", [f"part={name}", "profile=cpu"])
    config["data"]["machine"] = machine
    record = {
        "schema_version": 2, "run_id": shown.run_id(config), "experiment": "efficiency", "profile": "cpu",
        "config": config, "seed": 0, "status": "done", "reason": None, "points": points, "errors": {"minGRU": 1e-7},
        "dtype": "float32", "limits": {"bandwidth": 5e10, "matrix_rate": 1e11, "launch": 1e-6}, "seconds": 60.0,
        "git": {"commit": "0123456789abcdef", "clean": True}, "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "hardware": {"device": "cpu", "cpu": "Some CPU", "cores": 2, "threads": 2, "vector": "AVX512"},
    } | changes  # fmt: skip
    records.write_json(records.record_path(tmp_path, "efficiency", record["run_id"]), record)
    return record


def training(tmp_path, **times):
    """ms at lengths 64, 512, 4096 by layer; peaks are 1 MB, and 2 MB for torch's GRU."""
    names = {"ours": "minGRU", "log": "minGRU, log-space", "loop": "GRU, loop", "torch": "GRU, torch"}
    names["minloop"] = "minGRU, loop"
    points = []
    for length, i in ((64, 0), (512, 1), (4096, 2)):
        for key, values in times.items():
            points.append(point(names[key], length, values[i] / 1e3, 2e6 if key == "torch" else 1e6))
    return part(tmp_path, "train", points)


def test_what_the_report_says_follows_from_the_numbers(tmp_path):
    times = {"ours": (1, 8, 64), "log": (4, 40, 600), "loop": (40, 400, 3000), "torch": (2, 40, 320)}
    training(tmp_path, **times, minloop=(10, 400, 6000))
    ((_, parts),) = shown.load(tmp_path).items()
    assert shown.findings(parts) == [
        "minGRU trains 2 to 5 times as fast as torch's GRU with AVX512 at lengths of 64 to 4096.",
        "minGRU in log space trains 5 to 10 times as fast as the GRU loop with AVX512 at lengths of 64 to 4096.",
        "The minGRU loop trains 0.50 to 4 times as fast as the GRU loop with AVX512 at lengths of 64 to 4096; it is "
        "slower at 4096.",
        "The minGRU loop trains 0.10 to 0.40 times as fast as minGRU in log space with AVX512 at lengths of 64 to "
        "4096; it is slower at each.",
        "minGRU takes 0.50 times the memory of torch's GRU at lengths of 64 to 4096.",
        "minGRU in log space takes 1.00 times the memory of the GRU loop at lengths of 64 to 4096.",
        "The minGRU loop takes 1.00 times the memory of the GRU loop at lengths of 64 to 4096.",
        "The time of minGRU grows with the length to the power of 1.00 (1 is linear), from each length of 64 to 4096 "
        "to the next that is four or more times as long.",
    ]
    report.write_all(tmp_path)
    page = (tmp_path / "REPORT.md").read_text()
    assert "## Efficiency on Some CPU, 2 threads (AVX512)\n" in page and "1 runs, 0.0 hours" in page
    assert "trains 2 to 5 times as fast" in page and "Run on Some CPU, 2 threads (AVX512)." in page
    lines = {
        line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]]
        for line in page.splitlines()
        if "|" in line
    }
    assert lines["GRU takes longer than minGRU, training, T = 512"] == ["175 x", "10 x", "1 x", "5 x"]
    assert lines["GRU takes longer than minGRU, training, T = 4096"] == ["1,324 x", "5 x", "0.5 x", "5 x"]
    assert lines["minGRU takes more memory than GRU, training, T = 512"] == ["+88 %", "+0 %", "+0 %", "-50 %"]
    assert lines["LSTM takes longer than minLSTM, training, T = 512"] == ["235 x", "", "", ""]
    assert lines["minGRU, training, T = 4096"] == ["3.25 ms", "600 ms", "6,000 ms", "64 ms"]


def test_what_does_not_hold_is_said(tmp_path):
    training(tmp_path, ours=(1, 8, 200), torch=(1, 40, 150))
    ((_, parts),) = shown.load(tmp_path).items()
    said = shown.findings(parts)
    assert said[0] == (
        "minGRU trains 0.75 to 5 times as fast as torch's GRU with AVX512 at lengths of 64 to 4096; it is slower at "
        "4096."
    )
    assert "to the power of 1.00 to 1.55 (1 is linear)" in said[-1]


def test_what_is_faster_for_one_token_is_named(tmp_path):
    times = {"minGRU": (1.0, 1.1), "GRU, loop": (0.9, 2.2), "GRU, torch": (2, 2), "attention": (1.0, 9.0)}
    points = [
        point(name, length, batch * ms[i] / 1e3, batch=batch)
        for i, length in enumerate((1, 2048)) for batch in (8, 64) for name, ms in times.items()
    ]  # fmt: skip
    part(tmp_path, "step", points)
    ((_, parts),) = shown.load(tmp_path).items()
    assert shown.findings(parts) == [
        "Torch's GRU takes 1.82 to 2 times as long as minGRU for one token, the GRU loop 0.90 to 2 times, attention "
        "1.00 to 8.2 times, at batch sizes 8 and 64 and lengths of 1 to 2048.",
        "minGRU is slower for one token, at some length, than the GRU loop at batch sizes 8 and 64.",
        "minGRU takes 1.10 times as long for one token after 2048 tokens as after 1, at batch sizes 8 and 64.",
        "attention takes 9 times as long for one token after 2048 tokens as after 1, at batch sizes 8 and 64.",
    ]
    header, lines = page.grid(parts["step"])
    assert header == ["length, ms", "1", "2048"] and ["GRU, loop, batch 8", "7.2", "17.6"] in lines
    assert len(lines) == 8 and "batch sizes 8 and 64" in page.caption(parts["step"])


def test_a_context_is_compared_with_mambas_at_each_batch_size(tmp_path):
    times = {"minGRU": 2.0, "minGRU, loop": 8.0, "minLSTM": 5.0, "Mamba": 4.0}
    points = [
        point(name, length, ms * batch * length / 1e3, batch=batch)
        for batch in (8, 64) for length in (64, 2048) for name, ms in times.items()
    ]  # fmt: skip
    part(tmp_path, "context", points)
    ((_, parts),) = shown.load(tmp_path).items()
    assert page.grid(parts["context"])[1][4:] == [
        ["Mamba / minGRU, batch 8", "2 x", "2 x"], ["Mamba / minGRU, batch 64", "2 x", "2 x"],
        ["Mamba / minLSTM, batch 8", "0.8 x", "0.8 x"], ["Mamba / minLSTM, batch 64", "0.8 x", "0.8 x"],
    ]  # fmt: skip
    lines = {row: line for row, *line in page.claims_grid(parts, cells.read_paper())[1]}
    row = "takes longer than {}, a context and one token, batch {}"
    assert lines[f"Mamba {row.format('minGRU', 8)}"] == ["+6.6 %", "", "-50 %", "+100 %"]
    assert lines[f"minLSTM {row.format('Mamba', 32)}"] == ["+0 %", "", "", ""]  # not measured
    assert lines[f"minLSTM {row.format('Mamba', 64)}"] == ["+1.3 %", "", "", "+25 %"]
    said = shown.findings(parts)
    assert "minGRU is the fastest of them for a context and one token, at every length." in said
    assert said[-1] == (
        "minLSTM is slower for a context and one token, at some length, than Mamba at batch sizes 8 and 64."
    )


def test_the_csv_has_every_number_and_the_table_every_status(tmp_path):
    late = {"status": "time-out", "reason": "a run took 9 s, more than 2"}
    points = [point("minGRU", 64, 0.00123, 2**21), point("GRU, loop", 64, 0.5), point("minGRU", 128, 2.5)]
    points.append({"layer": "GRU, loop", "width": 8, "batch": 64, "length": 128, **late})
    record = part(tmp_path, "train", points)
    paths = [path.name for path in page.write_all(tmp_path, cells.read_paper())]
    assert paths == [
        "efficiency_claims_cpu_some_cpu_2_threads_avx512.md",
        "efficiency_train_cpu_some_cpu_2_threads_avx512.md",
    ]
    text = (tmp_path / "tables" / paths[1]).read_text()
    assert "| minGRU     | 1.23, 2 MiB |    2,500 |" in text and "|         500 | time-out |" in text
    assert "batch size 64, width 8, float32" in text and "copies 50 GB/s" in text
    with (tmp_path / "tables/efficiency_cpu_some_cpu_2_threads_avx512.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {line["run_id"] for line in lines} == {record["run_id"]}
    found = {(line["layer"], line["length"], line["metric"]): line["value"] for line in lines}
    assert found["minGRU", "64", "median"] == "0.00123" and float(found["minGRU", "64", "peak"]) == 2**21
    assert found["GRU, loop", "128", ""] == "" and {line["status"] for line in lines} == {"done", "time-out"}
    ((_, parts),) = shown.load(tmp_path).items()
    assert shown.left_out(parts) == [
        "Part train leaves out GRU, loop from 64 sequences of 128 on (time-out: a run took 9 s, more than 2)."
    ]


def test_two_records_of_one_part_are_not_mixed_up(tmp_path):
    record = part(tmp_path, "train", [point("minGRU", 64, 1.0)])
    older = {**record["hardware"], "vector": "AVX2"}  # no instruction set in the name: as it was once
    part(tmp_path, "train", [point("minGRU", 64, 2.0)], machine="Some CPU, 2 threads", hardware=older)
    assert [machine for _, machine in shown.load(tmp_path)] == ["Some CPU, 2 threads (AVX2)", MACHINE]
    other = copy.deepcopy(record)
    other["config"]["data"]["limit"] = 5.0
    other["run_id"] = shown.run_id(other["config"])
    records.write_json(records.record_path(tmp_path, "efficiency", other["run_id"]), other)
    with pytest.raises(records.RecordError, match=r"are two of part train on Some CPU, 2 threads \(AVX512\); remove"):
        shown.load(tmp_path)
    other["run_id"] = "0" * 12
    records.write_json(records.record_path(tmp_path / "b", "efficiency", "0" * 12), other)
    with pytest.raises(records.RecordError, match="its settings are those of run .*remove it"):
        shown.load(tmp_path / "b")


def test_every_claim_has_a_published_value_and_the_other_way_round():
    published = {row: value for (table, row, _, _), value in cells.read_paper().items() if table == "efficiency"}
    assert published.keys() == {claim.row for claim in page.CLAIMS}
    assert published["GRU takes longer than minGRU, training, T = 4096"].value == 1324


def test_figures_show_what_the_records_hold(tmp_path):
    training(tmp_path, ours=(1, 8, 64), log=(4, 40, 600), loop=(40, 400, 3000), torch=(2, 40, 320))
    sizes = {name: [point(n, 512, 1e-3, **{axis: s}) for s in (8, 64) for n in ("minGRU", "attention")]
             for name, axis in (("batch", "batch"), ("width", "width"))}  # fmt: skip
    for name, points in sizes.items():
        part(tmp_path, name, points)
    for name in ("context", "step"):
        part(tmp_path, name, [point("minGRU", t, 1e-3) for t in (64, 128)])
    counted = sweep.parameters([8])
    part(tmp_path, "parameters", counted)
    ((_, parts),) = shown.load(tmp_path).items()
    drawn = efficiency_figures.draw(parts)
    assert list(drawn) == ["train_time", "train_memory", "speedup", "latency", "parameters", "size"]
    assert set(drawn) <= set(shown.FIGURES)
    (ax,) = drawn["speedup"].axes
    assert [list(line.get_ydata()) for line in ax.lines[:3]] == [[2, 5, 5], [40, 50, 3000 / 64], [10, 10, 5]]
    formula, marks = drawn["parameters"].axes[0].lines[:2]
    assert list(formula.get_ydata()) == pytest.approx([100 / 3, 200 / 9, 100 / 6, 40 / 3])
    assert marks.get_ydata()[0] == pytest.approx(100 * (2 * 8 * 9) / (3 * 8 * 18))
    rate = drawn["size"].axes[0].lines[0]
    assert list(rate.get_ydata()) == pytest.approx([8 * 512 / 1e-3 / 1e6, 64 * 512 / 1e-3 / 1e6])
    assert {path.name for path in figures.write_all(tmp_path)} == {
        f"efficiency_{name}_cpu_some_cpu_2_threads_avx512.png" for name in drawn
    }


def test_parts_are_those_that_can_be_chosen():
    chosen = {path.stem for path in (launch.CONFIGS / "efficiency/part").glob("*.yaml")}
    assert chosen == set(shown.TITLES) and all(set(parts) <= chosen for parts in (*wanted.PARTS.values(), wanted.BENCH))
    for name in chosen:
        assert launch.compose("efficiency", [f"part={name}"])["data"]["part"] == name


# -- in reproduce-all


def test_it_runs_alone_and_is_told_to_stop(tmp_path):
    planner = partial(processes.Planner, [], str(tmp_path), str(tmp_path), lambda *_: [])
    assert planner().alone([sys.executable, "-c", "raise SystemExit(75)"]) == 75
    began = time.monotonic()
    late = planner(budget=-processes.GRACE)
    assert late.alone([sys.executable, "-c", "import time; time.sleep(60)"]) == -15
    assert time.monotonic() - began < 30 and not late.jobs


def test_reproduce_measures_what_is_asked_for(tmp_path):
    command = [sys.executable, "-m", "scripts.reproduce", "--profile", "smoke", "--only", "efficiency: parameters"]
    command += ["--results-dir", str(tmp_path)]
    said = subprocess.run(command, cwd=launch.CONFIGS.parent, capture_output=True, text=True, check=True).stdout
    assert "16 of 16 points" in said and (tmp_path / "REPORT_smoke.md").exists()
    assert len(record_of(tmp_path)["points"]) == 16
