"""Sequence mixers under one protocol (`minrnn.mixers.base.Mixer`), and the one place that picks one by name."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from .aaren import Aaren
from .attention import Attention
from .base import Mixer
from .hyena import Hyena
from .qrnn import QRNN
from .recurrent import GRUMixer, LSTMMixer, MinGRUMixer, MinLSTMMixer
from .s4 import S4, S4D, ShiftSSM
from .s6 import S6
from .sru import SRU
from .wrappings import H3, HyenaOperator, Mamba, Ungated

__all__ = [
    "Aaren", "Attention", "GRUMixer", "H3", "Hyena", "HyenaOperator", "LSTMMixer", "Mamba", "MinGRUMixer",
    "MinLSTMMixer", "Mixer", "QRNN", "S4", "S4D", "S6", "SRU", "ShiftSSM", "Ungated", "make",
]  # fmt: skip

MIXERS = {
    "mingru": MinGRUMixer, "minlstm": MinLSTMMixer, "gru": GRUMixer, "lstm": LSTMMixer, "attention": Attention,
    "aaren": Aaren, "qrnn": QRNN, "sru": SRU,
}  # fmt: skip
INNER = {"s4": S4, "s4d": S4D, "s6": S6, "hyena": Hyena}
WRAPPINGS = {"none": Ungated, "h3": H3, "mamba": Mamba}


def make(name: str, **settings: Any) -> Callable[[int], Mixer]:
    """Returns a function that makes the named mixer for a given width.

    Args:
        name: mingru, minlstm, gru, lstm, attention, aaren, qrnn, sru, or ssm: an `inner` layer (s4, s4d, s6, hyena) in
            a `wrapping` (none, h3, mamba), the grid of the Mamba paper's Table 1. As published, S4 in h3 is bilinear
            S4D-Lin, and Hyena in h3 is Hyena's own operator.
        settings: the mixer's own arguments; None means the default.
    """
    settings = {key: value for key, value in settings.items() if value is not None}
    if name != "ssm":
        return partial(_pick("name", MIXERS, name), **settings)
    wrapping = _pick("wrapping", WRAPPINGS, settings.pop("wrapping"))
    inner = _pick("inner", INNER, settings.pop("inner"))
    if wrapping is H3 and inner is Hyena:
        wrapping = HyenaOperator
    if wrapping is H3 and inner is S4:
        inner, settings = S4D, {"discretization": "bilinear", "learn_B": True} | settings

    def wrapped(dim: int) -> Mixer:
        # Mamba's block derives S6's rank from its own width, not from the inner one (mamba_simple.py).
        rank = {"dt_rank": math.ceil(dim / 16)} if inner is S6 else {}
        return wrapping(dim, inner=partial(inner, **rank, **settings))

    return wrapped


def _pick(argument: str, choices: dict[str, Any], name: str) -> Any:
    if name not in choices:
        raise ValueError(f"{argument}: expected one of {(*choices,)}, got {name!r}")
    return choices[name]
