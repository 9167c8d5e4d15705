"""Measures layers against the length, the batch size and the width, for the paper's figures."""

import contextlib
import dataclasses
import itertools
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from .. import cost, machine
from ..config import EfficiencyData
from ..measure import Call
from . import memory
from .layers import LAYERS, Layer, available, check
from .timer import PATIENCE, Case, Point, Timer, dtypes, name_of, sizes

EXPANSIONS = (1, 2, 3, 4)


def prepare(
    data: EfficiencyData, device: torch.device, stack: contextlib.ExitStack
) -> tuple[list[Case], dict[str, Any]]:
    """A case for each size, and the record's other entries: errors by layer, dtype, and the machine's limits."""
    here = available(device.type)
    for name in data.layers or ():
        if name not in here and name not in LAYERS:
            raise ValueError(f"data.layers: expected some of {list(here)} (those that are here), got {name!r}")
    errors: dict[str, float | str] = {
        name: "it is not installed, or not for this device" for name in data.layers or () if name not in here
    }
    layers = {name: layer for name, layer in here.items() if data.layers is None or name in data.layers}
    if data.task == "step":
        layers = {name: layer for name, layer in layers.items() if layer.step}
    peaks = None
    if data.memory and device.type == "cpu":
        if memory.supported():
            peaks = stack.enter_context(memory.Peaks())
        else:
            print("efficiency: no peak memory, which is read in Linux's /proc", flush=True)
    cases, limits = [], {}
    for dtype in dtypes(data, device):
        right, found = checked(layers, sizes(data), device, dtype)
        errors |= {name if not limits else f"{name}, {name_of(dtype)}": error for name, error in found.items()}
        limits[dtype] = cost.here(device.type, dtype)
        for size in sizes(data):
            said = size | ({"dtype": name_of(dtype)} if data.dtypes else {})
            settings = {"dtype": dtype, "limits": limits[dtype], "peaks": peaks}
            cases.append((said, partial(_at, data, device, said, right, **settings)))
    facts = {"dtype": ", ".join(map(name_of, limits)), "limits": dataclasses.asdict(next(iter(limits.values())))}
    return cases, {"errors": errors, **facts}


def _at(
    data: EfficiencyData, device: torch.device, said: Point, layers: dict[str, Layer], before: list[Point], **settings
) -> list[Point]:
    return LayerTimer(data, device, said, **settings).all(layers, before)


def checked(
    layers: dict[str, Layer], found: list[Point], device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, Layer], dict[str, float | str]]:
    """The layers that are right, and every layer's error, before any is timed. Raises if one of ours is wrong."""
    right, errors = dict(layers), {}
    widths = sorted({(size.get("input", size["width"]), size["width"]) for size in found})
    for name, layer in layers.items():
        try:
            errors[name] = max(
                check(name, layer, layer.made(*pair).to(device, dtype), _draw(2, 48, pair[0], device, dtype))
                for pair in widths
                if layer.takes(*pair)
            )
        except Exception as error:  # another library's failure is a result
            if name in ("minGRU", "minLSTM"):
                raise
            errors[name] = f"{type(error).__name__}: {error}"[:300]
            del right[name]
    return right, errors


