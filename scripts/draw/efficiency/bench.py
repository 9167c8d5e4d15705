"""Tables of what `make bench` measured: a grid and a caption for each part. Needs no torch."""

from collections.abc import Iterable
from functools import partial

from ..grids import Grid
from . import Part, Point, milliseconds

Row = dict[str, Point]  # by layer

STEPS = 400_000  # of selective copying in the paper
PAPERS_WIDTH = {"copying": 64, "language": 384}
RATIO = "ms, minimum / median; in brackets the ratio of the minimum to minGRU's"
STEP = f"forward, loss, backward, clipping, AdamW; {RATIO}. All models of a line run by turns in one process."
TEXTS = {
    "kernels": "Scans through autograd, ms, minimum / median. Each of ours is first checked against the time loop in "
    "float64, results and gradients, and the result of each other one too. The copy limit is the time in which a large "
    "warm copy, measured just before ({bandwidth} GB/s), moves the fewest bytes that the scan must move; the columns "
    "show it over the scan's minimum. The smaller shapes lie partly in the last cache. The last columns show how many "
    "times as long another scan takes, forward and backward together.",
    "layers": f"One layer, forward, loss and backward with the gradients of weights and input, {RATIO}. All layers of "
    "a line run by turns in one process; each is first checked against float64.{tf32}",
    "precision": "Relative error of minGRU's states against the time loop in float64 (normal pre-activations, {width} "
    "channels). In 16 bits, inputs and result have that type, and the log-space form computes in it throughout.",
    "copying": "A training step of selective copying{size} (3 layers, {width} wide, expansion 6, {batch} sequences in "
    f"two micro-batches): {STEP} minGRU-pytorch is its layer in the same backbone.",
    "language": f"A training step of the character model{{size}} (3 layers, {{width}} wide, without dropout): {STEP} "
    "minGRU-pytorch is its layer in the same backbone. Mamba has no MLP, so about half of the parameters.",
    "policy": f"A decision model (3 layers, {{width}} wide, three tokens a step), {RATIO}. Training is a step at "
    "Decision Transformer's batch and context. Policy is one more step of {episodes} episodes after so many: minGRU "
    "goes on from its state, the Transformer reads all again. Environment is one step of {episodes} Hoppers on one "
    "thread, bare with random actions, and with a policy; the Transformer reads 20 steps.",
}


def text(part: Part) -> str:
    points = part.points
    width, batch = (max(point[key] for point in points) for key in ("width", "batch"))
    episodes = [point["batch"] for point in points if point.get("kind") == "policy"]
    rates = [point["bandwidth"] / 1e9 for point in points if "bandwidth" in point]
    return TEXTS[part.kind].format(
        width=width,
        batch=batch,
        episodes=max(episodes, default=0),
        size=" at the paper's size" if width == PAPERS_WIDTH.get(part.kind) else "",
        bandwidth=f"{min(rates):.0f} to {max(rates):.0f}" if rates else "no",
        tf32=" In float32 torch's GRU and LSTM multiply in TF32, as they do by default."
        if "gpu" in part.record["hardware"]
        else "",
    )


def rows(part: Part, *keys: str) -> dict[tuple, Row]:
    """Rows of points, grouped by the values of these keys, in the record's order."""
    found: dict[tuple, Row] = {}
    for point in part.points:
        found.setdefault(tuple(point.get(key) for key in keys), {})[point["layer"]] = point
    return found


def names(found: Iterable[Row], *without: str) -> list[str]:
    return [name for name in dict.fromkeys(name for row in found for name in row) if name not in without]


def shape(*sizes: int) -> str:
    return f"({', '.join(map(str, sizes))})"


def time(row: Row, name: str) -> str:
    """The text "minimum / median" in milliseconds, or the status of a point without a time."""
    if name not in row:
        return ""
    point = row[name]
    if point["status"] != "done":
        return point["status"]
    return f"{milliseconds(point['min'])} / {milliseconds(point['median'])}"


def ratio(row: Row, name: str, ours: str) -> float | None:
    """The ratio of the minimum times, or None."""
    if not all(key in row and row[key]["status"] == "done" for key in (name, ours)):
        return None
    return row[name]["min"] / row[ours]["min"]


def times(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f} x" if value < 10 else f"{value:.1f} x" if value < 100 else f"{value:,.0f} x"


