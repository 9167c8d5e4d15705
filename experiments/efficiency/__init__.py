"""Time and memory of layers, by length, batch size and width: `python -m experiments.efficiency part=train`.

The paper's figures 1, 3 and 4 (arXiv 2410.01201), with two baselines each: the hand-written loop that the paper has,
and the layer that a user of torch has. minGRU and minLSTM stand in three forms: fused, in log space as the paper has
them, and as a loop. A record's `points` hold, for each layer at each size:

    status    done, time-out, out of memory or failed, with the reason
    median, q1, q3, min    seconds of a run; n of them. All layers of a point are run by turns, in a process that keeps
              what is freed, as this project's training does
    peak      bytes: what a run allocates beyond weights and input. On a CPU by the growth of the resident size of a
              process of its own, which gives back what it frees; on a GPU by torch's allocator
    operations, bytes, least    what must be done (experiments/cost.py) and the seconds that this takes here at least
    joules    of a run, where the card counts them
"""

import contextlib
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from tqdm import tqdm

from .. import cost, engine, files, machine, records
from ..config import Efficiency, EfficiencyData, run_id
from . import memory
from .layers import Layer, available, check

STARTED = time.monotonic()
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EXPANSIONS = (1, 2, 3, 4)
WARM_UPS = 2
MOST = 1000  # runs of a layer at a point
PATIENCE = 4  # times data.limit: what a first run, and one whose memory is measured, may take
# A device that is of no more use to a process; older torch has no name for it.
DEVICE_LOST = getattr(torch, "AcceleratorError", ())

Point = dict[str, Any]


def run(cfg: Efficiency) -> str:
    """Does a part unless this machine has its record. Returns "done", "paused", "stopped" or "busy"."""
    device = engine.device_of(cfg)
    here = machine_name(device)
    if cfg.data.machine not in (None, here):
        raise ValueError(f"data.machine: expected none, it is found; got {cfg.data.machine!r}, this is {here!r}")
    cfg.data.machine = here
    config = dataclasses.asdict(cfg)
    name = run_id(config)
    path = records.record_path(cfg.results_dir, cfg.experiment, name)
    with files.claim(path.parent) as mine:
        if records.is_final(records.read_record(path)):
            print(f"efficiency {cfg.data.part} {name}: done already, see {path}", flush=True)
            return "done"
        if not mine:
            print(f"efficiency {name}: another process is at it (it holds {path.parent / '.lock'})", flush=True)
            return "busy"
        began = time.time()
        folder = records.work_dir(cfg.output_dir, cfg.experiment, name)
        record = {
            "schema_version": records.SCHEMA_VERSION,
            "run_id": name,
            "experiment": cfg.experiment,
            "profile": cfg.profile,
            "config": config,
            "seed": cfg.seed,
            "status": "done",
            "reason": None,
            "git": machine.commit("minrnn", "experiments", "configs"),
            "versions": machine.versions("numpy", "triton", "numba", "minGRU-pytorch", "mamba-ssm"),
            "hardware": machine.hardware(device.type),
            "started": began,
        }
        with engine.stop_signals() as stop:
            made_with = {key: record[key] for key in ("git", "versions", "hardware")}
            found = measure(cfg, device, Kept(folder, made_with), lambda: _why_stop(cfg, stop))
        if isinstance(found, str):
            print(f"efficiency {name}: {found}; the same command goes on from there", flush=True)
            return "paused" if found == OUT else "stopped"
        records.write_json(path, record | found | {"ended": time.time()})
        Kept(folder).path.unlink(missing_ok=True)  # a record that is removed is measured anew
        done = sum(point["status"] == "done" for point in found["points"])
        print(
            f"efficiency {cfg.data.part} {name}: {done} of {len(found['points'])} points in "
            f"{found['seconds']:.0f} s, see {path}",
            flush=True,
        )
    return "done"


OUT = "out of budget"


def _why_stop(cfg: Efficiency, stop: Any) -> str | None:
    if stop.is_set:
        return "told to stop"
    return OUT if cfg.budget is not None and time.monotonic() - STARTED > cfg.budget else None


def machine_name(device: torch.device) -> str:
    """What a number here belongs to."""
    return machine.name(machine.hardware(device.type))


