"""The grid of selective copying."""

import math
from functools import partial
from typing import Any

from ..config import PROFILES
from .core import CHOSEN, SCALES, SHORT, Cell, Metric, Table, rate_cells, rate_table

METRICS = {
    "test_accuracy_percent": Metric("test_accuracy", "test accuracy per token", "%", 100),
    "val_accuracy_percent": Metric("val_accuracy", "validation accuracy per token", "%", 100),
}
SCALE = (
    ("data.length", "body length"),
    ("data.tokens", "tokens to copy"),
    ("train.steps", "steps"),
    ("train.batch_size", "batch"),
)
FINAL = "selective_copy_learning_rate_final"
BIASES = ("bias 0", "bias 1", "bias 2", "bias 4")
# The rows of table 2: the model, the cell's order, and the two best rates at a third of the steps, the better first.
ROWS = {
    "No gate S4": ("s4", 100, ("3e-2", "1e-2")),
    "No gate S6": ("s6", 120, ("3e-2", "1e-2")),
    "H3 S4": ("h3_s4", 140, ("3e-2", "1e-2")),
    "H3 Hyena": ("h3_hyena", 160, ("3e-3", "1e-3")),
    "H3 S6": ("h3_s6", 130, ("1e-2", "3e-3")),
    "Mamba S4": ("mamba_s4", 150, ("1e-2", "3e-2")),
    "Mamba Hyena": ("mamba_hyena", 170, ("3e-3", "1e-3")),
    "Mamba S6": ("mamba_s6", 110, ("1e-2", "3e-3")),
    "minLSTM": ("minlstm", 20, ("3e-2", "1e-2")),
    "minGRU": ("mingru", 10, ("3e-2", "1e-2")),
    "GRU": ("gru", 180, ("1e-2", "3e-3")),
    "LSTM": ("lstm", 190, ("3e-2", "3e-3")),
    "minLSTM unnormalised": ("minlstm_unnormalized", 200, ("3e-3", "3e-2")),
    "No gate S4D": ("s4d", 210, ("3e-2", "1e-2")),
}


def chance(config: dict[str, Any]) -> float:
    """The accuracy of chance, in percent: a token is any of the vocabulary but marker and noise."""
    return 100 / (config["data"]["vocab"] - 2)


def commonest(config: dict[str, Any]) -> float:
    """The accuracy, in percent, of always naming the commonest symbol of the sequence.

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


_table = partial(Table, settings=SCALE, chance=chance)
TABLES = {
    "table1_layers": _table(
        title="Table 1: layers",
        caption="Selective copying with 1, 2 and 3 layers.",
        column="layers",
    ),
    "table2_selective_copy": _table(
        title="Table 2: selective copying",
        caption="Selective copying by architecture (no gate, H3, Mamba) and sequence layer. We trained every row. "
        "minGRU, minLSTM, GRU and LSTM have 3 layers. The other models have 2 layers and no weight decay, as in the "
        "Mamba paper. minLSTM unnormalised follows the authors' public code: gates that are not normalised, and a "
        "forget bias of 3.",
        panels=(
            ("Recurrent networks", ("minGRU", "minLSTM", "minLSTM unnormalised", "GRU", "LSTM")),
            ("No gate", ("No gate S6", "No gate S4", "No gate S4D")),
            ("H3", ("H3 S6", "H3 S4", "H3 Hyena")),
            ("Mamba", ("Mamba S6", "Mamba S4", "Mamba Hyena")),
        ),
    ),
    "forget_bias": _table(
        title="Figure 5: bias of the forget gate",
        caption="minLSTM with 3 layers on selective copying, by the initial bias of its forget gate.",
        panels=(("minLSTM, bias of the forget gate", BIASES),),
    ),
}
RATES = {
    "selective_copy_learning_rate": rate_table(
        "Selective copying: learning rates",
        f"{SHORT} The two best rates of each row go on to the next table. After a third of the steps most models are "
        "still on their first slope, where a high rate looks better than it ends.",
        SCALE,
    ),
}
FINALS = {
    FINAL: rate_table(
        "Selective copying: learning rates, all steps",
        f"The two best rates of each row of the previous table, now for all steps, on the same seed. {CHOSEN}",
        SCALE,
    ),
}


def _cell(
    order: int, table: str, row: str, *settings: str, column: str = "accuracy", profiles: tuple[str, ...] = PROFILES
) -> Cell:
    return Cell(table, row, column, "test_accuracy_percent", "selective_copy", settings, order, profiles)


def _layers(order: int, row: str, layers: int) -> Cell:
    more = () if layers == 3 else (f"model.layers={layers}",)
    return _cell(order, "table1_layers", row, f"model={row.lower()}", *more, column=str(layers))


def _bias(order: int, row: str) -> Cell:
    bias = row.removeprefix("bias ")
    more = () if bias == "0" else (f"model.forget_bias={bias}",)
    return _cell(order, "forget_bias", row, "model=minlstm", *more, profiles=SCALES)


CELLS = (
    *(_layers(order, "minLSTM", layers) for order, layers in ((40, 1), (60, 2), (20, 3))),
    *(_layers(order, "minGRU", layers) for order, layers in ((30, 1), (50, 2), (10, 3))),
    *(_cell(order, "table2_selective_copy", row, f"model={model}") for row, (model, order, _) in ROWS.items()),
    *(
        _cell(
            230, "table2_selective_copy", f"{row}, the text's Adam", f"model={row.lower()}", "optimizer=paper_text",
            profiles=("paper",),
        )
        for row in ("minLSTM", "minGRU")
    ),
    *(_bias(240 + i, row) for i, row in enumerate(BIASES)),
)  # fmt: skip

_TRIED = ("selective_copy", "val_accuracy_percent", {row: (f"model={model}",) for row, (model, _, _) in ROWS.items()})
FINALISTS = {row: rates for row, (_, _, rates) in ROWS.items()}
RATE_CELLS = (
    *rate_cells(
        "selective_copy_learning_rate", *_TRIED, dict.fromkeys(ROWS, ("1e-3", "3e-3", "1e-2", "3e-2")),
        "train.steps=500",
    ),
    *rate_cells(FINAL, *_TRIED, FINALISTS),
)  # fmt: skip
