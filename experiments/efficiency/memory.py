"""The peak of a run's memory on a CPU, by the resident size of a process of its own, which gives back what it frees.

`main` is one that has loaded all it needs and started no thread; for each line [layer, task, dtype, threads, seconds,
width, batch, length, width of the input] it makes a copy of itself, which does that run, and says [status, bytes or the
reason].
"""

import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

WARM = 8  # tokens, to have kernels loaded before
USABLE = 0.9  # of the memory that is free
# glibc gives back what is freed from this size on; by itself it moves the limit, and how many freed tensors a process
# then still holds is luck (the log-space form's peak was 325, 453 or 485 MiB).
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def supported() -> bool:
    return Path("/proc/self/clear_refs").exists()


class Peaks:
    """That process, while it is needed."""

    def __enter__(self):
        command = [sys.executable, "-c", "from experiments.efficiency.memory import main; main()"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, **pipes, env=os.environ | GIVE_BACK)
        return self

    def __exit__(self, *exception):
        self.process.communicate()

    def __call__(self, *request: Any) -> tuple[str, Any]:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return tuple(json.loads(self.process.stdout.readline()))


def answer(layer: str, task: str, dtype: str, threads: int, seconds: float, *size: int) -> tuple[str, Any]:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.setitimer(signal.ITIMER_REAL, seconds)  # the signal ends it, wherever it is
        try:
            said = ("done", peak(layer, task, dtype, threads, *size))
        except MemoryError as error:
            said = ("out of memory", str(error))
        except RuntimeError as error:
            _, short, size = str(error).partition("can't allocate memory: you ")
            said = ("out of memory", size.partition(".")[0]) if short else ("failed", str(error).strip()[-300:])
        except Exception as error:
            said = ("failed", f"{type(error).__name__}: {error}"[:300])
        os.write(write, json.dumps(said).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        said = file.read()
    _, status = os.waitpid(pid, 0)
    if said:
        return tuple(json.loads(said))
    number = -os.waitstatus_to_exitcode(status)
    if number == signal.SIGALRM:
        return "time-out", f"a run took more than {seconds:g} s"
    if number == signal.SIGKILL:
        return "out of memory", "killed by the system"
    return "failed", f"ended by signal {number}"


def peak(
    layer: str, task: str, dtype: str, threads: int, width: int, batch: int, length: int, inputs: int | None = None
) -> int:
    """Bytes."""
    from .layers import LAYERS
    from .sweep import work

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    limit = _status("VmSize") + int(USABLE * _free())
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    found, dtype = LAYERS[layer], getattr(torch, dtype)
    inputs = inputs or width
    net = found.made(inputs, width).to(dtype)
    work(task, found, net, torch.randn(1, WARM, inputs, dtype=dtype))()
    run = work(task, found, net, torch.randn(batch, length, inputs, dtype=dtype))
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    """Bytes, of this process."""
    return int(re.search(rf"^{key}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) * 1024


def _free() -> int:
    return int(re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)[1]) * 1024


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(answer(*json.loads(line))), flush=True)
