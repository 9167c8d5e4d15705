"""Tables of the efficiency experiment, from its records alone. Needs no torch."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .. import grids
from ..grids import Grid
from ..pages import write
from . import BASELINES, TITLES, Machines, Part, Point, batch_sizes, bench, load, milliseconds, slug

HALF = re.compile(r"^.*\| +b?float16 \|.*\n", re.MULTILINE)  # lines of 16 bits, left out of pages to stay readable

# -- what the paper claims


FORMS = ("log space", "loop", "fused")  # of minGRU and minLSTM


@dataclass(frozen=True)
class Claim:
    """A claim of section 5.7 of the facts, and what is measured here for it.

    Attributes:
        row: its row in results/paper.csv, also its text.
        part: the part that measures it.
        length: the length at which it is measured.
        key: the number of a point.
        layers: for each of FORMS, two layers whose ratio it is (over, under), one whose value it is, or none.
        unit: "x" for a ratio; "%" for an increase; "ms".
        batch: the batch size at which it is measured; None: the greatest.
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
        # For one token minGRU and minLSTM have only one form.
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
    """The csv's text: one line per number."""
    varied = [key for key in VARIED if any(key in point for part in parts.values() for point in part.points)]
    sizes = ("width", "batch", "length", *varied)
    lines = []
    for name, part in parts.items():
        for point in part.points:
            size = [point.get(key, "") for key in sizes]
            if "expansion" in point:
                size[1] = f"expansion {point['expansion']}"
            head = [name, point["layer"], *size, point["status"]]
            numbers = {k: v for k, v in point.items() if k in NUMBERS and v is not None}
            for key, value in numbers.items() or [("", None)]:
                lines.append([*head, key, grids.number(value), part.record["run_id"]])
    return grids.as_csv(("part", "layer", *sizes, "status", "metric", "value", "run_id"), lines)


VARIED = ("scan", "input", "dtype", "pass", "kind")  # columns where any point has them
NUMBERS = (
    *("median", "q1", "q3", "min", "n", "peak", "operations", "bytes", "least", "joules", "parameters"),
    *("bandwidth", "error", "worst"),
)


def grid(part: Part) -> Grid:
    """A line for each layer, a column for each size that varies: ms, and MiB where memory was measured.

    For one token there is also a line for each batch size; for a context, Mamba's time over ours for each. Parts of
    `make bench` have their own grids.
    """
    if part.kind in bench.GRIDS:
        return bench.GRIDS[part.kind](part)
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


def parameters_grid(part: Part) -> Grid:
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
    if part.kind in bench.GRIDS:
        return f"{bench.text(part)} {_machine(part)}; {_made_with(part)}."
    data, hardware, points = part.record["config"]["data"], part.record["hardware"], part.points
    said = {"batch": "batch size", "width": "width", "length": "length"}
    fixed = [f"{text} {max(p[k] for p in points)}" for k, text in said.items() if k != _axis(part)]
    if part.name == "step":
        fixed[0] = batch_sizes(part.batches)
    limits, dtype = part.record["limits"], part.record["dtype"]
    at = f"it copies {limits['bandwidth'] / 1e9:.0f} GB/s and multiplies {limits['matrix_rate'] / 1e9:.0f} GFLOP/s"
    checked = "each first checked against float64"
    if "gpu" in hardware and dtype == "float32":
        checked += "; torch's GRU and LSTM multiply in TF32, as they do by default"
    return (
        f"{TITLES.get(part.name, part.name)}: one layer, {', '.join(fixed)}, {dtype}. Median of "
        f"{data['least']} runs or more, all layers by turns in one process, {checked}. "
        f"{_machine(part)}; {at}; {_made_with(part)}."
    )


def _made_with(part: Part) -> str:
    shown = ("python", "torch", "triton", "numba")
    listed = ", ".join(f"{k} {v}" for k, v in part.record["versions"].items() if v and k in shown)
    commit, clean = part.record["git"]["commit"] or "unknown", part.record["git"]["clean"]
    return f"{listed}; commit {commit[:10]}{'' if clean else ' with changes'}"


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


def claims_grid(parts: dict[str, Part], paper: dict) -> Grid:
    """The claims beside our measurements; `paper` has the published values."""
    published = {row: value.value for (table, row, _, _), value in paper.items() if table == "efficiency"}
    lines = []
    for claim in CLAIMS:
        values = (published.get(claim.row), *(claim.measured(parts, form) for form in FORMS))
        lines.append([claim.row, *map(claim.text, values)])
    return ["", "paper, T4", *FORMS], lines


def claims(parts: dict[str, Part], paper: dict) -> str:
    return f"{CLAIMED} {parts['train'].machine}.\n\n{grids.as_markdown(*claims_grid(parts, paper))}"


def markdown(part: Part) -> str:
    return f"{caption(part)}\n\n{grids.as_markdown(*grid(part))}"


# -- files


def texts(parts: dict[str, Part], paper: dict) -> dict[str, str]:
    """The texts for reading: the paper's claims and each part."""
    found = {"claims": claims(parts, paper)} if "train" in parts else {}
    found |= {name: markdown(part) for name, part in parts.items()}
    return {name: f"{text}\n" for name, text in found.items()}


def write_all(results_dir: str | Path, paper: dict) -> list[Path]:
    """Writes the tables as md, and layers by size and each other part as csv; returns the md files."""
    written, folder = [], Path(results_dir) / "tables"
    for key, parts in load(results_dir).items():
        ending = slug(*key)
        others = {name: part for name, part in parts.items() if part.kind in bench.GRIDS}
        if layers := {name: part for name, part in parts.items() if name not in others}:
            write(folder / f"efficiency_{ending}.csv", long(layers))
        for name, part in others.items():
            write(folder / f"efficiency_{name}_{ending}.csv", long({name: part}))
        for name, text in texts(parts, paper).items():
            written.append(folder / f"efficiency_{name}_{ending}.md")
            write(written[-1], text)
    return written


def blocks(machines: Machines, paper: dict) -> dict[str, str]:
    """The blocks of the pages, by the names of their marks."""
    return {
        f"table:efficiency_{name}_{slug(*key)}": HALF.sub("", text)
        for key, parts in machines.items()
        for name, text in texts(parts, paper).items()
    }
