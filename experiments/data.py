"""Files that experiments need: in $MINRNN_DATA, in data/, or fetched over the network and checked."""

import hashlib
import os
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

FOLDER = Path("data")


@dataclass(frozen=True)
class File:
    name: str
    url: str
    sha256: str
    about: str


FILES = {
    "tinyshakespeare": File(
        name="tinyshakespeare.txt",
        url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        about="Tiny Shakespeare, 1,115,394 characters, for the character model",
    ),
}


class DataError(RuntimeError):
    """A file that cannot be had, or is not what it should be; the text says what to do."""


def find(key: str, progress: bool = True) -> Path:
    """The path of a file of FILES, its checksum verified; fetched to data/ where it is nowhere.

    Raises DataError: it is damaged, or it is nowhere and cannot be fetched.
    """
    file = FILES[key]
    for folder in (*filter(None, [os.environ.get("MINRNN_DATA")]), FOLDER):
        path = Path(folder) / file.name
        if path.exists():
            found = _sha256(path)
            if found != file.sha256:
                raise DataError(
                    f"{path}: expected sha256 {file.sha256}, got {found}; remove it, and it is fetched anew"
                )
            return path
    return fetch(file, FOLDER, progress)


def fetch(file: File, folder: Path, progress: bool = True) -> Path:
    """Downloads to a temporary name, checks, and renames: what stands under its name is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    path, part = folder / file.name, folder / f".{file.name}.{os.getpid()}.part"
    todo = f"download it elsewhere, and put it as {file.name} into data/ or into the folder that MINRNN_DATA names"
    try:
        with urllib.request.urlopen(file.url, timeout=30) as source, part.open("wb") as target:
            size = int(source.headers.get("Content-Length") or 0) or None
            with tqdm(total=size, unit="B", unit_scale=True, desc=file.name, disable=not progress) as bar:
                while chunk := source.read(1 << 16):
                    target.write(chunk)
                    bar.update(len(chunk))
        if size is not None and part.stat().st_size != size:
            raise DataError(
                f"{file.name}: got {part.stat().st_size} of {size} bytes from {file.url}; try again, or {todo}"
            )
        found = _sha256(part)
        if found != file.sha256:
            raise DataError(f"{file.name}: {file.url} sent a file of sha256 {found}, expected {file.sha256}; {todo}")
        part.replace(path)
    except OSError as error:
        raise DataError(f"{file.name}: cannot be fetched from {file.url} ({error}); {todo}") from error
    finally:
        part.unlink(missing_ok=True)
    return path


def python_docs() -> str:
    """What Python's help() says of the language, half a million characters: a text that is at hand everywhere.

    Each version of Python has its own.
    """
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
