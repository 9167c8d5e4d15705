"""Timing, the machine's own limit, and the check that comes before any number."""

import statistics
import time
from collections.abc import Callable

import torch


def seconds(
    f: Callable[[], object], device: str, at_least: float = 1.0, runs: tuple[int, int] = (7, 60)
) -> list[float]:
    """Seconds of each run of `f` after a warm-up, for about `at_least` seconds; synchronised on a GPU."""
    for _ in range(2):
        f()
    taken = []
    start = time.perf_counter()
    while len(taken) < runs[0] or (time.perf_counter() - start < at_least and len(taken) < runs[1]):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            f()
            end.record()
            end.synchronize()
            taken.append(begin.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            f()
            taken.append(time.perf_counter() - begin)
    return taken


def summary(taken: list[float]) -> dict[str, float]:
    return {"min_ms": min(taken) * 1e3, "median_ms": statistics.median(taken) * 1e3, "n": len(taken)}


def copy_bandwidth(device: str) -> float:
    """Bytes a second, read plus written, of a copy between two warm tensors larger than any cache."""
    source = torch.ones((1 << 30) // 4 if device == "cuda" else (1 << 28) // 4, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / min(seconds(lambda: target.copy_(source), device))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm()).item()
