"""Checkpoints that survive a kill: written whole, named by step and checksum, the last two kept."""

import hashlib
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch

KEPT = 2
NAME = re.compile(r"(\d{9})-([0-9a-f]{16})\.pt")


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Tensors and plain values only: `load` executes nothing from a file."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".writing-{os.getpid()}"
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    path = folder / f"{step:09d}-{_checksum(temporary)}.pt"
    temporary.replace(path)
    for old in _found(folder)[KEPT:]:
        old.unlink()
    return path


def clean(folder: Path) -> None:
    """Sets aside what is damaged, so that it takes no whole one's place; removes what a kill left half written."""
    for path in _found(folder):
        if not _whole(path):
            warnings.warn(
                f"{path}: the checkpoint is damaged (its checksum differs); using the one before it", stacklevel=2
            )
            path.replace(path.with_suffix(".damaged"))
    for path in folder.glob(".writing-*"):
        path.unlink()


def load(folder: Path, device: str | torch.device) -> dict[str, Any] | None:
    """The newest checkpoint that is whole, or None."""
    for path in _found(folder):
        if _whole(path):
            return torch.load(path, map_location=device, weights_only=True)
    return None


def _whole(path: Path) -> bool:
    """Whether its content is what its name says."""
    return _checksum(path) == NAME.fullmatch(path.name)[2]


def _found(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted((path for path in folder.glob("*.pt") if NAME.fullmatch(path.name)), reverse=True)


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
