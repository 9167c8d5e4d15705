"""Tables, figures and findings of the efficiency experiment, from its records alone. Needs no torch.

One record is one part on one machine. Numbers of two machines, or of two parts, never stand in one ratio.
"""

import csv
import io
import itertools
import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.config import run_id
from experiments.records import RecordError, read_records

PARTS = {
    "smoke": ("train", "step", "parameters"),
    "cpu": ("train", "parameters", "context", "step", "forward", "batch", "width"),
    "paper": ("train", "parameters", "context", "step", "long", "half", "forward", "batch", "width"),
}  # in the order in which they are wanted
ASKED = {"cpu": ("long",)}  # beside them, where it is asked for by name
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
    """A record."""

    record: dict[str, Any]

    @property
    def name(self) -> str:
        return self.record["config"]["data"]["part"]

    @property
    def profile(self) -> str:
        return self.record["profile"]

    @property
    def machine(self) -> str:
        """With its instruction set, which the settings of older records do not name."""
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
        """A layer's points by a size; the other two are given, or the greatest there is."""
        fixed = {key: max(p[key] for p in self.points) for key in ("width", "batch", "length") if key != axis} | given
        found = {p[axis]: p for p in self.points if p["layer"] == layer and fixed.items() <= p.items()}
        return dict(sorted(found.items()))

    def of(self, layer: str, axis: str = "length", **given: int) -> dict[int, Point]:
        """Those that were measured."""
        return {n: point for n, point in self.at(layer, axis, **given).items() if point["status"] == "done"}

    def ratios(self, over: str, under: str, key: str = "median", **given: int) -> dict[int, float]:
        """Of two layers, by length, where both were measured."""
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
        if part.name in here:  # of other settings given by hand
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
    """For file names."""
    text = "".join(char if char.isalnum() else "_" for char in machine.lower())
    return "_".join(filter(None, f"{profile if profile != 'paper' else ''}_{text}".split("_")))


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:,.0f}"


# -- what the paper claims


FORMS = ("log space", "loop", "fused")  # of minGRU and minLSTM


@dataclass(frozen=True)
class Claim:
    """One of section 5.7 of the facts, and what is measured here in its place.

    Attributes:
        row: of results/paper.csv; its text too.
        part: that measures it.
        length: at which.
        key: of a point.
        layers: for each of FORMS, two whose ratio it is (over, under), one whose value it is, or none.
        unit: "x" times; "%" so many more; "ms".
        batch: at which; None: the greatest.
    """

    row: str
    part: str
    length: int
    key: str
    layers: tuple[tuple[str, ...], ...]
    unit: str = "x"
    batch: int | None = None

    def measured(self, parts: dict[str, Part], form: str) -> float | None:
        layers, given = self.layers[FORMS.index(form)], {} if self.batch is None else {"batch": self.batch}
        if self.part not in parts or not layers:
            return None
        if self.unit == "ms":
            point = parts[self.part].of(*layers, **given).get(self.length)
            return None if point is None else 1e3 * point[self.key]
        ratio = parts[self.part].ratios(*layers, self.key, **given).get(self.length)
        return ratio if ratio is None or self.unit == "x" else 100 * (ratio - 1)

    def text(self, value: float | None) -> str:
        if value is None:
            return ""
        if self.unit == "%":
            return f"{value:+.2g} %" if abs(value) < 10 else f"{value:+.0f} %"
        return f"{value:,.0f} {self.unit}" if value >= 100 else f"{value:.{2 if self.unit == 'x' else 3}g} {self.unit}"


