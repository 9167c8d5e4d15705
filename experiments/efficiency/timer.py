"""Times layers at one size by turns; a failure is recorded and does not stop the others."""

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..config import EfficiencyData
from ..measure import Call, once, summary

Point = dict[str, Any]
Build = Callable[[], Call]  # makes what is timed
# The entries that identify points (sizes, and what else varies), and a function from the earlier points to these.
Case = tuple[Point, Callable[[list[Point]], list[Point]]]

WARM_UPS = 2
MOST = 1000  # runs of a layer at a point
PATIENCE = 4  # times data.limit: the limit of a first run, and of one whose memory is measured
# The error of a device that the process can no longer use; older torch lacks it.
DEVICE_LOST = getattr(torch, "AcceleratorError", ())


@dataclasses.dataclass
class Timer:
    """Times all layers at one size.

    Attributes:
        said: the entries that all its points share.
    """

    data: EfficiencyData
    device: torch.device
    said: Point
    points: list[Point] = dataclasses.field(default_factory=list)

    def note(self, layer: str, status: str, reason: str | None = None, **values: Any) -> None:
        self.points.append({"layer": layer, **self.said, "status": status, "reason": reason, **values})

    def measure(
        self, builds: dict[str, Build], more: Callable[[str, Call, Point], Point] = lambda *_: {}
    ) -> list[Point]:
        """Records a point for each; `more` gives its further entries, from its name, its call and its times."""
        calls, times, peaks = {}, {}, {}
        for name, build in builds.items():
            warm = self.attempt(name, partial(self._warm, build))
            if warm is None:
                continue
            call, taken, peak = warm
            if taken > self.data.limit:
                self.note(name, "time-out", f"a run took {taken:.2g} s, more than {self.data.limit:g}")
            else:
                calls[name], times[name], peaks[name] = call, [], {} if peak is None else {"peak": peak}
        left = dict(calls)
        while left:  # by turns, so that a disturbance affects all alike
            for name, call in list(left.items()):
                taken = self.attempt(name, partial(once, call, self.device.type))
                if taken is None:
                    del left[name], times[name]
                    continue
                times[name].append(taken)
                if self.enough(times[name]):
                    del left[name]
        for name, taken in times.items():
            numbers = summary(taken)
            self.note(name, "done", **numbers | peaks[name] | more(name, calls[name], numbers))
        return self.points

    def attempt(self, layer: str, f: Callable[[], Any]) -> Any:
        """The result of `f`, or None after a failure, which is recorded. Errors that end the device are raised."""
        try:
            return f()
        except torch.OutOfMemoryError as error:
            self.note(layer, "out of memory", str(error).splitlines()[0])
        except DEVICE_LOST:
            raise
        except Exception as error:
            self.note(layer, "failed", f"{type(error).__name__}: {error}"[:300])

    def _warm(self, build: Build) -> tuple[Call, float, int | None]:
        """The run, the seconds that it last took, and its peak memory on a GPU."""
        call, watched = build(), self.device.type == "cuda" and self.data.memory
        if watched:
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
        taken = once(call, self.device.type)
        for _ in range(WARM_UPS - 1):
            # A run is long enough to have warmed up, or hopeless; the first one also pays for new memory.
            if self.data.seconds < taken <= self.data.limit or taken > PATIENCE * self.data.limit:
                break
            taken = once(call, self.device.type)
        return call, taken, torch.cuda.max_memory_allocated(self.device) - before if watched else None

    def enough(self, taken: list[float]) -> bool:
        n = len(taken)
        if n < max(2, self.data.least) or (n > 10 and n % 10):  # sorting them takes longer than a short run
            return False
        numbers = summary(taken)
        # Ten consecutive short runs may all fall into one bad moment.
        agree = n >= 10 and sum(taken) >= self.data.seconds / 20
        agree = agree and numbers["q3"] - numbers["q1"] <= self.data.spread * numbers["median"]
        return agree or n >= MOST or sum(taken) >= self.data.seconds


def sizes(data: EfficiencyData) -> list[Point]:
    if data.shapes is not None:
        return [dict(zip(("batch", "length", "width", "input"), shape, strict=False)) for shape in data.shapes]
    combined = itertools.product(data.widths, data.batch_sizes, sorted(data.lengths))
    return [{"width": width, "batch": batch, "length": length} for width, batch, length in combined]


def dtypes(data: EfficiencyData, device: torch.device) -> list[torch.dtype]:
    """The dtypes to measure; `half` is bfloat16, or float16 on a GPU without it, such as a T4."""
    old = device.type == "cuda" and torch.cuda.get_device_capability() < (8, 0)
    names = {"half": "float16" if old else "bfloat16"}
    return [getattr(torch, names.get(name, name)) for name in data.dtypes or [data.dtype]]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
