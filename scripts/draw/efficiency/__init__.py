"""Records of the efficiency experiment and what they say in words. Needs no torch.

One record is one part on one machine. Numbers of two machines, or of two parts, never stand in one ratio.
"""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.config import run_id
from experiments.records import RecordError, read_records

TITLES = {
    "train": "Forward, loss and backward, against the length",
    "long": "Forward, loss and backward, a single sequence",
    "half": "Forward, loss and backward in 16 bits",
    "forward": "Forward alone",
    "batch": "Forward, loss and backward, against the batch size",
    "width": "Forward, loss and backward, against the width",
    "context": "A context is read, and one token more",
    "step": "One token, after so many",
    "parameters": "Parameters",
    "kernels": "Scans",
    "layers": "Layers beside others",
    "precision": "Precision",
    "copying": "A training step of selective copying",
    "language": "A training step of the character model",
    "policy": "A decision model in use",
}
FAMILIES = {
    "minGRU": ("minGRU", "minGRU, log-space", "minGRU, loop", "minGRU-pytorch", "GRU, torch", "GRU, loop"),
    "minLSTM": ("minLSTM", "minLSTM, log-space", "minLSTM, loop", "LSTM, torch", "LSTM, loop"),
    "others": ("minGRU", "minLSTM", "Mamba", "mamba-ssm", "attention"),
}
BASELINES = {"minGRU": "GRU", "minLSTM": "LSTM"}

Point = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One record, with its points."""

    record: dict[str, Any]

    @property
    def name(self) -> str:
        return self.record["config"]["data"]["part"]

    @property
    def kind(self) -> str:
        """The part's task; for layers, "layers" where it lists shapes, else "sweep"."""
        data = self.record["config"]["data"]
        if data["task"] not in ("train", "forward", "context", "step"):
            return data["task"]
        return "layers" if self.name == "layers" or data.get("shapes") else "sweep"

    @property
    def profile(self) -> str:
        return self.record["profile"]

    @property
    def machine(self) -> str:
        """The machine's name with its instruction set, which the settings of older records lack."""
        name, hardware = self.record["config"]["data"]["machine"], self.record["hardware"]
        vector = f" ({hardware['vector']})" if "vector" in hardware and "gpu" not in hardware else ""
        return name if name.endswith(vector) else name + vector

    @property
    def points(self) -> list[Point]:
        return self.record["points"]

    @property
    def layers(self) -> list[str]:
        return list(dict.fromkeys(point["layer"] for point in self.points))

    @property
    def batches(self) -> list[int]:
        return sorted({point["batch"] for point in self.points})

    def at(self, layer: str, axis: str = "length", **given: int) -> dict[int, Point]:
        """A layer's points by one size; the other two are given, or the greatest measured."""
        fixed = {key: max(p[key] for p in self.points) for key in ("width", "batch", "length") if key != axis} | given
        found = {p[axis]: p for p in self.points if p["layer"] == layer and fixed.items() <= p.items()}
        return dict(sorted(found.items()))

    def of(self, layer: str, axis: str = "length", **given: int) -> dict[int, Point]:
        """The points as in `at` that were measured."""
        return {n: point for n, point in self.at(layer, axis, **given).items() if point["status"] == "done"}

    def ratios(self, over: str, under: str, key: str = "median", **given: int) -> dict[int, float]:
        """The ratios of two layers, by length, where both were measured."""
        a, b = self.of(over, **given), self.of(under, **given)
        return {n: a[n][key] / b[n][key] for n in a if n in b and a[n].get(key) and b[n].get(key)}


Machines = dict[tuple[str, str], dict[str, Part]]  # by profile and machine, by part


def load(results_dir: str | Path) -> Machines:
    found: Machines = {}
    for record in read_records(results_dir, "efficiency"):
        if run_id(record["config"]) != record["run_id"]:
            raise RecordError(
                f"record {record['run_id']}: its settings are those of run {run_id(record['config'])} by now "
                "(a default has changed); remove it to have it measured again"
            )
        part = Part(record)
        here = found.setdefault((part.profile, part.machine), {})
        if part.name in here:  # run with other settings given by hand
            raise RecordError(
                f"records {here[part.name].record['run_id']} and {record['run_id']} are two of part {part.name} on "
                f"{part.machine}; remove one, or measure it with a data.part of its own"
            )
        here[part.name] = part
    order = {name: i for i, name in enumerate(TITLES)}
    return {
        key: dict(sorted(parts.items(), key=lambda item: order.get(item[0], 99)))
        for key, parts in sorted(found.items())
    }


