"""Tables, figures and findings of the efficiency experiment, from its records alone. Needs no torch.

One record is one part on one machine. Numbers of two machines, or of two parts, never stand in one ratio.
"""

import csv
import io
import math
from collections.abc import Iterator
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
    "minGRU": ("minGRU", "minGRU, log-space", "minGRU-pytorch", "GRU, torch", "GRU, loop"),
    "minLSTM": ("minLSTM", "minLSTM, log-space", "LSTM, torch", "LSTM, loop"),
    "others": ("minGRU", "minLSTM", "Mamba", "mamba-ssm", "attention"),
}
BASELINES = {"minGRU": "GRU", "minLSTM": "LSTM"}
FASTER_FROM, LESS_FROM = 64, 512  # lengths: what is asked of the fused layers
LINEAR = 0.15  # of an exponent: how far from 1 growth may be and be called linear
FLAT = 1.5  # times: the same of a step whatever came before

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
        return self.record["config"]["data"]["machine"]

    @property
    def points(self) -> list[Point]:
        return self.record["points"]

    @property
    def layers(self) -> list[str]:
        return list(dict.fromkeys(point["layer"] for point in self.points))

    def of(self, layer: str, axis: str = "length") -> dict[int, Point]:
        """The points that were measured, by a size; the other two are the greatest there is."""
        fixed = {key: max(p[key] for p in self.points) for key in ("width", "batch", "length") if key != axis}
        found = {
            point[axis]: point
            for point in self.points
            if point["layer"] == layer and point["status"] == "done" and fixed.items() <= point.items()
        }
        return dict(sorted(found.items()))

    def ratios(self, over: str, under: str, key: str = "median") -> dict[int, float]:
        """Of two layers, by length, where both were measured."""
        a, b = self.of(over), self.of(under)
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


@dataclass(frozen=True)
class Claim:
    """One of section 5.7 of the facts: a ratio, here once as the paper took it, and once against what a user has.

    Attributes:
        row: of results/paper.csv; its text and its unit too.
        part: that measures it.
        length: at which.
        key: of a point.
        styled: of the points' layers (over, under): log-space against loop.
        honest: likewise, this project's layer against torch's.
        excess: the ratio is said as so many percent more than 1.
    """

    row: str
    part: str
    length: int
    key: str
    styled: tuple[str, str]
    honest: tuple[str, str]
    excess: bool = False

    def measured(self, parts: dict[str, Part], which: str) -> float | None:
        if self.part not in parts:
            return None
        ratio = parts[self.part].ratios(*getattr(self, which), self.key).get(self.length)
        return ratio if ratio is None or not self.excess else 100 * (ratio - 1)

    def text(self, value: float | None) -> str:
        if value is None:
            return ""
        if self.excess:
            return f"{value:+.0f} %"
        return f"{value:,.0f} x" if value >= 100 else f"{value:.2g} x"


def _claims() -> Iterator[Claim]:
    for ours, theirs in BASELINES.items():
        log, loop, torch = f"{ours}, log-space", f"{theirs}, loop", f"{theirs}, torch"
        for length in (512, 4096):
            row = f"{theirs} takes longer than {ours}, training"
            yield Claim(f"{row}, T = {length}", "train", length, "median", (loop, log), (torch, ours))
    for ours, theirs in BASELINES.items():
        log, loop, torch = f"{ours}, log-space", f"{theirs}, loop", f"{theirs}, torch"
        row = f"{ours} takes more memory than {theirs}, training, T = 512"
        yield Claim(row, "train", 512, "peak", (log, loop), (ours, torch), True)
    row = "Mamba takes more memory than minGRU, training, T = 512"
    yield Claim(row, "train", 512, "peak", ("Mamba", "minGRU, log-space"), ("Mamba", "minGRU"), True)
    for ours, theirs in BASELINES.items():
        row = f"{theirs} takes longer than {ours}, one token without a context"
        yield Claim(row, "step", 1, "median", (f"{theirs}, loop", ours), (f"{theirs}, torch", ours), True)


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
    """A line for each layer, a column for each size that varies: ms, and MiB where memory was measured."""
    if part.name == "parameters":
        return parameters_grid(part)
    axis = _axis(part)
    sizes = sorted({point[axis] for point in part.points})
    lines = []
    for layer in part.layers:
        found = {p[axis]: p for p in part.points if p["layer"] == layer and _greatest(part, p, axis)}
        cells = []
        for size in sizes:
            point = found.get(size)
            if point is None or point["status"] != "done":
                cells.append("" if point is None else point["status"])
                continue
            memory = f", {point['peak'] / 2**20:.0f} MiB" if point.get("peak") else ""
            cells.append(milliseconds(point["median"]) + memory)
        lines.append([layer, *cells])
    return [f"{axis}, ms", *map(str, sizes)], lines


