"""The peak memory of a run on a CPU: the resident size of a separate process, which returns freed memory.

`main` is a process that has loaded all it needs and started no thread. For each line [layer, task, dtype, threads,
seconds, width, batch, length, width of the input] it forks; the copy does that run and answers [status, bytes or the
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

WARM = 8  # tokens of a first run that loads the kernels
USABLE = 0.9  # share of the free memory
# glibc returns freed blocks from this size on. By default it moves the limit, and then chance decides how many freed
# tensors a process still holds (the log-space form's peak was 325, 453 or 485 MiB).
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def supported() -> bool:
    return Path("/proc/self/clear_refs").exists()


class Peaks:
    """Runs the process that measures peaks, while it is needed."""

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
    """The peak memory of a run, in bytes, beyond weights and input."""
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
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    """The bytes of an entry in this process's /proc status."""
    return int(re.search(rf"^{key}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) * 1024


def _free() -> int:
    return int(re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)[1]) * 1024


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(answer(*json.loads(line))), flush=True)
