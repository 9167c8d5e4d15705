"""Measures the time of a run and the machine's limit, and checks results before they are timed."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

Call = Callable[[], object]


def once(f: Call, device: str) -> float:
    """The seconds of one run of `f`; on a GPU, between two events."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        f()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    f()
    return time.perf_counter() - begin


def seconds(f: Call, device: str, at_least: float = 1.0, runs: tuple[int, int] = (7, 60)) -> list[float]:
    """Seconds of each run of `f` after two to warm up, for about `at_least` seconds."""
    for _ in range(2):
        f()
    taken: list[float] = []
    start = time.perf_counter()
    while len(taken) < runs[0] or (time.perf_counter() - start < at_least and len(taken) < runs[1]):
        taken.append(once(f, device))
    return taken


def summary(taken: list[float]) -> dict[str, float]:
    """The statistics of the seconds of two or more runs."""
    q1, median, q3 = statistics.quantiles(taken, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3, "min": min(taken), "n": len(taken)}


def copy_bandwidth(device: str, at_least: float = 1.0) -> float:
    """Bytes a second, read plus written, of a copy between two warm tensors larger than any cache."""
    source = torch.ones((1 << 30) // 4 if device == "cuda" else (1 << 28) // 4, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / min(seconds(lambda: target.copy_(source), device, at_least))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm()).item()


def check(name: str, actual: Tensor, expected: Tensor, most: float) -> float:
    """The relative error against the float64 result. Raises ArithmeticError: it is more than `most`, or is NaN."""
    error = relative_error(actual.cpu(), expected.cpu())
    if not error <= most:
        raise ArithmeticError(f"{name}: off by {error:.1e} of the result in float64, allowed {most:.0e}")
    return error
