"""`make gpu`: what a call leaves is enough for the next to go on, whatever ended it."""

import json
import os
import subprocess
import sys
import tarfile
import time

import pytest

from experiments import grid, records
from scripts import gpu
from tests.test_scripts import make_record

DONE = grid.runs(
    "smoke", 1, [cell for cell in grid.CELLS if cell.row == "GRU" and cell.experiment == "selective_copy"]
)[0]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder of its own, and a session in it that does nothing by itself."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu.signal, "signal", lambda *arguments: None)
    return tmp_path


def session(here, budget=60.0):
    return gpu.Session(here / "out", budget, None, True)


def leave_runs():
    """One run that is done, and one that has two checkpoints, where the planner leaves them."""
    done = records.record_path(gpu.WORK / "results", "selective_copy", DONE.run_id)
    record = make_record(DONE, 0.5)
    records.write_json(done, record)
    for run, steps in ((DONE.run_id, (9,)), ("e" * 12, (5, 10))):
        folder = records.work_dir(gpu.WORK / "runs", "selective_copy", run)
        folder.mkdir(parents=True)
        for step in steps:
            (folder / f"{step:09d}-{'0' * 16}.pt").write_bytes(b"weights")
        (folder / "log.txt").write_text("talk")
    records.write_json(records.work_dir(gpu.WORK / "runs", "efficiency", "f" * 12) / "points.json", {"points": []})


def test_what_is_packed_is_what_the_next_call_needs(here):
    one = session(here)
    leave_runs()
    one.pack()
    with tarfile.open(here / "out" / "state.tar.gz") as archive:
        names = sorted(archive.getnames())
    assert names == [
        f"results/runs/selective_copy/{DONE.run_id}/record.json",
        f"runs/efficiency/{'f' * 12}/points.json",
        *(f"runs/selective_copy/{'e' * 12}/{step:09d}-{'0' * 16}.pt" for step in (5, 10)),
    ]
    assert sorted(path.name for path in (here / "out").iterdir()) == ["state.tar.gz", "summary.md"]
    one.claim.__exit__(None, None, None)
    (gpu.WORK / "results" / "stray").write_text("not in the state")
    session(here)  # empties its working folder, and fills it from the state
    found = (p for p in gpu.WORK.rglob("*") if p.is_file() and p.name != ".session")
    assert sorted(str(p.relative_to(gpu.WORK)) for p in found) == names


def test_records_are_brought_home(here, capsys):
    one = session(here)
    leave_runs()
    one.pack()
    kept = here / "results/runs/selective_copy" / (DONE.run_id) / "record.json"
    gpu.bring_home(here / "out")
    assert json.loads(kept.read_text())["status"] == "done"
    assert "1 files into results/" in capsys.readouterr().out
    for status, stays in (("done", True), ("failed", False)):  # a final record that is here already stays
        mine = json.dumps(make_record(DONE, 0.5, status=status, mine=True))
        kept.write_text(mine)
        gpu.bring_home(here / "out")
        assert (kept.read_text() == mine) == stays


def test_two_sessions_do_not_share_a_folder(here):
    one = session(here)
    with pytest.raises(SystemExit, match="another process works in"):
        session(here)
    one.claim.__exit__(None, None, None)


def test_what_a_killed_call_left_is_gone_on_with(here):
    one = session(here)
    leave_runs()
    one.claim.__exit__(None, None, None)  # and no state.tar.gz
    assert [record["status"] for record in session(here).records()] == ["done"]


def test_a_part_that_passed_is_not_done_again_and_one_that_failed_is(here):
    one = session(here)
    count = [sys.executable, "-c", "open('count', 'a').write('x'); print('3 passed')"]
    one.part("tests", count)
    one.part("bench", [sys.executable, "-c", "open('count', 'a').write('y'); raise SystemExit(3)"])
    one.pack()
    assert "FAILED (3)" in (here / "out/summary.md").read_text()
    assert "3 passed" in (here / "out/tests.log").read_text()
    one.claim.__exit__(None, None, None)
    again = session(here)
    again.part("tests", count)
    again.part("bench", count)
    assert (here / "count").read_text() == "xyx"
    again.claim.__exit__(None, None, None)
    (here / "minrnn").mkdir()
    (here / "minrnn/new.py").write_text("1")
    session(here).part("tests", count)
    assert (here / "count").read_text() == "xyxx"
    assert any("passed before" in line for line in again.lines)


def test_what_hangs_is_stopped_in_time_and_the_state_is_packed(here):
    one = session(here, budget=4.0)
    began = time.monotonic()
    one.part("tests", [sys.executable, "-c", "import time; time.sleep(600)"])
    assert time.monotonic() - began < 20 and one.left > 0  # a third of the time: there is some for the rest
    assert any("not finished" in line for line in one.lines)
    assert (here / "out/state.tar.gz").exists()
    one.stop(15, None)
    one.part("bench", [sys.executable, "-c", "open('never', 'w')"])
    assert not (here / "never").exists()


def test_without_a_gpu_it_says_so(tmp_path):
    call = [sys.executable, "-m", "scripts.gpu", "--out", str(tmp_path)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(call, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "no CUDA GPU here" in done.stderr and "--dry-run" in done.stderr