class Kept:
    """The points of a part that is not finished. Those of another commit or of other versions are not gone on with."""

    def __init__(self, folder: Path, made_with: dict[str, Any] | None = None):
        self.path, self.made_with = folder / "points.json", made_with
        self.points: list[Point] = []
        self.seconds, self.began = 0.0, time.monotonic()
        found = json.loads(self.path.read_text()) if self.path.exists() else {}
        if found.get("made_with") == made_with and found:
            self.points, self.seconds = found["points"], found["seconds"]

    def taken(self) -> float:
        """Seconds, of all processes that were at it."""
        return self.seconds + time.monotonic() - self.began

    def add(self, points: list[Point]) -> None:
        self.points += points
        seconds = self.taken()
        records.write_json(self.path, {"made_with": self.made_with, "seconds": seconds, "points": self.points})


def measure(cfg: Efficiency, device: torch.device, kept: Kept, why_stop: Callable[[], str | None]) -> Any:
    """The measured part of the record; or why it stopped, with what it had by then kept."""
    if (reason := why_stop()) is not None:
        return reason
    data, dtype = cfg.data, _dtype(cfg.data.dtype, device)
    layers = available(device.type)
    for name in data.layers or ():
        if name not in layers:
            raise ValueError(f"data.layers: expected some of {list(layers)} (those that are here), got {name!r}")
    layers = {name: layer for name, layer in layers.items() if data.layers is None or name in data.layers}
    if data.task == "parameters":
        return {"points": parameters(data.widths), "seconds": kept.taken()}
    if data.task == "step":
        layers = {name: layer for name, layer in layers.items() if layer.step}
    machine.keep_freed_memory()  # as every training process of this project does
    torch.manual_seed(cfg.seed)
    errors = _errors(layers, min(data.widths), device, dtype)
    elsewhere = data.memory and device.type == "cpu"
    if elsewhere and not memory.supported():
        print("efficiency: no peak memory, which is read in Linux's /proc", flush=True)
        elsewhere = False
    limits = cost.here(device.type, dtype)
    sizes = list(itertools.product(data.widths, data.batch_sizes, sorted(data.lengths)))
    seen = {(p["width"], p["batch"], p["length"]) for p in kept.points}
    with (
        memory.Peaks() if elsewhere else contextlib.nullcontext() as peaks,
        tqdm(
            total=len(sizes), initial=len(seen), desc=f"efficiency {data.part}", unit="point",
            disable=None if cfg.progress else True, dynamic_ncols=True,
        ) as bar,
    ):  # fmt: skip
        for width, batch, length in sizes:
            if (width, batch, length) in seen:
                continue
            if (reason := why_stop()) is not None:
                return reason
            bar.set_postfix_str(f"width {width}, batch {batch}, length {length}")
            bench = Bench(data, device, dtype, limits, peaks, width, batch, length)
            bench.measure({name: layer for name, layer in layers.items() if bench.may(name, kept.points)})
            kept.add(bench.points)
            bar.update()
    named = {"dtype": _name(dtype), "limits": dataclasses.asdict(limits)}
    return {"points": kept.points, "errors": errors, **named, "seconds": kept.taken()}


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "half":
        old = device.type == "cuda" and torch.cuda.get_device_capability() < (8, 0)
        name = "float16" if old else "bfloat16"
    return DTYPES[name]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _errors(layers: dict[str, Layer], width: int, device: torch.device, dtype: torch.dtype) -> dict[str, float | str]:
    """Of each, before it is timed. One that is wrong is not timed; ours being wrong is an error."""
    found: dict[str, float | str] = {}
    for name in list(layers):
        try:
            net = layers[name].build(width).to(device, dtype)
            found[name] = check(name, layers[name], net, torch.randn(2, 48, width, device=device, dtype=dtype))
        except Exception as error:  # another's failure is a result
            if name in ("minGRU", "minLSTM"):
                raise
            found[name] = f"{type(error).__name__}: {error}"[:300]
            del layers[name]
    return found


