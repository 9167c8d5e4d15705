"""The grid of the character model."""

from functools import partial

from ..config import PROFILES
from .core import CHOSEN, SCALES, SHORT, Cell, Metric, Table, rate_cells, rate_table

METRICS = {
    "val_loss_nats": Metric("val_loss", "validation loss per character", "nats", digits=3, higher_is_better=False),
    "whole_loss_nats": Metric("test_loss", "loss of all validation text", "nats", digits=3, higher_is_better=False),
    "steps": Metric("step", "step", digits=0),
    "tokens_per_second": Metric("tokens_per_second", "training speed", "tokens/s", digits=0),
}
SCALE = (("data.block_size", "block"), ("train.steps", "steps"), ("train.batch_size", "batch"))
MORE = (
    ("whole text (best)", "whole_loss_nats", "best"),
    ("step of best", "steps", "best"),
    ("tokens/s, beside other runs", "tokens_per_second", "last"),
)
MODELS = ("minGRU", "minLSTM", "Mamba", "Transformer", "GRU", "LSTM")
BOTH = ("minGRU", "minLSTM", "Mamba", "Transformer")  # that have both conventions

_table = partial(Table, settings=SCALE, more=MORE)
TABLES = {
    "charlm": _table(
        title="Character model",
        caption="Character models of Tiny Shakespeare. All models follow nanoGPT's convention, as the paper did: tied "
        "embeddings, GPT-2's initialisation, LayerNorm without bias, weight decay on matrices only. minGRU, minLSTM, "
        "GRU and LSTM use the paper's block with the parts of the authors' code (convolution of 4 and pointwise, RNN, "
        "GEGLU). The Transformer uses nanoGPT's block. Mamba's block has no MLP, and starts from the initial values "
        "that its authors give for language. The paper does not compare GRU and LSTM.",
        panels=(("", MODELS),),
    ),
    "charlm_convention": _table(
        title="Character model: effect of the convention",
        caption="The same models under two conventions. nanogpt: tied embeddings, GPT-2's initialisation (Mamba's own "
        "for Mamba), LayerNorm without bias. torch: embeddings drawn from N(0, 1), a separate head, torch's default "
        "initialisation, RMSNorm, as in the authors' public code.",
        column="convention",
    ),
    "charlm_nanogpt": _table(
        title="Calibration: nanoGPT's settings",
        caption="Tiny Shakespeare at settings for which nanoGPT's README states a loss. minGRU, in the paper's block, "
        "trains for as many steps on as many characters.",
        published="nanoGPT",
        published_scale=("cpu", "paper"),
    ),
    "charlm_docs": _table(
        title="Character model of another text",
        caption="A character model of the help() texts that come with Python, for machines without Tiny Shakespeare.",
    ),
}
RATES = {
    "charlm_learning_rate": rate_table("Character model: learning rates", f"{SHORT} {CHOSEN}", SCALE),
}


def _cell(
    order: int, table: str, row: str, *settings: str, column: str = "loss", profiles: tuple[str, ...] = PROFILES
) -> Cell:
    return Cell(table, row, column, "val_loss_nats", "charlm", settings, order, profiles)


def _model(row: str, convention: str = "nanogpt") -> tuple[str, ...]:
    return (f"model={row.lower()}", *((f"convention={convention}",) if convention != "nanogpt" else ()))


def _nanogpt(order: int, row: str, profile: str, *settings: str) -> Cell:
    return _cell(order, "charlm_nanogpt", row, *settings, profiles=(profile,))


CELLS = (
    *(_cell(order, "charlm", row, *_model(row)) for order, row in zip((1, 3, 4, 2, 6, 7), MODELS, strict=True)),
    *(
        _cell(8, "charlm_convention", row, *_model(row, convention), column=convention, profiles=SCALES)
        for row in BOTH
        for convention in ("nanogpt", "torch")
    ),
    # nanoGPT's README states the loss at its own rate.
    _nanogpt(2, "Transformer, 4 layers, 128 wide", "cpu", "model=transformer", "train.learning_rate=1e-3"),
    _nanogpt(5, "minGRU, 3 layers, 128 wide", "cpu", "model=mingru", "model.dim=128", "train.learning_rate=1e-3"),
    _nanogpt(8, "Transformer, 6 layers, 384 wide", "paper", "model=transformer", "profile=nanogpt"),
    _cell(9, "charlm_docs", "minGRU", "model=mingru", "data.text=python_docs", profiles=("smoke",)),
)

_ROWS = {row: _model(row) for row in MODELS} | {f"{row}, torch's": _model(row, "torch") for row in BOTH}
RATE_CELLS = rate_cells(
    "charlm_learning_rate", "charlm", "val_loss_nats", _ROWS, dict.fromkeys(_ROWS, ("1e-3", "3e-3", "1e-2")),
    "train.steps=500",
)  # fmt: skip
