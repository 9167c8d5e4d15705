"""The process that a run is in: its device, the others that share the run, and the signals that stop it."""

import contextlib
import gc
import os
import signal
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .config import Run


def device_of(cfg: Run) -> torch.device:
    """The device of this process, set as the current one; sets the number of threads too."""
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    name = cfg.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device: expected one that is here, got {cfg.device!r} without a CUDA GPU")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
        torch.cuda.reset_peak_memory_stats()
    return device


@contextlib.contextmanager
def group(cfg: Run, device: torch.device, world: int) -> Iterator[None]:
    """The group of processes that torchrun started."""
    if world == 1:
        yield
        return
    if cfg.train.batch_size % (cfg.micro_batches * world):
        raise ValueError(
            f"train.batch_size: expected a multiple of micro_batches={cfg.micro_batches} times {world} processes, "
            f"got {cfg.train.batch_size}"
        )
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        # Otherwise whatever refers to the group, such as DistributedDataParallel in a cycle, would be freed after the
        # interpreter, and gloo's threads would abort the process.
        gc.collect()
        dist.destroy_process_group()


def from_first(value: Any, world: int) -> Any:
    """The first process's value, in all of them."""
    if world == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def mean(total: Tensor, world: int) -> float:
    """The mean of a value over the processes."""
    if world > 1:
        dist.all_reduce(total)
    return total.item() / world


@contextlib.contextmanager
def stop_signals() -> Iterator[Any]:
    """SIGTERM and SIGINT ask for a stop at the next checkpoint; a second SIGINT stops at once."""

    class Stop:
        is_set = False

    def ask(number, frame):
        if Stop.is_set and number == signal.SIGINT:
            raise KeyboardInterrupt
        Stop.is_set = True

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread, which alone may set handlers
        yield Stop
        return
    try:
        yield Stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
