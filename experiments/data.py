"""Files that experiments need: in $MINRNN_DATA, in data/, or fetched over the network and checked."""

import contextlib
import fcntl
import hashlib
import os
import re
import urllib.request
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from .records import Refusal

FOLDER = Path("data")


@dataclass(frozen=True)
class File:
    name: str  # below the folder
    url: str
    sha256: str | None  # None: none is published; what the first use found is written beside the file
    about: str


FILES = {
    "tinyshakespeare": File(
        name="tinyshakespeare.txt",
        url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        about="Tiny Shakespeare, 1,115,394 characters, for the character model",
    ),
}

# https://github.com/Farama-Foundation/D4RL/blob/89141a689b0353b0dac3da5cba60da4b1b16254d/d4rl/infos.py
D4RL = {
    f"d4rl/{env}-{level}": File(
        name=f"d4rl/{env}_{level.replace('-', '_')}-v2.hdf5",
        url=f"http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2/{env}_{level.replace('-', '_')}-v2.hdf5",
        sha256=None,
        about=f"D4RL's {env}-{level}-v2, for the decision model",
    )
    for env in ("hopper", "halfcheetah", "walker2d")
    for level in ("medium", "medium-replay", "medium-expert")
}


class DataError(Refusal, RuntimeError):
    """A file that cannot be had, or is not what it should be; the text says what to do."""


def folders() -> list[Path]:
    """Where files are looked for, in this order."""
    return [Path(folder) for folder in (os.environ.get("MINRNN_DATA"), FOLDER) if folder]


def locate(name: str) -> Path | None:
    """The first file of this name in `folders`, as it is."""
    return next((path for folder in folders() if (path := folder / name).exists()), None)


def find(key: str, progress: bool = True) -> Path:
    """The path of a file of FILES or D4RL, its checksum verified; fetched to data/ where it is nowhere.

    Raises DataError: it is damaged, or it is nowhere and cannot be fetched.
    """
    file = (FILES | D4RL)[key]
    path = locate(file.name) or fetch(file, FOLDER, progress)
    record = path.with_name(f"{path.name}.sha256")
    expected, found = file.sha256 or _recorded(record), sha256(path)
    if expected is None:
        _record(record, path, found)
    elif found != expected:
        said, those = ("", "it") if file.sha256 else (f" as {record} says", "both")
        raise DataError(
            f"{path}: expected sha256 {expected}{said}, got {found} ({path.stat().st_size} bytes); "
            f"remove {those}, and it is fetched anew"
        )
    return path


def fetch(file: File, folder: Path, progress: bool = True) -> Path:
    """Downloads to <name>.part, checks, and renames: what stands under its name is whole.

    A download that broke off goes on where it did, if the server says that it still has the same file (RFC 9110,
    If-Range). Processes that want the same file wait for the one that came first.

    Raises DataError: it cannot be fetched, not all of it came, or it is not what it should be.
    """
    path = folder / file.name
    part, tag = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.part.tag")
    todo = f"download it elsewhere, and put it as {file.name} into data/ or into the folder that MINRNN_DATA names"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(part) as target:
            if path.exists():  # another process was first
                return path
            size = _download(file, target, tag, progress)
            got = part.stat().st_size
            if got != size and (size is not None or file.sha256 is None):
                raise DataError(
                    f"{file.name}: got {got} of {'unknown' if size is None else size} bytes from {file.url}; "
                    f"try again, or {todo}"
                )
            tag.unlink(missing_ok=True)
            if file.sha256 is not None and (found := sha256(part)) != file.sha256:
                part.unlink()
                raise DataError(
                    f"{file.name}: {file.url} sent a file of sha256 {found}, expected {file.sha256}; {todo}"
                )
            part.replace(path)
    except (OSError, HTTPException) as error:
        raise DataError(f"{file.name}: cannot be fetched from {file.url} ({error}); {todo}") from error
    return path


def _download(file: File, target: BinaryIO, tag: Path, progress: bool) -> int | None:
    """Appends to target what it lacks; returns the size that the whole should have, if the server says it.

    `tag` holds which version of the file target's bytes are of: its ETag, or when it was last modified.
    """
    # The last byte is asked for again: a range that begins behind a whole file would be an error.
    have = max(target.seek(0, os.SEEK_END) - 1, 0) if tag.exists() else 0
    headers = {"Range": f"bytes={have}-", "If-Range": tag.read_text()} if have else {}
    with urllib.request.urlopen(urllib.request.Request(file.url, headers=headers), timeout=30) as source:
        version = ""
        if source.status == 206:
            given = source.headers.get("Content-Range", "")
            if not given.startswith(f"bytes {have}-"):
                raise HTTPException(f"asked for the bytes from {have}, got {given!r}")
        else:  # the whole file: the server knows no ranges, or has another version
            have, version = 0, source.headers.get("ETag", "")
            if not version or version.startswith("W/"):  # a weak one may not be used for ranges
                version = source.headers.get("Last-Modified", "")
            tag.unlink(missing_ok=True)
        target.truncate(have)
        if version:
            tag.write_text(version)
        length = source.headers.get("Content-Length")
        size = None if length is None else have + int(length)
        with tqdm(total=size, initial=have, unit="B", unit_scale=True, desc=file.name, disable=not progress) as bar:
            while chunk := source.read(1 << 16):
                target.write(chunk)
                bar.update(len(chunk))
    target.flush()
    return size


@contextlib.contextmanager
def _alone(part: Path) -> Iterator[BinaryIO]:
    """The file, made where there is none, to write at its end, while no other process does."""
    while True:
        with part.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            mine = False  # whoever had it may have renamed or removed it, and another one begun anew
            with contextlib.suppress(FileNotFoundError):
                mine = os.path.samestat(os.fstat(file.fileno()), part.stat())
            if not mine:
                continue
            try:
                yield file
            finally:
                if not os.fstat(file.fileno()).st_size:
                    part.unlink(missing_ok=True)
            return


def _record(record: Path, path: Path, checksum: str) -> None:
    """As sha256sum writes it, which reads it too (`sha256sum -c`); the size is a comment to it."""
    temporary = record.with_name(f".{record.name}.{os.getpid()}")
    try:
        temporary.write_text(f"# {path.stat().st_size} bytes\n{checksum}  {path.name}\n")
        temporary.replace(record)
    except OSError as error:
        warnings.warn(f"{record}: cannot be written ({error}): a change of {path.name} will not show", stacklevel=3)


def _recorded(record: Path) -> str | None:
    if not record.exists():
        return None
    text = record.read_text(errors="replace")
    found = re.search(r"^([0-9a-f]{64})\b", text, re.MULTILINE)
    if found is None:
        raise DataError(f"{record}: expected a checksum as sha256sum writes it, got {text[:100]!r}; remove it")
    return found[1]


def sha256(path: Path) -> str:
    checksum = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            checksum.update(chunk)
    return checksum.hexdigest()


def python_docs() -> str:
    """What Python's help() says of the language, half a million characters: a text that is at hand everywhere.

    Each version of Python has its own.
    """
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))