def _draw(batch: int, length: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(batch, length, width, device=device, dtype=dtype)


@dataclasses.dataclass(kw_only=True)
class LayerTimer(Timer):
    dtype: torch.dtype
    limits: cost.Machine
    peaks: memory.Peaks | None  # set where memory is measured in another process

    @property
    def size(self) -> tuple[int, int, int, int]:
        """B, T, the input's width, D."""
        return self.said["batch"], self.said["length"], self.said.get("input", self.said["width"]), self.said["width"]

    def all(self, layers: dict[str, Layer], before: list[Point]) -> list[Point]:
        layers = {name: layer for name, layer in layers.items() if layer.takes(*self.size[2:])}
        layers = {name: layer for name, layer in layers.items() if self.may(name, before)}
        peaks: dict[str, Point] = {}
        if self.peaks is not None:
            machine.return_freed_memory()
            layers = {name: layer for name, layer in layers.items() if self._peak_elsewhere(name, peaks)}

        def more(name: str, call: Call, numbers: Point) -> Point:
            return peaks.get(name, {}) | self._costs(name, layers[name]) | self._energy(call, numbers["median"])

        return self.measure({name: partial(self.call, layer, self.x) for name, layer in layers.items()}, more)

    def may(self, layer: str, points: list[Point]) -> bool:
        """Whether to try the layer; records False if a shorter sequence failed or predicts a time-out."""
        same = {"layer": layer} | {key: value for key, value in self.said.items() if key != "length"}
        length = self.said["length"]
        shorter = [p for p in points if same.items() <= p.items() and p["length"] < length]
        if not shorter:
            return True
        last = shorter[-1]
        if last["status"] != "done":
            reason = last["reason"] if "shorter" in last["reason"] else f"{last['reason']} at a shorter length"
            self.note(layer, last["status"], reason)
            return False
        expected = last["median"] * length / last["length"]
        if self.data.task != "step" and expected > self.data.limit:
            taken = f"a run of a shorter one, {last['length']}, took {last['median']:.2g} s"
            self.note(layer, "time-out", f"{taken}, so it would take more than {self.data.limit:g}")
        return self.data.task == "step" or expected <= self.data.limit

    @cached_property
    def x(self) -> Tensor:
        """The input (B, T, width of the input), the same for all layers."""
        return self._input()

    def _input(self) -> Tensor:
        return _draw(*self.size[:3], self.device, self.dtype)

    def call(self, layer: Layer, x: Tensor) -> Call:
        """The run that is timed."""
        usual = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)  # not by `.to`, which fake tensors do not all survive
        try:
            with self.device:
                net = layer.made(*self.size[2:])
        finally:
            torch.set_default_dtype(usual)
        return work(self.data.task, layer, net, x)

    def _peak_elsewhere(self, name: str, peaks: dict[str, Point]) -> bool:
        """Measures a layer's peak in another process; records and returns False if that fails."""
        batch, length, inputs, width = self.size
        settings = (self.data.task, name_of(self.dtype), torch.get_num_threads(), PATIENCE * self.data.limit)
        status, value = self.peaks(name, *settings, width, batch, length, inputs)
        if status == "done":
            peaks[name] = {"peak": value}
        else:
            self.note(name, status, value)
        return status == "done"

    def _costs(self, name: str, layer: Layer) -> Point:
        """The costs of one run over a sequence. Loops are not counted, which would take minutes."""
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

    def _energy(self, call: Call, median: float) -> Point:
        """The joules of a run, over half a second, by the card's counter (millijoules, updated about every 20 ms)."""
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


def work(task: str, layer: Layer, net: nn.Module, x: Tensor) -> Call:
    """One run of a task on x (B, T, width of the input). A training step computes input and weight gradients."""
    net.train(task == "train")  # otherwise torch's layers keep what only a gradient needs
    if task == "train":
        x.requires_grad_()
        leaves = [x, *net.parameters()]
        # The loss is the sum of squares, which reads the whole output once.
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


def prepare_count(
    data: EfficiencyData, device: torch.device, stack: contextlib.ExitStack
) -> tuple[list[Case], dict[str, Any]]:
    return [({}, lambda before: parameters(data.widths))], {}


def parameters(widths: list[int]) -> list[Point]:
    """The parameters, as torch counts them, of layers that are `expansion` times as wide as their input."""
    import minrnn

    kinds = {"minGRU": minrnn.MinGRU, "GRU": nn.GRU, "minLSTM": minrnn.MinLSTM, "LSTM": nn.LSTM}
    points = []
    for width, expansion, (name, cls) in itertools.product(widths, EXPANSIONS, kinds.items()):
        count = sum(p.numel() for p in cls(width, width * expansion).parameters())
        points.append({"layer": name, "width": width, "expansion": expansion, "status": "done", "parameters": count})
    return points