def _claims() -> Iterator[Claim]:
    forms = {name: (f"{name}, log-space", f"{name}, loop", name) for name in BASELINES}
    for ours, theirs in BASELINES.items():
        against = tuple(zip((f"{theirs}, loop", f"{theirs}, loop", f"{theirs}, torch"), forms[ours], strict=True))
        for length in (512, 4096):
            row = f"{theirs} takes longer than {ours}, training, T = {length}"
            yield Claim(row, "train", length, "median", against)
        row = f"{ours} takes more memory than {theirs}, training, T = 512"
        yield Claim(row, "train", 512, "peak", tuple(pair[::-1] for pair in against), "%")
        # Of one token minGRU and minLSTM have one form.
        row = f"{theirs} takes longer than {ours}, one token without a context"
        yield Claim(row, "step", 1, "median", ((), (f"{theirs}, loop", ours), (f"{theirs}, torch", ours)), "%")
    row = "Mamba takes more memory than minGRU, training, T = 512"
    yield Claim(row, "train", 512, "peak", tuple(("Mamba", form) for form in forms["minGRU"]), "%")
    for batch in (8, 16, 32, 64):
        row = f"Mamba takes longer than minGRU, a context and one token, batch {batch}"
        pairs = tuple(("Mamba", form) for form in forms["minGRU"])
        yield Claim(row, "context", 2048, "median", pairs, "%", batch)
    for batch in (8, 16, 32, 64):
        row = f"minLSTM takes longer than Mamba, a context and one token, batch {batch}"
        pairs = tuple((form, "Mamba") for form in forms["minLSTM"])
        yield Claim(row, "context", 2048, "median", pairs, "%", batch)
    for length in (512, 4096):
        for name in ("minLSTM", "minGRU"):
            layers = tuple((form,) for form in forms[name])
            yield Claim(f"{name}, training, T = {length}", "train", length, "median", layers, "ms")
        yield Claim(f"Mamba, training, T = {length}", "train", length, "median", ((), (), ("Mamba",)), "ms")


CLAIMS = tuple(_claims())


# -- tables


def long(parts: dict[str, Part]) -> str:
    """The csv's text: one line a number."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("part", "layer", "width", "batch", "length", "status", "metric", "value", "run_id"))
    for name, part in parts.items():
        for point in part.points:
            size = [point.get(key, "") for key in ("width", "batch", "length")]
            if "expansion" in point:
                size[1] = f"expansion {point['expansion']}"
            head = [name, point["layer"], *size, point["status"]]
            numbers = {k: v for k, v in point.items() if k in NUMBERS and v is not None}
            for key, value in numbers.items() or {"": ""}.items():
                writer.writerow([*head, key, f"{value:.10g}" if value != "" else "", part.record["run_id"]])
    return out.getvalue()


NUMBERS = ("median", "q1", "q3", "min", "n", "peak", "operations", "bytes", "least", "joules", "parameters")


def grid(part: Part) -> tuple[list[str], list[list[str]]]:
    """A line for each layer, a column for each size that varies: ms, and MiB where memory was measured.

    Of one token a line for each batch size too; of a context Mamba's time over ours for each.
    """
    if part.name == "parameters":
        return parameters_grid(part)
    axis = _axis(part)
    sizes, batches = sorted({point[axis] for point in part.points}), part.batches if part.name == "step" else [None]
    lines = []
    for layer, batch in itertools.product(part.layers, batches):
        found = part.at(layer, axis, **({} if batch is None else {"batch": batch}))
        lines.append([layer if batch is None else f"{layer}, batch {batch}", *(_cell(found.get(n)) for n in sizes)])
    if part.name == "context":
        for other, ours, batch in itertools.product(("Mamba", "mamba-ssm"), BASELINES, part.batches):
            if ratios := part.ratios(other, ours, batch=batch):
                cells = (f"{ratios[n]:.2g} x" if n in ratios else "" for n in sizes)
                lines.append([f"{other} / {ours}, batch {batch}", *cells])
    return [f"{axis}, ms", *map(str, sizes)], lines


def _cell(point: Point | None) -> str:
    if point is None or point["status"] != "done":
        return "" if point is None else point["status"]
    return milliseconds(point["median"]) + (f", {point['peak'] / 2**20:.0f} MiB" if point.get("peak") else "")


def parameters_grid(part: Part) -> tuple[list[str], list[list[str]]]:
    expansions = sorted({point["expansion"] for point in part.points})
    counted = {(point["layer"], point["expansion"]): point["parameters"] for point in part.points}
    lines = [[layer, *(f"{counted[layer, a]:,}" for a in expansions)] for layer in part.layers]
    for ours, theirs in BASELINES.items():
        lines.append([f"{ours} / {theirs}", *(f"{counted[ours, a] / counted[theirs, a]:.1%}" for a in expansions)])
    return ["units over input width", *map(str, expansions)], lines


def caption(part: Part) -> str:
    if part.name == "parameters":
        return (
            f"Parameters of layers for an input {part.points[0]['width']} wide, biases included, as torch counts them."
        )
    data, hardware, versions = part.record["config"]["data"], part.record["hardware"], part.record["versions"]
    points = part.points
    said = {"batch": "batch size", "width": "width", "length": "length"}
    fixed = [f"{text} {max(p[k] for p in points)}" for k, text in said.items() if k != _axis(part)]
    if part.name == "step":
        fixed[0] = _batches(part.batches)
    listed = ", ".join(f"{k} {v}" for k, v in versions.items() if v and k in ("python", "torch", "triton", "numba"))
    limits, dtype = part.record["limits"], part.record["dtype"]
    at = f"it copies {limits['bandwidth'] / 1e9:.0f} GB/s and multiplies {limits['matrix_rate'] / 1e9:.0f} GFLOP/s"
    checked = "each first checked against float64"
    if "gpu" in hardware and dtype == "float32":
        checked += "; torch's GRU and LSTM multiply in TF32, as they do by default"
    commit, clean = part.record["git"]["commit"] or "unknown", part.record["git"]["clean"]
    return (
        f"{TITLES.get(part.name, part.name)}: one layer, {', '.join(fixed)}, {dtype}. Median of "
        f"{data['least']} runs or more, all layers by turns in one process, {checked}. "
        f"{_machine(part)}; {at}; {listed}; commit {commit[:10]}{'' if clean else ' with changes'}."
    )


def _axis(part: Part) -> str:
    return next((a for a in ("length", "width", "batch") if len({p[a] for p in part.points}) > 1), "length")


def _machine(part: Part) -> str:
    hardware = part.record["hardware"]
    return f"{part.machine} ({hardware['cpu']}), CUDA {hardware['cuda']}" if "gpu" in hardware else part.machine


CLAIMED = (
    "The paper's claims beside what is measured here. The paper ran its own code at its own scale on a T4, so its "
    "milliseconds do not compare with these. Log space: minGRU and minLSTM in plain PyTorch, as the paper has "
    "them, against hand-written loops of GRU and LSTM. Loop: minGRU and minLSTM as loops in plain PyTorch, against the "
    "same. Fused: this project's layers, against torch's GRU and LSTM. For one token minGRU and minLSTM have a single "
    "form, which stands against the loops and against torch's layers. Mamba is this project's. The context has 2048 "
    "tokens. Run on"
)


def claims_grid(parts: dict[str, Part], paper: dict[str, float]) -> tuple[list[str], list[list[str]]]:
    """`paper` has the claims' values by row."""
    lines = []
    for claim in CLAIMS:
        values = (paper.get(claim.row), *(claim.measured(parts, form) for form in FORMS))
        lines.append([claim.row, *map(claim.text, values)])
    return ["", "paper, T4", *FORMS], lines