def parameters_grid(part: Part) -> tuple[list[str], list[list[str]]]:
    expansions = sorted({point["expansion"] for point in part.points})
    counted = {(point["layer"], point["expansion"]): point["parameters"] for point in part.points}
    lines = [[layer, *(f"{counted[layer, a]:,}" for a in expansions)] for layer in part.layers]
    for ours, theirs in BASELINES.items():
        lines.append([f"{ours} / {theirs}", *(f"{counted[ours, a] / counted[theirs, a]:.1%}" for a in expansions)])
    return ["units over input width", *map(str, expansions)], lines


def _greatest(part: Part, point: Point, axis: str) -> bool:
    return all(point[key] == max(p[key] for p in part.points) for key in ("width", "batch", "length") if key != axis)


def caption(part: Part) -> str:
    if part.name == "parameters":
        return (
            f"Parameters of layers for an input {part.points[0]['width']} wide, biases included, as torch counts them."
        )
    data, hardware, versions = part.record["config"]["data"], part.record["hardware"], part.record["versions"]
    points = part.points
    said = {"batch": "batch size", "width": "width", "length": "length"}
    fixed = [f"{text} {max(p[k] for p in points)}" for k, text in said.items() if k != _axis(part)]
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
        f"{_machine(hardware)}; {at}; {listed}; commit {commit[:10]}{'' if clean else ' with changes'}."
    )


def _axis(part: Part) -> str:
    return next((a for a in ("length", "width", "batch") if len({p[a] for p in part.points}) > 1), "length")


def _machine(hardware: dict[str, Any]) -> str:
    name = f"{hardware['cpu']}, {hardware['threads']} threads ({hardware['vector']})"
    return f"{hardware['gpu']} ({hardware['cpu']}), CUDA {hardware['cuda']}" if "gpu" in hardware else name


CLAIMED = (
    "What the paper claims (batch 64, on a T4, its own code), the same comparison run here (log space against a "
    "hand-written loop, in plain PyTorch), and what a user has: this project's layers against torch's. Of a single "
    "token the minimal layers have one form only. Run on"
)


def claims_grid(parts: dict[str, Part], paper: dict[str, float]) -> tuple[list[str], list[list[str]]]:
    """`paper` has the claims' values by row."""
    header = ["", "claimed", "as the paper compares", "honest baseline"]
    lines = []
    for claim in CLAIMS:
        values = (paper.get(claim.row), claim.measured(parts, "styled"), claim.measured(parts, "honest"))
        lines.append([claim.row, *map(claim.text, values)])
    return header, lines


# -- what was found