@dataclasses.dataclass
class Bench:
    """All layers at one size."""

    data: EfficiencyData
    device: torch.device
    dtype: torch.dtype
    limits: cost.Machine
    peaks: memory.Peaks | None  # where memory is measured in another process
    width: int
    batch: int
    length: int
    points: list[Point] = dataclasses.field(default_factory=list)

    def note(self, layer: str, status: str, reason: str | None = None, **values: Any) -> None:
        size = {"width": self.width, "batch": self.batch, "length": self.length}
        self.points.append({"layer": layer, **size, "status": status, "reason": reason, **values})

    def may(self, layer: str, points: list[Point]) -> bool:
        """False where a shorter sequence was too much already, or says that this one will be; that is noted."""
        shorter = [p for p in points if (p["layer"], p["width"], p["batch"]) == (layer, self.width, self.batch)]
        if not shorter:
            return True
        last = shorter[-1]
        if last["status"] != "done":
            reason = last["reason"] if "shorter" in last["reason"] else f"{last['reason']} at a shorter length"
            self.note(layer, last["status"], reason)
            return False
        expected = last["median"] * self.length / last["length"]
        if self.data.task != "step" and expected > self.data.limit:
            taken = f"a run of a shorter one, {last['length']}, took {last['median']:.2g} s"
            self.note(layer, "time-out", f"{taken}, so it would take more than {self.data.limit:g}")
        return self.data.task == "step" or expected <= self.data.limit

    def measure(self, layers: dict[str, Layer]) -> None:
        data, peaks, calls, times = self.data, {}, {}, {}
        if self.peaks is not None:
            machine.return_freed_memory()
            layers = {name: layer for name, layer in layers.items() if self._peak_elsewhere(name, peaks)}
        for name, layer in layers.items():
            warm = self._try(name, partial(self._warm, layer))
            if warm is None:
                continue
            call, once, peak = warm
            if once > data.limit:
                self.note(name, "time-out", self._too_long(once))
            else:
                calls[name], times[name] = call, []
                if peak is not None:
                    peaks[name] = peak
        left = dict(calls)
        while left:  # by turns, so that what disturbs the machine disturbs all
            for name, call in list(left.items()):
                once = self._try(name, partial(self._seconds, call))
                if once is None:
                    del left[name], times[name]
                    continue
                times[name].append(once)
                if self._enough(times[name]):
                    del left[name]
        for name, taken in times.items():
            q1, median, q3 = statistics.quantiles(taken, n=4, method="inclusive")
            values = {"median": median, "q1": q1, "q3": q3, "min": min(taken), "n": len(taken), "peak": peaks.get(name)}
            self.note(name, "done", **values, **self._costs(name, layers[name]), **self._energy(calls[name], median))

    def _try(self, layer: str, f: Callable[[], Any]) -> Any:
        """What `f` gives; None where it cannot be done, which is noted. After some errors a device can do no more."""
        try:
            return f()
        except torch.OutOfMemoryError as error:
            self.note(layer, "out of memory", str(error).splitlines()[0])
        except DEVICE_LOST:
            raise
        except Exception as error:
            self.note(layer, "failed", f"{type(error).__name__}: {error}"[:300])

    def _warm(self, layer: Layer) -> tuple[Callable[[], object], float, int | None]:
        """The run, the seconds that it took at last, and the peak of memory on a GPU."""
        call, watched = self.call(layer, self.x), self.device.type == "cuda" and self.data.memory
        if watched:
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
        once = self._seconds(call)
        for _ in range(WARM_UPS - 1):
            # Long enough to have warmed up in it, or hopeless; the first pays for memory that is new.
            if self.data.seconds < once <= self.data.limit or once > PATIENCE * self.data.limit:
                break
            once = self._seconds(call)
        return call, once, torch.cuda.max_memory_allocated(self.device) - before if watched else None

    def _too_long(self, once: float) -> str:
        return f"a run took {once:.2g} s, more than {self.data.limit:g}"

    def _enough(self, taken: list[float]) -> bool:
        n = len(taken)
        if n < self.data.least or (n > 10 and n % 10):  # to sort them takes longer than a short run
            return False
        q1, median, q3 = statistics.quantiles(taken, n=4, method="inclusive")
        # Ten short runs in a row may agree on a bad moment.
        agree = n >= 10 and sum(taken) >= self.data.seconds / 20 and q3 - q1 <= self.data.spread * median
        return agree or n >= MOST or sum(taken) >= self.data.seconds

    def _seconds(self, call: Callable[[], object]) -> float:
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1e3
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    @cached_property
    def x(self) -> Tensor:
        """(B, T, D), the same for all layers."""
        return self._input()

    def _input(self) -> Tensor:
        return torch.randn(self.batch, self.length, self.width, dtype=self.dtype, device=self.device)

    def call(self, layer: Layer, x: Tensor) -> Callable[[], object]:
        """What is timed."""
        usual = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)  # not by `.to`, which fake tensors do not all survive
        try:
            with self.device:
                net = layer.build(self.width)
        finally:
            torch.set_default_dtype(usual)
        return work(self.data.task, layer, net, x)

    def _peak_elsewhere(self, name: str, peaks: dict[str, int]) -> bool:
        """False where it is too much, which is noted."""
        size, dtype = (self.width, self.batch, self.length), _name(self.dtype)
        patience = PATIENCE * self.data.limit
        status, value = self.peaks(name, self.data.task, dtype, torch.get_num_threads(), patience, *size)
        if status == "done":
            peaks[name] = value
        else:
            self.note(name, status, value)
        return status == "done"

    def _costs(self, name: str, layer: Layer) -> Point:
        """Of one run over a sequence. What cannot be counted is not; and no loop, where counting takes minutes."""
        if name.endswith("loop") or self.data.task not in ("train", "forward"):
            return {}
        try:
            with FakeTensorMode():
                call = self.call(layer, self._input())
                counted = cost.count(call)
        except Exception as error:
            return {"uncounted": f"{type(error).__name__}: {error}"[:200]}
        operations, moved = cost.total(counted)
        return {"operations": operations, "bytes": moved, "least": self.limits.seconds(counted)}

    def _energy(self, call: Callable[[], object], median: float) -> Point:
        """By the card's own counter (millijoules, of some 20 ms at a time), over half a second."""
        if self.device.type != "cuda":
            return {}
        try:
            import pynvml

            pynvml.nvmlInit()
            card = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(self.device).uuid}")
            runs, before = max(1, int(0.5 / median)), pynvml.nvmlDeviceGetTotalEnergyConsumption(card)
            for _ in range(runs):
                call()
            torch.cuda.synchronize(self.device)
            return {"joules": (pynvml.nvmlDeviceGetTotalEnergyConsumption(card) - before) / 1e3 / runs}
        except Exception as error:
            return {"joules": None, "no_joules": f"{type(error).__name__}: {error}"[:200]}


