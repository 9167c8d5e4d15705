"""The grid of the synthetic tasks."""

from .core import SCALES, Cell, Metric, Table

LENGTHS = (64, 1024, 65536)
METRICS = {
    **{
        f"accuracy_at_{n}": Metric(f"test_accuracy_at_{n}", f"test accuracy at length {n:,}", "%", 100) for n in LENGTHS
    },
    "exact_at_65536": Metric("test_exact_at_65536", "sequences without an error at length 65,536", "%", 100),
}
SCALE = (
    ("model.dim", "width"),
    ("model.layers", "layers"),
    ("train.steps", "steps"),
    ("train.batch_size", "batch"),
    ("train.learning_rate", "learning rate"),
)
# Rows of the parity table: the model's file, and the cell's order.
PARITY = {
    "minGRU": ("mingru", 601),
    "minGRU in log space": ("mingru_log", 602),
    "minGRU, signed": ("mingru_signed", 600),
    "minLSTM": ("minlstm", 604),
    "minLSTM, signed": ("minlstm_signed", 603),
    "QRNN": ("qrnn", 607),
    "SRU": ("sru", 608),
    "GRU": ("gru", 605),
    "LSTM": ("lstm", 606),
    "Mamba": ("mamba", 609),
}


def chance(config: dict) -> float:
    """The accuracy of chance, in percent: there are two answers."""
    return 50.0


TABLES = {
    "parity": Table(
        title="Parity beyond the training length",
        caption="The parity of every prefix of a string of bits, by models that trained on 1 to 64 bits. Signed models "
        "have coefficients in (-1, 1), the others of their kind in (0, 1). minGRU in log space is the same function as "
        "minGRU in the paper's arithmetic. Validation and test have 65 to 256 bits, and 64 strings at each further "
        "length. Not in the paper.",
        settings=SCALE,
        chance=chance,
        panels=(("", tuple(PARITY)),),
        more=(
            *((f"at {n:,}, %", f"accuracy_at_{n}", "last") for n in LENGTHS),
            ("without an error at 65,536, %", "exact_at_65536", "last"),
        ),
    ),
}
CELLS = tuple(
    Cell("parity", row, "accuracy", "test_accuracy_percent", "synthetic", ("task=prefix_parity", f"model={model}"),
         order, SCALES)
    for row, (model, order) in PARITY.items()
)  # fmt: skip