def slug(profile: str, machine: str) -> str:
    """The profile and machine as part of a file name."""
    text = "".join(char if char.isalnum() else "_" for char in machine.lower())
    return "_".join(filter(None, f"{profile if profile != 'paper' else ''}_{text}".split("_")))


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 0.9995 else f"{1e3 * seconds:,.0f}"


# -- what was found


def findings(parts: dict[str, Part]) -> list[str]:
    """Sentences on the findings, each over every size that was measured."""
    said = []
    if (train := parts.get("train")) is not None:
        for ours, theirs in BASELINES.items():
            fused, log, loop, other = ours, f"{ours}, log-space", f"{ours}, loop", f"{theirs}, loop"
            for pair in ((fused, f"{theirs}, torch"), (log, other), (loop, other), (loop, log)):
                said += _speed(train, *pair)
            for pair in ((fused, f"{theirs}, torch"), (log, other), (loop, other)):
                said += _memory(train, *pair)
            said += _of_the_limit(train, ours) + _growth(train, ours)
    if (context := parts.get("context")) is not None:
        for ours in BASELINES:
            said += _beside(context, ours, "a context and one token")
    if (step := parts.get("step")) is not None:
        for ours in BASELINES:
            said += _beside(step, ours, "one token")
        for layer in (*BASELINES, "attention"):
            said += _after_more(step, layer)
    return said


def _called(layer: str) -> str:
    name, _, form = layer.partition(", ")
    return {"torch": f"torch's {name}", "loop": f"the {name} loop", "log-space": f"{name} in log space"}.get(form, name)


