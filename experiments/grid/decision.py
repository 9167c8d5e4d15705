"""The grid of the decision models."""

from functools import partial

from .core import CHOSEN, SCALES, SHORT, Cell, Metric, Table, rate_cells, rate_table

METRICS = {
    "score": Metric("test_score", "score", "% of an expert"),  # D4RL's normalisation
    "score_carried": Metric("test_score_carried", "score with the state carried", "% of an expert"),
    "score_window": Metric("test_score_window", "score with a context of 20 steps", "% of an expert"),
    "score_second_target": Metric("test_score_second_target", "score for the second target", "% of an expert"),
    "val_score": Metric("val_score", "score of an evaluation in training", "% of an expert"),
}
SCALE = (("model.dim", "width"), ("train.steps", "steps"), ("eval.episodes", "episodes an evaluation"))
MORE = (
    ("last, state carried", "score_carried", "last"),
    ("last, context of 20", "score_window", "last"),
    ("last, second target", "score_second_target", "last"),
    ("best evaluation", "val_score", "best"),
)
MODELS = {
    "DT": "transformer", "DS4": "s4", "DAaren": "aaren", "DMamba": "mamba", "minLSTM": "minlstm", "minGRU": "mingru",
}  # fmt: skip
DATASETS = tuple(
    f"{env}-{level}"
    for level in ("medium", "medium-replay", "medium-expert")
    for env in ("halfcheetah", "hopper", "walker2d")
)
REPLAY, WALKER = "data.dataset=local/hopper-medium-replay", "data.dataset=local/walker2d-medium"
SMALL_TIMES = "data.timestep_std=0.02"

_table = partial(Table, settings=SCALE, more=MORE)
TABLES = {
    "decision_local": _table(
        title="Decision RNNs on local data",
        caption="Policies trained on datasets that this project collects (`scripts.collect`) in D4RL's schema and at "
        "D4RL's levels. These scores do not compare with scores on D4RL's own datasets. minGRU, minLSTM, DAaren and "
        "DS4 carry their state through the episode. DT and DMamba reread the last 20 steps at each step, as published. "
        "The target returns are Decision Transformer's: 3600 and 1800 on Hopper, 12000 and 6000 on HalfCheetah, 5000 "
        "and 2500 on Walker2d.",
        column="dataset",
        wide=True,
    ),
    "decision_variants": _table(
        title="Decision RNNs: effect of design choices",
        caption="Design choices on local/hopper-medium-replay. Unless a row says otherwise, windows are padded on the "
        "right, where no model sees the padding; a step is three tokens; minimal RNNs carry their state through the "
        "episode; timestep embeddings start from N(0, 1), as published. With padding on the left, the padding runs "
        "through the recurrence, as in Decision Mamba's code. With one token a step, that token joins state, "
        "return-to-go and the previous action, as in Decision S4.",
    ),
    "table3_d4rl": _table(
        title="Table 3: D4RL",
        caption="Policies trained on D4RL's own datasets. minGRU, minLSTM, DAaren and DS4 carry their state through "
        "the episode. DT and DMamba reread the last 20 steps at each step, as published.",
        column="dataset",
        wide=True,
    ),
}
RATES = {
    "decision_learning_rate": rate_table("Decision RNNs: learning rates", f"{SHORT} {CHOSEN}", SCALE),
}


def _policy(table: str, source: str, model: str, dataset: str, order: int, profile: str) -> Cell:
    settings: tuple[str, ...] = (f"model={MODELS[model]}", f"data.dataset={source}/{dataset}")
    if profile == "paper":  # Decision Mamba's widths and rates, which the paper took (its appendix C)
        wide = dataset in ("hopper-medium", "hopper-medium-replay")
        settings += ("model.dim=256",) if wide else ()
        settings += ("train.learning_rate=1e-4",) if wide or dataset == "walker2d-medium" else ()
    asked = () if dataset.startswith("hopper") else ("cpu",)
    return Cell(table, model, dataset, "score", "decision", settings, order, (profile,), asked)


def _variant(order: int, row: str, model: str, *overrides: str, dataset: str = REPLAY) -> Cell:
    settings, asked = (f"model={model}", dataset, *overrides), () if dataset == REPLAY else ("cpu",)
    return Cell("decision_variants", row, "score", "score", "decision", settings, order, ("cpu",), asked)


CELLS = (
    *(
        # Hopper's data is made in minutes, the others' takes longer.
        _policy("decision_local", "local", model, dataset, 10 * i + j + (500, 300)["hopper" in dataset], profile)
        for profile in SCALES
        for i, dataset in enumerate(DATASETS)
        for j, model in enumerate(("minGRU", "DT", "minLSTM", "DMamba", "DAaren", "DS4"))
    ),
    *(
        _policy("table3_d4rl", "d4rl", model, dataset, 400 + 10 * i, "paper")
        for i, dataset in enumerate(DATASETS)
        for model in MODELS
    ),
    Cell("decision_local", "minGRU", "hopper-random", "score", "decision", ("model=mingru",), 300, ("smoke",)),
    *(_variant(380, row, MODELS[row]) for row in ("minGRU", "minLSTM", "DT")),
    *(
        _variant(381, f"{row}, timesteps from N(0, 0.02)", MODELS[row], SMALL_TIMES)
        for row in ("minGRU", "minLSTM", "DT")
    ),
    _variant(382, "minGRU, padded on the left, context of 20", "mingru", "data.padding=left", "eval.context_length=20"),
    _variant(383, "minGRU, one token a step", "mingru", "data.tokens=1"),
    _variant(580, "walker2d-medium, minGRU", "mingru", dataset=WALKER),
    _variant(581, "walker2d-medium, minGRU, timesteps from N(0, 0.02)", "mingru", SMALL_TIMES, dataset=WALKER),
)

RATE_CELLS = rate_cells(
    "decision_learning_rate", "decision", "val_score",
    {row: (f"model={model}", REPLAY) for row, model in MODELS.items()},
    dict.fromkeys(MODELS, ("3e-4", "1e-3", "3e-3", "1e-2")), "train.steps=1000",
)  # fmt: skip
