"""Counted costs against numbers worked out by hand, and the roofline's table of a record written here."""

import csv
import json
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import minrnn
from experiments import cost, grid
from experiments.config import run_id
from experiments.cost import Machine, Operation, count, total
from experiments.launch import compose
from minrnn.mixers import make
from scripts import roofline


@pytest.fixture
def fake():
    torch.use_deterministic_algorithms(False)  # else fresh memory is filled, which is work
    with FakeTensorMode():
        yield


def named(found, *names):
    """(name, operations, bytes, times) of these operators."""
    return sorted((c.name, c.operations, c.bytes, n) for c, n in found.items() if not names or c.name in names)


def test_linear_forward_and_backward(fake):
    layer, x = nn.Linear(5, 7), torch.zeros(3, 5)
    forward = count(lambda: layer(x))
    assert named(forward) == [("aten::addmm", 2 * 3 * 5 * 7, 4 * (3 * 5 + 5 * 7 + 7 + 3 * 7), 1)]
    both = count(lambda: layer(x).backward(torch.zeros(3, 7)))
    assert named(both, "aten::mm") == [("aten::mm", 2 * 3 * 5 * 7, 4 * (3 * 7 + 3 * 5 + 5 * 7), 1)]  # of the weight
    assert named(both, "aten::sum") == [("aten::sum", 0, 4 * (3 * 7 + 7), 1)]  # of the bias
    assert total(both)[0] == 2 * total(forward)[0]


def test_views_and_fresh_memory_count_nothing(fake):
    x = torch.zeros(4, 6)

    def look():
        y = x.t().reshape(2, 12).expand(3, 2, 12).unbind(0)[1]
        return y.chunk(2, -1), x.view(-1).detach(), torch.empty_like(x)

    assert count(lambda: x.t().view(2, 3, 4)[0].expand(5, 3, 4).detach()) == Counter()
    assert count(lambda: (torch.empty_like(x), x.shape)) == Counter()
    assert named(count(look)) == [("aten::clone", 0, 2 * 4 * 24, 1)]  # reshape of a transposed one has to copy


def test_each_operand_counts_once(fake):
    x, y, row = torch.zeros(4, 6), torch.zeros(4, 6), torch.zeros(6)
    assert total(count(lambda: x + x)) == (0, 2 * 96)
    assert total(count(lambda: x.add_(y))) == (0, 3 * 96)
    assert total(count(lambda: x.copy_(y))) == (0, 2 * 96)
    assert total(count(lambda: x.zero_())) == (0, 96)
    assert total(count(lambda: x * row.expand(4, 6))) == (0, 2 * 96 + 24)  # only six numbers are there to read


def test_mingru_layer(fake):
    B, T, D, H = 3, 50, 8, 16
    rnn, x = minrnn.MinGRU(D, H, batch_first=True), torch.zeros(B, T, D)
    found = count(lambda: rnn(x))
    assert total(found)[0] == 2 * B * T * D * 2 * H
    states = B * T * H
    assert named(found, "minrnn::scan") == [("minrnn::scan", 0, 4 * 3 * states, 1)]  # gate, candidate -> state
    back = count(lambda: rnn(x)[0].backward(torch.zeros(B, T, H)))
    # gate, candidate, state and its gradient -> gradients of gate and candidate
    assert named(back, "minrnn::scan_backward") == [("minrnn::scan_backward", 0, 4 * 6 * states, 1)]


def test_an_operator_with_a_kernel_is_not_taken_apart(fake):
    x = torch.zeros(4, 6, requires_grad=True)
    found = count(lambda: F.silu(x).backward(torch.zeros(4, 6)))
    assert named(found, "aten::silu", "aten::silu_backward") == [
        ("aten::silu", 0, 2 * 96, 1), ("aten::silu_backward", 0, 3 * 96, 1),
    ]  # fmt: skip


def test_rms_norm_is_one_operator(fake):
    x, gamma = torch.zeros(8, 16), torch.zeros(16)
    found = count(lambda: F.rms_norm(x, (16,), gamma))
    assert named(found) == [("aten::native_layer_norm", 0, 4 * (2 * 8 * 16 + 16 + 2 * 8), 1)]  # and 2 numbers a row


@pytest.mark.parametrize("name", ["mingru", "mingru_mlp_gates", "gru", "attention", "aaren", "mamba", "qrnn", "sru"])
def test_no_gradient_changes_nothing(fake, name):
    settings = {
        "mamba": {"name": "ssm", "inner": "s6", "wrapping": "mamba"},
        "mingru_mlp_gates": {"name": "mingru", "gate_layers": 2},
    }.get(name, {"name": name})
    mixer, x = make(**settings)(32), torch.zeros(2, 16, 32)
    plain = count(lambda: mixer(x))
    with torch.inference_mode():
        found = count(lambda: mixer(x))
    assert total(found) == total(plain)
    assert sum(found.values()) == sum(plain.values())


