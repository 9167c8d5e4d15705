"""Files that experiments need: in $MINRNN_DATA, in data/, or fetched over the network and checked."""

import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import pooch
from filelock import FileLock

from .files import Refusal, write

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
    expected, found = file.sha256 or _recorded(record), pooch.file_hash(path)
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
    """Downloads to another name, checks, and renames: what stands under its name is whole.

    Processes that want the same file wait for the one that came first.

    Raises DataError: it cannot be fetched, not all of it came, or it is not what it should be.
    """
    path = folder / file.name
    todo = f"download it elsewhere, and put it as {file.name} into data/ or into the folder that MINRNN_DATA names"
    pooch.get_logger().setLevel("ERROR")  # its hint on how to pin a checksum is for those who write such tables
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            if not path.exists():  # another process may have been first
                get = pooch.HTTPDownloader(progressbar=progress, timeout=30)
                pooch.retrieve(file.url, file.sha256, path.name, path.parent, downloader=get)
    except ValueError as error:
        raise DataError(f"{file.name}: {file.url} sent another file ({error}); {todo}") from error
    except OSError as error:
        raise DataError(f"{file.name}: cannot be fetched from {file.url} ({error}); {todo}") from error
    return path


def _record(record: Path, path: Path, checksum: str) -> None:
    """As sha256sum writes it, which reads it too (`sha256sum -c`); the size is a comment to it."""
    try:
        write(record, f"# {path.stat().st_size} bytes\n{checksum}  {path.name}\n")
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


def python_docs() -> str:
    """What Python's help() says of the language, half a million characters: a text that is at hand everywhere.

    Each version of Python has its own.
    """
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))
