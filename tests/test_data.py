"""Files are found, fetched and refused by name; the dashboard is built from code."""

import dataclasses
import hashlib
import http.server
import shutil
import subprocess
import threading

import pytest

from experiments import data
from scripts import data as command

CONTENT = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 3000


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves one content under every path; a file of the table is at its address."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(data, "FOLDER", tmp_path / "data")
    monkeypatch.delenv("MINRNN_DATA", raising=False)
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/some"
        entry = data.File("d4rl/some.txt", url, hashlib.sha256(CONTENT).hexdigest(), "a text")
        monkeypatch.setitem(data.FILES, "some", entry)
        yield server
        server.go_on.set()
        server.shutdown()


def change(monkeypatch, **changes):
    monkeypatch.setitem(data.FILES, "some", dataclasses.replace(data.FILES["some"], **changes))


class Server(http.server.ThreadingHTTPServer):
    """What it can and does is set by its attributes."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.first = CONTENT  # what the first request gets
        self.most = None  # bytes sent before the connection breaks
        self.asked = 0
        self.go_on = threading.Event()
        self.go_on.set()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        content = CONTENT if server.asked else server.first
        server.asked += 1
        server.go_on.wait(10)
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: server.most])

    def log_message(self, *arguments):
        pass


def left(path):
    """The files in a folder, without the empty one by which processes wait for each other."""
    return sorted(file.name for file in path.iterdir() if file.suffix != ".lock")


def test_a_file_is_fetched_once_and_checked(server, tmp_path):
    path = data.find("some", progress=False)
    assert path == tmp_path / "data/d4rl/some.txt" and path.read_bytes() == CONTENT
    assert data.find("some") == path and server.asked == 1
    assert left(path.parent) == ["some.txt"]


def test_the_named_folder_comes_first(server, tmp_path, monkeypatch):
    monkeypatch.setenv("MINRNN_DATA", str(tmp_path / "mine"))
    (tmp_path / "mine/d4rl").mkdir(parents=True)
    (tmp_path / "mine/d4rl/some.txt").write_bytes(CONTENT)
    assert data.find("some") == tmp_path / "mine/d4rl/some.txt" and not server.asked


def test_a_damaged_file_is_refused_by_name(server):
    path = data.find("some", progress=False)
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(data.DataError, match=f"{path}: expected sha256 .*, got .*; remove it"):
        data.find("some")


def test_what_is_fetched_is_kept_only_when_whole(server, tmp_path, monkeypatch):
    change(monkeypatch, sha256="0" * 64)
    with pytest.raises(data.DataError, match="some.txt: http.* sent another file .*; download it elsewhere"):
        data.find("some", progress=False)
    assert left(tmp_path / "data/d4rl") == []


@pytest.mark.parametrize("known", (True, False))
def test_a_download_that_breaks_off_is_not_kept(server, tmp_path, monkeypatch, known):
    if not known:
        change(monkeypatch, sha256=None)
    server.most = 1000
    with pytest.raises(data.DataError, match="cannot be fetched from .*IncompleteRead.*; download it elsewhere"):
        data.find("some", progress=False)
    assert left(tmp_path / "data/d4rl") == []
    server.most = None
    assert data.find("some", progress=False).read_bytes() == CONTENT


def test_without_a_network_it_says_what_to_do(server, monkeypatch, capsys):
    change(monkeypatch, url="http://127.0.0.1:1/some")
    with pytest.raises(data.DataError, match="cannot be fetched from .*; download it .*put it as d4rl/some.txt"):
        data.find("some")
    monkeypatch.setattr("sys.argv", ["data", "some"])
    assert command.main() == 1
    assert "error: d4rl/some.txt: cannot be fetched" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["data", "sone"])
    with pytest.raises(SystemExit):
        command.main()
    assert "sone: no such file; there are" in capsys.readouterr().err


def test_whoever_comes_second_waits_for_the_first(server):
    server.go_on.clear()
    found = []
    threads = [threading.Thread(target=lambda: found.append(data.find("some", progress=False))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(0.1)
    assert found == [] and server.asked == 1
    server.go_on.set()
    for thread in threads:
        thread.join(10)
    assert len(found) == 3 and server.asked == 1
    assert {path.read_bytes() for path in found} == {CONTENT}
    assert left(found[0].parent) == ["some.txt"]


def test_whoever_waits_for_one_that_fails_begins_anew(server):
    server.first = CONTENT.upper()
    server.go_on.clear()
    found = []

    def find():
        try:
            found.append(data.find("some", progress=False).read_bytes())
        except data.DataError as error:
            found.append(str(error))

    threads = [threading.Thread(target=find) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(0.1)
    server.go_on.set()
    for thread in threads:
        thread.join(10)
    assert "sent another file" in found[0] and found[1] == CONTENT and server.asked == 2


def test_an_unknown_checksum_is_kept_and_verified_from_then_on(server, monkeypatch):
    change(monkeypatch, sha256=None)
    path = data.find("some", progress=False)
    record = path.with_name("some.txt.sha256")
    line = f"{hashlib.sha256(CONTENT).hexdigest()}  some.txt\n"
    assert record.read_text() == f"# {len(CONTENT)} bytes\n{line}"
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", record.name], cwd=path.parent, check=True)
    assert data.find("some") == path and server.asked == 1
    record.write_text(line)  # sha256sum's own
    assert data.find("some") == path
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(
        data.DataError, match=f"{path}: expected sha256 .* as {record} says, got .* bytes.; remove both"
    ):
        data.find("some")
    record.write_text("none\n")
    with pytest.raises(data.DataError, match=f"{record}: expected a checksum as sha256sum writes it, got 'none"):
        data.find("some")


def test_a_checksum_that_cannot_be_kept_is_said(server, monkeypatch):
    def fail(*arguments):
        raise PermissionError("read-only")

    change(monkeypatch, sha256=None)
    monkeypatch.setattr(data, "write", fail)
    with pytest.warns(UserWarning, match="some.txt.sha256: cannot be written .read-only.*: a change .* will not show"):
        assert data.find("some", progress=False).read_bytes() == CONTENT


def test_the_command_fetches_what_is_named(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "FILES", {"some": data.FILES["some"]})
    monkeypatch.setattr(command, "FILES", data.FILES)
    changed = dataclasses.replace(data.D4RL["d4rl/hopper-medium"], url=data.FILES["some"].url)
    monkeypatch.setitem(data.D4RL, "d4rl/hopper-medium", changed)
    monkeypatch.setattr("sys.argv", ["data"])
    assert command.main() == 0
    assert left(tmp_path / "data/d4rl") == ["some.txt"]
    monkeypatch.setattr("sys.argv", ["data", "d4rl/hopper-medium"])
    assert command.main() == 0
    assert f"d4rl/hopper-medium: {tmp_path}/data/d4rl/hopper_medium-v2.hdf5 (D4RL's" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["data", "--help"])
    with pytest.raises(SystemExit):
        command.main()
    printed = "".join(capsys.readouterr().out.split())
    assert len(data.D4RL) == 9 and all(name in printed for name in ("some", *data.D4RL))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # wandb_workspaces' own, of pydantic
def test_the_dashboard_shows_what_runs_log(monkeypatch, capsys):
    pytest.importorskip("wandb_workspaces")
    from scripts import dashboard

    view = dashboard.workspace("someone", "minrnn")
    assert [section.name for section in view.sections] == list(dashboard.panels())
    logged = {"val_accuracy", "val_loss", "train_loss", "learning_rate"}
    shown = {name for section in view.sections for panel in section.panels for name in getattr(panel, "y", None) or []}
    assert {getattr(name, "name", name) for name in shown} == logged
    monkeypatch.setattr("wandb.login", lambda **options: False)
    monkeypatch.setattr("sys.argv", ["dashboard", "--entity", "someone"])
    assert dashboard.main() == 1
    assert "no wandb key" in capsys.readouterr().err
