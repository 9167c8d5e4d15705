"""The grid of the paper's tables as data: which run fills which cell, and which cells are wanted first. Needs no torch.

A later experiment adds to METRICS, TABLES and CELLS; planner, tables, figures and report follow.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from experiments.config import PROFILES, run_id
from experiments.launch import compose


@dataclass(frozen=True)
class Metric:
    key: str  # in a record's metrics
    label: str
    unit: str = ""
    scale: float = 1  # from the record's unit to that of tables and paper.csv; nothing else converts
    digits: int = 1
    higher_is_better: bool = True

    def format(self, value: float) -> str:
        return f"{value:.{self.digits}f}"


METRICS = {
    "test_accuracy_percent": Metric("test_accuracy", "test accuracy per token", "%", 100),
    "val_loss_nats": Metric("val_loss", "validation loss per character", "nats", digits=3, higher_is_better=False),
    "whole_loss_nats": Metric("test_loss", "loss of all validation text", "nats", digits=3, higher_is_better=False),
    "score": Metric("test_score", "score", "% of an expert"),  # D4RL's normalisation
    "best_evaluation": Metric("val_score", "score of the best evaluation in training", "% of an expert"),
    "steps": Metric("step", "step", digits=0),
    "tokens_per_second": Metric("tokens_per_second", "training speed", "tokens/s", digits=0),
}


@dataclass(frozen=True)
class Table:
    title: str
    caption: str
    column: str | None  # what its columns are; None where there is but one
    settings: tuple[tuple[str, str], ...]  # (key of a run's configuration, name): the scale, stated in the caption
    chance: Callable[[dict[str, Any]], float] | None = None  # of a configuration, in the metric's unit
    panels: tuple[tuple[str, tuple[str, ...]], ...] = ()  # of the figure of curves: title, rows
    more: tuple[tuple[str, str, str], ...] = ()  # further columns: head, metric, of "last" or "best"
    published: str = "paper"  # whose values it is compared with ...
    published_scale: tuple[str, ...] = ("paper",)  # ... in these profiles, whose scale they have
    wide: bool = False  # a reader's table has its rows side by side


@dataclass(frozen=True)
class Cell:
    table: str
    row: str
    column: str
    metric: str
    experiment: str
    overrides: tuple[str, ...]
    order: int  # the smaller, the more wanted
    paper_overrides: tuple[str, ...] = ()  # in profile paper only
    scaled_overrides: tuple[str, ...] = ()  # in the others only
    profiles: tuple[str, ...] = PROFILES  # that have it
    asked: tuple[str, ...] = ()  # profiles that leave it to who asks for it by name, as it takes long

    def config(self, profile: str) -> dict[str, Any]:
        return _compose(self.experiment, self.settings(profile))

    def settings(self, profile: str) -> tuple[str, ...]:
        own = self.paper_overrides if profile == "paper" else self.scaled_overrides
        named = any(setting.startswith("profile=") for setting in own)
        return (*(() if named else (f"profile={profile}",)), *self.overrides, *own)

    def paper_scale(self) -> dict[str, Any]:
        return _compose(self.experiment, ("profile=paper",))

    @property
    def label(self) -> str:
        return f"{self.row}, {TABLES[self.table].column} {self.column}" if TABLES[self.table].column else self.row


SCALES = ("cpu", "paper")  # profiles that measure something

COPYING_SCALE = (
    ("data.length", "body length"),
    ("data.tokens", "tokens to copy"),
    ("train.steps", "steps"),
    ("train.batch_size", "batch"),
)

LANGUAGE_SCALE = (("data.block", "block"), ("train.steps", "steps"), ("train.batch_size", "batch"))
LANGUAGE_COLUMNS = (
    ("whole text (best)", "whole_loss_nats", "best"),
    ("step of best", "steps", "best"),
    ("tokens/s", "tokens_per_second", "last"),
)
DECISION_SCALE = (("model.dim", "width"), ("train.steps", "steps"), ("eval.batch_size", "episodes an evaluation"))
DECISION_COLUMNS = (("best evaluation", "best_evaluation", "best"),)
LANGUAGE_MODELS = ("minGRU", "minLSTM", "Mamba", "Transformer", "GRU", "LSTM")


def _chance(config: dict[str, Any]) -> float:
    """Of selective copying, in percent: a token is one of the vocabulary less marker and noise."""
    return 100 / (config["data"]["vocab"] - 2)


def commonest(config: dict[str, Any]) -> float:
    """Percent right of whoever knows how often each symbol came, but not when, and always names the commonest.

    That is E[largest count] / M for M tokens over V symbols; P(largest <= k) = M! / V^M [x^M] (sum_{j<=k} x^j / j!)^V.
    """
    tokens, symbols = config["data"]["tokens"], config["data"]["vocab"] - 2
    expected = 0.0
    for most in range(tokens):
        powers = [1.0] + [0.0] * tokens
        for _ in range(symbols):
            powers = [
                sum(powers[n - j] / math.factorial(j) for j in range(min(most, n) + 1)) for n in range(tokens + 1)
            ]
        expected += 1 - math.factorial(tokens) * powers[tokens] / symbols**tokens
    return 100 * expected / tokens


BIASES = ("bias 0", "bias 1", "bias 2", "bias 4")

TABLES = {
    "charlm": Table(
        title="Character model",
        caption="Tiny Shakespeare, character by character. Minimal RNNs, GRU and LSTM stand in the paper's block "
        "(convolution of 4, RNN, MLP), the Transformer in nanoGPT's; Mamba's block has a convolution and a gate, and "
        "no MLP. GRU and LSTM are not in the paper's comparison.",
        column=None,
        settings=LANGUAGE_SCALE,
        panels=(("", LANGUAGE_MODELS),),
        more=LANGUAGE_COLUMNS,
    ),
    "charlm_nanogpt": Table(
        title="Calibration: nanoGPT's settings",
        caption="Tiny Shakespeare at the settings for which nanoGPT's README gives a loss, and minGRU in the paper's "
        "block for as many steps and characters.",
        column=None,
        settings=LANGUAGE_SCALE,
        more=LANGUAGE_COLUMNS,
        published="nanoGPT",
        published_scale=("cpu", "paper"),
    ),
    "charlm_docs": Table(
        title="Character model of another text",
        caption="What Python's help() says of the language, which comes with Python: for where Tiny Shakespeare cannot "
        "be had.",
        column=None,
        settings=LANGUAGE_SCALE,
        more=LANGUAGE_COLUMNS,
    ),
    "decision_local": Table(
        title="Decision RNNs on local data",
        caption="Policies learned from datasets that this project made (`scripts.collect`), in D4RL's schema and at "
        "its levels: scores are not to be compared with those on D4RL's own. Recurrent models carry their state "
        "through the episode, DT looks back 20 steps.",
        column="dataset",
        settings=DECISION_SCALE,
        more=DECISION_COLUMNS,
        wide=True,
    ),
    "decision_variants": Table(
        title="Decision RNNs: what the choices are worth",
        caption="minGRU on local/hopper-medium-replay. As above: windows padded on the right, which no model sees; "
        "three tokens a step; the state carried through the episode; time embeddings start from N(0, 0.02). Padded on "
        "the left, as the published code does, padding runs through the recurrence; its times start from N(0, 1).",
        column=None,
        settings=DECISION_SCALE,
        more=DECISION_COLUMNS,
    ),
    "table3_d4rl": Table(
        title="Table 3: D4RL",
        caption="Policies learned from D4RL's own datasets. Recurrent models carry their state through the episode, DT "
        "looks back 20 steps.",
        column="dataset",
        settings=DECISION_SCALE,
        more=DECISION_COLUMNS,
        wide=True,
    ),
    "table1_layers": Table(
        title="Table 1: layers",
        caption="Selective copying by number of layers.",
        column="layers",
        settings=COPYING_SCALE,
        chance=_chance,
    ),
    "table2_selective_copy": Table(
        title="Table 2: selective copying",
        caption="Selective copying by architecture (none, H3, Mamba) and layer, all run here. Minimal RNNs, GRU and "
        "LSTM have 3 layers, the others 2 as in the Mamba paper; minLSTM unnormalised is the authors' public code's.",
        column=None,
        settings=COPYING_SCALE,
        chance=_chance,
        panels=(
            ("Recurrent networks", ("minGRU", "minLSTM", "minLSTM unnormalised", "GRU", "LSTM")),
            ("No gate", ("No gate S6", "No gate S4", "No gate S4D")),
            ("H3", ("H3 S6", "H3 S4", "H3 Hyena")),
            ("Mamba", ("Mamba S6", "Mamba S4", "Mamba Hyena")),
        ),
    ),
    "forget_bias": Table(
        title="Figure 5: bias of the forget gate",
        caption="minLSTM with 3 layers on selective copying, the forget gate's bias starting from so much.",
        column=None,
        settings=COPYING_SCALE,
        chance=_chance,
        panels=(("minLSTM, bias of the forget gate", BIASES),),
    ),
    "selective_copy_longer": Table(
        title="Selective copying on a longer body",
        caption="On the way from the scaled task to the paper's: the paper's number of tokens in a body four times as "
        "long.",
        column=None,
        settings=COPYING_SCALE,
        chance=_chance,
        panels=(("Body of 256, 16 tokens", ("minGRU", "No gate S4")),),
    ),
}


def _layers(order: int, row: str, model: str, layers: int) -> Cell:
    settings = (f"model={model}", f"model.layers={layers}")
    return Cell("table1_layers", row, str(layers), "test_accuracy_percent", "selective_copy", settings, order)


def _copying(order: int, row: str, *overrides: str, paper: tuple[str, ...] = ()) -> Cell:
    metric, experiment = "test_accuracy_percent", "selective_copy"
    return Cell("table2_selective_copy", row, "accuracy", metric, experiment, overrides, order, paper)


def _baseline(order: int, row: str, model: str) -> Cell:
    # Layers and learning rate of the Mamba paper (arXiv 2312.00752, E.1).
    return _copying(order, row, f"model={model}", "model.layers=2", paper=("train.lr=1e-4",))


def _bias(order: int, row: str) -> Cell:
    settings = ("model=minlstm", "model.layers=3", f"model.forget_bias={row.removeprefix('bias ')}")
    metric, experiment = "test_accuracy_percent", "selective_copy"
    return Cell("forget_bias", row, "accuracy", metric, experiment, settings, order, profiles=SCALES)


def _longer(order: int, row: str, *overrides: str) -> Cell:
    settings = (*overrides, "data.length=256", "data.tokens=16")
    metric, experiment = "test_accuracy_percent", "selective_copy"
    return Cell("selective_copy_longer", row, "accuracy", metric, experiment, settings, order, profiles=("cpu",))


DECISION_MODELS = {
    "DT": "transformer", "DS4": "s4", "DAaren": "aaren", "DMamba": "mamba", "minLSTM": "minlstm", "minGRU": "mingru",
}  # fmt: skip
DATASETS = tuple(
    f"{env}-{level}"
    for level in ("medium", "medium-replay", "medium-expert")
    for env in ("halfcheetah", "hopper", "walker2d")
)


def _decision(table: str, source: str, model: str, dataset: str, order: int, profiles: tuple[str, ...]) -> Cell:
    # Decision Mamba's widths and rates, which the paper took (its appendix C).
    paper = ("model.dim=256",) if dataset in ("hopper-medium", "hopper-medium-replay") else ()
    paper += ("train.lr=1e-4",) if paper or dataset == "walker2d-medium" else ()
    settings = (f"model={DECISION_MODELS[model]}", f"data.dataset={source}/{dataset}")
    settings += () if model == "DT" else ("eval.context=null",)
    asked = () if dataset.startswith("hopper") else ("cpu",)
    return Cell(table, model, dataset, "score", "decision", settings, order, paper, profiles=profiles, asked=asked)


WALKER = "data.dataset=local/walker2d-medium"


def _variant(order: int, row: str, *overrides: str) -> Cell:
    dataset = () if any("data.dataset" in o for o in overrides) else ("data.dataset=local/hopper-medium-replay",)
    settings, asked = ("model=mingru", *dataset, *overrides), () if dataset else ("cpu",)
    return Cell("decision_variants", row, "score", "score", "decision", settings, order, profiles=("cpu",), asked=asked)


def _language(order: int, row: str, *scaled: str, model: str | None = None) -> Cell:
    return Cell(
        "charlm", row, "loss", "val_loss_nats", "charlm", (f"model={model or row.lower()}",), order,
        scaled_overrides=scaled,
    )  # fmt: skip


def _nanogpt(order: int, row: str, profile: str, *settings: str) -> Cell:
    scaled, paper = (settings, ()) if profile == "cpu" else ((), settings)
    return Cell("charlm_nanogpt", row, "loss", "val_loss_nats", "charlm", (), order, paper, scaled, (profile,))


# In the order in which a table shows them.
CELLS = (
    # Scaled: depths of the paper's and nanoGPT's block, and widths that give every model the parameters of nanoGPT's
    # small Transformer (804,096) within 1 %.
    _language(1, "minGRU", "model.layers=3", "model.dim=136"),
    _language(3, "minLSTM", "model.layers=3", "model.dim=128"),
    _language(4, "Mamba", "model.layers=6", "model.dim=136"),
    _language(2, "Transformer", "model.layers=4", "model.dim=128"),
    _language(6, "GRU", "model.layers=3", "model.dim=132"),
    _language(7, "LSTM", "model.layers=3", "model.dim=124"),
    _nanogpt(2, "Transformer, 4 layers, 128 wide", "cpu", "model=transformer", "model.layers=4"),
    _nanogpt(5, "minGRU, 3 layers, 128 wide", "cpu", "model=mingru", "model.layers=3"),
    _nanogpt(8, "Transformer, 6 layers, 384 wide", "paper", "model=transformer", "profile=nanogpt"),
    Cell(
        "charlm_docs",
        "minGRU",
        "loss",
        "val_loss_nats",
        "charlm",
        ("model=mingru", "data.text=python_docs"),
        9,
        profiles=("smoke",),
    ),
    *(
        # Hopper's data is made in minutes, the others' takes longer.
        _decision("decision_local", "local", model, dataset, (300 if "hopper" in dataset else 500) + 10 * i + j, SCALES)
        for i, dataset in enumerate(DATASETS)
        for j, model in enumerate(("minGRU", "DT", "minLSTM", "DMamba", "DAaren", "DS4"))
    ),
    *(
        _decision("table3_d4rl", "d4rl", model, dataset, 400 + 10 * i, ("paper",))
        for i, dataset in enumerate(DATASETS)
        for model in DECISION_MODELS
    ),
    Cell("decision_local", "minGRU", "hopper-random", "score", "decision", ("model=mingru",), 300, profiles=("smoke",)),
    _variant(380, "as above", "eval.context=null"),
    _variant(381, "looks back 20 steps"),
    _variant(382, "padded on the left, looks back 20 steps", "data.padding=left"),
    _variant(383, "one token a step", "eval.context=null", "data.tokens=1"),
    _variant(384, "times start from N(0, 1)", "eval.context=null", "data.time_std=1"),
    _variant(580, "walker2d-medium, as above", "eval.context=null", WALKER),
    _variant(581, "walker2d-medium, times start from N(0, 1)", "eval.context=null", "data.time_std=1", WALKER),
    _layers(40, "minLSTM", "minlstm", 1),
    _layers(60, "minLSTM", "minlstm", 2),
    _layers(20, "minLSTM", "minlstm", 3),
    _layers(30, "minGRU", "mingru", 1),
    _layers(50, "minGRU", "mingru", 2),
    _layers(10, "minGRU", "mingru", 3),
    _baseline(100, "No gate S4", "s4"),
    _baseline(120, "No gate S6", "s6"),
    _baseline(140, "H3 S4", "h3_s4"),
    _baseline(160, "H3 Hyena", "h3_hyena"),
    _baseline(130, "H3 S6", "h3_s6"),
    _baseline(150, "Mamba S4", "mamba_s4"),
    _baseline(170, "Mamba Hyena", "mamba_hyena"),
    _baseline(110, "Mamba S6", "mamba_s6"),
    _copying(20, "minLSTM", "model=minlstm", "model.layers=3"),
    _copying(10, "minGRU", "model=mingru", "model.layers=3"),
    # Not in the paper. 1.875 * 64 units give GRU 74,704 parameters a layer (minGRU has 74,944), LSTM 97,024
    # (minLSTM has 99,904).
    _copying(200, "GRU", "model=gru", "model.layers=3", "model.expansion=1.875"),
    _copying(210, "LSTM", "model=lstm", "model.layers=3", "model.expansion=1.875"),
    _copying(220, "minLSTM unnormalised", "model=minlstm_unnormalized", "model.layers=3"),
    _baseline(230, "No gate S4D", "s4d"),
    *(_bias(240 + i, row) for i, row in enumerate(BIASES)),
    _longer(180, "minGRU", "model=mingru", "model.layers=3"),
    _longer(190, "No gate S4", "model=s4", "model.layers=2"),
)


@dataclass(frozen=True)
class Run:
    experiment: str
    overrides: tuple[str, ...]
    seed: int
    config: dict[str, Any]
    run_id: str
    group: str  # the same for all seeds
    cells: tuple[Cell, ...]

    @property
    def label(self) -> str:
        return self.labels[0]

    @property
    def labels(self) -> tuple[str, ...]:
        """One for each cell that it fills."""
        return tuple(f"{self.experiment}: {cell.label}" for cell in self.cells)


def runs(profile: str, seeds: int, cells: Iterable[Cell] = CELLS) -> list[Run]:
    """Every run once, most wanted first, all of seed 0 before any of seed 1."""
    groups: dict[str, list[Cell]] = {}
    for cell in sorted((cell for cell in cells if profile in cell.profiles), key=lambda cell: cell.order):
        groups.setdefault(run_id({**cell.config(profile), "seed": None}), []).append(cell)
    found = []
    for seed in range(seeds):
        for group, filled in groups.items():
            config = {**filled[0].config(profile), "seed": seed}
            found.append(
                Run(
                    filled[0].experiment,
                    filled[0].settings(profile),
                    seed,
                    config,
                    run_id(config),
                    group,
                    tuple(filled),
                )
            )
    return found


@cache
def _compose(experiment: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    return compose(experiment, list(overrides))
