"""Figures of the efficiency experiment: time, speed-up, memory, latency, parameters. One idea each. Needs no torch."""

from collections.abc import Callable, Iterable

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, StrMethodFormatter

from ..style import STYLES, head
from . import BASELINES, FAMILIES, Part

TITLES = {"minGRU": "minGRU and GRU", "minLSTM": "minLSTM and LSTM", "others": "Mamba and attention"}
MIB = 2**20
STYLE_OF = {  # the same in every figure
    "minGRU": 0, "minLSTM": 1, "minGRU, log-space": 5, "minLSTM, log-space": 5, "minGRU, loop": 1, "minLSTM, loop": 3,
    "minGRU-pytorch": 2, "GRU, torch": 3, "LSTM, torch": 2, "GRU, loop": 4, "LSTM, loop": 4, "Mamba": 4, "mamba-ssm": 3,
    "attention": 5,
}  # fmt: skip


def draw(parts: dict[str, Part]) -> dict[str, Figure]:
    """The figures by name. What a part does not hold is not drawn."""
    found = {}
    for name in ("train", "long", "half", "forward"):
        if name in parts:
            found[f"{name}_time"] = against_length(parts[name], "median", 1e3, "time of a run, ms")
    for name in ("train", "half"):
        if name in parts and any(point.get("peak") for point in parts[name].points):
            found[f"{name}_memory"] = against_length(parts[name], "peak", 1 / MIB, "peak memory of a run, MiB")
    if "train" in parts and (ratios := speedups(parts["train"])):
        found["speedup"] = speedup(ratios)
    if "context" in parts and "step" in parts:
        found["latency"] = latency(parts["context"], parts["step"])
    if "parameters" in parts:
        found["parameters"] = parameter_ratios(parts["parameters"])
    if "batch" in parts and "width" in parts:
        found["size"] = sizes(parts["batch"], parts["width"])
    if "policy" in parts:
        found["policy_step"] = policy_step(parts["policy"])
    return found


def _lines(ax: Axes, part: Part, layers: Iterable[str], axis: str, y: Callable[[int, dict], float | None]) -> None:
    for layer in layers:
        places = [(n, value) for n, point in part.of(layer, axis).items() if (value := y(n, point)) is not None]
        if places:
            ax.plot(*zip(*places, strict=True), **STYLES[STYLE_OF[layer]], label=layer)


def _log(ax: Axes, sizes: Iterable[int]) -> None:
    """Makes both axes logarithmic; ticks the lower one at the measured sizes, of which not all are labelled."""
    sizes = sorted(sizes)
    ax.set(xscale="log", yscale="log")
    every = max(1, -(-len(sizes) // 6))
    named = {size for i, size in enumerate(sizes) if (len(sizes) - 1 - i) % every == 0}
    ax.xaxis.set_major_locator(FixedLocator(sizes))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(round(x)) if round(x) in named else ""))
    ax.xaxis.set_minor_locator(FixedLocator([]))
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def short(size: int) -> str:
    return f"{size // 1024}k" if size >= 1024 and size % 1024 == 0 else f"{size}"


def against_length(part: Part, key: str, scale: float, label: str) -> Figure:
    figure = Figure(figsize=(7.0, 3.4), layout="constrained")
    panels = {family: [name for name in names if part.of(name)] for family, names in FAMILIES.items()}
    panels = {family: names for family, names in panels.items() if names}
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, (family, layers) in zip(axes, panels.items(), strict=True):
        _lines(ax, part, layers, "length", lambda n, point: point[key] * scale if point.get(key) else None)
        _log(ax, {point["length"] for point in part.points})
        head(ax, TITLES[family], columns=1)
    axes[0].set_ylabel(label)
    figure.supxlabel("length, tokens", fontsize=8)
    return figure


Ratios = dict[str, dict[str, dict[int, float]]]


def speedups(part: Part) -> Ratios:
    """The speed-ups by family, comparison and length."""
    found: Ratios = {}
    for ours, theirs in BASELINES.items():
        lines = {
            f"torch's {theirs} / this project's {ours}": part.ratios(f"{theirs}, torch", ours),
            f"{theirs} loop / this project's {ours}": part.ratios(f"{theirs}, loop", ours),
            f"{theirs} loop / {ours} in log space (the paper's)": part.ratios(f"{theirs}, loop", f"{ours}, log-space"),
            f"{theirs} loop / {ours} loop": part.ratios(f"{theirs}, loop", f"{ours}, loop"),
        }
        lines = {name: ratios for name, ratios in lines.items() if ratios}
        if lines:
            found[ours] = lines
    return found


