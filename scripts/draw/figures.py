"""Figures from records alone, `python -m scripts.figures`. Needs no torch.

`results/figures/<table>_{accuracy,loss}[_<profile>].{png,pdf}` show curves against steps, those of a character model
against steps and time; `table1_layers[_<profile>]` the number of layers. The same records give the same files, byte for
byte, under one version of matplotlib.
"""

import math
import textwrap
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, StrMethodFormatter

from experiments.grid import TABLES

from . import efficiency
from .cells import Entry, file_name, load, measured_tables, seconds_a_step
from .efficiency import figures as efficiency_figures
from .style import SETTINGS, STYLES, head

MARKERS = 8  # of a curve


Panel = tuple[str, dict[str, list[dict]]]  # title, and by model its records


def panels_of(table: str, found: list[Entry]) -> list[Panel]:
    """The panels that have any record: as the grid divides a table's rows, or one for each column of a wide table."""
    if TABLES[table].wide:
        columns = dict.fromkeys(entry.cell.column for entry in found)
        panels = [(c, {e.cell.row: e.done for e in found if e.cell.column == c}) for c in columns]
    else:
        rows = {entry.cell.row: entry.done for entry in found}
        panels = [(title, {name: rows.get(name, []) for name in names}) for title, names in TABLES[table].panels]
    return [(title, models) for title, models in panels if any(models.values())]


def curves(panels: list[Panel], curve: str, scale: float = 1) -> Figure:
    """A curve of the records against steps: the mean over seeds, in a band from the least to the greatest."""
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(3.5 * across, 2.7 * down), layout="constrained")
    axes = list(figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).flat)
    for ax, (title, models) in zip(axes, panels, strict=False):
        for i, (name, done) in enumerate(models.items()):
            if done:
                _band(ax, [record["curves"][curve] for record in done], scale, i, len(models), name)
        head(ax, title)
        ax.margins(x=0.02)
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.xaxis.set_major_formatter(EngFormatter(sep="") if ax.get_xlim()[1] > 2e4 else StrMethodFormatter("{x:,.0f}"))
        ax.tick_params(labelbottom=True)
    for ax in axes[len(panels) :]:
        ax.remove()
    return figure


