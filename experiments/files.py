"""Reads and writes whole files, and claims folders for one process at a time. Needs no torch."""

import contextlib
import difflib
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout


class Refusal(Exception):
    """The request cannot be carried out, and nothing was run; the text says what to do."""


def nearest(name: str, names: Iterable[str]) -> str:
    """The one of `names` that is most like `name`."""
    return difflib.get_close_matches(name, list(names), n=1, cutoff=0)[0]


def write(path: Path, content: str | bytes) -> None:
    """Writes a file atomically: under a temporary name beside it, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path, error: type[Exception], most: int) -> bytes:
    """A regular file's content. Raises FileNotFoundError, and `error` for another kind of file, or a larger one.

    Reading a pipe or a device might never end.
    """
    try:
        size = regular(path, error)
        if size > most:
            raise error(f"{path}: expected at most {most / 2**20:.0f} MiB, got {size / 2**20:.0f} MiB")
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem.strerror})") from problem


def regular(path: Path, error: type[Exception]) -> int:
    """The size of a regular file in bytes. Raises OSError where there is none, and `error` for another kind of file."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise error(f"{path}: expected a file, got a {_kind(status.st_mode)}")
    return status.st_size


def _kind(mode: int) -> str:
    kinds = {stat.S_ISDIR: "folder", stat.S_ISFIFO: "pipe", stat.S_ISSOCK: "socket"}
    return next((name for holds, name in kinds.items() if holds(mode)), "device")


@contextlib.contextmanager
def claim(folder: Path, name: str = "lock") -> Iterator[bool]:
    """Whether this process has the folder to itself. Removes the folder if nothing was written beside the lock.

    The system releases a claim when its process ends, however it ends.
    """
    lock = FileLock(folder / f".{name}", blocking=False, thread_local=False)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        with contextlib.suppress(OSError):  # another process may have removed or filled the folder
            if not any(other.name != f".{name}" for other in folder.iterdir()):
                (folder / f".{name}").unlink()
                folder.rmdir()
        lock.release()
