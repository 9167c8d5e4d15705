"""The grid of the paper's tables as data: which run fills which cell, and which cells are wanted first. Needs no torch.

A later experiment adds to METRICS, TABLES and CELLS; planner, tables, figures and report follow.
"""

import math
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from experiments.config import PROFILES, group_id, run_id
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
    "val_accuracy_percent": Metric("val_accuracy", "validation accuracy per token", "%", 100),
    "score": Metric("test_score", "score", "% of an expert"),  # D4RL's normalisation
    "score_carried": Metric("test_score_carried", "score with the state carried", "% of an expert"),
    "score_window": Metric("test_score_window", "score with a context of 20 steps", "% of an expert"),
    "score_second_target": Metric("test_score_second_target", "score for the second target", "% of an expert"),
    "val_score": Metric("val_score", "score of an evaluation in training", "% of an expert"),
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
    overrides: tuple[str, ...]  # beside profile and seed, the whole command line of its runs
    order: int  # the smaller, the more wanted
    profiles: tuple[str, ...] = PROFILES  # that have it
    asked: tuple[str, ...] = ()  # profiles that leave it to who asks for it by name, as it takes long
    seeds: tuple[int, ...] | None = None  # None: as many as are wanted, from 0

    def config(self, profile: str) -> dict[str, Any]:
        return _compose(self.experiment, self.settings(profile))

    def settings(self, profile: str) -> tuple[str, ...]:
        named = any(setting.startswith("profile=") for setting in self.overrides)
        return (*self.overrides, *(() if named else (f"profile={profile}",)))

    def command(self, profile: str, seed: int | str) -> str:
        """What a reader types for one of its runs."""
        return f"python -m experiments.{self.experiment} {shlex.join(self.settings(profile))} seed={seed}"

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

LANGUAGE_SCALE = (("data.block_size", "block"), ("train.steps", "steps"), ("train.batch_size", "batch"))
LANGUAGE_COLUMNS = (
    ("whole text (best)", "whole_loss_nats", "best"),
    ("step of best", "steps", "best"),
    ("tokens/s, beside other runs", "tokens_per_second", "last"),
)
DECISION_SCALE = (("model.dim", "width"), ("train.steps", "steps"), ("eval.episodes", "episodes an evaluation"))
DECISION_COLUMNS = (
    ("last, state carried", "score_carried", "last"),
    ("last, context of 20", "score_window", "last"),
    ("last, second target", "score_second_target", "last"),
    ("best evaluation", "val_score", "best"),
)
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


FINAL = "selective_copy_learning_rate_final"
SHORT = (
    "Each model trains for a part of its steps, on a schedule of that length and on one seed that no other table uses."
)
CHOSEN = "The tables above use the best rate of each row."
BIASES = ("bias 0", "bias 1", "bias 2", "bias 4")