def _band(ax: Axes, seeds: list[list[list[float]]], scale: float, i: int, of: int, label: str, unit: float = 1) -> None:
    """Draws the mean curve and its band; `unit` is the length of a step on the horizontal axis."""
    values = defaultdict(list)
    for points in seeds:
        for step, _, value in points:
            values[step].append(value * scale)
    steps = sorted(values)
    every = max(1, len(steps) // MARKERS)
    # Markers of lines that lie on one another stand side by side.
    marked = (i * every // of, every)
    mean = [sum(values[step]) / len(values[step]) for step in steps]
    places = [step * unit for step in steps]
    ax.plot(places, mean, **STYLES[i % len(STYLES)], markevery=marked, label=label, zorder=3)
    low, high = [min(values[step]) for step in steps], [max(values[step]) for step in steps]
    ax.fill_between(places, low, high, color=STYLES[i % len(STYLES)]["color"], alpha=0.18, linewidth=0)


def accuracy_against_steps(table: str, found: list[Entry]) -> Figure:
    figure = curves(panels_of(table, found), "val_accuracy", 100)
    for ax in figure.axes:
        _chance(ax, table, found)
    return _labelled(figure, "training steps", "validation accuracy per token, %", 103)


def loss_against_steps(table: str, found: list[Entry]) -> Figure:
    return _labelled(curves(panels_of(table, found), "train_loss"), "training steps", "training loss, nats per token")


def score_against_steps(table: str, found: list[Entry]) -> Figure:
    return _labelled(curves(panels_of(table, found), "val_score"), "training steps", "evaluation score, % of an expert")


def _labelled(figure: Figure, below: str, beside: str, top: float | None = None) -> Figure:
    """The figure with labelled axes; the vertical ones begin at zero."""
    for ax in figure.axes:
        ax.set_ylim(0, top)
    figure.supxlabel(below, fontsize=8)
    figure.supylabel(beside, fontsize=8)
    return figure


def loss_against_steps_and_time(table: str, found: list[Entry]) -> Figure:
    """Validation loss; the time is that of training alone, at each model's mean speed, without its evaluations."""
    figure = Figure(figsize=(7.0, 3.1), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    ((_, models),) = panels_of(table, found)
    lowest = min(value for done in models.values() for record in done for _, _, value in record["curves"]["val_loss"])
    for i, (name, done) in enumerate(models.items()):
        if done:
            for ax, unit in zip(axes, (1, seconds_a_step(done) / 60), strict=True):
                _band(ax, [record["curves"]["val_loss"] for record in done], 1, i, len(models), name, unit)
    # The axis reaches just above a bigram model (2.48 nats).
    axes[0].set_ylim(lowest - 0.05, max(2.55, lowest + 0.3))
    axes[0].set(xlabel="training steps", ylabel="validation loss, nats per character")
    axes[0].xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes[1].set_xlabel("training time, minutes")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=6)
    for ax in axes:
        ax.margins(x=0.02)
    return figure


def score_against_target(table: str, found: list[Entry]) -> Figure:
    """The score reached against the score asked for, after the last step; on the diagonal they are equal."""

    def asked_and_got(record: dict) -> list[list[float]]:
        last = record["metrics"]["last"]
        got = {key: value for key, value in last.items() if key.startswith("test_score_at_")}
        return sorted([float(key.rpartition("_")[2]), 0.0, value] for key, value in got.items())

    panels = panels_of(table, found)
    drawn = [(t, {n: [{"curves": {"": asked_and_got(r)}} for r in d] for n, d in m.items()}) for t, m in panels]
    figure = curves(drawn, "")
    for ax in figure.axes:
        ax.plot((0, 100), (0, 100), color="#888888", linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
    return _labelled(figure, "score asked for, % of an expert", "score reached, % of an expert")


def interquartile(table: str, found: list[Entry]) -> Figure:
    """Interquartile mean over datasets and seeds, with 95 % of a bootstrap that draws seeds anew in each dataset.

    (Agarwal et al., arXiv 2108.13264, section 4.) It covers only datasets that every model has with all its seeds;
    otherwise the means would be over different datasets.
    """
    figure = Figure(figsize=(4.2, 2.6), layout="constrained")
    ax = figure.subplots()
    panels = panels_of(table, found)
    names = [name for name in dict.fromkeys(entry.cell.row for entry in found) if any(m[name] for _, m in panels)]
    most = {name: max(len(models[name]) for _, models in panels) for name in names}
    panels = [panel for panel in panels if all(len(panel[1][name]) == most[name] for name in names)] or panels
    for i, name in enumerate(names):
        scores = [[record["metrics"]["last"]["test_score"] for record in models[name]] for _, models in panels]
        middle, low, high = interquartile_mean([seeds for seeds in scores if seeds])
        style = {key: STYLES[i % len(STYLES)][key] for key in ("color", "marker")}
        ax.errorbar([middle], [i], xerr=[[middle - low], [high - middle]], capsize=3, elinewidth=1, **style)
    ax.set_yticks(range(len(names)), names)
    ax.set(ylim=(len(names) - 0.5, -0.5), xlabel="interquartile mean of scores, % of an expert")
    names = ", ".join(title for title, _ in panels)
    ax.set_title(textwrap.fill(names, 58, break_on_hyphens=False), fontsize=7, loc="left")
    return figure


def interquartile_mean(scores: list[list[float]], draws: int = 2000) -> tuple[float, float, float]:
    """The mean of the middle half of scores by dataset and seed, and the 2.5 and 97.5 % points of its bootstrap."""

    def middle(values: np.ndarray) -> np.ndarray:
        """The mean of the middle half along the last dimension; values at its edges count in part."""
        n = values.shape[-1]
        place = np.arange(n)
        weights = np.clip(np.minimum(place + 1, 0.75 * n) - np.maximum(place, 0.25 * n), 0, None)
        return (np.sort(values, -1) * weights).sum(-1) / weights.sum()

    generator = np.random.default_rng(0)
    drawn = np.concatenate([generator.choice(seeds, (draws, len(seeds))) for seeds in scores], -1)
    low, high = np.quantile(middle(drawn), (0.025, 0.975))
    return float(middle(np.concatenate(scores))), float(low), float(high)


def _chance(ax: Axes, table: str, found: list[Entry]) -> None:
    of = TABLES[table].chance
    levels = {of(record["config"]) for entry in found for record in entry.done} if of else ()
    for level in levels:
        ax.axhline(level, color="#888888", linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
        ax.annotate(
            f"chance {level:.1f} %", (1, level), xycoords=("axes fraction", "data"), xytext=(0, -2),
            textcoords="offset points", ha="right", va="top", fontsize=6.5, color="#666666",
        )  # fmt: skip


def layers(table: str, profile: str, found: list[Entry]) -> Figure:
    """Means with standard deviations; hollow markers are the paper's, at its own scale only."""
    figure = Figure(figsize=(4.2, 3.0), layout="constrained")
    ax = figure.subplots()
    models = dict.fromkeys(entry.cell.row for entry in found)
    places = list(dict.fromkeys(entry.cell.column for entry in found))
    for i, model in enumerate(models):
        shift = (i - (len(models) - 1) / 2) * 0.08
        beside = 0.16 + 0.08 * i
        style = STYLES[i % len(STYLES)]
        ours = [entry for entry in found if entry.cell.row == model and entry.done]
        if ours:
            ax.errorbar(
                [places.index(entry.cell.column) + shift for entry in ours],
                [entry.mean() for entry in ours],
                yerr=[entry.std() or 0 for entry in ours],
                capsize=3, elinewidth=1, label=model, zorder=3, **style,
            )  # fmt: skip
        theirs = [entry for entry in found if entry.cell.row == model and entry.paper and profile == "paper"]
        if theirs:
            ax.errorbar(
                [places.index(entry.cell.column) + shift + beside for entry in theirs],
                [entry.paper.value for entry in theirs],
                yerr=[entry.paper.std or 0 for entry in theirs],
                capsize=2, elinewidth=0.8, linestyle="none", marker=style["marker"], color=style["color"],
                markerfacecolor="white", label=f"{model}, the paper's", zorder=2,
            )  # fmt: skip
        for entry in theirs:
            if not entry.paper.confirmed:
                place = (places.index(entry.cell.column) + shift + beside, entry.paper.value)
                ax.annotate("†", place, xytext=(4, -3), textcoords="offset points", color=style["color"], fontsize=8)
    ax.set_xticks(range(len(places)), places)
    ax.set(xlim=(-0.4, len(places) - 0.6), ylim=(0, 103), xlabel=TABLES[table].column)
    ax.set_ylabel("test accuracy per token, %")
    _chance(ax, table, found)
    head(ax, "", columns=2)
    return figure


def accuracy_against_length(table: str, found: list[Entry]) -> Figure:
    """At each length at which the last weights were tested: the mean over seeds, in a band from the least to the most.

    Where curves lie on one another the markers, which differ in size, still show.
    """
    figure = Figure(figsize=(5.4, 3.4), layout="constrained")
    ax = figure.subplots()
    start = "test_accuracy_at_"
    rows = [entry for entry in found if entry.done]
    for i, entry in enumerate(rows):
        last = [record["metrics"]["last"] for record in entry.done]
        lengths = sorted(int(key.removeprefix(start)) for key in last[0] if key.startswith(start))
        values = [[100 * metrics[f"{start}{n}"] for metrics in last] for n in lengths]
        style = STYLES[i % len(STYLES)] | {"markersize": 9 - 6 * i / len(rows)}
        style |= {"markerfacecolor": "white"} if i >= len(STYLES) else {}
        ax.plot(lengths, [sum(v) / len(v) for v in values], **style, label=entry.cell.row)
        ax.fill_between(lengths, list(map(min, values)), list(map(max, values)), color=style["color"], alpha=0.15)
    longest = max(record["config"]["data"]["lengths"][1] for entry in rows for record in entry.done)
    ax.axvline(longest, color="#888888", linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
    room = 5 * lengths[-1] if lengths else None  # for the label of chance, beside the last marker
    ax.set(
        xscale="log",
        ylim=(0, 103),
        xlim=(None, room),
        xlabel="length tested (the dashed line is the longest in training)",
    )
    ax.set_xticks(lengths, [f"{n:,}" for n in lengths])
    ax.minorticks_off()
    ax.set_ylabel("test accuracy, %")
    _chance(ax, table, found)
    head(ax, "", columns=3)
    return figure


def rates(found: list[Entry]) -> Figure:
    """The best validation of each model against the learning rate."""
    rows = list(dict.fromkeys(entry.cell.row for entry in found))
    each = math.ceil(len(rows) / math.ceil(len(rows) / len(STYLES)))  # as many in each panel, as far as it goes
    panels = [rows[i : i + each] for i in range(0, len(rows), each)]
    figure = Figure(figsize=(2.6 * len(panels) + 0.6, 3.2), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    values = sorted({float(entry.cell.column) for entry in found})
    for ax, names in zip(axes, panels, strict=True):
        for style, row in zip(STYLES, names, strict=False):
            done = [entry for entry in found if entry.cell.row == row and entry.done]
            ax.plot([float(e.cell.column) for e in done], [e.mean("best") for e in done], **style, label=row)
        ax.set(xscale="log")
        ax.set_xticks(values, [f"{value:.0e}".replace("e-0", "e-") for value in values])
        ax.minorticks_off()
        head(ax, "", 2)
    metric = found[0].metric
    figure.supxlabel("learning rate", fontsize=8)
    figure.supylabel(f"best {metric.label}, {metric.unit}", fontsize=8)
    return figure


def write_all(results_dir: str | Path) -> list[Path]:
    """Writes all figures and returns the files for reading (png)."""
    written = []
    folder = Path(results_dir) / "figures"

    def save(figures: dict[str, Figure]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            # Without the date, so that a file changes with its records only.
            figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})
            figure.savefig(folder / f"{name}.png", dpi=160, metadata={"Software": None})
            written.append(folder / f"{name}.png")

    with matplotlib.rc_context(SETTINGS):
        for table, profile, found in measured_tables(load(results_dir)):
            if not any(entry.done for entry in found):
                continue
            suffix = "" if profile == "paper" else f"_{profile}"
            if TABLES[table].column is None and not panels_of(table, found):
                continue
            if TABLES[table].column == "convention":
                continue  # its curves are those of the table of models
            if TABLES[table].column == "learning rate":
                figures = {file_name(table, profile): rates(found)}
            elif found[0].metric.key == "test_score":
                figures = {
                    f"{table}_steps{suffix}": score_against_steps(table, found),
                    f"{table}_target{suffix}": score_against_target(table, found),
                    f"{table}_interquartile{suffix}": interquartile(table, found),
                }
            elif found[0].metric.key == "val_loss":
                figures = {f"{table}_loss{suffix}": loss_against_steps_and_time(table, found)}
            elif any(metric.startswith("accuracy_at_") for _, metric, _ in TABLES[table].more):
                figures = {f"{table}_lengths{suffix}": accuracy_against_length(table, found)}
            elif TABLES[table].column == "layers":
                figures = {file_name(table, profile): layers(table, profile, found)}
            else:
                figures = {
                    f"{table}_accuracy{suffix}": accuracy_against_steps(table, found),
                    f"{table}_loss{suffix}": loss_against_steps(table, found),
                }
            save(figures)
        for (profile, machine), parts in efficiency.load(results_dir).items():
            ending = efficiency.slug(profile, machine)
            save({f"efficiency_{name}_{ending}": figure for name, figure in efficiency_figures.draw(parts).items()})
    return written