def test_products_of_the_recurrent_mixers(fake):
    B, T, D, H = 2, 16, 32, 64
    products = {
        ("qrnn", "window", 2): 2 * D * 3 * H,
        ("sru", "expansion", 2): D * 4 * H,
        ("mingru", "gate_layers", 2): D * 2 * H + H * H,
        ("minlstm", "gate_layers", 2): D * 2 * H + H * 2 * H,
    }
    for (name, key, value), expected in products.items():
        mixer, x = make(name, **{"expansion": 2, key: value})(D), torch.zeros(B, T, D, requires_grad=True)
        found = count(lambda: mixer(x))  # noqa: B023
        assert total(found)[0] == 2 * B * T * (expected + H * D), name
        both = count(lambda: mixer(x)[0].backward(torch.zeros(B, T, D)))  # noqa: B023
        assert total(both)[0] == 3 * total(found)[0], name


@pytest.mark.parametrize("kind, gates, states", [(nn.GRU, 3, 1), (nn.LSTM, 4, 2)])
def test_gru_and_lstm_take_an_operator_a_step(fake, kind, gates, states):
    B, T, D, H = 3, 50, 8, 16
    rnn, x = kind(D, H, batch_first=True), torch.zeros(B, T, D)
    out = []
    found = count(lambda: out.append(rnn(x)[0]))
    assert out[0].shape == (B, T, H)
    assert total(found)[0] == 2 * B * T * gates * H * (D + H)
    moved = B * gates * H + gates * H * (H + 1) + 2 * states * B * H  # the projected input, weight and bias, states
    assert named(found, "recurrence") == [("recurrence", 2 * B * gates * H * H, 4 * moved, T)]
    x.requires_grad_()
    assert total(count(lambda: rnn(x)[0].backward(torch.zeros(B, T, H))))[0] == 3 * total(found)[0]


def test_attention_grows_with_the_square_of_the_length(fake):
    D, found = 32, {}
    for dropout in (0.0, 0.5):
        mixer = make("attention", heads=4, dropout=dropout)(D)
        for T in (64, 128):
            x = torch.zeros(2, T, D)
            found[T, dropout] = total(count(lambda: mixer(x)))  # noqa: B023
            linear, square = 2 * 2 * T * D * 4 * D, 2 * 2 * 2 * T * T * D
            assert found[T, dropout][0] == linear + square // 2  # the other half is masked
    q = torch.zeros(2, 4, 64, 8)
    assert total(count(lambda: F.scaled_dot_product_attention(q, q, q)))[0] == 2 * 2 * 2 * 64 * 64 * D
    assert found[64, 0.0] == found[64, 0.5]  # fused with dropout too
    assert found[128, 0.0][1] == pytest.approx(2 * found[64, 0.0][1], rel=0.05)  # no T x T is written


def test_the_numbers_are_those_of_a_computation_that_is_done():
    """On real tensors an operator takes and gives what it does on fake ones."""

    def counted():
        torch.manual_seed(0)
        layer, x = minrnn.MinLSTM(6, 8, batch_first=True), torch.zeros(2, 9, 6)
        return count(lambda: F.gelu(layer(x)[0]).sum().backward())

    torch.use_deterministic_algorithms(False)
    real = counted()
    with FakeTensorMode():
        assert counted() == real


def test_seconds_by_hand():
    machine = Machine("slow", bandwidth=100.0, matrix_rate=1000.0, launch=0.5)
    found = Counter({
        Operation("product", 4000, 10): 2,  # 4 s each by its operations
        Operation("copy", 0, 300): 1,  # 3 s by its bytes
        Operation("tiny", 1, 1): 10,  # 0.5 s by being called
    })  # fmt: skip
    assert machine.seconds(found) == pytest.approx(2 * 4 + 3 + 10 * 0.5)


def test_this_machine(monkeypatch):
    monkeypatch.setattr(cost, "copy_bandwidth", lambda device: 7e9)
    found = cost.here("cpu")
    assert found.bandwidth == 7e9
    assert 1e8 < found.matrix_rate < 1e13 and 1e-8 < found.launch < 1e-2


CELL = next(c for c in grid.CELLS if c.table == "table1_layers" and c.row == "minGRU" and c.column == "1")
HERE = Machine("this one", 10e9, 50e9, 1e-6)