TABLES = {
    "charlm": Table(
        title="Character model",
        caption="Character models of Tiny Shakespeare. All models follow nanoGPT's convention, as the paper did: tied "
        "embeddings, GPT-2's initialisation, LayerNorm without bias, weight decay on matrices only. minGRU, minLSTM, "
        "GRU and LSTM use the paper's block with the parts of the authors' code (convolution of 4 and pointwise, RNN, "
        "GEGLU). The Transformer uses nanoGPT's block. Mamba's block has no MLP, and starts from the initial values "
        "that its authors give for language. The paper does not compare GRU and LSTM.",
        column=None,
        settings=LANGUAGE_SCALE,
        panels=(("", LANGUAGE_MODELS),),
        more=LANGUAGE_COLUMNS,
    ),
    "charlm_convention": Table(
        title="Character model: effect of the convention",
        caption="The same models under two conventions. nanogpt: tied embeddings, GPT-2's initialisation (Mamba's own "
        "for Mamba), LayerNorm without bias. torch: embeddings drawn from N(0, 1), a separate head, torch's default "
        "initialisation, RMSNorm, as in the authors' public code.",
        column="convention",
        settings=LANGUAGE_SCALE,
        more=LANGUAGE_COLUMNS,
    ),
    "charlm_nanogpt": Table(
        title="Calibration: nanoGPT's settings",
        caption="Tiny Shakespeare at settings for which nanoGPT's README states a loss. minGRU, in the paper's block, "
        "trains for as many steps on as many characters.",
        column=None,
        settings=LANGUAGE_SCALE,
        more=LANGUAGE_COLUMNS,
        published="nanoGPT",
        published_scale=("cpu", "paper"),
    ),
    "charlm_docs": Table(
        title="Character model of another text",
        caption="A character model of the help() texts that come with Python, for machines without Tiny Shakespeare.",
        column=None,
        settings=LANGUAGE_SCALE,
        more=LANGUAGE_COLUMNS,
    ),
    "decision_local": Table(
        title="Decision RNNs on local data",
        caption="Policies trained on datasets that this project collects (`scripts.collect`) in D4RL's schema and at "
        "D4RL's levels. These scores do not compare with scores on D4RL's own datasets. minGRU, minLSTM, DAaren and "
        "DS4 carry their state through the episode. DT and DMamba reread the last 20 steps at each step, as published. "
        "The target returns are Decision Transformer's: 3600 and 1800 on Hopper, 12000 and 6000 on HalfCheetah, 5000 "
        "and 2500 on Walker2d.",
        column="dataset",
        settings=DECISION_SCALE,
        more=DECISION_COLUMNS,
        wide=True,
    ),
    "decision_variants": Table(
        title="Decision RNNs: effect of design choices",
        caption="Design choices on local/hopper-medium-replay. Unless a row says otherwise, windows are padded on the "
        "right, where no model sees the padding; a step is three tokens; minimal RNNs carry their state through the "
        "episode; timestep embeddings start from N(0, 1), as published. With padding on the left, the padding runs "
        "through the recurrence, as in Decision Mamba's code. With one token a step, that token joins state, "
        "return-to-go and the previous action, as in Decision S4.",
        column=None,
        settings=DECISION_SCALE,
        more=DECISION_COLUMNS,
    ),
    "table3_d4rl": Table(
        title="Table 3: D4RL",
        caption="Policies trained on D4RL's own datasets. minGRU, minLSTM, DAaren and DS4 carry their state through "
        "the episode. DT and DMamba reread the last 20 steps at each step, as published.",
        column="dataset",
        settings=DECISION_SCALE,
        more=DECISION_COLUMNS,
        wide=True,
    ),
    "table1_layers": Table(
        title="Table 1: layers",
        caption="Selective copying with 1, 2 and 3 layers.",
        column="layers",
        settings=COPYING_SCALE,
        chance=_chance,
    ),
    "table2_selective_copy": Table(
        title="Table 2: selective copying",
        caption="Selective copying by architecture (no gate, H3, Mamba) and sequence layer. We trained every row. "
        "minGRU, minLSTM, GRU and LSTM have 3 layers. The other models have 2 layers and no weight decay, as in the "
        "Mamba paper. minLSTM unnormalised follows the authors' public code: gates that are not normalised, and a "
        "forget bias of 3.",
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
        caption="minLSTM with 3 layers on selective copying, by the initial bias of its forget gate.",
        column=None,
        settings=COPYING_SCALE,
        chance=_chance,
        panels=(("minLSTM, bias of the forget gate", BIASES),),
    ),
    **{
        f"{experiment}_learning_rate": Table(
            title=f"{name}: learning rates",
            caption=text,
            column="learning rate",
            settings=settings,
            wide=True,
        )
        for experiment, name, settings, text in (
            ("charlm", "Character model", LANGUAGE_SCALE, f"{SHORT} {CHOSEN}"),
            (
                "selective_copy",
                "Selective copying",
                COPYING_SCALE,
                f"{SHORT} The two best rates of each row go on to the next table. After a third of the steps most "
                "models are still on their first slope, where a high rate looks better than it ends.",
            ),
            ("decision", "Decision RNNs", DECISION_SCALE, f"{SHORT} {CHOSEN}"),
        )
    },
    FINAL: Table(
        title="Selective copying: learning rates, all steps",
        caption=f"The two best rates of each row of the previous table, now for all steps, on the same seed. {CHOSEN}",
        column="learning rate",
        settings=COPYING_SCALE,
        wide=True,
    ),
}


COPYING = ("test_accuracy_percent", "selective_copy")  # metric, experiment
LANGUAGE = ("val_loss_nats", "charlm")


def _layers(order: int, row: str, model: str, layers: int) -> Cell:
    settings = (f"model={model}", *((f"model.layers={layers}",) if layers != 3 else ()))
    return Cell("table1_layers", row, str(layers), *COPYING, settings, order)


def _copying(order: int, row: str, *overrides: str, profiles: tuple[str, ...] = PROFILES) -> Cell:
    return Cell("table2_selective_copy", row, "accuracy", *COPYING, overrides, order, profiles)


def _bias(order: int, row: str) -> Cell:
    bias = row.removeprefix("bias ")
    settings = ("model=minlstm", *((f"model.forget_bias={bias}",) if bias != "0" else ()))
    return Cell("forget_bias", row, "accuracy", *COPYING, settings, order, SCALES)


DECISION_MODELS = {
    "DT": "transformer", "DS4": "s4", "DAaren": "aaren", "DMamba": "mamba", "minLSTM": "minlstm", "minGRU": "mingru",
}  # fmt: skip
DATASETS = tuple(
    f"{env}-{level}"
    for level in ("medium", "medium-replay", "medium-expert")
    for env in ("halfcheetah", "hopper", "walker2d")
)


