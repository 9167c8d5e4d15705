"""What `make bench` measures: ours being wrong stops it, another's failure is a point, tables follow from records."""

import csv
import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from experiments import cost, efficiency, launch, records
from experiments.efficiency import kernels, policy, steps, timer
from experiments.grid.efficiency import BENCH, command
from minrnn.mixers import make
from minrnn.models import TokenModel
from minrnn.ops.cells import CELLS
from minrnn.ops.scan import scan
from scripts.draw import cells, figures, pages, tables
from scripts.draw import efficiency as shown
from scripts.draw.efficiency import bench as page
from scripts.draw.efficiency import figures as drawn
from scripts.draw.efficiency.tables import write_all
from tests.test_efficiency import MACHINE, part

CPU = torch.device("cpu")
SMALL = ("data.lengths=[16]", "data.widths=[8]", "threads=1")


def resolve(tmp_path, *overrides):
    places = (f"results_dir={tmp_path}/results", f"output_dir={tmp_path}/outputs")
    return launch.resolve("efficiency", ["profile=smoke", "progress=false", "device=cpu", *places, *overrides])


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The machine's own limits take seconds."""
    monkeypatch.setattr(kernels, "copy_bandwidth", lambda device, at_least: 40e9)
    monkeypatch.setattr(cost, "here", lambda device, dtype: cost.Machine("some", 1e9, 1e9, 1e-6))


def measure(tmp_path, *overrides, why_stop=lambda: None):
    kept = efficiency.Kept(tmp_path / "work", {"commit": "a"})
    return efficiency.measure(resolve(tmp_path, *SMALL, *overrides), CPU, kept, why_stop)


# -- what is measured


@pytest.mark.parametrize("name", BENCH)
def test_every_part_is_measured_and_shown(tmp_path, name):
    assert efficiency.run(resolve(tmp_path, f"part={name}", *SMALL)) == "done"
    (path,) = (tmp_path / "results/runs/efficiency").glob("*/record.json")
    points = records.read_record(path)["points"]
    assert points and {point["status"] for point in points} == {"done"}, points
    sizes = {"layer", "batch", "length", "width", "dtype"}
    numbers = {"error"} if name == "precision" else {"median", "min", "n"}
    assert all(sizes | numbers <= set(point) for point in points)
    assert [path.name.partition("_smoke")[0] for path in write_all(tmp_path / "results", cells.read_paper())] == [
        f"efficiency_{name}"
    ]


def test_a_wrong_scan_of_ours_stops_it(tmp_path, monkeypatch):
    def wrong(cell, inputs, backend):
        return scan(cell, inputs, backend=backend) * (1.001 if backend == "auto" else 1.0)

    monkeypatch.setattr(kernels, "scan", wrong)
    for name in ("kernels", "precision"):
        with pytest.raises(ArithmeticError, match=r"minGRU \(2, 16, 8\) float32.*: off by 1.0e-03 of the result"):
            measure(tmp_path, f"part={name}")
    assert not (tmp_path / "work").exists()  # nothing was kept


def test_a_wrong_gradient_of_ours_stops_it(tmp_path, monkeypatch):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h):
            return h.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * float("nan")

    def wrong(cell, inputs, backend):
        h = scan(cell, inputs, backend=backend)
        return Wrong.apply(h) if backend == "auto" else h

    monkeypatch.setattr(kernels, "scan", wrong)
    with pytest.raises(ArithmeticError, match="minGRU .* result 1: off by nan"):
        measure(tmp_path, "part=kernels")


def test_a_model_of_ours_that_is_wrong_stops_it():
    class Wrong(TokenModel):
        def forward(self, *arguments, **settings):
            logits, state = super().forward(*arguments, **settings)
            return logits * (1.001 if logits.dtype == torch.float32 else 1.0), state

    def check(name, kind):
        return steps.check(name, lambda: kind(16, 16, 8, 1, make("mingru", expansion=1)), tokens, CPU)

    tokens = [torch.randint(16, (2, 20))]
    assert check("right", TokenModel) < 1e-6
    with pytest.raises(ArithmeticError, match="wrong, result: off by 1.0e-03"):
        check("wrong", Wrong)


def test_a_step_of_a_policy_is_held_to_the_window(monkeypatch):
    net = policy.models(16)["minGRU"]().eval()
    policy.check_steps(net, CPU)
    step = net.step
    monkeypatch.setattr(net, "step", lambda *arguments: step(*arguments[:3], 7, arguments[4]))  # another time
    with pytest.raises(ArithmeticError, match="a step of minGRU's policy: off by"):
        policy.check_steps(net, CPU)