def beside(row: Row, name: str, ours: str = "minGRU") -> str:
    """The time, and in brackets its ratio to ours."""
    value = ratio(row, name, ours)
    return time(row, name) + (f" ({times(value)})" if value is not None else "")


def share(point: Point) -> float:
    """The share of the copy limit that a scan reaches."""
    return point["bytes"] / point["bandwidth"] / point["min"]


def kernels_grid(part: Part) -> Grid:
    passes = rows(part, "scan", "batch", "length", "width", "dtype", "pass")
    others = names(passes.values(), "minrnn")
    lines = []
    for scan, *sizes, dtype in dict.fromkeys(key[:-1] for key in passes):
        here = [passes.get((scan, *sizes, dtype, which), {}) for which in ("forward", "backward", "both")]
        ours = [row.get("minrnn") for row in here]
        line = [scan, shape(*sizes), dtype, *(time(row, "minrnn") for row in here)]
        line += [f"{share(point):.2f}" if point and point["status"] == "done" else "" for point in ours]
        for name in others:
            status = here[-1][name]["status"] if name in here[-1] else ""
            line.append(times(ratio(here[-1], name, "minrnn")) or status)
        lines.append(line)
    header = ["scan", "(B, T, D)", "dtype", "forward, ms", "backward, ms", "both, ms", "of the copy limit: forward"]
    return [*header, "backward", "both", *(f"{name} takes" for name in others)], lines


def layers_grid(part: Part) -> Grid:
    found = rows(part, "batch", "length", "input", "width", "dtype")
    others = names(found.values(), "minGRU")
    lines = []
    for (batch, length, inputs, width, dtype), row in found.items():
        cells = [time(row, "minGRU"), *(beside(row, name) for name in others)]
        peaks = [row.get(name, {}).get("peak") for name in ("minGRU", *others)]
        cells = [cell + (f", {peak / 2**20:.0f} MiB" if peak else "") for cell, peak in zip(cells, peaks, strict=True)]
        lines.append([shape(batch, length, inputs or width, width), dtype or part.record["dtype"], *cells])
    return ["(B, T, input, hidden)", "dtype", "minGRU, ms", *others], lines


def precision_grid(part: Part) -> Grid:
    """A line of errors for each size; those of the time loop in the same dtype are in the csv only."""
    found = rows(part, "batch", "width", "length", "dtype")
    called = {"log-space": "log-space (the paper's)", "minrnn": "minrnn"}
    types = dict.fromkeys(dtype for *_, dtype in found)
    lines = []
    for batch, width, length in dict.fromkeys(key[:-1] for key in found):
        here = [found.get((batch, width, length, dtype), {}).get(name) for dtype in types for name in called]
        cells = ["" if p is None else f"{p['error']:.1e}" if p["status"] == "done" else p["status"] for p in here]
        lines.append([str(length), *cells])
    return ["T", *(f"{dtype}, {name}" for dtype in types for name in called.values())], lines


def copying_grid(part: Part) -> Grid:
    found = rows(part, "batch", "length")
    others = names(found.values(), "minGRU", "scans")
    lines = []
    for (batch, length), row in found.items():
        scans, ours = ratio(row, "scans", "minGRU"), row["minGRU"]
        hours = f"{STEPS * ours['median'] / 3600:.1f}" if ours["status"] == "done" else ""
        lines.append([shape(batch, length), time(row, "minGRU"), "" if scans is None else f"{scans:.2f}", hours])
        lines[-1] += [beside(row, name) for name in others]
    return ["(batch, T)", "minGRU, ms", "of it in the scan", f"{STEPS // 1000}k steps, hours", *others], lines


def models_grid(keys: tuple[str, ...], head: tuple[str, ...], part: Part) -> Grid:
    """A line for each combination of `keys`, the last two of which are a shape."""
    found = rows(part, *keys)
    others = names(found.values(), "minGRU")
    lines = [
        [*key[:-2], shape(*key[-2:]), time(row, "minGRU"), *(beside(row, name) for name in others)]
        for key, row in found.items()
    ]
    return [*head, "minGRU, ms", *others], lines


GRIDS = {
    "kernels": kernels_grid,
    "layers": layers_grid,
    "precision": precision_grid,
    "copying": copying_grid,
    "language": partial(models_grid, ("batch", "length"), ("(batch, block)",)),
    "policy": partial(models_grid, ("kind", "batch", "length"), ("", "(batch, context)")),
}