def record(config, seed, hardware, speed):
    config = {**config, "seed": seed}
    return {
        "schema_version": 2,
        "run_id": run_id(config),
        "experiment": config["experiment"],
        "profile": config["profile"],
        "metrics": {"last": {}, "best": {}},
        "ended": 1e9,
        "config": config,
        "seed": seed,
        "status": "done",
        "hardware": hardware,
        "tokens_per_second": speed,
    }


def test_roofline_of_a_record(tmp_path, monkeypatch, capsys):
    config = CELL.config("cpu")
    tokens = 64 * (64 + 16)
    mine = roofline.machine.hardware("cpu") | {"threads": 1}
    for seed, hardware, seconds in ((0, mine, 0.1), (1, mine, 0.3), (2, mine | {"cpu": "Another"}, 7.0)):
        found = record(config, seed, hardware, tokens / seconds)
        path = tmp_path / "runs" / "selective_copy" / found["run_id"] / "record.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(found))
    monkeypatch.setattr(roofline, "limits", lambda device, threads: (HERE, 1))
    runs = grid.runs("cpu", 1, [CELL])
    monkeypatch.setattr(grid, "runs", lambda profile, seeds: runs)
    monkeypatch.setattr("sys.argv", ["roofline", "--profile", "cpu", "--device", "cpu", "--results-dir", str(tmp_path)])
    roofline.main()

    assert (tmp_path / "tables" / "roofline_cpu.md").read_text() in capsys.readouterr().out
    lines = list(csv.DictReader((tmp_path / "tables" / "roofline_cpu.csv").open()))
    assert [line["machine"] for line in lines] == ["T4", "this one"] * 2  # two machines have records
    on = {line["measured_on"].split(" (")[0]: line for line in lines if line["machine"] == "this one"}
    assert float(on[mine["cpu"]]["measured_step_seconds"]) == pytest.approx(0.2) and on[mine["cpu"]]["n"] == "2"
    assert float(on["Another"]["measured_step_seconds"]) == pytest.approx(7) and on["Another"]["n"] == "1"
    line = on[mine["cpu"]]
    assert line["groups"] == runs[0].group and len(line["run_ids"].split()) == 2

    # Matrix products of a step: forward, twice that backward. The head reads the markers alone.
    B, T, D, H, V = 64, 80, 64, 384, 16
    forward = 2 * B * (T * D * 2 * H + T * H * D + 16 * D * V)
    assert int(line["operations"]) == 3 * forward
    step, evaluated, whole = (float(line[f"{name}_seconds"]) for name in ("step", "evaluation", "total"))
    assert step > max(3 * forward / 50e9, int(line["bytes"]) / 10e9 / 2)
    passes = (15 + 2) * 16  # 1500 steps, a look every 100; and the test of the last and of the best
    assert forward / 50e9 * passes < evaluated < step / 2 * passes
    assert whole == pytest.approx(1500 * step + evaluated)

    table = (tmp_path / "tables" / "roofline_cpu.md").read_text().splitlines()
    cells = {
        row[-2]: [cell.strip() for cell in row] for row in (line.split("|") for line in table if "| table1" in line)
    }
    ours, other = (next(v for k, v in cells.items() if name in k) for name in (mine["cpu"], "Another"))
    assert ours[9:12] == ["200", f"{0.2 / step:.2f}", "2"]
    assert other[9:12] == ["7,000", "", "1"]  # another machine's limits are not known here


def test_counted_as_the_engine_steps():
    """Two micro-batches are two passes of half the batch and one step of the optimiser."""
    config = compose("selective_copy", ["profile=smoke", "model=mingru"])
    found = [roofline.costs(roofline.typed(config | {"micro_batches": n}))[0] for n in (1, 2)]
    (one, _), (two, _) = map(total, found)
    assert one == two
    adam = [named(c, "aten::_fused_adamw_") for c in found]
    assert adam[0] == adam[1] and adam[0]
    scans = [named(c, "minrnn::scan") for c in found]
    assert [sum(times for *_, times in s) for s in scans] == [config["model"]["layers"], 2 * config["model"]["layers"]]


def test_evaluations_of_the_character_model():
    config = compose("charlm", ["profile=cpu", "model=mingru"])
    work = roofline.language_work(roofline.typed(config))
    characters = sum(times * batch[0].numel() for times, batch in work[3])
    looks = math.ceil(config["train"]["steps"] / config["eval"]["interval"]) * config["eval"]["iters"]
    assert characters == looks * 12 * 64 + 2 * (roofline.VALIDATION - 1)


def test_a_decision_run_can_be_counted():
    cell = next(c for c in grid.CELLS if c.experiment == "decision" and "cpu" in c.profiles)
    operations, moved = total(roofline.costs(roofline.typed(cell.config("cpu")))[0])
    assert operations > 0 and moved > 0
