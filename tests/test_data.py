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


class Server(http.server.ThreadingHTTPServer):
    """Serves one content under every path; what it can and does is set by its attributes."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.first = CONTENT, None  # another content, for the first request
        self.tag, self.tag_name = '"first"', "ETag"
        self.ranges, self.shift, self.length = True, 0, True
        self.most = None  # bytes sent before the connection breaks
        self.asked = []  # the ranges
        self.go_on = threading.Event()
        self.go_on.set()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        content = server.content if server.first is None or server.asked else server.first
        server.asked.append(wanted)
        server.go_on.wait(10)
        start = 0
        if server.ranges and wanted and self.headers.get("If-Range") == server.tag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) + server.shift
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        if server.tag:
            self.send_header(server.tag_name, server.tag)
        if server.length:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:][: server.most])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(file, monkeypatch):
    """Serves the file, which has no known checksum."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        change(monkeypatch, name="d4rl/some.txt", url=f"http://127.0.0.1:{server.server_port}/some", sha256=None)
        yield server
        server.go_on.set()
        server.shutdown()


def broken_off(server, folder, after=1000):
    """A download that breaks off after so many bytes."""
    server.most = after
    with pytest.raises(data.DataError, match=f"some.txt: got {after} of {len(CONTENT)} bytes from .*; try again, or"):
        data.find("some", progress=False)
    server.most = None
    assert sorted(p.name for p in folder.iterdir()) == ["some.txt.part", "some.txt.part.tag"]


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


@pytest.mark.parametrize("tag", (("ETag", '"1-a"'), ("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")))
def test_a_broken_download_goes_on_where_it_did(server, tmp_path, tag):
    server.tag_name, server.tag = tag
    broken_off(server, tmp_path / "data/d4rl")
    path = data.find("some", progress=False)
    assert path.read_bytes() == CONTENT and server.asked == [None, "bytes=999-"]
    assert sorted(p.name for p in path.parent.iterdir()) == ["some.txt", "some.txt.sha256"]


def test_a_download_killed_after_its_last_byte_is_kept(server, tmp_path):
    broken_off(server, tmp_path / "data/d4rl")
    (tmp_path / "data/d4rl/some.txt.part").write_bytes(CONTENT)
    assert data.find("some", progress=False).read_bytes() == CONTENT
    assert server.asked == [None, f"bytes={len(CONTENT) - 1}-"]


def test_a_server_without_ranges_sends_it_all_again(server, tmp_path):
    server.ranges = False
    broken_off(server, tmp_path / "data/d4rl")
    assert data.find("some", progress=False).read_bytes() == CONTENT and len(server.asked) == 2


def test_two_versions_of_a_file_are_never_joined(server, tmp_path):
    broken_off(server, tmp_path / "data/d4rl")
    server.content, server.tag = CONTENT.upper(), '"second"'
    assert data.find("some", progress=False).read_bytes() == CONTENT.upper()


def test_a_version_that_is_not_named_is_not_taken_for_the_one_before(server, tmp_path):
    broken_off(server, tmp_path / "data/d4rl")
    server.content, server.tag, server.most = CONTENT.upper(), "", 1000
    with pytest.raises(data.DataError, match="got 1000 of"):
        data.find("some", progress=False)
    server.content, server.tag, server.most = CONTENT, '"first"', None
    assert data.find("some", progress=False).read_bytes() == CONTENT and server.asked[2] is None


@pytest.mark.parametrize("tag", ("", 'W/"weak"'))
def test_what_no_version_is_known_of_is_fetched_from_the_start(server, tmp_path, tag):
    server.tag, server.most = tag, 1000
    with pytest.raises(data.DataError, match="got 1000 of"):
        data.find("some", progress=False)
    server.most = None
    assert data.find("some", progress=False).read_bytes() == CONTENT and server.asked == [None, None]


def test_an_answer_of_other_bytes_is_refused(server, tmp_path):
    broken_off(server, tmp_path / "data/d4rl")
    server.shift = 1
    with pytest.raises(data.DataError, match="asked for the bytes from 999, got 'bytes 1000-"):
        data.find("some", progress=False)


def test_a_file_of_unknown_size_needs_a_checksum(server, monkeypatch):
    server.length = False
    with pytest.raises(data.DataError, match=f"got {len(CONTENT)} of unknown bytes"):
        data.find("some", progress=False)
    change(monkeypatch, sha256=hashlib.sha256(CONTENT).hexdigest())
    assert data.find("some", progress=False).read_bytes() == CONTENT


def test_whoever_comes_second_waits_for_the_first(server):
    server.go_on.clear()
    found = []
    threads = [threading.Thread(target=lambda: found.append(data.find("some", progress=False))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(0.1)
    assert found == [] and server.asked == [None]
    server.go_on.set()
    for thread in threads:
        thread.join(10)
    assert len(found) == 3 and len(server.asked) == 1
    assert {path.read_bytes() for path in found} == {CONTENT}
    assert sorted(p.name for p in found[0].parent.iterdir()) == ["some.txt", "some.txt.sha256"]


def test_whoever_waits_for_one_that_fails_begins_anew(server, monkeypatch):
    change(monkeypatch, sha256=hashlib.sha256(CONTENT).hexdigest())
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
    assert "sent a file of sha256" in found[0] and found[1] == CONTENT and len(server.asked) == 2


def test_an_unknown_checksum_is_kept_and_verified_from_then_on(server):
    path = data.find("some", progress=False)
    record = path.with_name("some.txt.sha256")
    line = f"{hashlib.sha256(CONTENT).hexdigest()}  some.txt\n"
    assert record.read_text() == f"# {len(CONTENT)} bytes\n{line}"
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", record.name], cwd=path.parent, check=True)
    assert data.find("some") == path and len(server.asked) == 1
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

    monkeypatch.setattr(data.Path, "write_text", fail)
    server.tag = ""
    with pytest.warns(UserWarning, match="some.txt.sha256: cannot be written .read-only.*: a change .* will not show"):
        assert data.find("some", progress=False).read_bytes() == CONTENT


def test_the_command_fetches_what_is_named(file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "FILES", {"some": data.FILES["some"]})
    monkeypatch.setattr(command, "FILES", data.FILES)
    changed = dataclasses.replace(data.D4RL["d4rl/hopper-medium"], url=file.as_uri())
    monkeypatch.setitem(data.D4RL, "d4rl/hopper-medium", changed)
    monkeypatch.setattr("sys.argv", ["data"])
    assert command.main() == 0
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["some.txt"]
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