# -- what was found


def findings(parts: dict[str, Part]) -> list[str]:
    """Sentences, each over every size that was measured."""
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


def _batches(batches: Collection[int]) -> str:
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
    """At a sentence's beginning; minGRU stays minGRU."""
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
    """Others' times over ours, and by name those that are faster anywhere."""
    times, faster, lengths = {}, [], set()
    for other in dict.fromkeys((*FAMILIES[ours], *FAMILIES["others"])):
        ratios = {batch: part.ratios(other, ours, batch=batch) for batch in part.batches if other not in BASELINES}
        ratios = {batch: found for batch, found in ratios.items() if found}
        if ratios:
            times[_called(other)] = _span([ratio for found in ratios.values() for ratio in found.values()])
            lengths.update(*ratios.values())
        if less := [batch for batch, found in ratios.items() if min(found.values()) < 1]:
            faster.append(f"{_called(other)} at {_batches(less)}")
    if not times:
        return []
    (first, span), *rest = times.items()
    said = ", ".join(f"{name} {span} times" for name, span in rest)
    return [
        f"{_capital(first)} takes {span} times as long as {ours} for {what}{f', {said}' if said else ''}, "
        f"at {_batches(part.batches)} and lengths of {_range(lengths)}.",
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
        f"tokens as after {first}, at {_batches(step.batches)}."
    ]


def left_out(parts: dict[str, Part]) -> list[str]:
    """What was not timed, each layer's first of a part."""
    said = {}
    for name, part in parts.items():
        for point in part.points:
            if point["status"] != "done":
                size = f"{point['batch']} sequences of {point['length']}"
                said.setdefault((name, point["layer"]), f"from {size} on ({point['status']}: {point['reason']})")
        for layer, error in part.record.get("errors", {}).items():
            if isinstance(error, str):
                said[name, layer] = f"at every size, as it is wrong or does not run: {error}"
    return [f"Part {name} leaves out {layer} {reason}." for (name, layer), reason in said.items()]


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
}  # fmt: skip
