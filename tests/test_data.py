"""Files are found, fetched and refused by name; the dashboard is built from code."""

import dataclasses
import hashlib

import pytest

from experiments import data
from scripts import data as command

CONTENT = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 3000


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A file of the table that a file:// address serves."""
    source = tmp_path / "there" / "input.txt"
    source.parent.mkdir()
    source.write_bytes(CONTENT)
    entry = data.File("some.txt", source.as_uri(), hashlib.sha256(CONTENT).hexdigest(), "a text")
    monkeypatch.setitem(data.FILES, "some", entry)
    monkeypatch.setattr(data, "FOLDER", tmp_path / "data")
    monkeypatch.delenv("MINRNN_DATA", raising=False)
    return source


def change(monkeypatch, **changes):
    monkeypatch.setitem(data.FILES, "some", dataclasses.replace(data.FILES["some"], **changes))


def test_a_file_is_fetched_once_and_checked(file, tmp_path):
    path = data.find("some", progress=False)
    assert path == tmp_path / "data" / "some.txt" and path.read_bytes() == CONTENT
    file.unlink()
    assert data.find("some") == path
    assert [p.name for p in path.parent.iterdir()] == ["some.txt"]


def test_the_named_folder_comes_first(file, tmp_path, monkeypatch):
    monkeypatch.setenv("MINRNN_DATA", str(tmp_path / "mine"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "some.txt").write_bytes(CONTENT)
    assert data.find("some") == tmp_path / "mine" / "some.txt"


def test_a_damaged_file_is_refused_by_name(file, tmp_path):
    path = data.find("some", progress=False)
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(data.DataError, match=f"{path}: expected sha256 .*, got .*; remove it"):
        data.find("some")


def test_what_is_fetched_is_kept_only_when_whole(file, tmp_path, monkeypatch):
    change(monkeypatch, sha256="0" * 64)
    with pytest.raises(data.DataError, match="some.txt: file:.* sent a file of sha256 .*; download it elsewhere"):
        data.find("some", progress=False)
    assert list((tmp_path / "data").iterdir()) == []


def test_without_a_network_it_says_what_to_do(file, tmp_path, monkeypatch, capsys):
    file.unlink()
    with pytest.raises(data.DataError, match="cannot be fetched from .*; download it .*put it as some.txt"):
        data.find("some")
    monkeypatch.setattr("sys.argv", ["data", "some"])
    assert command.main() == 1
    assert "error: some.txt: cannot be fetched" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["data", "sone"])
    with pytest.raises(SystemExit):
        command.main()
    assert "sone: no such file; there are" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # wandb_workspaces' own, of pydantic
def test_the_dashboard_shows_what_runs_log(monkeypatch, capsys):
    pytest.importorskip("wandb_workspaces")
    from scripts import dashboard

    view = dashboard.workspace("someone", "minrnn")
    assert [section.name for section in view.sections] == list(dashboard.panels())
    logged = {"val_accuracy", "val_loss", "train_loss", "lr"}
    shown = {name for section in view.sections for panel in section.panels for name in getattr(panel, "y", None) or []}
    assert {getattr(name, "name", name) for name in shown} == logged
    monkeypatch.setattr("wandb.login", lambda **options: False)
    monkeypatch.setattr("sys.argv", ["dashboard", "--entity", "someone"])
    assert dashboard.main() == 1
    assert "no wandb key" in capsys.readouterr().err