def work(task: str, layer: Layer, net: nn.Module, x: Tensor) -> Callable[[], object]:
    """One run of a task; x is (B, T, D). A training step leaves gradients of the input and of the weights."""
    net.train(task == "train")  # else torch's layers keep what only a gradient needs
    if task == "train":
        x.requires_grad_()
        leaves = [x, *net.parameters()]
        # Of the sum of squares: something that reads all of the output once.
        return lambda: torch.autograd.grad(layer.read(net, x)[0].square().sum(), leaves)

    @torch.inference_mode()
    def forward() -> Tensor:
        return layer.read(net, x)[0]

    @torch.inference_mode()
    def step(state: Any) -> Tensor:
        return layer.step(net, x[:, -1], state)[0]

    @torch.inference_mode()
    def context() -> Tensor:
        _, state = layer.read(net, x)
        return layer.step(net, x[:, -1], state)[0] if layer.step else layer.read(net, x[:, -1:])[0]

    if task == "step":
        with torch.inference_mode():
            state = layer.read(net, x)[1]
        return partial(step, state)
    return {"forward": forward, "context": context}[task]


def parameters(widths: list[int]) -> list[Point]:
    """Of layers that are `expansion` times as wide as their input, as torch counts them."""
    import minrnn

    kinds = {"minGRU": minrnn.MinGRU, "GRU": nn.GRU, "minLSTM": minrnn.MinLSTM, "LSTM": nn.LSTM}
    points = []
    for width, expansion, (name, cls) in itertools.product(widths, EXPANSIONS, kinds.items()):
        count = sum(p.numel() for p in cls(width, width * expansion).parameters())
        points.append({"layer": name, "width": width, "expansion": expansion, "status": "done", "parameters": count})
    return points