def _span(values: Iterable[float]) -> str:
    low, high = (f"{v:.2f}" if v < 2 else f"{v:.2g}" if v < 100 else f"{v:,.0f}" for v in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _list(values: Iterable[Any]) -> str:
    *first, last = map(str, values)
    return f"{', '.join(first)} and {last}" if first else last


def batch_sizes(batches: Collection[int]) -> str:
    return f"batch size{'s' if len(batches) > 1 else ''} {_list(batches)}"


def _range(lengths: Collection[int]) -> str:
    low, high = min(lengths), max(lengths)
    return f"{low} to {high}" if low < high else f"{low}"


def _speed(part: Part, layer: str, other: str) -> list[str]:
    ratios = part.ratios(other, layer)
    if not ratios:
        return []
    slower = [n for n, ratio in ratios.items() if ratio < 1]
    but = f"; it is slower at {'each' if len(slower) == len(ratios) else _list(slower)}" if slower else ""
    vector = "" if "gpu" in part.record["hardware"] else f" with {part.record['hardware']['vector']}"
    times = f"{_span(ratios.values())} times as fast as {_called(other)}{vector}"
    return [f"{_capital(_called(layer))} trains {times} at lengths of {_range(ratios)}{but}."]


def _capital(name: str) -> str:
    """The name as it begins a sentence; minGRU stays minGRU."""
    return "T" + name[1:] if name.startswith("t") else name


def _memory(part: Part, layer: str, other: str) -> list[str]:
    ratios = part.ratios(layer, other, "peak")
    if not ratios:
        return []
    times = f"{_span(ratios.values())} times the memory of {_called(other)}"
    return [f"{_capital(_called(layer))} takes {times} at lengths of {_range(ratios)}."]


def _of_the_limit(part: Part, layer: str) -> list[str]:
    shares = {n: point["least"] / point["median"] for n, point in part.of(layer).items() if point.get("least")}
    if not shares:
        return []
    return [
        f"{layer} reaches {_span(shares.values())} of the speed that the measured rates of copying and of matrix "
        f"products allow, at lengths of {_range(shares)}."
    ]


def _growth(part: Part, layer: str) -> list[str]:
    found = growth(part, layer)
    if not found:
        return []
    return [
        f"The time of {layer} grows with the length to the power of {_span(found)} (1 is linear), from each length of "
        f"{_range(part.of(layer))} to the next that is four or more times as long."
    ]


def growth(part: Part, layer: str) -> list[float]:
    """Exponents of the time between each length and the next that is four or more times as long."""
    points, found = part.of(layer), []
    for n in points:
        longer = [m for m in points if m >= 4 * n]
        if longer:
            m = min(longer)
            found.append(math.log(points[m]["median"] / points[n]["median"]) / math.log(m / n))
    return found


def _beside(part: Part, ours: str, what: str) -> list[str]:
    """Sentences on others' times over ours, and on those that are faster anywhere."""
    times, faster, lengths = {}, [], set()
    for other in dict.fromkeys((*FAMILIES[ours], *FAMILIES["others"])):
        ratios = {batch: part.ratios(other, ours, batch=batch) for batch in part.batches if other not in BASELINES}
        ratios = {batch: found for batch, found in ratios.items() if found}
        if ratios:
            times[_called(other)] = _span([ratio for found in ratios.values() for ratio in found.values()])
            lengths.update(*ratios.values())
        if less := [batch for batch, found in ratios.items() if min(found.values()) < 1]:
            faster.append(f"{_called(other)} at {batch_sizes(less)}")
    if not times:
        return []
    (first, span), *rest = times.items()
    said = ", ".join(f"{name} {span} times" for name, span in rest)
    return [
        f"{_capital(first)} takes {span} times as long as {ours} for {what}{f', {said}' if said else ''}, "
        f"at {batch_sizes(part.batches)} and lengths of {_range(lengths)}.",
        f"{ours} is slower for {what}, at some length, than {_list(faster)}."
        if faster
        else f"{ours} is the fastest of them for {what}, at every length.",
    ]


def _after_more(step: Part, layer: str) -> list[str]:
    ratios = {}
    for batch in step.batches:
        first, *more = step.of(layer, batch=batch).values() or [None]
        ratios |= {(batch, point["length"]): point["median"] / first["median"] for point in more}
    if not ratios:
        return []
    first = min(point["length"] for point in step.points)
    return [
        f"{layer} takes {_span(ratios.values())} times as long for one token after {_range([n for _, n in ratios])} "
        f"tokens as after {first}, at {batch_sizes(step.batches)}."
    ]


def left_out(parts: dict[str, Part]) -> list[str]:
    """Sentences on what was not timed: a layer's first size in a sweep, as greater ones follow it; else every shape."""
    said = {}
    for name, part in parts.items():
        for point in part.points:
            if point["status"] != "done":
                sizes = f"{point['batch']} sequences of {point['length']}"
                sizes = f"from {sizes} on" if part.kind == "sweep" else f"at {sizes}"
                key = (name, point["layer"], "" if part.kind == "sweep" else sizes)
                said.setdefault(key, f"{sizes} ({point['status']}: {point['reason']})")
        for layer, error in part.record.get("errors", {}).items():
            if isinstance(error, str):
                said[name, layer, ""] = f"at every size, as it is wrong or does not run: {error}"
    return [f"Part {name} leaves out {layer} {reason}." for (name, layer, _), reason in said.items()]


FIGURES = {  # in the order of the report: the part that says how it was measured, and what it shows
    "train_time": ("train", "Time."),
    "speedup": ("train", "How many times as fast: torch's layers and hand-written loops over this project's, loops "
        "over log space, as the paper compares, and loops over loops."),
    "train_memory": ("train", "Peak memory of a run, beyond weights and input."),
    "latency": ("step", "Latency: a context read and one token more, and one token alone."),
    "long_time": ("long", "Time."),
    "forward_time": ("forward", "Time."),
    "half_time": ("half", "Time."),
    "half_memory": ("half", "Peak memory of a run, beyond weights and input."),
    "size": ("batch", "Training speed, by batch size and by width."),
    "parameters": ("parameters", "Parameters over those of GRU and LSTM; lines: the paper's formula."),
    "policy_step": ("policy", "A step of a policy, by the steps before it."),
}  # fmt: skip