@pytest.mark.parametrize(
    "peer, said",
    [
        (lambda a, b: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda a, b: scan(CELLS["linear"], (a, b)) * 1.01, "ArithmeticError: peer: off by 1.0e-02"),
    ],
)
def test_another_scan_that_fails_or_is_wrong_is_noted_and_the_rest_goes_on(tmp_path, monkeypatch, peer, said):
    right = scan
    peers = {"peer": peer, "right": lambda a, b: right(CELLS["linear"], (a, b))}
    monkeypatch.setattr(
        kernels,
        "linear_peers",
        lambda device, a, b, weight: {
            name: (f, [x.requires_grad_() for x in (a, b)], weight) for name, f in peers.items()
        },
    )
    points = measure(tmp_path, "part=kernels", "data.dtypes=[float32]")["points"]
    found = {(p["layer"], p["pass"]): p for p in points if p["scan"] == "linear"}
    assert len(found) == 9
    for which in kernels.PASSES:
        assert found["peer", which]["status"] == "failed" and found["peer", which]["reason"].startswith(said)
        assert found["right", which]["status"] == found["minrnn", which]["status"] == "done"
    assert found["minrnn", "both"]["error"] < 1e-6 and found["right", "both"]["error"] < 1e-6


def test_another_model_that_fails_is_noted_and_the_rest_goes_on(tmp_path, monkeypatch):
    def models(width):
        ours = steps_models(width)["minGRU"]
        return {"minGRU": ours, steps.PEER: lambda: 1 / 0}

    steps_models = steps.copying_models
    monkeypatch.setattr(steps, "copying_models", models)
    points = measure(tmp_path, "part=copying")["points"]
    assert {p["layer"]: p["status"] for p in points} == {"minGRU": "done", "scans": "done", steps.PEER: "failed"}


def test_a_part_that_was_stopped_goes_on(tmp_path):
    told = iter([None, None, None, "told to stop"])
    assert measure(tmp_path, "part=kernels", why_stop=lambda: next(told)) == "told to stop"
    first = json.loads((tmp_path / "work/points.json").read_text())["points"]
    assert {(p["scan"], p["dtype"]) for p in first} == {("minGRU", "float32"), ("minGRU", "bfloat16")}
    points = measure(tmp_path, "part=kernels")["points"]
    assert points[: len(first)] == first
    cases = [(p["scan"], p["dtype"], p["pass"], p["layer"]) for p in points]
    assert len(set(cases)) == len(cases) == 3 * 2 * 3 + 3  # and log space


def test_bytes_are_those_of_every_tensor_once():
    assert kernels.bytes_moved("mingru_g", torch.float32) == (12, 24, 36)
    assert kernels.bytes_moved("minlstm_g", torch.bfloat16) == (8, 16, 24)
    assert kernels.bytes_moved("linear", torch.float32) == (12, 20, 32)