def findings(parts: dict[str, Part]) -> list[str]:
    said = []
    train = parts.get("train")
    if train is not None:
        for ours, theirs in BASELINES.items():
            said += _against(train, ours, f"{theirs}, torch")
            ratios = train.ratios(f"{theirs}, loop", f"{ours}, log-space")
            if ratios:
                last = max(ratios)
                said.append(
                    f"As the paper compares, {ours} in log space against a hand-written {theirs}: {ratios[last]:.2g} "
                    f"times as fast at length {last}."
                )
        for layer in ("minGRU", "minLSTM"):
            shares = [point["least"] / point["median"] for point in train.of(layer).values() if point.get("least")]
            if shares:
                said.append(
                    f"{layer}: {min(shares):.2f} to {max(shares):.2f} of the speed that the measured rates of copying "
                    "and of matrix products allow."
                )
            exponent = growth(train, layer)
            if exponent is not None:
                verdict = "linear" if abs(exponent - 1) <= LINEAR else "not linear"
                said.append(f"{layer}: time grows with the {exponent:.2f}th power of the length at last, {verdict}.")
    step = parts.get("step")
    if step is not None:
        for layer in ("minGRU", "minLSTM", "attention"):
            points = step.of(layer)
            if len(points) > 1:
                first, last = (points[n]["median"] for n in (min(points), max(points)))
                verdict = "the same" if last <= FLAT * first else "more"
                said.append(
                    f"One token of {layer} after {max(points)}: {last / first:.2g} times what it takes after "
                    f"{min(points)}, {verdict}."
                )
    return said


def _against(train: Part, ours: str, theirs: str) -> list[str]:
    said = []
    for key, start, better in (("median", FASTER_FROM, "faster than"), ("peak", LESS_FROM, "takes less memory than")):
        ratios = {n: ratio for n, ratio in train.ratios(theirs, ours, key).items() if n >= start}
        if not ratios:
            continue
        wrong = [n for n, ratio in ratios.items() if ratio <= 1]
        held = f"at every length from {min(ratios)} to {max(ratios)}" if not wrong else f"not at {_list(wrong)}"
        verb = "is " if key == "median" else ""
        span = f"{min(ratios.values()):.2g} to {max(ratios.values()):.2g} times"
        said.append(f"{ours} {verb}{better} {theirs} {held} ({span}).")
    return said


def _list(lengths: list[int]) -> str:
    return ", ".join(map(str, lengths))


def growth(part: Part, layer: str) -> float | None:
    """The exponent of the time between the two longest sequences that are apart by four or more."""
    points = part.of(layer)
    if not points:
        return None
    last = max(points)
    before = [n for n in points if 4 * n <= last]
    if not before:
        return None
    n = max(before)
    return math.log(points[last]["median"] / points[n]["median"]) / math.log(last / n)


def left_out(parts: dict[str, Part]) -> list[str]:
    """What was not timed, each layer's first of a part."""
    said = {}
    for name, part in parts.items():
        for point in part.points:
            if point["status"] != "done":
                size = f"{point['batch']} sequences of {point['length']}"
                said.setdefault((name, point["layer"]), f"{size} on ({point['status']}: {point['reason']})")
        for layer, error in part.record.get("errors", {}).items():
            if isinstance(error, str):
                said[name, layer] = f"not at all, as it is wrong or does not run: {error}"
    return [f"Not timed in part {name}: {layer}, {reason}." for (name, layer), reason in said.items()]


FIGURES = {  # in the order of the report: the part that says how it was measured, and what it shows
    "train_time": ("train", "Time."),
    "speedup": ("train", "How many times as fast: torch's layers and hand-written loops over this project's, and loops "
        "over log space, as the paper compares."),
    "train_memory": ("train", "Peak memory of a run, beyond weights and input."),
    "latency": ("step", "Latency: a context read and one token more, and one token alone."),
    "long_time": ("long", "Time."),
    "forward_time": ("forward", "Time."),
    "half_time": ("half", "Time."),
    "half_memory": ("half", "Peak memory of a run, beyond weights and input."),
    "size": ("batch", "Training speed, by batch size and by width."),
    "parameters": ("parameters", "Parameters over those of GRU and LSTM; lines: the paper's formula."),
}  # fmt: skip