def _decision(table: str, source: str, model: str, dataset: str, order: int, profile: str) -> Cell:
    settings: tuple[str, ...] = (f"model={DECISION_MODELS[model]}", f"data.dataset={source}/{dataset}")
    if profile == "paper":  # Decision Mamba's widths and rates, which the paper took (its appendix C)
        wide = dataset in ("hopper-medium", "hopper-medium-replay")
        settings += ("model.dim=256",) if wide else ()
        settings += ("train.learning_rate=1e-4",) if wide or dataset == "walker2d-medium" else ()
    asked = () if dataset.startswith("hopper") else ("cpu",)
    return Cell(table, model, dataset, "score", "decision", settings, order, (profile,), asked)


WALKER = "data.dataset=local/walker2d-medium"
SMALL_TIMES = "data.timestep_std=0.02"


def _variant(order: int, row: str, model: str, *overrides: str) -> Cell:
    dataset = () if WALKER in overrides else ("data.dataset=local/hopper-medium-replay",)
    settings, asked = (f"model={model}", *dataset, *overrides), () if dataset else ("cpu",)
    return Cell("decision_variants", row, "score", "score", "decision", settings, order, ("cpu",), asked)


def _language(order: int, row: str) -> Cell:
    return Cell("charlm", row, "loss", *LANGUAGE, (f"model={row.lower()}",), order)


def _convention(order: int, row: str, convention: str) -> Cell:
    settings = (f"model={row.lower()}", *((f"convention={convention}",) if convention != "nanogpt" else ()))
    return Cell("charlm_convention", row, convention, *LANGUAGE, settings, order, SCALES)


def _nanogpt(order: int, row: str, profile: str, *settings: str) -> Cell:
    return Cell("charlm_nanogpt", row, "loss", *LANGUAGE, settings, order, (profile,))


CHOICE_SEED = 1000  # of the runs that choose a learning rate


def _rates(
    experiment: str, metric: str, steps: int, rates: tuple[str, ...], rows: dict[str, tuple[str, ...]]
) -> list[Cell]:
    """Every row at every rate, in profile cpu."""
    return [
        Cell(
            f"{experiment}_learning_rate", row, rate, metric, experiment,
            (*settings, f"train.learning_rate={rate}", f"train.steps={steps}"), 0, ("cpu",), ("cpu",), (CHOICE_SEED,),
        )
        for row, settings in rows.items()
        for rate in rates
    ]  # fmt: skip


COPYING_MODELS = {
    "No gate S4": "s4", "No gate S6": "s6", "H3 S4": "h3_s4", "H3 Hyena": "h3_hyena", "H3 S6": "h3_s6",
    "Mamba S4": "mamba_s4", "Mamba Hyena": "mamba_hyena", "Mamba S6": "mamba_s6", "minLSTM": "minlstm",
    "minGRU": "mingru", "GRU": "gru", "LSTM": "lstm", "minLSTM unnormalised": "minlstm_unnormalized",
    "No gate S4D": "s4d",
}  # fmt: skip
# The two best rates of each at a third of the steps, the better first.
FINALISTS = {
    "No gate S4": ("3e-2", "1e-2"), "No gate S6": ("3e-2", "1e-2"), "H3 S4": ("3e-2", "1e-2"),
    "H3 Hyena": ("3e-3", "1e-3"), "H3 S6": ("1e-2", "3e-3"), "Mamba S4": ("1e-2", "3e-2"),
    "Mamba Hyena": ("3e-3", "1e-3"), "Mamba S6": ("1e-2", "3e-3"), "minLSTM": ("3e-2", "1e-2"),
    "minGRU": ("3e-2", "1e-2"), "GRU": ("1e-2", "3e-3"), "LSTM": ("3e-2", "3e-3"),
    "minLSTM unnormalised": ("3e-3", "3e-2"), "No gate S4D": ("3e-2", "1e-2"),
}  # fmt: skip
COPYING_ORDER = dict(
    zip(
        ("minGRU", "minLSTM", "No gate S4", "Mamba S6", "No gate S6", "H3 S6", "H3 S4", "Mamba S4", "H3 Hyena",
         "Mamba Hyena", "GRU", "LSTM", "minLSTM unnormalised", "No gate S4D"),
        (10, 20, *range(100, 220, 10)), strict=True,
    )
)  # fmt: skip


