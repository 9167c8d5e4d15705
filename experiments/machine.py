"""What a measurement was made with: hardware, versions, commit."""

import ctypes
import importlib.metadata
import os
import platform
import re
import resource
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor


def hardware(device: str) -> dict[str, object]:
    cpu = _processor().get("model name", platform.processor())
    facts = {"device": device, "cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    facts["vector"] = torch.backends.cpu.get_cpu_capability()
    if device == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return facts


@cache
def _processor() -> dict[str, str]:
    """The entries of the first processor in Linux's /proc/cpuinfo; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    first = path.read_text().partition("\n\n")[0] if path.exists() else ""
    return dict(re.findall(r"^(.+?)\s*: (.*)$", first, re.MULTILINE))


def name(hardware: dict[str, object]) -> str:
    """The machine's name: the card, or the processor with its threads and the instruction set that torch found."""
    return hardware.get("gpu") or f"{hardware['cpu']}, {hardware['threads']} threads ({hardware['vector']})"


def versions(*packages: str) -> dict[str, str | None]:
    """The versions of Python, torch, and the packages; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit(*folders: str) -> dict[str, object]:
    """The commit, and whether the given folders are unchanged since it."""

    def git(*arguments):
        return subprocess.run(["git", *arguments], capture_output=True, text=True).stdout.strip()

    try:
        head = git("rev-parse", "HEAD") or None
    except FileNotFoundError:  # no git here
        return {"commit": None, "clean": False}
    return {"commit": head, "clean": head is not None and not git("status", "--porcelain", *folders)}


def made_with(device: str, *packages: str) -> dict[str, dict[str, object]]:
    """A record's hardware, versions and commit."""
    return {
        "git": commit("minrnn", "experiments", "configs"),
        "versions": versions(*packages),
        "hardware": hardware(device),
    }


def peak_memory(device: str) -> int:
    """The peak memory in bytes: allocated by torch on a GPU, resident in this process elsewhere."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def keep_freed_memory() -> None:
    """Makes glibc keep what torch frees; otherwise page faults make each large tensor ten times as slow to write.

    A training process belongs to the project, so it may set its allocator; outside Linux this does nothing.
    """
    if (libc := _glibc()) is not None:
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def return_freed_memory() -> None:
    """Returns kept memory to the system, for another process."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


@cache
def fast_products() -> str:
    """Chooses this processor's fastest library for float32 matrix products in this process, and returns its name.

    On AMD's processors with AVX-512, torch's choice, MKL, is half as fast as oneDNN (115 and 260 GFLOP/s a core of
    family 26). The processor decides, never a timing, so that a resumed run computes the same.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or _processor().get("vendor_id") != "AuthenticAMD":
        return "torch"
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that torch's own kernel is replaced
        _products.impl("mm", _mm, "CPU")
        _products.impl("addmm", _addmm, "CPU")
    return "oneDNN"


_products = torch.library.Library("aten", "IMPL")
SMALL = 2**18  # multiply-adds, below which torch's own kernel is as fast


def _mm(a: Tensor, b: Tensor) -> Tensor:
    if _small(a, b):
        return torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[1]))
    return torch.ops.mkldnn._linear_pointwise(_dense(a), _dense(b).t(), None, "none", [], "")


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if _small(a, b) or bias.dim() != 1 or beta != 1 or alpha != 1:
        return torch.addmm(bias, a, b, beta=beta, alpha=alpha, out=a.new_empty(a.shape[0], b.shape[1]))
    return torch.ops.mkldnn._linear_pointwise(_dense(a), _dense(b).t(), bias.contiguous(), "none", [], "")


def _small(a: Tensor, b: Tensor) -> bool:
    return a.dtype != torch.float32 or a.numel() * b.shape[1] < SMALL


def _dense(x: Tensor) -> Tensor:
    """The matrix with contiguous rows or columns, as oneDNN is slow on others."""
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "gnu_get_libc_version") else None