def speedup(ratios: Ratios) -> Figure:
    figure = Figure(figsize=(7.0, 3.1), layout="constrained")
    axes = figure.subplots(1, len(ratios), sharey=True, squeeze=False)[0]
    for ax, (ours, lines) in zip(axes, ratios.items(), strict=True):
        for (name, values), style in zip(lines.items(), STYLES, strict=False):
            ax.plot(list(values), list(values.values()), **style, label=name)
        ax.axhline(1, color="#888888", linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
        _log(ax, {n for values in lines.values() for n in values})
        ax.yaxis.set_major_locator(LogLocator(2))
        ax.yaxis.set_minor_locator(FixedLocator([]))
        head(ax, ours, columns=1)
    axes[0].set_ylabel("how many times as fast")
    figure.supxlabel("length, tokens", fontsize=8)
    return figure


def latency(context: Part, step: Part) -> Figure:
    figure = Figure(figsize=(7.0, 3.1), layout="constrained")
    layers = ("minGRU", "minLSTM", "GRU, torch", "LSTM, torch", "Mamba", "attention")
    axes = figure.subplots(1, 2)
    for ax, part, title in zip(axes, (context, step), ("context read, and one token", "one token alone"), strict=True):
        _lines(ax, part, layers, "length", lambda n, point: 1e3 * point["median"])
        _log(ax, {point["length"] for point in part.points})
        batch = max(point["batch"] for point in part.points)
        ax.set(xlabel="tokens before it", ylabel=f"time of {batch} sequences, ms")
        ax.set_title(title, fontsize=9, loc="left")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=6)
    return figure


def parameter_ratios(part: Part) -> Figure:
    """Ratios of parameters: lines by the paper, 2 / 3(1 + a) and 3 / 4(1 + a), without biases; markers by torch."""
    figure = Figure(figsize=(4.2, 2.8), layout="constrained")
    ax = figure.subplots()
    formulas = {"minGRU": lambda a: 2 / (3 * (1 + a)), "minLSTM": lambda a: 3 / (4 * (1 + a))}
    counted = {(point["layer"], point["expansion"]): point["parameters"] for point in part.points}
    expansions = sorted({expansion for _, expansion in counted})
    for (ours, theirs), style in zip(BASELINES.items(), STYLES, strict=False):
        marker, line = {"marker": style["marker"], "linestyle": "none"}, {**style, "marker": ""}
        ax.plot(expansions, [100 * formulas[ours](a) for a in expansions], **line, label=f"{ours} / {theirs}, formula")
        ratios = [100 * counted[ours, a] / counted[theirs, a] for a in expansions]
        ax.plot(expansions, ratios, color=style["color"], **marker, label=f"{ours} / {theirs}, counted")
    ax.set(xlabel="units over input width", ylabel="parameters, %", xticks=expansions)
    ax.set_ylim(bottom=0)
    head(ax, "", columns=2)
    return figure


def sizes(batch: Part, width: Part) -> Figure:
    figure = Figure(figsize=(7.0, 3.1), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    layers = ("minGRU", "minLSTM", "GRU, torch", "LSTM, torch", "Mamba", "attention")
    for ax, part, axis in zip(axes, (batch, width), ("batch", "width"), strict=True):
        fixed = max(point["batch"] for point in part.points), max(point["length"] for point in part.points)

        def rate(n: int, point: dict, axis: str = axis, fixed: tuple[int, int] = fixed) -> float:
            return (n if axis == "batch" else fixed[0]) * fixed[1] / point["median"] / 1e6

        _lines(ax, part, layers, axis, rate)
        _log(ax, {point[axis] for point in part.points})
        ax.set_xlabel({"batch": "batch size, sequences", "width": "width, channels"}[axis])
    axes[0].set_ylabel("training speed, million tokens/s")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=6)
    return figure


def policy_step(part: Part) -> Figure:
    """The time of one more step of an episode, by the steps before it."""
    figure = Figure(figsize=(4.2, 2.8), layout="constrained")
    ax = figure.subplots()
    points = [point for point in part.points if point["kind"] == "policy" and point["status"] == "done"]
    called = {"minGRU": "minGRU, from its state", "Transformer": "Transformer, reads all again"}
    for (name, label), style in zip(called.items(), STYLES, strict=False):
        mine = [point for point in points if point["layer"] == name]
        ax.plot([p["length"] for p in mine], [1e3 * p["median"] for p in mine], **style, label=label)
    episodes = max((point["batch"] for point in points), default=0)
    ax.set(xscale="log", yscale="log", xlabel="steps seen so far", ylabel=f"a step of {episodes} episodes, ms")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    head(ax, "", columns=2)
    return figure
