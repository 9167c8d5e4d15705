"""Tables, figures and report are functions of records; the planner does every run once. No model is run here."""

import csv
import io
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from experiments import data, files, grid, records
from experiments.config import FORMER, MODELS, PROFILES, run_id
from experiments.decision import data as decision_data
from experiments.launch import compose
from scripts import migrate, reproduce
from scripts.draw import cells, figures, findings, report, summary, tables
from scripts.planner import agenda, datasets, processes
from scripts.planner.said import duration, seconds

ROOT = Path(__file__).parent.parent
SENTINEL = 77777.7


def make_record(run, last, best=None, status="done", **changes):
    steps = run.config["train"]["steps"]
    metrics = {
        which: {"step": steps, "test_accuracy": value, "test_loss": 1.0, "val_accuracy": value, "val_loss": 1.0}
        for which, value in (("last", last), ("best", last if best is None else best))
    }
    for which, value in (("last", last), ("best", last if best is None else best)):
        metrics[which] |= {f"test_score_at_{asked}": asked * value for asked in (20, 100)}
        metrics[which] |= {"test_score": 100 * value, "val_score": 100 * value}
    curve = [[steps * (i + 1) // 10, float(i), last * (i + 1) / 10] for i in range(10)]
    return {
        "schema_version": 2, "run_id": run.run_id, "experiment": run.experiment, "profile": run.config["profile"],
        "config": run.config, "seed": run.seed, "status": status, "reason": None,
        "metrics": metrics if status == "done" else {},
        "curves": dict.fromkeys(("train_loss", "val_accuracy", "val_loss", "val_score"), curve),
        "steps": steps, "seconds": 100.0, "tokens_per_second": 1e5, "peak_memory": 1e9, "parameters": 227136,
        "git": {"commit": "0123456789abcdef", "clean": True}, "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "hardware": {"device": "cpu", "cpu": "Some CPU", "cores": 2, "threads": 1}, "started": 1e9, "ended": 1e9 + 100,
    } | changes  # fmt: skip


def put(results, record):
    records.write_json(records.record_path(results, record["experiment"], record["run_id"]), record)


def find(profile, label, seeds=3, experiment="selective_copy"):
    """The runs of a label, by seed."""
    return [run for run in grid.runs(profile, seeds) if run.label == f"{experiment}: {label}"]


def long(path):
    with path.open(newline="") as file:
        return {(line["row"], line["column"]): line for line in csv.DictReader(file)}


def fill(results, profile):
    for i, run in enumerate(grid.runs(profile, 2)):
        put(results, make_record(run, 0.2 + 0.02 * (i % 20)))


# -- the grid


@pytest.mark.parametrize("profile", PROFILES)
def test_every_cell_composes_and_every_run_is_done_once(profile):
    every = grid.runs(profile, 2)
    assert len({run.run_id for run in every}) == len(every)
    runs = [run for run in every if run.seed != grid.CHOICE_SEED]
    assert len({run.group for run in runs}) == len(runs) // 2
    assert all(run.config["profile"] == profile and run.config["seed"] == run.seed for run in every)
    # Every cell is filled, by one group of runs; those of both tables' three layers share theirs.
    filled = [cell for run in every if run.seed in (0, grid.CHOICE_SEED) for cell in run.cells]
    assert sorted(filled, key=grid.CELLS.index) == [cell for cell in grid.CELLS if profile in cell.profiles]
    for row in ("minGRU", "minLSTM"):
        shared = next(run for run in runs if run.label == f"selective_copy: {row}, layers 3")
        more = {"forget_bias"} if row == "minLSTM" and profile != "smoke" else set()
        assert {cell.table for cell in shared.cells} == {"table1_layers", "table2_selective_copy"} | more


def test_the_most_wanted_come_first_and_seeds_one_after_another():
    *runs, last = grid.runs("cpu", 2)
    assert last.seed == grid.CHOICE_SEED
    runs = [run for run in runs if run.seed < 2]
    language = [run.label.split(": ") for run in runs if run.seed == 0][:7]
    assert language[0] == ["charlm", "minGRU"] and {experiment for experiment, _ in language} == {"charlm"}
    labels = [run.label.removeprefix("selective_copy: ") for run in runs if run.experiment == "selective_copy"]
    assert labels[:3] == ["minGRU, layers 3", "minLSTM, layers 3", "minGRU, layers 1"]
    assert [run.seed for run in runs] == [0] * (len(runs) // 2) + [1] * (len(runs) // 2)
    assert labels.index("No gate S4") < labels.index("Mamba S6") < labels.index("GRU")


def test_baselines_train_as_in_the_mamba_paper_and_minimal_rnns_as_their_sources_say():
    for label in grid.selective_copy.ROWS:
        minimal = label in ("minGRU", "minLSTM")
        for profile in ("paper", "cpu"):
            config = find(profile, f"{label}, layers 3" if minimal else label, 1)[0].config
            baseline = config["model"]["name"] == "ssm"
            assert config["model"]["layers"] == (2 if baseline else 3)
            assert config["train"]["weight_decay"] == (0 if baseline else 0.05)
            if profile == "paper":
                assert config["train"]["learning_rate"] == (1e-4 if baseline else 3e-4)
    for row in ("minGRU", "minLSTM"):
        train = find("paper", f"{row}, the text's Adam", 1)[0].config["train"]
        assert (train["learning_rate"], train["weight_decay"]) == (1e-4, 0)


def test_plain_rnns_have_the_parameters_of_the_minimal_ones():
    from minrnn.mixers import make

    def size(label):
        model = find("paper", label, 1)[0].config["model"]
        mixer = make(**MODELS[model["name"]](**model).mixer(64))
        return sum(p.numel() for p in mixer(model["dim"]).parameters())

    assert size("GRU") == pytest.approx(size("minGRU, layers 3"), rel=0.01)
    assert size("LSTM") == pytest.approx(size("minLSTM, layers 3"), rel=0.03)


def test_every_published_value_has_its_cell():
    known = {(cell.table, cell.row, cell.column, cell.metric) for cell in grid.CELLS}
    published = cells.read_paper()
    assert {key for key in published if key[0] != "efficiency"} <= known  # those are held in test_efficiency.py
    unconfirmed = {key[:3] for key, value in published.items() if not value.confirmed}
    assert {key[1:] for key in unconfirmed if key[0] == "table1_layers"} == {
        (row, column) for row in ("minLSTM", "minGRU") for column in ("1", "2")
    }
    d4rl = {key[:3] for key in published if key[0] == "table3_d4rl"}
    assert len(d4rl) == 54 and d4rl - unconfirmed == {("table3_d4rl", "DMamba", "hopper-medium")}
    assert {table for table, _, _ in unconfirmed} == {"table1_layers", "table3_d4rl"}
    assert published["table1_layers", "minGRU", "3", "test_accuracy_percent"].value == 99.5


# -- tables


def test_means_and_deviations_are_those_computed_by_hand(tmp_path):
    for run, last, best in zip(find("paper", "minGRU, layers 3"), (0.97, 0.98, 0.99), (0.98, 0.99, 0.995), strict=True):
        put(tmp_path, make_record(run, last, best))
    put(tmp_path, make_record(find("paper", "minLSTM, layers 1")[1], 0.4))
    tables.write_all(tmp_path)
    lines = long(tmp_path / "tables/table1_layers.csv")
    gru = lines["minGRU", "3"]
    assert (gru["metric"], gru["n"], gru["paper"], gru["paper_confirmed"]) == (
        "test_accuracy_percent",
        "3",
        "99.5",
        "yes",
    )
    assert float(gru["mean"]) == pytest.approx(98) and float(gru["std"]) == pytest.approx(1)  # n - 1 below the sum
    assert float(gru["best_mean"]) == pytest.approx(98.833333333)
    assert float(gru["best_std"]) == pytest.approx(0.763762616)
    assert gru["run_ids"].split() == [run.run_id for run in find("paper", "minGRU, layers 3")]
    one = lines["minLSTM", "1"]
    assert (one["n"], one["mean"], one["std"], one["best_std"], one["paper_confirmed"]) == ("1", "40", "", "", "no")
    text = (tmp_path / "tables/table1_layers.md").read_text()
    assert re.search(r"\| minGRU +\| +3 \| 98.0 ± 1.0 \| 98.8 ± 0.8 \| +3 \| +227,136 \| +99.5 ± 0.2 \| +-1.5 \|", text)
    assert re.search(r"\| minLSTM +\| +1 \| +40.0 \| +40.0 \| +1 \| +227,136 \| 37.6 ± 2.0 † \| +\+2.4 \|", text)
    # The same run fills a cell of the other table.
    other = long(tmp_path / "tables/table2_selective_copy.csv")["minGRU", "accuracy"]
    assert (other["mean"], other["run_ids"]) == (gru["mean"], gru["run_ids"])


def test_what_was_not_run_is_blank_and_what_failed_is_said(tmp_path):
    runs = find("cpu", "H3 Hyena")
    put(tmp_path, make_record(runs[0], 0.3))
    put(tmp_path, make_record(runs[1], 0, status="diverged", reason="the training loss was nan at step 9"))
    failed = make_record(find("cpu", "LSTM", 1)[0], 0, status="failed", reason="RuntimeError: <no> memory\nand more")
    put(tmp_path, {key: failed[key] for key in failed if key not in ("curves", "steps", "seconds", "parameters")})
    tables.write_all(tmp_path)
    lines = long(tmp_path / "tables/table2_selective_copy_cpu.csv")
    assert len(lines) == sum(cell.table == "table2_selective_copy" and "cpu" in cell.profiles for cell in grid.CELLS)
    for row, n, mean in (("H3 Hyena", "1", "30"), ("LSTM", "0", ""), ("Mamba S6", "0", "")):
        line = lines[row, "accuracy"]
        assert (line["n"], line["mean"], line["std"]) == (n, mean, "")
    text = (tmp_path / "tables/table2_selective_copy_cpu.md").read_text()
    assert "| 30.0 (1 diverged) |" in text and re.search(r"\| LSTM +\| +1 failed \|", text)
    assert re.search(r"\| Mamba S6 +(\| +){4}\| +99.8 \|", text)
    assert not (tmp_path / "tables/table1_layers_cpu.md").exists()  # no record of its cells
    report.write_all(tmp_path)
    page = (tmp_path / "REPORT.md").read_text()
    assert "H3 Hyena, seed 1 diverged: the training loss was nan at step 9" in page
    assert "LSTM, seed 0 failed: RuntimeError: &lt;no> memory (" in page
    assert "Not run:" in page and "Mamba S6" in page.split("Not run:")[1].splitlines()[0]


def test_only_the_papers_own_scale_is_compared_with_it(tmp_path):
    for profile in ("paper", "cpu"):
        fill(tmp_path, profile)
    tables.write_all(tmp_path)
    config = find("cpu", "minGRU, layers 3", 1)[0].config
    for table in ("table1_layers", "table2_selective_copy"):
        paper, cpu = ((tmp_path / f"tables/{table}{suffix}.md").read_text() for suffix in ("", "_cpu"))
        assert "ours - paper" in paper and "ours - paper" not in cpu
        assert "Scaled down" in cpu and f"body length {config['data']['length']} (paper: 4,096)" in cpu
        assert "steps 400,000" in paper and "Some CPU (2 cores, 1 thread per run)" in paper and "seeds 0, 1" in paper
    assert "overlaps the paper's" in report.page(tmp_path, ("paper",), cells.load(tmp_path), cells.PAPER)
    assert "overlaps the paper's" not in report.page(tmp_path, ("cpu",), cells.load(tmp_path), cells.PAPER)


def test_a_table_of_a_scaled_profile_alone_names_the_papers_scale(tmp_path):
    fill(tmp_path, "cpu")
    tables.write_all(tmp_path)
    text = (tmp_path / "tables/decision_variants_cpu.md").read_text()
    assert "width 64 (paper: 128), steps 3,000 (paper: 100,000)" in text
    assert not any(cell.table == "decision_variants" for run in grid.runs("paper", 1) for cell in run.cells)


def test_naming_the_commonest_symbol_is_right_as_often_as_drawn():
    draw = random.Random(0)
    for tokens, vocab in ((8, 16), (16, 16), (1, 5)):
        counts = [max(Counter(draw.choices(range(vocab - 2), k=tokens)).values()) / tokens for _ in range(20_000)]
        exact = grid.selective_copy.commonest({"data": {"tokens": tokens, "vocab": vocab}})
        assert exact == pytest.approx(100 * sum(counts) / len(counts), abs=0.3)


def test_unconfirmed_values_are_marked_everywhere(tmp_path):
    fill(tmp_path, "paper")
    tables.write_all(tmp_path)
    text = (tmp_path / "tables/table1_layers.md").read_text()
    marked = [line for line in text.splitlines() if line.startswith("| min") and "†" in line]
    assert len(marked) == 4 and "† Unconfirmed" in text
    assert not any(line.split("|")[2].strip() == "3" for line in marked)
    latex = (tmp_path / "tables/table1_layers.tex").read_text()
    assert latex.count(r"$^\dagger$") == 5 and r"\toprule" in latex and r", \%" in latex and "±" not in latex


def test_a_value_of_the_paper_stands_in_its_columns_only(tmp_path):
    """Poisoned values are looked for in everything that is written."""
    poisoned = tmp_path / "paper.csv"
    lines = list(csv.DictReader(io.StringIO(cells.PAPER.read_text())))
    with poisoned.open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0].keys())
        writer.writeheader()
        writer.writerows(line | {"value": SENTINEL} for line in lines)
    for profile in ("paper", "cpu"):
        fill(tmp_path, profile)
    tables.write_all(tmp_path, poisoned)
    report.write_all(tmp_path, poisoned)
    seen = 0
    for path in (tmp_path / "tables").glob("*.csv"):
        for line in csv.DictReader(path.open(newline="")):
            assert not any(str(SENTINEL) in value for key, value in line.items() if key != "paper")
            seen += line["paper"] == str(SENTINEL)
    for path in [*(tmp_path / "tables").glob("*.md"), *(tmp_path / "tables").glob("*.tex"), tmp_path / "REPORT.md"]:
        for line in path.read_text().splitlines():
            parts = [part.strip() for part in re.split(r"[|&]", line.removesuffix(r"\\").strip("| "))]
            if parts[0] == "model":
                heads = [i for i, name in enumerate(parts) if name.startswith(("paper", "nanoGPT"))]
            elif str(SENTINEL) in line:
                found = [i for i, part in enumerate(parts) if str(SENTINEL) in part]
                assert found == heads or parts[1] == "paper"  # its line, where the models stand side by side
                seen += len(found)
    places = {(cell.table, cell.row, cell.column): {"paper", "cpu"} & set(cell.profiles) for cell in grid.CELLS}
    places_of = [(line["table"], line["row"], line["column"]) for line in lines if line["table"] != "efficiency"]
    shown = sum(len(places[place]) for place in places_of)
    assert seen == shown * 4  # csv, md, tex and report


def test_the_report_says_what_the_numbers_say(tmp_path):
    values = {
        "minGRU, layers 1": 0.44, "minGRU, layers 2": 0.92, "minGRU, layers 3": 0.99, "No gate S4": 0.12,
        "minLSTM, layers 1": 0.5, "minLSTM, layers 2": 0.4, "minLSTM, layers 3": 0.95,
    }  # fmt: skip
    for label, value in values.items():
        put(tmp_path, make_record(find("cpu", label, 1)[0], value))
    report.write_all(tmp_path)
    page = (tmp_path / "REPORT.md").read_text()
    assert "The rows share 1 seed, too few for a verdict." in page and "above 95" not in page
    for label, value in values.items():
        put(tmp_path, make_record(find("cpu", label)[1], value))
    put(tmp_path, make_record(find("cpu", "No gate S4")[2], 0.9))  # a seed that the other rows do not have
    report.write_all(tmp_path)
    page = (tmp_path / "REPORT.md").read_text()
    assert "minGRU with 3 layers reaches 99.0 ± 0.0 % (n = 2), above 95 %." in page
    assert "minLSTM with 3 layers reaches 95.0 ± 0.0 % (n = 2), not above 95 %." in page
    assert "Rows differ in n; they share seeds 0, 1." in page
    assert "The accuracy of minGRU rises with each layer (1, 2, 3: 44.0 → 92.0 → 99.0)." in page
    assert "The accuracy of minLSTM does not rise with each layer" in page
    assert "No gate S4, a time-invariant layer, reaches 12.0 ± 0.0 % (n = 2), no more than the 20.4 % of" in page
    for link in re.findall(r"\]\((runs/[^)]+)\)", page):
        assert (tmp_path / link).exists()
    put(tmp_path, make_record(find("smoke", "GRU", 1)[0], 0.1))
    report.write_all(tmp_path)
    assert (tmp_path / "REPORT.md").read_text() == page and "smoke" in (tmp_path / "REPORT_smoke.md").read_text()


def test_what_is_said_of_character_models(tmp_path):
    """The Transformer ends at 1.9 after 2000 steps; minGRU, at 1.4 in the end, has come to 1.9 after 1000."""

    def put_curve(run, at_1000, last):
        steps = run.config["train"]["steps"]
        values = {"step": steps, "val_loss": last, "test_loss": last + 0.02}
        curve = [[step, 1.0, value] for step, value in ((steps // 4, 2.5), (steps // 2, at_1000), (steps, last))]
        put(tmp_path, make_record(run, 0.5, metrics={"last": values, "best": values}, curves={"val_loss": curve}))

    calibration = ("Transformer, 4 layers, 128 wide", 2.1, 1.8)
    for label, at_1000, last in (("minGRU", 1.8, 1.4), ("Transformer", 2.1, 1.8), ("minLSTM", 2.0, 1.9), calibration):
        for i, run in enumerate(find("cpu", label, 2, "charlm")):
            put_curve(run, at_1000 + 0.1 * i, last + 0.1 * i)
    report.write_all(tmp_path)
    page = (tmp_path / "REPORT.md").read_text()
    assert "lowest first: minGRU 1.450, Transformer 1.850, minLSTM 1.950." in page
    assert "minGRU minus Transformer is -0.400 nats, which meets the criterion of at most +0.05." in page
    assert "minLSTM minus Transformer is +0.100 nats, which misses the criterion" in page
    assert "The Transformer's mean curve is lowest at step 2,000 (1.850). " in page
    assert "the Transformer's steps over theirs: minGRU 1,000 (2.0 x)." in page
    assert "above their lowest point: none." in page
    assert "Transformer, 4 layers, 128 wide reaches 1.850, within 0.03 nats of the published loss." in page
    # 12 blocks of 64 characters at 100,000 a second, 2000 times
    assert "Transformer, 4 layers, 128 wide trains for 15 s" in page
    row = next(line for line in page.splitlines() if line.startswith("| minGRU "))
    assert [cell.strip() for cell in row.split("|")][2:6] == [
        "1.450 ± 0.071",
        "1.450 ± 0.071",
        "1.470 ± 0.071",
        "2000 ± 0",
    ]
    tables.write_all(tmp_path)
    line = long(tmp_path / "tables/charlm_cpu.csv")["minGRU", "whole text (best)"]
    assert (line["metric"], line["best_mean"], line["paper"]) == ("whole_loss_nats", "1.47", "")
    assert [path.name for path in figures.write_all(tmp_path)] == ["charlm_loss_cpu.png"]
    (_, _, found) = next(t for t in cells.measured_tables(cells.load(tmp_path)) if t[0] == "charlm")
    against_steps, against_time = figures.loss_against_steps_and_time("charlm", found).axes
    assert max(against_steps.lines[0].get_xdata()) == 2000
    assert max(against_time.lines[0].get_xdata()) == pytest.approx(2000 * 12 * 64 / 1e5 / 60)  # minutes


def test_the_steps_of_a_claim_are_of_curves_not_of_their_lowest_points(tmp_path):
    """Two models with the same curves, each seed lowest elsewhere: they take the same number of steps."""
    for label in ("minGRU", "Transformer"):
        for i, run in enumerate(find("cpu", label, 2, "charlm")):
            curve = [[500, 1.0, 2.5], [1000, 2.0, 1.8 + 0.1 * i], [1500, 3.0, 1.92 - 0.1 * i], [2000, 4.0, 1.95]]
            metrics = {"step": 1000 + 500 * i, "val_loss": 1.8, "test_loss": 1.8}
            metrics = {"best": metrics, "last": metrics | {"step": 2000, "val_loss": 1.95}}
            put(tmp_path, make_record(run, 0.5, metrics=metrics, curves={"val_loss": curve}))
    report.write_all(tmp_path)
    page = (tmp_path / "REPORT.md").read_text()
    assert "is lowest at step 1,000 (1.850). " in page
    assert "minGRU 1,000 (1.0 x)." in page
    assert "above their lowest point: minGRU (by 0.100), Transformer (by 0.100)." in page


def test_runs_whose_file_is_nowhere_are_left_out(tmp_path, monkeypatch, capsys):
    def find_nothing(name):
        raise data.DataError(f"{name} is nowhere")

    monkeypatch.setattr(data, "find", find_nothing)
    runs = grid.runs("smoke", 1)
    planner = processes.Planner(runs, str(tmp_path), str(tmp_path), lambda run, seconds: [])
    waiting = datasets.leave_without_data(planner, datasets.missing(planner))
    rest = [run.label for run in planner.runs if run.experiment == "charlm"]
    assert len(waiting) == 6 and rest == ["charlm: minGRU"] and len(planner.runs) == len(runs) - 6
    assert capsys.readouterr().out.count("tinyshakespeare is nowhere") == 1
    for run in runs:  # what is done needs no data
        put(tmp_path, make_record(run, 0.5))
    assert datasets.leave_without_data(processes.Planner(runs, str(tmp_path), "", lambda *_: [])) == []


def test_local_data_is_made_after_all_that_needs_none(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(sys, "argv", ["reproduce", "--profile", "smoke", "--results-dir", str(tmp_path)])
    monkeypatch.setenv("MINRNN_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "find", lambda name: None)
    monkeypatch.setattr(reproduce, "measure", lambda *_: 0)
    monkeypatch.setattr(processes.Planner, "go", lambda self: calls.append([run.experiment for run in self.runs]))

    def collect(planner, names):
        calls.append(list(names))
        (tmp_path / "local").mkdir()
        (tmp_path / "local/hopper-random.hdf5").touch()

    monkeypatch.setattr(datasets, "collect", collect)
    reproduce.main()
    before, made, after = calls
    assert made == ["local/hopper-random"] and "decision" not in before and "charlm" in before
    assert set(after) == {"charlm", "selective_copy", "decision"}


def test_scores_on_two_files_of_one_name_are_not_joined(tmp_path, monkeypatch, capsys):
    first, second = find("cpu", "DT, dataset hopper-medium", 2, "decision")
    put(tmp_path / "a", make_record(first, 0.5, facts={"dataset_sha256": "old"}))
    planner = processes.Planner([first, second], str(tmp_path / "a"), "", lambda *_: [])
    monkeypatch.setenv("MINRNN_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)  # data/ is looked for here too
    assert datasets.leave_without_data(planner, datasets.missing(planner)) == []  # there is no file
    nowhere = processes.Planner([first, second], str(tmp_path / "a"), "", lambda *_: [])
    assert datasets.leave_without_data(nowhere) == [second]
    assert "hopper-medium is not here: python -m scripts.collect env=hopper level=medium" in capsys.readouterr().out
    (tmp_path / "local").mkdir()
    (tmp_path / "local/hopper-medium.hdf5").touch()
    monkeypatch.setattr(decision_data, "dataset_checksum", lambda path, name: "new")
    assert datasets.leave_without_data(planner) == [second] and planner.runs == [first]
    monkeypatch.setattr(decision_data, "dataset_checksum", lambda path, name: "old")
    assert datasets.leave_without_data(processes.Planner([first, second], str(tmp_path / "a"), "", lambda *_: [])) == []
    put(tmp_path / "a", make_record(second, 0.5, facts={"dataset_sha256": "new"}))
    with pytest.raises(records.RecordError, match="of two files local/hopper-medium: .* not joined"):
        cells.load(tmp_path / "a")


def test_interquartile_means_are_of_the_same_datasets(tmp_path):
    for dataset, seeds in (("hopper-medium", 2), ("hopper-medium-expert", 2), ("walker2d-medium", 1)):
        for model in ("minGRU", "DT"):
            if (model, dataset) != ("DT", "walker2d-medium"):
                for run in find("cpu", f"{model}, dataset {dataset}", seeds, "decision"):
                    put(tmp_path, make_record(run, 0.9 if "walker" in dataset else 0.2 + 0.1 * run.seed))
    found = next(found for table, _, found in cells.measured_tables(cells.load(tmp_path)) if table == "decision_local")
    (ax,) = figures.interquartile("decision_local", found).axes
    assert ax.get_title(loc="left") == "hopper-medium, hopper-medium-expert"
    assert [line.get_xdata()[0] for line in ax.lines if line.get_marker() in "os"] == pytest.approx([25, 25])


def test_only_some_runs_are_asked_for():
    def labels(only):
        return {run.label for run in reproduce.selected(grid.runs("cpu", 1), only)}

    assert labels("Layers 3") == {"selective_copy: minGRU, layers 3", "selective_copy: minLSTM, layers 3"}
    assert labels("hopper-medium-replay") == {
        f"decision: {model}, dataset hopper-medium-replay" for model in grid.decision.MODELS
    }
    assert "charlm: minGRU" in labels("minGRU, convention nanogpt")  # a cell of another table, filled by the same run
    assert not labels("mingru, layers 4")
    every = {run.label for run in grid.runs("cpu", 1)}
    asked = {label for label in every if "walker2d" in label or "halfcheetah" in label or "learning rate" in label}
    assert labels(None) == every - asked and len(labels("walker2d")) == 3 * 6 + 1 == len(labels("halfcheetah")) + 1
    paper = grid.runs("paper", 1)
    assert reproduce.selected(paper, None) == paper


@pytest.mark.parametrize("last, said", [(0.9, "rises with each"), (0.3, "does not rise with each")])
def test_what_is_said_of_the_forget_gates_bias(tmp_path, last, said):
    for bias, value in (("minLSTM, layers 3", 0.2), ("bias 1", 0.4), ("bias 2", 0.6), ("bias 4", last)):
        for run in find("cpu", bias, 2):
            put(tmp_path, make_record(run, value))
    report.write_all(tmp_path)
    page = (tmp_path / "REPORT.md").read_text()
    assert "11.0 (bias 0) → 22.0 (bias 1) → 33.0 (bias 2)" in page and said in page


def test_without_torch_and_twice_the_same(tmp_path):
    fill(tmp_path / "results", "paper")
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}

    def call(*arguments):
        command = [sys.executable, "-W", "error::UserWarning", "-m", *arguments]  # such as of a figure's layout
        command += ["--results-dir", str(tmp_path / "results")]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True, cwd=ROOT).stdout

    assert "table1_layers.md" in call("scripts.tables")
    assert "table2_selective_copy_loss.png" in call("scripts.figures")
    assert "REPORT.md" in call("scripts.report")
    assert "figures/table2_selective_copy_accuracy.png" in (tmp_path / "results/REPORT.md").read_text()
    count = len(grid.runs("paper", 1))
    assert f"{count} of {count} runs done, 0 left" in call("scripts.reproduce", "--profile", "paper", "--list")
    files = sorted(path for path in (tmp_path / "results").rglob("*") if path.is_file() and "runs" not in path.parts)
    before = {path: path.read_bytes() for path in files}
    for module in (tables, figures, report):
        module.write_all(tmp_path / "results")
    assert {path: path.read_bytes() for path in files} == before and len(files) == 9 * 3 + (4 + 2 * 3 + 2 + 1) * 2 + 1


def test_figures_of_a_single_run(tmp_path):
    put(tmp_path, make_record(find("smoke", "GRU", 1)[0], 0.1))
    names = [path.name for path in figures.write_all(tmp_path)]
    assert names == ["table2_selective_copy_accuracy_smoke.png", "table2_selective_copy_loss_smoke.png"]


# -- the planner

STUB = """
import os, signal, sys, time
from pathlib import Path
from experiments import files, records
name, results, outputs, ran, seconds, run_id, behaviour = sys.argv[1:]
path = records.record_path(results, "selective_copy", run_id)
if records.is_final(records.read_record(path)):
    sys.exit(0)
with files.claim(records.record_path(results, "selective_copy", run_id).parent) as mine:
    if not mine:
        sys.exit(75)
    with open(ran, "a") as file:
        file.write(f"{name} {run_id} {seconds}\\n")
    if behaviour == "crash":
        print("a last word")
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "wait":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        Path(ran).with_suffix(".waiting").touch()
        time.sleep(60)
    time.sleep(0.05)
    record = records.json.loads(Path(ran).with_name(f"{run_id}.json").read_text())
    status = {"fail": "failed", "diverge": "diverged"}.get(behaviour, "done")
    record.update(run_id=run_id, status=status, ended=time.time())
    if status != "done":
        record.update(reason="as told", metrics={})
    records.write_json(path, record)
sys.exit(1 if behaviour == "fail" else 0)
"""


class World:
    """A folder with results, a stub in place of experiments, and a note of what it ran."""

    def __init__(self, folder):
        self.folder = folder
        self.runs = [run for run in grid.runs("smoke", 1) if run.experiment == "selective_copy"][:8]
        for run in self.runs:
            records.write_json(folder / f"{run.run_id}.json", make_record(run, 0.5))
        (folder / "stub.py").write_text(STUB)

    def planner(self, name="one", behaviours=None, **settings):
        def command(run, seconds):
            places = [self.folder / "results", self.folder / "outputs", self.folder / "ran.txt"]
            behaviour = (behaviours or {}).get(run.label, "done")
            return [
                sys.executable,
                str(self.folder / "stub.py"),
                name,
                *map(str, places),
                str(seconds),
                run.run_id,
                behaviour,
            ]

        return processes.Planner(
            self.runs, str(self.folder / "results"), str(self.folder / "outputs"), command, **settings
        )

    @property
    def ran(self):
        path = self.folder / "ran.txt"
        return [line.split()[1] for line in path.read_text().splitlines()] if path.exists() else []

    def record(self, run):
        return records.read_record(records.record_path(self.folder / "results", run.experiment, run.run_id))


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return World(tmp_path)


def test_runs_go_in_order_and_are_not_repeated(world):
    renewed = []
    world.planner(renew=lambda: renewed.append(len(world.ran))).go()
    assert world.ran == [run.run_id for run in world.runs]
    assert renewed == list(range(1, 9))
    again = world.planner()
    assert again.left() == []
    again.go()
    assert len(world.ran) == 8


def test_a_failure_is_recorded_and_tried_again_once_by_the_next_call(world, capsys):
    crash, fail, diverge = (world.runs[i] for i in (0, 1, 2))
    behaviours = {crash.label: "crash", fail.label: "fail", diverge.label: "diverge"}
    for call in (1, 2):
        world.planner(behaviours=behaviours, workers=2).go()
        assert [world.ran.count(run.run_id) for run in world.runs] == [call, call, *[1] * 6]
    record = world.record(crash)
    assert record["status"] == "failed" and record["config"] == crash.config and record["seed"] == crash.seed
    assert "SIGKILL" in record["reason"] and "a last word" in record["reason"]
    assert world.record(fail)["reason"] == "as told" and world.record(diverge)["status"] == "diverged"
    assert "minGRU, layers 3, seed 0: failed, killed by SIGKILL" in capsys.readouterr().out
    third = world.planner()
    third.go()
    assert third.left() == [] and world.record(crash)["status"] == "done"


def test_a_failure_from_a_clock_that_is_ahead_is_tried_again(world):
    run = world.runs[0]
    put(world.folder / "results", make_record(run, 0, status="failed", reason="then", ended=time.time() + 1e6))
    world.planner().go()
    assert world.ran.count(run.run_id) == 1 and world.record(run)["status"] == "done"


PLANNER = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.test_scripts import World
planner = World(Path(sys.argv[1])).planner(sys.argv[2], behaviours=dict(a.split("=") for a in sys.argv[3:]), workers=2)
print("ready", flush=True)
sys.stdin.readline()
planner.go()
print("left", len(planner.left()), "signal", planner.signal)
"""


def start(world, name, *behaviours):
    program = PLANNER.format(root=str(ROOT))
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(world.folder), name, *behaviours],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    return process


def test_two_planners_at_once_do_every_run_exactly_once(world):
    planners = [start(world, name) for name in ("one", "two")]
    for planner in planners:
        assert planner.stdout.readline() == "ready\n"
    for planner in planners:
        planner.stdin.write("go\n")
        planner.stdin.flush()
    for planner in planners:
        assert "left 0" in planner.communicate(timeout=120)[0]
    assert sorted(world.ran) == sorted(run.run_id for run in world.runs)
    workers = {line.split()[0] for line in (world.folder / "ran.txt").read_text().splitlines()}
    assert workers == {"one", "two"}


def test_a_run_that_another_process_has_is_come_back_to(world, monkeypatch):
    """First it is claimed; then its process dies without a record, and the run is free again."""
    monkeypatch.setattr(processes, "LOOK", 0.1)
    first = world.runs[0]
    holder = files.claim(records.record_path(world.folder / "results", first.experiment, first.run_id).parent)
    assert holder.__enter__()
    world.planner(renew=lambda: len(world.ran) == 7 and holder.__exit__(None, None, None)).go()
    assert world.ran == [run.run_id for run in [*world.runs[1:], first]]


def test_told_to_stop_it_lets_its_runs_stop_and_the_next_call_goes_on(world):
    planner = start(world, "one", f"{world.runs[1].label}=wait")
    planner.stdin.write("go\n")
    planner.stdin.flush()
    waiting = world.folder / "ran.waiting"
    until = time.monotonic() + 120
    while not (waiting.exists() and sum(map(bool, map(world.record, world.runs))) == 7) and time.monotonic() < until:
        time.sleep(0.05)
    planner.send_signal(signal.SIGTERM)
    assert f"left 1 signal {int(signal.SIGTERM)}" in planner.communicate(timeout=120)[0]
    assert world.record(world.runs[1]) is None  # nothing failed
    world.planner().go()
    assert world.ran.count(world.runs[1].run_id) == 2 and world.record(world.runs[1])["status"] == "done"


def test_the_budget_is_passed_on_and_ends_it(world, monkeypatch):
    monkeypatch.setattr(processes, "LEAST", 0.5)
    monkeypatch.setattr(processes, "GRACE", 0.1)
    planner = world.planner(behaviours={world.runs[2].label: "wait"}, budget=3)
    began = time.monotonic()
    planner.go()
    assert time.monotonic() - began < 6
    assert [run.run_id for run in planner.left()] == [run.run_id for run in world.runs[2:]]
    passed = [float(line.split()[2]) for line in (world.folder / "ran.txt").read_text().splitlines()]
    assert passed == sorted(passed, reverse=True) and passed[0] <= 3
    assert world.record(world.runs[2]) is None


def test_a_run_that_always_stops_early_is_given_up(world, monkeypatch, capsys):
    monkeypatch.setattr(processes, "LOOK", 0.0)
    planner = world.planner()
    planner.runs = world.runs[:1]
    planner.command = lambda run, seconds: [sys.executable, "-S", "-c", "raise SystemExit(75)"]
    planner.go()
    assert planner.tries[world.runs[0].run_id] == processes.TRIES and planner.left() == world.runs[:1]
    assert "it stopped 3 times before its end" in capsys.readouterr().out


def test_time_left_is_foretold_from_records(world, monkeypatch):
    monkeypatch.setattr(agenda, "has_gpu", lambda: False)
    planner = world.planner(workers=2)
    assert planner.seconds_left() is None
    put(world.folder / "results", make_record(world.runs[0], 0.5))  # 100 s
    assert world.planner(workers=2).seconds_left() == pytest.approx(7 * 100 / 2)
    monkeypatch.setattr(agenda, "has_gpu", lambda: True)  # another machine's times tell nothing
    assert world.planner(workers=2).seconds_left() is None


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--profile", "cup"], "'cup' (choose from"),
        (["--budget", "20x"], "expected a time such as 90s, 20m or 2h, got '20x'"),
        (["--budget", "0m"], "got '0m'"),
        (["--workers", "0"], "expected a number from 1 up, got '0'"),
        (["--seeds", "two"], "expected a number from 1 up, got 'two'"),
        (["--seeds", "99999"], "expected 1 to 1000, got 99999"),
    ],
)
def test_unusable_input_is_named(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["reproduce", *arguments])
    with pytest.raises(SystemExit) as error:
        reproduce.parse()
    assert error.value.code == 2 and said in capsys.readouterr().err


def test_overrides_must_leave_the_runs_what_they_are():
    run = grid.runs("smoke", 1)[0]
    reproduce.check(run, ["threads=1", "wandb.mode=online", "micro_batches=2"])
    for wrong, said in (("train.steps=5", "change no result"), ("trian.steps=5", "trian")):
        with pytest.raises(SystemExit, match=said):
            reproduce.check(run, [wrong])


def test_times_are_read_and_said():
    assert [seconds(text) for text in ("90s", "20m", "1.5h")] == [90, 1200, 5400]
    assert [duration(s) for s in (90.4, 1200, 9000)] == ["90 s", "20 min", "2.5 h"]


# -- one command is one cell


@pytest.mark.parametrize("profile", PROFILES)
def test_every_command_that_the_report_prints_gives_its_run(tmp_path, profile):
    for run in grid.runs(profile, 2):
        put(tmp_path, make_record(run, 0.5))
    report.write_all(tmp_path)
    text = (tmp_path / ("REPORT_smoke.md" if profile == "smoke" else "REPORT.md")).read_text()
    lines = re.findall(r"^- .*?: `python -m experiments\.(\w+) (.*?) seed=(\d+)`: (.*)$", text, re.MULTILINE)
    assert len(lines) == sum(profile in cell.profiles for cell in grid.CELLS)
    for experiment, settings, seed, links in lines:
        config = compose(experiment, [*shlex.split(settings), f"seed={seed}"])
        assert f"[{run_id(config)}](runs/{experiment}/{run_id(config)}/record.json) (seed {seed}, done)" in links


def test_every_committed_record_is_what_its_folder_and_its_settings_say():
    paths = sorted((ROOT / "results/runs").glob("*/*/record.json"))
    assert paths
    for path in paths:
        record = records.read_record(path)
        place = (record["experiment"], record["run_id"])
        assert place == path.parts[-3:-1] and run_id(record["config"]) == record["run_id"], path


def test_the_finalists_of_each_row_are_the_two_best_rates_of_those_tried():
    """In profile cpu, by the committed records."""
    entries = cells.entries("selective_copy_learning_rate", "cpu", cells.load(ROOT / "results"), {})
    for row, finalists in grid.selective_copy.FINALISTS.items():
        mine = sorted((e for e in entries if e.cell.row == row), key=lambda e: -e.mean("best"))
        assert tuple(e.cell.column for e in mine[:2]) == finalists, row


@pytest.mark.parametrize("table", ["charlm_learning_rate", grid.selective_copy.FINAL, "decision_learning_rate"])
def test_the_learning_rate_of_each_row_is_the_best_of_those_tried(table):
    """In profile cpu, by the committed records."""
    entries = cells.entries(table, "cpu", cells.load(ROOT / "results"), {})
    for row in dict.fromkeys(entry.cell.row for entry in entries):
        mine = [entry for entry in entries if entry.cell.row == row]
        assert all(entry.done for entry in mine), f"{table}: {row} was not tried at each rate"
        settings = [s for s in mine[0].cell.settings("cpu") if not s.startswith("train.")]
        used = compose(mine[0].cell.experiment, settings)["train"]["learning_rate"]
        assert used == float(findings.best_rate(mine)), f"{table}: {row} has {used}"


# -- records of schema 1


def test_records_of_schema_1_are_renamed_and_keep_their_numbers(tmp_path):
    run = find("cpu", "minGRU, layers 3")[0]
    new = make_record(run, 0.9)
    old = json.loads(json.dumps(new)) | {"schema_version": 1, "run_id": "0123456789ab"}
    for section, names in (("train", ("learning_rate", "warmup_steps", "grad_clip")), ("eval", ("interval", "iters"))):
        former = {after: before for before, after in FORMER.items()}
        for name in names:
            old["config"][section][former[f"{section}.{name}"].partition(".")[2]] = old["config"][section].pop(name)
    put(tmp_path, old)
    with pytest.raises(records.RecordError, match="expected schema_version 2, got 1; `python -m scripts.migrate`"):
        cells.load(tmp_path)
    (line,) = migrate.migrate(tmp_path)
    assert line.endswith(f"now {run.run_id}") and list(migrate.migrate(tmp_path)) == []
    assert cells.load(tmp_path) == {run.run_id: new}
    gone = make_record(find("cpu", "No gate S4")[0], 0.9) | {"schema_version": 1}
    put(tmp_path, gone)
    (line,) = migrate.migrate(tmp_path)
    assert "left, it can't be said in today's settings" in line and "remove it" in line


# -- README's two tables


def test_verdicts_follow_the_rule():
    accuracy, loss = grid.METRICS["test_accuracy_percent"], grid.METRICS["val_loss_nats"]
    high, low = cells.Published(99.5, 0.2, True, "x"), cells.Published(1.548, None, True, "x")
    unconfirmed = cells.Published(99.5, 0.2, False, "x")
    for expected, *arguments in (
        ("not yet run", None, None, high, True, accuracy),
        ("not at this scale", 99.9, 0.1, high, False, accuracy),
        ("reproduced", 99.0, 0.3, high, True, accuracy),
        ("contradicted", 99.0, 0.2, high, True, accuracy),
        ("reproduced", 1.568, 0.0, low, True, loss),
        ("reproduced", 1.2, 0.0, low, True, loss),
        ("contradicted", 1.569, 0.0, low, True, loss),
        ("none (n = 1)", 1.2, None, low, True, loss),
        ("none (†)", 99.5, 0.2, unconfirmed, True, accuracy),
    ):
        assert summary.verdict(*arguments) == expected, arguments
    for expected, *arguments in (
        ("not yet run", None, 175, ""),
        ("reproduced", 180, 175, "Some CPU"),
        ("contradicted", 170, 175, "Tesla T4"),
        ("not at this scale", 170, 175, "NVIDIA H100"),
    ):
        assert summary.speed_verdict(*arguments) == expected, arguments


def test_the_reproduction_has_ours_at_the_largest_scale_that_was_run(tmp_path):
    def lines():
        rows = [line for line in summary.reproduction(tmp_path).splitlines() if line.startswith("| ")]
        return {cells[0]: cells[1:] for cells in ([c.strip() for c in row.strip("|").split("|")] for row in rows)}

    claim = "Selective copying: accuracy of minGRU, 3 layers"
    before = lines()
    assert len(before) == 2 + 12 and before[claim][1:4] == ["", "", "not yet run"]
    assert before["Training speed: minGRU over GRU, T = 512"][:4] == ["175 x", "", "", "not yet run"]
    for run in find("cpu", "minGRU, layers 3", 2):
        put(tmp_path, make_record(run, 0.9))
    assert lines()[claim][:4] == ["99.5 ± 0.2 %", "90.0 ± 0.0 %", "`cpu`, n = 2", "not at this scale"]
    for run in find("paper", "minGRU, layers 3", 2):
        put(tmp_path, make_record(run, 0.994))
    assert lines()[claim][1:4] == ["99.4 ± 0.0 %", "`paper`, n = 2", "reproduced"]


def test_the_mean_over_d4rl_waits_for_all_datasets_and_gets_no_verdict_from_unconfirmed_values(tmp_path):
    claim = "D4RL: mean score of minGRU, 9 datasets"

    def line():
        return next(row for row in summary.reproduction(tmp_path).splitlines() if row.startswith(f"| {claim}"))

    for i, dataset in enumerate(grid.decision.DATASETS):
        assert "not yet run" in line() and "†" in line()
        for run in grid.runs("paper", 2):
            if any(c.table == "table3_d4rl" and (c.row, c.column) == ("minGRU", dataset) for c in run.cells):
                put(tmp_path, make_record(run, 0.1 * (i + 1)))
    assert "50.0 ± 0.0 % of an expert" in line() and "`paper`, n = 2" in line() and "none (†)" in line()