@pytest.mark.parametrize("which, gradients", [("forward", 0), ("backward", 1), ("both", 1)])
def test_a_run_is_of_its_pass(which, gradients):
    seen = []

    class Seen(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append("forward")
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append("backward")
            return grad

    x = torch.randn(2, 3, 4, requires_grad=True)
    call = kernels.run_of(lambda x: Seen.apply(x), [x], torch.ones(2, 3, 4), which)
    seen.clear()
    call()
    call()
    one = {"forward": ["forward"], "backward": ["backward"], "both": ["forward", "backward"]}[which]
    assert seen == 2 * one


def test_inputs_may_be_narrower_than_the_states_where_a_layer_takes_them(tmp_path):
    found = measure(tmp_path, "part=layers", "data.shapes=[[2,8,16,4]]", "data.dtypes=[float32]", "data.memory=false")
    assert {p["layer"] for p in found["points"]} == {
        "minGRU", "minLSTM", "minGRU, log-space", "GRU, torch", "LSTM, torch"
    }  # fmt: skip
    assert {(p["input"], p["width"], p["status"]) for p in found["points"]} == {(4, 16, "done")}
    point = next(p for p in found["points"] if p["layer"] == "minGRU")
    # Forward, and backward to weights and input: three products of 16 tokens, 4 inputs, 32 gates and candidates.
    assert point["operations"] == 3 * 2 * 16 * 4 * 32


def test_sizes_are_a_list_or_all_combinations():
    data = resolve(".", "part=kernels", "profile=cpu").data
    assert timer.sizes(data)[1] == {"batch": 8, "length": 1024, "width": 384}
    data = dataclasses.replace(data, shapes=None, lengths=[4, 2], batch_sizes=[1, 3], widths=[5])
    assert timer.sizes(data) == [{"width": 5, "batch": b, "length": n} for b in (1, 3) for n in (2, 4)]


@pytest.mark.parametrize(
    "settings, said",
    [
        ("part=kernels data.shapes=[[1,2]]", r"data.shapes: expected each as \[batch, length, width\] from 1 up, got"),
        ("part=kernels data.shapes=[[1,2,3,4]]", "data.shapes: expected each as"),
        ("part=kernels data.dtypes=[int8]", "data.dtypes: expected some of .*'int8'"),
        ("part=copying data.dtype=bfloat16", "data.dtype: task copying is measured in float32, got bfloat16"),
        ("part=language data.layers=[minGRU]", "data.layers: task language has none to choose"),
        ("part=policy data.widths=[8,16]", "task policy is measured at one width"),
    ],
)
def test_unusable_settings_are_named(settings, said):
    with pytest.raises(Exception, match=said):
        resolve(".", *settings.split())


def test_the_command_measures_the_six_parts_and_settings_win():
    called = command(BENCH, "cpu", ["results_dir=here"])
    assert called[1:] == [
        "-m", "experiments.efficiency", "-m", "part=kernels,layers,precision,copying,language,policy", "profile=cpu",
        "results_dir=here",
    ]  # fmt: skip
    assert "profile=cpu" not in command(BENCH, "cpu", ["profile=paper"])


# -- what is shown


def point(layer, ms, *sizes, **more):
    """Minimum `ms`, median 1.1 times that."""
    times = {"min": ms / 1e3, "q1": ms / 1e3, "median": 1.1 * ms / 1e3, "q3": 1.2 * ms / 1e3, "n": 9}
    size = dict(zip(("batch", "length", "width", "input"), sizes, strict=False))
    return {"layer": layer, **size, "dtype": "float32", "status": "done", "reason": None, **times, **more}


def test_tables_show_ratios_and_shares(tmp_path):
    sizes, passes = (64, 256, 768), {"forward": (4, 12), "backward": (8, 24), "both": (20, 36)}
    scans = [
        point("minrnn", ms, *sizes, **{"pass": which}, scan="minGRU", bytes=64 * 256 * 768 * size, bandwidth=40e9)
        for which, (ms, size) in passes.items()
    ]
    scans += [
        point("log-space", 20 * ms, *sizes, **{"pass": which}, scan="minGRU") for which, (ms, _) in passes.items()
    ]
    failed = {"status": "failed", "reason": "ImportError: no"}
    scans.append({"layer": "peer", **dict(zip(("batch", "length", "width"), sizes, strict=True)), "dtype": "float32",
                  "pass": "both", "scan": "minGRU", **failed})  # fmt: skip
    layers = [
        *(point("minGRU", 60, 16, 512, 384, 384), point("GRU, torch", 300, 16, 512, 384, 384, peak=2**21)),
        *(point("minGRU", 6, 16, 512, 20, 10), point("minGRU-pytorch", 630, 16, 512, 20, 10)),
    ]
    copying = [
        *(point("minGRU", 900, 64, 528, 64), point("scans", 180, 64, 528, 64)),
        point("minGRU-pytorch", 3600, 64, 528, 64),
    ]
    policies = [
        point(name, ms, 60, n, 128, kind="policy")
        for n in (1, 20)
        for name, ms in (("minGRU", 2), ("Transformer", 1.5 * n))
    ]
    errors = [
        {"layer": name, "batch": 1, "length": 512, "width": 64, "dtype": dtype, "status": "done", "error": error}
        for dtype, scale in (("float32", 1), ("bfloat16", 1e4))
        for name, error in (("log-space", 8e-6 * scale), ("loop", 1e-7 * scale), ("minrnn", 7e-8 * scale))
    ]
    found = {"kernels": scans, "layers": layers, "precision": errors, "copying": copying, "policy": policies}
    for name, points in found.items():
        part(tmp_path, name, points)
    ((_, parts),) = shown.load(tmp_path).items()
    assert list(parts) == [name for name in BENCH if name in found]
    grids = {name: page.GRIDS[name](parts[name]) for name in parts}
    # 64 * 256 * 768 elements of 36 bytes at 40 GB/s take 11.3 ms, of 12 bytes 3.77; the scans took 20 and 4.
    times = ["4 / 4.4", "8 / 8.8", "20 / 22"]
    assert grids["kernels"][1] == [
        ["minGRU", "(64, 256, 768)", "float32", *times, "0.94", "0.94", "0.57", "20.0 x", "failed"]
    ]
    assert grids["kernels"][0][-2:] == ["log-space takes", "peer takes"]
    assert grids["layers"][1] == [
        ["(16, 512, 384, 384)", "float32", "60 / 66", "300 / 330 (5.00 x), 2 MiB", ""],
        ["(16, 512, 10, 20)", "float32", "6 / 6.6", "", "630 / 693 (105 x)"],
    ]
    # 400k steps at the median of 990 ms take 110 hours.
    assert grids["copying"][1] == [["(64, 528)", "900 / 990", "0.20", "110.0", "3,600 / 3,960 (4.00 x)"]]
    assert grids["precision"] == (
        ["T", "float32, log-space (the paper's)", "float32, minrnn", "bfloat16, log-space (the paper's)",
         "bfloat16, minrnn"],
        [["512", "8.0e-06", "7.0e-08", "8.0e-02", "7.0e-04"]],
    )  # fmt: skip
    assert grids["policy"][1][1] == ["policy", "(60, 20)", "2 / 2.2", "30 / 33 (15.0 x)"]
    paths = write_all(tmp_path, cells.read_paper())
    assert [path.name for path in paths] == [f"efficiency_{name}_cpu_some_cpu_2_threads_avx512.md" for name in parts]
    text = paths[0].read_text()
    assert "40 to 40 GB/s" in text and f"{MACHINE}; python 3.11.7" in text and "commit 0123456789.\n" in text
    assert "(3 layers, 64 wide, expansion 6, 64 sequences" in paths[3].read_text()
    assert "one more step of 60 episodes" in paths[4].read_text()
    with paths[0].with_suffix(".csv").open() as file:
        lines = {(r["layer"], r["pass"], r["metric"]): r["value"] for r in csv.DictReader(file)}
    assert lines["log-space", "both", "min"] == "0.4" and lines["minrnn", "both", "bandwidth"] == "4e+10"
    assert lines["peer", "both", ""] == ""
    assert not (tmp_path / "tables/efficiency_cpu_some_cpu_2_threads_avx512.csv").exists()  # of layers by size
    assert shown.left_out(parts) == ["Part kernels leaves out peer at 64 sequences of 256 (failed: ImportError: no)."]
    (picture,) = figures.write_all(tmp_path)
    assert picture.name == "efficiency_policy_step_cpu_some_cpu_2_threads_avx512.png"
    ours, theirs = drawn.draw(parts)["policy_step"].axes[0].lines
    assert list(ours.get_xdata()) == [1, 20]
    assert list(ours.get_ydata()) == pytest.approx([2.2, 2.2])
    assert list(theirs.get_ydata()) == pytest.approx([1.65, 33])


def test_readme_has_what_was_measured_in_float32(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [
        point("minrnn", 4, 1, 2, 3, **{"pass": "both"}, scan="linear", bytes=8e7, bandwidth=4e10, dtype=dtype)
        for dtype in ("float32", "bfloat16")
    ]
    part(tmp_path / "results", "kernels", rows)
    name = "table:efficiency_kernels_cpu_some_cpu_2_threads_avx512"
    unmeasured = "<!-- table:efficiency_layers_cpu_some_cpu_2_threads_avx512 -->\nof old\n"
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n<!-- {name} -->\nold\n<!-- /{name} -->\n{unmeasured}after\n")
    monkeypatch.setattr(sys, "argv", ["tables"])
    pages.main(tables)
    once = readme.read_text()
    assert once.startswith("before\n") and once.endswith(f"{unmeasured}after\n") and "\nold\n" not in once
    assert "| linear | (1, 2, 3) |  float32 |" in once and "bfloat16" not in once
    pages.main(tables)
    assert readme.read_text() == once


@pytest.mark.parametrize("module", ["tables", "figures", "report", "efficiency.bench"])
def test_what_draws_needs_no_torch(module):
    subprocess.run(
        [sys.executable, "-c", f"import sys; sys.modules['torch'] = None; import scripts.draw.{module}"], check=True
    )