# In the order in which a table shows them.
CELLS = (
    *(_language(order, row) for order, row in zip((1, 3, 4, 2, 6, 7), LANGUAGE_MODELS, strict=True)),
    *(
        _convention(8, row, convention)
        for row in ("minGRU", "minLSTM", "Mamba", "Transformer")
        for convention in ("nanogpt", "torch")
    ),
    # nanoGPT's README states the loss at its own rate.
    _nanogpt(2, "Transformer, 4 layers, 128 wide", "cpu", "model=transformer", "train.learning_rate=1e-3"),
    _nanogpt(5, "minGRU, 3 layers, 128 wide", "cpu", "model=mingru", "model.dim=128", "train.learning_rate=1e-3"),
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
        _decision("decision_local", "local", model, dataset, 10 * i + j + (500, 300)["hopper" in dataset], profile)
        for profile in SCALES
        for i, dataset in enumerate(DATASETS)
        for j, model in enumerate(("minGRU", "DT", "minLSTM", "DMamba", "DAaren", "DS4"))
    ),
    *(
        _decision("table3_d4rl", "d4rl", model, dataset, 400 + 10 * i, "paper")
        for i, dataset in enumerate(DATASETS)
        for model in DECISION_MODELS
    ),
    Cell("decision_local", "minGRU", "hopper-random", "score", "decision", ("model=mingru",), 300, profiles=("smoke",)),
    *(_variant(380, row, DECISION_MODELS[row]) for row in ("minGRU", "minLSTM", "DT")),
    *(
        _variant(381, f"{row}, timesteps from N(0, 0.02)", DECISION_MODELS[row], SMALL_TIMES)
        for row in ("minGRU", "minLSTM", "DT")
    ),
    _variant(382, "minGRU, padded on the left, context of 20", "mingru", "data.padding=left", "eval.context_length=20"),
    _variant(383, "minGRU, one token a step", "mingru", "data.tokens=1"),
    _variant(580, "walker2d-medium, minGRU", "mingru", WALKER),
    _variant(581, "walker2d-medium, minGRU, timesteps from N(0, 0.02)", "mingru", WALKER, SMALL_TIMES),
    *(_layers(order, "minLSTM", "minlstm", layers) for order, layers in ((40, 1), (60, 2), (20, 3))),
    *(_layers(order, "minGRU", "mingru", layers) for order, layers in ((30, 1), (50, 2), (10, 3))),
    *(_copying(COPYING_ORDER[row], row, f"model={model}") for row, model in COPYING_MODELS.items()),
    *(
        _copying(230, f"{row}, the text's Adam", f"model={row.lower()}", "optimizer=paper_text", profiles=("paper",))
        for row in ("minLSTM", "minGRU")
    ),
    *(_bias(240 + i, row) for i, row in enumerate(BIASES)),
    *_rates(
        "charlm", "val_loss_nats", 500, ("1e-3", "3e-3", "1e-2"),
        {row: (f"model={row.lower()}",) for row in LANGUAGE_MODELS}
        | {
            f"{row}, torch's": (f"model={row.lower()}", "convention=torch")
            for row in ("minGRU", "minLSTM", "Mamba", "Transformer")
        },
    ),
    *_rates(
        "selective_copy", "val_accuracy_percent", 500, ("1e-3", "3e-3", "1e-2", "3e-2"),
        {row: (f"model={model}",) for row, model in COPYING_MODELS.items()},
    ),
    *(
        Cell(
            FINAL, row, rate, "val_accuracy_percent", "selective_copy",
            (f"model={COPYING_MODELS[row]}", f"train.learning_rate={rate}"), 0, ("cpu",), ("cpu",), (CHOICE_SEED,),
        )
        for row, rates in FINALISTS.items()
        for rate in rates
    ),
    *_rates(
        "decision", "val_score", 1000, ("3e-4", "1e-3", "3e-3", "1e-2"),
        {row: (f"model={model}", "data.dataset=local/hopper-medium-replay") for row, model in DECISION_MODELS.items()},
    ),
)  # fmt: skip


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
    def asked(self) -> bool:
        """Whether it is left to who asks for it by name."""
        return all(self.config["profile"] in cell.asked for cell in self.cells)

    @property
    def labels(self) -> tuple[str, ...]:
        """One for each cell that it fills."""
        return tuple(f"{self.experiment}: {cell.label}" for cell in self.cells)


def runs(profile: str, seeds: int, cells: Iterable[Cell] = CELLS) -> list[Run]:
    """Every run once, most wanted first, all of seed 0 before any of seed 1; those of a seed of their own come last."""
    groups: dict[tuple[str, tuple[int, ...] | None], list[Cell]] = {}  # of one configuration and the same seeds
    for cell in sorted((cell for cell in cells if profile in cell.profiles), key=lambda cell: cell.order):
        groups.setdefault((group_id(cell.config(profile)), cell.seeds), []).append(cell)
    found = []
    for seed in (*range(seeds), CHOICE_SEED):
        for (group, own), filled in groups.items():
            if seed not in (range(seeds) if own is None else own):
                continue
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
