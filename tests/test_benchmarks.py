"""The benchmark refuses wrong results, and its tables are functions of its records."""

import csv
import json
import subprocess
import sys

import pytest
import torch

from benchmarks import run, tables
from minrnn.ops.cells import CELLS
from minrnn.ops.scan import scan


def test_a_wrong_result_stops_the_benchmark():
    x = torch.randn(3, 4)
    run.check("right", [x], [x.double()], 1e-6)
    for wrong in (x * 1.001, x.clone().fill_(float("nan"))):
        with pytest.raises(SystemExit, match="result 0 is off by .* not measured"):
            run.check("wrong", [wrong], [x.double()], 1e-6)


def test_bytes_are_those_of_every_tensor_once():
    assert run.bytes_moved("mingru_g", torch.float32) == (12, 24)
    assert run.bytes_moved("minlstm_g", torch.bfloat16) == (8, 16)
    assert run.bytes_moved("linear", torch.float32) == (12, 20)


def test_times_are_of_the_whole_step():
    leaves = run.draw("mingru_g", (2, 8, 32), torch.float32, "cpu")
    times = run.time_both(
        lambda *x: scan(CELLS["mingru_g"], x), leaves, torch.randn(2, 8, 32), "cpu", at_least=0.0, runs=(3, 3)
    )
    assert set(times) == {"forward", "backward", "both"}
    assert all(0 < t["min_ms"] <= t["median_ms"] and t["n"] == 3 for t in times.values())


def timing(ms):
    return {"min_ms": ms, "median_ms": ms * 1.1, "n": 9}


HARDWARE = {"cpu": "a CPU", "cores": 2, "vector": "AVX2", "python": "3.11", "torch": "2.13", "numba": "0.68"}
RECORD = {
    "kernels": {
        "rows": [
            {
                "shape": [64, 256, 768], "cell": "mingru_g", "dtype": "float32", "copy_bandwidth": 40e9,
                "bytes_per_element": [12, 24],
                "minrnn": {"forward": timing(4), "backward": timing(8), "both": timing(20)},
                "log-space": {"forward": timing(80), "backward": timing(200), "both": timing(400)},
            }
        ],
        "hardware": HARDWARE, "commit": "0123456789abcdef", "clean": True,
    },
    "layers": {
        "rows": [
            {"shape": [16, 512, 384, 384], "dtype": "float32", "MinGRU": timing(60), "torch.nn.GRU": timing(300)},
            {"shape": [16, 512, 10, 20], "dtype": "float32", "MinGRU": timing(6), "peer": timing(30)},
        ],
        "hardware": HARDWARE, "commit": None, "clean": False,
    },
    "training": {
        "rows": [
            {
                "shape": [64, 528], "micro_batches": 2, "dtype": "float32",
                "minrnn": timing(900), "scans": timing(180), "minGRU-pytorch": timing(3600),
            }
        ],
        "hardware": HARDWARE, "commit": None, "clean": False,
    },
}  # fmt: skip


def test_tables_come_from_the_record_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results/bench").mkdir(parents=True)
    (tmp_path / "results/bench/cpu.json").write_text(json.dumps(RECORD))
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench:kernels_cpu -->\nold\n<!-- /bench:kernels_cpu -->\nafter\n")
    tables.main()
    once = readme.read_text()
    assert once.startswith("before\n") and once.endswith("after\n") and "old" not in once
    # 64 * 256 * 768 elements of 36 bytes at 40 GB/s are 11.3 ms; it took 20.
    assert "| 0.57 | 20.0 x |" in once and "40 to 40 GB/s" in once and "commit 0123456789" in once
    tables.main()
    assert readme.read_text() == once
    layers = (tmp_path / "results/tables/bench_layers_cpu.md").read_text()
    assert "| 300 / 330 (5.0 x) |  |" in layers and "uncommitted changes" in layers
    training = (tmp_path / "results/tables/bench_training_cpu.md").read_text()
    # 400k steps at the median of 990 ms are 110 hours.
    assert "| (64, 528) | 900 / 990 | 0.20 | 110.0 | 3.6e+03 / 3.96e+03 (4.0 x) |" in training
    with (tmp_path / "results/tables/bench_kernels_cpu.csv").open() as file:
        rows = {(r["column"], r["metric"]): float(r["value"]) for r in csv.DictReader(file)}
    assert rows["log-space", "both min_ms"] == 400
    assert rows["minrnn", "both share of copy limit"] == pytest.approx(0.566, abs=1e-3)


def test_tables_need_no_torch():
    program = "import sys; sys.modules['torch'] = None; import benchmarks.tables"
    subprocess.run([sys.executable, "-c", program], check=True)
