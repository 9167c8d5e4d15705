"""Checkpoints that survive a kill: written atomically, named by step and checksum; the last two are kept."""

import hashlib
import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from .files import Refusal, regular

KEPT = 2
NAME = re.compile(r"(\d{9})-([0-9a-f]{16})\.pt")


class CheckpointError(Refusal, ValueError):
    """A checkpoint that does not belong to this run; the text names it and says what to do."""


def save(folder: Path, step: int, state: dict[str, Any], belongs_to: dict[str, Any]) -> Path:
    """Writes a checkpoint and returns its path; tensors and plain values only, as `load` executes nothing from a file.

    Args:
        belongs_to: the run's id and the facts of its data, which must match when the state is loaded; JSON types.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".writing-{os.getpid()}"
    try:
        with temporary.open("wb") as file:
            torch.save(state | {"belongs_to": json.dumps(belongs_to, sort_keys=True)}, file)
            file.flush()
            os.fsync(file.fileno())
        path = folder / f"{step:09d}-{_checksum(temporary)}.pt"
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    for old in _found(folder)[KEPT:]:
        old.unlink()
    return path


def clean(folder: Path) -> None:
    """Sets damaged checkpoints aside, so that they replace no intact one, and removes half-written files."""
    for path in _found(folder):
        if not _whole(path):
            warnings.warn(
                f"{path}: the checkpoint is damaged (its checksum differs); using the one before it", stacklevel=2
            )
            path.replace(path.with_suffix(".damaged"))
    for path in folder.glob(".writing-*"):
        path.unlink()


def load(
    folder: Path, device: str | torch.device, belongs_to: dict[str, Any], steps: int | None = None
) -> dict[str, Any] | None:
    """The newest intact checkpoint, or None.

    Raises CheckpointError: it differs from belongs_to, or its step lies after `steps`.
    """
    for path in _found(folder):
        if _whole(path):
            try:
                saved = torch.load(path, map_location=device, weights_only=True)
            except Exception as error:  # a damaged pickle raises anything
                text = f"{type(error).__name__}: {error}".splitlines()[0]
                raise CheckpointError(f"{path}: expected tensors and plain values ({text}); {_todo(path)}") from error
            _check(path, saved, belongs_to, steps)
            return saved
    return None


def _check(path: Path, saved: dict[str, Any], belongs_to: dict[str, Any], steps: int | None) -> None:
    todo = _todo(path)
    try:
        found, step = dict(json.loads(saved["belongs_to"])), int(saved["state"]["step"])
    except (TypeError, KeyError, ValueError) as error:
        text = f"{path}: expected a run's checkpoint that says what it belongs to"
        raise CheckpointError(f"{text} ({type(error).__name__}: {error}); {todo}") from error
    for key, value in json.loads(json.dumps(belongs_to)).items():
        if found.get(key) != value:
            text = f"expected a checkpoint of {key} {value!r:.80}, got one of {found.get(key)!r:.80}"
            raise CheckpointError(f"{path}: {text}; {todo}")
    if steps is not None and not 0 <= step <= steps:
        raise CheckpointError(f"{path}: expected a step up to {steps}, got {step}; {todo}")


def _todo(path: Path) -> str:
    return f"remove {path.parent} to have the run begin anew"


def _whole(path: Path) -> bool:
    """Whether the file's content has the checksum in its name. Raises CheckpointError: it is not a regular file."""
    try:
        regular(path, CheckpointError)  # reading a pipe would never end
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); {_todo(path)}") from error
    return _checksum(path) == NAME.fullmatch(path.name)[2]


def _found(folder: Path) -> list[Path]:
    """The checkpoints of a folder, newest first."""
    return sorted((path for path in folder.glob("*.pt") if NAME.fullmatch(path.name)), reverse=True)


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
