"""Files that experiments need: found in $MINRNN_DATA or data/, or downloaded, and checked."""

import hashlib
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pooch
from filelock import FileLock

from .files import Refusal, regular, write

FOLDER = Path("data")


@dataclass(frozen=True)
class File:
    name: str  # below the folder
    url: str
    sha256: str | None  # None: none is published; the first use writes the checksum it found beside the file
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

LRA = {
    "digits": File(  # the same file in releases from 1.5.2 to 1.9.1 at least
        name="digits.csv.gz",
        url="https://raw.githubusercontent.com/scikit-learn/scikit-learn/1.7.2/sklearn/datasets/data/digits.csv.gz",
        sha256="09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22",
        about="1,797 handwritten digits of 8 x 8 pixels (UCI), for Long Range Arena's image task at a small scale",
    ),
}

# Files from archives, which are not downloaded. Checksums: https://github.com/ankane/torchvision-ruby, cifar10.rb; the
# archive's is c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd, its published md5
# c32a1d4ab5d03f1284b67883e8d87530.
CIFAR10 = [
    File(
        name=f"cifar-10-batches-bin/{name}.bin",
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        sha256=sha256,
        about="CIFAR-10",
    )
    for name, sha256 in (
        ("data_batch_1", "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5"),
        ("data_batch_2", "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed"),
        ("data_batch_3", "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67"),
        ("data_batch_4", "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48"),
        ("data_batch_5", "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add"),
        ("test_batch", "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b"),
    )
]
AAN = {
    split: File(
        name=f"aan/new_aan_pairs.{name}.tsv",
        url="https://storage.googleapis.com/long-range-arena/lra_release.gz",
        sha256=None,
        about="AAN",
    )
    for split, name in (("train", "train"), ("val", "eval"), ("test", "test"))
}


class DataError(Refusal, RuntimeError):
    """A file that is not available, or not what it should be; the text says what to do."""


def folders() -> list[Path]:
    """The folders that are searched for files, in order."""
    return [Path(folder) for folder in (os.environ.get("MINRNN_DATA"), FOLDER) if folder]


def locate(name: str) -> Path | None:
    """The first file of this name in `folders`, unchecked."""
    return next((path for folder in folders() if (path := folder / name).exists()), None)


def find(key: str, progress: bool = True) -> Path:
    """The path of a file of FILES, D4RL or LRA, its checksum verified; a missing file is downloaded to data/.

    Raises DataError: the file is damaged, or is missing and cannot be downloaded.
    """
    file = (FILES | D4RL | LRA)[key]
    return verified(locate(file.name) or fetch(file, FOLDER, progress), file, "it is fetched anew")


def unpacked(file: File) -> Path:
    """The path of a file that comes in an archive, its checksum verified.

    Raises DataError: the file is damaged or missing.
    """
    path = locate(file.name)
    if path is None:
        places = " nor ".join(str(folder / file.name) for folder in folders())
        raise DataError(f"{file.about}: there is no {places}; put it there from {file.url}")
    return verified(path, file, "get it anew")


def verified(path: Path, file: File, then: str) -> Path:
    """The path, after a check that it holds this file.

    Args:
        then: what follows once the user has removed the file; for the error's text.

    Raises DataError: it is not a regular file, or has another checksum.
    """
    regular(path, DataError)
    record = path.with_name(f"{path.name}.sha256")
    expected, found = file.sha256 or _recorded(record), pooch.file_hash(path)
    if expected is None:
        _record(record, path, found)
    elif found != expected:
        said, those = ("", "it") if file.sha256 else (f" as {record} says", "both")
        raise DataError(
            f"{path}: expected sha256 {expected}{said}, got {found} ({path.stat().st_size} bytes); "
            f"remove {those}, and {then}"
        )
    return path


def fetch(file: File, folder: Path, progress: bool = True) -> Path:
    """Downloads a file under a temporary name, checks and renames it, so that no partial file has its name; its path.

    Processes that need the same file wait for the first one.

    Raises DataError: the download fails or is incomplete, or the file is not what it should be.
    """
    path = folder / file.name
    todo = f"download it elsewhere, and put it as {file.name} into data/ or into the folder that MINRNN_DATA names"
    pooch.get_logger().setLevel("ERROR")  # it logs hints for developers on how to pin a checksum
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


def checksum(*arrays: np.ndarray) -> str:
    """sha256, in hex, of each array's dtype, shape and bytes, in this order.

    A checksum of the file would change with its date and library, so that data made again would seem different.
    """
    found = hashlib.sha256()
    for array in arrays:
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        found.update(f"{array.dtype.str} {array.shape};".encode())
        found.update(array)
    return found.hexdigest()


def _record(record: Path, path: Path, checksum: str) -> None:
    """Writes the checksum in sha256sum's format (for `sha256sum -c`), with the size as a comment."""
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
    """The text of Python's help() on the language, half a million characters, which comes with every Python.

    It differs between versions of Python.
    """
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def python_topics() -> list[str]:
    """Topics of Python's help(), longest first, no two of which share 64 consecutive characters.

    Some topics contain others, as "compound" contains "if".
    """
    from pydoc_data.topics import topics

    kept, known = [], set()
    for text in sorted(set(topics.values()), key=lambda text: (-len(text), text)):
        runs = {text[i : i + 64] for i in range(len(text) - 63)}
        if not runs & known:
            kept.append(text)
            known |= runs
    return kept
